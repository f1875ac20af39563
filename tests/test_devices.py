"""A model over several devices (`device_map`): the layers' blocks are where they are, and no token is another."""

from __future__ import annotations

import dataclasses
import gc
import random
from contextlib import contextmanager

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from common import baseline_tokens, random_requests, tiny_llama

from kv_strategies import Request, Runner, build
from kv_strategies.step import fused
from kv_strategies.step.plan import PLAN_TENSORS, PlanBuffer, Row
from kv_strategies.step.store import KVShape
from kv_strategies.step.upstream import with_cache

#: What is asked of every device: its share of blocks, streams, tiers, scores, keys that are turned.
CASES = {
    "paged": {},
    "prefix": {},
    "window": {"window": 7, "sinks": 2, "rebase_at": 28},
    "prefix+int8": {},
    "offload": {},
    "prefix+offload": {"resident": "none"},
    "prefix+offload+tiers": {"resident": "k", "host_bytes": 60_000},
    "prefix+offload+disk": {"resident": "kv", "host_bytes": 20_000, "disk_bytes": 100_000},
    "offload+top_n": {"top_n": 5},
    "evict": {"score": "snapkv", "keep": 0.6, "every": 4},
    "prefix+offload+evict": {"score": "tova", "keep": 0.6},
}
LAYERS = 3
#: Names of one memory, which keeps a store for each.
CPUS = [torch.device("cpu", number) for number in (0, 1, 0)]


def made(case, model, tmp_path, num_blocks=24):
    name, options = case.removesuffix("+tiers").removesuffix("+disk").removesuffix("+top_n"), dict(CASES[case])
    if "disk_bytes" in options:
        options["disk_path"] = tmp_path
    return build(name, model, num_blocks=num_blocks, block_size=4, **options)


def answers(strategy, requests):
    """Through both doors, the first time and again."""
    model, found = strategy.model, []
    for _ in range(2):
        found += [r.token_ids for r in Runner(model, strategy, max_num_seqs=3, max_batch_tokens=24).generate(requests)]
        ids = torch.tensor([list(requests[0].token_ids)[:20]] * 2, device=model.device)
        cache = strategy.cache(ids, torch.ones_like(ids))
        found += model.generate(ids, **with_cache(cache), max_new_tokens=6, do_sample=False).tolist()
        del cache
        gc.collect()
        strategy.check_integrity()
    assert strategy.stats()["blocks_used"] == 0
    return found


def asked(seed):
    return random_requests(random.Random(seed), 6, longest=40, max_new=12)


@contextmanager
def kept_apart():
    """Strategies that are built inside keep the layers of `CPUS` apart, and so does the stack."""
    of, init = KVShape.of, fused._Layer.__init__

    def shape(model):
        return dataclasses.replace(of(model), layer_devices=CPUS)

    def layer(self, *given):
        init(self, *given)
        self.device = CPUS[self.index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVShape, "of", shape)
        patch.setattr(fused._Layer, "__init__", layer)
        yield


@pytest.mark.parametrize("case", CASES)
def test_layers_that_are_kept_apart_give_the_same_tokens(case, tmp_path):
    with kept_apart():
        strategy = made(case, tiny_llama(num_layers=LAYERS), tmp_path)
        found = answers(strategy, asked(1))
    assert strategy.is_spread and not strategy.capturable
    whole = made(case, tiny_llama(num_layers=LAYERS), tmp_path)
    assert found == answers(whole, asked(1)) and not whole.is_spread
    one, other = strategy.stats(), whole.stats()
    for key in ("bytes_to_device", "bytes_to_host", "tokens_evicted", "hit_tokens"):
        assert one.get(key) == other.get(key)
    if "tiers" in case or "disk" in case:
        assert one["tier_bytes_down"] > 0 and one["tier_blocks_promoted"] > 0


@pytest.mark.parametrize("case", ["prefix", "prefix+int8", "prefix+offload"])
def test_a_file_is_the_same_however_layers_are_spread(case, tmp_path):
    with kept_apart():
        apart = made(case, tiny_llama(num_layers=LAYERS), tmp_path, num_blocks=80)
        answers(apart, asked(2))
    count = apart.save(tmp_path / "apart")
    whole = made(case, tiny_llama(num_layers=LAYERS), tmp_path, num_blocks=80)
    assert whole.load(tmp_path / "apart").num_blocks == count > 0
    answers(whole, asked(2))
    assert whole.num_hit_tokens > 0
    block = next(iter(whole.sharing._by_block))
    (node,) = (n for n in apart.sharing._nodes.values() if n.chain == whole.sharing._by_block[block].chain)
    assert torch.equal(whole.placement.read_blocks([block]), apart.placement.read_blocks([node.block]))


def test_a_plan_is_copied_once_a_device():
    buffer = PlanBuffer(torch.device("cpu"), 2, 5, 3, block_size=4)
    tables = torch.arange(6, dtype=torch.int32).view(2, 3).numpy()
    plan = buffer.fill([Row(tables[0], 9, 1), Row(tables[1], 4, 4)])
    meta, copies = torch.device("meta"), []
    with Copies(copies):
        plans = [plan.on(meta) for _ in range(32)]
    assert len(copies) == 1 and all(one is plans[0] for one in plans) and plan.on(plan.device) is plan
    for name in PLAN_TENSORS:
        one, other = getattr(plan, name), getattr(plans[0], name)
        assert other.is_meta and (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, buffer.copied_to(torch.device("cpu", 1))[name])


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, copies):
        super().__init__()
        self._copies = copies

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self._copies.append(function)
        return function(*args, **(kwargs or {}))


# --- accelerate


def device_map(model, *devices):
    """Layers in equal parts, what is before them on the first device and what is behind them on the last."""
    count = len(model.model.layers)
    layers = {f"model.layers.{index}": devices[index * len(devices) // count] for index in range(count)}
    before = dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), devices[0])
    return before | layers | dict.fromkeys(("model.norm", "lm_head"), devices[-1])


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("case", ["paged", "prefix+offload+tiers", "prefix+offload+evict"])
def test_accelerates_hooks_keep_both_doors_and_the_stack(case, is_fused, tmp_path):
    model = tiny_llama(num_layers=LAYERS)
    expected = answers(made(case, model, tmp_path), asked(3))
    hooked = dispatch_model(tiny_llama(num_layers=LAYERS), device_map(model, "cpu"), force_hooks=True)
    strategy = made(case, hooked, tmp_path)
    strategy.fused = is_fused
    assert answers(strategy, asked(3)) == expected
    assert (strategy.stack is not None) == is_fused


def test_what_stands_before_a_module_beside_accelerate_is_called():
    hooked = dispatch_model(model := tiny_llama(), device_map(model, "cpu"), force_hooks=True)
    strategy, layer = build("paged", hooked, num_blocks=16), hooked.model.layers[0]
    assert strategy.stack is not None
    forward, calls = layer.forward, []
    layer.forward = lambda *args, **options: calls.append(1) or forward(*args, **options)
    Runner(hooked, strategy).generate([Request([1, 2, 3], 2)])
    assert strategy.stack is None and len(calls) == 2


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("disk", r"model\.layers\.1\..*\(device_map has put it on 'disk', from where accelerate brings it"),
        ("meta", r"on the meta device \(weights that accelerate keeps elsewhere.*real devices"),
        ("split", r"model\.layers\.1 is on several devices \(cpu, meta\)"),
    ],
)
def test_layers_that_are_nowhere_are_refused_by_name(place, said, tmp_path, monkeypatch):
    model = tiny_llama()
    if place == "disk":
        places = device_map(model, "cpu", "disk") | {"model.norm": "cpu", "lm_head": "cpu"}
        model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    elif place == "meta":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:  # as two GPUs would share it: no meta tensor is one here
        model.model.layers[1].mlp.to("meta")
        monkeypatch.setattr(torch.Tensor, "is_meta", False)
    with pytest.raises(ValueError, match=said):
        build("paged", model, num_blocks=8)


# --- two GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gpu_two_devices_give_the_tokens_of_one(case, is_fused, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    num_layers = 4
    model = tiny_llama(num_layers=num_layers).cuda()
    one = made(case, model, tmp_path)
    one.fused = is_fused
    expected = answers(one, asked(4))
    both = dispatch_model(tiny_llama(num_layers=num_layers), device_map(model, 0, 1))
    strategy = made(case, both, tmp_path)
    strategy.fused = is_fused
    assert {device.index for device in strategy.shape.layer_devices} == {0, 1}
    assert answers(strategy, asked(4)) == expected
    assert strategy.stats()["kv_bytes"] >= one.stats()["kv_bytes"]


@pytest.mark.gpu
def test_gpu_two_devices_give_the_tokens_of_the_native_cache():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    both = dispatch_model(model := tiny_llama(num_layers=4), device_map(model, 0, 1))
    torch.cuda.set_device(1)  # whichever is current
    try:
        requests = asked(5)
        strategy = build("prefix", both, num_blocks=200, block_size=4)
        found = Runner(both, strategy).generate(requests)
        assert [result.token_ids for result in found] == baseline_tokens(both, requests)
    finally:
        torch.cuda.set_device(0)


@pytest.mark.gpu
def test_gpu_a_model_on_another_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = tiny_llama().to("cuda:1")
    strategy = build("prefix+int8", model, num_blocks=200, block_size=4)
    twin = tiny_llama().to("cuda:0")
    assert answers(strategy, asked(6)) == answers(build("prefix+int8", twin, num_blocks=200, block_size=4), asked(6))
