"""Requests and replies of Ollama's routes; ranges come from the one table of bounds. Durations are nanoseconds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from octavo.api.openai.schema import ModelName, Tools
from octavo.protocol import bounds

NumPredict = Annotated[int, Meta(ge=-2, le=2**31 - 1)]  # -1 and -2: as far as the context goes
NumContext = Annotated[int, Meta(ge=0, le=2**31 - 1)]
RepeatLast = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Text = bounds.Text
ShortText = Annotated[str, Meta(max_length=64)]
Images = Annotated[list[Any], Meta(max_length=1024)]
Seconds = Annotated[float, Meta(ge=-1e12, le=1e12)]
KeepAlive = ShortText | Seconds
Format = Literal["", "json"] | dict[str, Any]
Think = bool | Literal["low", "medium", "high"]


class LoadOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Options about loading. The model is loaded when the server starts, so they are accepted and change nothing."""

    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    low_vram: Any = None
    f16_kv: Any = None
    vocab_only: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    num_thread: Any = None
    numa: Any = None
    num_keep: Any = None


class Options(LoadOptions, kw_only=True):
    """``options`` of a request. A ``repeat_last_n`` of 0 turns the penalty off; otherwise the whole context counts."""

    num_predict: NumPredict | None = None
    temperature: bounds.Temperature | None = None
    top_k: bounds.TopK | None = None
    top_p: bounds.TopP | None = None
    min_p: bounds.MinP | None = None
    seed: bounds.Seed | None = None
    stop: bounds.StopString | bounds.StopStrings | None = None
    repeat_penalty: bounds.RepetitionPenalty | None = None
    repeat_last_n: RepeatLast | None = None
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    num_ctx: NumContext | None = None
    mirostat: Any = None
    mirostat_tau: Any = None
    mirostat_eta: Any = None
    tfs_z: Any = None
    typical_p: Any = None
    penalize_newline: Any = None


# Values of options that are not served, with which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mirostat": (0,),
    "mirostat_tau": (),
    "mirostat_eta": (),
    "tfs_z": (1, 1.0),
    "typical_p": (1, 1.0),
    "penalize_newline": (True,),
}


class FunctionCall(msgspec.Struct):
    """A call's function; arguments are an object."""

    name: str
    arguments: dict[str, Any] = {}
    index: int | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    """A call."""

    function: FunctionCall
    id: str | UnsetType = UNSET


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn of a request."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: Text = ""
    thinking: Text | None = None
    images: Images | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=1024)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Asked(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both generating routes know."""

    model: ModelName | None = None
    stream: bool | None = None
    format: Format | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None
    think: Think | None = None


class ChatRequest(Asked, kw_only=True):
    """Body of ``POST /api/chat``."""

    messages: Annotated[list[Message], Meta(max_length=16384)] = []
    tools: Tools | None = None


class GenerateRequest(Asked, kw_only=True):
    """Body of ``POST /api/generate``; ``context`` are the tokens that an earlier reply gave."""

    prompt: Text = ""
    system: Text | None = None
    raw: bool | None = None
    context: bounds.TokenIds | None = None
    suffix: Text | None = None
    template: Text | None = None
    images: Images | None = None


class EmbedRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /api/embed``; ``truncate`` (the default) cuts what is too long."""

    input: Text | Annotated[list[Text], Meta(max_length=2048)]
    model: ModelName | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65536)] | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None


class OldEmbedRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /api/embeddings``, which took one text."""

    prompt: Text
    model: ModelName | None = None
    options: Options | None = None
    keep_alive: KeepAlive | None = None


class Embedded(msgspec.Struct, kw_only=True):
    """Reply of ``POST /api/embed``."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OldEmbedded(msgspec.Struct):
    """Reply of ``POST /api/embeddings``."""

    embedding: list[float]


class ReplyMessage(msgspec.Struct, kw_only=True):
    """What the model said, or in a stream what it said since."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    thinking: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Timings(msgspec.Struct, kw_only=True):
    """The end of an answer: why, how many tokens, how long. Absent from all events but the last."""

    done_reason: str | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class ChatReply(Timings, kw_only=True):
    """Reply of ``POST /api/chat``, and each line of its stream."""

    model: str
    created_at: str
    message: ReplyMessage
    done: bool


class GenerateReply(Timings, kw_only=True):
    """Reply of ``POST /api/generate``, and each line of its stream."""

    model: str
    created_at: str
    response: str
    done: bool
    thinking: str | UnsetType = UNSET
    context: list[int] | UnsetType = UNSET


class ShowRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /api/show``."""

    model: ModelName | None = None
    name: ModelName | None = None
    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class PullRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /api/pull``."""

    model: ModelName | None = None
    name: ModelName | None = None
    stream: bool | None = None
    insecure: bool | None = None


class Status(msgspec.Struct):
    """Reply of ``POST /api/pull``."""

    status: str


class Details(msgspec.Struct, kw_only=True):
    """What kind of model it is."""

    parent_model: str = ""
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Card(msgspec.Struct, kw_only=True):
    """One served name."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(msgspec.Struct):
    """Reply of ``GET /api/tags``."""

    models: list[Card]


class Loaded(msgspec.Struct, kw_only=True):
    """One name of the loaded model."""

    name: str
    model: str
    size: int
    digest: str
    details: Details
    expires_at: str
    size_vram: int
    context_length: int


class Processes(msgspec.Struct):
    """Reply of ``GET /api/ps``."""

    models: list[Loaded]


class Shown(msgspec.Struct, kw_only=True):
    """Reply of ``POST /api/show``."""

    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Version(msgspec.Struct):
    """Reply of ``GET /api/version``: Octavo's version."""

    version: str
