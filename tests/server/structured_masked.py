"""An engine whose runner draws pseudo-random tokens among those the masks allow, over the server tests' byte tokenizer."""

from __future__ import annotations

from typing import Any

from octavo.api.text.tokenizer import Tokenizer
from octavo.engine.cache.layout import plan_layout
from octavo.engine.cache.spec import FullKV
from octavo.engine.core import EngineCore
from octavo.engine.executor.inline import InlineExecutor
from octavo.engine.executor.null import NullRunner, null_token
from octavo.engine.settings import EngineSettings
from octavo.engine.structured.compiler import GrammarCompiler
from octavo.engine.structured.vocabulary import Vocabulary
from octavo.protocol.plan import GrammarMask, StepResult

EOS, VOCAB = 257, 263  # bytes, two special tokens, two markers, padding
SIZE = 4 * ((VOCAB + 31) // 32)


class Obedient(NullRunner):
    """Offers its own next tokens as drafts, each third one wrong."""

    def sample(self, masks: list[GrammarMask]) -> None:
        plan = self._plan
        assert plan is not None
        self._plan = None
        words = {mask.row: mask.words for mask in masks}
        tokens: list[list[int]] = []
        offers: list[list[int]] = []
        for row, (slot, drafts, sample) in enumerate(zip(plan.slots, plan.num_drafts, plan.sample)):
            drawn: list[int] = []
            offer: list[int] = []
            if sample:
                init, first = self._slots[slot], self._known[slot]
                offered = self.offered.get(slot, [])[:drafts]
                for place in range(1 + drafts):
                    mask = words[row][place * SIZE : (place + 1) * SIZE] if row in words else None
                    waits = first + place - init.num_prompt < init.sampling.min_tokens
                    drawn.append(
                        self._pick(init.seed, first + place, mask, init.stop_token_ids if waits else [])
                    )
                    if place >= len(offered) or offered[place] != drawn[-1]:
                        break
                self._known[slot] = first + len(drawn)
                offer = [
                    self._pick(init.seed, first + len(drawn) + place, None, []) if place % 3 else ord('"')
                    for place in range(self.num_drafts)
                ]
                self.offered[slot] = offer
            tokens.append(drawn)
            offers.append(offer)
        result = StepResult(plan.step, tokens)
        if self.num_drafts:
            result.num_drafts, result.draft_tokens = [len(offer) for offer in offers], offers
        self._ready.append(result)

    def _pick(self, seed: int, position: int, mask: bytes | None, forbidden: list[int]) -> int:
        # Ends and quotes now and then, so that strings and thoughts come to an end.
        favourites = [ord('"'), EOS, 259, ord("e"), ord("}"), ord("]"), ord("n"), ord("d")]
        token = null_token(seed, position, VOCAB)
        if token % 3 == 0:
            token = favourites[token // 3 % len(favourites)]
        for _ in range(VOCAB):
            if (mask is None or mask[token >> 3] >> (token & 7) & 1) and token not in forbidden:
                return token
            token = (token + 1) % VOCAB
        raise AssertionError("nothing is allowed")


def masked_core(tokenizer: Tokenizer, *, num_drafts: int, overlap: bool) -> EngineCore:
    """An engine of its own over ``tokenizer``."""
    runner = Obedient(
        plan_layout({0: FullKV(4, 64)}), num_pages=1000, num_slots=4, vocab_size=VOCAB, num_drafts=num_drafts
    )
    runner.offered: dict[int, list[int]] = {}  # type: ignore[misc]
    vocabulary = Vocabulary(
        tokens=[tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)],
        special_ids=tokenizer.special_ids,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        encode=lambda text: list(text.encode()),
    )
    facts: dict[str, Any] = {
        "max_model_len": 3000,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "vocab_size": VOCAB,
        "model": "masked",
        "overlap": overlap,
    }
    return EngineCore(
        InlineExecutor(runner), EngineSettings(**facts), GrammarCompiler(lambda: vocabulary, VOCAB)
    )
