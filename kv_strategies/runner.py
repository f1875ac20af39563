"""Runner: continuous batching over a strategy, without a serving engine.

    submit -> waiting -> admit (prefix hit -> block table) -> prefill in chunks -> decode -> finished
                 ^                                                  |
                 +------ preempt the youngest when blocks run out --+

Every step packs one token of each decoding sequence and as much of the prompts as fits, the last perhaps in part, into
a single forward [1, T], without padding. On a GPU the next step is scheduled and launched before the tokens of this one
are read back: its inputs are taken from the device, and only stop tokens are noticed a step late. Only a first token is
read at once; where others decode beside it, nobody waits for it, but it is told before the next launch if it is there.
A step that only decodes, or has some hundred tokens of prompts besides, replays a CUDA graph.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from bisect import insort_left, insort_right
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import accumulate, count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .baseline import Baseline
from .kernels.triton_compile import can_compile_ahead, compiled_ahead
from .launched import Found, LaunchedStep, start_copy
from .models.load import load_tokenizer
from .paged import BlockTable, OutOfBlocks
from .sequences import NO_TOKENS, ActiveSequence
from .speculative import Proposer, Row
from .step.budget import TokenBudget, Work
from .step.checked import checked
from .step.context import longest_row
from .step.forward import AttendingCache, forward
from .step.graphs import Rehearsal, StepGraphs
from .step.interrupts import uninterrupted
from .step.plan import PlanBuffer
from .step.ranks import ranks_of
from .step.requests import Event, Output, Request, Result, hash_of
from .step.sampling import SamplingParams, sample, to_device, warp
from .step.scores import Logprobs, Shaping, logprobs, shape, warn
from .step.warm_up import FirstLayer, Step, captures, forwards
from .strategy import Reservation, Strategy
from .underway import Underway

_RUNNERS = count()
_WARM_CONTEXT = 8192  # tokens
_GLANCE = 0.0003  # seconds between two looks at whether it is time to launch a step
_SCORED_TOKENS = 256  # of a prompt at once, where it wants log probabilities: they take rows of the vocabulary's size


class Runner:
    """Runs requests on `model` through `strategy`.

    Args:
        model: a LlamaForCausalLM; its device is where the steps run.
        strategy: built for this model (`build`). Several runners may share it; the baseline runs one request at a time.
        max_num_seqs: sequences in a step, samples counted.
        max_batch_tokens: tokens in a forward; longer prompts are prefilled in chunks.
        target_itl: seconds from one token of a row to its next. While rows decode, prompts get as many tokens of a
            forward as recent ones say it has time for (`step/budget.py`), and at least a sixteenth of
            `max_batch_tokens`. None for all that there is room for.
        shortest_first: seconds a token. A prompt waits as if it had come so much later for each token of it that is
            not yet computed, so that short ones go ahead of long ones, in the middle of these as well, and none waits
            for ever: some 0.0001, which is several times what a token takes. None: prompts go in the order in which
            they came. A higher priority comes first in any case.
        cuda_graphs: replay decode steps, and those with up to 2048 tokens of which some are of prompts, as CUDA graphs
            (`step/graphs.py`); None for yes where the strategy allows it.
        tokenizer: for requests with stop strings; unless given the one in the model's folder.
        speculate: who guesses the next tokens of a row, for several a step (`speculative.py`); rows with logits
            processors, which must see one token after the other, do without.
        warm_up: see the method of that name; None for yes where CUDA graphs are replayed. It takes seconds, and more
            where no process before has compiled the kernels: say no for a few requests that come once.

    As `generate()` does, a request stops at the end-of-sequence tokens of `model.generation_config` unless its
    `stop_token_ids` say otherwise; `stop_token_ids=()` never stops.

    Raises:
        ValueError: the strategy is another model's, or options do not go together; the message says which.
    """

    def __init__(
        self,
        model,
        strategy: Strategy | Baseline,
        *,
        max_num_seqs: int = 64,
        max_batch_tokens: int = 2048,
        target_itl: float | None = None,
        shortest_first: float | None = None,
        cuda_graphs: bool | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        speculate: Proposer | None = None,
        warm_up: bool | None = None,
    ):
        if strategy.model is not model:
            raise ValueError("the strategy was built for another model")
        max_num_seqs = checked("max_num_seqs", max_num_seqs, int)
        max_batch_tokens = checked("max_batch_tokens", max_batch_tokens, int)
        cuda_graphs = checked("cuda_graphs", cuda_graphs, bool | None)
        shortest_first = checked("shortest_first", shortest_first, float | None)
        if shortest_first is not None and not 0 < shortest_first < math.inf:
            raise ValueError(f"shortest_first must be more than 0 seconds a token, and finite, got {shortest_first}")
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise ValueError(f"tokenizer takes a tokenizer, which decodes tokens, got {tokenizer!r}")
        if max_num_seqs < 1 or max_batch_tokens <= max_num_seqs:
            raise ValueError(
                f"max_batch_tokens must exceed max_num_seqs, so that a prompt can advance while all others decode; "
                f"got {max_batch_tokens} and {max_num_seqs}"
            )
        self.model = model
        self.strategy = strategy
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.device = model.device
        self.num_preemptions = 0
        self._budget = TokenBudget(target_itl, least=-(-max_batch_tokens // 16))
        self._shortest_first = shortest_first
        self._tokenizer = tokenizer
        self._speculate = speculate
        self.num_proposed = self.num_accepted = 0  # guessed tokens, and those that were right
        self._ranks, self._number = ranks_of(model), next(_RUNNERS)
        self._waiting: list[ActiveSequence] = []  # by `_turn`, then as they came
        self._next_deadline = math.inf  # no request ends by its deadline before it
        self._running: list[ActiveSequence] = []  # oldest first; the last may be prefilling, see `_in_prompt`
        self._launches: deque[float] = deque(maxlen=8)  # seconds that recent ones took, their schedule included
        self._in_flight: deque[LaunchedStep] = deque()  # launched, their tokens not yet read; the oldest first
        self._events: deque[Event] = deque()  # of requests that `submit` queued, for `step`
        self._boxes: dict[int, deque[Event]] = {}  # id() of a request -> where the call that holds it finds its events
        if speculate is not None:
            speculate.check(model)
        if isinstance(strategy, Baseline):
            if speculate is not None:
                raise ValueError("the baseline decodes one token after the other: speculate with a strategy")
            for name, value in {"target_itl": target_itl, "shortest_first": shortest_first}.items():
                if value is not None:
                    raise ValueError(f"the baseline runs one request after the other: {name} is for a strategy")
            return
        if speculate is not None and strategy.placement.reads_some:
            raise ValueError(
                "top_n and mass read some of V for a token that decodes alone and all of it for several at once: what "
                "guesses are verified by is not what plain decoding draws from. Speculate with exact reads"
            )
        for name, value in {"target_itl": target_itl, "shortest_first": shortest_first}.items():
            if value is not None and self._ranks.size > 1:
                raise ValueError(f"{name} goes by the clock of this process, and ranks have to decide alike")
        on_gpu = self.device.type == "cuda"
        self._lookahead = on_gpu  # launch a step before reading the last one; on a CPU a launch is the work itself
        weakref.finalize(self, _abandon, strategy, self._running)
        self._cache = AttendingCache(strategy)
        self._reserved: list[Reservation] = []  # of the step that is being launched
        self._is_stepping = False
        self._has_failed = False  # a step has, and what it had done is to be undone
        self._free_seats = list(range(max_num_seqs))
        # The newest token of each sequence, by seat; one more seat for the padding rows of a graph.
        self._last_token = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        self._graphs = self._verifying = None
        self._compiled_for = 0  # tokens of the longest rows whose kernels are there
        can_capture = on_gpu and strategy.capturable and len(set(strategy.shape.layer_devices)) == 1
        if cuda_graphs and not can_capture:
            raise ValueError(
                f"cuda_graphs needs all layers on one GPU and reads that a graph can hold; {strategy.name!r} on "
                f"{self.device.type} cannot be captured"
            )
        if can_capture if cuda_graphs is None else cuda_graphs:
            self._graphs = self._capture()
            self._verifying = None if speculate is None else self._capture(all_logits=True)
        warm_up = checked("warm_up", warm_up, bool | None)
        if warm_up is None and self._graphs is not None:
            with uninterrupted(), strategy.lock:
                strategy.follow()
            warm_up = not strategy.seen.is_opaque  # hooks are not called with what nobody has asked for
        if warm_up:
            self.warm_up()

    def _capture(self, **options: bool) -> StepGraphs:
        strategy, max_batch_tokens = self.strategy, self.max_batch_tokens
        if not strategy.placement.prefill_capturable:
            max_batch_tokens = 0
        sizes = {"max_num_seqs": self.max_num_seqs, "max_batch_tokens": max_batch_tokens}
        return StepGraphs(strategy, strategy.block_size, self._last_token, **sizes, **options)

    def warm_up(
        self, max_context: int | None = None, progress: Callable[[int, int, str], object] = lambda *_: None
    ) -> None:
        """Run the steps that will occur, so that no request waits for a kernel to be compiled or a CUDA graph to be
        captured (`step/warm_up.py`). Nothing that is cached changes, and a second call finds kernels and graphs there.

        On a GPU the kernels are compiled side by side, and a step waits for its own (`kernels/triton_compile.py`).

        Left out are steps whose rows share blocks, and forwards without a graph where `offload` streams or times them.

        Args:
            max_context: tokens of the longest rows, as far as model and pool have room for them; 8192 unless told.
            progress: called after each step with how many are done, how many there are, and which it was.

        Raises:
            ValueError: max_context is not a number of tokens.
            torch.OutOfMemoryError: there is no memory for a forward. (For a graph, a warning: see `StepGraphs`.)
        """
        max_context = checked("max_context", _WARM_CONTEXT if max_context is None else max_context, int)
        if max_context < 1:
            raise ValueError(f"max_context must be at least 1 token, got {max_context}")
        if isinstance(self.strategy, Baseline):
            return
        strategy, max_context = self.strategy, max(1, min(max_context, self.max_context))
        graphs = [group for group in (self._graphs, self._verifying) if group is not None]
        self._in_turn("expect", [], lambda: strategy.compaction.expect(self.max_num_seqs))
        steps = self._steps(graphs, strategy, max_context)
        with self._compiling(graphs, max_context):
            for number, (what, run) in enumerate(steps, start=1):
                self._in_turn("warm up", [what], partial(self._together, run))
                progress(number, len(steps), what)

    def _steps(self, graphs: Sequence[StepGraphs], strategy: Strategy | FirstLayer, max_context: int) -> list[Step]:
        """Those of a warm-up."""
        steps = list(captures(graphs, max_context))
        if strategy.placement.prefill_capturable:
            sizes = {"max_num_seqs": self.max_num_seqs, "max_batch_tokens": self.max_batch_tokens}
            steps += forwards(strategy, strategy.pool.num_blocks, strategy.block_size, **sizes, max_context=max_context)
        return steps

    def _can_compile_ahead(self) -> bool:
        """On a GPU, unless hooks would see what has not been computed."""
        return self.device.type == "cuda" and not self.strategy.seen.is_opaque and can_compile_ahead()

    @contextmanager
    def _compiling(self, graphs: Sequence[StepGraphs], max_context: int) -> Iterator[None]:
        """Within, threads compile what the steps of a warm-up launch."""
        with ExitStack() as compiling:
            if max_context > self._compiled_for and self._can_compile_ahead():
                first = FirstLayer(self.strategy)
                steps = self._steps([Rehearsal(group, first) for group in graphs], first, max_context)
                try:
                    launch = compiling.enter_context(compiled_ahead())
                    work = partial(launch, lambda: [run() for _, run in steps])
                    self._in_turn("compile", [len(steps)], partial(self._together, work))
                except Exception:
                    if self._ranks.size > 1:  # of which others are in the middle of this step
                        raise
                    compiling.close()  # each kernel at its launch, which says what is wrong if it is not this Triton
                self._compiled_for = max_context
            yield

    def _together(self, run: Callable[[], object]) -> None:
        with self._ranks.together():
            run()

    # --- whole runs

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request | Sequence[int]]) -> list[Result]:
        """Run all requests to their end.

        Returns:
            one result a sample, in the order of the requests.

        Raises:
            ValueError: a request that can never run; nothing was started.
        """
        requests = self._checked(requests)
        order = {request.request_id: i for i, request in enumerate(requests)}
        results = [event.result for event in self._stream(requests) if event.result is not None]
        return sorted(results, key=lambda result: (order[result.request_id], result.sample_index))

    @torch.inference_mode()
    def stream(self, requests: Sequence[Request | Sequence[int]]) -> Iterator[Event]:
        """Run all requests and yield their tokens as they come. Stopping early cancels what is left.

        Calls may be nested or come from several threads: each gets the events of its own requests, and whichever is
        asked advances all of them.
        """
        yield from self._stream(self._checked(requests))

    async def astream(self, requests: Sequence[Request | Sequence[int]]) -> AsyncIterator[Event]:
        """As `stream`, for `async for`; steps run in threads of asyncio. Leaving it early cancels what is left."""
        events, pull = self.stream(requests), None
        try:
            while True:
                pull = asyncio.ensure_future(asyncio.to_thread(next, events, None))
                event = await asyncio.shield(pull)
                if event is None:
                    return
                yield event
        finally:
            if pull is not None:
                await asyncio.wait([pull])  # of a task that was cancelled, the step goes on to its end
            events.close()

    def _stream(self, requests: list[Request]) -> Iterator[Event]:
        if isinstance(self.strategy, Baseline):
            self._check(requests)
            for request in requests:
                request.draw_seed(self._ranks.random)
            yield from self.strategy.stream(requests)
            return
        box: deque[Event] = deque()
        ids = [request.request_id for request in requests]
        try:
            self._in_turn("submit", requests, lambda: self._submit(requests, box))
            while True:
                while box:
                    yield box.popleft()
                with uninterrupted(), self.strategy.lock:
                    if not box and not self._asked_by(box):
                        return
                    if not box:
                        self._advance()
                self._ranks.pause()
        finally:
            # The garbage collector may have found it, in the middle of anything, so that it must wait for nobody.
            if self._ranks.size == 1 or self.strategy.lock.is_mine():
                self.strategy.lock.when_idle(lambda _=requests: self._close(box))  # their ids are theirs until then
            else:
                self._in_turn("close", ids, lambda: self._close(box))

    def _asked_by(self, box: deque[Event]) -> list[ActiveSequence]:
        """What a call still waits for."""
        return [seq for seq in self._unfinished() if self._boxes.get(id(seq.request)) is box]

    @torch.inference_mode()
    def _close(self, box: deque[Event]) -> None:
        self._end(self._asked_by(box), "cancelled")
        for key in [key for key, other in self._boxes.items() if other is box]:
            del self._boxes[key]

    @torch.inference_mode()
    def _in_turn(self, what: str, about: Sequence, work: Callable[[], None]) -> None:
        """Do what was asked for: at once, or, of several ranks, where rank 0 did it between its steps."""
        call = cache(lambda: (self._number, what, *map(_known, about)))
        while True:
            with uninterrupted(), self.strategy.lock:
                if self._ranks.is_turn(call):
                    work()
                    return
                self._advance()
            self._ranks.pause()

    # --- step by step

    def submit(self, requests: Sequence[Request | Sequence[int]]) -> None:
        """Queue requests, all of them or, where one of them can never run, none. Their events come from `step`.

        Raises:
            ValueError: says which request, why, and what would fit.
        """
        self._check_batches()
        requests = self._checked(requests)
        self._in_turn("submit", requests, lambda: self._submit(requests))

    def _check_batches(self) -> None:
        if isinstance(self.strategy, Baseline):
            raise ValueError(
                "the baseline runs one request after the other: use generate or stream; leaving a stream cancels it"
            )

    def _submit(self, requests: list[Request], box: deque[Event] | None = None) -> None:
        """Queue them; their events go to `box`, where there is one."""
        self._check(requests, has_box=box is not None)
        if not (self._running or self._waiting or self._in_flight):
            self.strategy.look_closely()
        now = time.perf_counter()
        for request in requests:
            request.draw_seed(self._ranks.random)
            if box is not None:
                self._boxes[id(request)] = box
        for seq in [ActiveSequence(request, 0, now) for request in requests]:
            insort_right(self._waiting, seq, key=self._turn)
            self._next_deadline = min(self._next_deadline, seq.deadline)
        self._promise()

    def _promise(self) -> None:
        """What the largest of the accepted requests takes is kept for this runner, so that all of them can finish."""
        needed = max((seq.request.num_blocks for seq in self._unfinished()), default=0)
        self.strategy.promise(self, needed, self._tables)

    def _tables(self) -> list[BlockTable]:
        return [seq.table for seq in self._running]

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward, if there is work. Returns the tokens of submitted requests that became known.

        Where none is needed yet, since the device is busy for longer than a launch takes, it waits a moment and
        returns: who comes meanwhile is part of the next one.

        A step is done or it is not: where it raises, no token is lost and none counts as computed that was not, and the
        next call tries again. Ctrl-C comes when it is done, and its tokens with the next.
        """
        self._check_batches()
        self._ranks.pause()
        with uninterrupted() as interrupts, self.strategy.lock:
            if not (is_early := self._is_early()):
                self._advance()
            interrupts.check()
            events = [self._events.popleft() for _ in range(len(self._events))]
        if is_early:  # not with the lock in hand, which others want
            time.sleep(_GLANCE)
        return events

    def _is_early(self) -> bool:
        """Whether the next step need not be launched yet: the device is busy for longer than a launch takes, and who
        comes meanwhile can still be part of it, where one launched now would stand before him.
        """
        if self._ranks.size > 1 or len(self._in_flight) != 1 or self._waiting or self._events or self._in_prompt():
            return False
        (step,) = self._in_flight
        if step.work.num_tokens or step.is_awaited or step.has_first:
            return False
        margin = max(self._launches, default=math.inf) + 2 * _GLANCE
        return time.perf_counter() < self._budget.end_of(step.work) - margin

    def _advance(self) -> None:
        if self._is_stepping:
            raise RuntimeError(
                "this runner is in the middle of a step: what is called there (logits processors, hooks, tokenizers) "
                "may submit and cancel, and cannot wait for another step"
            )
        self._is_stepping = True
        try:
            self._step()
        finally:
            self._is_stepping = False

    def _step(self) -> None:
        if self.model.training:
            raise ValueError("a runner serves inference: call model.eval() first")
        if not (self._running or self._waiting or self._in_flight):
            return
        if self._has_failed:
            self._recover()
        late = self._ranks.step(self._number, self._late)
        if late is None:
            return
        unfinished = list(self._unfinished()) if late else []
        self._end([unfinished[place] for place in late], "deadline")
        if any(map(self._is_due, self._in_flight)):
            self._collect()
            return
        begun = time.perf_counter()
        try:
            scheduled = self._schedule()
            self._ranks.agree(lambda: (self._number, _digest(*scheduled)))
            with self._ranks.together():
                is_launched = self._launch(*scheduled)
            self._launches.append(time.perf_counter() - begun)
        except BaseException:
            self._has_failed = True
            self._recover()
            raise
        if not is_launched and not self._in_flight and self._waiting:
            raise OutOfBlocks(
                f"request {self._waiting[0].request.request_id!r} waits for blocks and nothing runs here that could "
                f"give some back{self.strategy.holders(self)}; it stays queued. {self.strategy.stats()}"
            )
        self._collect(leave=1 if is_launched and self._lookahead else 0)

    def _is_due(self, step: LaunchedStep) -> bool:
        """Whether its tokens are told before another step is launched. Of several ranks each would find another moment
        at which a step is done.
        """
        return step.is_awaited or (step.has_first and self._ranks.size == 1 and step.is_done)

    def _recover(self) -> None:
        """After a step that failed: the newest tokens are once more those that the host knows, and rows whose keys
        could not all be turned are computed again.
        """
        for reservation in self._reserved:
            reservation.undo()
        self._reserved.clear()
        for seq in self._running:
            seq.proposal = NO_TOKENS
        self._collect()
        for seq in [seq for seq in self._running if seq.table.num_tokens == 0 and seq.num_issued]:
            self._requeue(seq)
        rows = [(seq.seat, seq.output.token_ids[-1]) for seq in self._running if seq.output.token_ids]
        if rows:
            seats, tokens = torch.tensor(rows, device=self.device).T
            self._last_token[seats] = tokens
        self._has_failed = False

    def cancel(self, request_id: str | int) -> None:
        """End a request and give its blocks back: its last event brings what it has. Unknown or finished ids are
        ignored; one that is a number in a list ends in all calls that have it. Asked for in the middle of a step, by a
        logits processor, the handler of a signal or another thread, it is done behind the step.
        """
        self._check_batches()
        if self._ranks.size == 1 or self.strategy.lock.is_mine():
            self.strategy.lock.when_idle(lambda: self._cancel(request_id))
        else:
            self._in_turn("cancel", [request_id], lambda: self._cancel(request_id))

    def _cancel(self, request_id: str | int) -> None:
        self._end([seq for seq in self._unfinished() if seq.request.request_id == request_id], "cancelled")

    def _late(self) -> list[int]:
        """The requests whose deadline has passed, by their places among the unfinished."""
        now = time.perf_counter()
        if now < self._next_deadline:
            return []
        deadlines = [seq.deadline for seq in self._unfinished()]
        self._next_deadline = min((deadline for deadline in deadlines if deadline > now), default=math.inf)
        return [place for place, deadline in enumerate(deadlines) if deadline <= now]

    def _end(self, sequences: list[ActiveSequence], reason: str) -> None:
        for seq in sequences:
            samples = range(seq.sample_index, seq.sample_index + seq.num_samples)
            if seq in self._running:
                samples = (seq.sample_index, *seq.other_samples)
                self._leave(seq)
            else:
                self._waiting.remove(seq)
            seq.finished = True
            for index in samples:
                output = seq.output if index == seq.sample_index else Output(seq.request, index, seq.submitted)
                self._tell(seq, output.finish(reason))
        self._promise()

    def _tell(self, seq: ActiveSequence, event: Event) -> None:
        self._boxes.get(id(seq.request), self._events).append(event)

    @property
    def max_context(self) -> int:
        """Tokens of the longest row that model and pool have room for."""
        longest = longest_row(self.model.config)
        return longest if isinstance(self.strategy, Baseline) else min(longest, self.strategy.max_tokens)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # --- scheduling: integers only

    def _schedule(self) -> tuple[list[ActiveSequence], list[tuple[ActiveSequence, int]]]:
        """Who decodes, and who prefills how many tokens; with room reserved for all of them."""
        self.strategy.follow()
        self.strategy.rebase([seq.table for seq in self._running])
        self._propose()
        while True:
            decoding = [seq for seq in self._running if seq.is_decoding and seq.wants_more]
            try:
                self.strategy.compact([(seq.table, len(seq.prompt)) for seq in self._running if seq.wants_more], self)
                for seq in decoding if self._speculate else ():  # no row is to grow past its next compaction
                    until_due = self.strategy.compaction.num_until_due(seq.table, len(seq.prompt))
                    seq.proposal = seq.proposal[: until_due - 1]
                rows = [(seq.table, 1 + len(seq.proposal)) for seq in decoding]
                self._reserved = [self.strategy.reserve(rows, self)]
                break
            except OutOfBlocks:
                if any(len(seq.proposal) for seq in decoding):
                    for seq in decoding:
                        seq.proposal = NO_TOKENS
                elif self._in_flight:  # a sequence may have ended, and a preempted one must know its tokens
                    self._collect()
                else:  # the last one as well: others hold what it lacks, and it waits for them
                    self._preempt(max(reversed(self._running), key=_urgency))
        decoding.sort(key=lambda seq: int(seq.table.blocks[0]))  # who begins alike form a group
        prefilling = [(seq, 1 + len(seq.proposal)) for seq in decoding if len(seq.proposal)]
        decoding = [seq for seq in decoding if not len(seq.proposal)]
        budget = self.max_batch_tokens - len(decoding) - sum(num_tokens for _, num_tokens in prefilling)
        if decoding or prefilling:
            budget = self._budget.within(budget)
        if self._graphs is not None and not prefilling:
            budget = self._graphs.num_fitting(len(decoding), budget)
        underway = Underway(self.strategy)
        while budget > 0:
            seq = self._next_prompt(budget, underway)
            if seq is None:
                break
            try:
                self.strategy.compact([(seq.table, len(seq.prompt))], self)  # it may have been preempted right before
                until_due = self.strategy.compaction.num_until_due(seq.table, len(seq.prompt))
                num_tokens = min(seq.num_uncomputed, seq.request.chunk, budget, until_due)
                if seq.is_scoring:
                    num_tokens = min(num_tokens, _SCORED_TOKENS)
                self._reserved.append(self.strategy.reserve([(seq.table, num_tokens)], self))
            except OutOfBlocks:  # the decoding ones are ahead of it; it goes on when they give blocks back
                if not decoding and not prefilling and not self._in_flight:
                    self._preempt(seq)
                break
            prefilling.append((seq, num_tokens))
            underway.add(seq, num_tokens)
            budget -= num_tokens
            if not seq.is_decoding:
                break  # there is no room for more of it, or it is to be compacted on its way
        return decoding, prefilling

    def _propose(self) -> None:
        """Guesses for the rows that decode, as many as a forward, and the end of the request, leave room for."""
        if self._speculate is None:
            return
        asking = [seq for seq in self._running if seq.is_decoding and seq.wants_more and not seq.processors]
        room = (self.max_batch_tokens - self.max_num_seqs) // max(1, len(asking))
        rows = [
            Row(seq.tokens, min(seq.num_wanted - 1, seq.request.chunk - 1, room), seq.request.salt) for seq in asking
        ]
        try:
            proposals = self._speculate.propose(rows)
        except Exception as error:  # rows can do without
            warn(
                f"{type(self._speculate).__name__} has failed ({type(error).__name__}: {error}); nothing is guessed "
                "wherever it does"
            )
            proposals = [NO_TOKENS] * len(rows)
        for seq, row, proposal in zip(asking, rows, proposals, strict=True):
            proposal = np.asarray(proposal, dtype=np.int32)[: row.limit]
            if len(proposal) and not 0 <= proposal.min() <= proposal.max() < self.model.config.vocab_size:
                raise ValueError(f"{type(self._speculate).__name__} guesses tokens outside the vocabulary: {proposal}")
            seq.proposal = proposal

    def _next_prompt(self, budget: int, underway: Underway) -> ActiveSequence | None:
        """Whose prompt is to be computed: one that has begun goes on, unless a whole one is to go ahead of it."""
        begun = self._in_prompt()
        if begun is not None:
            first = self._waiting[0] if self._shortest_first and self._waiting else None
            if first is None or len(first.prompt) > budget or self._turn(first) >= self._turn(begun):
                return begun
        if self._waiting and underway.spares(self._waiting[0]):
            return begun
        return self._admit() or begun

    def _in_prompt(self) -> ActiveSequence | None:
        """The sequence that is in the middle of its prompt; of several, as a step that failed leaves them, that whose
        turn it is.
        """
        return min((seq for seq in self._running if not seq.is_decoding), key=self._turn, default=None)

    def _turn(self, seq: ActiveSequence) -> tuple[int, float]:
        """Among those whose prompts are to be computed, the lower, the sooner."""
        if self._shortest_first is None:
            return _urgency(seq), 0.0
        num_computed = 0 if seq.table is None else seq.table.num_seen
        num_tokens = len(seq.prompt) + len(seq.output.token_ids) - num_computed
        return _urgency(seq), seq.submitted + self._shortest_first * num_tokens

    def _admit(self) -> ActiveSequence | None:
        """Start the next waiting sequence, if there is room for it."""
        if not self._waiting or len(self._free_seats) < self._waiting[0].num_samples:
            return None
        seq = self._waiting[0]
        known = seq.tokens[: seq.num_scored] if seq.is_scoring else seq.tokens  # what is cached has no logits
        table = self.strategy.open_table(known, seq.request.salt, seq.suspended, len(seq.prompt))
        try:
            num_tokens = len(seq.tokens) - table.num_seen
            has_room = self.strategy.has_room(table, num_tokens, seq.request.chunk, self, len(seq.prompt))
            if has_room and (seq.suspended is None or table is not seq.suspended.table):
                self.strategy.count_hit(seq.tokens, table)
        except BaseException:
            table.release()
            raise
        if not has_room:
            table.release()
            return None
        del self._waiting[0]
        seq.admit(table, [self._free_seats.pop() for _ in range(seq.num_samples)])
        self._running.append(seq)
        return seq

    def _preempt(self, seq: ActiveSequence) -> None:
        """Take the blocks of a sequence away. It waits at the head of the queue, and is computed again where no lower
        tier has taken them.
        """
        seq.suspended = self.strategy.suspend(seq.table)
        self.strategy.sharing.publish(seq.tokens, seq.table, seq.request.salt)
        self._requeue(seq)
        self.num_preemptions += 1

    def _requeue(self, seq: ActiveSequence) -> None:
        self._leave(seq)
        insort_left(self._waiting, seq, key=self._turn)

    def _leave(self, seq: ActiveSequence) -> None:
        seq.table.release()
        self._running.remove(seq)
        seq.table, seq.proposal = None, NO_TOKENS
        self._free_seats += seq.seats

    # --- launching: everything the forward needs in one upload

    def _launch(self, decoding: list[ActiveSequence], prefilling: list[tuple[ActiveSequence, int]]) -> bool:
        """Whether there was something to launch."""
        if not decoding and not prefilling:
            return False
        guessing = [n for seq, n in prefilling if len(seq.proposal)]
        num_tokens = sum(n for _, n in prefilling) - sum(guessing)
        work = Work(len(decoding) + len(guessing), num_tokens, time.perf_counter())
        rows = [(seq.table, 1) for seq in decoding] + [(seq.table, n) for seq, n in prefilling]
        launched = [*decoding, *(seq for seq, _ in prefilling)]
        sequences = [seq for seq in launched if seq.is_decoding]  # those that have computed all their tokens
        proposals = [seq.proposal for seq in sequences]
        counts = [1] * len(decoding) + [seq.num_logits(n) for seq, n in prefilling]
        replayed = self._replay(rows, counts, decoding, prefilling)
        logits, drawn = replayed or (self._forward(rows, counts, decoding, prefilling), None)
        scored = self._score_prompts(logits, counts[len(decoding) :], prefilling)
        drawn, found = self._draw(sequences, _last_rows(logits, launched, counts), drawn)
        copied = start_copy([drawn, found, *(part for _, part in scored)], self.device)
        siblings = self._fork(sequences)
        # The step is done, but for books that are kept on the host.
        self._reserved.clear()
        for seq, others in siblings:
            del seq.seats[1:]
            at = self._running.index(seq) + 1
            self._running[at:at] = others
            sequences += others
            proposals += [NO_TOKENS] * len(others)
        has_first = any(not seq.num_issued for seq in sequences)
        for seq in sequences:
            seq.num_issued += 1
        for seq, part in scored:
            seq.num_scored += len(part.ids)
        is_awaited = (bool(sequences) and not decoding) or self._speculate is not None
        is_awaited |= any(seq.processors for seq in sequences)
        scoring = [seq for seq, _ in scored]
        self._in_flight.append(LaunchedStep(sequences, proposals, is_awaited, work, has_first, scoring, *copied))
        for seq, _ in prefilling:
            if not len(seq.proposal):
                self.strategy.sharing.publish(seq.tokens, seq.table, seq.request.salt)
        # Of a row with guesses more may yet be seen than its newest tokens let see.
        self.strategy.retire([seq.table for seq in launched if not len(seq.proposal)])
        return True

    def _draw(
        self, sequences: list[ActiveSequence], logits: Tensor, drawn: Tensor | None
    ) -> tuple[Tensor | None, Logprobs | None]:
        """The next token of each sequence, and of the other samples of a request whose prompt has just been computed;
        with log probabilities of those who ask for them, in the same order.

        Args:
            logits: [R, V]; drawn: [R] the likeliest tokens, in their seats already, where a graph has found them.
        """
        if not sequences:
            return None, None
        if drawn is not None and all(seq.takes_likeliest for seq in sequences):
            return drawn, None
        draws, others = [], []
        for seq in sequences:
            others += [_Draw(seq, index, len(draws), 0, seq.seats[-index]) for index in seq.other_samples]
            seat = (
                self.max_num_seqs if len(seq.proposal) else seq.seat
            )  # which of them is the newest, the host will say
            for guessed in range(1 + len(seq.proposal)):
                draws.append(_Draw(seq, seq.sample_index, len(draws), seq.num_issued + guessed, seat))
        draws += others
        if others:
            logits, drawn = logits[to_device([draw.row for draw in draws], self.device)], None
        shaped = {row: found for row, draw in enumerate(draws) if (found := draw.shaping(logits.shape[-1])) is not None}
        if shaped:
            logits, drawn = shape(logits, shaped), None
        params = [draw.params for draw in draws]
        if drawn is None or any(p.temperature for p in params):
            drawn = sample(logits, params, [draw.step for draw in draws])
            seats = to_device([draw.seat for draw in draws], self.device)
            self._last_token[seats] = drawn.clamp(min=0)  # a failed row looks up some embedding
        asked = [row for row, draw in enumerate(draws) if draw.seq.request.logprobs is not None]
        if not asked:
            return drawn, None
        rows = to_device(asked, self.device)
        scores = warp(logits[rows], [params[row] for row in asked])
        return drawn, logprobs(scores, drawn[rows], max(draws[row].seq.request.logprobs for row in asked))

    def _score_prompts(self, logits: Tensor, counts, prefilling) -> list[tuple[ActiveSequence, Logprobs]]:
        """Log probabilities of the prompt's tokens that follow those of this step, for who asks for them."""
        found, end = [], len(logits) - sum(counts)
        for (seq, num_tokens), num_rows in zip(prefilling, counts, strict=True):
            end += num_rows
            if not seq.is_scoring:
                continue
            first = seq.table.num_seen - num_tokens + 1  # of the tokens that the rows of this step are followed by
            skipped = seq.num_scored - first
            wanted = seq.prompt[seq.num_scored : first + num_tokens]
            rows = logits[end - num_rows + skipped :][: len(wanted)]
            tokens = torch.from_numpy(wanted.astype(np.int64)).to(self.device)
            found.append((seq, logprobs(rows, tokens, seq.request.prompt_logprobs)))
        return found

    def _replay(self, rows, counts, decoding, prefilling) -> tuple[Tensor, Tensor] | None:
        """Logits [R, V] as `_forward` gives them, and the likeliest tokens [R]; None where no graph is for the step."""
        if self._graphs is None or self.strategy.seen.is_opaque:
            return None
        is_urgent = any(step.has_first for step in self._in_flight)
        if not prefilling:
            seats = [seq.seat for seq in decoding]
            return self._graphs.decode([table.row(1) for table, _ in rows], seats, is_urgent=is_urgent)
        is_guess = any(len(seq.proposal) for seq, _ in prefilling)
        if (is_guess and len(rows) > 1) or any(seq.is_scoring for seq, _ in prefilling):
            return None
        graphs = self._verifying if is_guess else self._graphs
        prompts = zip(prefilling, counts[len(decoding) :], strict=True)
        seats = [seq.seat for seq in decoding]
        seats += [seq.seat if count and not is_guess else None for (seq, _), count in prompts]
        planned = [table.row(num_new) for table, num_new in rows]
        new = np.concatenate([seq.new_tokens(num_tokens) for seq, num_tokens in prefilling])
        found = graphs.prefill(planned[: len(decoding)], planned[len(decoding) :], seats, new, is_urgent=is_urgent)
        return found and tuple(part[: sum(counts)] for part in found)

    def _forward(self, rows, counts, decoding, prefilling) -> Tensor:
        """Logits [R, V] of the last tokens of each row, so many as `counts` says."""
        num_decoding = len(decoding)
        input_ids = np.concatenate([np.zeros(num_decoding, np.int32), *(seq.new_tokens(n) for seq, n in prefilling)])
        ends = accumulate(num_new for _, num_new in rows)
        last = [token for end, count in zip(ends, counts, strict=True) for token in range(end - count, end)]
        max_blocks = max(len(table.blocks) for table, _ in rows)
        extra = {"input_ids": len(input_ids), "seats": max(1, num_decoding), "last": max(1, len(last))}
        buffer = PlanBuffer(self.device, len(rows), len(input_ids), max_blocks, self.strategy.block_size, extra)
        values = {
            "input_ids": input_ids,
            "seats": [seq.seat for seq in decoding] or [0],
            "last": last or [0],
        }
        plan = buffer.fill([table.row(num_new) for table, num_new in rows], values)
        device_ids = buffer.tensors["input_ids"]
        if num_decoding:
            device_ids[:num_decoding] = self._last_token[buffer.tensors["seats"]]
        logits = forward(self._cache, plan, device_ids, buffer.tensors["last"])
        return logits.to(self.device)[: len(last)]

    def _fork(self, sequences: list[ActiveSequence]) -> list[tuple[ActiveSequence, list[ActiveSequence]]]:
        """The other samples of requests whose prompt has just been computed: same blocks, own seeds."""
        siblings: list[tuple[ActiveSequence, list[ActiveSequence]]] = []
        try:
            for seq in [seq for seq in sequences if seq.other_samples]:
                siblings.append((seq, []))
                for index in seq.other_samples:
                    sibling = ActiveSequence(seq.request, index, seq.submitted, seq.other_processors[index - 1])
                    sibling.admit(seq.table.fork(), [seq.seats[-index]])
                    sibling.output.num_cached_tokens = seq.output.num_cached_tokens
                    sibling.output.prompt_logprobs = seq.output.prompt_logprobs
                    sibling.num_scored = len(seq.prompt)
                    siblings[-1][1].append(sibling)
        except BaseException:
            for sibling in [sibling for _, others in siblings for sibling in others]:
                sibling.table.release()
            raise
        return siblings

    # --- reading tokens back

    def _collect(self, leave: int = 0) -> None:
        """Wait for the tokens of the steps in flight but for the last `leave`, and end the sequences that are done."""
        while len(self._in_flight) > leave:
            with self._ranks.together():
                found = self._in_flight[0].read()
            self._receive(self._in_flight.popleft(), found)

    def _receive(self, step: LaunchedStep, found: Found) -> None:
        now = time.perf_counter()
        self._budget.learn(step.work, now)
        ended, failed = [], None
        for seq, entries in found.scored:
            seq.output.prompt_logprobs += entries
        for seq, proposal, drawn in zip(step.sequences, step.proposals, found.drawn, strict=True):
            if seq.finished:
                continue
            num_right = next((i for i, guess in enumerate(proposal) if guess != drawn[i][0]), len(proposal))
            for token, entry in drawn[: num_right + 1]:
                try:
                    event = seq.output.receive(token, now, entry)
                except BaseException as error:  # SystemExit, say: raised below
                    event, failed = seq.output.finish("error"), failed or error
                self._tell(seq, event)
                if event.result is not None:
                    break
            if len(proposal):
                self._keep(seq, len(proposal), num_right)
            if event.result is not None:
                seq.finished = True
                ended.append((seq, seq.table, event.result.finish_reason != "error"))
                self._running.remove(seq)
                self._free_seats += seq.seats
        try:
            for seq, table, is_sound in ended:
                if is_sound:
                    self.strategy.sharing.publish(seq.tokens[:-1], table, seq.request.salt)  # the last was never fed
        finally:
            for seq, table, _ in ended:
                table.release()
                seq.table = None
            if ended:
                self._promise()
        if failed is not None:
            raise failed

    def _keep(self, seq: ActiveSequence, num_guessed: int, num_right: int) -> None:
        """Of a row that was fed guesses, keep what was computed of the tokens that it has now, but for the newest."""
        self.num_proposed += num_guessed
        self.num_accepted += num_right
        num_new = len(seq.output.token_ids) - seq.num_issued + 1
        seq.table.truncate(seq.table.num_tokens - num_guessed - 1 + num_new)  # nothing before them was let go
        self._last_token[seq.seat] = seq.output.token_ids[-1]
        seq.num_issued, seq.proposal = len(seq.output.token_ids), NO_TOKENS

    def _checked(self, requests: Sequence[Request | Sequence[int]]) -> list[Request]:
        eos = self.model.generation_config.eos_token_id
        stops = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return [Request.of(request, index, stops, self._find_tokenizer) for index, request in enumerate(requests)]

    def _find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self._tokenizer is None and self.model.name_or_path:
            with suppress(OSError):  # random weights have a name, and no folder
                self._tokenizer = load_tokenizer(self.model.name_or_path)
        return self._tokenizer

    def _unfinished(self) -> Iterator[ActiveSequence]:
        yield from self._running
        yield from self._waiting

    # --- refusing what can never run

    def _check(self, requests: Sequence[Request], has_box: bool = False) -> None:
        active = {seq.request.request_id for seq in self._unfinished()}
        if has_box:  # a number in a list means something to the call alone that finds its events there
            active -= {request.request_id for request in requests if request.is_numbered}
        vocab_size = self.model.config.vocab_size
        max_context = longest_row(self.model.config)
        for request in requests:
            name = f"request {request.request_id!r}"
            if request.request_id in active:
                raise ValueError(f"{name}: this request id is in use already")
            active.add(request.request_id)
            num_prompt, num_new = len(request.token_ids), request.max_new_tokens
            if num_prompt == 0:
                raise ValueError(f"{name}: the prompt is empty")
            low, high = request.token_ids.min(), request.token_ids.max()
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"{name}: token id {low if low < 0 else high} is outside the vocabulary (0 to {vocab_size - 1})"
                )
            if request.n > self.max_num_seqs:
                raise ValueError(f"{name}: n must be from 1 to max_num_seqs = {self.max_num_seqs}, got {request.n}")
            total = num_prompt + num_new - 1
            if isinstance(self.strategy, Baseline):
                if request.deadline is not None and self._ranks.size > 1:
                    raise ValueError(f"{name}: the baseline knows a deadline by its own clock, and ranks have several")
                self._refuse(request, "the model's context", max_context, total)
                continue
            visible = self.strategy.retention.num_visible(total)
            self._refuse(request, "the model's context", max_context, visible)
            within_reach = self.strategy.num_within_reach(self)
            self._fit(request, total, within_reach)
            size = self.strategy.block_size
            self._refuse(request, "the pool", self.strategy.max_tokens, request.num_blocks * size)
            if request.num_blocks > within_reach:
                raise ValueError(
                    f"{name}: needs {request.num_blocks} blocks at once, and {max(0, within_reach)} of "
                    f"{self.strategy.pool.num_blocks} could come to be its own{self.strategy.holders(self)}"
                )

    def _fit(self, request: Request, total: int, within_reach: int) -> None:
        """How many blocks a request takes at once, its prompt in smaller chunks where large ones take too many: what a
        window keeps is what all of a chunk sees.
        """
        shares = request.prompt_logprobs is None  # what is cached has no logits
        needs = partial(self.strategy.num_blocks_for, request.token_ids, total, salt=request.salt, shares=shares)
        request.chunk = self.max_batch_tokens
        while (needed := needs(request.chunk)) > within_reach:
            if request.chunk == 1:
                break
            request.chunk //= 2
        request.num_blocks = needed

    def _refuse(self, request: Request, what: str, limit: int, needed: int) -> None:
        """Raises ValueError where a request takes more than `limit` tokens of something."""
        if needed <= limit:
            return
        num_prompt, num_new = len(request.token_ids), request.max_new_tokens
        fits = (
            f"with this prompt at most {limit - num_prompt + 1} new tokens fit"
            if num_prompt <= limit
            else "the prompt alone does not fit"
        )
        raise ValueError(
            f"request {request.request_id!r}: {num_prompt} prompt and {num_new} new tokens exceed {what} of {limit} "
            f"tokens; {fits}"
        )


def _abandon(strategy: Strategy, running: list[ActiveSequence]) -> None:
    """A runner is gone, and what it had not finished with it."""
    strategy.lock.release_tables([seq.table for seq in running])


def _known(asked: Request | str | int) -> str:
    """What ranks compare of what they were asked for."""
    return repr(asked) if not isinstance(asked, Request) else asked.digest()


def _digest(decoding: list[ActiveSequence], prefilling: list[tuple[ActiveSequence, int]]) -> str:
    """What ranks compare of a step: whose turn it is, for how many tokens, behind which."""
    rows = [
        (seq.request.request_id, seq.sample_index, num_new, seq.table.num_seen, seq.output.token_ids[-1:], seq.proposal)
        for seq, num_new in [*((seq, 1 + len(seq.proposal)) for seq in decoding), *prefilling]
    ]
    return f"{len(rows)} rows, {sum(row[2] for row in rows)} tokens, {hash_of(rows)}"


def _urgency(seq: ActiveSequence) -> int:
    """The lower, the sooner it starts; the higher, the sooner it is preempted."""
    return -seq.request.priority


def _last_rows(logits: Tensor, launched: Sequence[ActiveSequence], counts: Sequence[int]) -> Tensor:
    """The logits to draw from: of each sequence that has computed all its tokens, the last row and those of guesses."""
    rows = []
    for seq, end in zip(launched, accumulate(counts), strict=True):
        if seq.is_decoding:
            rows += range(end - 1 - len(seq.proposal), end)
    if len(rows) in (0, len(logits)):
        return logits[: len(rows)]
    return logits[to_device(rows, logits.device)]


class _Draw(NamedTuple):
    """A token to draw: for which sample, from which row of the logits, as which of its tokens, into which seat."""

    seq: ActiveSequence
    sample_index: int
    row: int
    step: int
    seat: int

    @property
    def params(self) -> SamplingParams:
        return self.seq.request.sampling(self.sample_index)

    def shaping(self, vocab_size: int) -> Shaping | None:
        seq, others = self.seq, self.sample_index - self.seq.sample_index
        processors = seq.other_processors[others - 1] if others else seq.processors
        return seq.request.shaping(self.step, processors, lambda: seq.tokens, vocab_size)
