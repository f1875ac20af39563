"""The four products of a layer for one row, one after the other as a decode step runs them, attention left out.

    python -m bench.probes.product_chain   # tuned sizes, and others for each product
    python -m bench.probes.product_chain --model llama-3.1-8b --tile 4/1024/4 2/1024/4 --programs 4 6

Consecutive kernels overlap, so the time of one alone says little. One CUDA graph holds as many layers of distinct
weights as leave the L2 cache behind; a product costs what the graph takes longer with it than without. Sizes are tried
for one product while the others keep theirs; the best of each are then put together.
share = bytes of weights / measured read bandwidth / time.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import torch

from bench.measure import seconds
from bench.probes.limits import limits
from bench.probes.linear_bandwidth import PRODUCTS, Problem, check
from kv_strategies.kernels.linear import triton_one_row
from kv_strategies.kernels.linear.triton_one_row import Tuning, tuning

NAMES = ("qkv", "o", "gate_up", "down")
MAX_ERROR = 2e-2  # relative, of a result in bfloat16 against cuBLAS and kernels around it
MAX_WARPS = 48  # of a multiprocessor, that a kernel may ask for


class Chain:
    """The products of some layers."""

    def __init__(self, model: str, num_layers: int):
        self.num_layers = num_layers
        self.problems = {name: Problem(f"{model}/{name}", 1, num_layers) for name in NAMES}
        self.bytes = {name: problem.bytes for name, problem in self.problems.items()}
        self.x = torch.randn(1, self.problems["qkv"].k, dtype=torch.bfloat16, device="cuda")

    def run(self, tunings: dict[str, Tuning]) -> None:
        """Products without a tuning are left out, and their inputs stay what they were."""
        given = {name: problem.x for name, problem in self.problems.items()}
        given["qkv"] = given["gate_up"] = self.x
        for layer in range(self.num_layers):
            for name, tuned in tunings.items():
                problem = self.problems[name]
                options = {**problem.options, "residual": self.x} if name in ("o", "down") else problem.options
                out = triton_one_row.linear(given[name], problem.weights[layer], **options, tuned=tuned)
                if name == "qkv":
                    given["o"] = out[:, : given["o"].shape[1]]
                elif name == "gate_up":
                    given["down"] = out

    def time(self, tunings: dict[str, Tuning], repeats: int) -> float:
        """Of one layer."""
        self.run(tunings)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(tunings)
        return seconds(graph.replay, "cuda", repeats=repeats, warmup=2)["median"] / self.num_layers


def error_of(name: str, tuned: Tuning) -> float | str:
    """Compiles a kernel on the way. What does not fit the chip is a result as well."""
    try:
        torch.manual_seed(0)
        return check(Problem(name, 1, 1), tuned)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def candidates(args: argparse.Namespace) -> list[Tuning]:
    tiles = [tuple(map(int, tile.split("/"))) for tile in args.tile]
    choices = product(tiles, args.programs)
    return [Tuning(*tile, programs) for tile, programs in choices if programs * tile[2] <= MAX_WARPS]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.probes.product_chain", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted({name.split("/")[0] for name in PRODUCTS}), default="llama-2-7b")
    parser.add_argument(
        "--tile", nargs="+", default=["4/1024/4", "2/1024/4", "4/512/2", "8/1024/4"], help="tile_n/tile_k/num_warps"
    )
    parser.add_argument("--programs", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch sees none")

    tried = candidates(args)
    base = {name: tuning(PRODUCTS[f"{args.model}/{name}"][1]) for name in NAMES}
    kernels = {  # the number of programs is not compiled in
        (name, tuned.tile_n, tuned.tile_k, tuned.num_warps): tuned for name in NAMES for tuned in [*tried, base[name]]
    }
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        errors = pool.map(error_of, [f"{args.model}/{key[0]}" for key in kernels], kernels.values())
        errors = dict(zip(kernels, errors, strict=True))
    for key, error in errors.items():
        if isinstance(error, str) or not error < MAX_ERROR:
            print(f"  {key}: {error}")

    read = limits("cuda")["read"]
    chain = Chain(args.model, args.layers)
    whole = chain.time(base, args.repeats)

    def show(label: str, taken: float, num_bytes: int) -> None:
        print(f"{label:24} {taken * 1e6:6.1f} us ({num_bytes / read / taken:.2f})", flush=True)

    print(f"{torch.cuda.get_device_name()}: reads {read / 1e9:.0f} GB/s; us a layer (share of it)")
    show("all four, tuned", whole, sum(chain.bytes.values()))
    best = {}
    for name in NAMES:
        others = {other: tuned for other, tuned in base.items() if other != name}
        without = chain.time(others, args.repeats)
        show(name, whole - without, chain.bytes[name])
        times = {base[name]: whole}
        for tuned in tried:
            error = errors[name, tuned.tile_n, tuned.tile_k, tuned.num_warps]
            if not isinstance(error, str) and error < MAX_ERROR:
                times[tuned] = chain.time({**base, name: tuned}, args.repeats)
        ranked = sorted(times, key=times.get)
        best[name] = ranked[0]
        for tuned in ranked[:6]:
            mark = " (tuned)" if tuned == base[name] else ""
            show(f"  {'/'.join(map(str, tuned))}{mark}", times[tuned] - without, chain.bytes[name])
    show("all four, the best", chain.time(best, args.repeats), sum(chain.bytes.values()))


if __name__ == "__main__":
    main()
