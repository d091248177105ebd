"""``LLM`` over a real engine core whose runner computes nothing: every token is scripted."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from octavo import host
from octavo.api.frontend import Frontend
from octavo.api.text.byte_tokenizer import build_byte_tokenizer
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.config import EngineOptions
from octavo.engine.cache.layout import CacheGroup, CacheLayout
from octavo.engine.cache.spec import FullKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner
from octavo.engine.settings import EngineSettings
from octavo.errors import OctavoError, QueueFullError, RequestError, UsageError
from octavo.llm import LLM, DirectClient
from octavo.protocol.control import CheckPool, GetStats
from octavo.protocol.generate import SamplingParams, TokenDelta
from octavo.protocol.plan import SlotInit

VOCAB, EOS = 300, 299
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
Script = Callable[[SlotInit, int], int]


def says(text: str) -> Script:
    """Answers ``text`` and then the end token, whatever was asked."""
    data = text.encode()

    def token(init: SlotInit, position: int) -> int:
        done = position - init.num_prompt
        return data[done] if done < len(data) else EOS

    return token


def echoes(init: SlotInit, position: int) -> int:
    """Repeats the prompt, shifted by the seed's parity, so that choices can be told apart."""
    return init.token_ids[(position - init.num_prompt) % init.num_prompt]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LLM]]:
    made: list[LLM] = []

    def build(
        script: Script = echoes, *, max_queue_len: int = 4096, defaults: Any = None, slots: int = 4
    ) -> LLM:
        layout = CacheLayout((CacheGroup(FullKV(4, 1), (0,)),), 4, 1)
        runner = NullRunner(layout, num_pages=200, num_slots=slots, vocab_size=VOCAB, script=script)
        settings = EngineSettings(
            max_model_len=64,
            max_num_seqs=slots,
            max_num_batched_tokens=32,
            vocab_size=VOCAB,
            max_queue_len=max_queue_len,
        )
        core = EngineCore(InlineExecutor(runner), settings)
        tokenizer = Tokenizer(build_byte_tokenizer({"vocab_size": VOCAB, "eos_token_id": EOS}))

        def front(options: EngineOptions, files: Any, client: Any, ahead: Any) -> Frontend:
            return Frontend(client, tokenizer, ChatTemplate(TEMPLATE), model_name="null", defaults=defaults)

        monkeypatch.setattr(host, "open_files", lambda options, progress=None: None)
        monkeypatch.setattr(host, "build_core", lambda options, files, progress=None: core)
        monkeypatch.setattr(host, "build_frontend", front)
        made.append(LLM("null", max_num_seqs=slots))
        return made[-1]

    yield build
    for llm in made:
        llm.client.core.control(CheckPool())
        assert not llm.client.busy
        llm.close()


def test_generate_keeps_order_and_fills_vllms_fields(make: Callable[..., LLM]) -> None:
    llm = make()
    outputs = llm.generate(["abc", {"prompt_token_ids": [120, 121]}, [65], {"prompt": "xyz"}], GREEDY)
    first = outputs[0]
    assert (first.prompt, first.prompt_token_ids, first.finished) == ("abc", [97, 98, 99], True)
    answer = first.outputs[0]
    assert (answer.index, answer.text, answer.finish_reason) == (0, "abcabcabcabc", "length")
    assert answer.token_ids == [97, 98, 99] * 4
    assert (answer.stop_reason, answer.logprobs, answer.cumulative_logprob) == (None, None, None)
    assert answer.finished()
    assert [output.outputs[0].text[:3] for output in outputs] == ["abc", "xyx", "AAA", "xyz"]
    assert outputs[1].prompt is None
    assert [output.request_id for output in outputs] == ["0", "1", "2", "3"]


def test_one_prompt_or_many(make: Callable[..., LLM]) -> None:
    llm = make()
    assert len(llm.generate("abc", GREEDY)) == 1
    assert len(llm.generate([97, 98], GREEDY)) == 1
    assert len(llm.generate([[97], [98]], GREEDY)) == 2
    assert llm.generate([], GREEDY) == []


def test_end_token_ends_an_answer(make: Callable[..., LLM]) -> None:
    answer = make(says("hi é")).generate("x", GREEDY)[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("hi é", "stop", None)
    assert answer.token_ids[-1] == EOS
    ignoring = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    assert len(make(says("hi")).generate("x", ignoring)[0].outputs[0].token_ids) == 9


def test_stop_strings_cut_the_text_and_free_the_engine(make: Callable[..., LLM]) -> None:
    llm = make(says("one two three"))
    stop = SamplingParams(temperature=0.0, max_tokens=50, stop=["two", "three"])
    answer = llm.generate("x", stop)[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("one ", "stop", "two")
    assert len(answer.token_ids) == len("one two")
    assert not llm.client.core.has_work
    kept = SamplingParams(temperature=0.0, max_tokens=50, stop="two", include_stop_str_in_output=True)
    assert llm.generate("x", kept)[0].outputs[0].text == "one two"


def test_stop_token_is_the_stop_reason(make: Callable[..., LLM]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=50, stop_token_ids=[ord("w")])
    answer = make(says("one two")).generate("x", params)[0].outputs[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("one t", "stop", ord("w"))


def test_n_choices_have_seeds_of_their_own(make: Callable[..., LLM]) -> None:
    seeds: list[int] = []

    def note(init: SlotInit, position: int) -> int:
        if position == init.num_prompt:
            seeds.append(init.seed)
        return 97 + init.seed % 26

    llm = make(note)
    params = SamplingParams(n=3, seed=7, max_tokens=2)
    (output,) = llm.generate("x", params)
    assert sorted(seeds) == [7, 8, 9]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert [answer.text for answer in output.outputs] == ["hh", "ii", "jj"]


def test_more_prompts_than_the_queue_holds(make: Callable[..., LLM]) -> None:
    llm = make(max_queue_len=2, slots=2)
    prompts = [[97 + i % 26, 98] for i in range(40)]
    outputs = llm.generate(prompts, SamplingParams(n=2, temperature=0.0, max_tokens=3))
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert all(len(answer.token_ids) == 3 for output in outputs for answer in output.outputs)
    stats = llm.client.core.control(GetStats())
    assert stats.num_generation_tokens == 40 * 2 * 3


def test_a_queue_that_never_has_room_is_an_error(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make()

    def full(request: Any) -> None:
        raise QueueFullError("full")

    monkeypatch.setattr(llm.client.core, "submit", full)
    with pytest.raises(QueueFullError):
        llm.generate("abc", GREEDY)


def test_params_one_each(make: Callable[..., LLM]) -> None:
    llm = make()
    params = [SamplingParams(temperature=0.0, max_tokens=count) for count in (1, 2)]
    outputs = llm.generate(["a", "b"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2]
    with pytest.raises(UsageError, match="3 prompts but 2"):
        llm.generate(["a", "b", "c"], params)


def test_defaults_are_the_models(make: Callable[..., LLM]) -> None:
    llm = make(defaults={"temperature": 0.25, "top_p": 0.5})
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.max_tokens) == (0.25, 0.5, None)
    # Without max_tokens the answer takes what is left of the context of 64.
    assert len(llm.generate([97] * 60)[0].outputs[0].token_ids) == 4
    assert llm.get_tokenizer().decode([104, 105]) == "hi"


def test_chat_renders_the_template(make: Callable[..., LLM]) -> None:
    llm = make()
    messages = [{"role": "u", "content": "hi"}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=8))
    assert bytes(output.prompt_token_ids) == b"<u>hi<a>"
    assert output.outputs[0].text == "<u>hi<a>"
    assert len(llm.chat([messages, messages, messages], GREEDY)) == 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([5, -1], r"prompt\[1\] is -1"),
        ([VOCAB], r"prompt\[0\] is 300"),
        ([97] * 64, "64"),
        ({"text": "x"}, "prompt_token_ids"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(
    make: Callable[..., LLM], prompt: Any, message: str
) -> None:
    llm = make()
    with pytest.raises(RequestError, match=message):
        llm.generate(["fine", prompt], GREEDY)
    assert not llm.client.core.has_work


def test_stream_yields_what_generate_returns(make: Callable[..., LLM]) -> None:
    llm = make(says("streamed é!"))
    pieces = list(llm.stream("x", GREEDY))
    assert "".join(piece.text for piece in pieces) == "streamed é!"
    assert sum(piece.num_tokens for piece in pieces) == len("streamed é!".encode())
    assert [piece.output is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert pieces[-1].output is not None
    assert pieces[-1].output.outputs[0].text == "streamed é!"


def test_closing_a_stream_aborts_it(make: Callable[..., LLM]) -> None:
    llm = make()
    stream = llm.stream("abc", SamplingParams(temperature=0.0, max_tokens=50))
    next(stream)
    stream.close()
    assert not llm.client.core.has_work
    with pytest.raises(RequestError, match="n must be 1"):
        next(llm.stream("abc", SamplingParams(n=2)))


def test_ctrl_c_aborts_everything_between_steps(make: Callable[..., LLM]) -> None:
    steps = 0

    def interrupting(init: SlotInit, position: int) -> int:
        nonlocal steps
        steps += 1
        if steps == 9:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step
        return 97

    llm = make(interrupting)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], SamplingParams(temperature=0.0, max_tokens=50))
    assert signal.getsignal(signal.SIGINT) is before
    assert not llm.client.core.has_work
    assert llm.generate("a", GREEDY)[0].outputs[0].text == "a" * 12  # still usable


def test_a_row_that_fails_ends_with_the_engines_reason(
    make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make()
    step = llm.client.core.step

    def broken() -> list[TokenDelta]:
        deltas = step()
        for delta in deltas:
            llm.client.core.abort([delta.id])
            delta.finish_reason, delta.error = "error", "NaN in the logits"
        return deltas

    monkeypatch.setattr(llm.client.core, "step", broken)
    with pytest.raises(OctavoError, match="Request 0 failed: NaN in the logits"):
        llm.generate("abc", GREEDY)


def test_unknown_options_and_use_after_close(make: Callable[..., LLM]) -> None:
    llm = make()
    with pytest.raises(UsageError, match="max_model_length"):
        LLM("null", max_model_length=5)
    with pytest.raises(UsageError, match="not both"):
        LLM(EngineOptions(), max_num_seqs=5)
    with llm as same:
        assert same is llm
    llm.close()
    assert not llm.client.alive


def test_logprobs_become_dictionaries(make: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.protocol.generate import Logprob

    llm = make(says("ab"))
    step = llm.client.core.step

    def with_logprobs() -> list[TokenDelta]:
        deltas = step()
        for delta in deltas:
            delta.logprobs = [[Logprob(token, -0.5, 1), Logprob(99, -2.0, 2)] for token in delta.tokens]
        return deltas

    monkeypatch.setattr(llm.client.core, "step", with_logprobs)
    answer = llm.generate("x", SamplingParams(temperature=0.0, max_tokens=2, logprobs=1))[0].outputs[0]
    assert answer.logprobs is not None
    assert [list(row) for row in answer.logprobs] == [[97, 99], [98, 99]]
    assert answer.logprobs[0][97].decoded_token == "a"
    assert answer.logprobs[0][99].rank == 2
    assert answer.cumulative_logprob == pytest.approx(-1.0)


def test_progress_bar_is_for_terminals_only(
    make: Callable[..., LLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make().generate("abc", GREEDY)
    assert capsys.readouterr().err == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    make().generate("abc", GREEDY)
    assert "12 tokens" in screen.getvalue()
    assert isinstance(make().client, DirectClient)
