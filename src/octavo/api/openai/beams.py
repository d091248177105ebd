"""Beam search behind the OpenAI routes: every answer is one delta, when the search of its prompt is over."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from octavo.api.beam import Beam, BeamSearch, run_search, together
from octavo.api.frontend import Frontend
from octavo.api.generation import TextDelta
from octavo.api.openai.context import Context
from octavo.api.openai.schema import SamplingFields
from octavo.errors import RequestError
from octavo.protocol.generate import BeamSearchParams, SamplingParams

Prompts = list[tuple[list[int], SamplingParams]]


class Beams:
    """The searches of one request; ``n`` is the width of each.

    Raises ``RequestError`` where n is more than a search may keep.
    """

    def __init__(self, context: Context, request: SamplingFields, prompts: Prompts, request_id: str) -> None:
        self.context = context
        self.request = request
        self.prompts = prompts
        self.request_id = request_id
        self.searches: list[BeamSearch] = []
        for _, sampling in prompts:
            try:
                params = BeamSearchParams(
                    beam_width=sampling.n,
                    max_tokens=sampling.max_tokens or 1,
                    ignore_eos=sampling.ignore_eos,
                    length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
                )
            except RequestError as error:
                raise RequestError(error.cause.replace("beam_width", "n"), "n") from None
            eos = context.frontend.tokenizer.eos_token_ids
            self.searches.append(BeamSearch(params, eos, params.max_tokens))

    async def deltas(self) -> AsyncGenerator[list[tuple[int, TextDelta]], None]:
        """One batch a prompt: (prompt, delta) of each of its answers."""
        request, context = self.request, self.context
        terms = context.terms(request.deadline_ms, request.max_queue_ms)
        work = [
            run_search(
                context.frontend,
                ids,
                search,
                request_id=f"{self.request_id}-{i}",
                priority=request.priority or 0,
                cache_salt=context.caller.cache_salt(request.cache_salt),
                terms=terms,
            )
            for i, ((ids, _), search) in enumerate(zip(self.prompts, self.searches))
        ]
        for prompt, search in enumerate(await together(work)):
            ids, sampling = self.prompts[prompt]
            answers = search.answers()
            answers += [Beam(reason="deadline")] * (sampling.n - len(answers))
            yield [
                (prompt, beam_delta(context.frontend, beam, index, len(ids), sampling))
                for index, beam in enumerate(answers)
            ]


def beam_delta(
    frontend: Frontend, beam: Beam, index: int, num_prompt_tokens: int, sampling: SamplingParams
) -> TextDelta:
    """A whole answer as one delta."""
    tokens = list(beam.tokens)
    shown = tokens[:-1] if beam.reason == "stop" else tokens
    text = frontend.tokenizer.decode(shown, skip_special_tokens=sampling.skip_special_tokens)
    return TextDelta(text, tokens, beam.reason, None, None, None, num_prompt_tokens, 0, index)
