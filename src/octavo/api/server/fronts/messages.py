"""What front processes say to each other. The first one has started the engine and keeps what all share."""

from __future__ import annotations

import msgspec


class Hello(msgspec.Struct, tag="hello"):
    """To the first, at once: who is there. The answer is ``Begin``."""

    front: int


class Begin(msgspec.Struct):
    """What to serve and how: ``EngineOptions`` and ``ServerOptions``, encoded."""

    engine: bytes
    server: bytes


class WhereEngines(msgspec.Struct, tag="where_engines"):
    """To the first: the folders of the engines, as soon as these are ready."""


class Serving(msgspec.Struct, tag="serving"):
    """To the first: requests are taken from now on."""


class EngineLost(msgspec.Struct, tag="engine_lost"):
    """From the first: the engine has ended."""

    reason: str


class Counts(msgspec.Struct):
    """Everything that a front process has counted (``RequestMetrics``)."""

    histograms: dict[str, tuple[list[int], float]] = {}
    finished: dict[str, int] = {}
    http: list[tuple[str, str, str, int]] = []
    http_seconds: list[tuple[str, str, list[int], float]] = []
    by_key: list[tuple[str, str, int]] = []
    prompt_tokens_cached: int = 0
    in_flight: int = 0


class Count(msgspec.Struct, tag="count"):
    """From the first: how far is it? The answer is ``Counts``."""


class Total(msgspec.Struct, tag="total"):
    """To the first: the ``Counts`` of all, where those of the one who asks are these."""

    mine: Counts


class Take(msgspec.Struct, tag="take"):
    """To the first: a request of a capped key begins. The answer is None, or (cause, seconds) of a refusal."""

    key: str


class Give(msgspec.Struct, tag="give"):
    """To the first: it is over."""

    key: str


class Keep(msgspec.Struct, tag="keep"):
    """To the first: keep a response, encoded as JSON with its items and turns; ``running`` in the background here."""

    owner: str
    kept: bytes
    running: bool


class Fetch(msgspec.Struct, tag="fetch"):
    """To the first: a response that is kept; the answer is its JSON, or None."""

    owner: str
    response_id: str


class Forget(msgspec.Struct, tag="forget"):
    """To the first: drop a response."""

    owner: str
    response_id: str


class Running(msgspec.Struct, tag="running"):
    """To the first: may this key have another response in the background? None, or the cause of a refusal."""

    owner: str


class Cancel(msgspec.Struct, tag="cancel"):
    """To the first: end a background response, wherever it runs. To another: it runs there."""

    owner: str
    response_id: str


Message = (
    Hello
    | WhereEngines
    | Serving
    | EngineLost
    | Count
    | Total
    | Take
    | Give
    | Keep
    | Fetch
    | Forget
    | Running
    | Cancel
)
