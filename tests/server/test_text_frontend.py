"""The front end over a scripted engine: checks before, text and stops after, and nothing left running."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import Files, ScriptedClient, smollm_tokenizer

from octavo.api.chat.events import ChatEvent, Finish, PlainFormat, Text, chat_events
from octavo.api.chat.request import LARGE_CHAT, ChatRequest
from octavo.api.frontend import LARGE_TEXT, Frontend
from octavo.api.generation import Generation, TextDelta
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer, load_tokenizer
from octavo.errors import EngineDeadError, ModelFileError, OctavoError, QueueFullError, RequestError
from octavo.protocol.generate import Logprob, SamplingParams

TEMPLATE = ChatTemplate(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS = 2  # of the byte tokenizer below: a byte that no test text uses


def byte_tokenizer() -> Tokenizer:
    return load_tokenizer(Files("dummy", {"vocab_size": 300, "eos_token_id": EOS}))


def make(
    tokenizer: Tokenizer | None = None, defaults: dict[str, Any] | None = None, **client: Any
) -> tuple[Frontend, ScriptedClient]:
    tokenizer = tokenizer or byte_tokenizer()
    engine = ScriptedClient(tokenizer.vocab_size, **client)
    return Frontend(engine, tokenizer, TEMPLATE, model_name="test", defaults=defaults), engine


def tokens(text: str) -> list[int]:
    return list(text.encode())


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


def start(frontend: Frontend, prompt: str = "p", **sampling: Any) -> Generation:
    ids, params = frontend.prepare(prompt, frontend.default_sampling(**sampling))
    return frontend.generate(ids, params, request_id="r1")


async def collect(generation: Generation) -> list[TextDelta]:
    return [delta async for delta in generation]


def joined(deltas: list[TextDelta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


# -- before the engine ------------------------------------------------------------------------------------------------


def test_prepare_encodes_and_decides_max_tokens() -> None:
    frontend, _ = make()
    ids, sampling = frontend.prepare("hello", SamplingParams(max_tokens=None))
    assert ids == tokens("hello")
    assert sampling.max_tokens == 64 - 5
    assert frontend.prepare([1, 2], SamplingParams(max_tokens=7))[1].max_tokens == 7
    assert frontend.prepare([1, 2], SamplingParams(max_tokens=700, min_tokens=90))[1] == SamplingParams(
        max_tokens=62, min_tokens=62
    )
    assert frontend.prepare([1] * 63, SamplingParams())[1].max_tokens == 1


BAD: list[tuple[Any, dict[str, Any], str, str]] = [
    ("", {}, "prompt", "empty"),
    ([], {}, "prompt", "empty"),
    ([1, -5], {}, "prompt", r"prompt\[1\] is -5"),
    ([1, 2, 300], {}, "prompt", r"prompt\[2\] is 300, but token ids go from 0 to 299"),
    ([1, True], {}, "prompt", r"prompt\[1\] must be a token id, got True"),
    ([1.5], {}, "prompt", "must be a token id"),
    (["a"], {}, "prompt", "must be a token id"),
    ("x" * 64, {}, "prompt", "64 tokens, but the model's context holds 64"),
    ([1] * 100, {}, "prompt", "100 tokens, but the model's context holds 64"),
    ("x" * 1_000_000, {}, "prompt", "1000000 characters"),
    ("p", {"stop_token_ids": [5, 300]}, "stop_token_ids", r"stop_token_ids\[1\] is 300"),
    ("p", {"logit_bias": {300: 1.0}}, "logit_bias", r"logit_bias\[0\] is 300"),
    ("p", {"logit_bias": {-1: 1.0}}, "logit_bias", "is -1"),
    ("p", {"logprobs": 21}, "logprobs", "from 0 to 20, got 21"),
    ("p", {"logprobs": -1}, "logprobs", "got -1"),
    ("p", {"prompt_logprobs": 21}, "prompt_logprobs", "got 21"),
    (
        "p",
        {"min_tokens": 9, "max_tokens": 8},
        "min_tokens",
        r"min_tokens \(9\) is more than max_tokens \(8\)",
    ),
    ("p", {"stop": "x", "detokenize": False}, "stop", "detokenize"),
    ("p", {"temperature": float("nan")}, "temperature", "finite"),
    ("p", {"n": 10**9}, "n", "n:"),
    ("p", {"n": 0}, "n", "n:"),
    ("p", {"tempo": 1}, "tempo", "not a sampling parameter"),
]


@pytest.mark.parametrize(("prompt", "sampling", "param", "says"), BAD, ids=[f"{b[2]}-{b[3]}" for b in BAD])
def test_wrong_requests_never_reach_the_engine(
    prompt: Any, sampling: dict[str, Any], param: str, says: str
) -> None:
    frontend, engine = make()
    with pytest.raises(RequestError, match=says) as caught:
        frontend.prepare(prompt, frontend.default_sampling(**sampling))
    assert caught.value.param == param
    assert caught.value.status == 400
    assert engine.requests == []


def test_long_texts_are_tokenized_beside_the_event_loop() -> None:
    frontend, _ = make(max_model_len=LARGE_TEXT * 2)
    threads: list[bool] = []
    encode = frontend.tokenizer.encode

    def spy(text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            asyncio.get_running_loop()
            threads.append(False)
        except RuntimeError:
            threads.append(True)
        return encode(text, add_special_tokens)

    frontend.tokenizer.encode = spy  # type: ignore[method-assign]

    async def test() -> None:
        assert (await frontend.prepare_async("short", SamplingParams()))[0] == tokens("short")
        assert (
            len((await frontend.prepare_async("x" * (LARGE_TEXT + 1), SamplingParams()))[0]) == LARGE_TEXT + 1
        )
        chat = ChatRequest(messages=[{"role": "user", "content": "y" * (LARGE_CHAT + 1)}])
        assert len(await frontend.chat.token_ids_async(chat)) > LARGE_CHAT
        with pytest.raises(RequestError, match="stop_token_ids"):
            await frontend.prepare_async("x" * (LARGE_TEXT + 1), SamplingParams(stop_token_ids=[999]))

    run(test)
    assert threads == [False, True, True, True]


def test_sampling_defaults_come_from_the_model() -> None:
    defaults = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": None,
        "max_new_tokens": 9,
        "do_sample": True,
        "eos": 1,
    }
    frontend, _ = make(defaults=defaults)
    sampling = frontend.default_sampling(top_k=None, min_p=0.1, stop=["x"])
    assert sampling == SamplingParams(temperature=0.6, top_k=20, min_p=0.1, stop=["x"], max_tokens=None)
    assert frontend.default_sampling(temperature=0.0).temperature == 0.0
    assert frontend.prepare("p", sampling)[1].max_tokens == 9
    assert frontend.prepare("p", frontend.default_sampling(max_tokens=30))[1].max_tokens == 30
    assert make()[0].default_sampling() == SamplingParams(max_tokens=None)


@pytest.mark.parametrize("defaults", [{"temperature": -1.0}, {"top_p": "high"}, {"max_new_tokens": 0}])
def test_unusable_defaults_fail_at_the_start(defaults: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match="generation_config"):
        make(defaults=defaults)


# -- what the engine is asked -----------------------------------------------------------------------------------------


def test_the_engine_gets_what_was_prepared() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = frontend.generate(
            tokens("ab"), SamplingParams(seed=3, n=3), request_id="r", priority=5, cache_salt="s"
        )
        assert [request.sampling for request in engine.requests] == [
            SamplingParams(seed=3),
            SamplingParams(seed=4),
            SamplingParams(seed=5),
        ]
        assert len({request.id for request in engine.requests}) == 3
        for request in engine.requests:
            assert request.prompt_token_ids == tokens("ab")
            assert (request.priority, request.cache_salt, request.eos_token_ids) == (5, "s", [EOS])
        assert engine.requests[0].arrival_s > 1.6e9
        generation.abort()
        frontend.generate(tokens("ab"), SamplingParams(seed=2**63 - 1, n=2), request_id="r2").abort()
        assert engine.requests[-1].sampling.seed == -(2**63)
        frontend.generate(tokens("ab"), SamplingParams(n=2), request_id="r3").abort()
        assert engine.requests[-1].sampling.seed is None

    run(test)


def test_a_full_queue_leaves_nothing_behind() -> None:
    async def test() -> None:
        frontend, engine = make(max_requests=2)
        with pytest.raises(QueueFullError):
            start(frontend, n=3)
        assert engine.sinks == {}
        assert len(engine.aborted) == 2
        engine.alive = False
        with pytest.raises(EngineDeadError):
            start(frontend)

    run(test)


# -- what comes back --------------------------------------------------------------------------------------------------


def test_text_tokens_counts_and_finish() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, "abc")
        engine.send(0, tokens("Hi"), num_cached_tokens=2)
        engine.send(0, tokens(" é")[:-1])
        engine.send(0, tokens("é")[-1:], "length")
        deltas = await collect(generation)
        assert [delta.text for delta in deltas] == ["Hi", " ", "é"]
        assert [delta.token_ids for delta in deltas] == [tokens("Hi"), tokens(" é")[:-1], tokens("é")[-1:]]
        assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
        assert {(delta.num_prompt_tokens, delta.num_cached_tokens, delta.index) for delta in deltas} == {
            (3, 2, 0)
        }
        assert engine.aborted == []
        with pytest.raises(StopAsyncIteration):
            await anext(generation)

    run(test)


def test_a_reader_that_waits_is_woken_once_per_step() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend)
        reader = asyncio.create_task(collect(generation))
        for text in ("a", "b", "c"):
            await asyncio.sleep(0)
            engine.send(0, tokens(text))
        engine.send(0, tokens("d"), "stop")
        assert joined(await reader) == "abcd"

    run(test)


def test_ready_deltas_can_be_taken_in_one_go() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend)
        for text in "abc":
            engine.send(0, tokens(text))
        first = await anext(generation)
        assert first.text + joined(generation.take_ready()) == "abc"
        assert generation.take_ready() == []
        generation.abort()

    run(test)


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend)
        engine.send(0, tokens("é")[:1], "length")
        assert joined(await collect(generation)) == "�"

    run(test)


def test_choices_are_merged_by_index() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, n=2)
        engine.send(1, tokens("x"))
        engine.send(0, tokens("a"))
        engine.send(1, tokens("y"), "stop", stop_token=ord("y"))
        engine.send(0, tokens("b"), "length")
        deltas = await collect(generation)
        assert (joined(deltas, 0), joined(deltas, 1)) == ("ab", "x")
        assert [(d.index, d.finish_reason) for d in deltas if d.finish_reason] == [(1, "stop"), (0, "length")]

    run(test)


@pytest.mark.parametrize(
    ("sampling", "stop_token", "text", "reason"),
    [
        ({}, EOS, "hi", None),
        ({"stop_token_ids": [ord("!")]}, ord("!"), "hi", ord("!")),
        ({"stop_token_ids": [ord("!")], "include_stop_str_in_output": True}, ord("!"), "hi!", ord("!")),
        ({"stop_token_ids": [EOS]}, EOS, "hi", None),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, "hi", EOS),
    ],
)
def test_stop_tokens(sampling: dict[str, Any], stop_token: int, text: str, reason: int | None) -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, **sampling)
        engine.send(0, [*tokens("hi"), stop_token], "stop", stop_token=stop_token)
        (delta,) = await collect(generation)
        assert (delta.text, delta.finish_reason, delta.stop_reason) == (text, "stop", reason)
        assert delta.token_ids == [*tokens("hi"), stop_token]

    run(test)


def test_a_stop_string_ends_the_request_in_the_engine() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, n=2, stop=["END", "."])
        engine.send(0, tokens("abE"))
        engine.send(0, tokens("N"))
        engine.send(1, tokens("other"))
        engine.send(0, tokens("D tail"))
        assert engine.aborted == [engine.requests[0].id]
        engine.send(1, tokens("E"), "length")
        deltas = await collect(generation)
        assert [d.text for d in deltas if d.index == 0] == ["ab", "", ""]
        assert [d.token_ids for d in deltas if d.index == 0] == [tokens("abE"), tokens("N"), tokens("D tail")]
        last = next(d for d in deltas if d.index == 0 and d.finish_reason)
        assert (last.finish_reason, last.stop_reason) == ("stop", "END")
        assert joined(deltas, 1) == "otherE"
        assert deltas[-1].finish_reason == "length"

    run(test)


def test_a_delta_that_was_under_way_after_a_stop_is_dropped() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, stop=".")
        sink, request_id = engine.sinks[engine.requests[0].id], engine.requests[0].id
        engine.send(0, tokens("a."))
        engine.sinks[request_id] = sink
        engine.send(0, tokens("late"), "stop")
        assert joined(await collect(generation)) == "a"

    run(test)


def test_a_stop_string_in_the_last_delta_wins_over_length() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, stop=["."], include_stop_str_in_output=True)
        engine.send(0, tokens("a.b"), "length")
        (delta,) = await collect(generation)
        assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a.", "stop", ".")
        assert engine.aborted == []

    run(test)


def test_min_tokens_are_free_of_stop_strings() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, stop=["."], min_tokens=3)
        engine.send(0, tokens("."))
        engine.send(0, tokens("..a"))
        engine.send(0, tokens("b.c"))
        deltas = await collect(generation)
        assert joined(deltas) == "...ab"
        assert deltas[-1].stop_reason == "."

    run(test)


@settings(deadline=None, max_examples=60)
@given(
    text=st.text("ab.é\n", max_size=20),
    cuts=st.lists(st.integers(1, 4), max_size=20),
    stops=st.lists(st.text("ab.é", min_size=1, max_size=3), max_size=2),
    include=st.booleans(),
)
def test_the_answer_does_not_depend_on_the_engines_steps(
    text: str, cuts: list[int], stops: list[str], include: bool
) -> None:
    ids = tokens(text)

    async def answer(sizes: list[int]) -> tuple[str, Any]:
        frontend, engine = make()
        generation = start(frontend, stop=stops or None, include_stop_str_in_output=include)
        place = 0
        while engine.sinks:
            size = sizes.pop(0) if sizes else 1
            chunk = ids[place : place + size]
            place += size
            engine.send(0, chunk, "length" if place >= len(ids) else None)
        deltas = await collect(generation)
        return joined(deltas), deltas[-1].stop_reason

    assert asyncio.run(answer(list(cuts))) == asyncio.run(answer([100]))


def test_without_detokenizing_there_are_only_tokens() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, detokenize=False)
        engine.send(0, tokens("hi"), "length")
        (delta,) = await collect(generation)
        assert (delta.text, delta.token_ids) == ("", tokens("hi"))

    run(test)


def test_special_tokens_are_shown_on_request() -> None:
    async def test() -> None:
        for skip, text in ((True, "hi"), (False, "hi<|im_end|>")):
            tokenizer = smollm_tokenizer()
            frontend, engine = make(tokenizer)
            generation = start(frontend, skip_special_tokens=skip)
            engine.send(0, tokenizer.encode("hi<|im_end|>"), "length")
            assert joined(await collect(generation)) == text

    run(test)


def test_logprobs_pass_through() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, logprobs=1, prompt_logprobs=1)
        drawn, prompt = [[Logprob(65, -0.5, 1)]], [[Logprob(66, -1.0, 2)]]
        engine.send(0, [65], "length", logprobs=drawn, prompt_logprobs=prompt)
        (delta,) = await collect(generation)
        assert (delta.logprobs, delta.prompt_logprobs) == (drawn, prompt)

    run(test)


# -- ends -------------------------------------------------------------------------------------------------------------


def test_every_way_to_leave_a_stream_frees_the_engine() -> None:
    async def closing(frontend: Frontend, engine: ScriptedClient) -> None:
        async with aclosing(start(frontend, n=2)) as generation:
            engine.send(0, tokens("a"))
            assert (await anext(generation)).text == "a"

    async def cancelling(frontend: Frontend, engine: ScriptedClient) -> None:
        reader = asyncio.create_task(collect(start(frontend, n=2)))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    async def dropping(frontend: Frontend, engine: ScriptedClient) -> None:
        generation = start(frontend, n=2)
        engine.send(0, tokens("a"))
        async for _ in generation:
            break
        del generation
        gc.collect()

    async def test() -> None:
        for leave in (closing, cancelling, dropping):
            frontend, engine = make()
            await leave(frontend, engine)
            assert sorted(engine.aborted) == [request.id for request in engine.requests], leave.__name__
            assert engine.sinks == {}

    run(test)


def test_a_dead_engine_ends_every_stream() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, n=2)
        engine.send(0, tokens("a"))
        reader = asyncio.create_task(collect(generation))
        await asyncio.sleep(0)
        engine.die()
        with pytest.raises(EngineDeadError, match="died"):
            await reader
        with pytest.raises(EngineDeadError):
            start(frontend)

    run(test)


def test_one_failed_choice_fails_the_request_only() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation, other = start(frontend, n=2), start(frontend)
        engine.send(1, [], "error", error="A grammar was too large.")
        with pytest.raises(OctavoError, match="A grammar was too large") as caught:
            await collect(generation)
        assert not isinstance(caught.value, EngineDeadError)
        assert engine.aborted == [engine.requests[0].id]
        engine.send(2, tokens("fine"), "stop")
        assert joined(await collect(other)) == "fine"

    run(test)


# -- chats ------------------------------------------------------------------------------------------------------------


def test_chat_prompts() -> None:
    frontend, _ = make()
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert frontend.chat.render(ChatRequest(messages=messages)) == "<user>hi</user><assistant>"
    assert frontend.chat.token_ids(ChatRequest(messages=messages)) == tokens("<user>hi</user><assistant>")
    closed = ChatRequest(messages=messages, add_generation_prompt=False)
    assert frontend.chat.render(closed) == "<user>hi</user>"


def test_continuing_the_last_message() -> None:
    frontend, _ = make()
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a b "},
    ]
    request = ChatRequest(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert frontend.chat.render(request) == "<user>a</user><assistant>a b "
    with pytest.raises(RequestError, match="exclude each other"):
        frontend.chat.render(ChatRequest(messages=messages, continue_final_message=True))
    messages[-1]["content"] = None
    with pytest.raises(RequestError, match="continue_final_message needs"):
        frontend.chat.render(request)


def test_chat_events() -> None:
    async def test() -> None:
        frontend, engine = make()
        generation = start(frontend, "abc", n=2, stop=["."])
        engine.send(0, tokens("é")[:1], num_cached_tokens=1)
        engine.send(0, tokens("é")[1:])
        engine.send(1, tokens("x."))
        engine.send(0, [EOS], "stop", stop_token=EOS)
        events: list[ChatEvent] = [
            event async for event in chat_events(generation, [PlainFormat(), PlainFormat()])
        ]
        first, last = tokens("é")
        assert events == [
            Text(0, "", [first]),
            Text(0, "é", [last]),
            Text(1, "x", tokens("x.")),
            Finish(1, "stop", ".", 3, 0, 2),
            Text(0, "", [EOS]),
            Finish(0, "stop", None, 3, 1, 3),
        ]

    run(test)


def test_closing_chat_events_frees_the_engine() -> None:
    async def test() -> None:
        frontend, engine = make()
        async with aclosing(chat_events(start(frontend), [PlainFormat()])) as events:
            engine.send(0, tokens("a"))
            assert await anext(events) == Text(0, "a", tokens("a"))
        assert engine.aborted == [engine.requests[0].id]

    run(test)
