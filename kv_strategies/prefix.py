"""Prefix: who already holds these tokens?

K and V of a token depend on the tokens before it and on nothing after. So two requests that start alike (a system
prompt, a chat so far, a document asked about twice) have the same K and V there, and the second can take the blocks of
the first instead of computing them: RadixAttention (Zheng et al., 2023, arXiv 2312.07104), automatic prefix caching in
vLLM. Full blocks are published under a hash of everything that their content depends on:

    root = H(state of the model, policies; salt)      hash of a block = H(hash of the block before it; its tokens)

    root --- [You are a helpful] --- [assistant. Answer] -+- [in French: ...]        blocks form a radix tree,
                  block 4                block 7          +- [in verse: ...]         a request is a path from the root

Saves: the time to first token of whatever is shared, and its memory. Costs: about 1 us a block, to hash it when it is
published; looking for it later compares its tokens with those in the tree, which takes less. Lossless: since tokens are
compared, not even two hashes that collide can give wrong ones, and at least one token of a request is always left to
compute.

The cache holds one reference to each block it knows. A block that nobody else holds is *idle*, and the one that has
been idle longest is given back when the pool runs out: a request gives its last block back first, so leaves of the tree
go before what they hang on. Requests with different salts (tenants) share nothing.

    python -m kv_strategies.prefix     prints the tree as requests come and go
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from .base import Placement, Sharing
from .paged import BlockPool, BlockTable
from .step.interrupts import uninterrupted
from .step.plan import NULL_BLOCK
from .tiers import saved
from .tiers.identity import fingerprint
from .tiers.lower import Chain, LowerTiers
from .tiers.shared import Folder, Name

_BLOCKS_AT_ONCE = 256  # read from the pool for a file


@dataclass(slots=True, eq=False)
class Node:
    """A published block in the tree; a root stands for a salt, and a state of the model, and has no block."""

    digest: bytes  # 256 bits
    parent: Node | None
    tokens: bytes  # little-endian int32; of a root, the digest of its salt
    block: int
    children: dict[bytes, Node] = field(default_factory=dict)  # by their tokens
    num_hits: int = 0
    num_pins: int = 0  # prompts preloaded through it, as often as they were; each holds a reference
    chain: Chain = field(init=False, repr=False)  # for lower tiers

    def __post_init__(self) -> None:
        self.chain = Chain(self.parent.chain if self.parent else None, self.tokens or self.digest)


class PrefixCache(Sharing):
    """Blocks by the hash of their tokens and of all tokens before them.

    Args:
        shared_path, shared_bytes: a folder through which all processes of this user share what they have computed
            (`tiers/shared.py`), and how large it may become.
    """

    def __init__(self, *, shared_path: str | Path | None = None, shared_bytes: int | None = None):
        if (shared_path is None) != (shared_bytes is None):
            raise ValueError("shared_path and shared_bytes go together: a folder, and how much of it to use")
        self._shared_path, self._shared_bytes = shared_path, shared_bytes
        self._folder: Folder | None = None

    def open(self, pool: BlockPool, identity: dict[str, object], tiers: LowerTiers | None = None) -> None:
        self.pool = pool
        self._tiers = tiers or LowerTiers()
        self.identity = identity
        self._fingerprint = fingerprint(identity)
        self._told: dict[str, object] | None = None  # the identity as other processes are told it, where it is known
        self._roots: dict[bytes, Node] = {}
        self._nodes: dict[bytes, Node] = {}
        self._by_block: dict[int, Node] = {}
        self._preloaded: Counter[Node] = Counter()  # the last block of each prompt, and how often it was preloaded
        self.num_pinned = 0

    def join(self, placement: Placement, weights: Callable[[], str | None]) -> None:
        if self._shared_path is None:
            return
        block_bytes = placement.read_blocks([0]).shape[1]
        self._folder = Folder(self._shared_path, self._shared_bytes, 4 * self.pool.block_size, block_bytes)
        self._placement, self._weights = placement, weights
        self._tell()  # all weights are read once: not in the first request

    # --- sharing

    def follow(self, content: int) -> None:
        """Trees of other states of the model stay until their room is needed, but for what was preloaded: it may go."""
        while self._preloaded:
            self._unpin(next(iter(self._preloaded)))
        self.pool.follow(content)
        self._told = None

    def match(self, token_ids: Sequence[int], salt: str) -> tuple[list[int], int]:
        held: list[Node] = []
        try:
            with uninterrupted():
                for node in self._path(token_ids, salt):
                    self.pool.share(node.block)
                    held.append(node)
            self._promote(held, token_ids, salt)
            self._fetch(held, token_ids, salt)
            return [node.block for node in held], len(held) * self.pool.block_size
        except BaseException:
            self._release([node.block for node in held])
            raise

    @uninterrupted()
    def publish(self, token_ids: Sequence[int], table: BlockTable, salt: str) -> None:
        if table.num_cut or table.is_mixed:
            return  # its keys are turned to other positions, or the first were computed by another model
        num_tokens = min(len(token_ids), table.num_tokens)
        node, path = self.root(self._salted(salt)), []
        for tokens, block in zip(self._split(token_ids[:num_tokens]), table.blocks.tolist(), strict=False):
            known = node.children.get(tokens)
            if known is None and block != NULL_BLOCK:  # a block out of the window has been given back
                known = self.insert(node, tokens, block)
            if known is None:
                break
            node = known
            path.append(node)
        self._tiers.attempt(self._offer, path, salt)

    def insert(self, parent: Node, tokens: bytes, block: int) -> Node | None:
        """Keep a block that holds `tokens` behind `parent`; None where its hash is taken by other tokens."""
        node = Node(block_digest(parent.digest, tokens), parent, tokens, block)
        if node.digest in self._nodes:
            return None
        self._insert(node)
        return node

    def _insert(self, node: Node) -> None:
        """Put a node whose hash is free into the tree, behind a parent that is there."""
        assert node.block not in self._by_block, "a block has two contents"
        self.pool.keep(node.block)
        if node.parent.parent is None:
            self._roots[node.parent.digest] = node.parent
        self._nodes[node.digest] = node
        node.parent.children[node.tokens] = self._by_block[node.block] = node

    @uninterrupted()
    def evict(self, num_blocks: int) -> int:
        before = self.pool.num_free
        while self.pool.num_free < before + num_blocks and self.pool.idle:
            node = self._by_block[next(iter(self.pool.idle))]
            while idle := [child for child in node.children.values() if child.block in self.pool.idle]:
                node = idle[0]  # a leaf goes before what it hangs on, though it may have been idle for less long
            self.drop(node, lambda *content: self._tiers.attempt(self._tiers.demote, *content))
        return self.pool.num_free - before

    def num_evictable(self) -> int:
        return len(self.pool.idle)

    def held_blocks(self) -> list[int]:
        return [node.block for node in self._nodes.values() for _ in range(1 + node.num_pins)]

    @uninterrupted()
    def clear(self) -> None:
        for node in list(self._preloaded.elements()):
            self._unpin(node)
        for root in list(self._roots.values()):
            for node in list(root.children.values()):
                self.drop(node)
        self._told = None

    def count_hit(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._by_block[block].num_hits += 1

    # --- preloaded prompts

    @uninterrupted()
    def pin(self, token_ids: Sequence[int], salt: str) -> int:
        path = self._path(token_ids, salt)
        if path:
            self._preloaded[path[-1]] += 1
            for node in path:
                self.pool.share(node.block)
                self.num_pinned += node.num_pins == 0
                node.num_pins += 1
        return len(path) * self.pool.block_size

    @uninterrupted()
    def forget(self, token_ids: Sequence[int], salt: str) -> None:
        path = self._path(token_ids, salt)
        if not path or path[-1] not in self._preloaded:
            raise ValueError("this prompt is not preloaded with this salt, or the model has changed since it was")
        self._unpin(path[-1])

    def num_pinned_of(self, token_ids: Sequence[int], salt: str) -> int:
        return sum(node.num_pins > 0 for node in self._path(token_ids, salt)) if self._preloaded else 0

    def _unpin(self, node: Node) -> None:
        self._preloaded[node] -= 1
        if not self._preloaded[node]:
            del self._preloaded[node]
        for step in lineage(node):
            step.num_pins -= 1
            self.num_pinned -= step.num_pins == 0
            self.pool.release(step.block)

    # --- across restarts

    def save(self, path: str | Path, placement: Placement, weights: str = "") -> int:
        nodes = list(self._current())
        numbers = {node: number for number, node in enumerate(nodes)}
        roots: dict[bytes, int] = {}
        for node in nodes:
            if node.parent not in numbers:
                roots.setdefault(node.parent.tokens, -1 - len(roots))

        def records() -> Iterator[saved.Record]:
            for begin in range(0, len(nodes), _BLOCKS_AT_ONCE):
                some = nodes[begin : begin + _BLOCKS_AT_ONCE]
                for node, data in zip(some, placement.read_blocks([node.block for node in some]), strict=True):
                    parent = numbers[node.parent] if node.parent in numbers else roots[node.parent.tokens]
                    yield saved.Record(parent, node.tokens, data.numpy().tobytes())

        saved.write(Path(path), self.identity | {"weights": weights}, list(roots), len(nodes), records())
        return len(nodes)

    def load(self, path: str | Path, placement: Placement, weights: str = "") -> saved.Loaded:
        """A batch is written to its blocks first, and is in the tree afterwards, or not at all."""
        fates: Counter[str] = Counter()
        taken: list[int] = []  # one reference each of our own, so that no block is idle until all are there
        block_bytes = placement.read_blocks([0]).shape[1]
        identity = self.identity | {"weights": weights}
        with uninterrupted() as interrupts:
            try:
                with saved.Reader(Path(path), identity, 4 * self.pool.block_size, block_bytes) as file:
                    roots = {digest: self.root(digest) for digest in file.roots}
                    admission = _Admission(self, [roots[digest] for digest in file.roots], taken, fates)
                    for batch in file.batches():
                        interrupts.check()
                        new = [found for record in batch if (found := admission.take(record)) is not None]
                        if new:
                            contents = torch.frombuffer(bytearray(b"".join(data for _, data in new)), dtype=torch.uint8)
                            placement.write_blocks([node.block for node, _ in new], contents.view(len(new), -1))
                        for node, _ in new:
                            self._insert(node)
                        fates["num_blocks"] += len(new)
                    fates["num_damaged"] += file.num_missing
            finally:
                self._release(taken)
        loaded = saved.Loaded(**fates)
        if loaded.num_damaged or loaded.num_unreachable or loaded.num_left_out:
            warnings.warn(f"{path}: {loaded}", stacklevel=3)
        return loaded

    def ordered(self) -> Iterator[Node]:
        """All nodes, the most recently used first, but none before its parent."""
        done = set()
        in_use = [node for node in self._nodes.values() if node.block not in self.pool.idle]
        for node in [*in_use, *(self._by_block[block] for block in reversed(self.pool.idle))]:
            for step in reversed([step for step in lineage(node) if step not in done]):
                done.add(step)
                yield step

    def _current(self) -> Iterator[Node]:
        """Those of `ordered` that the model as it is has computed."""
        current = {root for root in self._roots.values() if root.digest == self._root_digest(root.tokens)}
        for node in self.ordered():
            if node.parent in current:
                current.add(node)
                yield node

    def root(self, salted: bytes) -> Node:
        digest = self._root_digest(salted)
        return self._roots.get(digest) or Node(digest, None, salted, NULL_BLOCK)

    def _salted(self, salt: str) -> bytes:
        return salt_digest(self._fingerprint, salt)

    def _root_digest(self, salted: bytes) -> bytes:
        if self.pool.content is None:  # there is no model
            return salted
        return hashlib.blake2b(salted + self.pool.content.to_bytes(8, "little"), digest_size=32).digest()

    # --- for people

    def stats(self) -> dict[str, object]:
        return self._folder.stats() if self._folder else {}

    def tree(self, text: Callable[[list[int]], str] = str) -> str:
        """The shared prefixes, one line for each stretch without a branch.

        Args:
            text: how to show token ids; a tokenizer's `decode`, say.
        """
        lines = []

        def show(node: Node, indent: str) -> None:
            for child in node.children.values():
                run = [child]
                while len(run[-1].children) == 1 and self._users(run[-1]) == self._users(*run[-1].children.values()):
                    run += run[-1].children.values()
                tokens = np.frombuffer(b"".join(node.tokens for node in run), dtype="<i4").tolist()
                shown = text(tokens).replace("\n", " ")
                shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
                state = [f"{self._users(child)} using"] if self._users(child) else ["idle"]
                state += ["pinned"] * (child.num_pins > 0) + [f"{max(node.num_hits for node in run)} hits"]
                blocks = " ".join(str(node.block) for node in run[:8]) + (" ..." if len(run) > 8 else "")
                lines.append(f"{indent}+- {len(tokens)} tokens, blocks {blocks} ({', '.join(state)}): {shown}")
                show(run[-1], indent + "|  ")

        for root in self._roots.values():
            lines.append(f"salt {root.digest[:4].hex()}")
            show(root, "")
        return "\n".join(lines)

    def _users(self, node: Node) -> int:
        return self.pool.ref_counts[node.block] - 1 - node.num_pins

    # --- the tree

    def _path(self, token_ids: Sequence[int], salt: str) -> list[Node]:
        """The published blocks that hold the start of `token_ids`."""
        node, path = self._roots.get(self._root_digest(self._salted(salt))), []
        for tokens in self._split(token_ids) if node else ():
            node = node.children.get(tokens)
            if node is None:
                break
            path.append(node)
        return path

    def _split(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        data, size = np.asarray(token_ids, dtype="<i4").tobytes(), 4 * self.pool.block_size
        return (data[begin : begin + size] for begin in range(0, len(data) - size + 1, size))

    def _promote(self, held: list[Node], token_ids: Sequence[int], salt: str) -> None:
        """Add the blocks behind `held` that a lower tier has to it, one reference each to the caller."""
        wanted = []
        parent = held[-1] if held else self.root(self._salted(salt))

        def wants() -> Iterator[tuple[bytes, Chain]]:
            """Hashed as far as somebody looks: mostly not at all."""
            digest, chain = parent.digest, parent.chain
            for tokens in islice(self._split(token_ids), len(held), None):
                digest, chain = block_digest(digest, tokens), Chain(chain, tokens)
                wanted.append((digest, tokens))
                yield digest, chain

        count = self._tiers.attempt(self._tiers.num_promotable, wants()) or 0
        for digest, tokens in wanted[:count]:
            with uninterrupted():
                if not self.pool.num_free and not self.evict(1):
                    break
                block, node = self.pool.allocate(), None
                try:
                    if self._tiers.attempt(self._tiers.promote, digest, block):
                        node = self.insert(parent, tokens, block)
                finally:
                    if node is None:
                        self.pool.release(block)
                if node is None:
                    break
                held.append(node)
                parent = node

    # --- other processes

    def _tell(self) -> dict[str, object]:
        """The identity as other processes are told it; its "weights" are None where nothing is."""
        if self._told is None:
            self._told = self.identity | {"weights": self._weights()}
        return self._told

    def _named(self, pieces: Sequence[bytes], salt: str) -> Iterator[Name]:
        """What the blocks of a row with these tokens are called in the folder."""
        digest = root = salt_digest(fingerprint(self._tell()), salt)
        path, size = b"".join(pieces), 4 * self.pool.block_size
        for index, tokens in enumerate(pieces):
            digest = block_digest(digest, tokens)
            yield Name(digest, root, path, index * size, (index + 1) * size)

    def _offer(self, path: list[Node], salt: str) -> None:
        """Give the folder those blocks of a path that it lacks."""
        if self._folder is None or not path or self._tell()["weights"] is None:
            return
        names = list(self._named([node.tokens for node in path], salt))
        if lacking := self._folder.lacking(names):
            contents = self._placement.read_blocks([path[index].block for index in lacking])
            data = [content.numpy().tobytes() for content in contents]
            self._folder.write(self._tell(), [(names[index], one) for index, one in zip(lacking, data, strict=True)])

    def _fetch(self, held: list[Node], token_ids: Sequence[int], salt: str) -> None:
        """Add the blocks behind `held` that the folder has to it, one reference each to the caller."""
        if self._folder is None or self._tell()["weights"] is None:
            return
        pieces = list(self._split(token_ids))
        wanted = islice(self._named(pieces, salt), len(held), None)
        for found in self._folder.read(self._tell(), wanted) if len(held) < len(pieces) else ():
            with uninterrupted():
                if self._adopt(held, pieces[len(held) :], found, salt) < len(found):
                    return

    def _adopt(self, held: list[Node], pieces: list[bytes], found: list[bytes], salt: str) -> int:
        """Put what was found behind `held`. Returns how many blocks there was room for."""
        if len(found) > self.pool.num_free:
            self.evict(len(found) - self.pool.num_free)
        count = min(len(found), self.pool.num_free)
        blocks = self.pool.allocate_run(count)
        try:
            if blocks:
                contents = torch.frombuffer(bytearray(b"".join(found[:count])), dtype=torch.uint8)
                self._placement.write_blocks(blocks, contents.view(count, -1))
            for tokens in pieces[:count]:
                node = self.insert(held[-1] if held else self.root(self._salted(salt)), tokens, blocks[0])
                if node is None:
                    break
                held.append(node)
                del blocks[0]
            return count - len(blocks)
        finally:
            self._release(blocks)

    @uninterrupted()
    def _release(self, blocks: list[int]) -> None:
        """The first, most recently used, are idle for the shortest time."""
        for block in reversed(blocks):
            self.pool.release(block)

    def drop(self, node: Node, keep: Callable[[bytes, int, Chain], object] = lambda *_: None) -> None:
        """Let go of a block and of all behind it, which nobody could reach any more; `keep` may copy them then, before
        anybody else writes to them.
        """
        del node.parent.children[node.tokens]
        if node.parent.parent is None and not node.parent.children:
            del self._roots[node.parent.digest]
        dropped = [node]
        for node in dropped:
            dropped += node.children.values()
            del self._nodes[node.digest], self._by_block[node.block]
            self.pool.discard(node.block)
        for node in dropped:
            keep(node.digest, node.block, node.chain)

    def check_integrity(self) -> None:
        size, reached, pins = 4 * self.pool.block_size, 0, Counter()
        for node, count in self._preloaded.items():
            assert count > 0, "a prompt is preloaded less than once"
            pins.update({step: count for step in lineage(node)})
        for digest, root in self._roots.items():
            assert root.digest == digest and root.parent is None and root.children, "a root stands for nothing"
            below = [root]
            while below:
                parent = below.pop()
                below += parent.children.values()
                for tokens, node in parent.children.items():
                    reached += 1
                    assert node.parent is parent and node.tokens == tokens, "a node is misplaced"
                    assert len(tokens) == size, "a node is no full block"
                    assert node.digest == block_digest(parent.digest, tokens), "a node has the hash of other tokens"
                    assert self._nodes.get(node.digest) is node, "a node cannot be found by its hash"
                    assert self._by_block.get(node.block) is node, "a node cannot be found by its block"
                    assert node.num_pins == pins[node], "a node is pinned more or less often than it was preloaded"
        assert reached == len(self._nodes) == len(self._by_block), "a node is out of reach"
        assert self._by_block.keys() == self.pool.kept, "a block is kept for no node, or a node's block is not kept"
        assert self.num_pinned == len(pins), "the number of pinned blocks is wrong"


class _Admission:
    """Which blocks of a file find a place, one after the other; those that do have a block, and are in no tree yet."""

    def __init__(self, prefix: PrefixCache, roots: list[Node], taken: list[int], fates: Counter[str]):
        self._prefix, self._roots, self._taken, self._fates = prefix, roots, taken, fates
        self._found: list[Node | str] = []  # by their number: where a block is, or the fate of one that is nowhere
        self._pending: dict[bytes, Node] = {}  # by hash

    def take(self, record: saved.Record | None) -> tuple[Node, bytes] | None:
        """A new node, its block allocated, and what the block is to hold; None where there is nothing to write."""
        before = len(self._pending)
        self._found.append(self._place(record))
        found = self._found[-1]
        if isinstance(found, str):
            self._fates[found] += 1
            return None
        return (found, record.data) if len(self._pending) > before else None

    def _place(self, record: saved.Record | None) -> Node | str:
        if record is None:
            return "num_damaged"
        parent = self._parent(record.parent)
        if isinstance(parent, str):
            return parent if parent == "num_left_out" else "num_unreachable"
        prefix, digest = self._prefix, block_digest(parent.digest, record.tokens)
        if known := parent.children.get(record.tokens) or self._pending.get(digest):
            if known.parent is not parent or known.tokens != record.tokens:
                return "num_unreachable"  # the hash is taken by other tokens
            self._fates["num_known"] += 1
            return known
        if digest in prefix._nodes:
            return "num_unreachable"
        if not prefix.pool.num_free:
            return "num_left_out"
        self._taken.append(prefix.pool.allocate(after=parent.block))
        self._pending[digest] = node = Node(digest, parent, record.tokens, self._taken[-1])
        return node

    def _parent(self, number: int) -> Node | str:
        """What a block says it continues: a root, or a block before it. A file may say anything."""
        if number < 0:
            return self._roots[-1 - number] if -1 - number < len(self._roots) else "num_damaged"
        return self._found[number] if number < len(self._found) else "num_damaged"


def lineage(node: Node) -> Iterator[Node]:
    """A node and all it hangs on, up to the first block of its path."""
    while node.parent is not None:
        yield node
        node = node.parent


def block_digest(parent: bytes, tokens: bytes) -> bytes:
    return hashlib.blake2b(parent + tokens, digest_size=32).digest()


def salt_digest(model_and_policies: bytes, salt: str) -> bytes:
    if not isinstance(salt, str):
        raise TypeError(f"the salt must be a str, got {type(salt).__name__}")
    return hashlib.blake2b(model_and_policies + salt.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def main() -> None:
    pool, prefix = BlockPool(num_blocks=8, block_size=4), PrefixCache()
    prefix.open(pool, {"model": "none, this is an example"})

    def admit(prompt: str, salt: str = "") -> BlockTable:
        tokens = list(prompt.encode())
        table = BlockTable(pool, *prefix.match(tokens[:-1], salt))
        hit = table.num_tokens
        if (needed := table.num_new_blocks(len(tokens) - hit)) > pool.num_free:
            print(f"   ({prefix.evict(needed - pool.num_free)} blocks evicted)")
        table.append(len(tokens) - hit)
        prefix.publish(tokens, table, salt)
        print(f"{prompt!r}, salt {salt!r}: {hit} of {len(tokens)} tokens are there; {pool.num_free} blocks are free")
        return table

    def show() -> None:
        print(prefix.tree(lambda tokens: repr(bytes(tokens).decode())) + "\n")

    print("A pool of 8 blocks; 4 tokens a block, a character a token.\n")
    first = admit("Be kind. Greet Ann.")
    second = admit("Be kind. Greet Bo.")
    show()
    first.release()
    second.release()
    other = admit("Be kind. Greet Ann.", salt="another tenant")
    show()
    other.release()
    pool.check_integrity(prefix.held_blocks())


if __name__ == "__main__":
    main()
