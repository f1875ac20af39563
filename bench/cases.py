"""What is measured: a case is one system on one workload, run in a process of its own.

| workload    | question                                                                                        |
|-------------|-------------------------------------------------------------------------------------------------|
| machine     | what could this machine do at best? (read and copy bandwidth, the link to the host)             |
| accuracy    | are the tokens those of the native cache, each prompt run alone? else where do they part? Sent  |
|             | a second time, how many prompt tokens need not be computed, and are the new tokens the same?    |
| throughput  | generated tokens over total time for a ragged batch; peak memory; how full the KV store is      |
| context     | time to first token and time a decode step against context length, beyond 4k                    |
| batch       | time a decode step against batch size                                                           |
| sharing     | four samples of one prompt: how many blocks? (native: are prompts sent twice computed twice?)   |
| pressure    | a pool too small for all requests at once: do all finish, and with the same tokens?             |
| busy        | the share of a decode step in which the GPU works (GPU only)                                    |
| cost        | what lossy settings cost in perplexity, logits and facts found: see `cost.py`                   |
| prefix ...  | what each strategy is for, against what it replaces: see `strategies.py`                        |
| decode ...  | how near the limits of the card the batching and each step are: see `limit.py`                  |

Accuracy and speed are separate cases. Every function here takes a `Bench` and returns a small dict for the JSON line.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from bench import cost, limit, measure, strategies
from bench.probes import limits as probes
from bench.systems import DOOR, NATIVE_CACHES, PEERS, Capacity, Native, build_strategy, known_systems, open_system

RAGGED_SEED = 7


@dataclass(frozen=True)
class Case:
    workload: str
    system: str
    model: str | None  # as `load_model` takes it; None is the embedded default
    dtype: str
    device: str
    params: dict = field(default_factory=dict)
    timeout: int = 240  # seconds

    @property
    def name(self) -> str:
        if self.workload == "machine":
            return "machine / limits"
        return " / ".join([self.workload, self.system, model_name(self.model), self.dtype])

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def model_name(spec: str | None) -> str:
    """A model's name without its path."""
    return Path(spec).name if spec else "SmolLM2-135M-Instruct"


def is_random(spec: str | None) -> bool:
    return model_name(spec).endswith("-random")


class Bench:
    """What a workload needs: the model, prompts, a word to the user, and a folder shared by the cases of one run."""

    def __init__(self, case: Case, scratch: Path, say: Callable[[str], None] = print) -> None:
        self.case, self.params, self.scratch, self.say = case, case.params, scratch, say
        self.memory = measure.PeakMemory(case.device)

    @cached_property
    def loaded(self) -> tuple:
        from kv_strategies.models import load_model

        self.say("loading the model")
        model, tokenizer = load_model(self.case.model, dtype=getattr(torch, self.case.dtype), device=self.case.device)
        model.generation_config.eos_token_id = None  # every system makes the number of tokens asked for
        return model, tokenizer

    @property
    def model(self):
        return self.loaded[0]

    def prompts(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Natural text where the model has a tokenizer, else random token ids. Another seed, other prompts."""
        from kv_strategies.models.text import prompts

        model, tokenizer = self.loaded
        return prompts(tokenizer, lengths, seed=seed, vocab_size=model.config.vocab_size)

    def open(self, capacity: Capacity):
        return open_system(self.case.system, self.model, capacity)

    def allocated(self) -> int:
        """Bytes that torch holds on the GPU now; 0 on a CPU."""
        self.model  # noqa: B018  the weights are not part of what comes after
        return torch.cuda.memory_allocated(self.case.device) if self.case.device.startswith("cuda") else 0

    def free(self) -> None:
        gc.collect()
        if self.case.device.startswith("cuda"):
            torch.cuda.empty_cache()


def run_machine(bench: Bench) -> dict:
    bench.say("measuring memory bandwidth")
    return {"limits": probes.limits(bench.case.device, bench.params.get("size"))}


def run_accuracy(bench: Bench) -> dict:
    """Greedy tokens of all prompts as one ragged batch, against the native DynamicCache with each prompt alone."""
    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    prompts = bench.prompts(lengths, seed=RAGGED_SEED)
    expected = _reference(bench, prompts, new_tokens)
    bench.say(f"{len(prompts)} prompts")
    system = bench.open(Capacity([[n + new_tokens for n in lengths]]))
    run = system(prompts, new_tokens)
    found = {"prompts": len(prompts), "identical": _num_same(run.token_ids, expected)}
    found["divergence"] = _divergence(bench, prompts, expected, run)
    if run.cached_tokens is not None:  # a second time: what is found computed already must not change a token
        bench.say("the same prompts again")
        again = system(prompts, new_tokens)
        found["identical_again"] = _num_same(again.token_ids, run.token_ids)
        found["hit_rate"] = sum(again.cached_tokens) / sum(lengths)
    return found


def _num_same(token_ids: list[list[int]], expected: list[list[int]]) -> int:
    return sum(got == want for got, want in zip(token_ids, expected, strict=True))


def _reference(bench: Bench, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Tokens of the native cache, one prompt at a time. The first case of a bench run makes them, the others read."""
    case = bench.case
    key = json.dumps([case.model, case.dtype, case.device, prompts, new_tokens])
    path = bench.scratch / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())
    native, expected = Native(bench.model, None), []
    for index, prompt in enumerate(prompts):
        bench.say(f"reference, prompt {index + 1} of {len(prompts)}")
        expected += native([prompt], new_tokens).token_ids
    path.write_text(json.dumps(expected))
    return expected


def _divergence(bench: Bench, prompts: list, expected: list, run) -> dict | None:
    """Where the first prompt that differs parts from the reference, and by how much the logits of the two tokens
    differ there (of a plain forward over the tokens both agree on)."""
    for index, (prompt, want, got) in enumerate(zip(prompts, expected, run.token_ids, strict=True)):
        if want == got:
            continue
        token = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
        found = {"prompt": index, "prompt_length": len(prompt), "token": token, "margin": None}
        if token < min(len(want), len(got)):
            ids = torch.tensor([list(prompt) + want[:token]], device=bench.model.device)
            with torch.inference_mode():
                logits = bench.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            found["margin"] = float(logits[want[token]] - logits[got[token]])
        return found
    return None


def run_throughput(bench: Bench) -> dict:
    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    capacity = Capacity([[n + new_tokens for n in lengths]])
    before = bench.allocated()
    system = bench.open(capacity)
    allocated = bench.allocated() - before  # what a native cache takes comes and goes with each call
    bench.say("warming up")
    system.warm_up(bench.prompts(lengths, seed=RAGGED_SEED), new_tokens)
    bench.free()
    bench.memory.start()
    times, count = [], 0
    for repeat in range(bench.params["repeats"]):
        bench.say(f"repeat {repeat + 1} of {bench.params['repeats']}")
        run = system(bench.prompts(lengths, seed=RAGGED_SEED + 1 + repeat), new_tokens)
        times.append(run.seconds)
        count = run.num_tokens
    return {
        "requests": len(lengths),
        "prompt_tokens": sum(lengths),
        "generated_tokens": count,
        "seconds": measure.spread(times),
        "tokens_per_second": measure.spread([count / seconds for seconds in times]),
        "peak": bench.memory.read(),
        "kv": system.filling,
        "kv_allocated": allocated,
        **_model_bytes(bench),
    }


def run_latency(bench: Bench) -> dict:
    """Points of (batch, context): every row has the same context, and steps count while all rows decode."""
    new_tokens = bench.params["new_tokens"]
    points = [tuple(point) for point in bench.params["points"]]
    chunks = [batch * context // 2048 for batch, context in points]  # rows that wait for the prefill of others
    news = [new_tokens + n for n in chunks]
    capacity = Capacity([[context + new] * batch for (batch, context), new in zip(points, news, strict=True)])
    system = bench.open(capacity)
    system(bench.prompts([16], seed=1), 4)
    rows = []
    for (batch, context), new in zip(points, news, strict=True):
        bench.say(f"batch {batch}, context {context}")
        try:
            rows.append(_latency_point(bench, system, batch, context, new))
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "context": context, "error": "out of memory"})
        bench.free()
    return {"points": rows, **_model_bytes(bench)}


def _latency_point(bench: Bench, system, batch: int, context: int, new_tokens: int) -> dict:
    first = None
    if bench.params.get("warm_points"):  # compilation and graph capture belong to the first run of a shape
        first = system(bench.prompts([context] * batch, seed=batch), new_tokens).times[0][0]
    bench.free()
    bench.memory.start()
    ttfts, steps = [], []
    for repeat in range(bench.params.get("repeats", 1)):
        run = system(bench.prompts([context] * batch, seed=100 + repeat), new_tokens)
        ttfts.append(max(row[0] for row in run.times))
        steps += measure.steady_steps(run.times)
    bytes_per_token = _bytes_per_token(system, bench.model)
    read = measure.weight_bytes(bench.model) + batch * (context + new_tokens // 2) * bytes_per_token
    return {
        "batch": batch,
        "context": context,
        "first_ttft": first,
        "ttft": measure.spread(ttfts),
        "step": measure.spread(steps) if steps else None,
        "step_bytes": int(read),
        "peak": bench.memory.read(),
        "tokens": run.token_ids[0][:8],
    }


def _bytes_per_token(system, model) -> float:
    strategy = getattr(system, "strategy", None)
    return strategy.stats()["bytes_per_token"] if strategy else measure.kv_bytes_per_token(model)


def _model_bytes(bench: Bench) -> dict:
    return {
        "parameter_bytes": sum(p.numel() * p.element_size() for p in bench.model.parameters()),
        "kv_bytes_per_token": measure.kv_bytes_per_token(bench.model),
    }


def run_sharing(bench: Bench) -> dict:
    """Blocks in use by samples of one prompt. For a native cache, the share of prompt tokens that a second call with
    the same prompts does not compute: its model's forward is watched, since the cache does not say."""
    lengths = bench.params["lengths"]
    prompts = bench.prompts(lengths, seed=RAGGED_SEED)
    if bench.case.system in NATIVE_CACHES:
        system = bench.open(Capacity([[n + 1 for n in lengths]]))
        computed = []
        hook = bench.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: computed.append((args or list(kwargs.values()))[0].numel()), with_kwargs=True
        )
        for prompt in prompts * 2:
            system([prompt], 1)
        hook.remove()
        return {"hit_rate": 1 - sum(computed[len(prompts) :]) / sum(lengths)}
    new_tokens, samples, longest = bench.params["new_tokens"], bench.params["samples"], max(prompts, key=len)
    system = bench.open(Capacity([[len(longest) + new_tokens] * samples]))
    bench.say("one sample")
    apart = _blocks_used(system, longest, 1, new_tokens) * samples
    system.strategy.reset()
    bench.say(f"{samples} samples")
    together = _blocks_used(system, longest, samples, new_tokens)
    return {"samples": samples, "blocks_together": together, "blocks_apart": apart}


def _blocks_used(system, prompt: list[int], samples: int, new_tokens: int) -> int:
    """The most blocks in use at a time while `samples` continuations of one prompt are drawn."""
    from kv_strategies import Request

    request = Request(prompt, max_new_tokens=new_tokens, n=samples, temperature=1.0, seed=0)
    return max(system.strategy.stats()["blocks_used"] for _ in system.runner.stream([request]))


def run_pressure(bench: Bench) -> dict:
    """Room for the prompts and little more: requests must wait or be preempted, and none may be lost."""
    from kv_strategies import Request, Runner

    lengths, new_tokens = bench.params["lengths"], bench.params["new_tokens"]
    prompts = bench.prompts(lengths, seed=RAGGED_SEED)
    roomy = Capacity([[n + new_tokens for n in lengths]])
    expected = bench.open(roomy)(prompts, new_tokens).token_ids
    bench.free()
    bench.say("the same with too few blocks")
    needed = build_strategy(bench.case.system, bench.model, roomy).pool.num_blocks
    tight = Capacity([[n + 1 for n in lengths]]).blocks(16) + 1
    num_blocks = min(tight, needed - 1) if needed > len(lengths) else max(1, needed // 2)
    strategy = build_strategy(bench.case.system, bench.model, roomy, num_blocks=num_blocks)
    runner = Runner(bench.model, strategy, max_num_seqs=len(lengths))
    results = runner.generate([Request(prompt, max_new_tokens=new_tokens) for prompt in prompts])
    strategy.check_integrity()
    return {
        "requests": len(prompts),
        "finished": sum(len(result.token_ids) == new_tokens for result in results),
        "identical": _num_same([list(result.token_ids) for result in results], expected),
        "blocks_needed": needed,
        "blocks_given": num_blocks,
        "preemptions": runner.num_preemptions,
    }


def run_busy(bench: Bench) -> dict:
    """The union of all GPU work over the second half of a batch, where rows only decode, as the profiler saw it."""
    from torch.profiler import ProfilerActivity, profile

    batch, context, new_tokens = bench.params["batch"], bench.params["context"], bench.params["new_tokens"]
    new_tokens += batch * context // 2048
    system = bench.open(Capacity([[context + new_tokens] * batch]))
    system(bench.prompts([context] * batch, seed=1), new_tokens)
    bench.say("profiling")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        system(bench.prompts([context] * batch, seed=2), new_tokens)
    work = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    middle = (work[0][0] + work[-1][1]) / 2
    return {"batch": batch, "context": context, **_union(work, middle), "kernels": _heaviest(work, middle)}


def _union(work: list[tuple[float, float, str]], begin: float) -> dict:
    busy, reached = 0.0, begin
    for start, end, _ in work:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"busy_share": busy / (reached - begin)}


def _heaviest(work: list[tuple[float, float, str]], begin: float, count: int = 8) -> list:
    """[name, share of the GPU's time] of the kernels that took most."""
    totals: dict[str, float] = {}
    for start, end, name in work:
        if start >= begin:
            totals[name] = totals.get(name, 0.0) + end - start
    ranked = sorted(totals.items(), key=lambda item: -item[1])[:count]
    return [[name[:60], round(spent / sum(totals.values()), 4)] for name, spent in ranked]


WORKLOADS: dict[str, Callable[[Bench], dict]] = {
    "machine": run_machine,
    "accuracy": run_accuracy,
    "throughput": run_throughput,
    "context": run_latency,
    "batch": run_latency,
    "sharing": run_sharing,
    "pressure": run_pressure,
    "busy": run_busy,
    "cost": cost.run_cost,
    "prefix": strategies.run_prefix,
    "fan-out": strategies.run_fan_out,
    "window": strategies.run_window,
    "stream": strategies.run_stream,
    "offload": strategies.run_offload,
    "8 bits": strategies.run_8_bits,
    "attention": limit.run_attention,
    "decode": limit.run_decode,
    "first token": limit.run_first_token,
    "batching": limit.run_batching,
    "profile": limit.run_profile,
}


# --- suites: which cases run


def suite(name: str, device: str, model: str | None, *, full: bool = False) -> list[Case]:
    """The cases of a suite, in order. `model` replaces the default models of the suite; `full` measures costs on a CPU
    with the texts and settings of a GPU.

    default     every question on the embedded model; on a GPU the speed of the Llama-2-7B shape as well
    equality    tokens of 64 ragged prompts, 128 new each, in float32 and on a GPU in bfloat16
    limit       decode, prefill and batching held against the limits of the machine
    strategies  what each strategy is for, against what it must reach
    cost        perplexity, logits and retrieval of every lossy setting, on the embedded model
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}; known are {', '.join(SUITES)}")
    limits = Case("machine", "limits", model, "float32", device)
    if full and name == "cost" and not device.startswith("cuda"):
        return [limits, *_cost_in_full(device, model)]
    return [limits, *SUITES[name](device, model)]


def _default(device: str, model: str | None) -> list[Case]:
    if not device.startswith("cuda"):
        return _on_cpu(device, model, "float32")
    cases = []
    if not is_random(model):
        params = {"lengths": ragged(24, 1, 2000), "new_tokens": 48}
        cases += _each("accuracy", [*ALL, OURS_GENERATE], model, "float32", device, params, timeout=400)
        cases += _each("accuracy", ["baseline", OURS], model, "bfloat16", device, params, timeout=400)
        cases += _sharing_and_pressure(device, model, "float32", OURS)
    for spec in [model] if model else [None, "llama-2-7b-random"]:
        cases += _speed_on_gpu(device, spec, "bfloat16")
    return cases


def _on_cpu(device: str, model: str | None, dtype: str) -> list[Case]:
    """Small enough for 8 minutes on two cores with a model of 135M parameters: a case costs 5 s before it begins, so
    what only shows the mechanism is asked of the plain block pool alone."""
    cases = []
    if not is_random(model):
        cases += _each("accuracy", ALL, model, dtype, device, {"lengths": [1, 17, 63, 300], "new_tokens": 16})
    params = {"lengths": ragged(8, 16, 320), "new_tokens": 24, "repeats": 2}
    cases += _each("throughput", ALL, model, dtype, device, params)
    params = {"points": [[1, 256], [1, 4200]], "new_tokens": 12}
    cases += _each("context", ["baseline", OURS, PAGED_GENERATE], model, dtype, device, params)
    params = {"points": [[1, 128], [4, 128], [16, 128]], "new_tokens": 12}
    cases += _each("batch", ["baseline", "contiguous", "paged"], model, dtype, device, params)
    return cases + _sharing_and_pressure(device, model, dtype, "paged")


def _speed_on_gpu(device: str, model: str | None, dtype: str) -> list[Case]:
    params = {"lengths": ragged(64, 100, 1024), "new_tokens": 256}
    cases = _each("throughput", [OURS, PAGED_GENERATE], model, dtype, device, params | {"repeats": 3}, timeout=500)
    cases += _each("throughput", ["baseline", *PEERS], model, dtype, device, params | {"repeats": 1}, timeout=500)
    contexts = [512, 4096, 16384] if is_random(model) else [512, 2048, 4608]
    params = {"points": [[1, n] for n in contexts], "new_tokens": 48, "repeats": 2, "warm_points": True}
    cases += _each("context", ALONE, model, dtype, device, params, timeout=500)
    if not is_random(model):
        return cases
    params = {"points": [[1, 1024], [8, 1024], [16, 1024], [32, 1024]], "new_tokens": 48, "warm_points": True}
    cases += _each("batch", ["baseline", "static", OURS], model, dtype, device, params, timeout=500)
    params = {"batch": 16, "context": 512, "new_tokens": 64}
    return cases + _each("busy", ["baseline", "static", OURS, PAGED_GENERATE], model, dtype, device, params)


def _sharing_and_pressure(device: str, model: str | None, dtype: str, systems: str) -> list[Case]:
    params = {"lengths": [64, 200], "new_tokens": 8, "samples": 4}
    cases = _each("sharing", ["baseline", systems], model, dtype, device, params)
    params = {"lengths": [33, 34, 35, 36, 37, 38], "new_tokens": 24}
    return cases + _each("pressure", [systems], model, dtype, device, params)


def _equality(device: str, model: str | None) -> list[Case]:
    params = {"lengths": ragged(64, 1, 3000), "new_tokens": 128}
    cases = _each(
        "accuracy", ["baseline", OURS, "prefix+offload", PAGED_GENERATE], model, "float32", device, params, 3600
    )
    if device.startswith("cuda"):  # equality is a float32 statement: in bfloat16, where they part and by how much
        params = params | {"lengths": ragged(16, 1, 3000)}
        cases += _each("accuracy", ["baseline", OURS, PAGED_GENERATE], model, "bfloat16", device, params, 3600)
    return cases


def _limit(device: str, model: str | None) -> list[Case]:
    """The Llama shapes on a GPU, most of it in one process a question; the embedded model on a CPU."""
    if not device.startswith("cuda"):
        return _limit_on_cpu(device, model)

    def case(workload: str, system: str, params: dict, spec: str = model or "llama-2-7b-random") -> Case:
        return Case(workload, system, spec, "bfloat16", device, params, 300)

    steps = {"new_tokens": 48, "native_tokens": 12}
    batches = [
        {
            "systems": ["paged", "generate_batch"],
            "lengths": ragged(64, 100, 1024),
            "new_tokens": 256,
            "repeats": {"paged": 5},
            "chunk": 8192,  # nobody waits for a next token while prompts are computed
        },
        {
            "systems": ["paged"],
            "lengths": ragged(256, 100, 1024),
            "new_tokens": ragged(256, 100, 1024)[::-1],
            "repeats": {},
            "chunk": 8192,
            "slots": 128,
            "places": 120 * 1024,  # 64 GB: beside the weights, what a card of 80 GB holds
        },
    ]
    points = {model: limit.POINTS["llama-2-7b-random"]} if model else limit.POINTS
    return [
        case("attention", "paged", limit.ATTENTION),
        *[case("decode", "paged", {"points": some} | steps, spec) for spec, some in points.items()],
        case("first token", "paged", limit.FIRST_TOKEN),
        case("profile", "every strategy", {"entries": limit.PROFILED, "context": 4096, "steps": 8}),
        case("batching", "paged", {"batches": batches}),
        case("decode", "static", {"points": [["static", 1, 4096]], "warm_up": True} | steps | {"native_tokens": 24}),
    ]


def _limit_on_cpu(device: str, model: str | None) -> list[Case]:
    """Ours and the native cache in turns."""
    cases = []
    for dtype in ("float32", "bfloat16"):
        points = [[system, 1, context] for context in (128, 1024) for system in ("baseline", "paged")]
        params = {"points": points, "new_tokens": 24, "native_tokens": 24, "repeats": 2}
        cases.append(Case("decode", "paged", model, dtype, device, params))
        batch = {"systems": ["baseline", "paged"], "lengths": ragged(8, 16, 320), "new_tokens": 64, "repeats": {}}
        cases.append(Case("batching", "paged", model, dtype, device, {"batches": [batch], "rounds": 2}, timeout=600))
    return cases


def _strategies(device: str, model: str | None) -> list[Case]:
    """The Llama-2-7B shape on a GPU, the embedded model on a CPU; real text, so the embedded model, for the stream."""
    on_gpu = device.startswith("cuda")
    spec, dtype = (model or "llama-2-7b-random", "bfloat16") if on_gpu else (model, "float32")
    sizes = strategies.ON_GPU if on_gpu else strategies.ON_CPU
    cases = [Case(workload, name, spec, dtype, device, params, 550) for workload, (name, params) in sizes.items()]
    if is_random(model):
        return cases
    params = strategies.STREAM_ON_GPU if on_gpu else strategies.STREAM_ON_CPU
    return [*cases, Case("stream", "window", model, dtype, device, params, 550)]


def _cost(device: str, model: str | None) -> list[Case]:
    """A case for each kind of setting."""
    on_gpu = device.startswith("cuda")
    sizes, kinds = (cost.ON_GPU, cost.SETTINGS_ON_GPU) if on_gpu else (cost.ON_CPU, cost.SETTINGS_ON_CPU)
    return [
        Case("cost", kind, model, "float32", device, sizes | {"settings": settings}, 550)
        for kind, settings in kinds.items()
    ]


def _cost_in_full(device: str, model: str | None) -> list[Case]:
    """What a GPU would find, but for the hidden facts: these are four fifths of the tokens."""
    return [
        Case("cost", kind, model, "float32", device, cost.ON_GPU | {"needles": [], "settings": settings}, 3 * 3600)
        for kind, settings in cost.SETTINGS_ON_GPU.items()
    ]


SUITES = {"default": _default, "equality": _equality, "limit": _limit, "strategies": _strategies, "cost": _cost}

# Which systems a workload runs; a new entry in STRATEGIES is among OURS by itself.
OURS, OURS_GENERATE, PAGED_GENERATE = "every strategy", "every strategy" + DOOR, "paged" + DOOR
ALL = ["baseline", OURS, PAGED_GENERATE, *PEERS]
ALONE = [name for name in ALL if name != "generate_batch"]  # single requests: nothing to batch


def _each(
    workload: str, systems: list[str], model: str | None, dtype: str, device: str, params: dict, timeout: int = 240
) -> list[Case]:
    own = [name for name in known_systems() if name != "baseline" and name not in PEERS]
    groups = {
        OURS: [name for name in own if not name.endswith(DOOR)],
        OURS_GENERATE: [name for name in own if name.endswith(DOOR)],
    }
    names = dict.fromkeys(name for system in systems for name in groups.get(system, [system]))
    return [Case(workload, name, model, dtype, device, params, timeout) for name in names]


def ragged(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths spread evenly from the shortest to the longest, in a fixed shuffled order."""
    lengths = [shortest + (longest - shortest) * i // max(1, count - 1) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(RAGGED_SEED)).tolist()
    return [lengths[i] for i in order]
