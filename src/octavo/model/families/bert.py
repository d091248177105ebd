"""BERT and its kin (RoBERTa, XLM-R): encoders that look both ways, normed behind each branch (Devlin et al. 2018)."""

from __future__ import annotations

from octavo.errors import UnsupportedModelError
from octavo.model.arch import ArchConfig
from octavo.model.blocks import Embedding, Linear, Norm, Part, PlainMLP
from octavo.model.classes import classes
from octavo.model.encoder import Classifier, EncoderLayer, EncoderSpec
from octavo.model.keys import Keys

# RoBERTa counts positions from behind its padding token.
FIRST_POSITION = {"roberta": 2, "xlm-roberta": 2}


class Bert:
    """Composes an encoder of ``arch``."""

    def __init__(self, arch: ArchConfig) -> None:
        self.arch = arch
        keys = Keys(arch.raw, "config.json")
        kind = keys.source.get("position_embedding_type", "absolute")
        if kind != "absolute":
            raise UnsupportedModelError(f"config.json: positions of type {kind!r} are not supported.")
        self.num_types = keys.integer("type_vocab_size", 2)
        self.root = "bert." if arch.model_type == "bert" else "roberta."

    def spec(self) -> EncoderSpec:
        """The whole encoder."""
        a, prefix = self.arch, f"{self.root}embeddings."
        first = FIRST_POSITION.get(a.model_type, 0)
        classifier = self.classifier()
        no_head = () if classifier is not None else ("classifier.",)
        pooler = () if classifier is not None and self.root == "bert." else (f"{self.root}pooler.",)
        return EncoderSpec(
            embedding=Embedding(f"{prefix}word_embeddings", "", a.vocab_size, a.hidden_size),
            positions=Embedding(f"{prefix}position_embeddings", "", a.max_position, a.hidden_size),
            types=Embedding(f"{prefix}token_type_embeddings", "", self.num_types, a.hidden_size),
            norm=self.norm(f"{prefix}LayerNorm"),
            layers=tuple(self.layer() for _ in range(a.num_layers)),
            num_heads=a.num_heads,
            max_length=a.max_position - first,
            first_position=first,
            hf_layer_prefix=f"{self.root}encoder.layer.{{}}.",
            bare_prefix=self.root,
            ignored=("position_ids",),
            ignored_prefixes=(*pooler, "cls.", "lm_head.", *no_head),
            classifier=classifier,
        )

    def classifier(self) -> Classifier | None:
        """The head of a model for classes or pairs; BERT calls its first part the pooler."""
        labels, size = classes(self.arch.raw), self.arch.hidden_size
        if not labels:
            return None
        dense, out = "classifier.dense", "classifier.out_proj"
        if self.root == "bert.":
            dense, out = "bert.pooler.dense", "classifier"
        return Classifier(
            dense=Linear(size, (Part(dense, "", size),), True),
            out=Linear(size, (Part(out, "", len(labels)),), True),
        )

    def layer(self) -> EncoderLayer:
        """One layer."""
        size, inner = self.arch.hidden_size, self.arch.intermediate_size
        return EncoderLayer(
            qkv=Linear(
                size, tuple(Part(f"attention.self.{n}", "", size) for n in ("query", "key", "value")), True
            ),
            output=Linear(size, (Part("attention.output.dense", "", size),), True),
            attention_norm=self.norm("attention.output.LayerNorm"),
            mlp=PlainMLP(
                up=Linear(size, (Part("intermediate.dense", "", inner),), True),
                down=Linear(inner, (Part("output.dense", "", size),), True),
                intermediate=inner,
                activation=self.arch.activation,
            ),
            mlp_norm=self.norm("output.LayerNorm"),
        )

    def norm(self, name: str) -> Norm:
        """A LayerNorm with bias."""
        return Norm(name, "", self.arch.hidden_size, self.arch.norm_eps, kind="layer", bias=True)


FAMILY = Bert
