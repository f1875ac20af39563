"""Offload on a GPU: are the kernels right, what share of the link is reached, what does a step cost.

    python -m bench.probes.offload   # Llama-2-7B shape, 16384 tokens, about a minute
    python -m bench.probes.offload --layers 4 --context 4096   # quick
    python -m bench.probes.offload --parts kernels tune

Parts, each a few lines of the table: `kernels` compares top-N reads of page-locked V with the reference and times
them, kernel by kernel, beside attention that reads all; `tune`, where asked for, sweeps their sizes; `link` streams
layers that nothing computes on; `steps` decodes one request, resident, streamed and gathered, and compares tokens
(exact reads must agree to the token in bfloat16 too: the same kernels read the same bytes); `tiers` brings evicted
prompts back. Rates are held against copies of 1 GiB from page-locked memory in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from bench.machine import conditions
from bench.measure import seconds
from bench.probes.limits import limits
from kv_strategies import Request, Runner, build
from kv_strategies.kernels import attention
from kv_strategies.kernels.blocks import topn, triton_topn
from kv_strategies.models.load import RANDOM_MODELS
from kv_strategies.step.plan import LayerStore, Plan
from kv_strategies.tiers.stream import LayerStream
from kv_strategies.tiers.transfer import host_memory

DEVICE = torch.device("cuda")
BLOCK_SIZE = 16
SCALING = 128**-0.5
LAYERS = 8  # in rotation at 16384 tokens: 1 GiB of K, far beyond the L2 cache


def decode_case(context: int, num_kv_heads: int, group: int, dim: int = 128, layers: int = 1, codes: bool = False):
    """One row, its blocks shuffled: (query, plan, layers with V in page-locked memory, the same with V on the GPU)."""
    torch.manual_seed(0)
    num_blocks = -(-context // BLOCK_SIZE)
    shape = (num_blocks, num_kv_heads, BLOCK_SIZE, dim)
    far, near = [], []
    for _ in range(layers):
        k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in "kv")
        scales: list = [None, None]
        if codes:
            k, v = (tensor.mul(30).clamp(-127, 127).to(torch.int8) for tensor in (k, v))
            scales = [torch.rand(shape[:3], device=DEVICE).add(0.5).div(30).bfloat16() for _ in "kv"]
        host = host_memory(v.numel() * v.element_size(), device=DEVICE).view(v.dtype).view(shape)
        host.copy_(v)
        near.append(LayerStore(k, v, *scales))
        far.append(LayerStore(k, host, *scales))
    tables = torch.randperm(num_blocks, dtype=torch.int32)[None].to(DEVICE)
    plan = Plan(
        cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        context_lens=torch.tensor([context], dtype=torch.int32, device=DEVICE),
        positions=torch.tensor([context - 1], device=DEVICE),
        slot_mapping=torch.tensor([-1], device=DEVICE),
        block_tables=tables,
        query_lens=[1],
        row_lens=[context],
        num_decodes=1,
    )
    # Sharp enough that the heaviest tokens matter.
    query = 4 * torch.randn(1, num_kv_heads * group, dim, device=DEVICE, dtype=torch.bfloat16)
    return query, plan, far, near


def kernels(context: int) -> dict:
    found = {}
    for name, heads, group, codes in (("mha", 32, 1, False), ("gqa", 8, 4, False), ("gqa int8", 8, 4, True)):
        query, plan, (far,), (near,) = decode_case(context, heads, group, codes=codes)
        for options in ({"top_n": 128}, {"mass": 0.9}):
            tally, wanted = topn.new_tally(DEVICE), topn.new_tally(DEVICE)
            out = topn.topn_attention(query, far, plan, tally, scaling=SCALING, **options)
            expected = topn.reference(query.float(), near, plan, wanted, scaling=SCALING, **options)
            error = (out.float() - expected).abs().max() / expected.abs().max()
            kept, wanted_kept = (float(t[1] / t[0]) for t in (tally, wanted))
            found[f"{name}, {options}"] = {"relative_error": float(error), "kept": kept, "expected_kept": wanted_kept}

    for tokens in (context, 4 * context):
        query, plan, far, near = decode_case(tokens, 32, 1, layers=max(2, LAYERS * context // tokens))
        for options in ({"top_n": 16}, {"top_n": 128}, {"top_n": 256}, {"mass": 0.9}, {"mass": 0.99}):
            found[f"{tokens} tokens, {options}"] = topn_times(query, plan, far, **options)
        found[f"{tokens} tokens, top 128, V on the GPU"] = topn_times(query, plan, near, top_n=128)

        def resident(query=query, plan=plan, near=near) -> None:
            for store in near:
                attention(query, store, plan, scaling=SCALING)

        found[f"{tokens} tokens, all of it, V on the GPU"] = {"us_a_layer": graph_seconds(resident) / len(near) * 1e6}
        if tokens == context:  # its pages may be larger, which would spare the GPU look-ups
            far = [store._replace(v=store.v.cpu().pin_memory()) for store in near]
            found[f"{tokens} tokens, top 128, V in memory from CUDA"] = topn_times(query, plan, far, top_n=128)
        del far, near
    return found


def topn_times(query, plan, stores: list[LayerStore], **options) -> dict:
    """us a layer in a CUDA graph, us of either kernel alone, tokens kept a head, and the rate at which V came."""
    tally = topn.new_tally(DEVICE)

    def step() -> None:
        for store in stores:
            topn.topn_attention(query, store, plan, tally, scaling=SCALING, **options)

    found = {"us_a_layer": graph_seconds(step) / len(stores) * 1e6}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        for kernel in ("scores", "choose"):
            if f"{kernel}_kernel" in event.key:
                found[f"{kernel}_us"] = event.self_device_time_total / event.count
    found["kept"] = float(tally[1] / tally[0])
    size = found["kept"] * query.shape[1] * query.shape[2] * stores[0].v.element_size()
    return found | {"v_gb_s": size / found["choose_us"] / 1e3}


def tune(context: int) -> dict:
    """The sizes of either kernel, one step away from those in use."""
    query, plan, far, _ = decode_case(context, 32, 1, layers=LAYERS)
    base, found = triton_topn.tuning(1), {}
    for change in (
        {}, {"split": 256}, {"split": 1024}, {"tile": 32}, {"tile": 128}, {"tile": 32, "num_warps": 2},
        {"num_warps": 8}, {"split": 256, "tile": 32}, {"num_stages": 3}, {"tile": 32, "num_stages": 3},
        {"span": 8}, {"span": 32}, {"held": 8}, {"held": 32}, {"rows": 64}, {"rows": 32},
    ):  # fmt: skip
        tuned = replace(base, **change)
        with patch.object(triton_topn, "tuning", lambda group, tuned=tuned: tuned):
            found[str(change or base)] = topn_times(query, plan, far, top_n=128)
    return found


def graph_seconds(step) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return seconds(graph.replay, DEVICE, repeats=10, warmup=3)["median"]


def link(context: int, num_layers: int) -> dict:
    """Layers that nothing computes on, one after the other: the most that streaming can reach."""
    planes = {"v": ((32, BLOCK_SIZE, 128), torch.bfloat16)}
    num_blocks = -(-context // BLOCK_SIZE) + 8
    stream = LayerStream(num_blocks, num_layers, planes, DEVICE)
    found = {"page_locked": stream.host.is_pinned()}

    def plan_of(blocks) -> Plan:
        tensors = [torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(5)]
        tables = np.asarray(blocks, dtype=np.int32)[None]
        return Plan(*tensors, query_lens=[1], row_lens=[context], num_decodes=1, host_tables=tables)

    consecutive = np.arange(context // BLOCK_SIZE)
    scattered = np.random.default_rng(0).permutation(num_blocks)[: context // BLOCK_SIZE]
    every_fourth = np.arange(0, num_blocks, 4)[: context // BLOCK_SIZE]
    for name, blocks in (("in one run", consecutive), ("all shuffled", scattered), ("every fourth", every_fourth)):

        def step(blocks=blocks) -> None:
            plan = plan_of(blocks)
            for layer in range(num_layers):
                stream.open(layer, plan)
                stream.close(plan)

        before = stream.bytes_fetched
        step()
        moved = stream.bytes_fetched - before
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        launched = time.perf_counter() - begin
        torch.cuda.synchronize()
        taken = time.perf_counter() - begin
        found[f"{name}, GB/s"] = moved / taken / 1e9
        found[f"{name}, launch ms"] = launched * 1e3
    # The way out: a prompt's V, token by token.
    plan = plan_of(consecutive)
    count = min(2048, context)
    plan.slot_mapping = torch.arange(count, device=DEVICE)
    stream.open(0, plan)

    def append() -> None:
        for _ in range(8):
            stream.append(plan)
        stream.settle()

    found[f"append {count} tokens, GB/s"] = 8 * count * 32 * 128 * 2 / seconds(append, DEVICE)["median"] / 1e9
    return found


def steps(model, context: int, new_tokens: int) -> dict:
    torch.manual_seed(1)
    prompt = torch.randint(0, 32000, (context - new_tokens,)).tolist()
    num_blocks = -(-context // BLOCK_SIZE) + 1
    found, expected = {}, None
    for label, name, options in (
        ("paged", "paged", {}),
        ("exact", "offload", {}),
        ("exact, none resident", "offload", {"resident": "none"}),
        ("top 128", "offload", {"top_n": 128}),
        ("mass 0.9", "offload", {"mass": 0.9}),
        ("all as top n", "offload", {"top_n": context}),
    ):
        begin = time.perf_counter()
        strategy = build(name, model, num_blocks=num_blocks, block_size=BLOCK_SIZE, **options)
        built = time.perf_counter() - begin
        runner = Runner(model, strategy, max_num_seqs=1, max_batch_tokens=2048, warm_up=False)
        runner.generate([Request(prompt[:3000], max_new_tokens=4)])  # compile, capture
        before = strategy.stats()
        (result,) = runner.generate([Request(prompt, max_new_tokens=new_tokens)])
        stats = strategy.stats()
        step = statistics.median(result.timings.itl[4:])
        expected = expected or result.token_ids
        same = next((i for i, (a, b) in enumerate(zip(result.token_ids, expected, strict=True)) if a != b), new_tokens)
        found[label] = {
            "step_ms": step * 1e3,
            "ttft_ms": result.timings.ttft * 1e3,
            "build_s": built,
            "same_tokens": f"{same}/{new_tokens}",
            "kv_bytes_per_tier": stats["kv_bytes_per_tier"],
        }
        if "bytes_to_device" in stats:
            moved = stats["bytes_to_device"] - before["bytes_to_device"]
            found[label]["gb_to_device"] = moved / 1e9
            if not strategy.placement.capturable:
                found[label]["step_gb"] = stats["kv_bytes_per_tier"]["host"] / 1e9  # the request fills the pool
        for key in ("kept_tokens_mean", "dropped_mass_mean", "dropped_mass_worst"):
            if key in stats:
                found[label][key] = stats[key]
        del runner, strategy
        gc.collect()
        torch.cuda.empty_cache()
    return found


def tiers(model, context: int) -> dict:
    """Two prompts in a pool for one: each time the other has pushed it out."""
    torch.manual_seed(2)
    prompts = [torch.randint(0, 32000, (context,)).tolist() for _ in range(2)]
    num_blocks = -(-context // BLOCK_SIZE) + 8
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, options in (
            ("computed again", None),
            ("from host memory", {"resident": "kv"}),
            ("from host memory, V offloaded", {"resident": "k"}),
            ("from disk", {"resident": "kv", "disk_path": folder}),
        ):
            if options is None:
                strategy = build("prefix", model, num_blocks=num_blocks)
                block = strategy.stats()["kv_bytes"] // num_blocks
            else:
                host = block * (2 * num_blocks if "disk_path" not in options else 16)
                host += block // 2 * num_blocks if options["resident"] == "k" else 0
                disk = {"disk_bytes": 3 * num_blocks * block} if "disk_path" in options else {}
                strategy = build("prefix+offload", model, num_blocks=num_blocks, host_bytes=host, **options, **disk)
            runner = Runner(model, strategy, max_num_seqs=1, max_batch_tokens=8192, warm_up=False)
            times, tokens = [], []
            for turn in range(6):
                (result,) = runner.generate([Request(prompts[turn % 2], max_new_tokens=2)])
                times.append(result.timings.ttft * 1e3)
                tokens.append(result.token_ids)
            stats = strategy.stats()
            found[label] = {
                "ttft_ms_by_turn": [round(value, 1) for value in times],
                "same_tokens": all(tokens[turn] == tokens[turn % 2] for turn in range(6)),
                **{key: stats[key] for key in stats if key.startswith("tier_")},
            }
            del runner, strategy
            gc.collect()
            torch.cuda.empty_cache()
    return found


@cache
def random_model(num_layers: int):
    config = LlamaConfig(**{**RANDOM_MODELS["llama-2-7b-random"], "num_hidden_layers": num_layers})
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--parts", nargs="+", default=["kernels", "link", "steps", "tiers"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begin = time.perf_counter()
    found: dict = {"conditions": conditions("cuda"), "limits": limits("cuda")}
    rate = found["limits"]["host_to_device"]
    gpu, out, read = found["conditions"]["machine"]["gpu"], found["limits"]["device_to_host"], found["limits"]["read"]
    print(f"{gpu}: link {rate / 1e9:.1f} GB/s in, {out / 1e9:.1f} out; memory {read / 1e9:.0f} GB/s")
    parts = {
        "kernels": lambda: kernels(args.context),
        "tune": lambda: tune(args.context),
        "link": lambda: link(args.context, args.layers),
        "steps": lambda: steps(random_model(args.layers), args.context, args.new_tokens),
        "tiers": lambda: tiers(random_model(args.layers), min(args.context, 4096)),
    }
    for part in args.parts:
        started = time.perf_counter()
        try:
            found[part] = parts[part]()
        except Exception as error:  # a part that fails leaves the others their figures
            found[part] = {"failed": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        print(f"\n{part} ({time.perf_counter() - started:.1f} s)")
        for name, value in found[part].items():
            shown = value if not isinstance(value, dict) else ", ".join(f"{k} {_short(v)}" for k, v in value.items())
            print(f"  {name}: {_short(shown)}")
        gc.collect()
        torch.cuda.empty_cache()
        if args.out:
            args.out.write_text(json.dumps(found, indent=1, default=str))
    exact = found.get("steps", {}).get("exact", {})
    if exact.get("step_gb"):
        share = exact["step_gb"] * 1e9 / rate / (exact["step_ms"] / 1e3)
        found["exact_share_of_link"] = share
        print(f"\nexact: {share:.3f} of the link")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1, default=str))


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
