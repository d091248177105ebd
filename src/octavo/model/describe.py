"""From architecture numbers to blocks: the family is the file named like the model_type."""

from __future__ import annotations

import difflib
import pkgutil
from dataclasses import replace
from importlib import import_module

from octavo.engine.cache.spec import LayerKV
from octavo.errors import UnsupportedModelError
from octavo.model import families
from octavo.model.arch import ArchConfig
from octavo.model.blocks import Attention, DecoderSpec, Linear, Mixer, Part
from octavo.model.classes import classes, has_classes
from octavo.model.decoder import Decoder
from octavo.model.encoder import EncoderSpec
from octavo.model.fallback.describe import transformers_spec

ALIASES = {
    "gemma3": "gemma3_text",
    "llama4": "llama4_text",
    "kimi_k2": "deepseek_v3",
    "roberta": "bert",
    "xlm-roberta": "bert",
}
ENCODERS = ("bert",)
FALLBACK = "Or let transformers compute it: pip install 'octavo[hf]', then octavo serve MODEL --model-impl transformers."


def supported() -> list[str]:
    """Every model_type that has a family file."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def describe(arch: ArchConfig) -> DecoderSpec:
    """The model as blocks; raises ``UnsupportedModelError`` that names the nearest supported types."""
    if arch.implementation != "octavo":
        return transformers_spec(arch)
    if is_encoder(arch):
        raise UnsupportedModelError(
            f"{arch.model_type} is an encoder: it gives embeddings and generates no text."
        )
    module = import_module(f"octavo.model.families.{_family(arch)}")
    family: type[Decoder] = module.FAMILY
    spec = family(arch).spec()
    if not has_classes(arch):
        return spec
    head = Linear(arch.hidden_size, (Part("score", "", len(classes(arch.raw))),))
    return replace(spec, head=None, classifier=head)


def is_encoder(arch: ArchConfig) -> bool:
    """Whether the model reads texts both ways and only gives vectors."""
    ours = arch.implementation == "octavo"
    return ours and ALIASES.get(arch.model_type, arch.model_type) in ENCODERS


def describe_encoder(arch: ArchConfig) -> EncoderSpec:
    """An encoder as blocks."""
    module = import_module(f"octavo.model.families.{_family(arch)}")
    spec: EncoderSpec = module.FAMILY(arch).spec()
    return spec


def _family(arch: ArchConfig) -> str:
    """The file of the architecture."""
    name = ALIASES.get(arch.model_type, arch.model_type)
    if name not in supported():
        raise unknown_architecture(arch.model_type)
    return name


def unknown_architecture(model_type: str) -> UnsupportedModelError:
    """The error that names the nearest supported types, and the way around."""
    near = difflib.get_close_matches(model_type, supported(), n=3, cutoff=0.4)
    hint = f"Nearest supported: {', '.join(near)}." if near else f"Supported: {', '.join(supported())}."
    return UnsupportedModelError(f"The architecture {model_type!r} is not supported.", f"{hint} {FALLBACK}")


def cache_specs(
    spec: DecoderSpec, page_size: int, element_bytes: int, kv_bytes: int | None = None
) -> dict[int, LayerKV]:
    """Layer -> cache kind or kinds, with pages of ``page_size`` tokens and ``element_bytes`` a value, or ``kv_bytes`` one of keys and
    values, which may have a type of their own."""

    def size(mixer: Mixer) -> int:
        return kv_bytes if kv_bytes is not None and isinstance(mixer, Attention) else element_bytes

    return {i: layer.attention.cache(page_size, size(layer.attention)) for i, layer in enumerate(spec.layers)}
