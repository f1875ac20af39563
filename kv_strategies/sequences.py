"""A sequence: one sample of one request on its way, from the queue to its last token.

    waiting: no table        admitted: a block table, a seat, tokens to prefill        decoding: one token a step

Tokens are counted twice: those that were drawn, of which the newest may still be on the device, and those that the host
has read.
"""

from __future__ import annotations

import math

import numpy as np
from transformers import LogitsProcessorList

from .paged import BlockTable
from .step.requests import Output, Request
from .strategy import Suspended

NO_TOKENS = np.array([], dtype=np.int32)


class ActiveSequence:
    """One sample of one request on its way."""

    def __init__(
        self, request: Request, sample_index: int, submitted: float, processors: LogitsProcessorList | None = None
    ):
        self.request = request
        self.sample_index = sample_index
        self.submitted = submitted
        self.deadline = math.inf if request.deadline is None else submitted + request.deadline
        self.sampling = request.sampling(sample_index)
        self.processors, *self.other_processors = request.processors() if processors is None else [processors]
        self._is_plain = not (request.temperature or self.processors or request.logprobs is not None)
        self.prompt = request.token_ids.astype(np.int32)
        self.output = Output(request, sample_index, submitted)  # tokens read back
        self.num_issued = 0  # tokens drawn, those still on the device included
        #: Tokens of the prompt whose log probabilities are known or on their way; the first has none.
        self.num_scored = 1
        self.proposal: np.ndarray = NO_TOKENS  # tokens that the next step is fed behind the newest one
        self.table: BlockTable | None = None
        self.suspended: Suspended | None = None  # what it had computed when it was preempted
        self.seats: list[int] = []  # its own, and until the prompt is computed those of its other samples
        self.num_to_prefill = 0
        self.finished = False

    @property
    def tokens(self) -> np.ndarray:
        """[n] int32: prompt and output, as far as the host knows them."""
        return np.concatenate((self.prompt, np.array(self.output.token_ids, dtype=np.int32)))

    def new_tokens(self, count: int) -> np.ndarray:
        """The newest `count` tokens that its table has room for, guesses included."""
        stop = self.table.num_seen
        return np.concatenate((self.tokens, self.proposal))[stop - count : stop]

    @property
    def seat(self) -> int:
        return self.seats[0]

    @property
    def num_samples(self) -> int:
        """Samples that this sequence stands for when it is admitted."""
        return self.request.n if self.sample_index == 0 and not self.num_issued else 1

    def admit(self, table: BlockTable, seats: list[int]) -> None:
        """Start, or start again, with all tokens known so far to compute but those that `table` holds."""
        if not self.num_to_prefill:  # later on it finds its own work as well
            self.output.num_cached_tokens = table.num_tokens
        self.table, self.seats, self.suspended = table, seats, None
        self.num_to_prefill = len(self.prompt) + len(self.output.token_ids)

    @property
    def other_samples(self) -> range:
        """The samples beside this one that start when its prompt is computed."""
        return range(1, len(self.seats))

    @property
    def num_uncomputed(self) -> int:
        """Tokens to prefill before the next one can be drawn."""
        return self.num_to_prefill - self.table.num_seen

    @property
    def is_decoding(self) -> bool:
        """Whether the next token to compute is one that was drawn since admission, on the device."""
        return self.num_uncomputed <= 0

    @property
    def is_scoring(self) -> bool:
        """Whether log probabilities of its prompt are yet to come."""
        return self.request.prompt_logprobs is not None and self.num_scored < len(self.prompt)

    def num_logits(self, num_tokens: int) -> int:
        """Of how many of its newest tokens a step that prefills so many wants the logits."""
        return num_tokens if self.is_scoring or len(self.proposal) else int(self.is_decoding)

    @property
    def takes_likeliest(self) -> bool:
        """Whether its next token is the likeliest one, and nothing else is asked."""
        return self._is_plain and self.num_issued >= self.request.min_new_tokens and not self.other_samples

    @property
    def num_wanted(self) -> int:
        """Tokens yet to be drawn, at most."""
        return self.request.max_new_tokens - self.num_issued

    @property
    def wants_more(self) -> bool:
        return self.num_wanted > 0
