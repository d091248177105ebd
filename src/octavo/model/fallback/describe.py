"""What transformers says about a model: which class, how many heads; and whether it can run over pages at all."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.files.base import ModelFiles
from octavo.model.arch import ArchConfig
from octavo.model.blocks import Attention, DecoderSpec, Embedding, Layer, Linear, Norm, Part, PlainMLP
from octavo.model.fallback.interface import ATTENTION, attend
from octavo.model.read_arch import FULL, SLIDING, token_ids

BY_LENGTH = (
    "dynamic",
    "longrope",
)  # ropes that turn with a sequence's length: cached keys would not stay valid
INSTALL = "Install it: pip install 'octavo[hf]'."


def transformers_arch(files: ModelFiles) -> ArchConfig:
    """The architecture as transformers reads it; raises ``UnsupportedModelError`` where it cannot run over pages."""
    if files.format == "gguf":
        raise UnsupportedModelError(
            "GGUF files run on Octavo's own families only.",
            "Give transformers the model's safetensors files.",
        )
    config = read_config(files)
    _refuse_config(config)
    model = build_model(config, "meta", "float32")
    _refuse_model(model, config)
    heads, kv_heads, head_dim = _shapes(model, config)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    return ArchConfig(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=getattr(config, "max_position_embeddings", None) or 2048,
        norm_eps=0.0,
        tie_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        # Without layer types a window is applied all the same, but pages behind it are kept.
        layer_types=tuple(getattr(config, "layer_types", None) or (FULL,) * layers),
        rope={},
        sliding_window=getattr(config, "sliding_window", None) or 0,
        dtype=str(files.config.get("dtype") or files.config.get("torch_dtype") or "float32").removeprefix(
            "torch."
        ),
        eos_token_ids=token_ids(config.eos_token_id),
        implementation=f"transformers {_library().__version__}",
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        raw=files.config,
    )


def transformers_spec(arch: ArchConfig) -> DecoderSpec:
    """As much of the model as the cache and the planner must know; its modules are transformers' own."""
    hidden, inner = arch.hidden_size, arch.intermediate_size
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    norm = Norm("", "", hidden, 0.0)

    def linear(inputs: int, rows: int) -> Linear:
        return Linear(inputs, (Part("", "", rows),))

    def layer(kind: str) -> Layer:
        attention = Attention(
            qkv=linear(hidden, queries + 2 * keys),
            output=linear(queries, hidden),
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            scale=arch.head_dim**-0.5,
            rope=None,
            window=arch.sliding_window if kind == SLIDING else 0,
        )
        return Layer(norm, attention, norm, PlainMLP(linear(hidden, inner), linear(inner, hidden), inner))

    return DecoderSpec(
        embedding=Embedding("", "", arch.vocab_size, hidden),
        layers=tuple(layer(kind) for kind in arch.layer_types),
        norm=norm,
        head=None if arch.tie_embeddings else linear(hidden, arch.vocab_size),
    )


def read_config(files: ModelFiles) -> Any:
    """transformers' configuration object; of a multimodal model that of its language model."""
    library = _library()
    content = {key: value for key, value in files.config.items() if key != "auto_map"}  # names code
    model_type = content.get("model_type")
    if model_type not in library.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {library.__version__} does not know the architecture {model_type!r} either.",
            "A newer transformers may; code from a model's repository is never run.",
        )
    try:
        config = library.CONFIG_MAPPING[model_type].from_dict(content).get_text_config(decoder=True)
    except Exception as error:  # noqa: BLE001  (another library's checks: whatever it raises is about this file)
        raise UnsupportedModelError(
            f"transformers cannot read config.json as a decoder's: {_first_line(error)}"
        ) from None
    return config


def build_model(config: Any, device: str, dtype: str) -> Any:
    """transformers' model with our attention on ``device``; its parameters are not initialized."""
    library = _library()
    try:
        import torch
        from transformers.initialization import no_init_weights

        library.AttentionInterface.register(ATTENTION, attend)
        with torch.device(device), no_init_weights():
            model = library.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, dtype), attn_implementation=ATTENTION
            )
            model.tie_weights()
    except Exception as error:  # noqa: BLE001  (another library's model: whatever it raises is about this one)
        raise UnsupportedModelError(
            f"transformers cannot build {config.model_type!r} as a decoder over pages: {_first_line(error)}"
        ) from None
    return model.eval().requires_grad_(False)


def base_of(model: Any) -> Any:
    """The model below its output head."""
    return getattr(model, model.base_model_prefix)


def _refuse_config(config: Any) -> None:
    """What would run and answer nonsense must not run."""
    problem = ""
    if getattr(config, "is_encoder_decoder", False):
        problem = "it is an encoder and a decoder"
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING})
    if kinds:
        problem = f"it has layers of type {', '.join(kinds)}"
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in BY_LENGTH:
            problem = f"its rope {rope['rope_type']!r} changes with the length of a sequence"
    if getattr(config, "num_kv_shared_layers", None):
        problem = "layers share their keys and values"
    if getattr(config, "quantization_config", None):
        problem = "its weights are quantized"
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if not problem and not isinstance(getattr(config, name, None), int):
            problem = f"its configuration has no {name}"
    if problem:
        raise UnsupportedModelError(
            f"{config.model_type!r} cannot run through transformers here: {problem}.",
            "Only plain decoders whose cache is keys and values of every token can.",
        )


def _refuse_model(model: Any, config: Any) -> None:
    problem = ""
    attentions = {index for index, _ in attention_modules(model)}
    if getattr(model, "_is_stateful", False):
        problem = "it keeps recurrent state"
    elif "position_ids" not in inspect.signature(base_of(model).forward).parameters:
        problem = "its model takes no positions"
    elif attentions != set(range(config.num_hidden_layers)):
        problem = "its layers' attention cannot be found"
    if problem:
        raise UnsupportedModelError(f"{config.model_type!r} cannot run through transformers here: {problem}.")


def _shapes(model: Any, config: Any) -> tuple[int, int, int]:
    """(query heads, key heads, values a head) of every layer's attention, seen in a run without data."""
    seen: dict[int, tuple[int, int, int]] = {}

    def look(index: int, query: Any, key: Any, value: Any, *_: Any) -> Any:
        if value.shape[-1] != key.shape[-1]:
            raise UnsupportedModelError(
                f"{config.model_type!r} has keys of {key.shape[-1]} and values of {value.shape[-1]} numbers a head, which "
                "pages for transformers' models do not hold."
            )
        if index in seen:
            raise UnsupportedModelError(
                f"{config.model_type!r} cannot run through transformers here: layer {index} attends several times."
            )
        seen[index] = (query.shape[1], key.shape[1], key.shape[3])
        return query.transpose(1, 2)

    for index, module in attention_modules(model):
        module.octavo = partial(look, index)
    ids = model.dummy_inputs["input_ids"][:1, :3].to("meta")
    stopped = ""
    try:
        base_of(model)(input_ids=ids, position_ids=ids, use_cache=False)
    except UnsupportedModelError:
        raise
    except Exception as error:  # noqa: BLE001  (experts ask for values, which there are none of, behind an attention)
        stopped = f" ({_first_line(error)})"
    if len(set(seen.values())) != 1:
        why = (
            "its layers have different heads"
            if seen
            else "its attention is not one of transformers' interface"
        )
        raise UnsupportedModelError(
            f"{config.model_type!r} cannot run through transformers here: {why}{'' if seen else stopped}."
        )
    return next(iter(seen.values()))


def attention_modules(model: Any) -> list[tuple[int, Any]]:
    """(layer, module) of everything that knows its layer's number."""
    return [
        (module.layer_idx, module)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise UnsupportedModelError(
            "--model-impl transformers needs the package transformers.", INSTALL
        ) from None
    return transformers


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
