"""SmolLM2 under grammars, on both CPU runners: whatever it would rather say, its answers parse."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.llm import LLM
from octavo.protocol.generate import SamplingParams

pytestmark = pytest.mark.model


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values are short."""
    kind = rng.choice(["integer", "boolean", "enum", "string", "array", "object"][: 6 if depth < 2 else 4])
    if kind == "integer":
        return {"type": "integer", "minimum": -5, "maximum": rng.randint(0, 300)}
    if kind == "boolean":
        return {"type": "boolean"}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", "blu\u00e9", 7, None, 'quo"te'], 3)}
    if kind == "string":
        return rng.choice(
            [{"type": "string", "maxLength": 8}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}]
        )
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": 2}
    names = rng.sample(["name", "size", "caf\u00e9", "a b"], rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The few keywords that ``random_schema`` uses."""
    if "enum" in schema:
        return value in schema["enum"] and not isinstance(value, bool)
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "boolean":
        return type(value) is bool
    if kind == "string":
        pattern = schema.get("pattern", ".{0,8}")
        return isinstance(value, str) and re.fullmatch(pattern.strip("^$"), value, re.DOTALL) is not None
    if kind == "array":
        return (
            isinstance(value, list) and len(value) <= 2 and all(fits(item, schema["items"]) for item in value)
        )
    properties = schema["properties"]
    return (
        isinstance(value, dict)
        and set(value) == set(properties)
        and all(fits(value[name], inner) for name, inner in properties.items())
    )


@pytest.fixture(scope="module", params=["compiled", "torch"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    made = LLM(
        "smollm2:135m",
        cpu_backend=request.param,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=48,
    )
    yield made
    made.close()


def test_random_schemas_always_parse(llm: LLM, request: pytest.FixtureRequest) -> None:
    compiled = "compiled" in request.node.name
    rng = random.Random(5)
    schemas = [random_schema(rng) for _ in range(24 if compiled else 3)]
    params = [
        SamplingParams(
            structured_outputs={"json": schema, "disable_any_whitespace": bool(i % 2)},  # type: ignore[arg-type]
            max_tokens=320,
            temperature=[0.0, 1.0, 2.0][i % 3],
            seed=i,
        )
        for i, schema in enumerate(schemas)
    ]
    prompts = ["Tell me about " + word for word in ["cats.", "the sea, " * 12, "JSON:", "numbers"]]
    outputs = llm.generate([prompts[i % 4] for i in range(len(schemas))], params)
    for schema, output in zip(schemas, outputs):
        answer = output.outputs[0]
        assert answer.finish_reason == "stop", (schema, answer.text)
        assert fits(json.loads(answer.text), schema), (schema, answer.text)


def test_other_forms(llm: LLM) -> None:
    forms: list[dict[str, Any]] = [
        {"regex": r"[0-9]{3}-[a-z]{2}"},
        {"choice": ["positive", "negative"]},
        {"grammar": 'start: "x=" NUM ("+" NUM)?\nNUM: /[0-9]{1,2}/'},
    ]
    params = [SamplingParams(structured_outputs=form, max_tokens=12, temperature=0) for form in forms]  # type: ignore[arg-type]
    texts = [output.outputs[0].text for output in llm.generate(["Say: "] * 3, params)]
    assert re.fullmatch(r"[0-9]{3}-[a-z]{2}", texts[0])
    assert texts[1] in ("positive", "negative")
    assert re.fullmatch(r"x=[0-9]{1,2}(\+[0-9]{1,2})?", texts[2])
