"""A small engine whose runner draws pseudo-random bytes and obeys masks, drafts included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner, null_token
from octavo.engine.settings import EngineSettings
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.vocabulary import Vocabulary
from octavo.protocol.generate import GenerateRequest, SamplingParams
from octavo.protocol.plan import GrammarMask, StepResult

BOS, EOS, VOCAB = 256, 257, 263  # bytes, two special tokens, padding rows
VOCABULARY = Vocabulary(
    tokens=[*(bytes([i]) for i in range(256)), b"<s>", b"</s>"],
    special_ids=frozenset({BOS, EOS}),
    eos_token_ids=(EOS,),
    encode=lambda text: list(text.encode()),
)


class MaskedRunner(NullRunner):
    """Draws among allowed tokens; drafts are guesses, right about half the time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(plan_layout({0: FullKV(4, 64)}), vocab_size=VOCAB, **options)
        self.violations = 0
        self._offered: dict[int, list[int]] = {}

    def sample(self, masks: list[GrammarMask]) -> None:
        plan = self._plan
        assert plan is not None
        self._plan = None
        words = {mask.row: mask.words for mask in masks}
        size = 4 * ((VOCAB + 31) // 32)
        tokens: list[list[int]] = []
        offers: list[list[int]] = []
        for row, (slot, drafts, sample) in enumerate(zip(plan.slots, plan.num_drafts, plan.sample)):
            drawn: list[int] = []
            offer: list[int] = []
            if sample:
                init, first = self._slots[slot], self._known[slot]
                offered = self._offered.get(slot, [])[:drafts]
                for i in range(1 + drafts):
                    mask = words[row][i * size : (i + 1) * size] if row in words else None
                    waits = first + i - init.num_prompt < init.sampling.min_tokens
                    drawn.append(self._pick(init.seed, first + i, mask, init.stop_token_ids if waits else []))
                    if i < len(offered) and offered[i] != drawn[-1]:
                        break
                    if i >= len(offered):
                        break
                self._known[slot] = first + len(drawn)
                offer = [
                    self._pick(init.seed, first + len(drawn) + i, None, []) if i % 2 else drawn[-1]
                    for i in range(self.num_drafts)
                ]
                self._offered[slot] = offer
            tokens.append(drawn)
            offers.append(offer)
        result = StepResult(plan.step, tokens)
        if self.num_drafts:
            result.num_drafts = [len(offer) for offer in offers]
            result.draft_tokens = offers
        self._ready.append(result)

    def _pick(self, seed: int, position: int, mask: bytes | None, forbidden: list[int]) -> int:
        token = null_token(seed, position, VOCAB - 5)
        for _ in range(VOCAB):
            if (mask is None or mask[token >> 3] >> (token & 7) & 1) and token not in forbidden:
                if mask is not None and token >= EOS + 1:
                    self.violations += 1
                return token
            token = (token + 1) % VOCAB
        raise AssertionError("nothing is allowed")


def make_core(
    *,
    load: Callable[[], Vocabulary] = lambda: VOCABULARY,
    grammars: bool = True,
    num_drafts: int = 0,
    num_pages: int = 64,
    **changes: Any,
) -> tuple[EngineCore, MaskedRunner]:
    runner = MaskedRunner(num_pages=num_pages, num_slots=4, num_drafts=num_drafts)
    facts: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "vocab_size": VOCAB,
        "model": "masked",
    }
    compiler = GrammarCompiler(load, VOCAB) if grammars else None
    return EngineCore(InlineExecutor(runner), EngineSettings(**{**facts, **changes}), compiler), runner


def grammar_request(
    id: int, grammar: str | None, *, prompt_len: int, max_tokens: int = 40, seed: int = 7, **sampling: Any
) -> GenerateRequest:
    return GenerateRequest(
        id=id,
        prompt_token_ids=[(id * 31 + i) % 128 for i in range(prompt_len)],
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, **sampling),
        eos_token_ids=[EOS],
        grammar=grammar,
    )


def answer(core: EngineCore, requests: list[GenerateRequest]) -> dict[int, tuple[str, str | None]]:
    """Run everything to its end; the text of each answer without its end token, and why it ended."""
    for request in requests:
        core.submit(request)
    texts: dict[int, bytes] = {}
    reasons: dict[int, str | None] = {}
    for _ in range(20_000):
        if not core.has_work:
            break
        for delta in core.step():
            assert delta.error is None, delta.error
            texts[delta.id] = texts.get(delta.id, b"") + bytes(t for t in delta.tokens if t < 256)
            reasons[delta.id] = delta.finish_reason
        core.check()
    assert not core.has_work
    return {id: (texts[id].decode("utf-8", "replace"), reasons[id]) for id in texts}
