"""Blocks belong to the model that computed them: whatever changes in it, no answer is of the model before."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import weakref
from functools import partial

import pytest
import torch
from common import VOCAB, baseline_tokens, tiny_llama
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from kv_strategies import Request, Runner, build, prefix
from kv_strategies.step import fused, version
from kv_strategies.step.upstream import with_cache
from kv_strategies.tiers import identity
from kv_strategies.tiers.lower import Chain
from kv_strategies.tiers.rates import Rates

PROMPT = list(range(1, 30))
IDS = torch.tensor([PROMPT])
LOGITS = {"atol": 1e-4, "rtol": 1e-4}


class Lora(nn.Module):
    """What an adapter library puts in place of a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.active_adapters, self.scaling = base, ["a"], {"a": 1.0, "b": 1.0}
        shape = base.weight.shape
        self.delta = nn.ParameterDict({name: 0.3 * torch.randn(shape) for name in "ab"})
        self.merged: list[str] = []

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        out = self.base_layer(x)
        for name in self.active_adapters:
            if name not in self.merged:
                out = out + self.scaling[name] * (x @ self.delta[name].mT)
        return out


def layer_of(model, index=0):
    return model.model.layers[index]


def adapt(model, name="v_proj"):
    attention = layer_of(model).self_attn
    setattr(attention, name, Lora(getattr(attention, name)))
    return getattr(attention, name)


# --- what may happen to a model: each changes its answers


def load_weights(model):
    state = model.state_dict()
    model.load_state_dict({name: weight + 0.1 * torch.randn_like(weight) for name, weight in state.items()})


def step_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.zero_grad()


def assign(path):
    """`weight.data = w`, which no counter of torch sees."""

    def change(model):
        parameter = model.get_parameter(path)
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)

    change.__name__ = path
    return change


def merge(model):
    """As libraries do it: in place, behind the counters."""
    layer_of(model).mlp.down_proj.weight.data += 0.3


def copy_from_trainer(model):
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.3 + 0.01)


def silence_a_head(model):
    layer_of(model).self_attn.o_proj.weight.data[:, :16] = 0


def transpose(model):
    weight = layer_of(model).self_attn.o_proj.weight
    weight.data = weight.data.T


def replace_parameter(model):
    projection = layer_of(model).mlp.up_proj
    projection.weight = nn.Parameter(0.3 * torch.randn_like(projection.weight))


def swap_modules(model):
    first, second = model.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp


def update_in_inference_mode(model):
    with torch.inference_mode():
        layer_of(model).mlp.up_proj.weight.mul_(1.5)


def steer(model):
    layer_of(model).register_forward_hook(lambda module, args, output: output + 1)


def steer_before(model):
    layer_of(model).mlp.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def edit_eps(model):
    layer_of(model).input_layernorm.variance_epsilon = 1.0


def edit_scaling(model):
    layer_of(model, 1).self_attn.scaling *= 3


def cut_layers(model):
    model.model.layers = model.model.layers[:1]


def use_one_layer(model):
    model.config.num_hidden_layers = 1


def change_rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.3)


def add_adapter(model):
    adapt(model, "q_proj")


def patch_method(model):
    mlp = layer_of(model).mlp
    mlp.forward = lambda x: LlamaMLP.forward(mlp, x) + 1


def patch_call(model):
    mlp = layer_of(model).mlp
    mlp._call_impl = lambda x: nn.Module._call_impl(mlp, x) + 1


def drop_the_norm(model):
    model.model.norm = nn.Identity()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)  # logits of the usual size


def add_a_head(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())


def change_activation(model):
    layer_of(model).mlp.act_fn = nn.Tanh()


def quantise(model):
    class Quantised(nn.Linear):
        def forward(self, x):
            return (super().forward(x) * 4).round() / 4

    layer_of(model).mlp.down_proj.__class__ = Quantised


def shift_embeddings(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[PROMPT[0]] += 1


CHANGES = [
    load_weights,
    step_optimizer,
    *(assign(f"model.layers.0.mlp.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")),
    *(assign(f"model.layers.0.self_attn.{name}.weight") for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    assign("model.layers.0.input_layernorm.weight"),
    assign("model.layers.1.post_attention_layernorm.weight"),
    assign("model.embed_tokens.weight"),
    assign("model.norm.weight"),
    assign("lm_head.weight"),
    merge,
    copy_from_trainer,
    silence_a_head,
    transpose,
    replace_parameter,
    swap_modules,
    update_in_inference_mode,
    steer,
    steer_before,
    edit_eps,
    edit_scaling,
    cut_layers,
    use_one_layer,
    change_rope,
    add_adapter,
    patch_method,
    patch_call,
    drop_the_norm,
    add_a_head,
    change_activation,
    quantise,
    shift_embeddings,
]


def logits_of(model, strategy):
    """Of a prompt, and of a step behind it, with whatever is cached."""
    with torch.no_grad():
        cache = strategy.cache(IDS) if strategy.name != "baseline" else strategy.cache()
        skipped = cache.get_seq_length()
        first = model(IDS[:, skipped:], **with_cache(cache)).logits[:, -1]
        return torch.stack([first, model(IDS[:, :1], **with_cache(cache)).logits[:, -1]])


def served(runner):
    return [result.token_ids for result in runner.generate([Request(PROMPT, max_new_tokens=5)])]


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_answer_is_of_the_model_before(change, is_fused):
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    strategy.fused = is_fused
    runner = Runner(model, strategy)
    before = logits_of(model, strategy)
    served(runner)
    assert len(strategy.sharing.held_blocks()) >= 7
    torch.manual_seed(3)
    change(model)
    oracle = build("baseline", model)
    expected = logits_of(model, oracle)
    assert (expected - before).abs().max() > 1e-3, "it is a change"
    torch.testing.assert_close(logits_of(model, strategy), expected, **LOGITS)
    assert served(runner) == baseline_tokens(model, [Request(PROMPT, max_new_tokens=5)])
    hits = strategy.num_hit_tokens
    torch.testing.assert_close(logits_of(model, strategy), expected, **LOGITS)
    if change is not cut_layers and change is not use_one_layer:
        assert strategy.num_hit_tokens > hits, "and what the changed model computes is shared again"
    strategy.check_integrity()


LOUDNESS = 1.0


def louder(options, module, args, output):
    return output * options["strength"]


class Steering:
    def __init__(self, strength):
        self.strength = strength

    def __call__(self, module, args, output):
        return output * self.strength

    def hook(self, module, args, output):
        return self(module, args, output)


def steer_by(model, strength):
    """How strong it is: a closure's, a partial's, an object's, a method's owner's, a global."""
    own, owner, called = {"strength": strength}, Steering(strength), Steering(strength)
    nudge = strength

    def closure(module, args, output):
        return output * nudge

    def change(value):
        nonlocal nudge
        nudge = value

    mlp, norm = layer_of(model).mlp, layer_of(model).input_layernorm
    mlp.register_forward_hook(closure)
    yield change
    mlp.register_forward_hook(partial(louder, own))
    yield lambda value: own.update(strength=value)
    norm.register_forward_hook(called)
    yield lambda value: setattr(called, "strength", value)
    norm.register_forward_hook(owner.hook)
    yield lambda value: setattr(owner, "strength", value)
    mlp.forward = lambda x: LlamaMLP.forward(mlp, x) * LOUDNESS
    yield lambda value: globals().update(LOUDNESS=value)


@pytest.mark.parametrize("is_tensor", [False, True])
def test_what_code_in_the_model_reads_may_change(is_tensor):
    """Hooks and replaced methods: no answer is of what they read before, and what is as it was is shared."""
    model, make = tiny_llama(), torch.tensor if is_tensor else float
    strategy, oracle = build("prefix", model, num_blocks=200, block_size=4), build("baseline", model)
    for change in steer_by(model, make(1.0)):
        for value in (1.0, 1.5, 1.5, 0.75):
            change(make(value))
            for again in range(2):
                hits = strategy.num_hit_tokens
                torch.testing.assert_close(logits_of(model, strategy), logits_of(model, oracle), **LOGITS)
                assert (strategy.num_hit_tokens > hits) or not again
            assert served(Runner(model, strategy)) == baseline_tokens(model, [Request(PROMPT, max_new_tokens=5)])
    strategy.check_integrity()


def test_a_strength_that_is_written_in_place_and_a_list_that_only_notes():
    model, strength, noted = tiny_llama(), torch.tensor([1.0]), []
    strategy, oracle = build("prefix", model, num_blocks=64, block_size=4), build("baseline", model)
    options = {"strength": [strength]}

    def hook(module, args, output):
        noted.append(output.shape)
        return output * options["strength"][0]

    layer_of(model).register_forward_hook(hook)
    for value in (1.0, 3.0, 0.5):
        strength.fill_(value)
        for again in range(2):
            hits = strategy.num_hit_tokens
            torch.testing.assert_close(logits_of(model, strategy), logits_of(model, oracle), **LOGITS)
            assert (strategy.num_hit_tokens > hits) == bool(again)
    strategy.preload(PROMPT)
    strategy.check_integrity()


def test_no_file_holds_blocks_of_weights_before_they_were_written_in_place(tmp_path):
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    served(Runner(model, strategy))
    merge(model)
    assert strategy.save(tmp_path / "saved") == 0


@contextlib.contextmanager
def global_hook():
    def louder(module, args, output):
        return output * 1.5 if isinstance(module, LlamaMLP) else None

    handle = nn.modules.module.register_module_forward_hook(louder)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def global_pre_hook():
    def louder(module, args):
        return (args[0] * 1.5,) if isinstance(module, LlamaMLP) else None

    handle = nn.modules.module.register_module_forward_pre_hook(louder)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def patched_class():
    plain = LlamaMLP.forward
    LlamaMLP.forward = lambda self, x: 1.5 * plain(self, x)
    try:
        yield
    finally:
        LlamaMLP.forward = plain


@contextlib.contextmanager
def patched_call():
    LlamaMLP.__call__ = lambda self, x: 1.5 * nn.Module.__call__(self, x)
    try:
        yield
    finally:
        del LlamaMLP.__call__


@contextlib.contextmanager
def patched_linear():
    plain = nn.Linear.forward
    nn.Linear.forward = lambda self, x: 1.5 * plain(self, x)
    try:
        yield
    finally:
        nn.Linear.forward = plain


@contextlib.contextmanager
def patched_function():
    plain = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin, **rest: plain(q, k, sin, cos, **rest)
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = plain


EVERYWHERE = [global_hook, global_pre_hook, patched_class, patched_call, patched_linear, patched_function]


@pytest.mark.parametrize("changed", EVERYWHERE)
def test_what_is_done_to_all_modules_is_seen(changed):
    model = tiny_llama()
    strategy, oracle = build("prefix", model, num_blocks=64, block_size=4), build("baseline", model)
    before = logits_of(model, strategy)
    with changed():
        assert strategy.stack is None and not fused.supports(model)
        expected = logits_of(model, oracle)
        assert (expected - before).abs().max() > 1e-3
        torch.testing.assert_close(logits_of(model, strategy), expected, **LOGITS)
    hits = strategy.num_hit_tokens
    torch.testing.assert_close(logits_of(model, strategy), before, **LOGITS)
    assert strategy.num_hit_tokens > hits, "the model is what it was"


def test_adapters_have_trees_of_their_own():
    model = tiny_llama()
    lora = adapt(model)
    strategy, oracle = build("prefix", model, num_blocks=64, block_size=4), build("baseline", model)

    def check(is_hit: bool):
        hits = strategy.num_hit_tokens
        torch.testing.assert_close(logits_of(model, strategy), logits_of(model, oracle), **LOGITS)
        assert (strategy.num_hit_tokens > hits) == is_hit

    check(False)
    check(True)
    lora.active_adapters = ["b"]
    check(False)
    lora.active_adapters[:] = ["a"]
    check(True)
    lora.active_adapters[:] = ["b"]
    check(True)
    lora.active_adapters.append("a")
    check(False)
    lora.active_adapters.clear()  # disabled
    check(False)
    lora.active_adapters.append("a")
    check(True)
    lora.base_layer.weight.data += lora.delta["a"]  # a merge, as libraries do it
    lora.merged.append("a")
    check(False)
    lora.delta["b"].data = torch.zeros_like(lora.delta["b"])
    check(False)
    lora.scaling["a"] = 3.0
    check(False)


def test_rollouts_of_a_training_loop_are_right_in_every_step():
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=24, block_size=4)
    runner, optimizer = Runner(model, strategy), torch.optim.SGD(model.parameters(), lr=0.5)
    seen = set()
    for _ in range(6):
        strategy.preload(PROMPT)
        requests = [Request(PROMPT, max_new_tokens=8) for _ in range(2)]
        got = [result.token_ids for result in runner.generate(requests)]
        assert got == baseline_tokens(model, requests)
        ids = torch.tensor([PROMPT + got[0]])
        assert model.generate(IDS, max_new_tokens=8, **with_cache(strategy.cache(IDS)))[0, 29:].tolist() == got[0]
        seen.add(tuple(got[0]))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        strategy.check_integrity()
    assert len(seen) > 1
    assert strategy.sharing.num_pinned <= 7, "what was preloaded for a model before is not kept"


def test_a_row_whose_model_changes_is_not_published():
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    runner = Runner(model, strategy)
    stream = runner.stream([Request(PROMPT, max_new_tokens=12)])
    for _ in range(4):
        next(stream)
    load_weights(model)
    list(stream)
    assert not runner.num_running
    assert served(runner) == baseline_tokens(model, [Request(PROMPT, max_new_tokens=5)])
    assert strategy.num_hit_tokens == 0

    cache = strategy.cache(IDS)
    assert cache.get_seq_length()
    load_weights(model)
    with pytest.raises(ValueError, match="the model has changed since cache"):
        model.generate(IDS, max_new_tokens=2, **with_cache(cache))


def test_a_model_is_let_go():
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    layer_of(model).register_forward_hook(lambda *args, model=model: None)
    logits_of(model, strategy)
    gone = weakref.ref(model)
    del model, strategy
    gc.collect()
    assert gone() is None


def test_looking_costs_little(monkeypatch):
    """One pass of C loops: nothing is described anew unless something differs."""
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    logits_of(model, strategy)
    monkeypatch.setattr(version, "_Description", lambda model: pytest.fail("described anew"))
    logits_of(model, strategy)
    served(Runner(model, strategy))
    model.generate(IDS, max_new_tokens=3, **with_cache(strategy.cache(IDS)))


# --- files


def test_a_file_knows_every_weight(tmp_path):
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    served(Runner(model, strategy))
    count = strategy.save(tmp_path / "saved")
    assert count > 0
    twin = build("prefix", tiny_llama(), num_blocks=64, block_size=4)
    assert twin.load(tmp_path / "saved").num_blocks == count
    assert served(Runner(twin.model, twin)) == served(Runner(model, strategy))
    assert twin.num_hit_tokens > 0

    other = tiny_llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[17, 5] += 1e-3  # one number of one row
    with pytest.raises(ValueError, match="another model or policy: weights is"):
        build("prefix", other, num_blocks=64, block_size=4).load(tmp_path / "saved")
    bent = tiny_llama()
    bent.model.rotary_emb.inv_freq *= 1.01
    with pytest.raises(ValueError, match="weights is"):
        build("prefix", bent, num_blocks=64, block_size=4).load(tmp_path / "saved")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_file_takes_one_model_for_another(change, tmp_path):
    """Of a model that was changed after `build`, and then of the plain one: neither's file gives the other a block."""
    torch.manual_seed(3)
    model, twin = tiny_llama(), tiny_llama()
    changed, plain = (build("prefix", each, num_blocks=64, block_size=4) for each in (model, twin))
    change(model)
    for strategy, path in ((changed, tmp_path / "changed"), (plain, tmp_path / "plain")):
        served(Runner(strategy.model, strategy))
        with contextlib.suppress(ValueError):
            strategy.save(path)
    assert (tmp_path / "plain").exists()
    for strategy, path in ((changed, tmp_path / "plain"), (plain, tmp_path / "changed")):
        strategy.reset()
        with contextlib.suppress(ValueError, FileNotFoundError):
            strategy.load(path)
        assert not strategy.sharing.held_blocks()


def test_blocks_of_other_products_are_others(tmp_path):
    """Under autocast products are of another dtype: its K and V are for those alone who ask under it, and no file."""
    model = tiny_llama()
    strategy, cast = build("prefix", model, num_blocks=64, block_size=4), partial(torch.autocast, "cpu", torch.bfloat16)
    before, found = logits_of(model, strategy), []
    for _ in range(2):
        with cast():
            found.append((logits_of(model, strategy), strategy.num_hit_tokens))
            for asked in (strategy.save, strategy.load):
                with pytest.raises(ValueError, match="steer this model, or autocast does"):
                    asked(tmp_path / "saved")
        torch.testing.assert_close(logits_of(model, strategy), before, **LOGITS)
    assert found[0][1] == 0, "blocks of float32 are not given under autocast"
    assert found[1][1] > 0 and (found[0][0] - before).abs().max() > 1e-3


def test_a_row_whose_model_comes_back_is_published():
    """A hook, or an early exit of assisted decoding, that came and went; but not one under which the row grew."""
    model = tiny_llama()
    for grows in (False, True):
        strategy = build("prefix", model, num_blocks=64, block_size=4)
        runner = Runner(model, strategy, max_num_seqs=1)
        runner.submit([Request(PROMPT, max_new_tokens=8)])
        runner.step()
        hook = layer_of(model).register_forward_hook(lambda module, args, output: output * 1.5)
        if grows:
            runner.step()
        else:
            strategy.follow()
        hook.remove()
        while runner.num_running:
            runner.step()
        assert (len(strategy.sharing.held_blocks()) > len(PROMPT) // 4) == (not grows)
    hits = build("prefix", model, num_blocks=200, block_size=4)
    with hits.installed():
        found = [model.generate(IDS, max_new_tokens=12, do_sample=False, assistant_early_exit=1) for _ in range(2)]
    assert hits.num_hit_tokens > 0
    for each in found:
        assert torch.equal(each, model.generate(IDS, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("changed", EVERYWHERE)
def test_no_file_is_of_what_is_done_to_all_modules(changed, tmp_path):
    strategy = build("prefix", tiny_llama(), num_blocks=64, block_size=4)
    served(Runner(strategy.model, strategy))
    strategy.save(tmp_path / "saved")
    with changed():
        for asked in (strategy.save, strategy.load):
            with pytest.raises(ValueError, match="hooks or replaced methods steer this model"):
                asked(tmp_path / "saved")
    strategy.reset()
    assert strategy.load(tmp_path / "saved").num_blocks > 0, "the model is what it was"


def test_a_file_holds_blocks_of_the_model_as_it_is(tmp_path):
    model = tiny_llama()
    strategy = build("prefix", model, num_blocks=64, block_size=4)
    served(Runner(model, strategy))
    load_weights(model)
    assert strategy.save(tmp_path / "empty") == 0
    served(Runner(model, strategy))
    count = strategy.save(tmp_path / "saved")
    assert 0 < count < len(strategy.sharing.held_blocks())
    twin = build("prefix", copy.deepcopy(model), num_blocks=64, block_size=4)
    assert twin.load(tmp_path / "saved").num_blocks == count
    assert served(Runner(twin.model, twin)) == served(Runner(model, strategy))
    layer_of(model).mlp.up_proj.weight.data.add_(0.1)  # seen by no counter
    with pytest.raises(ValueError, match="weights is"):
        strategy.load(tmp_path / "saved")


def test_weights_are_hashed_once_a_state_and_wherever_they_lie(monkeypatch):
    model = tiny_llama()
    watched, hashed = version.watch(model), []  # it is kept as long as a strategy, say, watches
    whole = identity.weights_hash(model)
    digest = identity._digest
    monkeypatch.setattr(identity, "_digest", lambda weight: hashed.append(1) or digest(weight))
    assert identity.weights_hash(model) == whole
    assert not hashed and watched.made
    monkeypatch.setattr(identity, "_CHUNK_BYTES", 100)
    other = copy.deepcopy(model)
    fused.stack_of(other)
    assert identity.weights_hash(other) == whole
    projection = other.model.layers[0].self_attn.q_proj.weight
    projection.data = projection.data.T.contiguous().T
    assert not projection.is_contiguous() and identity.weights_hash(other) == whole
    assert identity.weights_hash(model.half()) != whole


# --- the wrong model


@pytest.mark.parametrize("name", ["paged", "prefix", "window", "int8"])
@pytest.mark.parametrize("kind", ["other", "smaller", "same config", "copy"])
def test_a_cache_given_to_another_model_is_told(name, kind):
    model = tiny_llama()
    other = {
        "other": lambda: tiny_llama(seed=1),
        "smaller": lambda: tiny_llama(num_layers=1, num_heads=2),
        "same config": lambda: LlamaForCausalLM(model.config).eval(),
        "copy": lambda: copy.deepcopy(model),
    }[kind]()
    strategy = build(name, model, num_blocks=64)
    for cache in (strategy.cache(), strategy.cache(IDS)):
        with pytest.raises(ValueError, match="built for another model"):
            other.generate(IDS, max_new_tokens=2, **with_cache(cache))
    with pytest.raises(ValueError, match="built for another model"):
        Runner(other, strategy)
    model.generate(IDS, max_new_tokens=2, **with_cache(strategy.cache(IDS)))


@pytest.mark.parametrize("name", ["paged", "prefix", "int8"])
def test_a_model_converted_after_build_is_told(name):
    model = tiny_llama()
    strategy = build(name, model, num_blocks=64)
    runner, cache = Runner(model, strategy), strategy.cache()
    served(runner)
    model.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(ValueError, match="then float32 on cpu, 2 layers, now bfloat16 on cpu"):
            model.generate(IDS, max_new_tokens=2, **with_cache(cache))
        with pytest.raises(ValueError, match="converted or moved"):
            served(runner)
        runner.cancel(0)
    model.to("meta")
    with pytest.raises(ValueError, match="now bfloat16 on meta"):
        strategy.cache(IDS)


# --- lower tiers


def test_chains_compare_all_that_a_block_continues():
    def chain(*tokens):
        made = None
        for some in tokens:
            made = Chain(made, some)
        return made

    assert chain(b"r", b"a", b"b") == chain(b"r", b"a", b"b")
    assert chain(b"r", b"a", b"b") != chain(b"r", b"c", b"b")
    assert chain(b"r", b"b") != chain(b"r", b"a", b"b")
    assert chain(b"r", b"a", b"b") != chain(b"s", b"a", b"b")
    one, two = chain(*[b"x"] * 5), chain(*[b"x"] * 5)
    assert one == two and one.before is two.before, "so the next ones are compared at once"


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_weak_hash_gives_no_wrong_answer_from_lower_tiers(on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(Rates, "seconds_saved", lambda *args, **kwargs: 1.0)
    digest = prefix.block_digest
    monkeypatch.setattr(prefix, "block_digest", lambda *parts: bytes([digest(*parts)[0] & 15]))
    model, rng = tiny_llama(), random.Random(0)
    disk = {"disk_path": tmp_path, "disk_bytes": 1 << 20} if on_disk else {}
    strategy = build(
        "prefix+offload", model, num_blocks=14, block_size=4, host_bytes=1 << 14 if on_disk else 1 << 20, **disk
    )
    runner = Runner(model, strategy, max_num_seqs=2, max_batch_tokens=40)
    heads = [[rng.randrange(4) for _ in range(4)] for _ in range(6)]
    requests = [
        Request([token for _ in range(5) for token in rng.choice(heads)] + [rng.randrange(VOCAB)], max_new_tokens=2)
        for _ in range(150)
    ]
    expected = baseline_tokens(model, requests)
    wrong = 0
    for request, tokens in zip(requests, expected, strict=True):
        wrong += runner.generate([request])[0].token_ids != tokens
    assert wrong == 0
    assert strategy.stats()["tier_blocks_promoted"] > 0


# --- positions


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("name", ["paged", "prefix", "window", "contiguous", "prefix+int8"])
@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_that_follow_the_longest_row_are_refused(kind, name):
    model = tiny_llama(rope_parameters=ROPES[kind])
    with pytest.raises(ValueError, match=f"'{kind}' change their frequencies"):
        build(name, model, num_blocks=4)
    build("baseline", model)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 60])
@torch.no_grad()
def test_sinks_are_as_far_as_the_positions_given(chunk, is_fused, monkeypatch):
    """Against the same window without the fast way: a row of 60 tokens, whose positions jump by 100 at the 30th."""
    model = tiny_llama()
    ids = torch.randint(VOCAB, (2, 60), generator=torch.Generator().manual_seed(0))
    window, sinks = 16, 4
    positions = torch.arange(60).expand(2, -1).clone()
    positions[0, 30:] += 100
    positions[1] += 5
    expected = windowed(model, ids, positions, window, sinks)
    strategy = build("window", model, window=window, sinks=sinks, block_size=4, num_blocks=64)
    strategy.fused = is_fused
    cache, logits = strategy.cache(), []
    for begin in range(0, 60, chunk):
        part = slice(begin, begin + chunk)
        logits.append(model(ids[:, part], position_ids=positions[:, part], **with_cache(cache)).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-4, rtol=1e-4)


def windowed(model, ids, positions, window, sinks):
    """Logits of a dense forward: sinks see a query that stands right behind them and the window."""
    body, count = model.model, ids.shape[1]
    states = body.embed_tokens(ids)
    index = torch.arange(count)
    is_sink = (index < sinks) & (index[:, None] - window >= index)
    seen = (index <= index[:, None]) & ((index > index[:, None] - window) | (index < sinks))
    farthest = window + sinks - 1
    behind = torch.where(index > farthest, positions[:, :1] + farthest, positions)
    rotations = [body.rotary_emb(states, position_ids=at) for at in (positions, behind)]
    for layer in body.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        q, k, v = (
            getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        (near, key), (far, _) = (modeling_llama.apply_rotary_pos_emb(q, k, *rotation) for rotation in rotations)
        key, v = (part.repeat_interleave(attention.num_key_value_groups, 1) for part in (key, v))
        scores = torch.where(is_sink, far @ key.mT, near @ key.mT) * attention.scaling
        out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
        states = states + attention.o_proj(out.transpose(1, 2).flatten(2))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return model.lm_head(body.norm(states))


# --- graphs


GRAPH_CHANGES = [
    load_weights,
    assign("model.layers.0.mlp.down_proj.weight"),
    assign("model.embed_tokens.weight"),
    assign("lm_head.weight"),
    steer,
    edit_eps,
    cut_layers,
    use_one_layer,
    add_adapter,
    patch_method,
]


@pytest.mark.gpu
@pytest.mark.parametrize("change", GRAPH_CHANGES, ids=lambda change: change.__name__)
def test_gpu_no_graph_is_of_the_model_before(change, device):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, ids = tiny_llama().to(device), IDS.to(device)
    strategy = build("prefix", model, num_blocks=64)
    runner = Runner(model, strategy, max_num_seqs=4)
    request = Request(PROMPT, max_new_tokens=12)

    def answers():
        generated = model.generate(ids, **with_cache(strategy.cache(ids)), max_new_tokens=12, do_sample=False)
        return [result.token_ids for result in runner.generate([request])] + generated[:, len(PROMPT) :].tolist()

    for _ in range(3):  # plain, captured, replayed
        before = answers()
    assert before == 2 * baseline_tokens(model, [request])
    with torch.device(device):  # for what a change draws
        torch.manual_seed(3)
        change(model)
    model.to(device)
    expected = baseline_tokens(model, [request])
    for _ in range(3):
        assert answers() == 2 * expected


@pytest.mark.gpu
def test_gpu_a_change_between_two_steps_is_seen(device):
    model = tiny_llama().to(device)
    strategy = build("paged", model, num_blocks=64)
    runner, seen = Runner(model, strategy, max_num_seqs=4), []
    for count, _ in enumerate(runner.stream([Request(PROMPT, max_new_tokens=40)])):
        if count == 20:
            layer_of(model).register_forward_hook(lambda *args: seen.append(1))
    assert len(seen) >= 15, "replays call no hook"
