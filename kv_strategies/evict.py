"""Evict: which tokens are worth keeping?

Of a long prompt most tokens are never looked at again, and which ones, each head may say for itself. A *score*
(`scores/`) gives every token of a row a number, head by head; the highest are kept, equally many by all heads, and the
blocks that this empties go back to the pool:

    before   [ 7 | 4 | 2 | 9 | 1 ]   80 tokens          head 0 keeps 3 17 40 ..   head 1 keeps 0 5 77 ..   32 each
    after    [ 7 | 4 ]               32 tokens, position 80 comes next             2, 9 and 1 are free

That fits blocks: all tokens that are kept are in the past of every later query, and attention does not ask in which
order they lie, since keys are stored rotated. So slot j of a head holds whichever token that head kept, and one block
table serves all heads and layers. Positions go on from the tokens seen, indices from the tokens kept.

A row is compacted once its prompt is computed, before its first decode step: the whole prompt is seen by itself, and
the first token is exact. With `every` it is compacted again whenever it has grown by so many tokens, so a row of any
length takes flat memory. A part of the prompt that others share stays whole: survivors are then copied.

Saves: memory, and the step time of reading it, in proportion to what is dropped. Costs: what is dropped is forgotten,
which is lossy; scoring reads K once (some scores attend to it, `step/rings.py`), compaction reads and writes what
survives. While its prompt is computed a row takes as much as ever.

    python -m kv_strategies.evict       prints a block table as it evolves
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Selection, Site, Unsound
from .scores import SCORES, At, Score
from .step.graphs import is_out_of_memory
from .step.plan import RING_SIZE
from .step.store import KVShape


class Evict(Selection):
    """Keeps the tokens that a score likes best.

    Args:
        score: a name of `SCORES`.
        keep: how much of a prompt: a share in (0, 1], rounded up to a token, or a number of tokens. A prompt of fewer
            stays whole.
        every: compact a row again, to as many tokens, whenever it has grown by so many; None for the prompt alone.

    Raises:
        ValueError: an unknown score, or numbers that make no sense.
    """

    def __init__(self, *, score: str = "snapkv", keep: float | int = 0.5, every: int | None = None):
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; known are {', '.join(SCORES)}")
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise ValueError(f"keep as a share must be in (0, 1], got {keep}; a number of tokens is a whole number")
        if isinstance(keep, int) and keep < 1:
            raise ValueError(f"keep must be at least 1 token, or a share in (0, 1], got {keep}")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 token, got {every}; leave it out to compact prompts alone")
        self.every, self._keep = every, keep
        self.name, self._score = f"score {score!r}", SCORES[score]()
        if not isinstance(self._score, Score):
            raise ValueError(f"{self.name} is a {type(self._score).__name__}, and no `kv_strategies.scores.Score`")
        self.num_queries, self.reads_values = self._score.num_queries, self._score.reads_values
        if self.num_queries > RING_SIZE:
            raise ValueError(f"{self.name} asks for {self.num_queries} queries, and the last {RING_SIZE} are kept")

    def bind(self, site: Site) -> None:
        self._score.bind(site)

    def identity(self) -> dict[str, object]:
        return {}  # blocks that are shared were computed before anything was dropped

    def open(self, num_tokens: int) -> None:
        if isinstance(self._keep, int) and self._keep > num_tokens:
            raise ValueError(
                f"keep is {self._keep} tokens and the pool holds {num_tokens}: nothing would ever be evicted. Keep "
                "less, or build with a larger num_blocks"
            )

    def cap(self, num_prompt: int) -> int:
        return self._keep if isinstance(self._keep, int) else max(1, math.ceil(round(self._keep * num_prompt, 6)))

    def num_recent(self, num_kept: int) -> int:
        return min(self._score.num_recent(num_kept), num_kept)

    def choose(
        self,
        layer_ids: Sequence[int],
        keys: Tensor,
        values: Tensor | None,
        queries: Tensor | None,
        num_kept: int,
        position: int,
    ) -> tuple[Tensor, Tensor]:
        num_layers, _, num_tokens = keys.shape[:3]
        at_once, scores = num_layers if self._score.takes_layers else 1, []
        for first in range(0, num_layers, at_once):
            these = slice(first, first + at_once)
            k, v, q = (None if part is None else part[these].flatten(0, 1) for part in (keys, values, queries))
            scores.append(self._scored(k, v, q, At(layer_ids[first], position, at_once)))
        score = torch.cat(scores)  # [l * Hkv, n]
        num_recent = self.num_recent(num_kept)
        first_recent = num_tokens - num_recent
        best = highest(score[:, :first_recent], num_kept - num_recent)
        recent = torch.arange(first_recent, num_tokens, device=keys.device).expand(len(score), -1)
        index = torch.cat((best, recent), 1).unflatten(0, (num_layers, -1))
        return index, ~score.isnan().unflatten(0, (num_layers, -1)).flatten(1).any(1)

    def choosing_bytes(self, num_keys: int, num_tokens: int, shape: KVShape) -> int:
        if not self._score.takes_layers:
            num_keys = min(num_keys, shape.num_kv_heads * num_tokens)
        return self._score.num_bytes(num_keys, num_tokens, shape.num_heads // shape.num_kv_heads, shape.head_dim)

    def _scored(self, keys: Tensor, values: Tensor | None, queries: Tensor | None, at: At) -> Tensor:
        try:
            score = self._score.score(keys, values, queries, at)
        except Exception as error:
            if is_out_of_memory(error):  # there may be room for it later
                raise
            raise Unsound(f"{self.name} fails in layer {at.layer_idx}: {type(error).__name__}: {error}") from error
        wanted = list(keys.shape[:2])
        if not torch.is_tensor(score) or list(score.shape) != wanted or not score.is_floating_point():
            got = f"{score.dtype} {list(score.shape)}" if torch.is_tensor(score) else type(score).__name__
            raise Unsound(f"{self.name} must give [Hkv, n], floats {wanted}, got {got}")
        return score

    def num_blocks(self, num_prompt: int, num_tokens: int, block_size: int, is_shared: bool) -> int:
        cap = self.cap(num_prompt)
        longest = num_tokens - max(0, num_prompt - cap)  # but for the prompt itself, and what it grows by at once
        if self.every is not None:
            longest = min(longest, cap + self.every)
        longest = max(longest, min(num_prompt, num_tokens))
        copies = -(-cap // block_size) if is_shared and longest > cap else 0
        return -(-longest // block_size) + copies


def highest(score: Tensor, count: int) -> Tensor:
    """Indices [H, count] of the highest numbers of each row [H, n], ascending; of equal ones the earlier go first.

    Without a sort, and without waiting for the device: what is above the lowest of them, and as many that equal it as
    are lacking, each put in its place among those chosen.
    """
    if not count:
        return score.new_zeros(len(score), 0, dtype=torch.int64)
    lowest = score.topk(count, sorted=False).values.amin(1, keepdim=True)
    above, equal = score > lowest, score == lowest
    lacking = count - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= lacking))
    place = torch.where(chosen, chosen.cumsum(1) - 1, count)  # of those not chosen behind all others
    index = torch.arange(score.shape[1], device=score.device).expand(score.shape)
    return index.new_zeros(len(score), count + 1).scatter_(1, place, index)[:, :count]


def main() -> None:
    from .paged import BlockPool, BlockTable

    size, cap, every, num_heads, head_dim = 4, 8, 8, 2, 16
    pool, evict = BlockPool(num_blocks=8, block_size=size), Evict(score="knorm", keep=cap, every=every)
    table = BlockTable(pool)
    torch.manual_seed(0)
    keys = torch.randn(num_heads, 64, head_dim)  # of every token that will come
    heads: list[list[int]] = [[] for _ in range(num_heads)]  # the tokens that each has stored
    print(
        f"Blocks of {size} tokens; two heads keep {cap} of a prompt, and again whenever the row has grown by {every}.\n"
    )
    print(f"{'event':<24} {'seen':>4} {'kept':>4} {'free':>4}   {'block table':<20} tokens of head 0, of head 1")

    def append(num_tokens: int) -> None:
        for head in heads:
            head += range(table.num_seen, table.num_seen + num_tokens)
        table.append(num_tokens)

    def show(event: str) -> None:
        blocks, kept = (" ".join(map(str, numbers)) for numbers in (table.blocks, heads[0]))
        others = " ".join(map(str, heads[1])) if heads[1] != heads[0] else "the same"
        shown = f"{kept}   |   {others}" if table.num_tokens <= cap + 1 else ""
        print(f"{event:<24} {table.num_seen:>4} {table.num_tokens:>4} {pool.num_free:>4}   [ {blocks:<16} ] {shown}")

    def compact() -> None:
        stored = torch.stack([keys[number, head] for number, head in enumerate(heads)])
        index, _ = evict.choose([0], stored[None], None, None, cap, table.num_seen - 1)
        heads[:] = [[head[i] for i in kept] for head, kept in zip(heads, index[0].tolist(), strict=True)]
        table.compact(table.blocks[: -(-cap // size)].tolist(), cap)
        show("compacted")

    append(22)
    show("a prompt of 22 tokens")
    compact()
    for _ in range(20):
        if table.num_tokens >= cap + every:
            show(f"grown by {every}")
            compact()
        append(1)
    pool.check_integrity()
    print("\nPositions go on from the tokens seen, indices from the tokens kept; memory stays flat.")


if __name__ == "__main__":
    main()
