"""Split-KV decode (Flash-Decoding, FlashDecoding blog post 2023-10, over a block table as in PagedAttention).

One query a row leaves a GPU idle if a row is one program, so the tokens of a row are split and the parts merged:

    row b, KV head h      |-- part 0 --|-- part 1 --|-- ... --|    one program each, all query heads of the KV head
                            (out, lse)   (out, lse)             the last to arrive merges them, many in two levels

Three kernels compute a part, and take how rows are cut and merged from `triton_decode_parts.py`:

    triton_decode_any.py       any K and V, any number of query heads that share a KV head
    triton_decode_codes.py     int8, each query head with a KV head of its own
    triton_decode_groups.py    8 bits, several query heads a KV head, no window; 4 bits, any number of them

As codes leave half the time for it, or a quarter, what is most common has kernels of its own.

Reading K and V once is the floor: bytes = 2 * context * Hkv * D * itemsize a row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...step.plan import LayerStore, Plan
from ..reference import HALF_BYTES
from ..triton_device import num_multiprocessors
from ..triton_launch import Launch, launch
from ..triton_overlap import overlapping
from .triton_cascade import SharedParts
from .triton_common import LOG2_E, planes, workspace
from .triton_decode_any import decode_any
from .triton_decode_codes import decode_codes
from .triton_decode_groups import decode_groups, suits
from .triton_decode_parts import Tuning

#: Parts of one row and KV head at most, where its length alone decides.
MAX_PARTS = 64
#: Fewer pairs of a row and a KV head than these have many parts each.
FEW_PAIRS = 64
#: Of which so many at least are merged together, and what that gives once more. Of more pairs all parts of one are
#: merged together, which takes the fewest instructions.
FAN = 16


def tuning(group: int, dtype: torch.dtype, num_pairs: int, in_registers: bool = False) -> Tuning:
    """The sizes for a number of query heads a KV head and the dtype of V as stored, swept on an H100; those of few
    pairs in registers on an H200.

    Float32 is for float32 queries on any store: they take the most registers, and their results are compared.

    Args:
        num_pairs: rows times KV heads. Few follow kernels that need little shared memory: a change of it takes as long
            as it may spare.
        in_registers: whether `triton_decode_groups.py` can do it.
    """
    if dtype == torch.float32:
        return Tuning(tile=32, num_warps=4, part=256)
    few = num_pairs < FEW_PAIRS
    if in_registers and (dtype == HALF_BYTES or group > 1):
        return Tuning(tile=16, num_warps=1, programs=16, registers=128, least=64 if few else 128)
    if group > 1 and few:
        return Tuning(tile=64, num_warps=2, num_stages=2, programs=4)
    if group > 1:
        return Tuning(tile=64, num_warps=4, num_stages=5, programs=2)
    if dtype == torch.int8:
        return Tuning(tile=32, num_warps=2, programs=8, registers=128)
    return Tuning(tile=32, num_warps=4, programs=4, registers=128)


def decode(
    query: Tensor,
    layer: LayerStore,
    plan: Plan,
    out: Tensor,
    *,
    scaling: float,
    window: int = 0,
    sinks: int = 0,
    sink_query: Tensor | None = None,
    shared: SharedParts | None = None,
    tuned: Tuning | None = None,
) -> None:
    """Write out[b] for the first plan.num_decodes rows, which have one query each. See `reference.attention`.

    `shared`, only without a window: what the tokens that rows share give, which are not read again.

    Nothing here depends on host values but shapes and the bounds in plan.row_lens, so that a CUDA graph can hold it.
    """
    launch(
        plan, prepare, (query, query if sink_query is None else sink_query, out, *planes(layer)),
        scaling=scaling, window=window, sinks=sinks if window or sink_query is not None else 0,  # else all is visible
        shared=shared, tuned=tuned,
    )  # fmt: skip


def prepare(
    plan: Plan,
    query: Tensor,
    sink_query: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    scaling: float,
    window: int,
    sinks: int,
    shared: SharedParts | None,
    tuned: Tuning | None,
) -> Launch:
    """For `launch`."""
    _, num_heads, dim = query.shape
    num_kv_heads = k.shape[1]
    quantised = k_scale is not k
    layer = LayerStore(k, v, k_scale, v_scale) if quantised else LayerStore(k, v)
    group, rows = num_heads // num_kv_heads, plan.num_decodes
    num_pairs = rows * num_kv_heads
    is_plain = not window and not sinks and (suits(query, layer, tuned.tile) if tuned else suits(query, layer))
    dtype = query.dtype if query.dtype == torch.float32 else v.dtype
    tuned = tuned or tuning(group, dtype, num_pairs, is_plain)
    longest = max((plan.row_lens if shared is None else plan.private_lens)[:rows])
    longest = min(longest, window + layer.block_size if window else longest)  # a window need not begin with a block
    sink_places = tuned.tile * triton.cdiv(sinks, tuned.tile)
    # The kernel knows each row's length, from which its parts follow; this bounds how many there may be.
    longest = max(longest + sink_places, 1)
    if tuned.part:
        num_programs = num_pairs * min(triton.cdiv(longest, tuned.part), MAX_PARTS)
        wanted = 0
    else:
        wanted = tuned.programs * num_multiprocessors(query.device)
        num_programs = min(wanted + num_pairs, num_pairs * triton.cdiv(longest, tuned.least))
    dim_p2, group_p2 = max(triton.next_power_of_2(dim), 16), triton.next_power_of_2(group)
    parts, part_lses, arrived = workspace(plan, "decode", num_programs, 1, group, dim_p2, counters=num_programs)
    shared_lens = plan.context_lens if shared is None else plan.shared_lens  # not read unless shared
    shared_parts, shared_lses, shared_split = shared or (parts, part_lses, 1)
    numbers = [
        plan.block_tables, plan.context_lens, parts, part_lses, arrived, shared_lens, shared_parts, shared_lses,
        shared_parts.shape[2], scaling * LOG2_E, rows,
        *query.stride()[:2], *sink_query.stride()[:2], *out.stride()[:2],
        *k.stride()[:3], *v.stride()[:3], *k_scale.stride()[:2], *v_scale.stride()[:2], plan.block_tables.stride(0),
    ]  # fmt: skip
    sizes = {
        "BLOCK_SIZE": layer.block_size, "HEADS": num_kv_heads, "DIM": dim, "DIM_P2": dim_p2,
        # one row, or as many as there are in few sizes, each of which is another kernel
        "ROWS_P2": 1 if rows == 1 else max(triton.next_power_of_2(rows), 32),
        "TILE_PARTS": max(16 * tuned.num_warps // max(group_p2, 4), 1),
        "WINDOW": window, "SINKS": sinks, "SINK_PLACES": sink_places,
        "CASCADE": shared is not None, "SHARED_SPLIT": shared_split,
        # Where the row's length alone decides, so does it in which order parts are merged.
        "FAN": FAN if num_pairs < FEW_PAIRS and not tuned.part else 0,
        "WANTED": wanted, "PART": tuned.part, "MAX_PARTS": MAX_PARTS, "LEAST": tuned.least, "TILE": tuned.tile,
        "num_warps": tuned.num_warps,
    }  # fmt: skip
    grid, options = (num_programs,), overlapping(query.device)
    if query.is_cuda:
        options = options | {"maxnreg": tuned.registers}
    if is_plain and tuned.num_warps == 1:
        return decode_groups(grid, numbers, sizes, query, group, options)
    if k.dtype == v.dtype == torch.int8 and group == 1:
        return decode_codes(grid, numbers, sizes, query, layer, plan, tuned, longest, options)
    return decode_any(grid, numbers, sizes, query, layer, tuned, options)
