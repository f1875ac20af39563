"""Every sum of strategies, generated: it works by the rule, or says why it cannot.

The rule: lossless parts change no token, so a sum gives the tokens of its lossy parts alone.
"""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from common import OUTSIDE, VOCAB, baseline_tokens, can_be_built, tiny_llama

from kv_strategies import STRATEGIES, Request, Runner, build

MODEL = tiny_llama()
OPTIONS = {
    "window": [{"window": 8, "sinks": 2}, {"window": 9, "sinks": 0}],
    "every4": [{"recent": 6}],
    "evict": [
        {"score": "knorm", "keep": 0.6},
        {"score": "snapkv", "keep": 0.6},
        {"score": "tova", "keep": 17, "every": 3},
    ],
    "offload": [{}, {"resident": "none"}, {"top_n": 5}, {"mass": 0.8}, {"resident": "kv", "host_bytes": 1 << 20}],
}
PARTS = [name for name, preset in STRATEGIES.items() if not preset.alone]
LOSSY = {name for name in PARTS if STRATEGIES[name].lossy is True}
SUMS = [parts for count in range(1, len(PARTS) + 1) for parts in combinations(PARTS, count)]
#: Two from outside at once are enough in their own tests.
VALID = ["+".join(parts) for parts in SUMS if can_be_built(parts) and len(set(parts) & set(OUTSIDE)) < 2]
CLASHES = ["+".join(pair) for pair in combinations(PARTS, 2) if not can_be_built(pair)]


def requests() -> list[Request]:
    """Two users with long common starts, each prompt twice, then apart."""
    rng = random.Random(5)
    starts = [[rng.randrange(VOCAB) for _ in range(21)] for _ in range(2)]
    prompts = [start + [rng.randrange(VOCAB) for _ in range(n)] for start in starts for n in (1, 9, 14)]
    return [Request(prompt, max_new_tokens=10, seed=i) for i, prompt in enumerate(prompts * 2)]


def run(name: str, options: dict, num_blocks: int = 400) -> tuple[list[list[int]], Runner]:
    strategy = build(name, MODEL, num_blocks=num_blocks, block_size=4, **options)
    runner = Runner(MODEL, strategy, max_num_seqs=4, max_batch_tokens=30)
    tokens = [result.token_ids for result in runner.generate(requests())]
    strategy.check_integrity()
    return tokens, runner


def alone(parts: set[str], options: dict) -> list[list[int]]:
    """What the lossy parts give by themselves; of no lossy part, what the native cache gives."""
    lossy = [part for part in PARTS if part in parts & LOSSY]
    reads = {key: value for key, value in options.items() if key in ("top_n", "mass")}
    if not lossy and not reads:
        return baseline_tokens(MODEL, requests())
    own = ("window", "sinks", "recent", "score", "keep", "every")
    kept = {key: value for key, value in options.items() if key in own}
    return run("+".join([*lossy, *(["offload"] if reads else [])]), kept | reads)[0]


def choices(name: str) -> list[dict]:
    """Options for every part that has some: each choice of the first such part, with the first of the others."""
    parts = [part for part in name.split("+") if part in OPTIONS]
    found = [{}]
    for part in parts:
        found = [old | new for new in OPTIONS[part] for old in (found if new is OPTIONS[part][0] else found[:1])]
    return found


@pytest.mark.parametrize("name", VALID)
def test_lossless_parts_change_no_token(name):
    parts = set(name.split("+"))
    for options in choices(name):
        if "evict" in parts and {"top_n", "mass"} & set(options):
            with pytest.raises(ValueError, match="choose one"):
                build(name, MODEL, num_blocks=4, **options)
            continue
        expected = alone(parts, options)
        tokens, runner = run(name, options)
        assert tokens == expected, options
        if "prefix" in parts and options.get("score") != "snapkv":  # which sees such prompts computed
            assert runner.strategy.stats()["hit_tokens"] > 0
        if "top_n" not in options and "mass" not in options:  # a token computed again is prompt, read exactly
            tokens, runner = run(name, options, num_blocks=16)
            assert tokens == expected, options
            assert runner.num_preemptions > 0 or parts & {"window", "every4", "evict", "prefix"}


@pytest.mark.parametrize("name", CLASHES)
def test_sums_that_cannot_work_say_why(name):
    with pytest.raises(ValueError, match="choose one"):
        build(name, MODEL, num_blocks=4)


@pytest.mark.parametrize("name", [name for name, preset in STRATEGIES.items() if preset.alone])
def test_some_stand_alone(name):
    for other in PARTS:
        with pytest.raises(ValueError, match="stands alone"):
            build(f"{name}+{other}", MODEL, num_blocks=4)
