"""The products of a decoder layer alone: how much of the read bandwidth they reach with few rows.

    python -m bench.probes.linear_bandwidth   # tuned sizes and cuBLAS, every product
    python -m bench.probes.linear_bandwidth --products llama-2-7b/down --rows 1 --programs 2 4 6 8
    python -m bench.probes.linear_bandwidth --rows 16 32 --tile-n 64 128 --stages 3 4 5

Three ways: cuBLAS alone; cuBLAS with what stands around it in a layer (norm, gating, residual) as kernels of their own,
which is what runs with more rows than 64; and our kernels, with all of it and rotary embedding inside for one row, with
a kernel for the norm before it for more.

A CUDA graph runs a product over as many copies of its weights as leave the L2 cache behind; the median of its replays
over the number of copies is the time of one product, launch included. How products of one row follow each other in a
decode step is `product_chain.py`'s to measure.
share = bytes of weights / measured read bandwidth / time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.machine import conditions
from bench.measure import seconds
from bench.probes.limits import limits
from kv_strategies.kernels.linear import (
    Norm,
    Rotary,
    many_rows,
    reference,
    triton_few_rows,
    triton_fused,
    triton_one_row,
)

DIM = 128
#: name -> (N, K, what stands around it)
PRODUCTS = {
    "llama-2-7b/qkv": (12288, 4096, "rotary"),
    "llama-2-7b/o": (4096, 4096, "residual"),
    "llama-2-7b/gate_up": (22016, 4096, "gated"),
    "llama-2-7b/down": (4096, 11008, "residual"),
    "llama-2-7b/lm_head": (32000, 4096, "nothing"),
    "llama-3.1-8b/qkv": (6144, 4096, "rotary"),
    "llama-3.1-8b/o": (4096, 4096, "residual"),
    "llama-3.1-8b/gate_up": (28672, 4096, "gated"),
    "llama-3.1-8b/down": (4096, 14336, "residual"),
    "llama-3.1-8b/lm_head": (128256, 4096, "nothing"),
}
WORKING_SET = 1 << 30  # bytes of weights in rotation, far beyond the L2 cache
#: what can be tuned: with one row, with more
SIZES = {True: ("tile_n", "tile_k", "num_warps", "programs"), False: ("tile_n", "tile_k", "stages")}


class Problem:
    """One product, with fresh weights at every call until all have had their turn; or so many copies of them."""

    def __init__(self, name: str, num_rows: int, copies: int | None = None):
        n, k, around = PRODUCTS[name]
        self.n, self.k, self.num_rows = n, k, num_rows
        self.bytes = 2 * n * k
        copies = copies or max(2, -(-WORKING_SET // self.bytes))
        self.weights = torch.empty(copies, n, k, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        self.x = torch.randn(num_rows, k, dtype=torch.bfloat16, device="cuda")
        norm = Norm(torch.ones(k, dtype=torch.bfloat16, device="cuda"), 1e-5)
        angles = torch.rand(num_rows, DIM, dtype=torch.bfloat16, device="cuda")
        heads = n // DIM
        rotary = Rotary(angles, angles, heads * 2 // 3 if heads == 96 else heads * 5 // 6)
        residual = torch.randn(num_rows, n, dtype=torch.bfloat16, device="cuda")
        self.options = {
            "rotary": {"norm": norm, "rotary": rotary},
            "gated": {"norm": norm, "gated": True},
            "residual": {"residual": residual},
            "nothing": {},
        }[around]

    @property
    def tuned(self) -> NamedTuple:
        return triton_one_row.tuning(self.k) if self.num_rows == 1 else triton_few_rows.Tuning()

    def ours(self, tuned: NamedTuple) -> Callable:
        return lambda weight: self.product(weight, tuned, **self.options)

    def product(self, weight: torch.Tensor, tuned: NamedTuple, **options) -> torch.Tensor:
        if self.num_rows == 1:
            return triton_one_row.linear(self.x, weight, **options, tuned=tuned)
        options.pop("rotary", None)  # left to the store of K and V
        norm = options.pop("norm", None)
        x = self.x if norm is None else triton_fused.rms_norm(self.x, norm)
        return triton_few_rows.linear(x, weight, **options, tuned=tuned)

    def cublas(self, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(self.x, weight)

    def around_cublas(self, weight: torch.Tensor) -> torch.Tensor:
        return many_rows(self.x, weight, **{k: v for k, v in self.options.items() if k != "rotary"})

    def time(self, one: Callable, repeats: int) -> float:
        """Of one product: the median over replays of a graph of all copies."""
        one(self.weights[0])  # compiles
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            one(self.weights[1])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in self.weights:
                one(weight)
        taken = seconds(graph.replay, "cuda", repeats=repeats, warmup=2)["median"] / len(self.weights)
        del graph
        return taken


def check(problem: Problem, tuned: NamedTuple) -> float:
    """Relative error of a tuning's result against the plain version."""
    fresh = {name: value.clone() if torch.is_tensor(value) else value for name, value in problem.options.items()}
    got = problem.product(problem.weights[0], tuned, **fresh).float()
    fresh = {name: value.clone() if torch.is_tensor(value) else value for name, value in problem.options.items()}
    if problem.num_rows > 1:
        fresh.pop("rotary", None)
    expected = reference(problem.x, problem.weights[0], **fresh).float()
    return float((got - expected).norm() / expected.norm())


def sweep(problem: Problem, args: argparse.Namespace) -> list[NamedTuple]:
    base = problem.tuned
    choices = [getattr(args, name) or [getattr(base, name)] for name in SIZES[problem.num_rows == 1]]
    return [type(base)(*choice) for choice in product(*choices)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.probes.linear_bandwidth", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=list(PRODUCTS), metavar="NAME")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 32, 64])
    for name in dict.fromkeys(SIZES[True] + SIZES[False]):
        option = "--" + name.removeprefix("num_").replace("_", "-")
        parser.add_argument(
            option, dest=name, type=int, nargs="+", help="values to sweep; the tuned constant unless given"
        )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write all results here, as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch sees none")

    read = limits("cuda")["read"]
    print(f"{torch.cuda.get_device_name()}: reads {read / 1e9:.0f} GB/s; us (share of it)")
    results = []
    for name, num_rows in product(args.products, args.rows):
        problem = Problem(name, num_rows)

        def record(kind: str, taken: float, name=name, num_rows=num_rows, problem=problem, **more) -> dict:
            share = problem.bytes / read / taken
            results.append({"product": name, "rows": num_rows, "kind": kind, "seconds": taken, "share": share, **more})
            return results[-1]

        cublas = record("cublas", problem.time(problem.cublas, args.repeats))
        around = record("cublas and kernels around it", problem.time(problem.around_cublas, args.repeats))
        base = problem.tuned
        tried = []
        for tuned in sweep(problem, args) if num_rows <= triton_few_rows.MAX_ROWS else []:
            try:
                error = check(problem, tuned)
                taken = problem.time(problem.ours(tuned), args.repeats)
            except Exception as error:  # a size that does not fit the chip is a result of a sweep, not its end
                print(f"  {name} {tuned}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            tried.append(record("ours", taken, error=error, base=tuned == base, **tuned._asdict()))
        line = f"{name:22} {num_rows:3} rows  cuBLAS {show(cublas)}, with its neighbours {show(around)}"
        print(line, flush=True)
        tried.sort(key=lambda result: result["seconds"])
        for result in tried[:6]:
            sizes = "/".join(str(result[size]) for size in SIZES[num_rows == 1])
            mark = " (tuned)" if result["base"] else ""
            print(" " * 32, f"ours {show(result)}  {sizes}{mark}", end="")
            print(f"  error {result['error']:.1e}" if result["error"] > 8e-3 else "", flush=True)
        del problem, record
    if args.out:
        args.out.write_text(json.dumps({"read": read, **conditions("cuda"), "results": results}, indent=1) + "\n")


def show(result: dict) -> str:
    return f"{result['seconds'] * 1e6:6.1f} ({result['share']:.2f})"


if __name__ == "__main__":
    main()
