"""A retention from outside: of the blocks that are older than `recent` tokens it keeps every fourth.

python examples/retention_every_fourth.py
"""

from kv_strategies import Preset, build, register
from kv_strategies.base import Retention
from kv_strategies.models import load_model


class EveryFourth(Retention):
    """block table   [ 7 | . | . | . | 2 | . | . | . | 9 | 1 | 4 ]      the last `recent` tokens are all there"""

    def __init__(self, *, recent: int = 256):
        if recent < 1:
            raise ValueError(f"recent must be at least 1 token, got {recent}")
        self.recent = recent

    def bind(self, site):
        self._block_size = site.block_size

    def visible(self, position, index):
        block, num_old = index // self._block_size, (position - self.recent) // self._block_size
        return (block >= num_old) | (block % 4 == 0)

    def dead(self, num_tokens, block_size):
        num_old = (num_tokens - self.recent) // block_size
        return tuple((first, min(first + 3, num_old)) for first in range(1, num_old, 4))

    def num_blocks(self, num_tokens, chunk, block_size):  # all, but for three of four of the old before the last chunk
        num_all = -(-num_tokens // block_size)
        fewest = (num_all - 1) * block_size + 1  # tokens that take as many blocks: of these the fewest are old
        num_old = max(0, (fewest - chunk - self.recent) // block_size)
        return num_all - num_old + -(-num_old // 4)


EVERY_FOURTH = Preset("every fourth of the old blocks, all recent ones; lossy", "retention", EveryFourth, lossy=True)

if __name__ == "__main__":
    register("every4", EVERY_FOURTH)
    model, tokenizer = load_model()
    strategy = build("every4", model, num_blocks=64, recent=24, block_size=8)
    ids = tokenizer("In the beginning God created the heaven and the earth.", return_tensors="pt").input_ids
    cache = strategy.cache()
    out = model.generate(ids, cache=cache, max_new_tokens=60, do_sample=False)
    print(tokenizer.decode(out[0]), f"\n{out.shape[1]} tokens, in the block table {cache.tables[0].blocks}")
