"""The window against its definition, spelt out query by query; rebasing against not rebasing; blocks counted."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from common import VOCAB, random_requests, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bench.accuracy import cost, recomputed_nll, stream_logits, stream_nll
from kv_strategies import Request, Runner, build
from kv_strategies.kernels.blocks import cpu
from kv_strategies.paged import OutOfBlocks
from kv_strategies.step.plan import NULL_BLOCK
from kv_strategies.step.upstream import with_cache
from kv_strategies.window import SlidingWindow

MODEL = tiny_llama()
SIZES = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9)).map(
    lambda sizes: {"window": max(sizes), "sinks": sizes[1], "block_size": sizes[2]}
)


def text(length, seed=0):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def oracle(model, ids, window, sinks):
    """Logits [n, V]. What a query sees is laid out as in a small cache and rotated to its place there."""
    hidden = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        attn, normed = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (proj(normed).unflatten(-1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
        for p in range(len(ids)):
            seen = [j for j in range(p + 1) if j > p - window or j < sinks]
            cos, sin = model.model.rotary_emb(hidden, torch.arange(len(seen))[None])
            queries = q[p].expand(len(seen), -1, -1)  # the last of them is the one that stands behind all it sees
            queries, keys = apply_rotary_pos_emb(queries[None], k[seen][None], cos, sin, unsqueeze_dim=2)
            keys, values = (x.repeat_interleave(group, dim=1) for x in (keys[0], v[seen]))
            weights = (torch.einsum("hd,shd->hs", queries[0, -1], keys) * attn.scaling).softmax(-1)
            out[p] = torch.einsum("hs,shd->hd", weights, values)
        hidden = hidden + attn.o_proj(out.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(model.model.norm(hidden))


def through_generate(strategy, ids, cuts):
    """Logits [n, V] by the door of generate(), and its table's blocks watched after each forward."""
    cache, logits = strategy.cache(), []
    for piece in ids.split([b - a for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]):
        with torch.no_grad():
            logits.append(MODEL(piece[None], **with_cache(cache)).logits[0])
        strategy.check_integrity()
    return torch.cat(logits)


def through_stream(strategy, ids, chunk):
    logits = []
    for _, piece in stream_logits(MODEL, strategy, ids, chunk):
        logits.append(piece)
        strategy.check_integrity()
    assert strategy.pool.num_used == 0
    return torch.cat(logits)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=SIZES,
    length=st.integers(1, 45),
    cuts=st.sets(st.integers(1, 44), max_size=12),
    chunk=st.integers(1, 20),
)
def test_exact_to_the_definition_however_the_text_is_cut(sizes, length, cuts, chunk):
    ids = text(length)
    expected = oracle(MODEL, ids, sizes["window"], sizes["sinks"])
    options = {"num_blocks": -(-60 // sizes["block_size"]), **sizes}
    got = through_generate(build("window", MODEL, **options), ids, sorted(cut for cut in cuts if cut < length))
    assert_close(got, expected, rtol=1e-3, atol=1e-3)
    rebase_at = 2 * (sizes["window"] + sizes["sinks"] + sizes["block_size"])
    got = through_stream(build("window", MODEL, rebase_at=rebase_at, **options), ids, chunk)
    assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_without_sinks_it_is_an_ordinary_sliding_window():
    """The same model, eager attention, the mask spelt out: nothing of ours takes part."""
    ids, window = text(50), 7
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    query, key = torch.arange(50)[:, None], torch.arange(50)
    mask = torch.zeros(50, 50).masked_fill((key > query) | (key <= query - window), torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = eager(ids[None], attention_mask=mask[None, None], use_cache=False).logits[0]
    strategy = build("window", MODEL, window=window, sinks=0, block_size=3, num_blocks=20)
    assert_close(through_generate(strategy, ids, [31, 32, 33, 40]), expected, rtol=1e-4, atol=1e-4)
    assert_close(oracle(MODEL, ids, window, 0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings(rope):
    model = tiny_llama(rope_parameters={"rope_theta": 10_000.0, **rope}, num_layers=1)
    strategy = build("window", model, window=8, sinks=3, block_size=2, num_blocks=20, rebase_at=26)
    got = torch.cat([logits for _, logits in stream_logits(model, strategy, text(60), 5)])
    assert_close(got, oracle(model, text(60), 8, 3), rtol=1e-3, atol=1e-3)


def test_short_rows_are_those_of_the_native_cache():
    """As long as everything is in sight, a window changes nothing."""
    requests = random_requests(random.Random(2), 8)
    results = Runner(MODEL, build("window", MODEL, num_blocks=64), max_num_seqs=8).generate(requests)
    plain = Runner(MODEL, build("paged", MODEL, num_blocks=64), max_num_seqs=8).generate(requests)
    assert [result.token_ids for result in results] == [result.token_ids for result in plain]


# --- the two doors, to the token


def check_greedy(prompt, output, window, sinks):
    logits = oracle(MODEL, torch.tensor([*prompt, *output]), window, sinks)[len(prompt) - 1 : -1]
    best = logits.max(-1).values
    assert (best - logits.gather(1, torch.tensor(output)[:, None])[:, 0] < 1e-3).all(), "not the most likely token"


@pytest.mark.parametrize("mode", [{}, {"prefill_chunk_size": 8}, {"prompt_lookup_num_tokens": 3}])
def test_generate(mode):
    strategy = build("window", MODEL, window=5, sinks=3, block_size=2, num_blocks=60)
    lengths = (33,) if "prompt_lookup_num_tokens" in mode else (33, 33, 12)
    ids = torch.stack([text(max(lengths), seed) for seed in range(len(lengths))])
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - length for length in lengths]).long()
    out = MODEL.generate(
        ids, attention_mask=mask, **with_cache(strategy.cache()), max_new_tokens=20, do_sample=False, **mode
    )
    for row, length in zip(out, lengths, strict=True):
        row = row[max(lengths) - length :].tolist()
        check_greedy(row[:length], row[length:], 5, 3)
    strategy.check_integrity()
    assert strategy.pool.num_used == 0


def test_beams_fork_tables_with_freed_blocks():
    ids, outs = text(30).clamp(min=1)[None], []
    for block_size in (2, 8):
        strategy = build("window", MODEL, window=8, sinks=2, block_size=block_size, num_blocks=80)
        options = {**with_cache(strategy.cache()), "max_new_tokens": 24, "num_beams": 3, "do_sample": False}
        outs.append(MODEL.generate(ids, **options))
        del options
        strategy.check_integrity()
        assert strategy.pool.num_used == 0
    assert torch.equal(*outs)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1000),
    sizes=SIZES,
    chunk=st.integers(1, 30),
    spare=st.integers(0, 20),
    epoch=st.integers(0, 20),
)
def test_any_schedule_of_the_runner_is_exact_to_the_definition(seed, sizes, chunk, spare, epoch):
    """Preemptions, chunks, samples that share blocks, rebases; the pool no larger than one row may need."""
    window, sinks, block_size = sizes.values()
    lengths = torch.randint(1, 40, (4,), generator=torch.Generator().manual_seed(seed)).tolist()
    requests = [Request(text(n, i).tolist(), max_new_tokens=1 + seed % 20, n=1 + i % 2) for i, n in enumerate(lengths)]
    rebase_at = 2 * (window + sinks + block_size) + epoch
    needed = SlidingWindow(window=window, sinks=sinks).num_blocks(60, chunk + 4, block_size)
    strategy = build("window", MODEL, num_blocks=needed + spare, rebase_at=rebase_at, **sizes)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=4 + chunk)
    runner.submit(requests)
    results = []
    while runner.num_running or runner.num_waiting:
        results += [event.result for event in runner.step() if event.result is not None]
        strategy.check_integrity()
        for table in strategy.pool.tables:
            assert table.num_tokens < rebase_at + chunk + 4 + block_size or not table.num_tokens
    assert strategy.pool.num_used == 0
    assert len(results) == sum(request.n for request in requests)
    for result in results:
        check_greedy(requests[result.request_id].token_ids, result.token_ids, window, sinks)


def test_preempted_rows_go_on_where_they_were():
    """Rows below the window grow and push each other out; beyond it they take no more."""
    requests = [Request(text(6, i).tolist(), max_new_tokens=50) for i in range(4)]
    strategy = build("window", MODEL, window=18, sinks=2, block_size=2, num_blocks=25, rebase_at=44)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=12)
    for request, result in zip(requests, runner.generate(requests), strict=True):
        check_greedy(request.token_ids, result.token_ids, 18, 2)
    assert runner.num_preemptions > 0


@torch.no_grad()
def test_rows_that_change_places_take_their_positions_along():
    """Sinks are turned by the distance to where a row begins, wherever its positions do."""
    ids, starts = torch.stack([text(30, 1), text(30, 2)]), torch.tensor([[0], [50]])
    order, last = torch.tensor([1, 0, 1]), []
    for rows in (torch.arange(2), order):
        strategy = build("window", MODEL, window=8, sinks=3, block_size=4, num_blocks=60)
        cache = strategy.cache()
        MODEL(ids[:, :29], position_ids=starts + torch.arange(29), **with_cache(cache))
        cache.reorder_cache(rows)
        last.append(MODEL(ids[rows, 29:], position_ids=starts[rows] + 29, **with_cache(cache)).logits)
    assert_close(last[1], last[0][order], rtol=1e-4, atol=1e-4)


# --- what it saves


def test_blocks_out_of_sight_return_at_once():
    strategy = build("window", MODEL, window=8, sinks=3, block_size=4, num_blocks=40)
    cache = strategy.cache()
    for n in range(1, 60):
        with torch.no_grad():
            MODEL(text(60)[None, n - 1 : n], **with_cache(cache))
        (table,) = cache.tables
        first_seen = max(0, n - 8)  # by the query that was just computed
        held = [place for place, block in enumerate(table.blocks) if block != NULL_BLOCK]
        assert held == [0, *range(max(1, first_seen // 4), -(-n // 4))]
        assert strategy.stats()["blocks_used"] == len(held)
        assert strategy.stats()["tokens_stored"] <= strategy.stats()["token_places"]


@pytest.mark.parametrize("chunk", [1, 64])
def test_a_long_stream_stays_flat(chunk):
    """Many epochs; the tables stay short, and the logits those of a run that is never rebased, to its own rounding."""
    length = 300 if chunk == 1 else 5000
    ids, sizes = text(length), {"window": 24, "sinks": 4, "block_size": 4}
    strategy = build("window", MODEL, num_blocks=24, rebase_at=100, **sizes)
    used, kept = set(), []
    for begin, logits in stream_logits(MODEL, strategy, ids, chunk):
        (table,) = [table for table in strategy.pool.tables if table.num_tokens]
        assert table.num_seen == begin + len(logits)
        assert table.num_tokens < 100 + 2 * chunk and len(table.blocks) < 70
        used.add(strategy.pool.num_used)
        kept.append(logits)
    assert max(used) <= strategy.retention.num_blocks(10**9, chunk, 4)
    never = build("window", MODEL, num_blocks=24, rebase_at=10**6, **sizes)
    whole = torch.cat([logits for _, logits in stream_logits(MODEL, never, ids, chunk)])
    assert (torch.cat(kept) - whole).norm() / whole.norm() < 1e-4
    assert_close(torch.cat(kept)[:400], whole[:400], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spare", [0, 1, 7, 30])
def test_prompts_come_in_chunks_that_the_pool_has_room_for(spare):
    """Whatever `max_batch_tokens` is: what a window keeps is what all of a chunk sees."""
    sizes = {"window": 16, "sinks": 4, "block_size": 4}
    least = SlidingWindow(window=16, sinks=4).num_blocks(10**6, 1, 4)
    strategy = build("window", MODEL, num_blocks=least + spare, **sizes)
    runner = Runner(MODEL, strategy, max_num_seqs=3)
    requests = [Request(text(length, length).tolist(), max_new_tokens=9) for length in (150, 30, 1, 90)]
    results = runner.generate(requests)
    for request, result in zip(requests, results, strict=True):
        check_greedy(request.token_ids, result.token_ids, 16, 4)
    assert strategy.pool.num_used == 0


def test_rows_longer_than_pool_and_model_run_through_the_runner():
    strategy = build("window", MODEL, window=16, sinks=4, block_size=4, num_blocks=40, rebase_at=64)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=60)
    (result,) = runner.generate([Request(text(600).tolist(), max_new_tokens=8)])
    assert len(result.token_ids) == 8
    plain = build("paged", MODEL, num_blocks=40, block_size=4)
    with pytest.raises(ValueError, match="exceed the model's context"):
        Runner(MODEL, plain).generate([Request(text(600).tolist(), max_new_tokens=8)])


def test_one_forward_of_generate_needs_the_whole_prompt_unless_it_is_cut():
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(1, 200, dtype=torch.long)}
    strategy = build("window", MODEL, window=16, sinks=4, block_size=4, num_blocks=20)
    with pytest.raises(OutOfBlocks, match="the pool of 80 tokens is too small"):
        MODEL.generate(text(200)[None], **with_cache(strategy.cache()), **options)
    out = MODEL.generate(text(200)[None], **with_cache(strategy.cache()), prefill_chunk_size=32, **options)
    check_greedy(text(200).tolist(), out[0, 200:].tolist(), 16, 4)


def test_samples_that_share_blocks_are_rebased_apart():
    strategy = build("window", MODEL, window=16, sinks=3, block_size=4, num_blocks=64, rebase_at=48)
    prompt = text(46).tolist()
    results = Runner(MODEL, strategy, max_num_seqs=4).generate([Request(prompt, max_new_tokens=30, n=3)])
    for result in results:
        check_greedy(prompt, result.token_ids, 16, 3)
    assert strategy.pool.num_used == 0


def test_a_rebase_without_room_for_copies_waits():
    strategy = build("window", MODEL, window=4, sinks=0, block_size=2, num_blocks=8, rebase_at=12)
    table = strategy.open_table(())
    for _ in range(13):
        strategy.reserve([(table, 1)])
    strategy.retire([table])
    twin = table.fork()
    blocker = strategy.open_table(())
    blocker.append(2 * strategy.pool.num_free)
    strategy.rebase([table])
    assert table.num_tokens == 13 and table.num_cut == 0, "left as it was"
    blocker.release()
    strategy.rebase([table, twin])
    assert table.num_seen == twin.num_seen == 13 and 0 < table.num_tokens < 12
    assert set(table.blocks.tolist()).isdisjoint(twin.blocks.tolist())
    strategy.check_integrity()


# --- going back


def test_crop_goes_back_as_far_as_blocks_are_held():
    strategy = build("window", MODEL, window=8, sinks=2, block_size=2, num_blocks=40)
    ids = text(40)
    cache = strategy.cache()
    with torch.no_grad():
        MODEL(ids[None, :24], **with_cache(cache))
        cache.crop(-3)  # of the last forward: nothing has been freed since
        again = MODEL(ids[None, 21:26], **with_cache(cache)).logits[0]
    assert_close(again, oracle(MODEL, ids[:26], 8, 2)[21:], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="cannot go back to 12 of 26 tokens"):
        cache.crop(12)
    assert cache.get_seq_length() == 26
    strategy.check_integrity()


# --- composition


@pytest.mark.parametrize(("codec", "cost"), [("int8", 0.05), ("fp8", 0.3)])
def test_with_a_codec_keys_are_turned_through_their_codes(codec, cost):
    ids, sizes = text(300), {"window": 24, "sinks": 4, "block_size": 4, "num_blocks": 40}
    runs = [
        build(f"window+{codec}", MODEL, rebase_at=80, **sizes),
        build(f"window+{codec}", MODEL, rebase_at=10**6, **sizes),
        build("window", MODEL, rebase_at=80, **sizes),
    ]
    rebased, never, exact = (torch.cat([out for _, out in stream_logits(MODEL, run, ids, 16)]) for run in runs)
    assert not torch.equal(rebased, never), "codes are rounded once more when they are turned"
    for other in (never, exact):
        assert (rebased - other).norm() / other.norm() < cost


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_runner_on_a_gpu(cuda_graphs, device):
    """A captured step turns its queries by the positions of each replay, across rebases."""
    model = tiny_llama().to(device)
    strategy = build("window", model, window=16, sinks=3, block_size=4, num_blocks=80, rebase_at=48)
    requests = [Request(text(30 + seed, seed).tolist(), max_new_tokens=60) for seed in range(3)]
    runner = Runner(model, strategy, max_num_seqs=4, max_batch_tokens=24, cuda_graphs=cuda_graphs)
    for request, result in zip(requests, runner.generate(requests), strict=True):
        check_greedy(request.token_ids, result.token_ids, 16, 3)
    strategy.check_integrity()
    assert strategy.pool.num_used == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["window", "window+int8", "window+fp8"])
@pytest.mark.parametrize("chunk", [1, 50])
def test_streams_on_a_gpu_and_on_a_cpu_agree(name, chunk, device):
    sizes = {"window": 24, "sinks": 4, "block_size": 4, "num_blocks": 40, "rebase_at": 80}
    outs = []
    for model in (MODEL, tiny_llama().to(device)):
        pieces = stream_logits(model, build(name, model, **sizes), text(200), chunk)
        outs.append(torch.cat([logits.cpu() for _, logits in pieces]))
    assert (outs[0] - outs[1]).norm() / outs[0].norm() < {"window": 1e-3, "window+int8": 0.05, "window+fp8": 0.3}[name]


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8}, "a window of 8 tokens is smaller than a block of 16"),
        ({"window": 0, "sinks": 0}, "the window must be at least 1 token"),
        ({"window": 20, "sinks": 21}, "as many as the sinks, got 20 and 21"),
        ({"sinks": -1}, "sinks must be 0 or more, got -1"),
        ({"window": 100, "rebase_at": 200}, "rebase_at must be at least 240, twice what a row keeps, got 200"),
        ({"widow": 100}, "unknown option widow: 'window' takes rebase_at, sinks, window"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build("window", MODEL, num_blocks=4, **options)


def test_a_rotary_embedding_that_depends_on_the_length_is_refused():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="'dynamic' change their frequencies"):
        build("window", tiny_llama(rope_parameters=rope), num_blocks=4)


def test_a_pool_too_small_for_the_window_is_refused_at_once():
    strategy = build("window", MODEL, window=64, sinks=4, block_size=4, num_blocks=17)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=32)
    runner.generate([Request(text(40).tolist(), max_new_tokens=4)])
    with pytest.raises(ValueError, match="exceed the pool of 68 tokens; with this prompt at most 19 new"):
        runner.generate([Request(text(50).tolist(), max_new_tokens=40)])


# --- measuring it


def test_nll_of_a_stream_and_of_recomputing():
    ids = text(90)
    strategy = build("window", MODEL, window=12, sinks=2, block_size=4, num_blocks=30, rebase_at=40)
    nll = torch.cat([piece for _, piece in stream_nll(MODEL, strategy, ids, 7)])
    expected = -oracle(MODEL, ids, 12, 2).log_softmax(-1)[torch.arange(89), ids[1:]]
    assert_close(nll, expected, rtol=1e-3, atol=1e-3)

    shallow = tiny_llama(num_layers=1)  # with one layer, recomputing the window is the window
    places = [13, 50, 88]
    exact = -oracle(shallow, ids, 12, 2).log_softmax(-1)[places, ids[[p + 1 for p in places]]]
    assert_close(recomputed_nll(shallow, ids, places, window=12, sinks=2, batch=2), exact, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="places must be from 13 to 88"):
        recomputed_nll(shallow, ids, [12], window=12, sinks=2)


@pytest.mark.parametrize("chunk", [1, 9])
def test_cost_compares_with_the_baseline(chunk):
    ids, baseline = torch.stack([text(40, 1), text(40, 2)]), build("baseline", MODEL)
    same = cost(MODEL, build("paged", MODEL, num_blocks=20), baseline, ids, num_prompt=13, chunk=chunk)
    assert same["perplexity"] == pytest.approx(same["baseline_perplexity"], rel=1e-4)
    assert abs(same["mean_kl"]) < 1e-5 and same["top1_agreement"] == 1 and same["num_judged"] == 2 * 26
    window = build("window", MODEL, window=4, sinks=2, block_size=2, num_blocks=60)
    lossy = cost(MODEL, window, baseline, ids, chunk=chunk)
    assert lossy["mean_kl"] > 0.01 and lossy["num_judged"] == 2 * 39
    logits = [oracle(MODEL, row, 4, 2).log_softmax(-1)[:-1] for row in ids]
    nll = torch.stack([-logit[torch.arange(39), row[1:]] for logit, row in zip(logits, ids, strict=True)])
    assert lossy["perplexity"] == pytest.approx(nll.mean().exp().item(), rel=1e-3)


def test_the_module_shows_a_table_as_it_evolves():
    shown = subprocess.run([sys.executable, "-m", "kv_strategies.window"], capture_output=True, text=True, check=True)
    assert "[ 0 . . . . 5 6 7 ]" in shown.stdout and "rebased" in shown.stdout


def test_a_window_that_hides_nothing_is_no_window(monkeypatch):
    """On a CPU its prompts and short rows take the way of plain ones, which is faster."""
    requests = [Request(text(length, seed=length).tolist(), max_new_tokens=6) for length in (5, 30, 44)]
    expected = [result.token_ids for result in Runner(MODEL, build("paged", MODEL, num_blocks=90)).generate(requests)]
    monkeypatch.setattr(cpu, "windowed_prefill", None)
    window = build("window", MODEL, num_blocks=90, window=46, sinks=4)
    assert [result.token_ids for result in Runner(MODEL, window).generate(requests)] == expected
