"""The door for `model.generate()`: a cache that a strategy makes for one call.

`generate()` thinks in columns: all rows of a batch are equally long, shorter prompts padded on the left. The store
keeps tokens only, so a row of the batch is a block table without its padding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import output_capturing

from .installed import installed
from .kernels.linear import Rotary
from .paged import BlockTable, OutOfBlocks
from .step import fused
from .step.forward import AttendingCache, forward
from .step.graphs import StackGraphs, StackStep
from .step.interrupts import uninterrupted
from .step.plan import PlanBuffer
from .step.shards import announce_forwards
from .step.upstream import takes_cache
from .step.version import running_model
from .strategy import Reservation, Strategy, release_all

_PRELOAD_CHUNK = 2048  # tokens in a forward


class Generation:
    """What a strategy leaves to this door, and what it keeps between calls: the decode steps that it has captured."""

    def __init__(self) -> None:
        self._graphs: StackGraphs | None = None
        self._addresses: tuple[int, int] | None = None  # that they take for granted

    def cache(
        self, strategy: Strategy, input_ids: Any = None, attention_mask: Tensor | None = None, salt: str = ""
    ) -> StrategyCache:
        """See `Strategy.cache`."""
        if strategy.ranks.size > 1:
            announce_forwards(strategy.model)
        if input_ids is None:
            return StrategyCache(strategy, self)
        if not torch.is_tensor(input_ids):  # what a tokenizer gives
            try:
                given = input_ids["input_ids"]
                mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
            except (TypeError, KeyError, IndexError, AttributeError):
                given, mask = input_ids, attention_mask
            if not torch.is_tensor(given):
                raise TypeError(
                    "cache() takes the prompt as generate() does, a tensor input_ids [B, n] and attention_mask [B, n], "
                    f"or what a tokenizer gives with return_tensors='pt'; got {type(given).__name__}"
                )
            input_ids, attention_mask = given, mask
        return PromptCache(strategy, self, input_ids, attention_mask, salt)

    def installed(self, strategy: Strategy, salt: str) -> AbstractContextManager[Strategy]:
        """See `Strategy.installed`."""
        return installed(strategy, salt)

    def graphs(self, strategy: Strategy) -> StackGraphs | None:
        """Decode steps of the stack to replay, where they can be captured."""
        stack = strategy.seen.stack
        if stack is None or stack.device.type != "cuda" or not strategy.capturable:
            return None
        if self._graphs is None or self._graphs.stack is not stack or self._addresses != strategy.addresses:
            self._graphs, self._addresses = StackGraphs(stack, strategy.block_size), strategy.addresses
        return self._graphs

    @torch.inference_mode()
    def preload(self, strategy: Strategy, token_ids: Sequence[int], salt: str) -> int:
        """See `Strategy.preload`."""
        size, config, sharing = strategy.block_size, strategy.model.config, strategy.sharing
        sharing.pin((), salt)  # refuses where nothing is kept for later
        token_ids = token_ids[: len(token_ids) // size * size]
        if not token_ids:
            raise ValueError(f"only full blocks are shared: a prompt to preload needs at least {size} tokens")
        if min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
            raise ValueError(f"token ids must be from 0 to {config.vocab_size - 1}")
        strategy.look_closely()
        strategy.follow()
        cache, device = AttendingCache(strategy), strategy.model.device
        with uninterrupted() as interrupts:
            table = BlockTable(strategy.pool, *sharing.match(token_ids, salt))
            try:
                while table.num_tokens < len(token_ids):
                    interrupts.check()
                    chunk = token_ids[table.num_tokens : table.num_tokens + _PRELOAD_CHUNK]
                    strategy.follow()
                    strategy.reserve([(table, len(chunk))])
                    buffer = PlanBuffer(device, 1, len(chunk), len(table.blocks), size, {"input_ids": len(chunk)})
                    plan = buffer.fill([table.row(len(chunk))], {"input_ids": chunk})
                    last = torch.tensor([len(chunk) - 1], device=device)
                    strategy.ranks.agree(lambda chunk=chunk: ("preload", table.num_seen, chunk))
                    with strategy.ranks.together():
                        forward(cache, plan, buffer.tensors["input_ids"], last)
                    sharing.publish(token_ids, table, salt)
                strategy.reserve([(table, 0)])  # all may have been there, and promised to others
                num_tokens = sharing.pin(token_ids, salt)
            finally:
                table.release()
            try:
                interrupts.check()
            except BaseException:  # who is not told that it is kept will not forget it
                sharing.forget(token_ids, salt)
                raise
            return num_tokens


class StrategyCache(AttendingCache):
    """The cache of one `generate()` call: a block table a row. Made by `Strategy.cache`."""

    def __init__(self, strategy: Strategy, door: Generation):
        super().__init__(strategy)
        self._door = door
        self.tables: list[BlockTable] = []
        self.num_columns = 0  # tokens and padding that generate() believes to be cached
        self._columns: list[tuple[int, Tensor | None]] = []  # how many were added at once, and which are tokens
        self._pending: _Pending | None = None
        self._packing: Tensor | None = None  # [T] where the tokens stand among B * n columns, if there is padding
        self._last: Callable[[], Tensor] | None = None  # what ranks compare, see `_in_words`
        self._step: StackStep | None = None  # what replays the stack in this forward
        self._origins: Tensor | None = None  # [B] given positions of the first tokens, where they matter
        # The tables live in a list of their own, so that the finalizer does not keep the cache alive.
        weakref.finalize(self, strategy.lock.release_tables, self.tables)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        _refuse_prefix_tuning(self.strategy.model)  # the first that generate() asks, and all that peft asks
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @takes_cache
    def plan_forward(self, config, inputs_embeds: Tensor, attention_mask, cache, position_ids) -> None:
        """Find room for the new tokens. Same keywords as `create_causal_mask`.

        Where they live is planned when the layers begin, and they count as cached when the layers have ended; a forward
        that fails in between leaves the cache as it was.
        """
        with uninterrupted(), self.strategy.lock:
            self._undo()
            self._check_model(config)
            self.strategy.follow()
            self._reserve(inputs_embeds, attention_mask, position_ids)

    def _reserve(self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> None:
        self._check_supported(attention_mask)
        num_rows, num_columns = inputs_embeds.shape[:2]
        if not self.tables:
            self.tables.extend(self.strategy.open_table(()) for _ in range(num_rows))
        if len(self.tables) != num_rows:
            raise ValueError(f"the cache holds {len(self.tables)} rows and the input has {num_rows}")
        is_token = self._new_tokens(attention_mask, num_rows, num_columns)
        query_lens = [num_columns] * num_rows if is_token is None else is_token.sum(dim=1).tolist()
        self._check_continues(position_ids, num_columns)
        rows = list(zip(self.tables, query_lens, strict=True))
        if num_columns > 1:  # what ranks add up has as many rows as there are tokens, padding left out
            self.strategy.ranks.agree(lambda: ("tokens of each row", query_lens))
        try:
            if num_columns == 1 and self._is_prompt_known:
                self._compact()
            reservation = self.strategy.reserve(rows, owner=self)
        except OutOfBlocks as error:
            held = sum(table.num_tokens for table in self.tables)
            raise OutOfBlocks(
                f"the pool of {self.strategy.max_tokens} tokens is too small: this call holds {held} tokens in "
                f"{num_rows} rows and adds {sum(query_lens)}. Build the strategy with a larger num_blocks ({error})"
            ) from None
        self._pending = _Pending(rows, num_columns, is_token, position_ids, reservation)

    def announce(self, input_ids: Tensor | None) -> None:
        """A forward begins. Ranks compare how many tokens it is of, behind how many, and the last ones of the forward
        before it, which have reached the host by now.
        """
        self.strategy.ranks.agree(lambda: self._in_words(input_ids))

    def _in_words(self, input_ids: Tensor | None) -> tuple:
        last, self._last = self._last, None if input_ids is None else _to_host(input_ids[:, -1])
        shape = None if input_ids is None else tuple(input_ids.shape)
        return "generate", shape, [table.num_seen for table in self.tables], None if last is None else last().tolist()

    @uninterrupted()
    def compact(self) -> None:
        """Let the strategy say now which of the cached tokens are worth keeping, where it says so at all (`evict.py`):
        of a context, say, before the question about it is fed, which then stays whole. Else this happens with the first
        forward over a single column, as the end of a prompt is not announced.
        """
        with self.strategy.lock:
            self._undo()
            self._compact()

    def _compact(self) -> None:
        held = [table for table in self.tables if table.num_tokens]
        try:
            self.strategy.compact([(table, 0) for table in self.tables], owner=self)
        except BaseException:
            if not all(table.num_tokens for table in held):
                self.reset()  # some survivors were moved and some were not
            raise

    @property
    def _is_prompt_known(self) -> bool:
        """Whether a single new column means that the prompt has ended."""
        return True

    @property
    def decoder_layers(self) -> list[Callable[..., Tensor]]:
        """What `LlamaModel` runs: all layers as one, so that what happens to them happens to all."""
        return [self._run_layers]

    @torch.no_grad()  # what is stored in blocks must not keep what it was computed from
    def _run_layers(self, hidden_states: Tensor, **options) -> Tensor:
        """The layers one after the other. Arguments as of `LlamaDecoderLayer.forward`."""
        with uninterrupted() as shield, self.strategy.lock, shield.lifted():
            if self._pending is None:
                raise RuntimeError("another forward has begun with the same cache: one call of generate(), one cache")
            try:
                self._plan_rows(hidden_states.device)
                with self.strategy.ranks.together():
                    if self._packing is not None and len(self._packing) and self._has_stack():
                        hidden_states = self._run_packed(hidden_states, **options)
                    else:
                        for layer in super().decoder_layers:
                            hidden_states = layer(hidden_states, **options)
            except BaseException:
                self._undo()
                raise
            self._commit()
        return hidden_states

    def _run_packed(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **options) -> Tensor:
        """The stack over the tokens alone; what it would make of padding nobody reads. [B, n, hidden] -> the same."""
        packing, self._packing = self._packing, None
        num_rows, _, hidden = hidden_states.shape
        angles = (part.expand(num_rows, -1, -1).flatten(0, 1) for part in position_embeddings)
        rotary = tuple(part[None, packing.to(part.device)] for part in angles)  # accelerate may have them elsewhere
        tokens = hidden_states.reshape(1, -1, hidden)[:, packing]
        (stack,) = super().decoder_layers
        tokens = stack(tokens, position_embeddings=rotary, **options)
        out = tokens.new_zeros(hidden_states.shape)
        out.view(-1, hidden)[packing.to(out.device)] = tokens[0]
        return out

    def _plan_rows(self, device: torch.device) -> None:
        rows, num_columns, is_token, position_ids, _ = self._pending
        query_lens = [num_new for _, num_new in rows]
        self._packing = None
        if is_token is not None and not is_token.all():
            self._packing = is_token.flatten().nonzero().squeeze(1).to(device)
        is_step = num_columns == 1 and self._packing is None and not fused.is_observed()
        is_step = is_step and self.strategy.compaction.may_replay(self.tables)
        graphs = self._door.graphs(self.strategy) if is_step else None
        planned = [table.row(num_new) for table, num_new in rows]
        distances = self._distances(position_ids, [num_new for _, num_new in rows], num_columns)
        self._step = None if graphs is None else graphs.step(planned, distances)
        if self._step is not None:
            self.plan = self._step.plan
            return
        num_tokens, max_blocks = sum(query_lens), max(1, *(len(row.blocks) for row in planned))
        self.plan = PlanBuffer(device, len(rows), num_tokens, max_blocks, self.strategy.block_size).fill(planned)
        self.plan.distances = distances

    @uninterrupted()
    def _commit(self) -> None:
        """K and V of the new tokens have been computed, or their work is on its way."""
        pending, self._pending = self._pending, None
        self.num_columns += pending.num_columns
        self._columns.append((pending.num_columns, pending.is_token))

    @uninterrupted()
    def _undo(self) -> None:
        """A forward has failed: forget what it was to add. Nothing where none has."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.reservation.undo()

    def _stack(self) -> Callable[..., Tensor] | None:
        return self._step or self.strategy.seen.stack

    def attend_flat(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rotary: Rotary | None = None,
    ) -> Tensor:
        if self._packing is None:
            return super().attend_flat(layer_idx, query, key, value, scaling, rotary)
        packing = self._packing.to(query.device)
        packed = (states[packing] for states in (query, key, value))
        out = query.new_zeros(query.shape)  # padding attends to nothing
        if rotary is not None:
            rotary = rotary._replace(cos=rotary.cos[packing], sin=rotary.sin[packing])
        out[packing] = super().attend_flat(layer_idx, *packed, scaling, rotary)
        return out

    @uninterrupted()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns: a negative count of them, or (older releases) the positive length to keep."""
        count = int(tokens_to_remove)  # a tensor in older releases
        keep = count if count > 0 else self.num_columns + count
        removed = self.num_columns - keep
        if removed <= 0:
            return
        with self.strategy.lock:
            self._undo()
            kept = self._column_mask()[:, : max(0, keep)]
            rows = list(zip(self.tables, kept.sum(dim=1).tolist(), strict=True))
            for table, num_tokens in rows:
                self.strategy.check_truncate(table, num_tokens)
            for table, num_tokens in rows:
                self.strategy.truncate(table, num_tokens)
            self.num_columns = max(0, keep)
            self._columns = [(self.num_columns, kept)] if self.num_columns else []

    def _column_mask(self) -> Tensor:
        """[B, columns] bool on the host: which of the cached columns are tokens."""
        masks = [
            torch.ones(len(self.tables), count, dtype=torch.bool, device="cpu") if is_token is None else is_token
            for count, is_token in self._columns
        ]
        return torch.cat(masks, dim=1) if masks else torch.zeros(len(self.tables), 0, dtype=torch.bool, device="cpu")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues from row beam_idx[i]: tables are forked, no K or V moves."""
        self.batch_select_indices(beam_idx)

    @uninterrupted()
    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i continues from the i-th of `indices`: row numbers, or a bool for each row that is to stay."""
        with self.strategy.lock:
            self._undo()
            rows = torch.arange(len(self.tables), device="cpu")[indices.cpu()]
            chosen = _fork([self.tables[row] for row in rows.tolist()])
            release_all(self.tables)
            self.tables[:] = chosen
            if self._origins is not None:
                self._origins = self._origins[rows.to(self._origins.device)]
            self._columns = [(n, None if is_token is None else is_token[rows]) for n, is_token in self._columns]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.tables)).repeat_interleave(repeats))

    @uninterrupted()
    def __deepcopy__(self, memo: dict) -> StrategyCache:
        """Another cache that goes on from here: tables are forked, no K or V moves."""
        twin = StrategyCache(self.strategy, self._door)
        with self.strategy.lock:
            self._undo()
            twin.tables.extend(_fork(self.tables))
            twin.num_columns, twin._columns, twin._origins = self.num_columns, list(self._columns), self._origins
        return twin

    def __copy__(self) -> StrategyCache:
        return self.__deepcopy__({})

    @uninterrupted()
    def reset(self) -> None:
        """Give all blocks back; the cache can be used again."""
        with self.strategy.lock:
            self._undo()
            release_all(self.tables)
            self.tables.clear()
            self.num_columns, self._origins = 0, None
            self._columns.clear()

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
        stored = torch.tensor([table.num_seen for table in self.tables], device="cpu")
        if not torch.equal(on_host[:, 0] - is_token.sum(dim=1), stored):
            self._hide(seen[:, : self.num_columns].cpu())
        return is_token

    def _hide(self, seen: Tensor) -> None:
        """A mask [B, columns] that hides the newest tokens of some rows, what `generate()` put behind the end of a row
        while others went on, say: these tokens are forgotten.

        Raises:
            ValueError: it hides other columns, or shows what never was a token.
        """
        stored = self._column_mask()
        order = stored.cumsum(dim=1)  # [B, columns] number of a token in its row
        kept = seen.sum(dim=1, keepdim=True)
        if (seen & ~stored).any() or not torch.equal(seen, stored & (order <= kept)):
            raise ValueError("the attention mask shows or hides columns otherwise than when they were stored")
        for table, num_tokens in zip(self.tables, kept.flatten().tolist(), strict=True):
            self.strategy.truncate(table, num_tokens)
        self._columns = [(self.num_columns, seen)]

    def _check_continues(self, position_ids: Tensor, num_columns: int) -> None:
        """Raises ValueError where a prompt begins again behind the tokens that are cached: `generate()` does that when
        all of a prompt is cached, as it is after a call that failed behind the layers. A single column on a GPU is not
        looked at: the host would wait for it in every decode step.
        """
        if not self.num_columns or position_ids is None or (num_columns == 1 and position_ids.is_cuda):
            return
        newest = position_ids[:, -1].expand(len(self.tables)).tolist()
        if any(last < table.num_seen for last, table in zip(newest, self.tables, strict=True)):
            raise ValueError(
                f"the cache holds {self.num_columns} columns, and this forward begins again at position 0: generate() "
                "feeds other tokens than those that follow, or an earlier call with this cache failed at its end; give "
                "it a new one, strategy.cache()"
            )

    def _distances(self, position_ids: Tensor, query_lens: list[int], num_columns: int) -> Tensor | None:
        """[T] see `Plan`. Only sinks ask for them: queries are turned by them, and all else is in the keys as given."""
        if not self.strategy.retention.sinks:
            return None
        given = position_ids.expand(len(query_lens), num_columns).flatten()
        given = given if self._packing is None else given[self._packing.to(given.device)]
        if self._origins is None:  # of what others have computed, token 0 stands at 0
            self._origins = given.new_zeros(len(query_lens))
        ends = list(accumulate(query_lens))
        begun = [row for row, table in enumerate(self.tables) if 0 < query_lens[row] == table.num_tokens]
        if begun:
            firsts = [ends[row] - query_lens[row] for row in begun]
            begun, firsts = torch.tensor([begun, firsts], device=given.device)
            self._origins = self._origins.index_copy(0, begun, given[firsts])
        if ends[-1] == len(query_lens) * num_columns:
            return given - self._origins.repeat_interleave(num_columns)
        rows = [row for row, count in enumerate(query_lens) for _ in range(count)]
        return given - self._origins[torch.tensor(rows, device=given.device, dtype=torch.int64)]

    def _check_model(self, config) -> None:
        """Two models may share a configuration, so the one that runs is asked for as well."""
        model = self.strategy.model.model
        if config is not model.config or running_model() not in (model, None):
            raise ValueError(
                f"this cache belongs to a {self.strategy.name!r} strategy that was built for another model than runs "
                "here: its K and V, and the layers that it would run, are of that one. Build a strategy for each model"
            )

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

    def __init__(
        self, strategy: Strategy, door: Generation, input_ids: Tensor, attention_mask: Tensor | None, salt: str
    ):
        super().__init__(strategy, door)
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
        if self.num_columns:
            self._columns.append((self.num_columns, is_token[:, : self.num_columns].bool()))
        self._is_first = True

    def _reserve(self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> None:
        if self._prompts and self._is_first and any(table.is_mixed for table in self.tables):
            raise ValueError(
                "the model has changed since cache() was given this prompt, and what others have computed of it is of "
                "the model before: call cache() again"
            )
        if self._prompts and self._is_first:
            self._start(*inputs_embeds.shape[:2])
        super()._reserve(inputs_embeds, attention_mask, position_ids)
        if self._prompts and not self._is_fed(inputs_embeds, position_ids):
            self.reset()
            raise ValueError(
                "generate() feeds other tokens, or at other positions, than cache() was given; give both the same "
                "input_ids and attention_mask"
            )

    @uninterrupted()
    def _commit(self) -> None:
        super()._commit()
        for prompt, table in zip(self._prompts, self.tables, strict=bool(self._prompts)):
            self.strategy.sharing.publish(prompt, table, self._salt)
        if all(table.num_seen >= len(prompt) for prompt, table in zip(self._prompts, self.tables, strict=False)):
            self._prompts = []

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._prompts = []

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._prompts = []

    def reset(self) -> None:
        super().reset()
        self._prompts = []

    @property
    def _is_prompt_known(self) -> bool:
        return not self._prompts  # until all of them are computed

    def _start(self, num_rows: int, num_columns: int) -> None:
        """Before the first forward, which shows what kind of generation this is."""
        self._is_first = False
        if num_columns >= self._width:  # all of the prompt is fed, whatever is cached: assisted decoding does that
            release_all(self.tables)
            self.num_columns = 0
            self._columns.clear()
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
        rows, _, is_token, _, _ = self._pending
        tokens, positions, packed, begin = [], [], [], 0
        for (table, num_new), prompt in zip(rows, self._prompts, strict=True):
            first = table.num_seen - num_new
            known = prompt[first : table.num_seen]
            tokens += known
            positions += range(first, first + len(known))
            packed += range(begin, begin + len(known))
            begin += num_new
        device = inputs_embeds.device
        tokens, positions, packed = torch.tensor([tokens, positions, packed], device=device, dtype=torch.int64)
        columns = packed if is_token is None else is_token.flatten().nonzero()[:, 0].to(device)[packed]
        fed = position_ids.expand(inputs_embeds.shape[:2]).flatten()[columns]
        same_tokens = self.strategy.model.get_input_embeddings()(tokens) == inputs_embeds.flatten(0, 1)[columns]
        return bool(same_tokens.all() & (fed == positions).all())


class _Pending(NamedTuple):
    """A forward that has room, and has not ended."""

    rows: list[tuple[BlockTable, int]]  # and how many tokens are new
    num_columns: int
    is_token: Tensor | None  # [B, num_columns] bool on the host; None for all
    position_ids: Tensor  # [B or 1, num_columns] as given
    reservation: Reservation


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to bring it to the host. What is returned waits for it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    found, ready = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), torch.cuda.Event()
    found.copy_(tensor, non_blocking=True)
    ready.record()
    return lambda: (ready.synchronize(), found)[1]


def _refuse_prefix_tuning(model) -> None:
    """While peft runs `generate()`, the model prepares its inputs by a method of the adapted one around it.

    Raises:
        ValueError: that would put a cache of its own, with K and V that were trained, in place of ours.
    """
    adapted = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    kind = getattr(getattr(adapted, "active_peft_config", None), "peft_type", None)
    if kind in ("PREFIX_TUNING", "CARTRIDGE"):  # other prompt learning hands its tokens in as embeddings
        raise ValueError(
            f"{kind.value} of peft puts K and V of its own in place of this cache, so no strategy can serve it: call "
            "generate() without a cache, or generate() of model.get_base_model() with it, which knows no prefix"
        )


def _fork(tables: list[BlockTable]) -> list[BlockTable]:
    """A fork of each, or of none where one fails."""
    forks: list[BlockTable] = []
    try:
        for table in tables:
            forks.append(table.fork())
    except BaseException:
        release_all(forks)
        raise
    return forks
