"""The composition root: from options to a running engine. Only this package sees every floor.

    opening: open_files    engine: build_core -> EngineCore    front: connect -> EngineClient -> build_frontend

Names load lazily, so that the front's process imports nothing of the engine's and the engine's nothing of the front's.
``python -m octavo.host ADDRESS`` is the engine's own process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.host.engine import build_core as build_core
    from octavo.host.engine import build_runner as build_runner
    from octavo.host.engine import model_facts as model_facts
    from octavo.host.engine import prepare as prepare
    from octavo.host.engine import read_vocabulary as read_vocabulary
    from octavo.host.engine import settings_of as settings_of
    from octavo.host.front import build_frontend as build_frontend
    from octavo.host.front import connect as connect
    from octavo.host.front import sampling_defaults as sampling_defaults
    from octavo.host.front import tokenizer_ahead as tokenizer_ahead
    from octavo.host.launch import decode_options as decode_options
    from octavo.host.launch import encode_options as encode_options
    from octavo.host.launch import start_engine as start_engine
    from octavo.host.opening import open_files as open_files
    from octavo.host.opening import open_headers as open_headers
    from octavo.host.opening import override as override

_HOMES = {
    "build_core": "octavo.host.engine",
    "build_runner": "octavo.host.engine",
    "model_facts": "octavo.host.engine",
    "prepare": "octavo.host.engine",
    "read_vocabulary": "octavo.host.engine",
    "settings_of": "octavo.host.engine",
    "build_frontend": "octavo.host.front",
    "connect": "octavo.host.front",
    "sampling_defaults": "octavo.host.front",
    "tokenizer_ahead": "octavo.host.front",
    "decode_options": "octavo.host.launch",
    "encode_options": "octavo.host.launch",
    "start_engine": "octavo.host.launch",
    "open_files": "octavo.host.opening",
    "open_headers": "octavo.host.opening",
    "override": "octavo.host.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo.host' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
