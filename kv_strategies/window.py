"""Window: which blocks may still be seen?

A query sees the last `window` tokens, itself included (Mistral's rolling buffer; Jiang et al., 2023, arXiv 2310.06825),
and the first `sinks` tokens of its row, onto which attention puts the weight it has no other use for (StreamingLLM;
Xiao et al., ICLR 2024, arXiv 2309.17453; with 0 sinks perplexity explodes once the first tokens are out of sight):

    query p sees     j <= p    with    j > p - window    or    j < sinks

    block table      [ 7 | 4 | . | . | . | 2 | 9 | 1 ]      . goes back to the pool as soon as nothing sees it
                       ^sinks             ^window  ^p

Saves: memory and step time stay flat however long the row. Costs: what is out of sight is forgotten, which is lossy.

Positions are those inside the cache, sinks first and the window right behind them. Cached keys never follow: rotary
embedding turns query and key by angles in proportion to their positions, and only the difference counts. So it is the
*query* that is turned back, for the sinks alone, from p to window + sinks - 1, where it would stand if nothing lay
between.

Token indices would grow without bound all the same, and float32 angles lose precision with them. When a row passes
`rebase_at` tokens, the dead blocks are cut out of its table, so that

    block table      [ 7 | 4 | 2 | 9 | 1 ]                  p is smaller by three blocks

and the keys behind the cut are turned back by as much, in place: once an epoch, K of one window, all differences as
they were. An epoch is longer than a window, so no key is turned, and rounded, twice.

    python -m kv_strategies.window       prints a block table as it evolves
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Retention, Site
from .paged import Ranges
from .step.plan import NULL_BLOCK, Plan


class SlidingWindow(Retention):
    """The last `window` tokens and the first `sinks`.

    Args:
        rebase_at: token index at which a row is rebased; 4 times what is visible, and at least 8192, unless told.

    Raises:
        ValueError: sizes that make no sense together.
    """

    def __init__(self, *, window: int = 2048, sinks: int = 4, rebase_at: int | None = None):
        if sinks < 0:
            raise ValueError(f"sinks must be 0 or more, got {sinks}")
        if window < max(1, sinks):
            raise ValueError(f"the window must be at least 1 token and as many as the sinks, got {window} and {sinks}")
        self.rebase_at = max(8192, 4 * (window + sinks)) if rebase_at is None else rebase_at
        self.window, self.sinks = window, sinks

    def bind(self, site: Site) -> None:
        block_size, window = site.block_size, self.window
        if window < block_size:
            raise ValueError(
                f"a window of {window} tokens is smaller than a block of {block_size}, so no block could ever be freed "
                f"in time: give a window of at least {block_size} or a smaller block_size"
            )
        shortest = 2 * (window + self.sinks + block_size)
        if self.rebase_at < shortest:
            raise ValueError(f"rebase_at must be at least {shortest}, twice what a row keeps, got {self.rebase_at}")
        self._rotary_emb = site.rotary_emb

    def identity(self) -> dict[str, object]:
        return {"window": self.window, "sinks": self.sinks}  # when rows are rebased changes what no file holds

    def dead(self, num_tokens: int, block_size: int) -> Ranges:
        first, last = -(-self.sinks // block_size), (num_tokens - self.window + 1) // block_size
        return ((first, last),) if first < last else ()

    def num_visible(self, num_tokens: int) -> int:
        return min(num_tokens, self.window + self.sinks)

    def num_blocks(self, num_tokens: int, chunk: int, block_size: int) -> int:
        # window - 1 tokens are seen by the first of the chunk; they may begin and end anywhere in a block.
        moving = -(-(self.window + chunk - 2) // block_size) + 1
        return min(-(-num_tokens // block_size), -(-self.sinks // block_size) + moving)

    def sink_query(self, query: Tensor, plan: Plan) -> Tensor | None:
        """[T, Hq, D]: the queries as if they stood right behind sinks and window."""
        if not self.sinks or max(plan.row_lens, default=0) <= self.window + self.sinks:
            return None  # nothing lies between yet

        def behind() -> tuple[Tensor, Tensor]:
            index, farthest = plan.positions.to(query.device), self.window + self.sinks - 1
            distance = index if plan.distances is None else plan.distances.to(query.device)
            return self._angles(torch.where(index > farthest, farthest - distance, 0))

        return turn(query, *plan.once(("behind the sinks", query.device), behind))

    def stale(self, num_tokens: int, block_size: int) -> tuple[int, int]:
        dead = self.dead(num_tokens, block_size) if num_tokens >= self.rebase_at else ()
        return dead[0] if dead else (0, 0)

    def turn_keys(self, keys: Tensor, num_tokens: int) -> Tensor:
        return turn(keys, *self._angles(torch.tensor(num_tokens, device=keys.device)))

    def _angles(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [.., 1, D] float32 of turning by so many tokens [..]; see `turn` for the signs."""
        inv_freq = self._rotary_emb.inv_freq.to(distance.device, torch.float32)
        angles = distance[..., None, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [.., H, D] further, in float32.

    Number i and number i + D / 2 of a head are one pair (x, y), the convention of Transformers' Llama, and become
    (x cos - y sin, y cos + x sin).
    """
    swapped = states.roll(states.shape[-1] // 2, -1)
    return torch.addcmul(states * cos, swapped, sin).to(states.dtype)


def main() -> None:
    from .paged import BlockPool, BlockTable

    pool = BlockPool(num_blocks=8, block_size=4)
    window = SlidingWindow(window=8, sinks=3, rebase_at=30)
    table = BlockTable(pool)
    print("Blocks of 4 tokens; a query sees 3 sinks and the last 8 tokens; rows are rebased at 30.\n")
    print(f"{'event':<22} {'tokens':>6}   {'free':>4}   block table   (. was given back)")

    def show(event: str) -> None:
        blocks = " ".join("." if block == NULL_BLOCK else str(block) for block in table.blocks)
        print(f"{event:<22} {table.num_tokens:>6}   {pool.num_free:>4}   [ {blocks} ]")

    table.append(10)
    show("a prompt of 10 tokens")
    for _ in range(34):
        num_free = pool.num_free
        table.drop(window.dead(table.num_tokens, 4))
        freed = pool.num_free > num_free
        stale = window.stale(table.num_tokens, 4)
        if stale[1] > stale[0]:
            show("before rebasing")
            table.cut(*stale)
            show("rebased")
        table.append(1)
        if freed:
            show("a block is out of sight")
    pool.check_integrity()
    kept = window.num_blocks(10**6, 1, 4)
    print(f"\nA row of a million tokens, one at a time, never holds more than {kept} blocks; without a window, 250000.")


if __name__ == "__main__":
    main()
