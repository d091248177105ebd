"""What a config.json says of a classification head: its labels, and how its numbers become probabilities. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.keys import Keys
from octavo.protocol.control import Activation

MAX_LABELS = 65_536
ACTIVATIONS: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity"}


def classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a ...ForSequenceClassification model, in order; () for any other."""
    named = config.get("architectures")
    if not isinstance(named, list) or not any(str(n).endswith("ForSequenceClassification") for n in named):
        return ()
    keys = Keys(config, "config.json")
    labels = keys.mapping("id2label")
    count = len(labels) or keys.integer("num_labels", 2)
    if count > MAX_LABELS:
        raise ModelFileError(f"config.json has {count} labels; at most {MAX_LABELS} are served.")
    return tuple(str(labels.get(str(i), f"LABEL_{i}")) for i in range(count))


def has_classes(arch: ArchConfig) -> bool:
    """Whether the model is there to tell classes apart, and we compute it."""
    return arch.implementation == "octavo" and not arch.from_gguf and bool(classes(arch.raw))


def class_activation(config: Mapping[str, Any], num_labels: int) -> Activation:
    """One label, or several that do not exclude each other: sigmoid. Cross-encoders may name another."""
    keys = Keys(config, "config.json")
    named = keys.mapping("sentence_transformers").get("activation_fn")
    named = named or config.get("sbert_ce_default_activation_function")
    if isinstance(named, str):
        name = named.rsplit(".", 1)[-1]
        if name not in ACTIVATIONS:
            raise UnsupportedModelError(f"config.json: the activation {name!r} is not served.")
        return ACTIVATIONS[name]
    several = config.get("problem_type") == "multi_label_classification"
    return "sigmoid" if num_labels == 1 or several else "softmax"
