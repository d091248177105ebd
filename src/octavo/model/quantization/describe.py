"""What a checkpoint says of its own quantization: ``quantization_config`` and its relatives as one frozen value. No torch.

    quantization = describe_quantization(files.config)      # None: plain weights
    scheme = quantization.of("model.layers.0.mlp.down_proj")  # None: this matrix is plain
    scheme.bits_per_weight(inputs)                           # on the device, scales included

Sources: AutoAWQ, GPTQModel, compressed-tensors, transformers' fine-grained fp8, NVIDIA ModelOpt, bitsandbytes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from octavo.errors import ModelFileError, UnsupportedModelError

Kind = Literal["int", "fp8", "int8", "nf4", "nvfp4", "mxfp4"]
CURE = "Use the unquantized model, another quantization of it, or a GGUF file."
SCALE_BITS = {"int": 16, "fp8": 32, "int8": 32, "nf4": 32, "nvfp4": 8, "mxfp4": 16}  # as kept on the device
GPTQ_BITS, PACKED_BITS = (2, 3, 4, 8), (4, 8)


@dataclass(frozen=True)
class Scheme:
    """How a matrix is stored.

    ``kind``: "int" unsigned codes of ``bits`` bits beside 16-bit activations; "fp8" and "int8" for both operands; "nf4",
    "nvfp4" and "mxfp4" 4-bit floats beside 16-bit activations. ``source`` names whose tensors they are. A scale belongs to
    ``group`` inputs (0 = all) of ``rows`` outputs (0 = all). ``act_order``: inputs of a group do not lie together.
    """

    kind: Kind
    source: str
    bits: int
    group: int = 0
    rows: int = 1
    symmetric: bool = True
    act_order: bool = False

    @property
    def stored_bits(self) -> int:
        """Bits of a code on the device: codes of fewer than 4 bits take 4."""
        return max(self.bits, 4)

    def bits_per_weight(self, inputs: int) -> float:
        """Bits on the device a weight of a matrix with so many inputs takes, scales and zero points included."""
        beside = SCALE_BITS[self.kind] + (0 if self.symmetric else 8)
        return self.stored_bits + beside / (self.group or inputs)


@dataclass(frozen=True)
class Rule:
    """Modules whose name matches ``pattern`` from its beginning are stored as ``scheme`` says (None = plain)."""

    pattern: str
    scheme: Scheme | None


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's quantization: the first rule that matches a module decides, else ``scheme``.

    ``method`` is the name that ``--quantization`` takes. ``kv_cache``: the type the cache was calibrated for, or None.
    """

    method: str
    scheme: Scheme | None
    rules: tuple[Rule, ...] = ()
    kv_cache: Literal["fp8"] | None = None

    def of(self, module: str) -> Scheme | None:
        """How the module's matrix is stored; ``module`` is its checkpoint name without ".weight"."""
        for rule in self.rules:
            if re.match(rule.pattern, module):
                return rule.scheme
        return self.scheme

    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that some module may have."""
        found = [rule.scheme for rule in self.rules if rule.scheme is not None]
        return tuple(dict.fromkeys(found + ([self.scheme] if self.scheme is not None else [])))


def describe_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The quantization that config.json names (None where it names none).

    ``files.folder`` puts the content of quantize_config.json, quant_config.json and hf_quant_config.json there too. Raises
    ``UnsupportedModelError`` for a method or a variant that Octavo does not read, ``ModelFileError`` for nonsense.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ModelFileError("config.json: quantization_config is no object.")
    method = _method(given)
    reader = READERS.get(method)
    if reader is None:
        raise UnsupportedModelError(f"Weights quantized by {method!r} are not supported.", CURE)
    found = reader(given)
    if method == "fp8" and config.get("model_type") == "deepseek_v4":
        found = _deepseek_v4(found, str(given.get("expert_dtype") or config.get("expert_dtype") or "fp8"))
    for rule in found.rules:
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ModelFileError(f"quantization_config: {rule.pattern!r} is no pattern: {error}.") from None
    return found


def _method(given: Mapping[str, Any]) -> str:
    """The quantizer; files beside config.json do not always name it."""
    named = str(given.get("quant_method") or "").lower()
    if named.startswith("modelopt") or "producer" in given or "quant_algo" in given:
        return "modelopt"
    if not named and "w_bit" in given:
        return "awq"
    if not named and "bits" in given and "group_size" in given:
        return "gptq"
    return named


def _integer(given: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = given.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelFileError(f"quantization_config: {key} is {value!r}, not a whole number.")
    return value


def _group(value: int) -> int:
    """-1 and 0 mean the whole row."""
    if value > 0 and (value % 16 or value & (value - 1)):
        raise UnsupportedModelError(f"Groups of {value} weights are not supported.", CURE)
    return max(0, value)


def _names(given: Mapping[str, Any], *keys: str) -> list[str]:
    """The first of the lists that is there."""
    for key in keys:
        value = given.get(key)
        if value:
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise ModelFileError(f"quantization_config: {key} is no list of names.")
            return [str(name) for name in value]
    return []


HEAD = Rule(r"lm_head$", None)


def _left_out(names: list[str], head: bool = False) -> tuple[Rule, ...]:
    """Rules for module names of which any part is in ``names``, and for the output head unless it is quantized too."""
    rules = tuple(Rule(rf".*(?:^|\.){re.escape(name.strip('.'))}(?:\.|$)", None) for name in names)
    return rules if head else (*rules, HEAD)


def _awq(given: Mapping[str, Any]) -> Quantization:
    version = str(given.get("version", "gemm")).lower()
    if version not in ("gemm", "marlin_in"):
        raise UnsupportedModelError(
            f"AWQ weights packed for {version!r} are not supported.", "Use an AWQ model of version gemm."
        )
    bits = _integer(given, "bits", given.get("w_bit", 4))
    if bits != 4:
        raise UnsupportedModelError(f"AWQ weights of {bits} bits are not supported.", CURE)
    group = _group(_integer(given, "group_size", given.get("q_group_size", 128)))
    symmetric = not given.get("zero_point", True)
    scheme = Scheme("int", "awq", 4, group, symmetric=symmetric)
    return Quantization("awq", scheme, _left_out(_names(given, "modules_to_not_convert")))


def _gptq(given: Mapping[str, Any]) -> Quantization:
    packing = str(given.get("checkpoint_format") or "gptq").lower()
    if packing not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ weights in the {packing!r} packing are not supported.", CURE)
    base = _gptq_scheme(given, Scheme("int", packing, 4, 128))
    rules = []
    dynamic = given.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ModelFileError("quantization_config: dynamic is no object.")
    for pattern, change in dynamic.items():
        if pattern.startswith("-:"):
            rules.append(Rule(pattern[2:], None))
        else:
            rules.append(Rule(pattern.removeprefix("+:"), _gptq_scheme(change, base)))
    names = _names(given, "modules_to_not_convert")
    return Quantization("gptq", base, (*rules, *_left_out(names, bool(given.get("lm_head")))))


def _gptq_scheme(given: Mapping[str, Any], base: Scheme) -> Scheme:
    bits = _integer(given, "bits", base.bits)
    if bits not in GPTQ_BITS:
        raise UnsupportedModelError(f"GPTQ weights of {bits} bits are not supported.", CURE)
    return replace(
        base,
        bits=bits,
        group=_group(_integer(given, "group_size", base.group or -1)),
        symmetric=bool(given.get("sym", base.symmetric)),
        act_order=bool(given.get("desc_act", base.act_order)),
    )


def _fp8(given: Mapping[str, Any]) -> Quantization:
    """transformers' and vLLM's own: a scale a tensor, or one for each block of 128 x 128."""
    block = given.get("weight_block_size")
    scheme = Scheme("fp8", "fp8", 8, rows=0)
    if block:
        if list(block) != [128, 128]:
            raise UnsupportedModelError(f"fp8 weights in blocks of {list(block)} are not supported.", CURE)
        scheme = Scheme("fp8", "fp8", 8, group=128, rows=128)
    names = _names(given, "modules_to_not_convert", "ignored_layers")
    return Quantization("fp8", scheme, _left_out(names))


def _deepseek_v4(found: Quantization, experts: str) -> Quantization:
    """Blocks of fp8 whose scales have a name of their own; ``experts`` "fp4": those that are routed to are MXFP4."""
    if found.scheme is None or not found.scheme.group or experts not in ("fp8", "fp4"):
        raise UnsupportedModelError(
            f"DeepSeek V4 with {experts} experts beside other than fp8 blocks is not supported.", CURE
        )
    scheme, rules = replace(found.scheme, source="deepseek_v4"), found.rules
    if experts == "fp4":
        fp4 = Scheme("mxfp4", "deepseek_v4", 4, group=32)
        rules = (Rule(r".*\.ffn\.experts\.\d+(?:\.|$)", fp4), *rules)
    return replace(found, scheme=scheme, rules=rules)


def _modelopt(given: Mapping[str, Any]) -> Quantization:
    """hf_quant_config.json, or the same inside config.json."""
    inner = given.get("quantization", given)
    if not isinstance(inner, Mapping):
        raise ModelFileError("hf_quant_config.json: quantization is no object.")
    kinds = {
        "FP8": Scheme("fp8", "modelopt", 8, rows=0),
        "FP8_PER_CHANNEL_PER_TOKEN": Scheme("fp8", "modelopt", 8),
        "NVFP4": Scheme("nvfp4", "modelopt", 4, group=16),
    }
    name = str(inner.get("quant_algo"))
    if name not in kinds:
        raise UnsupportedModelError(f"ModelOpt weights of kind {name!r} are not supported.", CURE)
    rules = tuple(
        Rule(fnmatch.translate(name if "*" in name else f"{name}*"), None)
        for name in _names(inner, "exclude_modules", "ignore")
    )
    cache = inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme")
    return Quantization("modelopt", kinds[name], rules, _kv_cache(cache))


def _kv_cache(given: Any) -> Literal["fp8"] | None:
    if not given:
        return None
    if str(given).upper() == "FP8":
        return "fp8"
    if isinstance(given, Mapping) and (given.get("type"), given.get("num_bits")) == ("float", 8):
        return "fp8"
    return None  # another type is advice that this engine does not follow


def _bitsandbytes(given: Mapping[str, Any]) -> Quantization:
    if not given.get("load_in_4bit", given.get("_load_in_4bit")):
        raise UnsupportedModelError("bitsandbytes weights of 8 bits are not supported.", CURE)
    kind = str(given.get("bnb_4bit_quant_type", "fp4"))
    if kind != "nf4":
        raise UnsupportedModelError(f"bitsandbytes weights of type {kind!r} are not supported.", CURE)
    names = _names(given, "llm_int8_skip_modules")
    return Quantization("bitsandbytes", Scheme("nf4", "bitsandbytes", 4, group=64), _left_out(names))


def _mxfp4(given: Mapping[str, Any]) -> Quantization:
    """gpt-oss: the experts alone."""
    experts = Rule(r".*\.experts(?:\.|$)", Scheme("mxfp4", "gpt_oss", 4, group=32))
    return Quantization("mxfp4", None, (experts,))


def _compressed(given: Mapping[str, Any]) -> Quantization:
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ModelFileError("quantization_config: config_groups is missing or empty.")
    if (given.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise UnsupportedModelError("Sparse compressed-tensors weights are not supported.", CURE)
    if (given.get("transform_config") or {}).get("config_groups"):
        raise UnsupportedModelError("compressed-tensors with transforms are not supported.", CURE)
    rules = [Rule(_target(name), None) for name in _names(given, "ignore")]
    default = None
    for group in groups.values():
        scheme = _compressed_scheme(group, str(group.get("format") or given.get("format") or ""))
        for target in _names(group, "targets"):
            if target == "Linear":
                default = scheme
            else:
                rules.append(Rule(_target(target), scheme))
    return Quantization("compressed-tensors", default, tuple(rules), _kv_cache(given.get("kv_cache_scheme")))


def _target(name: str) -> str:
    """compressed-tensors names modules exactly, or by a pattern."""
    return name[3:] if name.startswith("re:") else rf"{re.escape(name)}$"


def _compressed_scheme(group: Mapping[str, Any], packing: str) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise ModelFileError("quantization_config: a config group has no weights.")
    bits, kind = _integer(weights, "num_bits"), str(weights.get("type", "int"))
    strategy = str(weights.get("strategy") or "tensor")
    symmetric = bool(weights.get("symmetric", True))
    what = f"{packing or 'compressed'} weights of {bits} bits ({kind}, {strategy})"
    if packing == "nvfp4-pack-quantized":
        return Scheme("nvfp4", "compressed", 4, group=16)
    if packing == "pack-quantized" and kind == "int" and inputs is None and bits in PACKED_BITS:
        size = _group(_integer(weights, "group_size", -1)) if strategy == "group" else 0
        order = weights.get("actorder") in ("group", True)
        if strategy in ("group", "channel"):
            return Scheme("int", "compressed", bits, size, symmetric=symmetric, act_order=order)
    if packing in ("float-quantized", "naive-quantized", "") and (kind, bits) == ("float", 8):
        if strategy == "block" and list(weights.get("block_structure") or []) == [128, 128]:
            return Scheme("fp8", "compressed", 8, group=128, rows=128)
        if strategy in ("tensor", "channel"):
            return Scheme("fp8", "compressed", 8, rows=0 if strategy == "tensor" else 1)
    whole = packing in ("int-quantized", "naive-quantized", "") and (kind, bits, symmetric) == (
        "int",
        8,
        True,
    )
    if whole and isinstance(inputs, Mapping) and strategy in ("tensor", "channel"):
        if not inputs.get("symmetric", True):
            raise UnsupportedModelError("int8 activations with zero points are not supported.", CURE)
        return Scheme("int8", "compressed", 8, rows=0 if strategy == "tensor" else 1)
    raise UnsupportedModelError(f"compressed-tensors: {what} are not supported.", CURE)


READERS = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}
