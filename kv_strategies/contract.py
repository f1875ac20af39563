"""Whether a policy keeps to its contract (`base.py`): checked at `build`, on small examples, and told by name.

An override that is misspelt is never called, a codec that loses what it calls lossless changes answers, a mask that
shows a block which was given back reads another request's memory: none of it would raise by itself.
"""

from __future__ import annotations

import difflib
import inspect

import torch

from .base import Codec, Layout, Placement, Policy, Retention, Selection, Sharing, Site, Unsound
from .kernels.reference import quantise

#: Question -> the class whose methods are asked.
ROLES: dict[str, type[Policy]] = {
    role.question: role for role in (Layout, Sharing, Retention, Placement, Codec, Selection)
}


def check_form(name: str, question: str, policy: object) -> None:
    """Before it is bound: is it of the class that its preset says, and are its overrides those that somebody calls?

    Raises:
        ValueError: says of which strategy, what was found, and what to change.
    """
    role, own = ROLES[question], type(policy)
    if not isinstance(policy, role):
        raise ValueError(
            f"{name!r} says that it answers {question!r}, and {own.__name__} is no kv_strategies.base.{role.__name__}"
        )
    asked = [member for member in dir(role) if not member.startswith("_")]
    for cls in own.__mro__[: own.__mro__.index(role)]:
        for member, value in vars(cls).items():
            if member in asked and callable(getattr(role, member)):
                _check_arguments(name, cls, member, getattr(role, member), value)
                continue
            is_open = not member.startswith("_") and member not in asked and callable(value)
            near = difflib.get_close_matches(member, asked, 1, cutoff=0.75) if is_open else []
            if near:
                raise ValueError(
                    f"{name!r}: {cls.__name__}.{member} is called by nobody; did you mean {near[0]!r}? "
                    "(a helper of your own: begin its name with an underscore)"
                )


def _check_arguments(name: str, cls: type, member: str, asked, own) -> None:
    if not callable(own):
        raise ValueError(f"{name!r}: {cls.__name__}.{member} must be a method, as in kv_strategies.base")
    own = own.__func__ if isinstance(own, classmethod | staticmethod) else own
    wanted = [p for p in inspect.signature(asked).parameters.values() if p.kind is not p.VAR_KEYWORD]
    try:
        inspect.signature(own).bind(*(None for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)))
    except TypeError as error:
        signature = ", ".join(p.name for p in wanted)
        raise ValueError(f"{name!r}: {cls.__name__}.{member} must take ({signature}): {error}") from None


def check_codec(name: str, codec: Codec, site: Site) -> None:
    """After it is bound: planes, shapes, what it calls lossless, what it says the kernels know."""
    shape, size = site.shape, site.block_size
    who = f"{name!r}: {type(codec).__name__}"
    planes = codec.planes(shape.num_kv_heads, size, shape.head_dim, shape.dtype)
    stray = set(planes) - {"k", "v", "k_scale", "v_scale"}
    if not {"k", "v"} <= set(planes) or stray or ("k_scale" in planes) != ("v_scale" in planes):
        raise ValueError(f"{who}.planes must name k and v, and k_scale and v_scale or neither; got {list(planes)}")
    for plane, (dims, _) in planes.items():
        if tuple(dims[:2]) != (shape.num_kv_heads, size):
            raise ValueError(f"{who}.planes: {plane} must begin with [Hkv, block_size], got {list(dims)}")
    states = torch.randn(3, shape.num_kv_heads, shape.head_dim, generator=torch.Generator().manual_seed(0))
    states = states.to(shape.dtype)
    for side, encode in (("k", codec.encode), ("v", codec.encode_values)):
        codes, scale = encode(states)
        for plane, found in ((side, codes), (f"{side}_scale", scale)):
            wanted = None if plane not in planes else ((3, shape.num_kv_heads, *planes[plane][0][2:]), planes[plane][1])
            got = None if found is None else (tuple(found.shape), found.dtype)
            if got != wanted:
                raise ValueError(
                    f"{who}.{encode.__name__}: for [3, Hkv, D] {plane} must be {wanted}, as planes say, got {got}"
                )
        decoded = codec.decode(codes, scale)
        if decoded.shape != states.shape or decoded.dtype != torch.float32:
            raise ValueError(
                f"{who}.decode must give float32 {tuple(states.shape)}, got {decoded.dtype} {tuple(decoded.shape)}"
            )
        if codec.lossless and not torch.equal(decoded, states.float()):
            raise ValueError(f"{who} is declared lossless, and what it decodes is not what it encoded")
        if codec.in_kernels:
            known = (states, None) if scale is None else quantise(states, codes.dtype, scale.dtype)
            same = torch.equal(codes.float(), known[0].float()) and (scale is None or torch.equal(scale, known[1]))
            if not same:
                raise ValueError(f"{who} says in_kernels, and the kernels encode otherwise: leave it out")


def check_retention(name: str, retention: Retention, site: Site) -> None:
    """After it is bound: the mask's shape, and that nobody sees what is given back."""
    size = site.block_size
    who = f"{name!r}: {type(retention).__name__}"
    dropped: set[int] = set()
    for num_tokens in (1, size, 3 * size + 1, 8 * size, 40 * size + size // 2):
        position, index = torch.tensor([[num_tokens]]), torch.arange(num_tokens)
        visible = retention.visible(position, index)
        if visible.shape != (1, num_tokens) or visible.dtype != torch.bool:
            raise ValueError(
                f"{who}.visible must give bool [n, m], here [1, {num_tokens}]; "
                f"got {visible.dtype} {list(visible.shape)}"
            )
        dead = {block for first, last in retention.dead(num_tokens, size) for block in range(first, last)}
        if not all(block >= 0 and (block + 1) * size <= num_tokens for block in dead):
            raise ValueError(f"{who}.dead({num_tokens}, {size}) names blocks that are not full yet: {sorted(dead)}")
        if not dropped <= dead:
            raise ValueError(
                f"{who}.dead({num_tokens}, {size}) lacks blocks that were dead before: {sorted(dropped - dead)}"
            )
        dropped = dead
        seen = {int(token) // size for token in index[visible[0]]}
        if seen & dead:
            raise ValueError(
                f"{who}: the query at {num_tokens} still sees blocks {sorted(seen & dead)}, which dead() gives back"
            )
    for chunk in (1, size + 1, 3 * size):
        most = 0
        for num_tokens in sorted({blocks * size + more for blocks in range(25) for more in (1, size // 2 + 1, size)}):
            before, said = most, retention.num_blocks(num_tokens, chunk, size)
            past = max(0, num_tokens - chunk)
            held = -(-num_tokens // size) - sum(last - first for first, last in retention.dead(past, size))
            most = max(most, held, said)
            if said < max(held, before):
                raise ValueError(
                    f"{who}.num_blocks({num_tokens}, {chunk}, {size}) says {said} at most, and such a row holds "
                    f"{max(held, before)} on its way"
                )
    if retention.stale(40 * size, size) != (0, 0) and type(retention).turn_keys is Retention.turn_keys:
        raise ValueError(f"{who}.stale cuts blocks out, so turn_keys must say how the keys behind them turn")


def check_selection(name: str, selection: Selection, placement: Placement, site: Site) -> None:
    """After it is bound: that it chooses as many tokens as it is asked for, in their order, and goes with the reads."""
    who, shape = f"{name!r}: {type(selection).__name__}", site.shape
    if placement.reads_some:
        raise ValueError(
            f"{name!r} and reads of the heaviest tokens alone (top_n, mass) both leave tokens out, and what each drops "
            "would be counted against what the other has left: choose one"
        )
    generator = torch.Generator().manual_seed(0)
    for num_tokens, num_kept in ((2, 1), (100, 37)):

        def states(num_heads: int, count: int) -> torch.Tensor:
            return torch.randn(1, num_heads, count, shape.head_dim, generator=generator).to(shape.dtype)

        keys, values = states(shape.num_kv_heads, num_tokens), states(shape.num_kv_heads, num_tokens)
        queries = states(shape.num_heads, min(num_tokens, selection.num_queries)) if selection.num_queries else None
        given = keys, values if selection.reads_values else None, queries
        try:
            index, is_sound = selection.choose([0], *given, num_kept, num_tokens - 1)
        except Unsound as error:
            raise ValueError(f"{name!r}: {error}") from error
        if not is_sound.all():
            raise ValueError(f"{name!r}: {selection.name} gives NaN for random keys")
        wanted = (1, shape.num_kv_heads, num_kept)
        if tuple(index.shape) != wanted or index.dtype != torch.int64:
            raise ValueError(f"{who}.choose must give int64 {list(wanted)}, got {index.dtype} {list(index.shape)}")
        if not ((index[..., 1:] > index[..., :-1]).all() and index.min() >= 0 and index.max() < num_tokens):
            raise ValueError(f"{who}.choose must give ascending indices of {num_tokens} tokens, got {index.tolist()}")
