"""What one rank takes for a decode step, a prompt, and the sums over ranks in them. `suites/parallel.py` starts it:

torchrun --nproc-per-node N -m bench.probes.ranks CASE.json POINTS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import measure
from bench.case import Bench, Case
from bench.lines import write_whole
from bench.probes.limits import limits
from bench.systems import BLOCK_SIZE, Capacity, Ours, bytes_per_token, filled, open_system
from kv_strategies import build
from kv_strategies.step.ranks import ranks_of

_NUM_UNSTEADY = 3  # steps of a run in which kernels compile and graphs are captured


def points(bench: Bench) -> list[dict]:
    """Every decode step and prompt of the case's parameters; what fails is a point that says why."""
    ranks = ranks_of(bench.model)  # from here on every rank has a GPU of its own
    read = limits(bench.case.device, bench.params.get("size"))["read"]
    found = []
    for rows, context in bench.params["decode"]:
        point = measure.attempt(lambda at=(rows, context): _decode(bench, *at))
        found.append({"what": "decode", "rows": rows, "tokens": context} | point)
        bench.free()
    for tokens in bench.params["prefill"]:
        point = measure.attempt(lambda n=tokens: _prefill(bench, n))
        found.append({"what": "prefill", "rows": 1, "tokens": tokens} | point)
        bench.free()
    return [{"ranks": ranks.size, "read": read} | point for point in found]


def _decode(bench: Bench, rows: int, context: int) -> dict:
    """A step with all rows decoding, and the bytes that it reads on all ranks together. See `systems.filled`."""
    new_tokens = bench.params["new_tokens"]
    system = open_system("paged", bench.model, Capacity([[context + new_tokens] * rows]))
    with filled(system.strategy):
        run = system(bench.prompts([context] * rows, seed=rows), new_tokens)
    steps = measure.steady_steps(run.times)[_NUM_UNSTEADY:]
    tokens = rows * (context + _NUM_UNSTEADY + len(steps) // 2)  # in the middle of what is measured
    kv_bytes = tokens * bytes_per_token(system, bench.model) * ranks_of(bench.model).size
    return {
        "seconds": measure.spread(steps),
        "bytes": int(measure.weight_bytes(bench.model) + kv_bytes),
        "sums": _sums(bench, rows),
    }


def _prefill(bench: Bench, tokens: int) -> dict:
    """The first token of a prompt in one chunk."""
    capacity = Capacity([[tokens + 1]])
    strategy = build("paged", bench.model, num_blocks=capacity.blocks(BLOCK_SIZE))
    system = Ours(bench.model, strategy, capacity, max_batch_tokens=tokens + 1)
    prompts = bench.prompts([tokens] * (bench.params["repeats"] + 1), seed=tokens)
    times = [system([prompt], 1).times[0][0] for prompt in prompts]
    return {"seconds": measure.spread(times[1:]), "sums": _sums(bench, tokens)}


@torch.inference_mode()
def _sums(bench: Bench, num_tokens: int) -> dict:
    """Seconds of all sums over ranks in a forward alone, one behind the other, as a graph on a GPU: one for the
    embedding, two a layer.
    """
    config, ranks = bench.model.config, ranks_of(bench.model)
    states = torch.zeros(num_tokens, config.hidden_size, dtype=bench.model.dtype, device=bench.model.device)

    def work() -> None:
        for _ in range(1 + 2 * config.num_hidden_layers):
            ranks.add(states)

    return measure.seconds(_captured(work) if states.is_cuda else work, states.device, bench.params["repeats"])


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    work()  # what communicates is set up outside of the graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def main(case_path: str, points_path: str) -> None:
    bench = Bench(Case(**json.loads(Path(case_path).read_text())), Path(case_path).parent, say=lambda text: None)
    found = json.dumps(points(bench))
    if ranks_of(bench.model).is_first:
        write_whole(Path(points_path), lambda path: path.write_text(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
