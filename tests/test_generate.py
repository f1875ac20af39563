"""Plain generate(): the same tokens as DynamicCache in every mode, and clear errors for what a strategy cannot do."""

from __future__ import annotations

import gc

import pytest
import torch
from common import VOCAB, tiny_llama
from transformers import DynamicCache

from kv_strategies import build, registry
from kv_strategies.kernels.blocks import cpu
from kv_strategies.paged import OutOfBlocks
from kv_strategies.step import fused
from kv_strategies.step.upstream import with_cache

MODEL = tiny_llama()
LENGTHS = (37, 32, 17)


def batch(lengths=LENGTHS):
    ids = torch.randint(0, VOCAB, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def run(cache, model=MODEL, inputs=None, **options):
    torch.manual_seed(7)
    inputs = batch() if inputs is None else inputs
    return model.generate(**inputs, **with_cache(cache), max_new_tokens=24, **options)


SIZES = {
    "paged": {"num_blocks": 100, "block_size": 5},
    "contiguous": {"num_blocks": 18},  # nine beams, and for each a block to copy into
}
MODES = {
    "greedy": {},
    "no padding": {"inputs": batch((20, 20))},
    "one token prompt": {"inputs": batch((1,))},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 8},
    "chunked prefill without padding": {"prefill_chunk_size": 5, "inputs": batch((33, 33))},
    "return sequences": {"num_return_sequences": 3, "do_sample": True},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3},
    "draft model": {"assistant_model": tiny_llama(seed=1), "inputs": batch((21,))},
    "sampled draft model": {"assistant_model": tiny_llama(seed=1), "inputs": batch((21,)), "do_sample": True},
    "good draft model": {"assistant_model": tiny_llama(), "inputs": batch((21,))},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "inputs": batch((45,))},
}


def test_padding_is_not_computed(monkeypatch):
    """The layers see the tokens of a padded prompt alone; where somebody looks at each layer, what upstream's see."""
    shapes, run_stack = [], fused.FusedStack.__call__

    def recorded(stack, hidden_states, **options):
        shapes.append(tuple(hidden_states.shape[:2]))
        return run_stack(stack, hidden_states, **options)

    monkeypatch.setattr(fused.FusedStack, "__call__", recorded)
    out = run(build("paged", MODEL, **SIZES["paged"]).cache())
    assert shapes == [(1, sum(LENGTHS)), *[(len(LENGTHS), 1)] * 23]
    assert torch.equal(out, run(DynamicCache()))
    looked_at = MODEL.model.layers[0].register_forward_hook(lambda *_: shapes.append("hook"))
    try:
        shapes.clear()
        assert torch.equal(out, run(build("paged", MODEL, **SIZES["paged"]).cache())) and set(shapes) == {"hook"}
    finally:
        looked_at.remove()


@pytest.mark.upstream
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["paged", "contiguous"])
def test_same_tokens_as_dynamic_cache(name, mode):
    strategy = build(name, MODEL, **SIZES[name])
    expected = run(DynamicCache(config=MODEL.config), **MODES[mode])
    assert torch.equal(run(strategy.cache(), **MODES[mode]), expected)
    strategy.check_integrity()
    assert strategy.stats()["blocks_used"] == 0, "the cache did not give its blocks back"


@pytest.mark.upstream
@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 64, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_block_sizes_and_grouped_heads(block_size, heads):
    model = tiny_llama(num_heads=heads[0], num_kv_heads=heads[1])
    strategy = build("paged", model, num_blocks=4 + 300 // block_size, block_size=block_size)
    expected = run(DynamicCache(config=model.config), model=model)
    assert torch.equal(run(strategy.cache(), model=model), expected)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_head_sizes_and_dtypes(head_dim, dtype):
    model = tiny_llama(head_dim=head_dim).to(dtype)
    strategy = build("paged", model, num_blocks=100, block_size=5)
    inputs = {key: value[:, -9:] for key, value in batch((9, 9)).items()}
    with torch.no_grad():
        expected = model(**inputs).logits.float()
        logits = model(**inputs, **with_cache(strategy.cache())).logits.float()
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert (logits - expected).norm() / expected.norm() < tolerance


@pytest.mark.upstream
def test_a_second_turn_continues_the_cache():
    strategy, turns = build("paged", MODEL, num_blocks=100, block_size=5), []
    more = torch.randint(0, VOCAB, (2, 6))
    for cache in (DynamicCache(config=MODEL.config), strategy.cache()):
        first = MODEL.generate(**batch((20, 20)), **with_cache(cache), max_new_tokens=8)
        ids = torch.cat([first, more], dim=1)
        mask = torch.ones_like(ids)
        turns.append(MODEL.generate(ids, attention_mask=mask, **with_cache(cache), max_new_tokens=8))
    assert torch.equal(*turns)


@pytest.mark.upstream
def test_crop_takes_both_sign_conventions():
    strategy = build("paged", MODEL, num_blocks=100, block_size=5)
    ids = batch((30,))["input_ids"]
    for remove in (-7, 23):  # seven columns off, or 23 left
        cache = strategy.cache()
        with torch.no_grad():
            MODEL(ids, **with_cache(cache))
            cache.crop(remove)
            assert cache.get_seq_length() == 23
            again = MODEL(ids[:, 23:], **with_cache(cache)).logits
            torch.testing.assert_close(again, MODEL(ids).logits[:, 23:], rtol=1e-4, atol=1e-4)
        cache.crop(0)
        cache.crop(100)
        assert cache.get_seq_length() == 30
        strategy.check_integrity()


def test_a_mask_with_holes_hides_what_it_says():
    ids = batch((12, 12))["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, [2, 5, 6]] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    strategy = build("paged", MODEL, num_blocks=20, block_size=4)
    with torch.no_grad():
        expected = MODEL(ids, attention_mask=mask, position_ids=positions).logits
        logits = MODEL(ids, attention_mask=mask, position_ids=positions, **with_cache(strategy.cache())).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_beams_share_their_prompt():
    strategy = build("paged", MODEL, num_blocks=100, block_size=4)
    cache = strategy.cache()
    MODEL.generate(batch((40,))["input_ids"], **with_cache(cache), max_new_tokens=3, num_beams=4)
    assert strategy.stats()["blocks_used"] <= 10 + 4, "four beams of 42 tokens, ten blocks of prompt in common"
    del cache
    gc.collect()
    assert strategy.stats()["blocks_used"] == 0


def test_no_dense_mask_and_no_copy_of_the_past(monkeypatch):
    """A 4096-token prompt: nothing of the size of a mask is allocated, and decode reads K and V as views."""
    import transformers.models.llama.modeling_llama as modeling

    def refuse(*args, **kwargs):
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(modeling, "create_causal_mask", refuse)
    model = tiny_llama(max_position_embeddings=8192)
    strategy = build("paged", model, num_blocks=300)
    cache = strategy.cache()
    ids = torch.randint(0, VOCAB, (1, 4096))
    with torch.no_grad():
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as prefill:
            model(ids, **with_cache(cache), logits_to_keep=1)
        largest = max(event.self_cpu_memory_usage for event in prefill.events())
        assert largest < 4096 * 4096 / 4, f"one operation allocated {largest} bytes"
        monkeypatch.setattr(cpu, "copied", refuse)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as decode:
            model(ids[:, :1], **with_cache(cache))
        allocated = sum(max(0, event.self_cpu_memory_usage) for event in decode.events())
        past = 4096 * strategy.stats()["bytes_per_token"]
        # Scores of the one query, twice, are G / D of K and V: an eighth of this small model's.
        assert allocated < past / 4, f"a decode step allocated {allocated} bytes beside {past} bytes of K and V"


def test_the_pool_is_too_small():
    strategy = build("paged", MODEL, num_blocks=4, block_size=8)
    with pytest.raises(OutOfBlocks, match=r"pool of 32 tokens is too small.*larger num_blocks"):
        run(strategy.cache())
    gc.collect()
    strategy.check_integrity()
    assert strategy.stats()["blocks_free"] == 4, "nothing is lost"
    assert run(strategy.cache(), inputs=batch((5,))).shape == (1, 29)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_output_attentions_is_refused(implementation):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    strategy = build("paged", model, num_blocks=40)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**batch(), **with_cache(strategy.cache()), output_attentions=True)


def test_training_mode_is_refused():
    model = tiny_llama()
    strategy = build("paged", model, num_blocks=40)
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model(**batch(), **with_cache(strategy.cache()))


def test_unsupported_layer_types_are_refused():
    with pytest.raises(ValueError, match="unsupported layer type sliding_attention"):
        build("paged", tiny_llama(layer_types=["sliding_attention", "full_attention"]), num_blocks=4)


def test_masks_that_cannot_be_honoured_are_refused():
    strategy = build("paged", MODEL, num_blocks=100)
    inputs = batch()
    with pytest.raises(ValueError, match="2-D attention mask"):
        MODEL(inputs["input_ids"], attention_mask=torch.zeros(3, 1, 37, 37), **with_cache(strategy.cache()))
    cache = strategy.cache()
    with torch.no_grad():
        MODEL(**inputs, **with_cache(cache))
        with pytest.raises(ValueError, match="must be"):
            MODEL(inputs["input_ids"][:, :1], attention_mask=inputs["attention_mask"], **with_cache(cache))
        longer = torch.ones(3, 38, dtype=torch.long)
        with pytest.raises(ValueError, match="shows or hides"):
            MODEL(inputs["input_ids"][:, :1], attention_mask=longer, **with_cache(cache))
        with pytest.raises(ValueError, match="3 rows"):
            MODEL(inputs["input_ids"][:2, :1], **with_cache(cache))


def test_an_unpatched_model_gets_an_error_not_wrong_tokens():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    strategy = build("paged", MODEL, num_blocks=40)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
    )
    other = Qwen2ForCausalLM(config).eval()
    with pytest.raises(RuntimeError, match="not patched"):
        other(batch()["input_ids"], **with_cache(strategy.cache()))
    with pytest.raises(ValueError, match=r"'qwen2'.*LlamaForCausalLM"):
        build("paged", other, num_blocks=4)


@pytest.mark.upstream
def test_stock_behaviour_is_unchanged():
    """No strategy in use: logits of the patched modules equal a hand-written upstream forward to the bit."""
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inputs, body = batch(), MODEL.model
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        states = body.embed_tokens(inputs["input_ids"])
        mask = create_causal_mask(
            config=MODEL.config,
            inputs_embeds=states,
            attention_mask=inputs["attention_mask"],
            **with_cache(None),
            position_ids=positions,
        )
        cos, sin = body.rotary_emb(states, position_ids=positions)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(MODEL.config._attn_implementation, None)
        for layer in body.layers:
            attn, normed = layer.self_attn, layer.input_layernorm(states)
            shape = (*normed.shape[:-1], -1, attn.head_dim)
            q, k, v = (proj(normed).view(shape).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            out, _ = attend(attn, q, k, v, mask, dropout=0.0, scaling=attn.scaling)
            states = states + attn.o_proj(out.reshape(*normed.shape[:-1], -1).contiguous())
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        expected = MODEL.lm_head(body.norm(states))
        assert torch.equal(MODEL(**inputs, position_ids=positions).logits, expected)


def test_build_refuses_bad_input():
    def refused(message, name="paged", model=MODEL, **options):
        with pytest.raises(ValueError, match=message):
            build(name, model, **options)

    refused("unknown strategy 'pagd'; known are baseline, contiguous, paged", "pagd")
    refused("unknown strategy 'x'", "paged+x")
    refused("twice", "paged+paged")
    refused("stands alone", "paged+baseline")
    refused("stands alone", "contiguous+paged")
    refused("unknown option colour", colour=1)
    refused("num_blocks must be at least 1, got 0", num_blocks=0)
    refused("num_blocks must be at least 1, got -3", num_blocks=-3)
    refused("block_size must be at least 1", block_size=0, num_blocks=4)
    refused("not both", num_blocks=4, memory_fraction=0.5)
    refused("memory_fraction must be in", memory_fraction=1.5)
    refused("max_length instead of block_size", "contiguous", block_size=16)


@pytest.mark.parametrize("free", (100_000, 12_345_678, 1 << 33))
def test_the_pool_can_be_sized_by_memory(free, monkeypatch):
    """By what is said to be free, whatever this machine has."""
    monkeypatch.setattr(registry, "free_bytes", lambda device: free)
    block = 16 * 2 * 2 * 2 * 16 * 4  # tokens, K and V, layers, heads, head_dim, float32
    longest = 16 * MODEL.config.max_position_embeddings // 16
    assert build("paged", MODEL).pool.num_blocks == min(free // 4 // block, longest)
    assert build("paged", MODEL, memory_fraction=1e5 / free).pool.num_blocks == 100_000 // block
    with pytest.raises(ValueError, match=r"one block of 16 tokens takes 8,192 bytes of cpu memory.* take 8,000, its s"):
        build("paged", MODEL, memory_fraction=8000.5 / free)


def test_a_pool_where_nobody_says_what_is_free(monkeypatch):
    monkeypatch.setattr(registry, "free_bytes", lambda device: None)
    with pytest.raises(ValueError, match="nothing here says how much cpu memory is free: give num_blocks"):
        build("paged", MODEL)
    assert build("paged", MODEL, num_blocks=3).pool.num_blocks == 3


def test_what_a_pool_takes():
    stats = build("paged", MODEL, num_blocks=10, block_size=3).stats()
    assert stats["kv_bytes"] == 10 * 3 * 2 * 2 * 2 * 16 * 4  # blocks, tokens, K and V, layers, heads, head_dim, float32
    assert stats["bytes_to_device"] == stats["bytes_to_host"] == 0, "nothing of a plain pool moves"
