"""peft, as it is: what its adapters give natively, through both doors; what replaces the cache is refused by name."""

from __future__ import annotations

import pytest
import torch
from common import VOCAB, tiny_llama

from kv_strategies import Request, Runner, build
from kv_strategies.step.upstream import with_cache

peft = pytest.importorskip("peft", reason="peft comes with the extra 'test'; a machine without a venv may lack it")
pytestmark = pytest.mark.filterwarnings("ignore:`.*` is deprecated:FutureWarning")  # what peft calls upstream by

IDS = [torch.randint(1, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 23, 40)]
NUM_NEW = 10
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
KINDS = [
    ("paged", {"target_modules": EVERYWHERE}),
    ("prefix", {"target_modules": ["q_proj", "v_proj"]}),
    ("prefix", {"target_modules": ["k_proj", "down_proj"], "use_dora": True}),
    ("prefix+offload", {"target_modules": ["embed_tokens", "o_proj"]}),
]


def adapted(**options):
    """A tiny Llama with two adapters, `default` and `other`."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), lora(**options)).eval()
    model.add_adapter("other", lora(**options))
    return model


def lora(**options):
    return peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options)


def continued(model, ids, cache=None, **options) -> list[list[int]]:
    given = {} if cache is None else with_cache(cache)
    out = model.generate(input_ids=ids, max_new_tokens=NUM_NEW, do_sample=False, **options, **given)
    return out[:, ids.shape[1] :].tolist()


def scale(model) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


#: One after the other: what happens to an adapted model between two requests.
CHANGES = [
    lambda model: None,
    lambda model: model.set_adapter("other"),
    lambda model: model.set_adapter("default"),
    lambda model: model.base_model.set_adapter(["default", "other"]),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.base_model.enable_adapter_layers(),
    lambda model: model.set_adapter("default"),
    lambda model: model.merge_adapter(),
    lambda model: model.unmerge_adapter(),
    scale,
    lambda model: model.delete_adapter("other"),
    lambda model: model.merge_and_unload(),
]


@pytest.mark.parametrize(("name", "options"), KINDS)
def test_adapters_give_their_own_answers_whatever_is_cached(name, options):
    model = adapted(**options)
    base = model.get_base_model()
    strategy = build(name, base, num_blocks=150, block_size=4)
    runner, answers = Runner(base, strategy, max_num_seqs=4), []
    for change in CHANGES:
        model = change(model) or model
        expected = [continued(model, ids) for ids in IDS]
        assert [continued(model, ids, strategy.cache(ids)) for ids in IDS] == expected
        assert [continued(base, ids, strategy.cache(ids)) for ids in IDS] == expected
        results = runner.generate([Request(ids, max_new_tokens=NUM_NEW) for ids in IDS])
        assert [[result.token_ids] for result in results] == expected
        answers.append(str(expected))
    strategy.check_integrity()
    assert len(set(answers)) >= 5, "the adapters differ"
    assert (strategy.num_hit_tokens > 0) == ("prefix" in name)


def test_adapters_of_each_row_share_nothing():
    model = adapted(target_modules=["q_proj", "v_proj"])
    strategy = build("prefix", model.get_base_model(), num_blocks=150, block_size=4)
    ids = IDS[1].expand(3, -1)
    for names in (["default", "other", "__base__"], ["other", "default", "default"]):
        expected = continued(model, ids, adapter_names=names)
        for cache in (strategy.cache(ids), strategy.cache()):
            assert continued(model, ids, cache, adapter_names=names) == expected
    assert continued(model, IDS[1], strategy.cache(IDS[1])) == continued(model, IDS[1])


@pytest.mark.parametrize("name", ["paged", "prefix"])
def test_prefix_tuning_is_refused_by_both_doors(name):
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config).eval()
    with pytest.raises(ValueError, match="PREFIX_TUNING: prompt learning puts virtual tokens"):
        build(name, model, num_blocks=50)
    base = model.get_base_model()
    strategy = build(name, base, num_blocks=50, block_size=4)
    with pytest.raises(ValueError, match="built for another model"):
        Runner(model, strategy)
    for cache in (strategy.cache(), strategy.cache(IDS[1])):
        with pytest.raises(ValueError, match="PREFIX_TUNING of peft puts K and V of its own"):
            continued(model, IDS[1], cache)
        assert continued(base, IDS[1], cache) == continued(base, IDS[1])
    del cache
    assert strategy.pool.num_used == strategy.stats()["blocks_cached"]


def test_prompt_tuning_runs_through_generate():
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    strategy = build("prefix", model.get_base_model(), num_blocks=50, block_size=4)
    expected = continued(model, IDS[1])
    assert expected != continued(model.get_base_model(), IDS[1])
    assert continued(model, IDS[1], strategy.cache()) == expected
    with pytest.raises(ValueError, match="feeds other tokens"):
        continued(model, IDS[1], strategy.cache(IDS[1]))


def test_an_adapted_attention_is_refused_by_name():
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn is a AdaptedAttention, and only LlamaAttention"):
        build("paged", model.get_base_model(), num_blocks=4)
    with pytest.raises(ValueError, match=r"this is a PeftModelForCausalLM: pass model.get_base_model\(\)"):
        build("paged", model, num_blocks=4)
