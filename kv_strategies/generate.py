"""The door for `model.generate()`: a Transformers `Cache` that hands attention to a strategy.

Upstream asks a cache for K and V as two dense tensors (`update`), which a paged store cannot give without copying all
of it. The patched model asks differently, twice: `plan_forward` once a forward, in place of building a mask, and
`attend` once a layer, in place of `update` and attention.

`generate()` thinks in columns: all rows of a batch are equally long, shorter prompts padded on the left. The store
keeps tokens only, so a row of the batch is a block table without its padding.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from .kernels.linear import Rotary
from .paged import BlockTable, OutOfBlocks
from .step import fused
from .step.plan import Plan, PlanBuffer
from .step.upstream import takes_cache
from .strategy import Strategy

if TYPE_CHECKING:
    from .step.fused import FusedStack
    from .step.graphs import StackStep


class AttendingCache(Cache):
    """What the patched model sees: a cache that attends. The plan says to what."""

    def __init__(self, strategy: Strategy):
        super().__init__(layers=[])
        self.strategy = strategy
        self.plan: Plan | None = None

    @property
    def decoder_layers(self):
        """The stack that `LlamaModel` runs: the strategy's own, in one piece, or the plain layers."""
        stack = self._stack()
        if stack is None or fused.is_observed():
            return self.strategy.model.model.layers
        return [stack]

    def _stack(self) -> FusedStack | StackStep | None:
        return self.strategy.stack

    @takes_cache
    def plan_forward(self, config, inputs_embeds: Tensor, attention_mask, cache, position_ids) -> None:
        """Called in place of `create_causal_mask`: nothing to do where the plan is there already."""

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Store K and V of the new tokens and attend to all tokens of the row.

        Args:
            query: [B, Hq, n, D]; key, value: [B, Hkv, n, D], keys rotated, unless `rotary` [B * n, D] comes with them.

        Returns:
            [B, n, Hq * D]
        """
        num_rows, _, num_columns, _ = query.shape
        packed = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))  # [B * n, H, D], views
        out = self.strategy.attend(layer_idx, *packed, self.plan.on(query.device), scaling, rotary)
        return out.reshape(num_rows, num_columns, -1)

    def update(self, *args, **kwargs):
        raise RuntimeError(
            f"a {self.strategy.name!r} cache has no dense K and V to return: this model's attention is not patched. "
            "It serves the LlamaForCausalLM that the strategy was built for"
        )

    @property
    def is_compileable(self) -> bool:
        return False  # else generate() would compile the forward by itself

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_linear(self) -> list[bool]:
        # generate() skips what is cached unless all layers are linear, as all are of a cache that lists none.
        return [False] * len(self.strategy.shape.layer_devices)


class StrategyCache(AttendingCache):
    """The cache of one `generate()` call: a block table a row. Made by `Strategy.cache`."""

    def __init__(self, strategy: Strategy):
        super().__init__(strategy)
        self.tables: list[BlockTable] = []
        self.num_columns = 0  # tokens and padding that generate() believes to be cached
        self._packing: Tensor | None = None  # [T] where the tokens stand among B * n columns, if there is padding
        self._step: StackStep | None = None  # what replays the stack in this forward
        # The tables live in a list of their own, so that the finalizer does not keep the cache alive.
        weakref.finalize(self, _release, self.tables)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @takes_cache
    def plan_forward(self, config, inputs_embeds: Tensor, attention_mask, cache, position_ids) -> None:
        """Find room for the new tokens and say where everything lives. Same keywords as `create_causal_mask`."""
        self._check_supported(attention_mask)
        num_rows, num_columns = inputs_embeds.shape[:2]
        if not self.tables:
            self.tables.extend(self.strategy.open_table(()) for _ in range(num_rows))
        if len(self.tables) != num_rows:
            raise ValueError(f"the cache holds {len(self.tables)} rows and the input has {num_rows}")
        is_token = self._new_tokens(attention_mask, num_rows, num_columns)
        query_lens = [num_columns] * num_rows if is_token is None else is_token.sum(dim=1).tolist()
        rows = list(zip(self.tables, query_lens, strict=True))
        try:
            self.strategy.reserve(rows)
        except OutOfBlocks as error:
            held = sum(table.num_tokens for table in self.tables)
            raise OutOfBlocks(
                f"the pool of {self.strategy.max_tokens} tokens is too small: this call holds {held} tokens in "
                f"{num_rows} rows and adds {sum(query_lens)}. Build the strategy with a larger num_blocks ({error})"
            ) from None
        self._packing = None
        if is_token is not None and not is_token.all():
            self._packing = is_token.flatten().nonzero().squeeze(1).to(inputs_embeds.device)
        graphs = self.strategy.stack_graphs if num_columns == 1 and self._packing is None and self._replays else None
        self._step = None if graphs is None else graphs.step(rows)
        if self._step is not None:
            self.plan = self._step.plan
        else:
            max_blocks = max(1, *(len(table.blocks) for table in self.tables))
            self.plan = PlanBuffer(inputs_embeds.device, num_rows, sum(query_lens), max_blocks).fill(rows)
        self.num_columns += num_columns

    @property
    def _replays(self) -> bool:
        """Whether a decode step may be a graph, in which `attend` is not called."""
        return True

    def _stack(self) -> FusedStack | StackStep | None:
        return self._step or self.strategy.stack

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotary: Rotary | None = None,
    ) -> Tensor:
        if self._packing is None:
            return super().attend(layer_idx, query, key, value, scaling, rotary)
        num_rows, num_heads, num_columns, head_dim = query.shape
        packing = self._packing.to(query.device)
        packed = (states.transpose(1, 2).flatten(0, 1)[packing] for states in (query, key, value))
        out = query.new_zeros(num_rows * num_columns, num_heads, head_dim)  # padding attends to nothing
        if rotary is not None:
            rotary = rotary._replace(cos=rotary.cos[packing], sin=rotary.sin[packing])
        out[packing] = self.strategy.attend(layer_idx, *packed, self.plan.on(query.device), scaling, rotary)
        return out.view(num_rows, num_columns, -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns: a negative count of them, or (older releases) the positive length to keep."""
        count = int(tokens_to_remove)  # a tensor in older releases
        keep = count if count > 0 else self.num_columns + count
        removed = self.num_columns - keep
        if removed <= 0:
            return
        for table in self.tables:  # padding is on the left, so the newest columns are tokens
            self.strategy.truncate(table, max(0, table.num_tokens - removed))
        self.num_columns = max(0, keep)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues from row beam_idx[i]: tables are forked, no K or V moves."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = [self.tables[index].fork() for index in indices.tolist()]
        _release(self.tables)
        self.tables[:] = chosen

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.tables)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Give all blocks back; the cache can be used again."""
        _release(self.tables)
        self.tables.clear()
        self.num_columns = 0

    def _new_tokens(self, attention_mask: Tensor | None, num_rows: int, num_columns: int) -> Tensor | None:
        """[B, n] bool on the host: which of the new columns are tokens; None for all, and nothing is read back."""
        if attention_mask is None:
            return None
        expected = (num_rows, self.num_columns + num_columns)
        if tuple(attention_mask.shape) != expected:
            raise ValueError(
                f"the attention mask has shape {tuple(attention_mask.shape)}; with {self.num_columns} cached columns "
                f"and {num_columns} new ones it must be {expected}"
            )
        seen = attention_mask != 0
        on_host = torch.cat([seen.sum(dim=1, keepdim=True), seen[:, self.num_columns :].long()], dim=1).cpu()
        is_token = on_host[:, 1:].bool()
        stored = torch.tensor([table.num_tokens for table in self.tables])
        if not torch.equal(on_host[:, 0] - is_token.sum(dim=1), stored):
            raise ValueError("the attention mask shows or hides columns otherwise than when they were stored")
        return is_token

    def _check_supported(self, attention_mask) -> None:
        model = self.strategy.model
        if model.training:
            raise ValueError(f"a {self.strategy.name!r} cache serves inference: call model.eval() first")
        if attention_mask is not None and (not torch.is_tensor(attention_mask) or attention_mask.dim() != 2):
            raise ValueError("a strategy takes a 2-D attention mask [B, columns] of tokens and padding")
        wanted = output_capturing._active_collector.get()  # set by upstream while a forward records outputs
        if wanted is not None and "attentions" in wanted:
            raise ValueError(
                "output_attentions is not supported: attention weights are never materialised by a strategy"
            )


class PromptCache(StrategyCache):
    """The cache of one `generate()` call whose prompt is known: what others have computed of it is skipped.

    `generate()` skips columns, so all rows skip equally many: as many as every row has tokens, or padding, for. Their
    full blocks are published once they are computed, for later calls.

        row 0   [ hit hit hit | new new new ]           three columns are skipped: what row 1 found beyond
        row 1   [ pad hit hit | hit new new ]           them is given back
    """

    def __init__(self, strategy: Strategy, input_ids: Tensor, attention_mask: Tensor | None, salt: str):
        super().__init__(strategy)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.dim() != 2 or input_ids.shape != mask.shape:
            raise ValueError(
                "cache() takes the prompt as generate() does, input_ids [B, n] and attention_mask [B, n]; "
                f"got {tuple(input_ids.shape)} and {tuple(mask.shape)}"
            )
        ids, is_token = torch.stack([input_ids, mask != 0]).cpu()  # one copy
        self._salt, self._width = salt, ids.shape[1]
        self._prompts = [row[seen != 0].tolist() for row, seen in zip(ids, is_token, strict=True)]  # not yet computed
        for prompt in self._prompts:
            self.tables.append(strategy.open_table(prompt, salt))
        num_seen = is_token.cumsum(dim=1)  # [B, n] tokens up to and including a column
        found = torch.tensor([table.num_tokens for table in self.tables])
        fits = (num_seen <= found[:, None]).sum(dim=1)  # columns that each row could skip
        self.num_columns = max(0, min(int(fits.min()), self._width - 1))
        for table, seen in zip(self.tables, num_seen.tolist(), strict=True):
            strategy.truncate(table, seen[self.num_columns - 1] if self.num_columns else 0)
        self._is_first = True

    @takes_cache
    def plan_forward(self, config, inputs_embeds: Tensor, attention_mask, cache, position_ids) -> None:
        if self._prompts and self._is_first:
            self._start(*inputs_embeds.shape[:2])
        super().plan_forward(config, inputs_embeds, attention_mask, cache, position_ids)
        if self._prompts and not self._is_fed(inputs_embeds, position_ids):
            self.reset()
            raise ValueError(
                "generate() feeds other tokens, or at other positions, than cache() was given; give both the same "
                "input_ids and attention_mask"
            )

    @property
    def _replays(self) -> bool:
        return not self._prompts  # else the last layer publishes them

    def attend(self, layer_idx: int, *args) -> Tensor:
        out = super().attend(layer_idx, *args)
        if self._prompts and layer_idx == len(self.strategy.shape.layer_devices) - 1:
            self._publish()
        return out

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._prompts = []

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._prompts = []

    def reset(self) -> None:
        super().reset()
        self._prompts = []

    def _start(self, num_rows: int, num_columns: int) -> None:
        """Before the first forward, which shows what kind of generation this is."""
        self._is_first = False
        if num_columns >= self._width:  # all of the prompt is fed, whatever is cached: assisted decoding does that
            _release(self.tables)
            self.num_columns = 0
        for prompt, table in zip(self._prompts, self.tables, strict=True):
            self.strategy.count_hit(prompt, table)
        repeats, rest = divmod(num_rows, len(self.tables))
        if repeats > 1 and not rest:  # beams, or several sequences a prompt
            prompts = [prompt for prompt in self._prompts for _ in range(repeats)]
            self.batch_repeat_interleave(repeats)
            self._prompts = prompts

    def _is_fed(self, inputs_embeds: Tensor, position_ids: Tensor) -> bool:
        """Whether the layers are about to see the prompt: they see embeddings and positions, so these are compared."""
        if position_ids.shape[1] != inputs_embeds.shape[1]:
            return False
        expected, places, begin = [], [], 0
        for table, prompt, num_new in zip(self.tables, self._prompts, self.plan.query_lens, strict=True):
            tokens = prompt[table.num_tokens - num_new : table.num_tokens]
            expected += tokens
            places += range(begin, begin + len(tokens))
            begin += num_new
        device = inputs_embeds.device
        expected, places = torch.tensor([expected, places], device=device, dtype=torch.int64)
        columns = places if self._packing is None else self._packing[places]
        positions = position_ids.expand(inputs_embeds.shape[:2]).flatten()
        same_tokens = self.strategy.model.get_input_embeddings()(expected) == inputs_embeds.flatten(0, 1)[columns]
        same_places = positions[columns] == self.plan.positions[places]
        return bool(same_tokens.all() & same_places.all())

    def _publish(self) -> None:
        for prompt, table in zip(self._prompts, self.tables, strict=True):
            self.strategy.sharing.publish(prompt, table, self._salt)
        if all(table.num_tokens >= len(prompt) for prompt, table in zip(self._prompts, self.tables, strict=True)):
            self._prompts = []


def _release(tables: list[BlockTable]) -> None:
    for table in tables:
        table.release()
