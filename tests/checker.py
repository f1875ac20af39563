"""A model checker: random operations, and a failure at any call inside them, beside a plain model of what must hold.

A *world* is one strategy with a small pool, its runners, streams, kept `generate()` caches, a saved file, and what a
plain-Python model knows of them: which requests are under way and which tokens they must give, which prompts are
pinned, which tokens were ever asked for under which salt. After every operation the books must balance; every token
must be the one that the request gives when nothing disturbs it.

    world = seed -> sizes and options;      operation i = f(seed, i, state)

Operation i draws from a random generator of its own, so any subset of the operations can be run again: that is how a
failure is made small. `tests/soak.py` runs, replays and shrinks worlds.

On a GPU (`MODEL.to("cuda")`) runners replay CUDA graphs and launch steps ahead, and copies have lanes of their own; a
world then is the same twice but for when copies arrive.

Time is part of the seed: the disk writes when the world says so, a fetch pays when the world says so, and deadlines
pass when it says so.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import signal
import tempfile
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from common import OUTSIDE, VOCAB, can_be_built, tiny_llama
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor

from kv_strategies import STRATEGIES, Request, Runner, build, offload
from kv_strategies import baseline as baseline_module
from kv_strategies import prefix as prefix_module
from kv_strategies import runner as runner_module
from kv_strategies.compaction import Compaction
from kv_strategies.paged import BlockPool, BlockTable, OutOfBlocks
from kv_strategies.speculative import PromptLookup
from kv_strategies.step.plan import PlanBuffer
from kv_strategies.step.requests import Result
from kv_strategies.step.sampling import _gumbel, _mix
from kv_strategies.step.upstream import with_cache
from kv_strategies.strategy import Strategy
from kv_strategies.tiers import disk as disk_module
from kv_strategies.tiers import host as host_module
from kv_strategies.tiers import saved, shared
from kv_strategies.tiers.rates import Rates

MODEL = tiny_llama(num_heads=2, num_kv_heads=1)  # two layers: K and V of the second depend on all tokens before
MAX_NEW = 12
SALTS = ["", "a", "b"]
WINDOW = {"window": 7, "sinks": 2, "rebase_at": 28}
EVICT = {"score": "tova", "keep": 0.6, "every": 4}

# --- what is driven

_PARTS = [name for name, preset in STRATEGIES.items() if not preset.alone]
#: Every sum that can be built, from the registry.
SUMS = [
    "+".join(parts)
    for count in range(1, len(_PARTS) + 1)
    for parts in combinations(_PARTS, count)
    if can_be_built(parts)
    and len(set(parts) & set(OUTSIDE)) < 2
    and (len(parts) == 1 or "paged" not in parts)  # every other implies it
]
#: What `make test` drives: every question answered, alone and beside each other.
CHOSEN = [
    "paged",
    "prefix",
    "prefix:shared",
    "offload",
    "prefix+offload",
    "prefix+offload:tiers",
    "prefix+offload:disk",
    "offload:tiers",
    "window",
    "prefix+window",
    "prefix+int8",
    "evict",
    "prefix+evict",
    "offload+evict:tiers",
    "prefix+evict+int8",
    "prefix+window+int8",
    "prefix+window+offload+int8:disk",
    "contiguous",
]
#: What a soak drives: each sum; those with a lower tier as well with host memory and with a disk for idle blocks, those
#: that share as well with a folder that outlives the process.
ALL = ["contiguous", *SUMS, *(f"{name}:{tier}" for name in SUMS if "offload" in name for tier in ("tiers", "disk"))]
ALL += [f"{name}:shared" for name in SUMS if "prefix" in name]


class Fault(RuntimeError):
    """As if a device were out of memory."""


class Interrupt(KeyboardInterrupt):
    """As if somebody had pressed Ctrl-C."""


FAULTS = (Fault, Interrupt)


class Broken(AssertionError):
    """Something that must hold does not."""


class Faults:
    """Raises at one call of one of the operations inside, when armed."""

    #: Raised when the work is done as well: what a device has been told cannot be untold.
    AFTER = frozenset({"attend", "compact", "copy_blocks", "write_blocks", "read_blocks", "sample", "fill"})

    def __init__(self, strategy: Strategy):
        sharing, placement = type(strategy.sharing), type(strategy.placement)
        tiers = type(strategy.placement.tiers)
        owners = {
            Strategy: "follow attend reserve retire rebase compact open_table suspend _resume count_hit has_room"
            " truncate _turn_keys",
            BlockTable: "append fork own_blocks",
            Compaction: "_choose watch",
            BlockPool: "allocate_run",
            sharing: "match publish evict" + (" insert pin save load" if hasattr(sharing, "insert") else ""),
            placement: "open read close copy_blocks read_blocks write_blocks layers compact",
            tiers: "demote num_promotable promote",
            Runner: "_schedule _propose _admit _draw _score_prompts _forward _fork _preempt _launch",
            PlanBuffer: "fill",
            runner_module: "sample forward shape logprobs",
            saved: "write",
        }
        if getattr(strategy.sharing, "_folder", None):
            owners[shared.Folder] = "read lacking write"
        if hasattr(strategy.placement.tiers, "_crossing"):
            owners |= {
                host_module._Crossing: "up down",
                disk_module.Disk: "write read find",
                disk_module: "_write _checksum",
            }
        self.points = [(owner, name) for owner, names in owners.items() for name in names.split()]
        self.fired: Counter[str] = Counter()
        self.armed: str | None = None
        self.is_fired = False  # since `watch`
        self._patches = [mock.patch.object(owner, name, self._wrap(owner, name)) for owner, name in self.points]

    def _wrap(self, owner: object, name: str) -> Callable:
        method, point = getattr(owner, name), f"{owner.__name__.rpartition('.')[2]}.{name}"

        def call(*args, **options):
            if self.armed != point:
                return method(*args, **options)
            self._left -= 1
            if self._left:
                return method(*args, **options)
            self.armed = None
            self.is_fired = True
            self.fired[point] += 1
            if not self._is_after:
                self._raise(point)
            found = method(*args, **options)
            if self._is_after:
                self._raise(point)
            return found  # an interrupt has been noted

        self.names = [*getattr(self, "names", []), point]
        return call

    def _raise(self, point: str) -> None:
        if self._kind is Interrupt:
            signal.raise_signal(signal.SIGINT)
        else:
            raise self._kind(point)

    def _interrupt(self, signum, frame) -> None:
        raise Interrupt

    def arm(self, rng: random.Random) -> str:
        self.armed = rng.choice(self.names)
        self._left = 1 + int(rng.expovariate(0.4))
        self._is_after = self.armed.rpartition(".")[2] in self.AFTER and rng.random() < 0.5
        in_thread = self.armed.startswith("disk.")  # which no Ctrl-C reaches
        self._kind = rng.choice((Fault, Fault, Fault if in_thread else Interrupt))
        return f"armed {self.armed} call {self._left}{' after' * self._is_after} {self._kind.__name__}"

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        armed, self.armed = self.armed, None
        try:
            yield
        finally:
            self.armed = armed

    def __enter__(self) -> Faults:
        for patch in self._patches:
            patch.start()
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        for patch in self._patches:
            patch.stop()


# --- what a request gives when nothing disturbs it


class Letters:
    """A tokenizer: a letter a token."""

    def decode(self, ids, **options) -> str:
        return "".join(chr(ord("0") + int(token)) for token in ids)


class Shape(NamedTuple):
    """What changes the logits of a request."""

    stop: int | None = None  # a token that may not come before
    min_new: int = 0  # others
    penalty: float = 0.0  # for tokens that were there before; 0 for none

    @property
    def options(self) -> dict:
        return {
            "stop_token_ids": () if self.stop is None else (self.stop,),
            "min_new_tokens": self.min_new,
            "logits_processor": RepetitionPenaltyLogitsProcessor(self.penalty) if self.penalty else (),
        }


PLAIN = Shape()
NUM_LOGPROBS = 3


class Answer(NamedTuple):
    """What a sample gives: MAX_NEW tokens, or fewer up to its stop token, and log probabilities."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float] | None]


def _allowances(lossy: set[str]) -> tuple[float, float]:
    """How near the likeliest two logits may come for a token to count, and how far log probabilities may be off.

    Where another order of addition turns a number to the next code, they are off by a code: with K and V of this small
    model scaled by 1 + 1e-6 at random, in 150 prompts by at most 0.02 at 8 bits, 0.05 at 4, and 0.3 where evict then
    keeps another token.
    """
    if lossy & {"k8v4", "int4", "raw4"}:
        return 0.1, 0.6 if "evict" in lossy else 0.2
    return (2e-2, 4e-2) if lossy & {"int8", "fp8"} else (1e-3, 2e-3)


class Oracle:
    """Tokens of a request alone: through the native cache, or through the lossy parts of a strategy alone.

    A prompt whose next token is nearly a tie gives None: rounding may decide it otherwise.
    """

    _all: dict[tuple[str, int], Oracle] = {}  # noqa: RUF012

    def __init__(self, name: str, block_size: int):
        lossy = [part for part in name.split("+") if STRATEGIES[part].lossy is True]
        self.strategy = build("+".join(lossy) or "baseline", MODEL, **self._options(lossy, block_size))
        self.is_native = not lossy
        self.margin, self.tolerance = _allowances(set(lossy))
        # Without graphs, which would draw the likeliest tokens themselves.
        self._runner = Runner(
            MODEL, self.strategy, **({} if self.is_native else {"max_num_seqs": 4, "cuda_graphs": False})
        )
        self._known: dict[tuple, list[Answer] | None] = {}
        self._beams: dict[tuple, list[int]] = {}
        self._states: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of(cls, name: str, block_size: int) -> Oracle:
        lossy = "+".join(part for part in name.split("+") if STRATEGIES[part].lossy is True) or "paged"
        if "every4" not in lossy:
            block_size = 4  # what it keeps are blocks; for all others their size is no matter
        if (lossy, block_size) not in cls._all:
            cls._all[lossy, block_size] = cls(lossy, block_size)
        return cls._all[lossy, block_size]

    @staticmethod
    def _options(lossy: list[str], block_size: int) -> dict:
        options = {"num_blocks": 64, "block_size": block_size} if lossy else {}
        return options | (options_of("+".join(lossy)) if lossy else {})

    def answers(
        self, prompt: tuple[int, ...], temperature: float = 0.0, seed: int = 0, shape: Shape = PLAIN
    ) -> list[Answer] | None:
        """What each of three samples gives."""
        key = prompt, temperature, seed, shape
        if key not in self._known:
            self._known[key] = self._run(*key)
        return self._known[key]

    def _run(self, prompt, temperature, seed, shape):
        module = baseline_module if self.is_native else runner_module
        margins, draw = [], module.sample

        def sample(logits, params, steps):
            scores = logits.float()
            if temperature:
                keys = [_mix(_mix(p.seed) ^ step) for p, step in zip(params, steps, strict=True)]
                keys = torch.tensor(keys, device=scores.device)
                scores = scores / temperature + _gumbel(keys, scores.shape[-1])
            best = scores.topk(2, dim=-1).values
            margins.append(float((best[:, 0] - best[:, 1]).min()))
            return draw(logits, params, steps)

        asks = {"logprobs": NUM_LOGPROBS, "prompt_logprobs": NUM_LOGPROBS}
        request = Request(prompt, MAX_NEW, temperature, seed=seed, n=3 if temperature else 1, **asks, **shape.options)
        with mock.patch.object(module, "sample", sample):
            results = self._runner.generate([request])
        if min(margins) < self.margin:
            return None
        found = [Answer(result.token_ids, result.logprobs, result.prompt_logprobs) for result in results]
        return found * (1 if temperature else 3)

    def beams(self, prompt: tuple[int, ...], num_new: int) -> list[int]:
        key = prompt, num_new
        if key not in self._beams:
            self._beams[key] = _generate([list(prompt)], self.strategy.cache(), num_new, num_beams=3)[0]
        return self._beams[key]

    def states(self, path: tuple[int, ...], size: int) -> torch.Tensor:
        """K, then V, of the last `size` tokens of a path: what its block holds, [2 * L * Hkv * size * D] float32."""
        if (path, size) not in self._states:
            cache = DynamicCache(config=MODEL.config)
            with torch.inference_mode():
                MODEL(torch.tensor([path], device=MODEL.device), **with_cache(cache), use_cache=True)
            k = torch.stack([layer.keys[0, :, -size:] for layer in cache.layers])
            v = torch.stack([layer.values[0, :, -size:] for layer in cache.layers])
            self._states[path, size] = torch.cat([k.flatten(), v.flatten()]).cpu()
        return self._states[path, size]


def options_of(name: str) -> dict:
    parts = name.split("+")
    options = dict(WINDOW) if "window" in parts else {}
    if any(STRATEGIES[part].answers == "codec" for part in parts):
        options.pop(
            "rebase_at", None
        )  # keys that are turned are rounded again: when, depends on what was computed when
    if "evict" in parts:
        options |= EVICT
    return options | ({"recent": 6} if "every4" in parts else {})


def _generate(rows: list[list[int]], cache, num_new: int, **options) -> list[list[int]]:
    """The new tokens of each row; shorter ones are padded on the left."""
    ids, mask = _padded(rows)
    out = MODEL.generate(
        ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, **options, **with_cache(cache)
    )
    return out[:, ids.shape[1] :].tolist()


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=MODEL.device), torch.tensor(mask, device=MODEL.device)


class Corpus:
    """Prompts that start alike, a few dozen of them, so that the oracle has seen most."""

    def __init__(self, number: int):
        rng = random.Random(number)

        def some(n):
            return tuple(rng.randrange(1, VOCAB) for _ in range(n))

        stems = [some(18) for _ in range(3)]
        self.prompts = [
            stem[: rng.randint(1, 18)] + some(rng.choice([0, 1, 2, 5])) for stem in stems for _ in range(12)
        ]
        self.prompts += [some(n) for n in (1, 2, 3, 4, 9)]
        self.extras = [some(n) for n in (1, 2, 4)]


# --- time


class LateWriter:
    """Stands in for the thread of a disk: writes when asked for the result, or when the world lets time pass."""

    def __init__(self):
        self._waiting: deque[tuple[Future, Callable, tuple]] = deque()

    def submit(self, work: Callable, *args) -> Future:
        future = Future()
        late, wait = self, future.result

        def result(timeout=None):
            while not future.done():
                late.run(1)
            return wait()

        future.result = result
        self._waiting.append((future, work, args))
        return future

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self._waiting))):
            future, work, args = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)


class Clock:
    """Stands in for the module `time`: stands still until the world goes on."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


# --- a request under way


@dataclass
class Asked:
    """A request, the tokens that each of its samples must give and why it then ends, and those that came."""

    request: Request
    answers: list[Answer]
    expected: list[list[int]]
    reasons: list[str]
    found: list[list[int]] = field(default_factory=list)
    ended: set[int] = field(default_factory=set)
    deadline: float = float("inf")  # of the clock, once it is submitted
    is_cancelled: bool = False

    def __post_init__(self):
        self.found = [[] for _ in self.expected]

    @property
    def is_done(self) -> bool:
        return len(self.ended) == len(self.expected)


@dataclass
class Kept:
    """A cache that outlives its call, and the rows of tokens that it has seen (the last ones perhaps not)."""

    cache: object
    rows: list[list[int]]
    failed: bool = False


class World:
    """One strategy and everything that goes on with it."""

    def __init__(self, case: str, seed: int):
        self.case, self.seed = case, seed
        self.name, _, self.tier = case.partition(":")
        self.parts = self.name.split("+")
        rng = random.Random(f"{case}/{seed}")
        self.corpus = Corpus(seed // 50)
        self.can_share = "prefix" in self.parts
        # What a kept cache was compacted at is another turn's end than that of the oracle.
        self.can_keep = STRATEGIES[self.parts[0]].alone is False and "evict" not in self.parts
        self.block_size, self.num_blocks = rng.choice([2, 3, 4]), rng.randint(10, 40)
        self.oracle = Oracle.of(self.name, self.block_size)
        self.seats, self.chunk = rng.randint(3, 6), rng.choice([7, 11, 24])
        self.resident = rng.choice(["k", "none", "kv"] if self.tier in ("tiers", "disk") else ["k", "none"])
        self.num_host, self.num_disk = rng.randint(1, 12), rng.randint(1, 24)
        self.is_fused = rng.random() < 0.7
        # What a forward over several tokens of a row rounds otherwise is another code, or decides between equal scores.
        self.guesses = rng.random() < 0.3 and not self._is_rounded and "evict" not in self.parts
        self.time, self.clock = random.Random(f"{case}/{seed}/time"), Clock()
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "saved"
        self.on_file: dict[str, set] | None = None
        #: By salt, the starts that a request may find, and those that were ever there, of models before as well.
        self.seen: dict[str, set[tuple[int, ...]]] = {salt: set() for salt in SALTS}
        self.ever: dict[str, set[tuple[int, ...]]] = {salt: set() for salt in SALTS}
        self.counts: Counter[str] = Counter()
        self.log: list[str] = []
        self._ids = iter(range(10**9))
        self._begin()

    # --- the strategy

    def _begin(self) -> None:
        if self.name == "contiguous":
            sizes = {"num_blocks": max(3, self.num_blocks // 8), "max_length": 44}
        else:
            sizes = {"num_blocks": self.num_blocks, "block_size": self.block_size}
        options = sizes | options_of(self.name)
        if "offload" in self.parts:
            options["resident"] = self.resident
            if self.tier in ("tiers", "disk"):
                options |= self._tiers(options)
        if self.tier == "shared":
            options |= {"shared_path": Path(self.folder.name) / "shared", "shared_bytes": self.num_disk << 12}
        self.strategy = build(self.name, MODEL, **options)
        self.strategy.fused = self.is_fused
        self.num_blocks, self.block_size = self.strategy.pool.num_blocks, self.strategy.block_size
        self.runners: list[Runner] = [self._runner()]
        self.asked: dict[object, Asked] = {}
        self.owners: dict[object, Runner] = {}
        self.streams: list[tuple[Iterator, list[Asked]]] = []
        self.kept: list[Kept] = []
        self.pinned: Counter[tuple[tuple[int, ...], str]] = Counter()
        self._forget(for_ever=True)
        self.finished: list[tuple[tuple[int, ...], str]] = []
        self._prompt_tokens = 0
        writes = getattr(self.strategy.placement.tiers, "_disk", getattr(self.strategy.sharing, "_folder", None))
        self.writer = None
        if writes is not None:
            self.writer = writes._writer = LateWriter()

    def _forget(self, *, for_ever: bool = False) -> None:
        """What was asked for is nobody's any more, or nowhere, unless a folder has it."""
        if self.tier == "shared":
            return
        self.seen = {salt: set() for salt in SALTS}
        if for_ever:
            self.ever = {salt: set() for salt in SALTS}

    def _tiers(self, options: dict) -> dict:
        probe = build(self.name, MODEL, **options, host_bytes=1 << 24).placement
        one = probe.tiers.block_bytes
        found = {"host_bytes": sum(home.host_bytes for home in probe._devices) + self.num_host * one}
        if self.tier == "disk":
            found |= {"disk_path": self.folder.name, "disk_bytes": self.num_disk * one}
        return found

    def _runner(self) -> Runner:
        proposer = PromptLookup(num_tokens=3, max_ngram=2) if self.guesses else None
        sizes = {"max_num_seqs": self.seats, "max_batch_tokens": self.chunk}
        return Runner(MODEL, self.strategy, **sizes, tokenizer=Letters(), speculate=proposer)

    def close(self) -> None:
        self.streams.clear()
        self.kept.clear()
        self.runners.clear()
        self.folder.cleanup()

    # --- running

    def run(self, num_ops: int, only: set[int] | None = None) -> None:
        """Operations 0 .. num_ops - 1, or some of them, and then all that is under way to its end.

        Raises:
            Broken: says what does not hold.
        """
        self.faults = Faults(self.strategy)

        def pays(rates, num_bytes, num_tokens, *, on_disk):
            return self.time.choice([1e-3, 1e-3, 1e-3, -1e-3])

        operations, weights = zip(*self.OPERATIONS.items(), strict=True)
        with contextlib.ExitStack() as stack:
            for patch in (
                self.faults,
                self._counting(),
                warnings.catch_warnings(),
                mock.patch.object(Rates, "seconds_saved", pays),
                mock.patch.object(runner_module, "time", self.clock),
            ):
                stack.enter_context(patch)
            warnings.simplefilter("ignore")
            for index in range(num_ops):
                if only is not None and index not in only:
                    continue
                rng = random.Random(f"{self.case}/{self.seed}/{index}")
                if rng.random() < (0.3 if self.faults.armed is None else 0.1):  # what is armed may never be called
                    self.log.append(self.faults.arm(rng))
                if self.writer and rng.random() < 0.5:
                    self.writer.run(rng.randint(1, 4))
                self._operate(index, rng.choices(operations, weights)[0], rng)
            self.faults.armed = None
            self._operate(num_ops, "drain", random.Random(0))

    def _counting(self):
        launch = Runner._launch

        def counted(runner, *args):
            found = launch(runner, *args)
            self.counts["steps"] += found and runner in self.runners  # the oracle has one as well
            return found

        return mock.patch.object(Runner, "_launch", counted)

    def _operate(self, index: int, name: str, rng: random.Random) -> None:
        self.log.append(f"{index}: {name}")
        self.faults.is_fired = False
        try:
            try:
                getattr(self, name)(rng)
            except FAULTS as error:
                if not self.faults.is_fired:
                    raise
                self.log.append(f"   {type(error).__name__} at {error}")
            self.check()
        except Broken:
            raise
        except (Exception, *FAULTS) as error:
            raise Broken(f"{type(error).__name__}: {error}") from error

    # --- what must hold at any time

    def check(self) -> None:
        with self.faults.quiet():
            strategy = self.strategy
            strategy.check_integrity()
            stats = strategy.stats()
            pool = strategy.pool
            held = {int(b) for table in pool.tables for b in table.blocks if b >= 0}
            cached = set(strategy.sharing.held_blocks()) - held
            found = stats["blocks_used"], stats["blocks_free"], stats["blocks_cached"]
            pinned = {(salt, prompt[:end]) for prompt, salt in self.pinned.elements() for end in self._ends(prompt)}
            pinned_blocks = self._pinned_blocks()
            expect(stats["blocks_pinned"], len(pinned), "pinned blocks")
            used = len(held | pinned_blocks)
            expect(found, (used, pool.num_blocks - len(held | cached | pinned_blocks), len(cached - pinned_blocks)),
                   "blocks used, free and cached")  # fmt: skip
            require(stats["hit_tokens"] <= stats["prompt_tokens"], "more tokens were hit than asked for")
            require(stats["tokens_stored"] <= stats["token_places"], "more tokens are stored than there is room for")
            for runner in self.runners:
                urgencies = [-seq.request.priority for seq in runner._waiting]
                require(urgencies == sorted(urgencies), "a request waits behind one of a lower priority")
            waiting = {seq.request.request_id for runner in self.runners for seq in runner._unfinished()}
            for request_id, asked in self.asked.items():
                if not asked.is_done and request_id not in waiting:
                    undelivered = [event.result for box in self._boxes() for event in box]
                    ended = {r.sample_index for r in undelivered if r is not None and r.request_id == request_id}
                    require(len(ended | asked.ended) == len(asked.expected), f"request {request_id} is lost")

    def _boxes(self) -> list[deque]:
        return [box for runner in self.runners for box in (runner._events, *runner._boxes.values())]

    def _pinned_blocks(self) -> set[int]:
        if not self.can_share:
            return set()
        return {node.block for node in self.strategy.sharing._nodes.values() if node.num_pins}

    def _ends(self, tokens) -> range:
        return range(self.block_size, len(tokens) + 1, self.block_size)

    def see(self, tokens, salt: str) -> None:
        """From now on a request with this salt may find these tokens."""
        starts = [tuple(tokens[:end]) for end in self._ends(tokens)]
        self.seen[salt].update(starts)
        self.ever[salt].update(starts)

    def check_contents(self) -> None:
        """What is in the tree is what the native cache computes."""
        if not self.can_share or not (self.oracle.is_native or self.parts == ["prefix", "evict"]):
            return
        with self.faults.quiet():
            for node in self.strategy.sharing._nodes.values():
                lineage = list(prefix_module.lineage(node))[::-1]
                path = tuple(np.frombuffer(b"".join(step.tokens for step in lineage), dtype="<i4").tolist())
                salted = lineage[0].parent.tokens
                salts = [salt for salt in SALTS if self.strategy.sharing._salted(salt) == salted]
                require(len(salts) == 1, "a root is of no salt")
                require(path in self.ever[salts[0]], f"{path} is in the tree of salt {salts[0]!r}, nobody asked for it")
                data = self.strategy.placement.read_blocks([node.block])[0].cpu().view(torch.float32)
                far = float((data - self.oracle.states(path, self.block_size)).abs().max())
                require(far < 1e-3, f"block {node.block} of the tree is off by {far} for {path}")
                self.counts["contents"] += 1

    # --- requests

    def alone(self, *request) -> list[Answer] | None:
        with self.faults.quiet():
            return self.oracle.answers(*request)

    def beams(self, prompt: list[int], num_new: int) -> list[int]:
        with self.faults.quiet():
            return self.oracle.beams(tuple(prompt), num_new)

    def draw(self, rng: random.Random, longest: int | None = None) -> tuple[Asked, int] | None:
        """A request that no near tie decides."""
        if self.finished and rng.random() < 0.25:
            prompt, salt = rng.choice(self.finished)
            prompt = (prompt + rng.choice(self.corpus.extras))[:30]
        else:
            prompt, salt = rng.choice(self.corpus.prompts), rng.choice(SALTS)
        temperature, seed, n = rng.choice([0.0, 0.0, 0.0, 0.8]), rng.choice([1, 2]), rng.choice([1, 1, 1, 2, 3])
        key = prompt, temperature, seed if temperature else 0
        full = self.alone(*key)
        if full is None:
            return None
        max_new, options = rng.randint(1, MAX_NEW), {}
        if rng.random() < 0.1:
            shape = rng.choice([Shape(full[0].token_ids[0], 3), Shape(penalty=1.5)])
            full, options = self.alone(*key, shape), shape.options
            if full is None or max_new < shape.min_new:
                return None
        elif rng.random() < 0.2:
            options["stop_token_ids"] = [rng.choice(full[0].token_ids)]
        if rng.random() < 0.15:
            options["stop"] = self._some_text(prompt, full[0].token_ids, rng)
        options |= {
            "logprobs": rng.choice([None, None, None, 0, NUM_LOGPROBS]),
            "prompt_logprobs": rng.choice([None] * 8 + [1]),
            "priority": rng.choice([0, 0, 0, -1, 2]),
            "deadline": rng.choice([None] * 6 + [rng.uniform(0.5, 4)]),
        }
        options.setdefault("stop_token_ids", ())
        request = Request(
            list(prompt), max_new, temperature, salt, seed=seed, n=n, request_id=next(self._ids), **options
        )
        expected = [self._until_stop(request, full[index].token_ids[:max_new]) for index in range(n)]
        asks = ("stop", "min_new_tokens", "logits_processor", "logprobs", "prompt_logprobs", "priority", "deadline")
        self.counts.update(f"with {name}" for name in asks if getattr(request, name) not in (None, 0, ()))
        return Asked(request, full, *map(list, zip(*expected, strict=True)))

    @staticmethod
    def _some_text(prompt: tuple[int, ...], tokens: list[int], rng: random.Random) -> str:
        """One or two different letters that come, the first perhaps in the prompt."""
        text = Letters().decode([*prompt, *tokens])
        end = rng.randint(len(prompt) + 1, len(text))
        return text[end - 1] if rng.random() < 0.5 or text[end - 2 : end - 1] == text[end - 1] else text[end - 2 : end]

    @staticmethod
    def _until_stop(request: Request, tokens: list[int]) -> tuple[list[int], str]:
        """The tokens up to the first that ends the request, and why it does."""
        for count, token in enumerate(tokens, start=1):
            is_last = token in request.stop_token_ids and count > request.min_new_tokens
            text = Letters().decode([*request.token_ids, *tokens[:count]])
            if is_last or (request.stop and text.endswith(request.stop)):
                return tokens[:count], "stop"
        return tokens, "length"

    def draw_some(self, rng: random.Random, most: int) -> list[Asked]:
        return [found for _ in range(rng.randint(1, most)) if (found := self.draw(rng)) is not None]

    def accept(self, asked: list[Asked], runner: Runner) -> None:
        for one in asked:
            self.asked[one.request.request_id] = one
            self.owners[one.request.request_id] = runner
            one.deadline = self.clock.now + (one.request.deadline or float("inf"))
            for tokens in one.expected:
                self.see([*one.request.token_ids, *tokens], one.request.salt)

    def receive(self, events) -> None:
        for event in events:
            asked = self.asked.get(event.request_id)
            require(asked is not None, f"a token of {event.request_id}, which nobody waits for")
            index = event.sample_index
            require(index not in asked.ended, f"a token of {event.request_id}, which has ended")
            if event.token_id is not None:
                asked.found[index].append(event.token_id)
            count = len(asked.found[index])
            expect(asked.found[index], asked.expected[index][:count], f"tokens of {asked.request}")
            if event.result is None:
                continue
            self.check_result(asked, index, event.result)
            asked.ended.add(index)
            if asked.is_done:
                if event.token_id is not None:
                    whole = (*asked.request.token_ids, *event.result.token_ids)
                    self.finished = [*self.finished, (whole, asked.request.salt)][-20:]
                    self._prompt_tokens += len(asked.request.token_ids)
                del self.asked[event.request_id], self.owners[event.request_id]

    def check_result(self, asked: Asked, index: int, result: Result) -> None:
        request, reason, expected = asked.request, result.finish_reason, asked.expected[index]
        if reason in ("deadline", "cancelled"):
            require(
                len(result.token_ids) < len(expected), f"{request} has ended by its {reason}, and had all its tokens"
            )
            expect(result.token_ids, expected[: len(result.token_ids)], f"tokens of {request} up to its {reason}")
            holds = asked.is_cancelled if reason == "cancelled" else asked.deadline <= self.clock.now
            require(holds, f"{request} has ended by a {reason} that was not")
            self.counts[reason] += 1
        else:
            expect((result.token_ids, reason), (expected, asked.reasons[index]), f"result of {request}")
            self.counts["samples"] += 1
        self.check_hit(request, result)
        answer = asked.answers[index]
        self.check_logprobs(request.logprobs, result.logprobs, answer.logprobs, result.token_ids)
        if result.token_ids:  # else its prompt may not be through
            prompt = request.token_ids[1:]
            expect(result.prompt_logprobs and result.prompt_logprobs[0], None, "log probabilities of the first token")
            found = result.prompt_logprobs and result.prompt_logprobs[1:]
            self.check_logprobs(request.prompt_logprobs, found, answer.prompt_logprobs[1:], prompt)

    def check_logprobs(self, count: int | None, found, wanted, tokens) -> None:
        if count is None:
            expect(found, None, "log probabilities that nobody asked for")
            return
        expect(len(found), len(tokens), "log probabilities, for each token")
        for one, other, token in zip(found, wanted, tokens, strict=False):
            highest = [sorted(entry.values(), reverse=True)[:count] for entry in (one, other)]
            pairs = [(one[token], other[token]), *zip(*highest, strict=True)]
            far = max(abs(ours - theirs) for ours, theirs in pairs)
            require(far < self.oracle.tolerance, f"log probabilities are off by {far}: {one} for {other}")
            require(count <= len(one) <= count + 1 or len(one) == len(other), f"{len(one)} of {count} were asked for")

    def check_hit(self, request: Request, result: Result) -> None:
        num_cached = result.num_cached_tokens
        if not num_cached:
            return
        self.counts["hits"] += 1
        require(self.can_share and num_cached < len(request.token_ids), f"{num_cached} tokens were cached of {request}")
        require(num_cached % self.block_size == 0, "a hit is of full blocks")
        start = tuple(request.token_ids[:num_cached])
        require(start in self.seen[request.salt], f"salt {request.salt!r} found what it never asked for: {start}")

    def others_hold(self, runner: Runner) -> bool:
        return bool(self.strategy.holders(runner))

    def may_refuse(self, asked: list[Asked], runner: Runner) -> bool:
        """Whether blocks may be lacking for one of them."""
        if self.others_hold(runner) or self.pinned:
            return True
        longest = max(len(one.request.token_ids) + one.request.max_new_tokens - 1 for one in asked)
        if any(one.request.n > self.seats for one in asked):
            return True
        copies = longest if {"prefix", "evict"} <= set(self.parts) else 0  # survivors of blocks that the tree holds
        return -(-longest // self.block_size) + -(-copies // self.block_size) > self.num_blocks

    def submit(self, rng: random.Random) -> None:
        runner, asked = rng.choice(self.runners), self.draw_some(rng, 4)
        if not asked:
            return
        before = runner.num_waiting
        try:
            runner.submit([one.request for one in asked])
        except ValueError:
            require(self.may_refuse(asked, runner), "a request that fits was refused")
            expect(runner.num_waiting, before, "waiting requests after a refusal")
            self.counts["refused"] += 1
            return
        except FAULTS:
            expect(runner.num_waiting, before, "waiting requests after a submission that failed")
            raise
        self.accept(asked, runner)

    def step(self, rng: random.Random) -> None:
        runner = rng.choice(self.runners)
        for _ in range(rng.randint(1, 5)):
            try:
                self.receive(runner.step())
            except OutOfBlocks:
                require(self.others_hold(runner), "out of blocks, and nobody else holds any")
                self.counts["starved"] += 1
                return
            late = [seq.request for seq in runner._unfinished() if seq.deadline <= self.clock.now]
            expect(late, [], "requests behind their deadline")

    def wait(self, rng: random.Random) -> None:
        """Time passes."""
        self.clock.now += rng.uniform(0.1, 2)

    # --- streams, nested calls, cancelling

    def stream(self, rng: random.Random) -> None:
        runner, asked = rng.choice(self.runners), self.draw_some(rng, 2)
        if asked and len(self.streams) < 4:
            self.streams.append((runner.stream([one.request for one in asked]), asked))
            self.owners[id(asked)] = runner  # accepted with the first pull

    def pull(self, rng: random.Random) -> None:
        if self.streams:
            self._pull(rng.randrange(len(self.streams)), rng.randint(1, 8))

    def _pull(self, index: int, count: int) -> bool:
        """Whether the stream goes on."""
        stream, asked = self.streams[index]
        if id(asked) in self.owners:
            runner = self.owners.pop(id(asked))
            self.accept(asked, runner)
            may_refuse = self.may_refuse(asked, runner)
        else:
            runner, may_refuse = self.owners.get(asked[0].request.request_id), False
        ids = {one.request.request_id for one in asked}
        try:
            for _ in range(count):
                event = next(stream, None)
                if event is None:
                    require(all(one.is_done for one in asked), "a stream ended before its requests")
                    del self.streams[index]
                    return False
                require(event.request_id in ids, "a stream got what another asked for")
                self.receive([event])
            return True
        except ValueError:
            require(may_refuse, "a request that fits was refused")
        except OutOfBlocks:
            require(runner is None or self.others_hold(runner), "out of blocks, and nobody else holds any")
        except FAULTS:
            self._end(index)
            raise
        self._end(index)
        return False

    def _end(self, index: int) -> None:
        """A stream is over before its requests: they are cancelled."""
        stream, asked = self.streams.pop(index)
        self.owners.pop(id(asked), None)
        stream.close()
        for one in asked:
            self.asked.pop(one.request.request_id, None)
            self.owners.pop(one.request.request_id, None)

    def leave(self, rng: random.Random) -> None:
        if self.streams:
            self._end(rng.randrange(len(self.streams)))

    def generate(self, rng: random.Random) -> None:
        """A whole call of a runner, nested in whatever streams are open."""
        runner, asked = rng.choice(self.runners), self.draw_some(rng, 3)
        if not asked:
            return
        self.accept(asked, runner)
        try:
            results = runner.generate([one.request for one in asked])
            found = {(r.request_id, r.sample_index): r.token_ids for r in results}
            expect(len(results), len(found), "results, each once")
            wanted = {(o.request.request_id, i): t for o in asked for i, t in enumerate(o.expected)}
            expect(found, wanted, "results of generate")
            for one, result in [(o, r) for o in asked for r in results if r.request_id == o.request.request_id]:
                self.check_result(one, result.sample_index, result)
        except ValueError:
            require(self.may_refuse(asked, runner), "a request that fits was refused")
        except OutOfBlocks:
            require(self.others_hold(runner), "out of blocks, and nobody else holds any")
        finally:
            for one in asked:
                del self.asked[one.request.request_id], self.owners[one.request.request_id]

    def cancel(self, rng: random.Random) -> None:
        streamed = {one.request.request_id for _, asked in self.streams for one in asked}
        ids = [request_id for request_id in self.asked if request_id not in streamed]
        if ids:
            request_id = rng.choice(ids)
            self.asked[request_id].is_cancelled = True
            self.owners[request_id].cancel(request_id)

    def preempt(self, rng: random.Random) -> None:
        runner = rng.choice(self.runners)
        if runner._running:
            try:
                with self.strategy.lock:
                    runner._collect()  # a preempted sequence must know its tokens
                    if runner._running:
                        runner._preempt(runner._running[-1])
            finally:
                self.counts["preempted by force"] += 1

    def add_runner(self, rng: random.Random) -> None:
        if len(self.runners) < 2:
            self.runners.append(self._runner())

    def drop_runner(self, rng: random.Random) -> None:
        """With all that it had accepted."""
        if len(self.runners) < 2:
            return
        runner = self.runners.pop(rng.randrange(2))
        for index in reversed(range(len(self.streams))):
            _, asked = self.streams[index]
            if self.owners.get(id(asked), self.owners.get(asked[0].request.request_id)) in (runner, None):
                self._end(index)
        for request_id in [request_id for request_id, owner in self.owners.items() if owner is runner]:
            self.asked.pop(request_id, None)
            del self.owners[request_id]
        self._count_runner(runner)
        del runner
        gc.collect()

    # --- the door for model.generate()

    def call(self, rng: random.Random) -> None:
        """`model.generate()` with one or two prompts, cold or known, greedy or beams; the cache is kept or dropped."""
        num_rows, num_new, salt = rng.choice([1, 1, 2]), rng.randint(1, 6), rng.choice(SALTS)
        rows = [list(rng.choice(self.corpus.prompts)) for _ in range(num_rows)]
        full = [self.alone(tuple(row)) for row in rows]
        if any(answers is None for answers in full):
            return
        is_known, has_beams = rng.random() < 0.6, num_rows == 1 and rng.random() < 0.25 and not self._is_rounded
        keeps = self.can_keep and rng.random() < 0.35 and len(self.kept) < 3 and not has_beams
        for row, answers in zip(rows, full, strict=True):
            self.see(row, salt)
            if not is_known:
                self.see([*row, *answers[0].token_ids], salt)
        wanted = [answers[0].token_ids[:num_new] for answers in full]
        options = {}
        if has_beams:
            wanted, options = [self.beams(rows[0], num_new)], {"num_beams": 3}
        cache = self._cache(rows, salt) if is_known else self.strategy.cache()
        kept = Kept(cache, [row + tokens for row, tokens in zip(rows, wanted, strict=True)])
        try:
            expect(_generate(rows, cache, num_new, **options), wanted, f"generate() of {rows}, {options}")
        except OutOfBlocks:
            self.counts["calls out of blocks"] += 1
            return
        except FAULTS:
            kept.failed = True
            # A single column that is fed again is noticed on a CPU only.
            is_noticed = len(rows[0]) > 1 or MODEL.device.type == "cpu"
            if num_rows == 1 and not has_beams and rng.random() < 0.6 and is_noticed:
                kept.rows = [rows[0][: len(rows[0])]]
                self.kept.append(kept)
            raise
        finally:
            self.counts["calls"] += 1
        if keeps and num_rows == 1:
            self.kept.append(kept)

    @property
    def _is_rounded(self) -> bool:
        return any(STRATEGIES[part].answers == "codec" for part in self.parts)

    def _cache(self, rows: list[list[int]], salt: str):
        return self.strategy.cache(*_padded(rows), salt)

    def go_on(self, rng: random.Random) -> None:
        """Another turn with a kept cache, a copy of it, or what is left of it after a crop."""
        if not self.kept:
            return
        kept = rng.choice(self.kept)
        cache, tokens = kept.cache, kept.rows[0]
        if kept.failed:  # the same call again, as a user would
            self._again(kept, rng)
            return
        if rng.random() < 0.3 and len(self.kept) < 4:
            kept = Kept(copy.deepcopy(cache), kept.rows)
            self.kept.append(kept)
            cache = kept.cache
        if rng.random() < 0.4:
            columns = cache.get_seq_length()
            keep = rng.randint(1, columns)
            if keep < columns:
                try:
                    cache.crop(keep - columns)
                    tokens = tokens[:keep]
                except ValueError:
                    require("window" in self.name or "every4" in self.name, "a crop was refused")
                expect(cache.get_seq_length(), min(columns, len(tokens)), "columns after a crop") if keep == len(
                    tokens
                ) else None
        tokens = tokens + list(rng.choice(self.corpus.extras))
        full = self.alone(tuple(tokens))
        if full is None or len(tokens) > 40:
            self.kept.remove(kept)
            return
        num_new = rng.randint(1, 5)
        kept.rows, kept.failed = [tokens], True
        try:
            found = _generate([tokens], cache, num_new)
        except OutOfBlocks:
            self.kept.remove(kept)
            return
        expect(found, [full[0].token_ids[:num_new]], f"another turn of {tokens}")
        kept.rows, kept.failed = [tokens + found[0]], False
        self.counts["turns"] += 1

    def _again(self, kept: Kept, rng: random.Random) -> None:
        tokens, num_new = kept.rows[0], rng.randint(1, 5)
        full = self.alone(tuple(tokens))
        self.kept.remove(kept)
        if full is None:
            return
        try:
            found = _generate([tokens], kept.cache, num_new)
        except (ValueError, OutOfBlocks) as error:
            self.counts["retries refused"] += 1
            require(isinstance(error, OutOfBlocks) or "give it a new one" in str(error), f"a retry: {error}")
            return
        expect(found, [full[0].token_ids[:num_new]], f"generate() again after a fault, of {tokens}")
        self.counts["retries"] += 1

    def drop(self, rng: random.Random) -> None:
        if self.kept:
            del self.kept[rng.randrange(len(self.kept))]

    # --- what is kept for later requests

    def evict(self, rng: random.Random) -> None:
        count = rng.randint(1, 12)
        with self.strategy.lock:
            evictable = self.strategy.sharing.num_evictable()
            found = self.strategy.sharing.evict(count)  # with a block goes what hangs on it, which may be idle as well
            require(min(count, evictable) <= found <= evictable, f"{found} evicted for {count} of {evictable}")

    def preload(self, rng: random.Random) -> None:
        prompt, salt = rng.choice(self.corpus.prompts), rng.choice(SALTS)
        prompt = prompt[: len(prompt) // self.block_size * self.block_size]
        if self.pinned and rng.random() < 0.3:
            prompt, salt = rng.choice(sorted(self.pinned))  # twice
        if not self.can_share or not prompt or (len(self.pinned) >= 2 and (prompt, salt) not in self.pinned):
            return
        if len(prompt) > self.block_size * self.num_blocks // 4:
            return
        self.see(prompt, salt)
        try:
            expect(self.strategy.preload(list(prompt), salt), len(prompt), "preloaded tokens")
        except OutOfBlocks:
            return
        self.pinned[prompt, salt] += 1
        self.counts["preloads"] += 1

    def forget(self, rng: random.Random) -> None:
        if self.pinned:
            prompt, salt = rng.choice(sorted(self.pinned))
            self.strategy.forget(list(prompt), salt)
            self.pinned -= Counter([(prompt, salt)])

    def touch(self, rng: random.Random) -> None:
        """An optimizer's step, as far as anybody can see: what was cached is nobody's any more. No number changes."""
        with torch.no_grad():
            rng.choice(list(MODEL.parameters())).add_(0)
        with self.faults.quiet(), self.strategy.lock:
            self.strategy.follow()
        self.pinned.clear()
        self._forget()
        for asked in self.asked.values():
            for tokens in asked.expected:
                self.see([*asked.request.token_ids, *tokens], asked.request.salt)
        self.counts["models"] += 1

    def save(self, rng: random.Random) -> None:
        if not self.can_share:
            return
        self.check_contents()
        seen = {salt: set(paths) for salt, paths in self.seen.items()}
        before = self.file.read_bytes() if self.file.exists() else None
        try:
            count = self.strategy.save(self.file)
        except FAULTS:
            expect(self.file.read_bytes() if self.file.exists() else None, before, "a file after a save that failed")
            raise
        expect(count, len(list(self.strategy.sharing._current())), "saved blocks")
        self.on_file = seen
        self.counts["saves"] += 1

    def load(self, rng: random.Random) -> None:
        if self.on_file is None or not self.can_share:
            return
        for salt, paths in self.on_file.items():
            self.seen[salt] |= paths
            self.ever[salt] |= paths
        if rng.random() < 0.3:
            data = bytearray(self.file.read_bytes())
            if rng.random() < 0.5:
                del data[rng.randrange(len(data)) :]
            else:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path = self.file.with_name("damaged")
            path.write_bytes(data)
            with contextlib.suppress(ValueError):
                self.strategy.load(path)
        else:
            loaded = self.strategy.load(self.file)
            expect(
                (loaded.num_damaged, loaded.num_unreachable), (0, 0), "damaged and unreachable blocks of a sound file"
            )
            self.counts["blocks loaded"] += loaded.num_blocks
        self.check_contents()

    # --- the end

    def reset(self, rng: random.Random) -> None:
        self._collect()
        in_use = sum(table.num_tokens > 0 for table in self.strategy.pool.tables)
        if rng.random() < 0.5 and in_use:
            try:
                self.strategy.reset()
            except RuntimeError as error:
                require("in use" in str(error), f"a refused reset: {error}")
                return
            raise Broken("a reset in spite of tables in use")
        self.drain(rng)
        self.strategy.reset()
        self._forget(for_ever=True)
        self.pinned.clear()
        self._prompt_tokens = 0
        expect(self.strategy.stats()["blocks_free"], self.num_blocks, "free blocks after a reset")

    def restart(self, rng: random.Random) -> None:
        """The process ends and another begins; the file is there."""
        self.drain(rng)
        self._count()
        self.runners.clear()
        del self.strategy
        self._begin()

    def drain(self, rng: random.Random) -> None:
        """All that was accepted comes to its end, and leaves nothing behind."""
        self.kept.clear()
        self._collect()
        idle = 0
        while any(runner.num_running or runner.num_waiting for runner in self.runners) or self.streams:
            before = sum(len(tokens) for one in self.asked.values() for tokens in one.found)
            for runner in self.runners:
                if runner.num_running or runner.num_waiting:
                    try:
                        self.receive(runner.step())
                    except OutOfBlocks:
                        require(self.others_hold(runner), "out of blocks, and nobody else holds any")
                    except FAULTS:
                        if not self.faults.is_fired:
                            raise
            for index in reversed(range(len(self.streams))):
                try:
                    self._pull(index, 2)
                except FAULTS:
                    if not self.faults.is_fired:
                        raise
            after = sum(len(tokens) for one in self.asked.values() for tokens in one.found)
            idle = idle + 1 if after == before else 0
            require(idle < 200, "nothing comes to an end")
        for runner in self.runners:
            self.receive(runner.step())
            expect((len(runner._boxes), len(runner._events), len(runner._free_seats)), (0, 0, self.seats),
                   "boxes, events and free seats of an idle runner")  # fmt: skip
        expect(list(self.asked), [], "requests that gave no result")
        self._collect()
        with self.faults.quiet():
            stats = self.strategy.stats()
            expect(stats["blocks_used"], len(self._pinned_blocks()), "blocks in use by nobody")
            require(self._prompt_tokens <= stats["prompt_tokens"], "prompt tokens that were not counted")
        self.check_contents()
        self.counts["drains"] += 1

    def _collect(self) -> None:
        gc.collect()

    def _count(self) -> None:
        for runner in self.runners:
            self._count_runner(runner)
        stats = self.strategy.stats()
        self.counts["evictions"] += stats["evictions"]
        self.counts["promotions"] += stats.get("tier_blocks_promoted", 0)
        self.counts["fetches refused"] += stats.get("tier_fetches_refused", 0)
        self.counts["blocks of a folder"] += stats.get("shared_blocks_read", 0)

    def _count_runner(self, runner: Runner) -> None:
        self.counts["preemptions"] += runner.num_preemptions
        self.counts["guessed"] += runner.num_proposed
        self.counts["guessed rightly"] += runner.num_accepted

    def total(self) -> Counter[str]:
        self._count()
        self.counts["faults"] = self.faults.fired.total()
        return self.counts

    OPERATIONS = {  # noqa: RUF012
        "submit": 14,
        "step": 30,
        "wait": 6,
        "stream": 4,
        "pull": 10,
        "leave": 1,
        "generate": 4,
        "cancel": 2,
        "preempt": 4,
        "add_runner": 0.5,
        "drop_runner": 0.5,
        "call": 5,
        "go_on": 4,
        "drop": 2,
        "evict": 3,
        "preload": 2,
        "forget": 1,
        "save": 1,
        "load": 1.5,
        "touch": 0.5,
        "reset": 0.5,
        "restart": 0.5,
        "drain": 0.7,
    }


def require(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


def expect(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise Broken(f"{what}: {found} for {wanted}")


# --- worlds


@dataclass
class Failure:
    """A world in which something does not hold: which, what, and the operations that it takes."""

    case: str
    seed: int
    what: str
    log: list[str]
    num_ops: int
    only: list[int] | None = None

    def __str__(self) -> str:
        ops = "" if self.only is None else f" OPS={','.join(map(str, self.only))}"
        log = "\n  ".join(self.log[-40:])
        return f"{self.what}\n  {log}\n\nreplay: make soak ONLY={self.case} SEED={self.seed}{ops}"


NUM_OPS = 120


def run_world(case: str, seed: int, only: list[int] | None = None, num_ops: int = NUM_OPS) -> Counter[str] | Failure:
    """Run one world. Returns what it did, or how it failed."""
    in_place = mock.patch.object(offload, "computes_on_host", lambda device: device.type == "cpu" and seed % 2 == 0)
    in_place.start()
    world = World(case, seed)
    try:
        world.run(num_ops, None if only is None else set(only))
        return world.total()
    except Broken as error:
        cause = error.__cause__
        if cause is not None:
            world.log += traceback.format_exception(cause)[-6:]
        return Failure(case, seed, str(error), world.log, num_ops, only)
    finally:
        world.close()
        in_place.stop()


def shrink(failure: Failure, patience: int = 200) -> Failure:
    """The same failure of fewer operations: halves, quarters, .. single ones are left out where it stays."""
    only = failure.only or list(range(failure.num_ops))
    size = len(only) // 2
    while size and patience:
        begin = 0
        while begin < len(only) and patience:
            fewer = only[:begin] + only[begin + size :]
            patience -= 1
            found = run_world(failure.case, failure.seed, fewer, failure.num_ops)
            if isinstance(found, Failure):
                failure, only = found, fewer
            else:
                begin += size
        size //= 2
    return failure
