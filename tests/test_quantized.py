"""Codecs of 8 and 4 bits: error bounds, bytes, the same result whatever door, and what they refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from common import VOCAB, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.accuracy import cost, stream_logits
from kv_strategies import Request, Runner, build
from kv_strategies.base import Plain, Site
from kv_strategies.kernels.reference import gather, store_kv, turn
from kv_strategies.quantized import Fp8, Int4, Int8, Key8Value4, bytes_per_token
from kv_strategies.step.store import BlockStore, KVShape
from kv_strategies.step.upstream import with_cache

MODEL = tiny_llama()
CODECS = {"int8": Int8, "fp8": Fp8, "k8v4": Key8Value4, "int4": Int4}


def text(length, seed=0):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def round_trip(codec, key, value, block_size=4):
    """Store K and V [T, H, D] in shuffled slots and read them back, [T, H, D] each."""
    num_tokens, num_heads, head_dim = key.shape
    num_blocks = -(-num_tokens // block_size)
    planes = codec.planes(num_heads, block_size, head_dim, key.dtype)
    layer = BlockStore(num_blocks, 1, planes, torch.device("cpu")).layer(0)
    table = torch.randperm(num_blocks)
    tokens = torch.arange(num_tokens)
    slot_mapping = table[tokens // block_size] * block_size + tokens % block_size
    store_kv(key, value, layer, slot_mapping)
    return [
        gather(*plane, table, tokens).transpose(0, 1) for plane in ((layer.k, layer.k_scale), (layer.v, layer.v_scale))
    ]


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 30),
    num_heads=st.integers(1, 4),
    head_dim=st.sampled_from([2, 16, 64, 128]),
    magnitude=st.sampled_from([1e-20, 1e-4, 1.0, 300.0, 1e5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_the_error_is_bounded(num_tokens, num_heads, head_dim, magnitude, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, num_tokens, num_heads, head_dim, generator=generator) * magnitude
    key[0, 0] = 0
    key[-1, -1, 0] *= 50  # an outlier costs its own head of its own token alone
    key, value = key.to(dtype), value.to(dtype)
    for states, got in zip((key, value), round_trip(Int8(), key, value), strict=True):
        absmax = states.float().abs().amax(-1, keepdim=True)
        assert ((got - states.float()).abs() <= absmax / 253 * 1.001).all()
    for states, got in zip((key, value), round_trip(CODECS["fp8"](), key, value), strict=True):
        states, absmax = states.float(), states.float().abs().amax(-1, keepdim=True)
        # Half a unit of three mantissa bits; below the smallest normal number, 2^-6 of 448, half of 2^-9.
        bound = torch.maximum(states.abs() / 16, absmax / 448 * 2**-10) + absmax / 256 * (states.abs() == absmax)
        assert ((got - states).abs() <= bound * 1.005).all()
    for name, bits in {"int4": (4, 4), "k8v4": (8, 4)}.items():
        for states, got, own in zip((key, value), round_trip(CODECS[name](), key, value), bits, strict=True):
            if own == 4:  # what is turned is rounded, and an error keeps its length when it is turned back
                states, got = turn(states), turn(got)
            absmax = states.float().abs().amax(-1, keepdim=True)
            assert ((got - states.float()).abs() <= absmax / (15 if own == 4 else 253) * 1.005).all()


@settings(max_examples=40, deadline=None)
@given(head_dim=st.integers(1, 130), seed=st.integers(0, 100))
def test_what_is_turned_keeps_lengths_and_turns_back(head_dim, seed):
    q, k = torch.randn(2, 7, head_dim, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close((turn(q) * turn(k)).sum(-1), (q * k).sum(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turn(turn(k)), k, atol=1e-5, rtol=1e-5)
    assert (turn(torch.zeros(head_dim)) == 0).all()
    outlier = torch.zeros(head_dim)
    outlier[seed % head_dim] = 1.0
    assert turn(outlier).abs().max() == pytest.approx((head_dim & -head_dim) ** -0.5)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_zeros_stay_zeros_and_signs_are_kept(name):
    key = torch.tensor([[[0.0, 0.0], [-3.0, 3.0]], [[1.0, -0.5], [-1e-3, 0.0]]])
    got_k, got_v = round_trip(CODECS[name](), key, -key)
    assert torch.equal(got_k.sign(), key.sign()) and torch.equal(got_v, -got_k)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(("head_dim", "ratio"), [(64, 1.93), (96, 1.95), (128, 1.96)])
def test_how_many_tokens_where_bf16_has_one(name, head_dim, ratio):
    codec = CODECS[name]()
    ratio = {"k8v4": 2.55, "int4": 3.7}.get(name, ratio)
    assert bytes_per_token(Plain(), 8, head_dim) / bytes_per_token(codec, 8, head_dim) > ratio
    shape = KVShape(8, 8, head_dim, torch.bfloat16, [torch.device("cpu")] * 3)
    plain, own = (shape.block_bytes(c.planes(8, 16, head_dim, torch.bfloat16)) for c in (Plain(), codec))
    assert plain / own > ratio, "with all alignment"
    assert all(dtype.itemsize == 1 for dtype in codec.dtypes)


@pytest.mark.parametrize("name", CODECS)
def test_the_pool_takes_what_is_said(name):
    plain, strategy = (build(each, MODEL, num_blocks=20) for each in ("paged", name))
    assert strategy.stats()["bytes_per_token"] * 320 == strategy.stats()["kv_bytes"]
    assert plain.stats()["kv_bytes"] / strategy.stats()["kv_bytes"] > 3.5, "the tiny model is float32, heads of 16"


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [17], [5, 30, 31]])
def test_the_result_does_not_depend_on_how_a_text_is_cut(name, cuts):
    """What is read is always what was stored, also of the tokens of the same forward; but for codes that a rounding
    error of the forward itself moves by one.
    """
    ids, strategy = text(40), build(name, MODEL, num_blocks=20, block_size=3)
    cache, logits = strategy.cache(), []
    for begin, end in zip([0, *cuts], [*cuts, 40], strict=True):
        with torch.no_grad():
            logits.append(MODEL(ids[None, begin:end], **with_cache(cache)).logits[0])
    whole = torch.cat([out for _, out in stream_logits(MODEL, build(name, MODEL, num_blocks=20), ids, 40)])
    assert (torch.cat(logits) - whole).norm() / whole.norm() < 0.02


@pytest.mark.parametrize(
    ("name", "bound", "agreed"), [("int8", 0.005, 0.95), ("fp8", 0.1, 0.8), ("k8v4", 0.1, 0.8), ("int4", 0.4, 0.55)]
)
def test_the_cost_is_small(name, bound, agreed):
    ids = torch.stack([text(60, seed) for seed in range(3)])
    measured = cost(MODEL, build(name, MODEL, num_blocks=40), build("baseline", MODEL), ids, chunk=7)
    assert 0 < measured["mean_kl"] < bound
    assert measured["top1_agreement"] > agreed


@pytest.mark.parametrize("name", [*CODECS, "window+int8"])
def test_a_crowd_gets_the_tokens_that_one_alone_would(name):
    """Preempted, in chunks and sharing blocks: each token is the most likely one to the same codec, fed at once."""
    options = {"window": 16, "sinks": 2, "rebase_at": 44} if "window" in name else {}
    requests = [Request(text(6, seed).tolist(), max_new_tokens=40, n=1 + seed % 2) for seed in range(4)]
    crowd = build(name, MODEL, num_blocks=25, block_size=2, **options)
    runner = Runner(MODEL, crowd, max_num_seqs=6, max_batch_tokens=10)
    results = runner.generate(requests)
    crowd.check_integrity()
    assert crowd.pool.num_used == 0 and runner.num_preemptions > 0
    alone = build(name, MODEL, num_blocks=50, block_size=2, **options)
    for result in results:
        ids = torch.tensor([*requests[result.request_id].token_ids, *result.token_ids])
        ((_, logits),) = stream_logits(MODEL, alone, ids, len(ids))
        logits = logits[5:-1]
        assert (logits.max(-1).values - logits.gather(1, ids[6:, None])[:, 0] < 0.2).all(), f"{logits.std()}"


@pytest.mark.upstream
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}])
def test_generate(name, mode):
    ids = text(33).clamp(min=1)[None]
    outs = []
    for block_size in (3, 64):
        strategy = build(name, MODEL, num_blocks=60, block_size=block_size)
        options = {**with_cache(strategy.cache()), "max_new_tokens": 12, "do_sample": False, **mode}
        outs.append(MODEL.generate(ids, **options))
        del options
        strategy.check_integrity()
        assert strategy.pool.num_used == 0
    assert torch.equal(*outs)


def site_on(*devices: torch.device) -> Site:
    return Site(KVShape(8, 8, 64, torch.bfloat16, list(devices)), 16, MODEL.model.rotary_emb)


def test_fp8_is_refused_where_the_gpu_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of compute capability 8\.9 .* A100 \(cuda:1\) has 8\.0"):
        Fp8().bind(site_on(torch.device("cpu"), torch.device("cuda", 1)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    Fp8().bind(site_on(torch.device("cuda", 0)))


@pytest.mark.parametrize("name", ["int8+fp8", "fp8+int8"])
def test_two_codecs_are_refused(name):
    with pytest.raises(ValueError, match="int8 and fp8 both say what bytes encode K and V"):
        build(name, MODEL, num_blocks=4)


def test_the_module_shows_error_and_bytes():
    shown = subprocess.run(
        [sys.executable, "-m", "kv_strategies.quantized"], capture_output=True, text=True, check=True
    )
    assert "1.94 x" in shown.stdout and "1.97 x" in shown.stdout
