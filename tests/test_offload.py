"""Offload: exact reads change no token, lossy ones converge to exact; what it takes and moves; what it refuses."""

from __future__ import annotations

import random

import pytest
import torch
from common import VOCAB, baseline_tokens, random_requests, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kv_strategies import Request, Runner, build
from kv_strategies.kernels.blocks import triton_rows
from kv_strategies.offload import Offload
from kv_strategies.step import plan
from kv_strategies.step.upstream import with_cache

MODEL = tiny_llama(num_layers=3)
RESIDENT = ["k", "none"]
#: Tests of both: what a CPU does, and what a GPU does.
both_ways = pytest.mark.parametrize("where", ["through buffers", pytest.param("in place", marks=pytest.mark.in_place)])


def generate(strategy, ids, **options):
    cache = strategy.cache() if strategy.name != "baseline" else None
    return MODEL.generate(ids, **with_cache(cache), max_new_tokens=9, do_sample=False, **options).tolist()


@both_ways
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10_000),
    block_size=st.sampled_from([1, 3, 16]),
    spare_tokens=st.integers(0, 100),
    chunk=st.integers(1, 40),
    options=st.sampled_from(
        [
            {},
            {"resident": "none"},
            {"resident": "kv", "host_bytes": 1 << 20},
            {"host_bytes": 1 << 22},
            {"top_n": 1000},
            {"mass": 1.0},
        ]
    ),
)
def test_any_schedule_gives_the_tokens_of_the_native_cache(where, seed, block_size, spare_tokens, chunk, options):
    rng = random.Random(seed)
    requests = random_requests(rng, rng.randint(1, 5), longest=30, max_new=8)
    longest = max(len(request.token_ids) + request.max_new_tokens for request in requests)
    num_blocks = -(-(longest + spare_tokens) // block_size)
    strategy = build("offload", MODEL, num_blocks=num_blocks, block_size=block_size, **options)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=4 + chunk)
    results = runner.generate(requests)
    strategy.check_integrity()
    assert [result.token_ids for result in results] == baseline_tokens(MODEL, requests)


@both_ways
@pytest.mark.parametrize("options", [{}, {"resident": "none"}, {"top_n": 500}, {"mass": 1.0}], ids=str)
def test_generate(options, where):
    ids = torch.randint(1, VOCAB, (3, 21))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    strategy = build("offload", MODEL, num_blocks=80, block_size=4, **options)
    for extra in ({}, {"num_beams": 3}):
        for rows in (slice(0, 1), slice(0, 3)):
            inputs = {"attention_mask": mask[rows], "pad_token_id": 0, **extra}
            assert generate(strategy, ids[rows], **inputs) == generate(build("baseline", MODEL), ids[rows], **inputs)


@pytest.mark.parametrize("name", ["offload+int8", "offload+window", "window+offload+int8", "prefix+offload"])
@pytest.mark.parametrize("resident", RESIDENT)
@both_ways
def test_composed_it_changes_what_the_others_change_alone(name, resident, where):
    rng = random.Random(3)
    requests = random_requests(rng, 6, longest=60, max_new=15)
    options = {"window": 20, "sinks": 4} if "window" in name else {}
    tokens = []
    for parts, extra in ((name, {"resident": resident}), (name.replace("offload", "paged"), {})):
        strategy = build(parts, MODEL, num_blocks=60, block_size=4, **options, **extra)
        runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=30)
        tokens.append([result.token_ids for result in runner.generate(requests)])
        strategy.check_integrity()
    assert tokens[0] == tokens[1]


def test_a_rebased_row_streams_its_turned_keys():
    requests = [Request(list(range(1, 40)), max_new_tokens=80)]
    tokens = []
    for name, options in (("window", {}), ("window+offload", {"resident": "none"})):
        strategy = build(name, MODEL, num_blocks=40, block_size=4, window=16, sinks=4, rebase_at=50, **options)
        tokens.append(Runner(MODEL, strategy, max_num_seqs=2, max_batch_tokens=30).generate(requests)[0].token_ids)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("options", [{"top_n": 2}, {"mass": 0.7}], ids=str)
def test_a_lossy_read_reports_what_it_dropped(options):
    requests = [Request([i + 1] * 3 + list(range(1, 30)), max_new_tokens=8) for i in range(3)]
    strategy = build("offload", MODEL, num_blocks=80, block_size=4, **options)
    Runner(MODEL, strategy, max_num_seqs=3, max_batch_tokens=20).generate(requests)
    stats = strategy.stats()
    assert 0 < stats["dropped_mass_mean"] <= stats["dropped_mass_worst"] < 1
    if "mass" in options:
        assert stats["dropped_mass_worst"] <= 0.3 + 1e-6
    else:
        assert stats["kept_tokens_mean"] == 2


def test_a_row_does_not_depend_on_its_neighbours_when_top_n_reads():
    """Decoding beside the chunks of a long prompt, the same tokens as alone."""
    requests = [Request(list(range(1, 20)), max_new_tokens=12), Request(list(range(40, 1, -1)), max_new_tokens=3)]
    strategy = build("offload", MODEL, num_blocks=80, block_size=4, top_n=3)
    together = Runner(MODEL, strategy, max_num_seqs=2, max_batch_tokens=7).generate(requests)
    alone = [Runner(MODEL, strategy, max_num_seqs=2, max_batch_tokens=7).generate([request])[0] for request in requests]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


@pytest.mark.parametrize("options", [{}, {"top_n": 1000}, {"resident": "none"}], ids=str)
def test_rows_that_share_blocks_beside_a_prompt_that_shares_them(options, monkeypatch):
    """Decoding rows and the chunks of another, all over one prefix that attention may read once."""
    monkeypatch.setattr(plan, "MIN_TOKENS_SHARED", 4)
    monkeypatch.setattr(plan, "MIN_TOKENS_SPARED", 4)
    shared = list(range(1, 30))
    requests = [Request(shared + [40 + i] * (1 + 9 * i), max_new_tokens=10) for i in range(4)]
    strategy = build("prefix+offload", MODEL, num_blocks=90, block_size=4, **options)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=9)
    runner.generate([shared])
    assert [result.token_ids for result in runner.generate(requests)] == baseline_tokens(MODEL, requests)


@both_ways
def test_only_new_tokens_go_out_and_only_past_blocks_come_in(where):
    strategy = build("offload", MODEL, num_blocks=40, block_size=4)
    runner = Runner(MODEL, strategy, max_num_seqs=2, max_batch_tokens=100)
    runner.submit([Request(list(range(1, 18)), max_new_tokens=3)])
    runner.step()
    v_bytes = 3 * 2 * 16 * 4  # layers, heads, numbers, bytes of a token
    stats = strategy.stats()
    assert (stats["bytes_to_host"], stats["bytes_to_device"]) == (17 * v_bytes, 0)
    runner.step()
    stats = strategy.stats()
    assert stats["bytes_to_host"] == 18 * v_bytes
    assert stats["bytes_to_device"] == 5 * 4 * v_bytes, "the five blocks with something in them"


@pytest.mark.in_place
def test_a_cpu_keeps_no_copy_of_what_it_reads():
    whole = build("paged", MODEL, num_blocks=64).stats()["kv_bytes"]
    for options, tiers in (({}, {"cpu": whole / 2, "host": whole / 2}), ({"resident": "none"}, {"host": whole})):
        assert build("offload", MODEL, num_blocks=64, **options).stats()["kv_bytes_per_tier"] == tiers


def test_bytes_per_tier():
    whole = build("paged", MODEL, num_blocks=64).stats()["kv_bytes"]
    layers = 3
    for options, near, far in (
        ({}, whole / 2 * (1 + 2 / layers), whole / 2),
        ({"top_n": 4}, whole / 2 * (1 + 1 / layers), whole / 2),
        ({"resident": "none"}, whole * 2 / layers, whole),
    ):
        tiers = build("offload", MODEL, num_blocks=64, **options).stats()["kv_bytes_per_tier"]
        assert tiers == {"cpu": near, "host": far}
    fitting = build("offload", MODEL)
    assert fitting.pool.num_blocks > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_n": 0}, "top_n must be a whole number of at least 1, got 0"),
        ({"top_n": -3}, "at least 1, got -3"),
        ({"top_n": 1.5}, "whole number"),
        ({"mass": 0}, r"mass must be in \(0, 1\], got 0"),
        ({"mass": 1.01}, "got 1.01"),
        ({"mass": float("nan")}, "got nan"),
        ({"top_n": 4, "mass": 0.9}, "top_n or mass, not both"),
        ({"resident": "v"}, "resident must be 'k', 'none' or 'kv', got 'v'"),
        ({"resident": "none", "top_n": 4}, "resident must be 'k', not 'none'"),
        ({"resident": "kv"}, "nothing streams"),
        ({"renormalise": True}, "drops nothing"),
        ({"disk_path": "x"}, "go together"),
        ({"disk_bytes": 1000}, "go together"),
        ({"disk_path": "x", "disk_bytes": 1000}, "give host_bytes as well"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        build("offload", MODEL, num_blocks=8, **options)


def test_a_host_budget_too_small_says_what_is_needed():
    streamed = build("offload", MODEL, num_blocks=8).stats()["kv_bytes_per_tier"]["host"]
    with pytest.raises(ValueError, match=f"{streamed} bytes are needed"):
        build("offload", MODEL, num_blocks=8, host_bytes=streamed - 1)
    build("offload", MODEL, num_blocks=8, host_bytes=streamed)
    block = build("paged", MODEL, num_blocks=8).stats()["kv_bytes"] // 8
    with pytest.raises(ValueError, match=f"{block} bytes are needed"):
        build("offload", MODEL, num_blocks=8, resident="kv", host_bytes=block - 1)


def test_an_exact_step_is_no_graph():
    assert not Offload().capturable and not Offload(resident="none").capturable
    assert Offload(top_n=3).capturable and Offload(mass=0.9).capturable
    assert Offload(resident="kv", host_bytes=1).capturable
    with pytest.raises(ValueError, match="cuda_graphs"):
        Runner(MODEL, build("offload", MODEL, num_blocks=8), cuda_graphs=True)


@pytest.mark.parametrize("resident", RESIDENT)
def test_a_saved_prefix_moves_between_placements(tmp_path, resident):
    requests = [Request(list(range(1, 40)), max_new_tokens=5)]
    plain = build("prefix", MODEL, num_blocks=30, block_size=4)
    far = build("prefix+offload", MODEL, num_blocks=30, block_size=4, resident=resident)
    for source, target in ((plain, far), (far, plain)):
        source.reset()
        target.reset()
        expected = Runner(MODEL, source).generate(requests)[0].token_ids
        assert source.save(tmp_path / "saved") == 10
        assert target.load(tmp_path / "saved").num_blocks == 10
        result = Runner(MODEL, target).generate(requests)[0]
        assert result.num_cached_tokens == 36 and result.token_ids == expected


def test_triton_copies_rows_and_slots(device):
    source = torch.randint(0, 256, (3, 5, 4160), dtype=torch.uint8, device=device)
    target = torch.zeros(3, 7, 4160, dtype=torch.uint8, device=device)
    triton_rows.copy_row(source, 4, target, 1)
    assert torch.equal(target[:, 1], source[:, 4]) and not target[:, [0, 2, 3, 4, 5, 6]].any()

    slots = torch.tensor([7, -1, 0, 14], device=device)
    near = {"v": torch.randn(5, 2, 3, 20, device=device), "v_scale": torch.randn(5, 2, 3, device=device)}
    far, expected = ({name: torch.zeros_like(plane) for name, plane in near.items()} for _ in range(2))
    triton_rows.copy_slots(near, far, slots)
    for name, plane in near.items():
        for slot in (7, 0, 14):
            expected[name][slot // 3, :, slot % 3] = plane[slot // 3, :, slot % 3]
        assert torch.equal(far[name], expected[name])


GPU_OPTIONS = [
    {},
    {"resident": "none"},
    {"top_n": 1000},
    {"mass": 1.0},
    {"resident": "kv", "host_bytes": 1 << 22},
    {"host_bytes": 1 << 22},
]


@pytest.mark.gpu
@pytest.mark.parametrize("num_blocks", [30, 300])
@pytest.mark.parametrize("options", GPU_OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["offload", "prefix+offload"])
def test_on_a_gpu(name, options, num_blocks):
    """Streams, graphs, preemption and eviction; float32, so that tokens are those of the native cache."""
    model = tiny_llama(num_layers=3).cuda()
    rng = random.Random(5)
    requests = random_requests(rng, 12, longest=60, max_new=30)
    strategy = build(name, model, num_blocks=num_blocks, block_size=4, **options)
    runner = Runner(model, strategy, max_num_seqs=5, max_batch_tokens=40)
    expected = baseline_tokens(model, requests)
    for _ in range(3):
        assert [result.token_ids for result in runner.generate(requests)] == expected
    strategy.check_integrity()
    if "host_bytes" in options and num_blocks == 30:
        assert strategy.stats()["tier_bytes_down"] > 0


@pytest.mark.gpu
def test_beams_and_samples_on_a_gpu():
    model = tiny_llama(num_layers=3).cuda()
    ids = torch.randint(1, VOCAB, (2, 21), device="cuda")
    for options in GPU_OPTIONS[:4]:
        strategy = build("offload", model, num_blocks=120, block_size=4, **options)
        for extra in ({}, {"num_beams": 3}):
            both = [
                model.generate(ids, **with_cache(cache), max_new_tokens=12, do_sample=False, pad_token_id=0, **extra)
                for cache in (None, strategy.cache())
            ]
            assert torch.equal(*both)


@pytest.mark.gpu
def test_v_is_page_locked():
    strategy = build("offload", tiny_llama().cuda(), num_blocks=8)
    assert strategy.placement._devices[0].stream.host.is_pinned()
