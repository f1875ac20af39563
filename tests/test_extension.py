"""Strategies from outside: the two of `examples/` through both doors against plain models, and contracts that break."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from common import OUTSIDE, VOCAB, tiny_llama

from kv_strategies import STRATEGIES, Preset, Request, Runner, build, register, registry
from kv_strategies.base import Codec, Placement, Plain, Retention, Sharing
from kv_strategies.quantized import Int8
from kv_strategies.step.upstream import with_cache

MODEL = tiny_llama()
PROMPTS = [torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 23, 38)]


def generated(name: str, **options) -> list[list[int]]:
    """Greedy tokens through both doors, which must agree."""
    strategy = build(name, MODEL, num_blocks=120, block_size=4, **options)
    results = Runner(MODEL, strategy, max_num_seqs=3, max_batch_tokens=17).generate(
        [Request(prompt, max_new_tokens=14) for prompt in PROMPTS]
    )
    tokens = [result.token_ids for result in results]
    for prompt, expected in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([prompt])
        for cache in (strategy.cache(), strategy.cache(ids)):
            out = MODEL.generate(ids, **with_cache(cache), max_new_tokens=14, do_sample=False)
            assert out[0, len(prompt) :].tolist() == expected
    strategy.check_integrity()
    return tokens


def test_the_mask_from_outside_is_that_of_a_dense_model():
    """Every fourth old block: the same as native attention under the same mask, all computed at once."""
    tokens = generated("every4", recent=6)
    retention = STRATEGIES["every4"].make(recent=6)
    retention._block_size = 4
    for prompt, new in zip(PROMPTS, tokens, strict=True):
        ids = torch.tensor([prompt + new])
        index = torch.arange(ids.shape[1])
        mask = (index <= index[:, None]) & retention.visible(index[:, None], index)
        with torch.no_grad():
            logits = MODEL(ids, attention_mask=mask[None, None]).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new


def test_blocks_are_really_given_back():
    strategy = build("every4", MODEL, num_blocks=40, block_size=4, recent=8)
    table = strategy.open_table(())
    for _ in range(100):
        strategy.reserve([(table, 1)])
    live = (table.blocks >= 0).sum()
    assert live == strategy.stats()["blocks_used"] <= 100 / 4 / 4 + 4
    strategy.check_integrity()
    with pytest.raises(ValueError, match="cannot go back to 50 of 100 tokens"):
        strategy.truncate(table, 50)
    strategy.truncate(table, 99)


def test_the_codec_from_outside_works_with_a_window_that_is_rebased():
    """Keys are turned through any codec's decode and encode."""
    strategy = build("window+raw4", MODEL, num_blocks=40, block_size=4, window=8, sinks=2, rebase_at=28)
    (result,) = Runner(MODEL, strategy).generate([Request(PROMPTS[1], max_new_tokens=60)])
    assert len(result.token_ids) == 60
    strategy.check_integrity()


def test_prefix_and_codecs_from_outside_share():
    expected = generated("raw4")
    assert generated("prefix+raw4") == expected
    assert generated("prefix+offload+raw4") == expected
    assert build("raw4", MODEL, num_blocks=4).stats()["kernels"] == "reference"


def test_a_file_says_which_policies_wrote_it(tmp_path):
    """What a mask from outside has computed is not for a strategy without it."""
    strategy = build("prefix+every4", MODEL, num_blocks=60, block_size=4, recent=8)
    Runner(MODEL, strategy).generate([Request(PROMPTS[2], max_new_tokens=2)])
    assert strategy.save(tmp_path / "saved") > 0
    for name, options in (("prefix", {}), ("prefix+window", {}), ("prefix+every4", {"recent": 9})):
        with pytest.raises(ValueError, match=r"another model or policy: retention is"):
            build(name, MODEL, num_blocks=2000, block_size=4, **options).load(tmp_path / "saved")
    again = build("prefix+every4", MODEL, num_blocks=60, block_size=4, recent=8)
    assert again.load(tmp_path / "saved").num_blocks > 0


@pytest.mark.parametrize("name", ["paged", "prefix", "window", "offload", "int8"])
def test_the_reference_kernels_run_end_to_end(name):
    options = {"window": 8, "sinks": 2} if name == "window" else {}
    assert generated(name, kernels="reference", **options) == generated(name, **options)
    with pytest.raises(ValueError, match="kernels must be 'fast' or 'reference'"):
        build(name, MODEL, num_blocks=9, kernels="quick")


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_fast_kernels_refuse_what_they_do_not_know(name):
    with pytest.raises(ValueError, match=r"do not know the (bytes of Raw4|mask of EveryFourth)"):
        build(name, MODEL, num_blocks=9, kernels="fast")


# --- contracts that break are told at build, by name


class Misspelt(Retention):
    def visibel(self, position, index):
        return index <= position


class OtherArguments(Retention):
    def dead(self, num_tokens):
        return ()


class ShowsTheDead(Retention):
    def dead(self, num_tokens, block_size):
        return ((0, num_tokens // block_size),)


class ComesBackToLife(Retention):
    def visible(self, position, index):
        return index == position

    def dead(self, num_tokens, block_size):
        return ((0, 1),) if num_tokens // block_size in (1, 3) else ()


class Rolling(Retention):
    window = 8

    def dead(self, num_tokens, block_size):
        last = (num_tokens - 7) // block_size
        return ((0, last),) if last > 0 else ()


class CountsWithoutTheChunk(Rolling):
    def num_blocks(self, num_tokens, chunk, block_size):
        return min(-(-num_tokens // block_size), -(-7 // block_size) + 1)


class FewerForMore(Rolling):
    def num_blocks(self, num_tokens, chunk, block_size):
        return -(-num_tokens // block_size) + num_tokens % 2


class NotBool(Retention):
    def visible(self, position, index):
        return index


class CutsWithoutTurning(Retention):
    window = 4

    def dead(self, num_tokens, block_size):
        last = (num_tokens - 3) // block_size
        return ((0, last),) if last > 0 else ()

    def stale(self, num_tokens, block_size):
        return (0, 1) if num_tokens > 20 * block_size else (0, 0)


class LosesSilently(Plain):
    def encode(self, states):
        return (states.float() * 1.001).to(states.dtype), None


class OtherCodes(Int8):
    def encode(self, states):
        codes, scale = super().encode(states)
        return -codes, -scale


class WrongShape(Codec):
    def planes(self, num_kv_heads, block_size, head_dim, dtype):
        return {"k": ((num_kv_heads, block_size, head_dim), dtype), "v": ((num_kv_heads, block_size, head_dim), dtype)}

    def encode(self, states):
        return states[..., :1], None

    def decode(self, codes, scale):
        return codes.float()


class StrangePlanes(WrongShape):
    def planes(self, num_kv_heads, block_size, head_dim, dtype):
        return {"k": ((block_size, num_kv_heads, head_dim), dtype), "v": ((num_kv_heads, block_size, head_dim), dtype)}


@pytest.mark.parametrize(
    ("question", "make", "lossy", "message"),
    [
        ("retention", Misspelt, True, r"Misspelt.visibel is called by nobody; did you mean 'visible'"),
        ("retention", OtherArguments, True, r"OtherArguments.dead must take \(self, num_tokens, block_size\)"),
        ("retention", ShowsTheDead, True, "still sees blocks"),
        ("retention", ComesBackToLife, True, "lacks blocks that were dead before"),
        ("retention", CountsWithoutTheChunk, True, "such a row holds"),
        ("retention", FewerForMore, True, "such a row holds"),
        ("retention", NotBool, True, r"visible must give bool \[n, m\]"),
        ("retention", CutsWithoutTurning, True, "turn_keys must say"),
        ("retention", Placement, True, "Placement is no kv_strategies.base.Retention"),
        ("sharing", Int8, False, "Int8 is no kv_strategies.base.Sharing"),
        ("codec", LosesSilently, False, "declared lossless, and what it decodes is not what it encoded"),
        ("codec", Int8, False, "disagree whether it loses anything"),
        ("codec", OtherCodes, True, "the kernels encode otherwise"),
        ("codec", WrongShape, True, r"WrongShape.encode: for \[3, Hkv, D\] k must be"),
        ("codec", StrangePlanes, True, r"k must begin with \[Hkv, block_size\]"),
    ],
)
def test_a_broken_contract(monkeypatch, question, make, lossy, message):
    monkeypatch.setitem(STRATEGIES, "mine", Preset("mine", question, make, lossy))
    with pytest.raises(ValueError, match=message) as error:
        build("mine", MODEL, num_blocks=8)
    assert "'mine'" in str(error.value)


def test_two_parts_that_answer_the_same_clash():
    for pair in ("raw4+int8", "every4+window"):
        with pytest.raises(ValueError, match="choose one"):
            build(pair, MODEL, num_blocks=8)


@pytest.mark.parametrize(
    ("name", "preset", "message"),
    [
        ("paged", Preset("x", "codec", Int8), "is taken"),
        ("a+b", Preset("x", "codec", Int8), "'\\+' joins names"),
        ("mine", Preset("x", "colour", Int8), "the questions are layout"),
        ("mine", Int8, "needs a kv_strategies.Preset"),
        ("mine", Preset("x", "codec", lambda block_size=3: Int8()), "which every strategy has"),
    ],
)
def test_registrations_that_make_no_sense(name, preset, message):
    with pytest.raises(ValueError, match=message):
        register(name, preset)
    assert name == "paged" or name not in STRATEGIES


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("paged", {"num_blocks": "8"}, "num_blocks takes a whole number or none, got '8'"),
        ("paged", {"num_blocks": 8, "block_size": 4.5}, "block_size takes a whole number"),
        ("window", {"num_blocks": 8, "window": "abc"}, "window takes a whole number, got 'abc'"),
        ("window", {"num_blocks": 8, "window": 16.5}, "window takes a whole number, got 16.5"),
        ("window", {"num_blocks": 8, "window": float("nan")}, "window takes a whole number, got nan"),
        ("window", {"num_blocks": 8, "sinks": True}, "sinks takes a whole number, got True"),
        ("offload", {"num_blocks": 8, "mass": "most"}, "mass takes a number or none"),
        ("offload", {"num_blocks": 8, "resident": 3}, "resident takes text"),
        ("every4", {"num_blocks": 8, "recent": "all"}, "recent takes a whole number"),
        (None, {}, "a strategy is built by name, got NoneType"),
    ],
)
def test_options_of_the_wrong_type(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, MODEL, **options)


def test_whole_floats_are_numbers_and_names_are_stripped():
    strategy = build(" prefix + window ", MODEL, num_blocks=8.0, window=32.0)
    assert strategy.name == "prefix+window" and strategy.pool.num_blocks == 8 and strategy.retention.window == 32


def test_an_installed_package_adds_a_strategy(tmp_path):
    """A distribution with an entry point, in a process of its own: known to `STRATEGIES` and the command line."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        from kv_strategies import Preset
        from kv_strategies.quantized import Int8
        class Mine(Int8):
            pass
        PRESET = Preset("as int8", "codec", Mine, lossy=True)
        """)
    )
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kv_strategies]\nmine = mine:PRESET\nbroken = mine:NOTHING\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from kv_strategies import STRATEGIES; print(*STRATEGIES)"
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "mine"
    assert "the strategy 'broken' of mine cannot be used" in run.stderr


def test_a_registered_name_keeps_to_this_process(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry._register_installed()


def test_sharing_says_what_it_refuses():
    strategy = build("paged", MODEL, num_blocks=8)
    assert isinstance(strategy.sharing, Sharing)
    with pytest.raises(ValueError, match="build it with 'prefix'"):
        strategy.save("anywhere")
