"""The object every front uses (HTTP dialects, ``octavo run``, ``chat``): text in, checked tokens to the engine, text out."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec

from octavo.api.chat.formats.detect import detect_tools
from octavo.api.chat.formats.harmony import speaks_harmony
from octavo.api.chat.formats.tools import ToolSyntax
from octavo.api.chat.request import ChatPrompt
from octavo.api.chat.thinking import ThinkingFormat
from octavo.api.generation import Choice, Generation, TextDelta
from octavo.api.structured import Grammars
from octavo.api.text.template import ChatTemplate
from octavo.api.text.tokenizer import Tokenizer
from octavo.engine.client.base import EngineClient
from octavo.errors import EngineDeadError, ModelFileError, RequestError
from octavo.protocol.generate import (
    DRY_BREAKERS,
    Dry,
    GenerateRequest,
    Pooling,
    SamplingParams,
    Terms,
    Thinking,
)

__all__ = ["Frontend", "Generation", "TextDelta"]

MAX_LOGPROBS = 20
LARGE_TEXT = (
    16_384  # characters; tokenizing more than this would be felt by the other streams of this event loop
)
_DEFAULT_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_SEED_SPAN = 2**64
ANY_TERMS = Terms()


class Frontend:
    """Joins one engine, one tokenizer and one chat template; ``chat`` makes prompts of conversations.

    ``defaults`` is the model's generation_config (sampling defaults; ``max_new_tokens`` bounds answers). Every method
    belongs to the event loop's thread. Wrong requests raise ``RequestError`` before the engine hears of them.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        model_name: str,
        defaults: Mapping[str, Any] | None = None,
        max_logprobs: int = MAX_LOGPROBS,
        first_id: int = 1,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.template = template
        self.chat = ChatPrompt(tokenizer, template)
        self.grammars = Grammars()
        self.model_name = model_name
        self.max_logprobs = max_logprobs
        self._ids = itertools.count(first_id)
        defaults = defaults or {}
        self._defaults = {key: defaults[key] for key in _DEFAULT_KEYS if defaults.get(key) is not None}
        self._max_new_tokens: int | None = defaults.get("max_new_tokens")
        try:
            SamplingParams(**self._defaults, max_tokens=self._max_new_tokens)
        except (RequestError, TypeError) as error:
            raise ModelFileError(
                f"The model's generation_config is not usable: {error}", "Use --generation-config vllm."
            ) from None

    @cached_property
    def tool_syntax(self) -> ToolSyntax:
        """How this model calls tools."""
        return detect_tools(self.template)

    @cached_property
    def speaks_harmony(self) -> bool:
        """Whether this model answers on channels (gpt-oss)."""
        return speaks_harmony(self.template.source)

    @cached_property
    def thinking(self) -> ThinkingFormat | None:
        """How this model thinks aloud; None where it does not."""
        return ThinkingFormat.of(self.template, self.tokenizer)

    @property
    def max_model_len(self) -> int:
        """Longest prompt + answer in tokens."""
        return self.client.info.max_model_len

    def default_sampling(self, **overrides: Any) -> SamplingParams:
        """Sampling parameters: the model's defaults, then ``overrides``; None means "not given".

        Without ``max_tokens`` the answer may use the rest of the context. Raises ``RequestError`` naming a bad field.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        unknown = given.keys() - set(SamplingParams.__struct_fields__)
        if unknown:
            name = min(unknown)
            raise RequestError(f"{name} is not a sampling parameter.", param=name)
        return SamplingParams(**{"max_tokens": None, **self._defaults, **given})

    def prepare(
        self, prompt: str | Sequence[int], sampling: SamplingParams, *, add_special_tokens: bool = True
    ) -> tuple[list[int], SamplingParams]:
        """Check a prompt and its parameters; returns the ids and the parameters with ``max_tokens`` decided.

        Raises ``RequestError`` that names the field and the numbers.
        """
        if isinstance(prompt, str):
            ids = self._encode(prompt, add_special_tokens)
        else:
            ids = list(prompt)
            check_token_ids(ids, self.client.info.vocab_size, "prompt")
        if not ids:
            raise RequestError("The prompt is empty: it has no tokens.", param="prompt")
        self._check_sampling(sampling)
        self.grammars.split(sampling)
        room = self.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, but the model's context holds {self.max_model_len}, "
                "and one must be left for the answer.",
                param="prompt",
                cure="Shorten the prompt or serve the model with a larger --max-model-len.",
            )
        return ids, self._with_max_tokens(sampling, room)

    async def prepare_async(
        self, prompt: str | Sequence[int], sampling: SamplingParams, *, add_special_tokens: bool = True
    ) -> tuple[list[int], SamplingParams]:
        """``prepare``, in a thread where the text is so long that other streams would wait for it."""
        if isinstance(prompt, str) and len(prompt) > LARGE_TEXT:
            return await asyncio.to_thread(
                self.prepare, prompt, sampling, add_special_tokens=add_special_tokens
            )
        return self.prepare(prompt, sampling, add_special_tokens=add_special_tokens)

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        thinking: Thinking | None = None,
        pooling: Pooling | None = None,
        second_at: int = 0,
        terms: Terms = ANY_TERMS,
    ) -> Generation:
        """Hand a prepared request to the engine at once and return its stream of ``TextDelta``.

        With ``n > 1`` the engine gets n requests (seeds ``seed``, ``seed + 1``, ...), of which the first computes the
        prompt, and the stream is merged by ``index``. Closing, cancelling or dropping the stream aborts what still runs. Raises ``QueueFullError`` or
        ``EngineDeadError`` before anything is queued.
        """
        if not self.client.alive:
            raise EngineDeadError("The engine has stopped.", "Restart the server; its log names the cause.")
        ids = list(prompt_ids)
        sampling, grammar = self.grammars.split(sampling)
        bad_words, dry = self.bad_words(sampling), self.dry(sampling)
        leader: int | None = None
        generation = Generation(self.client, request_id)
        arrival_s = time.time()
        try:
            for index in range(sampling.n):
                mine = sampling
                if sampling.n > 1:
                    mine = msgspec.structs.replace(sampling, n=1, seed=_derived_seed(sampling.seed, index))
                request = GenerateRequest(
                    id=next(self._ids),
                    prompt_token_ids=ids,
                    sampling=mine,
                    eos_token_ids=list(self.tokenizer.eos_token_ids),
                    priority=priority,
                    arrival_s=arrival_s,
                    cache_salt=cache_salt,
                    grammar=grammar,
                    thinking=thinking,
                    pooling=pooling,
                    second_at=second_at,
                    bad_words=bad_words,
                    dry=dry,
                    leader=leader,
                    terms=terms,
                )
                leader = leader or request.id
                generation.submit(request, Choice(index, request, self.tokenizer))
        except BaseException:
            generation.abort()
            raise
        return generation

    def bad_words(self, sampling: SamplingParams) -> list[list[int]]:
        """The tokens of ``bad_words``, each word at the beginning of a text and behind a space."""
        found: list[list[int]] = []
        for word in sampling.bad_words:
            for text in (word, " " + word.lstrip()):
                ids = self.tokenizer.encode(text, False)
                if ids and ids not in found:
                    found.append(ids)
        if sampling.bad_words and not found:
            raise RequestError("bad_words have no tokens.", param="bad_words")
        return found

    def dry(self, sampling: SamplingParams) -> Dry | None:
        """DRY with its breakers as tokens: all that have one of them in their text."""
        if not sampling.dry_multiplier:
            return None
        breakers = set[int]()
        asked = sampling.dry_sequence_breakers
        for text in DRY_BREAKERS if asked is None else asked:
            breakers |= self.tokenizer.tokens_with(text)
        return Dry(sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length, sorted(breakers))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # A text that cannot fit is not tokenized just to find out by how much.
        if len(text) > self.max_model_len:
            most = self.max_model_len * self.tokenizer.longest_token
            if len(text) > most:
                raise RequestError(
                    f"The prompt has {len(text)} characters, but the model's context of {self.max_model_len} tokens "
                    f"holds at most {most}.",
                    param="prompt",
                    cure="Shorten the prompt.",
                )
        return self.tokenizer.encode(text, add_special_tokens)

    def _check_sampling(self, sampling: SamplingParams) -> None:
        vocab_size = self.client.info.vocab_size
        check_token_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
        if sampling.logit_bias:
            check_token_ids(list(sampling.logit_bias), vocab_size, "logit_bias")
        if sampling.allowed_token_ids is not None:
            check_token_ids(sampling.allowed_token_ids, vocab_size, "allowed_token_ids")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(sampling, name)
            if count is not None and not 0 <= count <= self.max_logprobs:
                raise RequestError(f"{name} must be from 0 to {self.max_logprobs}, got {count}.", param=name)
        if sampling.stop_strings and not sampling.detokenize:
            raise RequestError("stop strings need detokenize=true.", param="stop")
        if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
            raise RequestError(
                f"min_tokens ({sampling.min_tokens}) is more than max_tokens ({sampling.max_tokens}).",
                param="min_tokens",
            )

    def _with_max_tokens(self, sampling: SamplingParams, room: int) -> SamplingParams:
        asked = sampling.max_tokens if sampling.max_tokens is not None else self._max_new_tokens
        max_tokens = room if asked is None else min(asked, room)
        if max_tokens == sampling.max_tokens and sampling.min_tokens <= max_tokens:
            return sampling
        return msgspec.structs.replace(
            sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens)
        )


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise ``RequestError`` that names the first position whose value is no id of the vocabulary."""
    if not ids:
        return
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return
    for position, value in enumerate(ids):
        if type(value) is not int:
            raise RequestError(f"{param}[{position}] must be a token id, got {value!r}.", param=param)
        if not 0 <= value < vocab_size:
            raise RequestError(
                f"{param}[{position}] is {value}, but token ids go from 0 to {vocab_size - 1}.", param=param
            )


def _derived_seed(seed: int | None, index: int) -> int | None:
    if seed is None:
        return None
    half = _SEED_SPAN // 2
    return (seed + index + half) % _SEED_SPAN - half  # seeds are 64-bit integers
