"""The decode kernel alone: how much of the device's read bandwidth it reaches, and a sweep of its sizes.

    python -m bench.probes.kernel_bandwidth   # the tuned constants, every shape
    python -m bench.probes.kernel_bandwidth --codes none int8 k8v4 int4 --shapes gqa-32x8192 mha-32x1024
    python -m bench.probes.kernel_bandwidth --shapes mha-1x4096 --tile 32 64 --warps 4 8 --programs 2 3 4

A CUDA graph runs the kernel once a layer, over as many layers as it takes to leave the L2 cache behind; the median of
its replays over the number of layers is the time of one attention, launch included. share = bytes of K and V (and
scales) of the context / measured read bandwidth / time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch

from bench.machine import conditions
from bench.measure import seconds
from bench.probes.limits import limits
from kv_strategies.base import Plain
from kv_strategies.kernels.blocks.triton_decode import Tuning, decode, tuning
from kv_strategies.kernels.blocks.triton_decode_groups import suits
from kv_strategies.quantized import Fp8, Int4, Int8, Key8Value4
from kv_strategies.step.plan import Plan
from kv_strategies.step.store import BlockStore, block_bytes

#: name -> (rows, context, query heads, KV heads)
SHAPES = {
    "mha-1x512": (1, 512, 32, 32),
    "mha-1x4096": (1, 4096, 32, 32),
    "mha-1x16384": (1, 16384, 32, 32),
    "mha-16x2048": (16, 2048, 32, 32),
    "mha-32x1024": (32, 1024, 32, 32),
    "mha-64x2048": (64, 2048, 32, 32),
    "gqa-1x4096": (1, 4096, 32, 8),
    "gqa-1x32768": (1, 32768, 32, 8),
    "gqa-1x100000": (1, 100000, 32, 8),
    "gqa-1x131072": (1, 131072, 32, 8),
    "gqa-32x2048": (32, 2048, 32, 8),
    "gqa-32x8192": (32, 8192, 32, 8),
}
CODES = {"none": Plain(), "int8": Int8(), "fp8": Fp8(), "k8v4": Key8Value4(), "int4": Int4()}
WORKING_SET = 2 << 30  # bytes of K and V in rotation, far beyond the L2 cache


class Problem:
    """One shape: a pool with its blocks scattered, laid out as the package does, and a step of one query a row."""

    def __init__(self, name: str, block_size: int, dim: int, codes: str, device: str = "cuda"):
        num_rows, context, self.num_heads, num_kv_heads = SHAPES[name]
        planes = CODES[codes].planes(num_kv_heads, block_size, dim, torch.bfloat16)
        blocks_a_row = -(-context // block_size)
        num_blocks = num_rows * blocks_a_row
        self.bytes = num_rows * context * block_bytes(1, planes) // block_size
        self.num_layers = max(2, -(-WORKING_SET // self.bytes))
        self.group, self.num_pairs = self.num_heads // num_kv_heads, num_rows * num_kv_heads
        self.dim = dim
        store = BlockStore(num_blocks, self.num_layers, planes, torch.device(device))
        for name, plane in store.planes.items():
            if "scale" in name:
                plane.uniform_(0, 1 / 64)
            elif codes == "none":
                plane.normal_()
            else:
                plane.view(torch.int8).random_(-64, 64)  # of float8, some of the others are NaN
        self.layers = [store.layer(index) for index in range(self.num_layers)]
        self.query = torch.randn(num_rows, self.num_heads, dim, device=device, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.query)
        lens = torch.full((num_rows,), context, dtype=torch.int32, device=device)
        self.plan = Plan(
            cu_seqlens_q=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            context_lens=lens,
            positions=lens.long() - 1,
            slot_mapping=torch.full((num_rows,), -1, device=device),
            block_tables=torch.randperm(num_blocks, device=device).int().view(num_rows, blocks_a_row),
            query_lens=[1] * num_rows,
            row_lens=[context] * num_rows,
            num_decodes=num_rows,
        )

    @property
    def tuned(self) -> Tuning:
        """The sizes that `decode` takes by itself."""
        return tuning(self.group, self.layers[0].v.dtype, self.num_pairs, suits(self.query, self.layers[0]))

    def time(self, tuned: Tuning, repeats: int) -> float:
        """Of one attention: the median over replays of a graph of all layers."""
        plan = replace(self.plan, scratch={})

        def step() -> None:
            for layer in self.layers:
                decode(self.query, layer, plan, self.out, scaling=self.dim**-0.5, tuned=tuned)

        step()
        if not self.query.is_cuda:  # Triton's interpreter: to see that it runs
            return seconds(step, "cpu", repeats)["median"] / self.num_layers
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return seconds(graph.replay, "cuda", repeats, warmup=3)["median"] / self.num_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--codes", nargs="+", choices=CODES, default=["none"], help="how K and V are stored")
    for name in ("tile", "warps", "stages", "programs", "registers", "least", "part"):
        parser.add_argument(f"--{name}", type=int, nargs="+", help="values to sweep; the tuned constant unless given")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write all results here, as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch sees none")

    read = limits("cuda")["read"]
    print(f"{torch.cuda.get_device_name()}: reads {read / 1e9:.0f} GB/s")
    results = []
    for name, codes in product(args.shapes, args.codes):
        problem = Problem(name, args.block_size, args.dim, codes)
        base = problem.tuned
        choices = product(
            args.tile or [base.tile],
            args.warps or [base.num_warps],
            args.stages or [base.num_stages],
            args.programs or [base.programs],
            args.registers or [base.registers],
            args.least or [base.least],
            args.part or [base.part],
        )
        tried = []
        for choice in choices:
            tuned = Tuning(*choice)
            try:
                taken = problem.time(tuned, args.repeats)
            except Exception as error:  # a size that does not fit the chip is a result of a sweep, not its end
                print(f"  {name} {codes} {tuned}: {type(error).__name__}: {str(error).splitlines()[0]}")
                continue
            share = problem.bytes / read / taken
            tried.append(
                {
                    "shape": name,
                    "codes": codes,
                    **asdict(tuned),
                    "seconds": taken,
                    "share": share,
                    "base": tuned == base,
                }
            )
        for result in sorted(tried, key=lambda result: result["seconds"])[:8]:
            sizes = "/".join(str(result[key]) for key in asdict(base))
            mark = " (tuned)" if result["base"] else ""
            print(
                f"{name:14} {codes:5} {result['seconds'] * 1e6:9.1f} us  share {result['share']:.3f}  {sizes}{mark}",
                flush=True,
            )
        results += tried
        del problem
        torch.cuda.empty_cache()
    if args.out:
        about = {"block_size": args.block_size, "dim": args.dim, "read": read}
        args.out.write_text(json.dumps({**about, **conditions("cuda"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
