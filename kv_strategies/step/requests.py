"""What goes into a runner and what comes out."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from . import stop as stop_strings
from .checked import checked
from .sampling import SamplingParams
from .scores import STOPS_ALL, Shaping, warn_of_error

#: What turns (input_ids [1, n], scores [1, V]) into scores [1, V]: a `transformers.LogitsProcessor`, say.
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Request:
    """What is asked for. What `generate()` takes as well means the same here (docs/requests.md has the words of both,
    and what each costs). Values are checked when it is submitted: a ValueError says which request, what was given, and
    what it takes.

    Args:
        token_ids: the prompt, [n] or [1, n] whole numbers, at least one.
        max_new_tokens: how many new tokens at most, 1 or more.
        temperature: 0 is greedy.
        salt: requests of different salts never share blocks (tenants).
        top_k: draw among so many of the likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability; 1 for all.
        seed: of what is drawn. None: another one each time.
        stop_token_ids: ends with one of these. None: the model's own, see `Runner`; () for none.
        n: samples, which share the prompt's blocks and differ in their seeds; a result each.
        request_id: anything hashable, by which it is cancelled and its events are known. None: its index in the list,
            which says nothing to other calls.
        stop: ends where its text comes to one of these; needs a tokenizer, see `Runner`.
        min_new_tokens: no stop token before so many.
        logits_processor: called in this order, with all tokens of the row.
        logprobs: log probabilities of the new tokens, and of so many of the likeliest beside each. None for none.
        prompt_logprobs: likewise of the tokens of the prompt, which then is computed whole, whatever is cached.
        priority: the higher one starts first, and is preempted last.
        deadline: seconds from its submission, after which it ends as it is.
    """

    token_ids: Sequence[int] | np.ndarray | Tensor
    max_new_tokens: int = 64
    temperature: float = 0.0
    salt: str = ""
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: Sequence[int] | int | None = None
    n: int = 1
    request_id: str | int | None = None
    stop: Sequence[str] | str = ()
    min_new_tokens: int = 0
    logits_processor: Sequence[Processor] | Processor = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None
    num_blocks: int = field(default=0, init=False, repr=False)  # what it takes at once; the runner's to say
    chunk: int = field(default=0, init=False, repr=False)  # tokens of its prompt in a forward at most; likewise
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, init=False, repr=False)  # where it has stop strings
    is_numbered: bool = field(default=False, init=False, repr=False)  # its id is its index

    @classmethod
    def of(
        cls,
        request: Request | Sequence[int],
        index: int,
        stop_token_ids: Sequence[int] = (),
        tokenizer: Callable[[], PreTrainedTokenizerBase | None] = lambda: None,
    ) -> Request:
        """A request of its own from what the user gave: checked, every value of the type it says, with an id, its
        tokens as an array, and stop tokens.

        Args:
            tokenizer: asked where there are stop strings.

        Raises:
            ValueError: says which request, what was given, and what it takes.
        """
        request = request if isinstance(request, Request) else cls(request)
        request_id = index if request.request_id is None else request.request_id
        name = f"request {request_id!r}"
        try:
            hash(request_id)
        except TypeError as error:
            raise ValueError(f"{name}: a request id must be hashable, got {type(request_id).__name__}") from error

        def number(field: str, hint: object) -> object:
            return checked(f"{name}: {field}", getattr(request, field), hint)

        max_new_tokens, n, top_k = number("max_new_tokens", int), number("n", int), number("top_k", int)
        temperature, top_p = number("temperature", float), number("top_p", float)
        if max_new_tokens < 1:
            raise ValueError(f"{name}: max_new_tokens must be at least 1, got {max_new_tokens}")
        if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"{name}: needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {temperature}, {top_k} and {top_p}"
            )
        if n < 1:
            raise ValueError(f"{name}: n must be at least 1, got {n}")
        if not isinstance(request.salt, str):
            raise ValueError(f"{name}: the salt must be a str, got {type(request.salt).__name__}")
        stops = stop_token_ids if request.stop_token_ids is None else request.stop_token_ids
        stops = integers(f"{name}: stop_token_ids", [stops] if isinstance(stops, int | np.integer) else stops)
        seed = number("seed", int | None)
        min_new_tokens, priority = number("min_new_tokens", int), number("priority", int)
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise ValueError(
                f"{name}: min_new_tokens must be from 0 to max_new_tokens = {max_new_tokens}, got {min_new_tokens}"
            )
        logprobs, prompt_logprobs = number("logprobs", int | None), number("prompt_logprobs", int | None)
        if min(logprobs or 0, prompt_logprobs or 0) < 0:
            raise ValueError(f"{name}: logprobs and prompt_logprobs count tokens beside the chosen one, 0 or more")
        deadline = number("deadline", float | None)
        if deadline is not None and deadline <= 0:
            raise ValueError(f"{name}: deadline must be more than 0 seconds from now, got {deadline}")
        processors = request.logits_processor
        if not isinstance(processors, Sequence) and callable(processors):
            processors = [processors]
        processors = list(_sequence(f"{name}: logits_processor", processors))  # of a LogitsProcessorList, what is in it
        for processor in processors:
            if isinstance(processor, type) or not callable(processor):
                raise ValueError(
                    f"{name}: a logits processor must be callable with input_ids and scores: {processor!r}"
                )
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(_sequence(f"{name}: stop", request.stop))
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"{name}: stop takes text, or a list of texts, none of them empty; got {request.stop!r}")
        found = tokenizer() if stop else None
        if stop and found is None:
            raise ValueError(
                f"{name}: stop strings need a tokenizer, and the model's folder has none: Runner(model, strategy, "
                "tokenizer=...)"
            )
        own = cls(
            token_ids=integers(f"{name}: token_ids", request.token_ids),
            max_new_tokens=max_new_tokens,
            temperature=temperature if temperature > SMALLEST_TEMPERATURE else 0.0,
            salt=request.salt,
            top_k=min(top_k, 2**31 - 1),
            top_p=top_p,
            seed=seed,
            stop_token_ids=frozenset(stops.tolist()),
            n=n,
            request_id=request_id,
            stop=stop,
            min_new_tokens=min_new_tokens,
            logits_processor=LogitsProcessorList(processors),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            priority=priority,
            deadline=deadline,
        )
        own.tokenizer, own.is_numbered = found, request.request_id is None
        return own

    @property
    def name(self) -> str:
        return f"request {self.request_id!r}"

    def draw_seed(self, source: random.Random | ModuleType) -> None:
        """Where none was given."""
        if self.seed is None:
            self.seed = source.getrandbits(32)

    def digest(self) -> str:
        """Equal for requests that ask for the same, but for what logits processors do."""
        others = [
            getattr(self, field.name) for field in fields(self) if field.name not in ("logits_processor", "tokenizer")
        ]
        return f"request {self.request_id!r} of {len(self.token_ids)} tokens, {hash_of(others)}"

    def sampling(self, sample_index: int) -> SamplingParams:
        seed = self.seed + 0x9E3779B9 * sample_index
        return SamplingParams(self.temperature, self.top_k, self.top_p, seed)

    def processors(self) -> list[LogitsProcessorList]:
        """For each sample its own: what they remember of a row is not for another one. Asked before any has run.

        Raises:
            ValueError: they cannot be copied.
        """
        try:
            return [self.logits_processor, *(copy.deepcopy(self.logits_processor) for _ in range(1, self.n))]
        except Exception as error:
            raise ValueError(
                f"{self.name}: {self.n} samples need {self.n} copies of its logits processors, and these cannot be "
                f"copied ({type(error).__name__}: {error})"
            ) from error

    def shaping(
        self, num_drawn: int, processors: LogitsProcessorList, token_ids: Callable[[], Sequence[int]], vocab_size: int
    ) -> Shaping | None:
        """What changes the logits of a row that has drawn so many tokens; None for nothing."""
        is_early = num_drawn < self.min_new_tokens
        forbidden = [token for token in self.stop_token_ids if 0 <= token < vocab_size] if is_early else []
        return Shaping(forbidden, processors, self.name, token_ids) if forbidden or processors else None


def hash_of(values: object) -> str:
    """64 bits of numbers, words, arrays and what is made of them."""
    return hashlib.blake2b(repr(_plain(values)).encode(), digest_size=8).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, frozenset):
        return sorted(value)
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


#: Below it logits over temperature leave float32, where the likeliest token is drawn anyhow.
SMALLEST_TEMPERATURE = 1e-30


def _sequence(name: str, values: object) -> Sequence:
    if not isinstance(values, Sequence):
        raise ValueError(f"{name} takes a list, got {type(values).__name__}")
    return values


def integers(name: str, values: object) -> np.ndarray:
    """[n] int64 of a list, an array or a tensor of whole numbers, [n] or [1, n].

    Raises:
        ValueError: it is something else.
    """
    try:
        array = np.asarray(values.cpu() if torch.is_tensor(values) else values)
    except (TypeError, ValueError, RuntimeError):
        array = np.asarray(None)
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        given = f"{array.dtype} {list(array.shape)}" if array.ndim else type(values).__name__
        raise ValueError(f"{name} must be whole numbers [n], one row of them; got {given}")
    if array.size and (int(array.max()) >= 2**63 or int(array.min()) < -(2**63)):
        raise ValueError(f"{name} has a number beyond 64 bits")
    return array.astype(np.int64)


#: Of a result whose `finish_reason` is "error"; what else was known of it was a warning.
FAILED = "the logits were not numbers, or a logits processor or the tokenizer of stop strings failed"


@dataclass
class Timings:
    """Seconds, on the host's clock: `ttft` from submission to the first token, `itl` from each token to the next."""

    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)


@dataclass
class Result:
    """One sample of a request.

    Args:
        token_ids: the new tokens, a stop token included.
        num_cached_tokens: of the prompt, which were found computed.
        finish_reason: "stop", "length", "cancelled", "deadline", or "error" where logits were not numbers, or a logits
            processor or the tokenizer of stop strings failed.
        logprobs: where they were asked for, a dictionary token id -> log probability for each new token.
        prompt_logprobs: likewise for each of the prompt; None for the first.
    """

    request_id: str | int
    sample_index: int
    token_ids: list[int]
    num_cached_tokens: int
    finish_reason: str
    timings: Timings
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float] | None] | None = None


@dataclass
class Event:
    """One new token. `result` comes with the last one, or without one where the request ended for another reason."""

    request_id: str | int
    sample_index: int
    token_id: int | None
    result: Result | None = None
    logprobs: dict[int, float] | None = None


class Output:
    """The tokens of one sample as they become known."""

    def __init__(self, request: Request, sample_index: int, submitted: float):
        self.request = request
        self.sample_index = sample_index
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, float]] | None = None if request.logprobs is None else []
        self.prompt_logprobs: list[dict[int, float] | None] | None = None if request.prompt_logprobs is None else [None]
        self.num_cached_tokens = 0
        self.timings = Timings()
        self._last_time = submitted

    def receive(self, token: int, now: float, logprobs: dict[int, float] | None = None) -> Event:
        """Take a token in, -1 for none where the logits were not numbers; the event has a result if it was the last."""
        if token < 0:
            return self.finish("error")
        if self.token_ids:
            self.timings.itl.append(now - self._last_time)
        else:
            self.timings.ttft = now - self._last_time
        self._last_time = now
        self.token_ids.append(token)
        if self.logprobs is not None:
            self.logprobs.append(logprobs)
        event = Event(self.request.request_id, self.sample_index, token, logprobs=logprobs)
        try:
            stopped = token in self.request.stop_token_ids or self._completes_stop_string()
        except STOPS_ALL:
            raise
        except BaseException as error:
            warn_of_error(self.request.name, "its tokenizer", error)
            event.result = self._result("error")
            return event
        if stopped or len(self.token_ids) >= self.request.max_new_tokens:
            event.result = self._result("stop" if stopped else "length")
        return event

    def finish(self, reason: str) -> Event:
        """It ends with the tokens that it has."""
        return Event(self.request.request_id, self.sample_index, None, self._result(reason))

    def _completes_stop_string(self) -> bool:
        request = self.request
        return bool(request.stop) and stop_strings.completes(
            request.tokenizer, request.stop, request.token_ids, self.token_ids
        )

    def _result(self, finish_reason: str) -> Result:
        return Result(
            request_id=self.request.request_id,
            sample_index=self.sample_index,
            token_ids=self.token_ids,
            num_cached_tokens=self.num_cached_tokens,
            finish_reason=finish_reason,
            timings=self.timings,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )
