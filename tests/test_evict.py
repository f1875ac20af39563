"""Evict: scores against their papers' formulas, rows against a dense model that keeps as many tokens, all bad input."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from common import tiny_llama
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kv_strategies import Request, Runner, build, compaction
from kv_strategies.base import Placement, Site
from kv_strategies.evict import Evict
from kv_strategies.kernels import reference
from kv_strategies.kernels.blocks import triton_compact
from kv_strategies.scores import SCORES, Score, register_score
from kv_strategies.scores import base as scores_base
from kv_strategies.speculative import PromptLookup
from kv_strategies.step.rings import Ring
from kv_strategies.step.store import KVShape
from kv_strategies.step.upstream import with_cache

VOCAB = 200
MODEL = tiny_llama(vocab_size=VOCAB)
DENSE = copy.deepcopy(MODEL)  # never in the hands of a strategy

# --- the formulas of the papers, from K, V [Hkv, n, D] and the last queries [Hq, m, D], a head and a token at a time


def attention(k, q):
    """[Hq, m, n] softmax weights: query i of m stands at token n - m + i."""
    group, num_queries, num_tokens = len(q) // len(k), q.shape[1], k.shape[1]
    paid = torch.zeros(len(q), num_queries, num_tokens)
    for head in range(len(q)):
        for i in range(num_queries):
            seen = num_tokens - num_queries + i + 1
            paid[head, i, :seen] = (k[head // group, :seen] @ q[head, i] / math.sqrt(q.shape[2])).softmax(0)
    return paid


def of_group(per_head, num_kv_heads):
    return torch.stack([heads.mean(0) for heads in per_head.chunk(num_kv_heads)])


def knorm(k, v, q, num_kept, position):
    return -k.square().sum(-1).sqrt()


def keydiff(k, v, q, num_kept, position):
    unit = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # the embedding of a padding token is zero
    anchor = unit.mean(1, keepdim=True)
    return -(unit * anchor).sum(-1) / anchor.norm(dim=-1)


def snapkv(k, v, q, num_kept, position):
    older = k.shape[1] - q.shape[1]
    votes = of_group(attention(k, q).sum(1), len(k))[:, :older]
    pooled = [votes[:, max(0, i - 3) : i + 4].amax(1, keepdim=True) for i in range(older)]
    return torch.cat((*pooled, newest(k, q.shape[1])), 1)


def tova(k, v, q, num_kept, position):
    paid = attention(k, q[:, -1:]).mean((0, 1)).repeat(len(k), 1)
    return torch.cat((paid[:, :-1], newest(k, 1)), 1)


def h2o(k, v, q, num_kept, position):
    paid, recent = of_group(attention(k, q).sum(1), len(k)), num_kept // 2
    return torch.cat((paid[:, : k.shape[1] - recent], newest(k, recent)), 1)


def expected(k, v, q, num_kept, position):
    dim, inv_freq = k.shape[2], MODEL_OF[k.shape[2]].model.rotary_emb.inv_freq

    def rotation(p):  # [D, D]
        cos, sin = torch.diag((p * inv_freq).cos()), torch.diag((p * inv_freq).sin())
        return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))

    first = position + 1 - q.shape[1]
    plain = torch.stack([q[:, i] @ rotation(first + i) for i in range(q.shape[1])], 1)  # R' q, as rows
    ahead = torch.stack([rotation(position + 1 + j) for j in range(512)]).mean(0)
    found = []
    for head in range(len(q)):
        mean, spread = plain[head].mean(0), plain[head] - plain[head].mean(0)
        covariance = ahead @ (spread.mT @ spread / len(spread)) @ ahead.mT
        keys = k[head // (len(q) // len(k))]
        z = keys @ (ahead @ mean) / math.sqrt(dim) + ((keys @ covariance) * keys).sum(-1) / (2 * dim)
        found.append(z.exp() / z.exp().sum())
    score = (of_group(torch.stack(found), len(k)) + 0.02) * v.norm(dim=-1)
    score[:, :4] = math.inf
    return score


def window(k, v, q, num_kept, position):
    recent = torch.arange(k.shape[1]).repeat(len(k), 1).float()
    recent[:, :4] = math.inf
    return recent


def newest(k, count):
    """What stands for tokens that are always kept, the newest first."""
    return 1e6 + torch.arange(count).repeat(len(k), 1).float()


PAPERS = {f.__name__: f for f in (knorm, keydiff, snapkv, tova, h2o, expected, window)}
MODEL_OF = {MODEL.config.head_dim: MODEL}


def kept_by(name, k, v, q, num_kept, position):
    """[Hkv, num_kept] indices, by the paper; of equal scores the earlier."""
    score = PAPERS[name](k, v, q, num_kept, position)
    order = score.argsort(descending=True, stable=True)
    return torch.stack([torch.tensor(sorted(head[:num_kept].tolist())) for head in order])


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("num_tokens, num_kept", [(5, 1), (63, 40), (150, 30), (150, 149), (300, 100)])
@pytest.mark.parametrize("at_once", [1 << 26, 1], ids=["all heads", "a head"])
def test_a_score_keeps_what_its_paper_says(name, num_tokens, num_kept, at_once, monkeypatch):
    monkeypatch.setattr(scores_base, "WEIGHTS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(num_tokens)
    shape = KVShape.of(MODEL)
    evict = Evict(score=name)
    evict.bind(Site(shape, 16, MODEL.model.rotary_emb))
    k, v = torch.randn(2, 2, shape.num_kv_heads, num_tokens, shape.head_dim, generator=generator)  # of two layers
    q = torch.randn(2, shape.num_heads, min(num_tokens, evict.num_queries), shape.head_dim, generator=generator)
    position = num_tokens + 11
    found, is_sound = evict.choose(range(2), k, v, q, num_kept, position)
    assert is_sound.tolist() == [True, True]
    for layer, index in enumerate(found):
        assert torch.equal(index, kept_by(name, k[layer], v[layer], q[layer], num_kept, position))


class Operators(TorchDispatchMode):
    """Counts those that a GPU would launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in ("nonzero", "masked_select", "_local_scalar_dense"), "the host waits"
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*PAPERS, "random"])
def test_layers_are_chosen_for_together(name, monkeypatch):
    """As if each were alone; and layers cost no operators, but for a score that takes them one by one."""
    kept, counts = [], []
    monkeypatch.setattr(Placement, "compact", lambda *args: kept.append(args[-1][0]))
    for num_layers, at_once in ((5, 1), (5, 2), (5, 5), (20, 20)):
        model = tiny_llama(vocab_size=VOCAB, num_layers=num_layers)
        strategy = build("evict", model, num_blocks=24, block_size=4, score=name, keep=0.3)
        monkeypatch.setattr(compaction, "NUMBERS_AT_ONCE", at_once * 83 * strategy.shape.num_kv_heads * 16)
        cache = strategy.cache()
        with torch.inference_mode():
            model(torch.tensor([text(83, 1)]), **with_cache(cache))
        with Operators() as operators:
            cache.compact()
        counts.append(operators.count)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert counts[3] - counts[2] == (15 if name == "random" else 0)


# --- a dense model that keeps as many tokens


class DenseRow:
    """One row through the native cache, cut down to the tokens that a paper would keep."""

    def __init__(self, model, score, cap, every=None):
        self.model, self.score, self.cap, self.every = model, score, cap, every
        self.cache, self.seen = DynamicCache(config=model.config), 0
        self.queries = [[] for _ in model.model.layers]
        self.num_newest = 0  # tokens at the end that stand one behind the other

    def feed(self, ids):
        """Logits [V] behind the last of these tokens."""
        positions = torch.arange(self.seen, self.seen + len(ids))[None]
        hooks = [
            layer.self_attn.q_proj.register_forward_hook(lambda m, i, out, at=at: self.queries[at].append(out))
            for at, layer in enumerate(self.model.model.layers)
        ]
        with torch.inference_mode():
            ids = torch.tensor([ids])
            logits = self.model(ids, position_ids=positions, **with_cache(self.cache), use_cache=True).logits[0, -1]
        for hook in hooks:
            hook.remove()
        self.seen += positions.shape[1]
        self.num_newest += positions.shape[1]
        return logits

    def compact(self, num_kept):
        rotary, dim = self.model.model.rotary_emb, self.model.config.head_dim
        kept = []
        for layer, queries in zip(self.cache.layers, self.queries, strict=True):
            q = torch.cat(queries, 1).view(1, self.seen, -1, dim).transpose(1, 2)
            q, _ = apply_rotary_pos_emb(q, q, *rotary(q, torch.arange(self.seen)[None]))
            count = min({"snapkv": 32, "h2o": 64, "expected": 64}.get(self.score, 1), self.num_newest)
            k, v = layer.keys[0], layer.values[0]
            kept.append(kept_by(self.score, k, v, q[0, :, -count:], num_kept, self.seen - 1))
            index = kept[-1][None, :, :, None].expand(-1, -1, -1, dim)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        self.num_newest = min(num_kept, {"snapkv": 32, "tova": 1, "h2o": num_kept // 2}.get(self.score, 0))
        return kept

    def generate(self, prompt, max_new):
        """Tokens, and the smallest margin between the likeliest two."""
        logits, found, margins = self.feed(prompt), [], []
        cap = self.cap if isinstance(self.cap, int) else math.ceil(round(self.cap * len(prompt), 6))
        is_due = True
        for _ in range(max_new):
            found.append(int(logits.argmax()))
            margins.append(float(logits.topk(2).values.diff().abs()))
            if len(found) == max_new:
                break
            num_stored = self.cache.layers[0].keys.shape[2]
            if is_due or (self.every and num_stored >= cap + self.every):
                is_due = False
                if num_stored > cap:
                    self.compact(cap)
            logits = self.feed([found[-1]])
        return found, min(margins)


def text(length, seed):
    """Each token once: of one that comes twice, layer 0 has two keys of one norm."""
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:length].tolist()


def call(strategy, prompts, max_new, cache=None, **options):
    """The new tokens of each prompt through `generate()`, shorter ones padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = strategy.cache(ids, mask) if cache is None else cache
    out = strategy.model.generate(
        ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False, **options, **with_cache(cache)
    )
    return out[:, width:].tolist()


def run(strategy, prompts, max_new, chunk=2048, **options):
    runner = Runner(strategy.model, strategy, max_num_seqs=4, max_batch_tokens=chunk)
    requests = [Request(prompt, max_new_tokens=max_new, **options) for prompt in prompts]
    found = [result.token_ids for result in runner.generate(requests)]
    strategy.check_integrity()
    return found, runner


@settings(max_examples=40, deadline=None)
@given(
    score=st.sampled_from(list(PAPERS)),
    keep=st.sampled_from([0.1, 0.5, 0.75, 9, 30]),
    every=st.sampled_from([None, None, 1, 5]),
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 4, 16]),
    chunk=st.sampled_from([7, 33, 2048]),
    seed=st.integers(0, 99),
)
def test_both_doors_give_what_a_dense_model_gives(score, keep, every, lengths, block_size, chunk, seed):
    prompts = [text(length, seed + i) for i, length in enumerate(lengths)]
    every = None if score == "knorm" else every  # what is generated may come twice
    # Two keys are as far from their mean as each other, and so are three of which one is zero, that of padding.
    assume(score != "keydiff" or min(lengths) > 30)
    wanted = [DenseRow(DENSE, score, keep, every).generate(prompt, 12) for prompt in prompts]
    sure = [i for i, (_, margin) in enumerate(wanted) if margin > 1e-3]
    options = {"num_blocks": 600 // block_size, "block_size": block_size}
    strategy = build("evict", MODEL, score=score, keep=keep, every=every, **options)
    by_runner, _ = run(strategy, prompts, 12, chunk)
    by_generate = call(strategy, prompts, 12)
    for i in sure:
        assert by_runner[i] == by_generate[i] == wanted[i][0]
    assert strategy.stats()["blocks_used"] == 0


@pytest.mark.parametrize("score, num_queries", [("h2o", 64), ("snapkv", 32), ("tova", 1)])
def test_queries_come_from_wherever_they_were_computed(score, num_queries):
    """A last chunk of one token, a hit that leaves one, a prompt that went back and on: the same tokens are kept."""
    prompt = text(91, 3)
    options = {"num_blocks": 80, "block_size": 4, "score": score, "keep": 70}
    wanted, _ = DenseRow(DENSE, score, 70).generate(prompt, 12)
    strategy = build("evict", MODEL, **options)
    assert run(strategy, [prompt], 12, chunk=30)[0] == [wanted]
    cache = strategy.cache()
    with torch.inference_mode():
        MODEL(torch.tensor([prompt[:80] + text(40, 4)]), **with_cache(cache))
    cache.crop(-41)
    went_on = call(strategy, [prompt], 12, cache)
    assert len(went_on[0]) == 12 and (went_on == [wanted]) == (score != "h2o"), "of 64 queries 29 were written over"
    sharing = build("prefix+evict", MODEL, **options)
    for _ in range(3):
        assert run(sharing, [prompt], 12)[0] == call(sharing, [prompt], 12) == [wanted]
    assert sharing.stats()["hit_tokens"] == 5 * ((91 - num_queries) // 4 * 4)


def test_a_ring_knows_which_queries_it_holds():
    ring = Ring(0, [])
    ring.extend(0, 100)
    assert ring.newest(100, 64) == range(36, 100) and ring.newest(100, 8) == range(92, 100)
    assert ring.newest(50, 64) == range(36, 50), "after a crop: those before 36 were written over"
    ring.extend(50, 10)
    assert ring.newest(60, 64) == range(36, 60)
    ring.extend(60, 64)
    assert ring.newest(124, 64) == range(60, 124)
    ring.extend(20, 5)
    assert ring.newest(25, 64) == range(20, 25), "all that was there stood further on"


@pytest.mark.parametrize("name", PAPERS)
def test_the_default_model_keeps_what_the_paper_says(name, default_model):
    """What is stored, in all layers: K and V of the tokens that the paper keeps, in the order of the tokens. Each word
    comes once, see `text`.
    """
    model, tokenizer = default_model
    MODEL_OF[model.config.head_dim] = model
    words = (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
    )
    prompt = list(
        dict.fromkeys(tokenizer(f"{words} What was it the worst of, and when, and who told us so?").input_ids)
    )
    num_kept = len(prompt) // 3
    dense = DenseRow(model, name, num_kept)
    dense.feed(prompt)
    dense.compact(num_kept)
    strategy = build("evict", model, num_blocks=16, score=name, keep=num_kept)
    cache = strategy.cache()
    call(strategy, [prompt], 1, cache)
    cache.compact()
    (table,) = cache.tables
    assert (table.num_tokens, table.num_seen) == (num_kept, len(prompt))
    blocks, index = torch.from_numpy(table.blocks), torch.arange(num_kept)
    for stored, wanted in zip(strategy.placement.layers(), dense.cache.layers, strict=True):
        torch.testing.assert_close(reference.gather(stored.k, None, blocks, index), wanted.keys[0], atol=1e-3, rtol=0)
        torch.testing.assert_close(reference.gather(stored.v, None, blocks, index), wanted.values[0], atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def default_model():
    from kv_strategies.models import load_model

    return load_model(dtype=torch.float32)


def test_all_kept_is_paged_to_the_bit():
    found = []
    for name, options in (("paged", {}), ("evict", {"keep": 1.0}), ("evict", {"keep": 1.0, "score": "knorm"})):
        strategy = build(name, MODEL, num_blocks=40, block_size=4, **options)
        ids, more = torch.tensor([text(70, 3)]), {"output_logits": True, "return_dict_in_generate": True}
        out = MODEL.generate(ids, max_new_tokens=9, do_sample=False, **more, **with_cache(strategy.cache(ids)))
        found.append(
            (out.sequences, torch.cat(out.logits), run(strategy, [text(50, 4)], 9, 16, temperature=1.0, seed=1)[0])
        )
    for sequences, logits, tokens in found[1:]:
        assert torch.equal(sequences, found[0][0]) and torch.equal(logits, found[0][1]) and tokens == found[0][2]


# --- blocks


def test_what_is_dropped_is_free():
    prompts = [text(128, i) for i in range(8)]
    used = {}
    for name, options in (("paged", {}), ("evict", {"score": "knorm", "keep": 0.25})):
        strategy = build(name, MODEL, num_blocks=8 * 40, block_size=4, **options)
        runner = Runner(MODEL, strategy, max_num_seqs=8, max_batch_tokens=200)
        runner.submit([Request(prompt, max_new_tokens=60) for prompt in prompts])
        while runner.num_waiting or any(seq.num_issued < 3 for seq in runner._running):
            runner.step()
        used[name] = strategy.stats()
    assert used["evict"]["tokens_evicted"] == 8 * 96
    kept = used["paged"]["tokens_stored"] - 8 * 96
    assert used["evict"]["tokens_stored"] == kept
    assert used["evict"]["blocks_used"] <= kept / 4 + 8


def test_a_row_of_any_length_takes_flat_memory():
    strategy = build("evict", MODEL, num_blocks=12, block_size=4, score="keydiff", keep=24, every=8)
    (tokens,), runner = run(strategy, [text(30, 0)], 400)
    assert len(tokens) == 400 and runner.num_preemptions == 0
    cache = strategy.cache()
    call(strategy, [text(30, 0)], 100, cache)
    assert cache.tables[0].num_seen == 129 and cache.tables[0].num_tokens <= 32


def test_samples_and_beams_go_on_from_what_one_of_them_kept():
    strategy = build("evict", MODEL, num_blocks=200, block_size=4, score="tova", keep=0.5, every=6)
    runner = Runner(MODEL, strategy, max_num_seqs=4)
    prompt = text(40, 2)
    runner.submit([Request(prompt, max_new_tokens=30, temperature=1.0, seed=i, n=3) for i in range(1)])
    while not strategy.stats()["tokens_evicted"]:
        runner.step()
    shared = {tuple(seq.table.blocks[:5].tolist()) for seq in runner._running}
    assert len(runner._running) == 3 and len(shared) == 1, "20 tokens, kept once for all three"
    samples = [run(strategy, [prompt], 30, temperature=1.0, seed=s)[0][0] for s in (7,)]
    together = Runner(MODEL, strategy, max_num_seqs=4).generate(
        [Request(prompt, max_new_tokens=30, temperature=1.0, seed=7, n=3)]
    )
    assert together[0].token_ids == samples[0]
    beams = [call(strategy, [prompt], 20, cache, num_beams=3) for cache in (None, strategy.cache())]
    assert beams[0] == beams[1]


@pytest.mark.parametrize("other", ["paged", "int8", "fp8", "int4", "offload", "offload+k8v4"])
def test_bytes_move_as_they_are(other):
    """Codes with their scales, and V wherever it lies."""
    prompt, found = text(50, 1), []
    for name, options in ((other, {}), (f"{other}+evict", {"score": "window", "keep": 21})):
        strategy = build(name, MODEL, num_blocks=20, block_size=4, **options)
        cache = strategy.cache()
        call(strategy, [prompt], 1, cache)
        cache.compact()
        blocks = torch.from_numpy(cache.tables[0].blocks).long()
        found.append([[plane[blocks] for plane in layer if plane is not None] for layer in strategy.placement.layers()])
    kept = torch.tensor([0, 1, 2, 3, *range(33, 50)])
    for whole, left in zip(*found, strict=True):
        for before, after in zip(whole, left, strict=True):
            before, after = (plane.transpose(0, 1).flatten(1, 2).float() for plane in (before, after))
            assert torch.equal(before[:, kept], after[:, :21])


def test_shared_blocks_stay_whole():
    prompt = text(41, 5)
    strategy = build("prefix+evict", MODEL, num_blocks=60, block_size=4, score="knorm", keep=0.5)
    first, _ = run(strategy, [prompt], 8)
    held = strategy.sharing.held_blocks()
    before = strategy.placement.read_blocks(held)
    again, _ = run(strategy, [prompt, prompt[:30] + text(9, 6)], 8)
    assert again[0] == first[0] and strategy.stats()["hit_tokens"] == 40 + 28
    assert torch.equal(strategy.placement.read_blocks(held), before)
    alone = build("evict", MODEL, num_blocks=60, block_size=4, score="knorm", keep=0.5)
    assert again == run(alone, [prompt, prompt[:30] + text(9, 6)], 8)[0]
    assert call(strategy, [prompt], 8) == first, "a hit that leaves a single column is not the end of the prompt"


@pytest.mark.parametrize("name, options", [("evict", {}), ("offload+evict", {"resident": "kv", "host_bytes": 1 << 20})])
def test_a_preempted_row_comes_back_as_it_was(name, options):
    prompts = [text(60, i) for i in range(4)]
    evict = {"score": "snapkv", "keep": 30, "every": 30, **options}
    wanted, _ = run(build(name, MODEL, num_blocks=200, block_size=4, **evict), prompts, 40)
    found, runner = run(build(name, MODEL, num_blocks=34, block_size=4, **evict), prompts, 40)
    assert found == wanted and runner.num_preemptions


def test_guesses_change_no_token():
    """Some of them right, as a repeated prompt makes them; a row is compacted where it would be without any."""
    prompts, options = [text(20, i) * 3 for i in range(2)], {"score": "tova", "keep": 40, "every": 7}
    found = []
    for speculate in (None, PromptLookup()):
        strategy = build("evict", MODEL, num_blocks=80, block_size=4, **options)
        runner = Runner(MODEL, strategy, speculate=speculate)
        found.append([result.token_ids for result in runner.generate([Request(p, max_new_tokens=50) for p in prompts])])
        strategy.check_integrity()
    assert runner.num_proposed and found[0] == found[1]


# --- going back, and on


def test_going_back():
    """As far as the compaction, and no further; what is refused changes nothing."""
    prompt = text(40, 7)
    strategy = build("evict", MODEL, num_blocks=60, block_size=4, score="knorm", keep=0.5)
    cache = strategy.cache()
    tokens = call(strategy, [prompt], 10, cache)[0]
    (table,) = cache.tables
    before = table.num_tokens, table.blocks.tolist(), cache.num_columns
    with pytest.raises(ValueError, match="cannot go back to 39 of 49 tokens: the row was compacted at 40"):
        cache.crop(-10)
    assert (table.num_tokens, table.blocks.tolist(), cache.num_columns) == before
    cache.crop(-6)
    assert call(strategy, [prompt + tokens[:4]], 6, cache)[0] == tokens[4:]
    assert len(call(strategy, [prompt], 10, strategy.cache(), prompt_lookup_num_tokens=3)[0]) == 10
    strategy.check_integrity()


def test_a_question_that_scoring_does_not_see():
    """Context, `compact()`, question: the question stays whole, and the dense model says the same."""
    context, question = text(60, 8), text(9, 9)
    strategy = build("evict", MODEL, num_blocks=60, block_size=4, score="snapkv", keep=0.75)
    cache = strategy.cache()
    with torch.inference_mode():
        MODEL(torch.tensor([context]), **with_cache(cache))
    cache.compact()
    tokens = call(strategy, [context + question], 8, cache)[0]
    dense = DenseRow(DENSE, "snapkv", 45)
    dense.feed(context)
    dense.compact(45)
    logits, wanted = [dense.feed([token]) for token in question][-1], []
    for _ in range(8):
        wanted.append(int(logits.argmax()))
        logits = dense.feed([wanted[-1]])
    assert tokens == wanted and cache.tables[0].num_tokens == 45 + 9 + 7


# --- what fails


class Broken(Score):
    """Gives what it is told to, but for the small examples of `build`."""

    def score(self, keys, values, queries, at):
        score = torch.arange(keys.shape[1]).float().repeat(len(keys), 1)
        if keys.shape[1] < 50 or keys.shape[1] == 100:
            return score
        if self.fault == "shape":
            return score[:, 1:]
        if self.fault == "error":
            return {}[at.layer_idx]
        score.unflatten(0, (at.num_layers, -1))[max(0, 1 - at.layer_idx) :] = float("nan")  # but for layer 0
        return score


@pytest.mark.parametrize("takes_layers", [False, True])
@pytest.mark.parametrize(
    "fault, said",
    [
        ("shape", r"must give \[Hkv, n\], .* got .*"),
        ("nan", "gives NaN in layer 1"),
        ("error", "fails in layer 0: KeyError: 0"),
    ],
)
def test_a_score_that_fails_leaves_its_row_whole(fault, said, takes_layers, monkeypatch):
    monkeypatch.setitem(SCORES, "broken", type("Faulty", (Broken,), {"fault": fault, "takes_layers": takes_layers}))
    prompts = [text(60, 1), text(30, 2)]
    paged = build("paged", MODEL, num_blocks=60, block_size=4)
    strategy = build("evict", MODEL, num_blocks=60, block_size=4, score="broken", keep=0.5, every=4)
    for found, wanted in ((run, run(paged, prompts, 9)[0]), (call, call(paged, prompts, 9))):
        with pytest.warns(UserWarning, match=f"score 'broken' {said}.*the row of 60 tokens is finished exactly"):
            tokens = found(strategy, prompts, 9)
        tokens = tokens if found is call else tokens[0]
        assert tokens[0] == wanted[0] and tokens[1] != wanted[1]
    assert strategy.stats()["rows_left_whole"] == 2 and strategy.stats()["rows_compacted"] > 2


def test_a_score_that_lacks_memory_is_asked_again(monkeypatch):
    """There may be room for it later: the step fails, and the next one tries again."""
    errors = [torch.OutOfMemoryError("no memory")]

    class Large(Score):
        def score(self, keys, values, queries, at):
            if keys.shape[1] == 40 and errors:
                raise errors.pop()
            return torch.zeros(keys.shape[:2])

    monkeypatch.setitem(SCORES, "large", Large)
    strategy = build("evict", MODEL, num_blocks=60, block_size=4, score="large", keep=0.5)
    runner = Runner(MODEL, strategy)
    runner.submit([Request(text(40, 1), max_new_tokens=4)])
    with pytest.raises(torch.OutOfMemoryError):
        while True:
            runner.step()
    while runner.num_running:
        runner.step()
    assert strategy.stats()["rows_compacted"] == 1 and not errors


def test_a_score_that_fails_later(monkeypatch):
    """What was dropped is gone, so that the row is no longer called exact; what is left of it stays."""

    class Later(Score):
        def score(self, keys, values, queries, at):
            return torch.full(keys.shape[:2], float("nan") if at.position == 65 else 0.0)

    monkeypatch.setitem(SCORES, "later", Later)
    strategy = build("evict", MODEL, num_blocks=60, block_size=4, score="later", keep=30, every=6)
    cache = strategy.cache()
    with pytest.warns(UserWarning, match="score 'later' gives NaN in layer 0: the row of 66 tokens is not compacted"):
        call(strategy, [text(60, 1)], 20, cache)
    assert cache.tables[0].num_tokens == 30 + 19 and strategy.stats()["rows_left_whole"] == 1


def test_a_compaction_that_fails_half_way(monkeypatch):
    """The runner computes the row again; a cache is empty, and can be used again."""
    prompt, compact = text(40, 1), Placement.compact
    strategy = build("evict", MODEL, num_blocks=60, block_size=4, score="knorm", keep=0.5)
    (wanted,), _ = run(strategy, [prompt], 8)

    def fails(*args):
        monkeypatch.setattr(Placement, "compact", compact)
        compact(*args)
        raise MemoryError

    runner = Runner(MODEL, strategy)
    runner.submit([Request(prompt, max_new_tokens=8)])
    events = runner.step()
    monkeypatch.setattr(Placement, "compact", fails)
    with pytest.raises(MemoryError):
        runner.step()
    while len(events) < 8:
        events += runner.step()
    assert [event.token_id for event in events] == wanted
    cache = strategy.cache()
    monkeypatch.setattr(Placement, "compact", fails)
    with pytest.raises(MemoryError):
        call(strategy, [prompt], 8, cache)
    assert cache.num_columns == 0 and strategy.stats()["blocks_used"] == 0
    assert call(strategy, [prompt], 8, cache) == [wanted]


def test_a_short_prompt_stays_whole():
    prompts = [text(20, 1), text(31, 2)]
    paged = run(build("paged", MODEL, num_blocks=60), prompts, 9)[0]
    strategy = build("evict", MODEL, num_blocks=60, keep=31)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(strategy, prompts, 9)[0] == paged and call(strategy, prompts, 9) == paged
    assert strategy.stats()["tokens_evicted"] == 0


def test_a_share_of_next_to_nothing_is_a_token():
    """A row of none would count as one that was lost."""
    prompt = text(40, 1)
    strategies = [build("evict", MODEL, num_blocks=60, score="tova", keep=keep) for keep in (1e-9, 1)]
    found = [(run(strategy, [prompt], 9)[0], strategy.stats()["tokens_evicted"]) for strategy in strategies]
    assert found[0] == found[1] and found[0][1] == 39


class TooMany(Score):
    num_queries = 65


class Flat(Score):
    def score(self, keys, values, queries, at):
        return keys.sum()


class Duck:
    num_queries, reads_values, takes_layers, score = 0, False, False, Flat.score


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": 0}, "keep must be at least 1 token, or a share in"),
        ({"keep": 0.0}, "keep as a share must be in"),
        ({"keep": 1.5}, "keep as a share must be in"),
        ({"keep": -1}, "keep must be at least 1 token"),
        ({"keep": "half"}, "keep takes a number or a whole number, got 'half'"),
        ({"keep": float("nan")}, "keep takes a number"),
        ({"keep": True}, "keep takes a number"),
        ({"keep": 321}, "keep is 321 tokens and the pool holds 320"),
        ({"every": 0}, "every must be at least 1"),
        ({"score": "best"}, "unknown score 'best'; known are knorm, keydiff, snapkv, tova"),
        ({"score": 3}, "score takes text"),
        ({"score": "flat"}, r"score 'flat' must give \[Hkv, n\], floats"),
        ({"score": "a duck"}, "score 'a duck' is a Duck, and no `kv_strategies.scores.Score`"),
        ({"score": "too many"}, "asks for 65 queries, and the last 64 are kept"),
        ({"name": "evict+offload", "top_n": 8}, "choose one"),
        ({"name": "evict+offload", "mass": 0.9}, "choose one"),
        ({"name": "window+evict"}, "window and evict: a mask names tokens by their index.*choose one"),
    ],
)
def test_refused(options, message, monkeypatch):
    monkeypatch.setitem(SCORES, "flat", Flat)
    monkeypatch.setitem(SCORES, "too many", TooMany)
    monkeypatch.setitem(SCORES, "a duck", Duck)
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        build(options.pop("name", "evict"), MODEL, num_blocks=20, **options)


@pytest.mark.parametrize("name, make", [("knorm", Flat), ("", Flat), (None, Flat), ("mine", 3)])
def test_registrations_refused(name, make):
    known = dict(SCORES)
    with pytest.raises(ValueError):
        register_score(name, make)
    assert known == SCORES


# --- kernels


@pytest.mark.parametrize("dtype, rest", [(torch.bfloat16, (20,)), (torch.int8, (16,)), (torch.bfloat16, ())])
@pytest.mark.parametrize("num_kept", [1, 13, 150])
def test_triton_moves_what_the_reference_moves(dtype, rest, num_kept, device):
    generator = torch.Generator().manual_seed(num_kept)
    num_tokens, size = 199, 3
    plane = torch.randint(-99, 99, (80, 2, 3, size, *rest), generator=generator).to(dtype)
    sources = torch.randperm(70, generator=generator)[: -(-num_tokens // size)]
    targets = sources[: -(-num_kept // size)].clone()
    targets[::2] = torch.arange(70, 80).repeat(3)[: len(targets[::2])] if len(targets) <= 20 else targets[::2]
    kept = torch.rand(2, 3, num_tokens, generator=generator).topk(num_kept).indices.sort().values
    wanted = plane.clone()
    reference.compact(wanted, sources, targets, kept)
    moved = plane.clone().to(device)
    triton_compact.compact(moved, *(tensor.to(device) for tensor in (sources, targets, kept)))
    assert torch.equal(moved.cpu(), wanted) and not torch.equal(wanted, plane)


@pytest.mark.gpu
@pytest.mark.parametrize("score, every", [("tova", 7), ("snapkv", None), ("expected", 16), ("knorm", 1)])
def test_the_runner_on_a_gpu(score, every, device):
    """With graphs and without: also while rings grow and steps are captured again."""
    model = copy.deepcopy(MODEL).to(device)
    found = []
    for cuda_graphs in (True, False):
        strategy = build("evict", model, num_blocks=400, score=score, keep=0.5, every=every)
        runner = Runner(model, strategy, max_num_seqs=8, max_batch_tokens=64, cuda_graphs=cuda_graphs)
        found.append([])
        for count in (1, 3, 8):
            requests = [Request(text(30 + 17 * i, i), max_new_tokens=40) for i in range(count)]
            found[-1].append([result.token_ids for result in runner.generate(requests)])
        strategy.check_integrity()
    assert found[0] == found[1]


def test_the_module_shows_a_table_as_it_evolves():
    out = subprocess.run([sys.executable, "-m", "kv_strategies.evict"], capture_output=True, text=True, check=True)
    assert "kept" in out.stdout and "memory stays flat" in out.stdout
