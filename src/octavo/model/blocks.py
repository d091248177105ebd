"""What a decoder is made of, as plain descriptions: shapes, checkpoint names, options. No torch, no memory.

A family (``families/qwen3.py``) composes these; three readers build on them: the torch modules in ``layers/``, the
compiled CPU program in ``runner/cpu/``, and the memory planner. Every block owns its checkpoint names, so families
carry no loading code.

    Layer:  x ─┬─ input_norm ─ attention ─ (post_attention_norm) ─ + ─┬─ pre_mlp_norm ─ mlp ─ (post_mlp_norm) ─ + ─ x
               └──────────────────────────────────────────────────────┘└──────────────────────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from typing import Literal

from octavo.engine.cache.spec import ChunkedKV, CompressedKV, FullKV, KVSpec, LayerKV, StateKV, WindowKV

Activation = Literal["silu", "gelu_tanh", "gelu", "relu2", "swiglu_clamped"]
Scoring = Literal["softmax", "sigmoid", "softmax_top_k", "sqrt_softplus"]
Stored = Literal["rows", "transposed", "per_head", "alternating", "alternating_columns"]


@dataclass(frozen=True)
class Part:
    """A checkpoint tensor, or a slice of one, that fills some output rows of a ``Linear``.

    ``hf`` and ``gguf`` are names below the layer's prefix without ".weight"/".bias". ``heads`` > 0 marks rows that
    GGUF's llama architecture stores with each head's two rotary halves interleaved, ``hf_heads`` > 0 rows that Hugging
    Face checkpoints store so; the loader restores them. Of each such head ``rotated`` rows (0 = all) from ``turns_at`` on
    are meant.
    ``copies``: so many neighbouring ranks hold the same rows (see ``model.shard``).

    Parts may share a stored tensor of ``total`` rows (0 = it is this part alone), in which this one begins at
    ``start``. ``stored`` is the order in Hugging Face checkpoints: "rows" as here, "transposed" [in, out], or
    "per_head": pieces of ``stored_pieces`` rows (or three equal ones: q, k, v) of the first of ``stored_heads`` heads,
    then of the next. For stacked experts there are
    "alternating" rows of gate and up, and the same "alternating_columns" [.., in, out].
    """

    hf: str
    gguf: str
    out_features: int
    heads: int = 0
    copies: int = 1
    hf_heads: int = 0
    rotated: int = 0
    turns_at: int = 0
    start: int = 0
    total: int = 0
    stored: Stored = "rows"
    stored_heads: int = 0
    stored_pieces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Linear:
    """y = x W^T + b. Parts lie one after the other in the output dimension.

    ``shard`` under tensor parallelism: "column" splits every part's rows, "row" splits the input, "none" copies.
    """

    in_features: int
    parts: tuple[Part, ...]
    bias: bool = False
    shard: Literal["column", "row", "none"] = "none"

    @property
    def out_features(self) -> int:
        """Rows of all parts together."""
        return sum(part.out_features for part in self.parts)


@dataclass(frozen=True)
class Norm:
    """RMSNorm over ``size`` values: y = x / rms(x) * (w + offset); or, of kind "layer", LayerNorm (Ba et al. 2016).

    GGUF files store w + offset already; the loader keeps the sum, so execution never sees ``offset``. ``bias`` is for
    LayerNorm only: y = (x - mean(x)) / std(x) * w + b.
    """

    hf: str
    gguf: str
    size: int
    eps: float
    offset: float = 0.0
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first ``dim`` values of a head, halves convention (i pairs with i + dim/2).

    ``inv_freq`` has dim/2 entries (scaling already applied), ``scale`` multiplies cos and sin (yarn, longrope).
    Where longrope gives two sets, ``short`` replaces ``inv_freq`` in a run of at most ``original`` positions; the
    choice holds for the whole run, so that cached keys stay valid.
    """

    dim: int
    inv_freq: tuple[float, ...]
    scale: float = 1.0
    short: tuple[float, ...] = ()
    original: int = 0

    def frequencies(self, max_position: int) -> tuple[float, ...]:
        """The set for a run of up to ``max_position`` positions."""
        return self.short if self.short and max_position <= self.original else self.inv_freq


@dataclass(frozen=True)
class Attention:
    """Multi-head attention with grouped keys: fused qkv, optional q/k norm and rope, paged cache, output.

    ``window`` (tokens a query sees, itself included) 0 = all; ``softcap`` 0 = none; ``scale`` multiplies q·k.
    ``rope`` None = no position encoding in this layer. A q/k norm of size ``head_dim`` works on each head, of another
    size on the whole projection. ``sinks`` names a logit a head that takes probability but has no value (gpt-oss).
    The sigmoid of ``gate`` [heads * head_dim] multiplies what goes into ``output`` (Qwen3-Next).

    Llama 4: ``chunk`` > 0: a query sees keys of its own chunk of so many positions. ``unit_norm`` > 0: rotated queries and
    keys are divided by their root mean square, this being its epsilon. ``temperature`` (f, a): the query at position p is
    multiplied by 1 + a log(1 + floor((p + 1) / f)).
    """

    qkv: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int = 0
    softcap: float = 0.0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sinks: Part | None = None
    gate: Linear | None = None
    chunk: int = 0
    unit_norm: float = 0.0
    temperature: tuple[float, float] | None = None

    def cache(self, page_size: int, element_bytes: int) -> KVSpec:
        """What this layer keeps, with pages of ``page_size`` tokens and ``element_bytes`` a value."""
        token_bytes = 2 * self.num_kv_heads * self.head_dim * element_bytes
        if self.window:
            return WindowKV(page_size, token_bytes, self.window)
        if self.chunk:
            return ChunkedKV(page_size, token_bytes, self.chunk)
        return FullKV(page_size, token_bytes)


# Cache pages between two checkpoints of a recurrent state: a prefix can be found again at checkpoints only, but each
# costs a whole state.
CHECKPOINT_PAGES = 64


@dataclass(frozen=True)
class Recurrent:
    """A convolution over the last tokens and a recurrence over a matrix a head (see ``device.ops.recurrence``).

    ``project`` gives q, k and v of the convolution, one after the other, then the gate; ``small`` gives a (the step
    size), and for the delta rule b behind it. ``conv`` names the rows of the convolution for q, k and v. ``dt_bias``,
    ``a_log`` and ``skip`` name one number a head. ``norm`` works on runs of its size, or on ``norm_groups`` groups
    within it; ``gate_first`` = the gate multiplies what is normed, not the result.
    """

    kind: Literal["delta", "ssd"]
    project: Linear
    small: Linear
    output: Linear
    conv: tuple[Part, ...]
    conv_width: int
    conv_bias: bool
    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    dt_bias: Part
    a_log: Part
    norm: Norm
    norm_groups: int = 1
    skip: Part | None = None
    gate_first: bool = False

    def input_bytes(self, element_bytes: int) -> int:
        """Bytes of the last inputs of the convolution, padded so that the states behind them are aligned."""
        channels = 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim
        return -(-channels * (self.conv_width - 1) * element_bytes // 256) * 256

    def cache(self, page_size: int, element_bytes: int) -> KVSpec:
        """One state a checkpoint, in float32."""
        states = 4 * self.num_heads * self.key_dim * self.value_dim
        padded = -(-states // 256) * 256
        return StateKV(page_size * CHECKPOINT_PAGES, self.input_bytes(element_bytes) + padded)


@dataclass(frozen=True)
class Indexer:
    """Chooses the ``top_k`` keys that a query sees (DeepSeek-AI 2025): those with the highest sum_h w_h relu(q_h·k).

    ``query`` reads the normed queries' latent; ``key`` (then ``key_norm``) and ``weights`` (w) read the layer's input. The
    first values of q_h and k rotate, as many as the attention's. The keys [head_dim] are kept beside the latents.
    """

    query: Linear
    key: Linear
    key_norm: Norm
    weights: Linear
    num_heads: int
    head_dim: int
    top_k: int


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: of a token, one small latent is kept for all heads (DeepSeek-AI 2024).

        x ─ down ─┬─ (queries ─ query_norm ─) query ──► q_h = [nope | rope]      without query_norm, query reads x
                  ├─ latent ─ latent_norm ────────────► c          kept
                  └─ key ─ rope ──────────────────────► r          kept
        k_h = [K_h c | r]     v_h = V_h c     ``up`` holds K_h [nope_dim, latent_dim], V_h [value_dim, latent_dim] by head

    ``down``'s parts are the queries (where there is a ``query_norm``), the latent and the key. ``scale`` multiplies q·k.
    ``split_up`` names K and V where GGUF files hold them apart ([H, latent, nope] and [H, value, latent]). With an
    ``indexer`` a query sees the keys it chooses.
    """

    down: Linear
    query_norm: Norm | None
    query: Linear
    latent_norm: Norm
    up: Linear
    output: Linear
    num_heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int
    scale: float
    rope: Rope
    split_up: tuple[str, str] = ("attn_k_b", "attn_v_b")
    indexer: Indexer | None = None

    def cache(self, page_size: int, element_bytes: int) -> KVSpec:
        """What this layer keeps, with pages of ``page_size`` tokens and ``element_bytes`` a value."""
        index = self.indexer.head_dim if self.indexer is not None else 0
        return FullKV(page_size, (self.latent_dim + self.rope_dim + index) * element_bytes)


@dataclass(frozen=True)
class Compressor:
    """Makes one entry [head_dim] of every ``rate`` tokens: a weighted sum of their values, normed, then rotated.

    ``project`` gives each token's values and gates; the weights are the softmax over the tokens, channel by channel, of
    gates + ``bias`` [rate, width]. ``overlap``: values and gates are 2 head_dim wide, and an entry is made of the second
    halves of its own tokens and the first halves of those of the entry before.
    """

    project: Linear
    bias: Part
    norm: Norm
    rate: int
    head_dim: int
    overlap: bool

    @property
    def width(self) -> int:
        """Values of a token (there are as many gates)."""
        return self.head_dim * (2 if self.overlap else 1)


@dataclass(frozen=True)
class EntryIndexer:
    """Chooses the ``top_k`` entries that a query sees, as ``Indexer`` does keys; its keys are entries of their own."""

    compressor: Compressor
    query: Linear
    weights: Linear
    num_heads: int
    top_k: int


@dataclass(frozen=True)
class CompressedAttention:
    """Attention over a window of tokens and over compressed entries of all tokens before (DeepSeek-AI 2026).

        x ─ down ─┬─ queries ─ query_norm ─ query ─ (norm of each head) ─ rope ──► q_h
                  └─ key ─ key_norm ─ rope ──────────────────────────────────────► k = v, one for all heads
        compressor: x ──► entries, which are keys and values too

    The last ``rope.dim`` values of a head rotate, in neighbouring pairs; what comes out is rotated back, so that values
    count by their distance. An entry is seen once all of its tokens are. Heads are projected by ``num_groups`` groups
    (``grouped``: [groups * rank, heads / groups * head_dim]), then all together by ``output``. ``sinks`` as in ``Attention``.
    """

    down: Linear
    query_norm: Norm
    query: Linear
    key_norm: Norm
    grouped: Linear
    output: Linear
    sinks: Part
    num_heads: int
    num_groups: int
    head_dim: int
    scale: float
    rope: Rope
    window: int
    compressor: Compressor | None = None
    indexer: EntryIndexer | None = None

    def compressors(self) -> tuple[Compressor, ...]:
        """That of the entries, then that of the indexer's keys."""
        found = (self.compressor, self.indexer.compressor if self.indexer is not None else None)
        return tuple(compressor for compressor in found if compressor is not None)

    def cache(self, page_size: int, element_bytes: int) -> LayerKV:
        """The window; and with a compressor what the next entries are made of, and the entries of each compressor.

        A token's values and gates are wide and needed for a moment only: their pages hold fewer tokens, so that not all
        other pages must be as large.
        """
        head = self.head_dim * element_bytes
        window = WindowKV(page_size, head, self.window)
        if self.compressor is None:
            return window
        rate, width = self.compressor.rate, sum(2 * each.width for each in self.compressors()) * element_bytes
        size = page_size
        while size % 2 == 0 and size * width > window.page_bytes:
            size //= 2
        pieces = WindowKV(size, width, rate * (2 if self.compressor.overlap else 1))
        entries = [
            CompressedKV(lcm(page_size, rate), each.head_dim * element_bytes, rate)
            for each in self.compressors()
        ]
        return (window, pieces, *entries)


# What mixes a layer's tokens with those before them. Each states what it keeps of them (``cache``); the torch form is
# built by ``layers.decoder.make_mixer``.
Mixer = Attention | LatentAttention | Recurrent | CompressedAttention


@dataclass(frozen=True)
class GatedMLP:
    """down(act(gate(x)) * up(x)); gate and up are one fused Linear (gate first).

    ``limit`` > 0 (silu only): gate is clamped to at most so much, up to +-so much.
    """

    gate_up: Linear
    down: Linear
    intermediate: int
    activation: Activation = "silu"
    limit: float = 0.0


@dataclass(frozen=True)
class PlainMLP:
    """down(act(up(x)))."""

    up: Linear
    down: Linear
    intermediate: int
    activation: Activation = "gelu"


@dataclass(frozen=True)
class Router:
    """Scores every expert, keeps ``top_k`` of them and weighs what they give.

    ``scoring``: the softmax over all experts, the sigmoid or the root of the softplus of each, or the softmax over the
    chosen ones. ``table`` names a tensor [vocabulary, top_k] of the experts that each token id visits, whatever its scores,
    which then only weigh (DeepSeek V4). With
    ``renormalize`` the chosen weights sum to 1; then ``scale`` multiplies them. With ``groups`` > 1 only experts of the
    ``top_groups`` best groups are chosen (a group is as good as its ``group_best`` best experts together, 1 or 2).
    ``correction`` names a bias, below the layer's prefix, that is added for the choice but not for the weights.
    """

    linear: Linear
    top_k: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    correction: str = ""
    gguf_correction: str = ""
    table: Part | None = None


@dataclass(frozen=True)
class Experts:
    """``num`` gated MLPs of ``intermediate`` channels, stacked: gate_up [num, 2 I, hidden], down [num, hidden, I].

    Hugging Face checkpoints hold them stacked at ``hf`` and the names of ``hf_stacked``, or one by one at ``hf``.0.gate_proj
    and so on, the last names being ``hf_each`` (gate, up, down). ``gguf_each`` are the stacked names in GGUF files.
    ``interleaved``: stacked tensors are [num, in, out] and gate and up alternate (gpt-oss). ``columns``: they are [num, in,
    out], gate before up (Llama 4). ``total``: under expert parallelism, how many there are on all ranks (0: these).
    """

    hf: str
    num: int
    hidden: int
    intermediate: int
    bias: bool = False
    hf_each: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    hf_stacked: tuple[str, str] = ("gate_up_proj", "down_proj")
    gguf_each: tuple[str, str, str] = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    interleaved: bool = False
    columns: bool = False
    total: int = 0


@dataclass(frozen=True)
class MoE:
    """Sum over the chosen experts of weight * expert(x), plus a shared MLP, which ``shared_gate`` may weigh.

    ``alpha`` belongs to the activation "swiglu_clamped", ``limit`` to it and to "silu" (0 = none). ``weigh_input``: the one chosen expert sees weight * x
    and its answer is taken as it is (Llama 4).
    """

    router: Router
    experts: Experts
    activation: Activation = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    shared: GatedMLP | None = None
    shared_gate: Linear | None = None
    weigh_input: bool = False


FeedForward = GatedMLP | PlainMLP | MoE


@dataclass(frozen=True)
class HyperConnection:
    """``streams`` residuals side by side instead of one (Zhu et al. 2024; Xie et al. 2026).

    A linear map ``fn`` of all streams' normed values, times ``scale``, plus ``base``, gives for each token what of every
    stream the branch reads (``streams`` weights), what of the branch every stream gets (as many), and how the streams
    mix (a matrix made doubly stochastic by ``iterations`` of Sinkhorn-Knopp). At the ``end`` of a model only the first.
    """

    fn: Part
    base: Part
    scale: Part
    streams: int
    hidden: int
    eps: float
    norm_eps: float
    iterations: int = 0
    end: bool = False


@dataclass(frozen=True)
class Layer:
    """One decoder layer; see the drawing above. ``residual_scale`` multiplies both branches (1 = plain).

    Without ``input_norm`` or ``pre_mlp_norm`` the branch reads the residual stream itself. ``parallel``: both branches
    read the layer's input and are added together; without ``pre_mlp_norm`` they share ``input_norm``'s output.
    ``hyper``: how the attention, then the MLP, read and write several residual streams.
    """

    input_norm: Norm | None
    attention: Mixer
    pre_mlp_norm: Norm | None
    mlp: FeedForward
    post_attention_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    residual_scale: float = 1.0
    parallel: bool = False
    hyper: tuple[HyperConnection, HyperConnection] | None = None


@dataclass(frozen=True)
class Embedding:
    """Token embedding; row r is multiplied by ``scale``."""

    hf: str
    gguf: str
    vocab_size: int
    hidden: int
    scale: float = 1.0


@dataclass(frozen=True)
class DecoderSpec:
    """A whole decoder-only language model.

    Layer i's checkpoint names start with ``hf_layer_prefix.format(i)`` / ``gguf_layer_prefix.format(i)``. ``head``
    is None where the embedding is the output matrix too. ``logit_softcap`` 0 = none, ``logit_scale`` multiplies.
    Tensors whose names end with one of ``ignored``, or begin with one of ``ignored_prefixes``, are of no use.
    ``positions`` is a learned embedding of positions, added to the tokens'. ``bare_prefix`` is what some checkpoints
    leave out before all Hugging Face names, and ``bare_names`` how those then begin otherwise. ``streams`` joins the
    residual streams of models that have several. ``classifier`` stands in the place of the head of a model that tells
    classes apart. A stage of a pipeline begins at ``first_layer``; only the first has the
    embedding before its layers, only the last norm and head behind them.
    """

    embedding: Embedding
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear | None
    logit_softcap: float = 0.0
    logit_scale: float = 1.0
    hf_layer_prefix: str = "model.layers.{}."
    gguf_layer_prefix: str = "blk.{}."
    positions: Embedding | None = None
    bare_prefix: str = ""
    bare_names: tuple[tuple[str, str], ...] = ()
    streams: HyperConnection | None = None
    ignored: tuple[str, ...] = field(
        default=(
            "rotary_emb.inv_freq",
            "rope_freqs.weight",
            "rope_factors_long.weight",
            "rope_factors_short.weight",
        )
    )
    ignored_prefixes: tuple[str, ...] = ()
    first_layer: int = 0
    is_first: bool = True
    is_last: bool = True
    classifier: Linear | None = None
