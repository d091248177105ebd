"""JSON of model folders, read with bounds: size, nesting, no duplicate keys, an object at the top."""

from __future__ import annotations

import json
from typing import Any

from octavo.errors import ModelFileError


def parse_json(raw: bytes, where: str, cure: str) -> dict[str, Any]:
    """The JSON object in ``raw``; ``where`` names the file in the ``ModelFileError`` that anything else becomes."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise ModelFileError(f"{where} has the key {twice!r} twice.", cure)
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise ModelFileError(f"{where} is not UTF-8 text.", cure) from None
    except RecursionError:
        raise ModelFileError(f"{where} is nested too deep.", cure) from None
    except ValueError as error:  # includes integers of thousands of digits
        raise ModelFileError(f"{where} is not valid JSON: {error}.", cure) from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{where} is no JSON object.", cure)
    return value
