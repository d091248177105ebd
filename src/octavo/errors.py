"""Every error Octavo raises on purpose; each message names the cause and, where one exists, the cure."""

from __future__ import annotations


class OctavoError(Exception):
    """Base of all deliberate errors: ``cause`` says what is wrong, ``cure`` is one thing to do about it."""

    def __init__(self, cause: str, cure: str | None = None) -> None:
        self.cause = cause
        self.cure = cure
        super().__init__(cause if cure is None else f"{cause} {cure}")


class UsageError(OctavoError):
    """A flag or argument does not fit; nothing was started."""


class ModelFileError(OctavoError):
    """A model file is missing, malformed or not supported."""


class ModelNotFoundError(ModelFileError):
    """No source (path, cache, catalogue, hub) holds the model that was named."""


class UnsupportedModelError(OctavoError):
    """The architecture or a part of it is not implemented."""


class OutOfMemoryError(OctavoError):
    """Weights, cache or a step do not fit the device; the message holds the numbers."""


class RequestError(OctavoError):
    """A request is not acceptable (HTTP 400); ``param`` names the field at fault."""

    status = 400

    def __init__(self, cause: str, param: str | None = None, cure: str | None = None) -> None:
        self.param = param
        super().__init__(cause, cure)


class QueueFullError(RequestError):
    """The queue bound is reached (HTTP 429); retry later."""

    status = 429

    def __init__(self, cause: str, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(cause)


class EngineDeadError(OctavoError):
    """The engine process or its loop has died; requests in flight are lost (HTTP 503)."""


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust has panicked: an error of this call alone, although it is no ``Exception``."""
    return type(error).__name__ == "PanicException"
