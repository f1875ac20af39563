"""What a lossy strategy costs: perplexity, and the distance of its logits from the baseline's.

Teacher forcing: the text is fed as it stands, and the logits before each of its tokens are judged. Two ways in:

    cost(...)         B texts through `strategy.cache()`, beside the baseline; a few thousand tokens
    stream_nll(...)   one text of any length through one row of the runner's door, in flat memory

How a text is cut into forwards matters where a strategy treats a prompt and a decode step differently (top-N offload
reads all of V while it prefills): feed what is judged one token at a time there. Window, int8 and fp8 are defined
token by token, and any chunk gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from kv_strategies.baseline import Baseline
    from kv_strategies.strategy import Strategy

MIN_JUDGED = 200  # tokens; the perplexity of fewer moves by more than what most settings lose


@dataclass
class Reference:
    """What a strategy is judged against: logits of the tokens behind the prompts, computed once for many strategies."""

    logits: Tensor  # [B, n, V]

    @property
    def judged(self) -> int:
        """Tokens whose prediction is judged: the last of each text has none behind it."""
        return self.logits.shape[0] * (self.logits.shape[1] - 1)


@torch.inference_mode()
def judge(model: LlamaForCausalLM, baseline: Baseline, token_ids: Tensor, *, num_prompt: int = 0) -> Reference:
    """The baseline's logits of `token_ids` [B, n] behind the first `num_prompt`: B (n - num_prompt) V numbers."""
    return Reference(torch.cat([logits for _, logits in _pieces(model, baseline, token_ids, num_prompt, 512)], dim=1))


@torch.inference_mode()
def cost(
    model: LlamaForCausalLM,
    strategy: Strategy | Baseline,
    baseline: Baseline | Reference,
    token_ids: Tensor,
    *,
    num_prompt: int = 0,
    chunk: int = 512,
) -> dict[str, float]:
    """Perplexity of both on the same texts, and how far the strategy's logits are from the baseline's.

    Args:
        baseline: or what `judge` gave for these texts, where several strategies are compared with it.
        token_ids: [B, n] texts.
        num_prompt: tokens that are fed first, in chunks of 512, and not judged.
        chunk: tokens a forward after that; 1 for decode steps.

    Returns:
        perplexity, baseline_perplexity; mean_kl, of the baseline's next-token distribution from the strategy's in
        nats; top1_agreement, the share of places where both would say the same; num_judged tokens.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=model.device)  # nll, baseline's nll, KL, agreement
    num_judged = 0
    if isinstance(baseline, Reference):
        expected_pieces = baseline.logits.split(chunk, dim=1)
    else:  # in lockstep, so that no logits are kept
        expected_pieces = (logits for _, logits in _pieces(model, baseline, token_ids, num_prompt, chunk))
    pieces = _pieces(model, strategy, token_ids, num_prompt, chunk)
    for (begin, logits), expected in zip(pieces, expected_pieces, strict=True):
        targets = token_ids[:, begin + 1 : begin + 1 + logits.shape[1]].to(model.device)
        logits, expected = (x[:, : targets.shape[1]].float().log_softmax(-1) for x in (logits, expected))
        totals[0] -= logits.gather(-1, targets[..., None]).sum()
        totals[1] -= expected.gather(-1, targets[..., None]).sum()
        totals[2] += F.kl_div(logits, expected, reduction="sum", log_target=True)
        totals[3] += (logits.argmax(-1) == expected.argmax(-1)).sum()
        num_judged += targets.numel()
    nll, expected_nll, kl, agreement = (totals / num_judged).tolist()
    return {
        "perplexity": math.exp(nll),
        "baseline_perplexity": math.exp(expected_nll),
        "mean_kl": kl,
        "top1_agreement": agreement,
        "num_judged": num_judged,
    }


def _pieces(model, strategy, token_ids: Tensor, num_prompt: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(index of the first token, logits [B, c, V]) of the forwards after the prompt."""
    from kv_strategies.step.upstream import with_cache

    cache = strategy.cache()
    prompt, rest = token_ids.to(model.device).split((num_prompt, token_ids.shape[1] - num_prompt), dim=1)
    for piece in prompt.split(512, dim=1) if num_prompt else ():
        model(input_ids=piece, **with_cache(cache), use_cache=True, logits_to_keep=1)
    begin = num_prompt
    for piece in rest.split(chunk, dim=1):
        yield begin, model(input_ids=piece, **with_cache(cache), use_cache=True).logits
        begin += piece.shape[1]


@torch.inference_mode()
def stream_logits(
    model: LlamaForCausalLM, strategy: Strategy, token_ids: Tensor, chunk: int = 512
) -> Iterator[tuple[int, Tensor]]:
    """Feed one row through the strategy as the runner does, positions rebased and all.

    Args:
        token_ids: [n], on any device; moved a chunk at a time.

    Yields:
        index of the chunk's first token, logits [c, V] of its tokens. `strategy.stats()` says what is held meanwhile.
    """
    from kv_strategies.step.forward import AttendingCache, forward
    from kv_strategies.step.plan import PlanBuffer

    cache, table = AttendingCache(strategy), strategy.open_table(())
    try:
        for begin in range(0, len(token_ids), chunk):
            piece = token_ids[begin : begin + chunk].to(model.device)
            strategy.rebase([table])
            strategy.reserve([(table, len(piece))])
            buffer = PlanBuffer(model.device, 1, len(piece), len(table.blocks), strategy.block_size)
            plan = buffer.fill([table.row(len(piece))])
            yield begin, forward(cache, plan, piece, torch.arange(len(piece), device=model.device))
    finally:
        table.release()


@torch.inference_mode()
def stream_nll(
    model: LlamaForCausalLM, strategy: Strategy, token_ids: Tensor, chunk: int = 512
) -> Iterator[tuple[int, Tensor]]:
    """(index of the chunk's first token, nll [c] float32): of the token after each one, given what it sees.

    Nothing is read back, so that the host may run ahead of a GPU; exp of the mean is the perplexity.
    """
    for begin, logits in stream_logits(model, strategy, token_ids, chunk):
        targets = token_ids[begin + 1 : begin + 1 + len(logits)].to(logits.device)
        yield begin, F.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")


@torch.inference_mode()
def recomputed_nll(
    model: LlamaForCausalLM,
    token_ids: Tensor,
    places: Sequence[int],
    *,
    window: int,
    sinks: int,
    batch: int = 8,
) -> Tensor:
    """[len(places)] nll of token p + 1 for each p of `places`, from scratch: a dense model over sinks and window alone.

    What StreamingLLM calls sliding window with recomputation. It is not the same function as a window over a cache,
    whose deeper layers have heard of tokens before the window, but what a user without a cache would compute.

    Raises:
        ValueError: a place without a full window before it or a token after it.
    """
    if min(places) < window + sinks - 1 or max(places) > len(token_ids) - 2:
        raise ValueError(
            f"places must be from {window + sinks - 1} to {len(token_ids) - 2}, got {list(places)[:9]} ..."
        )
    losses = []
    for some in torch.tensor(places).split(batch):
        rows = [torch.cat((token_ids[:sinks], token_ids[p + 1 - window : p + 1])) for p in some.tolist()]
        logits = model(input_ids=torch.stack(rows).to(model.device), use_cache=False, logits_to_keep=1).logits[:, -1]
        losses.append(F.cross_entropy(logits.float(), token_ids[some + 1].to(logits.device), reduction="none"))
    return torch.cat(losses)
