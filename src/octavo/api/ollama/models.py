"""``/api/tags``, ``/api/show``, ``/api/ps``, ``/api/version``, and what a server of one model cannot do."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

from octavo.api.chat.formats.families import GENERIC
from octavo.api.ollama.convert import served_name
from octavo.api.ollama.generate import FORM, line
from octavo.api.ollama.schema import (
    Card,
    Details,
    Loaded,
    Processes,
    PullRequest,
    Shown,
    ShowRequest,
    Status,
    Tags,
    Version,
)
from octavo.api.openai.context import Context, Stream
from octavo.errors import RequestError

NEVER = "2318-12-31T00:00:00Z"  # as Ollama writes it for a model that is kept


class NotServedHereError(RequestError):
    """Something that Ollama does with its store of models, of which there is none here (HTTP 501)."""

    status = 501
    code = "not_implemented"


async def tags(context: Context, _: None) -> Tags:
    """All served names."""
    details, digest = _details(context), _digest(context)
    return Tags(
        [
            Card(
                name=name,
                model=name,
                modified_at=_created(context),
                size=context.info.facts.weights_bytes,
                digest=digest,
                details=details,
            )
            for name in context.served_model_names
        ]
    )


async def processes(context: Context, _: None) -> Processes:
    """The model is always loaded."""
    info = context.info
    return Processes(
        [
            Loaded(
                name=name,
                model=name,
                size=info.facts.weights_bytes,
                digest=_digest(context),
                details=_details(context),
                expires_at=NEVER,
                size_vram=0 if info.facts.device_kind == "cpu" else info.facts.weights_bytes,
                context_length=info.max_model_len,
            )
            for name in context.served_model_names
        ]
    )


async def show(context: Context, body: ShowRequest) -> Shown:
    """What is known of the model."""
    name = context.check_model(served_name(context, body.model or body.name))
    info, frontend = context.info, context.frontend
    defaults = frontend.default_sampling()
    advised = {"temperature": defaults.temperature, "top_p": defaults.top_p, "top_k": defaults.top_k}
    capabilities = ["completion"] if info.facts.can_generate else []
    if info.facts.can_generate and frontend.template.source is not None:
        # A template that knows no tools gets them explained in the prompt.
        capabilities.append("tools")
    if frontend.thinking is not None:
        capabilities.append("thinking")
    if info.facts.can_pool:
        capabilities.append("embedding")
    family = info.architecture
    facts: dict[str, Any] = {
        "general.architecture": family,
        "general.parameter_count": info.facts.num_parameters,
        f"{family}.context_length": info.max_model_len,
        "octavo.tool_format": frontend.tool_syntax.name if frontend.tool_syntax is not GENERIC else "generic",
    }
    return Shown(
        modelfile=f"# Served by Octavo {context.version}\nFROM {name}\n",
        parameters="\n".join(f"{key} {value}" for key, value in advised.items()),
        template=frontend.template.source or "",
        details=_details(context),
        model_info=facts,
        capabilities=capabilities,
        modified_at=_created(context),
    )


async def version(context: Context, _: None) -> Version:
    """Octavo's version."""
    return Version(context.version)


async def pull(context: Context, body: PullRequest) -> Status | Stream:
    """A model that is served needs no pulling; any other cannot be pulled here."""
    name = served_name(context, body.model or body.name)
    if name not in context.served_model_names:
        raise NotServedHereError(
            f"This server serves {', '.join(context.served_model_names)} and fetches no other model.",
            param="model",
            cure="Run octavo pull NAME and octavo serve NAME.",
        )
    done = Status("success")
    if body.stream is False:
        return done

    async def lines() -> AsyncGenerator[bytes, None]:
        yield line(done)

    return Stream(lines(), lambda: None, FORM)


async def not_here(context: Context, _: None) -> Status:
    """Create, copy, delete, push, upload: refused."""
    raise NotServedHereError(
        "This server has no store of models that clients may change.",
        cure="Use the command line: octavo pull, octavo serve.",
    )


def _details(context: Context) -> Details:
    info = context.info
    return Details(
        format=info.facts.weights_format,
        family=info.architecture,
        families=[info.architecture],
        parameter_size=_short(info.facts.num_parameters),
        quantization_level=info.dtype,
    )


def _short(count: int) -> str:
    """1_234_567 as "1.2M"."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def _digest(context: Context) -> str:
    return hashlib.sha256(context.fingerprint.encode()).hexdigest()


def _created(context: Context) -> str:
    return datetime.fromtimestamp(context.created_s, UTC).isoformat().replace("+00:00", "Z")
