"""What is launched and compiled, in a process of its own: `python launches.py keys|threads|warmed`, which prints JSON.

But for the last one, which needs a GPU, Triton gets a driver that compiles for a Hopper and launches nothing, and the
paths of a GPU run on tensors of a CPU. The tests are in `test_triton_compile.py`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import tiny_llama
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime import driver
from triton.runtime._async_compile import active_mode
from triton.runtime.jit import JITFunction

from kv_strategies import Runner, build, kernels
from kv_strategies import strategy as strategy_module
from kv_strategies.kernels import linear, triton_compile, triton_overlap
from kv_strategies.kernels.blocks import gpu, library, triton_decode, triton_store, triton_topn
from kv_strategies.kernels.linear import triton_few_rows, triton_one_row
from kv_strategies.step import graphs
from kv_strategies.step.warm_up import FirstLayer

LAUNCHED: list[str] = []  # by the threads that launched


class Launcher:
    def __init__(self, src, metadata):
        pass

    def __call__(self, *arguments, **options) -> None:
        LAUNCHED.append(threading.current_thread().name)


class Utils:
    def load_binary(self, *arguments):
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Driver:
    """Of a Hopper that is not there."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


# --- which kernels


def product(x, weight, bias=None, *, norm=None, rotary=None, gated=False, residual=None, plan=None):
    """As `linear.linear` chooses on a GPU."""
    options = {"norm": norm, "gated": gated, "residual": residual}
    if len(x) == 1:
        return triton_one_row.linear(x, weight, bias, rotary=rotary, **options)
    return linear.many_rows(x, weight, bias, plan=plan, **options)


def pretend() -> None:
    """The paths of a Hopper, for tensors of a CPU; what torch would compute is left out."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.graph_pool_handle = lambda: None
    torch.cuda.synchronize = lambda device=None: None
    triton_overlap.can_overlap = triton_few_rows.can_overlap = lambda device: True
    for module in (triton_decode, triton_few_rows, triton_one_row):
        module.num_multiprocessors = lambda device: 132
    strategy_module.store_kv = triton_store.store_kv  # of rings
    library._suits_cudnn = lambda device: True
    library.attend = lambda query, key, *_: (query, query.new_empty(query.shape[1], len(query), dtype=torch.float32))
    F.scaled_dot_product_attention = lambda query, *_, **options: query
    F.linear = lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], len(weight))
    torch.Tensor.addmm_ = lambda self, *_: self
    graphs._warm_up = lambda work, stream: work()
    graphs._record = lambda work, stream, memory=None: (lambda: None, work())


def keys_of(work: Callable[[], object]) -> set[tuple[str, str]]:
    """The kernels that are launched, and what they would be compiled for."""
    found, caches = set(), []

    def compiled(self, key, signature, device, *_):
        found.add((self.fn.__name__, key))
        caches.append(self.device_caches[device][0])
        caches[-1][key] = SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None
        )
        return caches[-1][key]

    original, JITFunction._do_compile = JITFunction._do_compile, compiled
    try:
        work()
    finally:
        JITFunction._do_compile = original
    for cache in caches:
        cache.clear()
    return found


@torch.inference_mode()
def keys() -> dict[str, dict]:
    """Of a warm-up, and of what is compiled ahead of it, by the names of strategies."""
    pretend()
    found = {}
    shapes = [("paged", {}), ("window+int8", {"window": 1500, "sinks": 4}), ("evict", {}), ("offload", {"top_n": 64})]
    for name, options in shapes:
        model = tiny_llama(num_heads=8, num_kv_heads=2, head_dim=64, num_layers=2, max_position_embeddings=8192)
        strategy = build(name, model.to(torch.bfloat16), num_blocks=520, **options)
        strategy.kernels = kernels.Kernels(
            "fast", triton_store.store_kv, gpu.attention, triton_topn.topn_attention, product, lambda x: len(x) != 1
        )
        runner = Runner(model, strategy, max_num_seqs=70, max_batch_tokens=1200)
        runner._graphs = runner._capture()
        strategy.compaction.expect(70)
        first = FirstLayer(strategy)
        rehearsed = runner._steps([graphs.Rehearsal(runner._graphs, first)], first, 8192)
        steps = runner._steps([runner._graphs], strategy, 8192)
        ahead, whole = (keys_of(lambda steps=steps: [run() for _, run in steps]) for steps in (rehearsed, steps))
        found[name] = {
            "steps": [len(rehearsed), len(steps)],
            "kernels": sorted({kernel for kernel, _ in whole}),
            "lacking": sorted(kernel for kernel, _ in whole - ahead),
            "useless": sorted(kernel for kernel, _ in ahead - whole),
        }
    return found


# --- in which threads


@triton.jit
def add_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), tl.load(x + tl.arange(0, SIZE)) + 1)


@gluon.jit
def gluon_kernel(x, SIZE: gl.constexpr):
    at = x + gl.arange(0, SIZE, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(at, gl.load(at) + 1)


@triton.jit
def wrong_kernel(x):
    tl.static_assert(False, "as it was written")


def threads() -> dict[str, object]:
    """A launch that compiles, beside another thread's, which runs."""
    x, found = torch.zeros(4096), {}
    original = JITFunction.run
    add_kernel[(1,)](x, SIZE=1024)  # is there already
    LAUNCHED.clear()

    def work() -> None:
        other = threading.Thread(target=lambda: add_kernel[(1,)](x, SIZE=512), name="other")
        other.start()
        other.join()
        for kernel, sizes in ((add_kernel, (32, 64, 1024)), (gluon_kernel, (128, 256))):
            for size in sizes:
                kernel[(1,)](x, SIZE=size)
        wrong_kernel[(1,)](x)

    compiling: list[str] = []
    triton.knobs.compilation.listener = lambda **said: compiling.append(threading.current_thread().name)
    with triton_compile.compiled_ahead() as launch:
        launch(work)
        found |= {"restored": JITFunction.run is original, "launched": list(LAUNCHED)}
        for kernel, size in ((add_kernel, 32), (gluon_kernel, 128)):  # while it may be compiled still
            kernel[(1,)](x, SIZE=size)
    for kernel, size in ((add_kernel, 64), (gluon_kernel, 256)):
        kernel[(1,)](x, SIZE=size)
    found |= {"compiled in": sorted(name.split("-")[0] for name in compiling), "then": LAUNCHED[1:]}
    try:
        wrong_kernel[(1,)](x)
    except triton.CompilationError as error:
        found["error"] = str(error)

    def fails() -> None:
        add_kernel[(1,)](x, SIZE=16)
        raise OSError("from work")

    try:
        with triton_compile.compiled_ahead() as launch:
            launch(fails)
    except OSError as error:
        found["from work"] = str(error)
    found["restored then"] = JITFunction.run is original and triton_compile.can_compile_ahead()
    return found


# --- on a GPU


def warmed() -> dict[str, object]:
    """A runner that is warmed up by itself: what is compiled in threads and what at a launch, and its graphs before
    requests and after."""
    compiled: dict[bool, list[str]] = {True: [], False: []}  # whether in threads -> kernels
    compile_kernel = JITFunction._do_compile

    def counted(self, *arguments):
        compiled[active_mode.get() is not None].append(self.fn.__name__)
        return compile_kernel(self, *arguments)

    JITFunction._do_compile = counted
    model = tiny_llama(num_heads=8, num_kv_heads=2, head_dim=64, num_layers=2).to("cuda", torch.bfloat16)
    runner = Runner(model, build("paged", model, num_blocks=64), max_num_seqs=20, max_batch_tokens=300)
    ahead, num_graphs = list(compiled[True]), [len(runner._graphs._graphs)]
    runner.warm_up()
    results = runner.generate([[number + 1] * (3 + 40 * number) for number in range(5)])
    num_graphs.append(len(runner._graphs._graphs))
    is_done = compiled[True] == ahead and all(result.finish_reason == "length" for result in results)
    return {"ahead": ahead, "behind": compiled[False], "graphs": num_graphs, "done": is_done}


if __name__ == "__main__":
    if sys.argv[1] != "warmed":
        driver.set_active(Driver())
    print(json.dumps({"keys": keys, "threads": threads, "warmed": warmed}[sys.argv[1]]()))
