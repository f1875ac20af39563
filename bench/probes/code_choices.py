"""What 4-bit codes of K, or of V, cost a model, for each way to choose them: why `int4` is what it is.

    python -m bench.probes.code_choices --texts 2 --length 1536
    python -m bench.probes.code_choices --only turned

K (as rotary embedding leaves it) or V is rounded to codes and back in front of torch's attention, in every layer and
for every token, its own included; the rest stays float32. Every token of the texts is judged against the exact model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.markdown import table
from kv_strategies.kernels.reference import turn
from kv_strategies.models import load_model
from kv_strategies.models.text import prompts

Round = Callable[[Tensor], Tensor]


def symmetric(x: Tensor) -> Tensor:
    """-7 .. 7."""
    return _rounded(x, x.abs().amax(-1, keepdim=True) / 7, -7, 7)


def even(x: Tensor) -> Tensor:
    """Sixteen codes around zero, none of them zero: -7.5, -6.5, .. 7.5."""
    return _rounded(x, x.abs().amax(-1, keepdim=True) / 7.5, -7.5, 7.5)


def from_least(x: Tensor) -> Tensor:
    """0 .. 15 above the least number, which is stored as well."""
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    least = least.bfloat16().float()
    return _rounded(x - least, (most - least) / 15, 0, 15) + least


def _rounded(x: Tensor, scale: Tensor, first: float, last: float) -> Tensor:
    scale = scale.bfloat16().float()
    steps = (x / torch.where(scale > 0, scale, 1.0) - first).round()
    return (steps.clamp(0, last - first) + first) * scale


def in_groups(way: Round, size: int) -> Round:
    return lambda x: way(x.unflatten(-1, (-1, min(size, x.shape[-1])))).flatten(-2)


def turned(way: Round) -> Round:
    return lambda x: turn(way(turn(x)))


WAYS = {
    f"{of_turned}{name}, a scale for {size}": around(in_groups(way, size))
    for of_turned, around in (("", lambda way: way), ("turned: ", turned))
    for name, way in (("-7 .. 7", symmetric), ("sixteen codes", even), ("scale and least number", from_least))
    for size in (64, 32)
}


def judge(model, text: Tensor, of_keys: Round | None = None, of_values: Round | None = None) -> Tensor:
    """Log probabilities [n, V] of the token after each of a text."""

    def attention(module, query, key, value, mask, scaling=None, **options):
        key = key if of_keys is None else of_keys(key)
        value = value if of_values is None else of_values(value)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("rounded", attention)
    model.set_attn_implementation("rounded")
    with torch.no_grad():
        return model(text[None], use_cache=False).logits[0].log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--length", type=int, default=1536)
    parser.add_argument("--only", default="", help="those whose name has this in it")
    args = parser.parse_args()
    model, tokenizer = load_model()
    model.float()
    ways = {name: way for name, way in WAYS.items() if args.only in name}
    found = {(name, side): torch.zeros(2) for name in ways for side in "kv"}  # sums of losses above the exact, of KL
    for text in torch.tensor(prompts(tokenizer, [args.length] * args.texts, seed=5)).to(model.device):
        exact = judge(model, text)
        for (name, side), sums in found.items():
            rounded = judge(model, text, **{{"k": "of_keys", "v": "of_values"}[side]: ways[name]})
            lost = (exact - rounded)[:-1].gather(1, text[1:, None]).mean()
            sums += torch.stack((lost, (exact.exp() * (exact - rounded)).sum(-1).mean())).cpu()

    def cell(sums: Tensor) -> str:
        lost, kl = sums / args.texts
        return f"{lost.exp() - 1:+.1%}, {kl:.3f}"

    rows = [[name, *(cell(found[name, side]) for side in "kv")] for name in ways]
    print(table(["codes", "K: perplexity, KL", "V: perplexity, KL"], rows))


if __name__ == "__main__":
    main()
