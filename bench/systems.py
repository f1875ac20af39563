"""What is compared: every strategy of this project, and the native caches as its peers.

One interface: `generate(prompts, new_tokens)` runs all prompts greedily, as one batch, and says when every token came.

| name                    | what runs                                                                     |
|-------------------------|-------------------------------------------------------------------------------|
| baseline                | `model.generate()` with the native DynamicCache, the batch left-padded        |
| static                  | the same with the native StaticCache; compiled by `generate()` on a GPU       |
| offloaded               | the same with the native cache that keeps all layers but one on the host      |
| quantized               | the same with the native 4-bit cache, by optimum-quanto                       |
| generate_batch          | the native continuous batching, its pool as large as ours                     |
| <strategy>              | this project's `Runner`                                                       |
| <strategy>, generate()  | `model.generate(cache=strategy.cache())`                                      |
| tensorflow, <way>       | `peers/tensorflow_llama.py`, a prompt at a time (suite `tensorflow` alone)    |
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch

from bench.measure import kv_bytes_per_token

DOOR = ", generate()"  # marks a strategy that is run through plain `model.generate()`
NATIVE_CACHES = {"baseline": None, "static": "static", "offloaded": "offloaded", "quantized": "quantized"}
PEERS = ["static", "offloaded", "quantized", "generate_batch"]
NATIVE = ["baseline", *PEERS]
TENSORFLOW = [f"tensorflow, {way}" for way in ("eager", "variable", "two graphs", "while loop", "xla")]
BLOCK_SIZE = 16
CHUNK = 2048  # tokens that a runner prefills at a time

# Which systems a workload runs; a new entry in `STRATEGIES` is among EVERY by itself.
EVERY, EVERY_GENERATE, PAGED_GENERATE = "every strategy", "every strategy" + DOOR, "paged" + DOOR
EVERYTHING = ["baseline", EVERY, PAGED_GENERATE, *PEERS]


@dataclass
class Run:
    """What came out of one batch. Row r is prompt r; times are seconds since the batch was handed over."""

    token_ids: list[list[int]]
    times: list[list[float]]
    seconds: float
    cached_tokens: list[int] | None = None  # prompt tokens found computed already; None where nothing says so

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


def known_systems() -> list[str]:
    """All names, the baseline first. A new entry in `STRATEGIES` is here by itself."""
    from kv_strategies import STRATEGIES

    own = [name for name in STRATEGIES if name != "baseline"]
    return ["baseline", *own, *[name + DOOR for name in own if name != "contiguous"], *PEERS]


def expand(names: Iterable[str]) -> list[str]:
    """The names with EVERY and EVERY_GENERATE spelt out, each once."""
    own = [name for name in known_systems() if name not in NATIVE]
    groups = {
        EVERY: [name for name in own if not name.endswith(DOOR)],
        EVERY_GENERATE: [name for name in own if name.endswith(DOOR)],
    }
    return list(dict.fromkeys(system for name in names for system in groups.get(name, [name])))


def in_order(names: Collection[str]) -> list[str]:
    """Each of these once, as EVERYTHING has them; behind those the others as they come."""
    return list(dict.fromkeys([*filter(set(names).__contains__, expand(EVERYTHING)), *names]))


def missing(name: str, device: str) -> str | None:
    """Why a system cannot run on this machine, or None."""
    on_gpu = device.startswith("cuda")
    if "fp8" in name.removesuffix(DOOR).split("+") and on_gpu and torch.cuda.get_device_capability(device) < (8, 9):
        return "needs a GPU that has fp8 (compute capability 8.9 or higher), or a CPU"
    if name == "offloaded" and not on_gpu:
        return "needs a GPU to offload from"
    if name == "quantized" and not importlib.util.find_spec("optimum"):
        return "optimum-quanto is not installed"
    if name == "quantized" and not shutil.which(compiler := "nvcc" if on_gpu else os.environ.get("CXX", "c++")):
        return f"optimum-quanto compiles its kernels on first use, and there is no {compiler}"
    if name in TENSORFLOW and on_gpu:
        return "is measured on a CPU (--device cpu)"
    if name in TENSORFLOW and not importlib.util.find_spec("tensorflow"):
        return "tensorflow is not installed: pip install --constraint constraints.txt --editable '.[tensorflow]'"
    return None


class Capacity:
    """How large the batches of a case get, so that every system sets aside what it needs and no more."""

    def __init__(self, batches: Sequence[Sequence[int]]) -> None:
        """`batches[i]` are the lengths (prompt and new tokens) of the requests that run at the same time."""
        self.batches = [list(batch) for batch in batches]
        self.max_requests = max(map(len, self.batches))
        self.max_length = max(map(max, self.batches))
        self.max_tokens = max(map(sum, self.batches))

    def blocks(self, block_size: int) -> int:
        return max(sum(-(-length // block_size) for length in batch) for batch in self.batches)


def open_system(name: str, model, capacity: Capacity, **options) -> Callable[..., Run]:
    """Returns `generate(prompts, new_tokens) -> Run`. Its `warm_up` prepares for the same, untimed, and `filling` says
    afterwards how full the KV store was. `options` go to `Runner`."""
    if name in NATIVE_CACHES:
        return Native(model, NATIVE_CACHES[name])
    if name == "generate_batch":
        return NativeBatch(model, capacity)
    if name.endswith(DOOR):
        strategy = build_strategy(name.removesuffix(DOOR), model, capacity)
        return Native(model, None, strategy)
    return Ours(model, build_strategy(name, model, capacity), capacity, **options)


def build_strategy(name: str, model, capacity: Capacity, num_blocks: int | None = None):
    from kv_strategies import STRATEGIES, build

    preset = STRATEGIES.get(name.split("+")[0])  # `build` says what is wrong with a name that is not known
    if preset and "max_length" in preset.options:  # one block a request
        return build(name, model, num_blocks=num_blocks or capacity.max_requests, max_length=capacity.max_length)
    return build(name, model, num_blocks=num_blocks or capacity.blocks(BLOCK_SIZE), block_size=BLOCK_SIZE)


def ours(model, name: str, capacity: Capacity, *, num_blocks: int | None = None, **options) -> Ours:
    """A strategy with these options, with room for `capacity` or of `num_blocks`, behind a runner."""
    from kv_strategies import build

    num_blocks = num_blocks or capacity.blocks(BLOCK_SIZE)
    return Ours(model, build(name, model, num_blocks=num_blocks, block_size=BLOCK_SIZE, **options), capacity)


class Native:
    """`model.generate()` over one batch, left-padded where prompts differ in length."""

    def __init__(self, model, cache: str | None, strategy=None) -> None:
        self.model, self.cache, self.strategy = model, cache, strategy

    def __call__(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        from kv_strategies.step.upstream import cache_of, with_cache

        device, columns = self.model.device, max(map(len, prompts))
        ids = torch.zeros(len(prompts), columns, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, columns - len(prompt) :] = torch.tensor(prompt)
            mask[row, columns - len(prompt) :] = 1
        options: dict[str, object] = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        if self.strategy is not None:
            options |= with_cache(self.strategy.cache())
        elif self.cache == "quantized":
            options |= {"cache_implementation": self.cache, "cache_config": {"backend": "quanto", "nbits": 4}}
        elif self.cache is not None:
            options["cache_implementation"] = self.cache
        watch = Stopwatch()
        start = time.perf_counter()
        out = self.model.generate(
            ids.to(device), attention_mask=mask.to(device), streamer=watch, return_dict_in_generate=True, **options
        )
        tokens = out.sequences[:, columns:].tolist()
        seconds = time.perf_counter() - start
        times = [moment - start for moment in watch.moments]
        # At its end a native cache is fullest: [B, Hkv, columns, D] a layer, the padding included.
        self.filling = self._fill(cache_of(out), sum(map(len, prompts)) + (new_tokens - 1) * len(prompts))
        return Run(tokens, [times] * len(prompts), seconds)

    def warm_up(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """A few steps of the batch: nothing of a native step depends on those before it. But a static cache is as long
        as the call says, and what is compiled for one length does not serve another.
        """
        self(prompts, new_tokens if self.cache == "static" else min(new_tokens, 4))

    def _fill(self, cache, num_tokens: int) -> dict | None:
        if self.strategy is not None:
            return filling(self.strategy.stats())
        names = ("keys", "values", "_quantized_keys", "_quantized_values")
        found = [[getattr(layer, name, None) for name in names] for layer in getattr(cache, "layers", [])]
        found = [[t for t in layer if torch.is_tensor(t) and t.dim() == 4] for layer in found]
        if not all(found) or not found:
            return None
        places = sum(t.shape[0] * t.shape[2] for t in found[0]) // 2  # of K and of V
        num_bytes = sum(stored_bytes(t) for layer in found for t in layer)
        return {"bytes": num_bytes, "tokens": num_tokens, "places": places}


class Stopwatch:
    """A streamer for `generate()`: it is handed the prompt first, then the new tokens of every step."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._seen_prompt = False

    def put(self, value) -> None:
        if self._seen_prompt:
            self.moments.append(time.perf_counter())
        self._seen_prompt = True

    def end(self) -> None:
        pass


class NativeBatch:
    """`model.generate_batch()`. Blocks are not shared between calls here, so that repeats measure the same work."""

    PAGE = 256

    def __init__(self, model, capacity: Capacity) -> None:
        self.model, self._num_blocks = model, capacity.blocks(self.PAGE) + 1

    def __call__(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        start = time.perf_counter()
        out = self.model.generate_batch(
            [list(prompt) for prompt in prompts],
            **self._configs(new_tokens),
            record_timestamps=True,
            progress_bar=False,
        )
        seconds = time.perf_counter() - start
        rows = [out[key] for key in sorted(out, key=lambda key: int(key.rsplit("_", 1)[1]))]
        if failed := [row.error for row in rows if row.error]:
            raise RuntimeError(f"generate_batch failed {len(failed)} of {len(prompts)} requests: {failed[0]}")
        times = [[moment - start for moment in row.timestamps] for row in rows]
        return Run([list(row.generated_tokens) for row in rows], times, seconds)

    @contextmanager
    def manager(self) -> Iterator:
        """What takes requests one by one, each with its own number of new tokens. It ends with what it was given."""
        manager = self.model.init_continuous_batching(**self._configs(1))
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(block=True)

    def _configs(self, new_tokens: int) -> dict[str, object]:
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        # eos_token_id=-1: no token ends a request, every system makes the same number of tokens
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(
            page_size=self.PAGE,
            num_blocks=self._num_blocks,
            max_batch_tokens=2048,
            allow_block_sharing=False,
        )
        return {"generation_config": config, "continuous_batching_config": batching}

    @property
    def filling(self) -> dict:
        """Its pool is as large as it was asked for; how much of it is in use it does not show."""
        num_bytes = self._num_blocks * self.PAGE * kv_bytes_per_token(self.model)
        return {"bytes": num_bytes, "tokens": None, "places": self._num_blocks * self.PAGE}

    def warm_up(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """See `Native.warm_up`."""
        self(prompts, min(new_tokens, 4))


class Ours:
    """This project's `Runner`, which is not warmed up unless `options` say so: a case runs what it measures before."""

    def __init__(self, model, strategy, capacity: Capacity, *, warm_up: bool = False, **options) -> None:
        from kv_strategies import Runner

        self.strategy = strategy
        self.runner = Runner(model, strategy, max_num_seqs=capacity.max_requests, warm_up=warm_up, **options)

    def __call__(self, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int]) -> Run:
        """`new_tokens` of each prompt, or its own number for every one."""
        requests = self._requests(prompts, new_tokens)
        start = time.perf_counter()
        results = self.runner.generate(requests)
        seconds = time.perf_counter() - start
        times = [list(accumulate([result.timings.ttft, *result.timings.itl])) for result in results]
        cached = [result.num_cached_tokens for result in results]
        return Run([list(result.token_ids) for result in results], times, seconds, cached)

    def warm_up(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        """The whole batch, so that its graphs are captured; the pool is looked at after every token."""
        self.filling = filling(self.strategy.stats())
        for _ in self.stream(prompts, new_tokens):
            now = filling(self.strategy.stats())
            if (now["places"], now["tokens"]) > (self.filling["places"], self.filling["tokens"]):
                self.filling = now

    def stream(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Iterator:
        """The runner's events, one a token, for who looks at the strategy meanwhile."""
        return self.runner.stream(self._requests(prompts, new_tokens))

    def most_blocks(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> int:
        """The most blocks that are referenced at once while the prompts run."""
        most = 0
        for index, _ in enumerate(self.stream(prompts, new_tokens)):
            if index % len(prompts) == 0:  # once a step
                most = max(most, self.strategy.stats()["blocks_used"])
        return most

    def _requests(self, prompts: Sequence[Sequence[int]], new_tokens: int | Sequence[int]) -> list:
        from kv_strategies import Request

        counts = [new_tokens] * len(prompts) if isinstance(new_tokens, int) else new_tokens
        return [Request(list(prompt), max_new_tokens=count) for prompt, count in zip(prompts, counts, strict=True)]


def bytes_per_token(system, model) -> float:
    """Bytes of K and V one token takes, as the system stores them."""
    strategy = getattr(system, "strategy", None)
    return strategy.stats()["bytes_per_token"] if strategy else kv_bytes_per_token(model)


def bytes_read(system, model, prompt: int, new: int = 0) -> float:
    """Bytes of K and V that a decode step reads of a row, so many tokens behind its prompt, as the system stores them;
    all of V where `offload` fetches a part.
    """
    strategy, seen = getattr(system, "strategy", None), prompt + new
    if strategy:
        seen = strategy.retention.num_visible(min(prompt, strategy.selection.cap(prompt)) + new)
    return seen * bytes_per_token(system, model)


def stored_bytes(tensor) -> int:
    """Of all that a tensor is made of: the native quantized cache keeps codes, scales and shifts in one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def bytes_per_block(strategy) -> int:
    return round(strategy.stats()["bytes_per_token"] * strategy.block_size)


def filling(stats: dict) -> dict:
    """Of a strategy's `stats()`: bytes set aside for K and V, tokens stored, and the places their blocks have."""
    return {"bytes": stats["kv_bytes"], "tokens": stats["tokens_stored"], "places": stats["token_places"]}


@contextmanager
def filled(strategy) -> Iterator[None]:
    """Every prompt counts as computed but for its last token: its K and V are random numbers.

    A decode step takes as long whatever they are, and 260,000 tokens need not be computed to time it.
    """
    from kv_strategies.paged import BlockTable

    for planes in strategy.placement.planes():
        for plane in planes.values():
            if plane.dtype.itemsize == 1:
                plane.view(torch.int8).random_(0, 64)  # some negative codes of float8 are NaN
            else:
                plane.normal_(std=0.1)

    def open_table(token_ids, salt="", suspended=None, num_prompt=None) -> BlockTable:
        table = BlockTable(strategy.pool)
        table.append(len(token_ids) - 1)
        return table

    strategy.open_table = open_table
    try:
        yield
    finally:
        del strategy.open_table
