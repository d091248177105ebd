"""A ``Runner`` for CPUs without torch: the model is a tape of compiled kernels, a step is one run of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from octavo.device.kernels.numba.library import KernelLibrary
from octavo.device.kernels.numba.shared import HOST, MOST_ROWS, OUT
from octavo.engine.cache.layout import CacheLayout
from octavo.errors import UnsupportedModelError, UsageError
from octavo.files.base import ModelFiles
from octavo.model.blocks import DecoderSpec
from octavo.protocol.generate import Logprob
from octavo.protocol.plan import CopyPage, GrammarMask, PageOp, StepPlan, StepResult
from octavo.runner.cpu.lower import Lowering, Narrow, buffers, step_tables
from octavo.runner.cpu.packing import Packer
from octavo.runner.cpu.program import Program, aligned
from octavo.runner.cpu.sampling import Row, Sampler, logprobs
from octavo.runner.cpu.slots import Slots
from octavo.runner.cpu.step import ITEM_TOKENS, Chunk, StepWriter, chunks
from octavo.runner.cpu.support import QUANTIZATIONS, supports
from octavo.runner.cpu.threads import Team, available_threads
from octavo.runner.cpu.weights import WeightReader

CHUNK_TOKENS = 256  # computed at a time: their activations stay in the cores' caches
PROMPT_LOGITS = 16  # prompt positions whose logits exist at a time
NOT_FINITE = "The model produced numbers that are not finite for this request."
BYTES_PER_ELEMENT = 2  # of keys and values: bfloat16


@dataclass
class Drawn:
    """A step on its way through ``sample`` and ``collect``: which rows sample, and what was found."""

    plan: StepPlan
    rows: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)  # their last tokens in the last chunk
    narrow: bool = False  # only the likeliest tokens have logits
    broken: set[int] = field(default_factory=set)
    prompt: dict[int, list[list[Logprob]]] = field(default_factory=dict)


class CPURunner:
    """Implements ``engine.executor.base.Runner``; results are ready when ``sample`` returns.

    ``threads`` 0 or None = the cores this process may use; ``seed`` is unused, since every sequence brings its own.
    ``progress(done, total)`` counts bytes of weights. ``quantization`` (see ``support.QUANTIZATIONS``) shrinks plain
    weights while they load. ``library``: compiled kernels, warmed with ``support.kernels_for``; without it they are
    compiled (seconds, once per kind of processor) or loaded here. Raises
    ``UnsupportedModelError`` with the reason ``supports`` gives.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        files: ModelFiles,
        layout: CacheLayout,
        *,
        num_pages: int,
        num_slots: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        threads: int | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        quantization: str | None = None,
        library: KernelLibrary | None = None,
    ) -> None:
        reason = supports(spec, files) or _layout_problem(layout)
        if reason:
            raise UnsupportedModelError(f"The compiled CPU path cannot run {files.name}: {reason}")
        if quantization is not None and quantization not in QUANTIZATIONS:
            raise UsageError(
                f"Unknown quantization {quantization!r}.", f"Use one of {', '.join(QUANTIZATIONS)}."
            )
        self.layout = layout
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.seed = seed
        self.vocab_size = spec.embedding.vocab_size
        self.softcap = np.float32(spec.logit_softcap)
        self.slots = Slots(num_slots, max_model_len, layout)
        self.library = library or KernelLibrary()
        self.team = Team(threads or available_threads(), self.library)
        tokens = max(PROMPT_LOGITS, min(CHUNK_TOKENS, max_num_batched_tokens))
        width = -(-self.vocab_size // 16) * 16
        # Memory is only taken where something is written, so a page's layers lie together. Pages must not hold NaN.
        self.pages = aligned((num_pages, layout.pool_page_bytes), np.uint8, zero=True)
        self.logits = aligned((num_slots + PROMPT_LOGITS, width), np.float32)
        self.sampler = Sampler(self.slots, self.logits, self.vocab_size, self.team, self.library)
        self.tables = step_tables(spec, layout, tokens, ITEM_TOKENS)
        self.chunk_tokens = tokens
        self.program = Program(self.library)
        self.lowered = Lowering(
            spec,
            layout,
            WeightReader(files, spec, Packer(self.team, self.library), progress, quantization),
            self.program,
            buffers(spec, tokens, self.team.threads),
            self.tables,
            self.pages,
            self.logits,
        ).lower()
        self.head_out = [int(table[OUT]) for table in self.lowered.head_out]
        self.masked: set[int] = set()  # slots that brought a grammar mask
        self.writer = StepWriter(spec, layout, self.slots, self.tables, self.team.threads)
        self.current: Drawn | None = None
        self.done: deque[StepResult] = deque()

    def forward(self, plan: StepPlan) -> None:
        """See ``Runner.forward``; computes the step before it returns."""
        if any(plan.num_drafts):
            raise UsageError(
                "The compiled CPU path does not verify drafts.", "Turn speculative decoding off."
            )
        self._page_ops(plan.page_ops)
        self.slots.admit(plan.admits)
        self.sampler.admit(plan.admits)
        self.masked.difference_update(admit.slot for admit in plan.admits)
        self.slots.write_pages(plan.page_writes)
        self.current = Drawn(plan)
        ends = [start + count for start, count in zip(plan.starts, plan.num_tokens)]
        for chunk in chunks(plan, self.chunk_tokens):
            self.writer.write(chunk)
            self.team.run(self.lowered.body)
            bad = self.tables.broken[: int(self.tables.counts[0])]
            if bad.any():
                self.current.broken.update(np.repeat(chunk.rows, chunk.counts)[bad != 0].tolist())
            self._sampling_logits(chunk, ends)
            self._prompt_logprobs(chunk)

    def sample(self, masks: list[GrammarMask]) -> None:
        """See ``Runner.sample``."""
        if self.current is None:
            raise RuntimeError("sample() without forward()")
        drawn, self.current = self.current, None
        plan = drawn.plan
        by_row = {mask.row: mask for mask in masks}
        if masks:
            self.masked.update(plan.slots[row] for row in by_row)
            if drawn.narrow:  # which tokens a mask leaves was not known when the likeliest were looked for
                self._head(np.array(drawn.wanted, np.int64), 0)
        tokens: list[list[int]] = [[] for _ in range(plan.num_rows)]
        errors = dict.fromkeys(drawn.broken, NOT_FINITE)
        found: list[list[list[Logprob]] | None] = [None] * plan.num_rows
        rows, raw = [], {}
        for index, row in enumerate(drawn.rows):
            logits, slot = self.logits[index, : self.vocab_size], plan.slots[row]
            best = int(logits.argmax())  # a NaN wins
            if row in errors or not np.isfinite(logits[best]):
                errors[row] = NOT_FINITE
                tokens[row] = [0]
                continue
            if self.slots.sampling[slot].logprobs is not None:
                raw[row] = logits.copy()
            position = plan.starts[row] + plan.num_tokens[row]
            rows.append((row, Row(index, slot, position, by_row.get(row), best)))
        for (row, wanted), token in zip(rows, self.sampler.draw([wanted for _, wanted in rows])):
            tokens[row] = [token]
            self.slots.append(wanted.slot, wanted.position, token)
            if row in raw:
                limit = self.slots.sampling[wanted.slot].logprobs or 0
                found[row] = [logprobs(raw[row], token, self.vocab_size if limit == -1 else limit)]
        result = StepResult(step=plan.step, tokens=tokens, errors=errors or None)
        if any(found):
            result.logprobs = found
        if drawn.prompt:
            result.prompt_logprobs = [drawn.prompt.get(row) for row in range(plan.num_rows)]
        self.done.append(result)

    def collect(self) -> StepResult:
        """See ``Runner.collect``."""
        return self.done.popleft()

    def close(self) -> None:
        """See ``Runner.close``."""
        self.team.close()
        self.done.clear()

    def explain(self) -> dict[str, str]:
        """What runs the model, for ``octavo doctor``: the processor's tile kind, threads, kernel counts."""
        kernels = ", ".join(f"{name} x{count}" for name, count in self.lowered.kernels.items())
        return {"target": HOST.name, "threads": str(self.team.threads), "kernels": kernels}

    def _page_ops(self, ops: list[PageOp]) -> None:
        for op in ops:
            if isinstance(op, CopyPage):
                self.pages[op.target] = self.pages[op.source]
            else:
                self.pages[op.page] = 0

    def _head(self, rows: NDArray[np.int64], at: int) -> None:
        """Logits of chunk tokens ``rows`` into rows ``at``.. of the logits."""
        self.tables.counts[1] = len(rows)
        self.tables.head_rows[: len(rows)] = rows
        for table, out in zip(self.lowered.head_out, self.head_out):
            table[OUT] = out + at * self.logits.strides[0]
        self.team.run(self.lowered.head)
        if self.softcap:
            part = self.logits[at : at + len(rows)]
            np.multiply(np.tanh(part / self.softcap), self.softcap, out=part)

    def _sampling_logits(self, chunk: Chunk, ends: list[int]) -> None:
        """Logits of the rows that end in this chunk and sample."""
        drawn = self.current
        if drawn is None:
            return
        wanted: list[int] = []
        before = len(drawn.rows)
        for row, last, end in zip(
            chunk.rows.tolist(),
            (chunk.firsts + chunk.counts - 1).tolist(),
            (chunk.starts + chunk.counts).tolist(),
        ):
            if drawn.plan.sample[row] and end == ends[row]:
                drawn.rows.append(row)
                wanted.append(last)
        if not wanted:
            return
        narrow, drawn.wanted = self.lowered.narrow, wanted
        if narrow is not None and len(wanted) <= MOST_ROWS and self._is_whole(drawn.plan):
            numbers = [self._num_likeliest(drawn.plan.slots[row]) for row in drawn.rows]
            if all(numbers):
                drawn.narrow = True
                self._narrow_head(narrow, wanted, numbers)
                return
        self._head(np.array(wanted, np.int64), before)

    def _is_whole(self, plan: StepPlan) -> bool:
        """Whether the chunk that was just computed is the step."""
        return int(self.tables.counts[0]) == sum(plan.num_tokens)

    def _num_likeliest(self, slot: int) -> int:
        """How many of the likeliest tokens a slot's next draw needs; 0 = all of them."""
        return 0 if slot in self.masked else self.sampler.num_likeliest(slot)

    def _narrow_head(self, narrow: Narrow, rows: list[int], numbers: list[int]) -> None:
        """Logits of chunk tokens ``rows`` for the ``numbers`` likeliest tokens of each at least, -inf for others."""
        count = self.tables.counts[1] = len(rows)
        self.tables.head_rows[:count] = rows
        self.team.run(narrow.scan)
        for i, number in enumerate(numbers):
            lows = narrow.lows[i]
            narrow.leasts[i] = lows.max() if number == 1 else np.partition(lows, -number)[-number]
        self.team.run(narrow.refine)

    def _prompt_logprobs(self, chunk: Chunk) -> None:
        """Log probabilities of prompt tokens where a request asks for them, some positions at a time."""
        drawn = self.current
        if drawn is None:
            return
        pieces = zip(chunk.rows.tolist(), chunk.slots.tolist(), chunk.starts.tolist(), chunk.counts.tolist())
        for (row, slot, start, count), first in zip(pieces, chunk.firsts.tolist()):
            wanted = self.slots.sampling[slot].prompt_logprobs
            # Position p predicts token p + 1, so the last prompt position belongs to the answer.
            count = min(start + count, int(self.slots.num_prompt[slot]) - 1) - start
            if wanted is None or count <= 0:
                continue
            limit = self.vocab_size if wanted == -1 else wanted
            found = drawn.prompt.setdefault(row, [])
            for at in range(0, count, PROMPT_LOGITS):
                size = min(PROMPT_LOGITS, count - at)
                self._head(np.arange(first + at, first + at + size), self.num_slots)
                for i in range(size):
                    target = int(self.slots.tokens[slot, start + at + i + 1])
                    found.append(logprobs(self.logits[self.num_slots + i, : self.vocab_size], target, limit))


def _layout_problem(layout: CacheLayout) -> str | None:
    for group in layout.groups:
        if group.spec.page_size % 16:
            return f"its pages hold {group.spec.page_size} tokens; they must hold a multiple of 16 (--block-size 16)."
    return None
