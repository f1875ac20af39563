"""Plan: does it fit, how long does a step take, and what bounds it?

Nothing is run and no weight is loaded. Bytes are those of the strategies' own ledger: the block a layout makes of a
codec's planes, the tier a placement puts it in, how many blocks a row holds under a retention or a selection. Times
are the roofline (Williams et al., CACM 2009): the slowest of what has to be moved and computed, and a gap for every
kernel.

    step    weights and visible K and V / bandwidth  |  V over the link / link rate  |  operations / rate  |  host
    TTFT    likewise, chunk by chunk of the prompt

The host bounds what it launches copy by copy: forwards that stream, which no CUDA graph holds.

What no ledger holds is the workspace of a forward (`workspace`), which follows from the widths of the model, and what
`evict` takes while it chooses (`choosing`), which its score says.

    kv-strategies plan --model llama-2-7b-random --context 32k --batch 8 --gpu-memory 24GB

`make plan-check` compares all of it with what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from transformers import LlamaForCausalLM

from .base import KeepAllTokens, NoSharing, Policies, Site
from .compaction import choosing_bytes, kept_bytes
from .kernels.reference import HALF_BYTES
from .registry import STRATEGIES, bytes_per_block, outline, parts_of
from .step.context import longest_row
from .step.graphs import SHORT_ROW
from .step.rings import ring_bytes
from .step.store import Planes
from .strategy import planes_of

LIBRARY_BYTES = 32 << 20  # what torch sets aside for cuBLAS on a GPU of compute capability 9

# Of this code, as measured (bench/results: limit, strategies, default; an H100, an H200), the same on every card.
KERNEL_GAP = 3e-6  # seconds from one kernel to the next
KERNELS_PER_LAYER = 7
KERNELS_OF_4_BITS = 1  # beside those, in time: queries and results are turned, for the most part under other kernels
KERNELS_OF_SINKS = 5  # likewise, in a decode step that does not see all: the queries are turned for the sinks
TOP_N_GAP = 40e-6  # seconds in which a layer says which of V a decode step reads
PRODUCTS_READ = 0.95  # share of a card's read bandwidth that matrix products over few rows reach
# Likewise, of its host.
FIRST_TOKEN_GAP = 4e-3  # seconds before a prompt's first token: admission, and launches outside a graph
STREAM_GAP = 0.7e-3  # seconds to launch a layer and the copies that bring it and take it away
TOO_SOON = 2e-4  # seconds to read all weights, below which a host takes as long for a step as the card


@dataclass(frozen=True)
class Attention:
    """What attention over blocks reaches: of the bandwidth in a decode step, of the rate in a chunk of a prompt that
    belongs to a row of `SHORT_ROW` tokens at most.
    """

    read: float
    rate: float


LIBRARY_RATE = 0.83  # in a chunk of a longer row, whose codes are decoded once for the library
LIBRARY_GAP = 140e-6  # seconds a layer in such a chunk, to gather the row's K and V and to begin and end
ATTENTION = {
    "numbers": Attention(0.95, 0.58),
    "codes": Attention(0.72, 0.28),
    "codes of query groups": Attention(0.92, 0.28),  # a decode kernel of their own (`triton_decode_groups.py`)
    "4 bits": Attention(0.78, 0.28),  # the same kernel
}
MASKED_RATE = 0.17  # in a chunk of which some is out of sight: not by the library (`kernels/blocks/gpu.py`)


@dataclass(frozen=True)
class Card:
    """What a GPU has and can do. The first limit is its size, the others are rates that it sustains.

    Args:
        memory: bytes; reserve: of them, what is not torch's to give (CUDA's context, the allocator's rounding).
        bandwidth, link: bytes/s, read from its memory, and from the host's.
        rate: operations/s of matrix products in the model's dtype.
    """

    memory: int
    bandwidth: float
    link: float
    rate: float
    reserve: int = 0

    @property
    def usable(self) -> int:
        return self.memory - self.reserve


@dataclass(frozen=True)
class Work:
    """`batch` rows that grow to `context` tokens each, the last `new_tokens` of them generated; prompts are fed `chunk`
    tokens at a time.
    """

    context: int
    batch: int = 1
    new_tokens: int = 0
    chunk: int = 2048

    @property
    def prompt(self) -> int:
        return max(1, self.context - self.new_tokens)


class Model:
    """The sizes of a model, which may be on the meta device.

    Raises:
        ValueError: its weights are quantised.
    """

    def __init__(self, model: LlamaForCausalLM):
        self.model, self.config = model, model.config
        if quantised := getattr(model.config, "quantization_config", None):
            raise ValueError(
                f"its config says that its weights are quantised ({quantised.get('quant_method')}), which cannot be "
                "planned: how many bytes they take, and how fast they are read, is for its package to say. Give the "
                "model in 16 bits"
            )
        self.weights = sum(p.numel() * p.element_size() for p in model.parameters())
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        tied = embedding is head
        #: bytes that a decode step reads: of an input embedding of its own only the rows looked up
        self.read = self.weights - (0 if tied else embedding.numel() * embedding.element_size())
        self.itemsize, self.head = embedding.element_size(), head.numel()
        self.num_layers = self.config.num_hidden_layers
        self.head_dim = model.model.layers[0].self_attn.head_dim

    def products(self, num_tokens: int) -> float:
        """Operations of the matrix products with the weights, for so many tokens of a row: logits of the last alone."""
        return 2 * ((self.read / self.itemsize - self.head) * num_tokens + self.head)

    def attention(self, num_pairs: float) -> float:
        """Operations of the queries that see so many keys, counted together, in all layers."""
        return 4 * num_pairs * self.config.num_attention_heads * self.head_dim * self.num_layers

    def workspace(self, num_tokens: int, rows: int) -> int:
        """Bytes beside weights and K and V in a forward of so many packed tokens: the widest moment of a layer, whose
        gate, up and product live beside the hidden states, and the logits, which are compared in float32.
        """
        config = self.config
        widest = num_tokens * (3 * config.intermediate_size + 8 * config.hidden_size) * self.itemsize
        return LIBRARY_BYTES + widest + rows * config.vocab_size * (self.itemsize + 4)


@dataclass(frozen=True)
class Plan:
    """One strategy on one card. Bytes and seconds; None where nothing says, and `unknown` says why.

    `missing` is what the card lacks, 0 where all fits; `beyond`, how many tokens a row would see more than the model's
    context has. `bound` names what a step or the first token waits for: "memory", "link", "compute" or "host"; of the
    longest context, what ends it: the card's "memory" or the "model", None where nothing does.
    `refused` says why the strategy does not serve the model: then nothing else is told.
    """

    strategy: str
    options: dict[str, object]
    tiers: dict[str, int]
    weights: int
    workspace: int
    missing: int
    step: float | None = None
    step_bound: str | None = None
    ttft: float | None = None
    ttft_bound: str | None = None
    longest_context: int | None = 0  # None where no length is too long
    longest_context_bound: str | None = None
    largest_batch: int | None = 0  # likewise
    beyond: int = 0
    unknown: str = ""
    refused: str = ""

    @property
    def label(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return self.strategy + (f" ({said})" if said else "")

    @property
    def fits(self) -> bool:
        return not self.refused and not self.missing and not self.beyond

    @property
    def peak(self) -> int:
        """Bytes of the card, as `torch.cuda.max_memory_allocated` counts them."""
        return self.weights + self.tiers["gpu"] + self.workspace


class Ours:
    """A strategy of this project, on the meta device."""

    def __init__(self, name: str, options: dict[str, object], model: Model):
        self.name, self.options, self.model = "+".join(parts_of(name)), options, model
        self._of_length = "max_length" in STRATEGIES[self.name.split("+")[0]].options  # one block a request
        if not self._of_length:
            self._outline = outline(name, model.model, **options)

    def outline(self, context: int) -> tuple[Policies, Site]:
        if self._of_length:
            return outline(self.name, self.model.model, **{"max_length": context} | self.options)
        return self._outline

    def num_blocks(self, work: Work) -> int:
        policies, site = self.outline(work.context)
        selection, size = policies.selection, site.block_size
        if isinstance(selection, KeepAllTokens):
            return work.batch * policies.retention.num_blocks(work.context, work.chunk, size)
        is_shared = not isinstance(policies.sharing, NoSharing)
        most = selection.num_blocks(work.prompt, work.context, size, is_shared)
        # Prompts come one after the other: one row is whole, of others as much as the chunk that ends it brings along.
        rest = (work.batch - 1) * min(most, -(-self.held(work) // size)) + -(-work.chunk // size)
        return min(work.batch * most, most + rest)

    def num_visible(self, context: int) -> int:
        return self.outline(context)[0].retention.num_visible(context)

    def held(self, work: Work) -> int:
        """The most tokens that a row stores while it decodes, whichever of them it still sees."""
        selection = self.outline(work.context)[0].selection
        kept = min(work.prompt, selection.cap(work.prompt))
        grown = work.context - work.prompt
        return kept + (grown if selection.every is None else min(grown, selection.every))

    def tiers(self, num_blocks: int, context: int) -> dict[str, int]:
        """Bytes of so many blocks: "gpu", and "host" where some of each lies there."""
        needed = bytes_per_block(*self.outline(context)).items()
        return {"host" if device.type == "cpu" else "gpu": num_blocks * size for device, size in needed}

    def memory(self, work: Work) -> tuple[dict[str, int], int]:
        """Bytes a tier of K and V, and the workspace."""
        tokens = min(work.chunk, work.batch * work.prompt)
        workspace = self.workspace(tokens, work.batch, work.context)
        return self.tiers(self.num_blocks(work), work.context), workspace

    def workspace(self, num_tokens: int, rows: int, context: int) -> int:
        """Bytes of a forward of so many packed tokens, and the last queries of each row where a score reads them."""
        policies, site = self.outline(context)
        queries = ring_bytes(site.shape, rows) if policies.selection.num_queries else 0
        return self.model.workspace(num_tokens, rows) + queries

    def choosing(self, work: Work) -> int:
        """Bytes that are taken beside all that while rows are compacted: behind their prompts, which come one after the
        other, or all of them at once when they have grown. At most, since a forward that is not captured as a graph has
        given its own back by then.
        """
        policies, site = self.outline(work.context)
        selection = policies.selection
        cap, every = selection.cap(work.prompt), selection.every
        most = choosing_bytes(policies, site, work.prompt, cap) if work.prompt > cap else 0
        if every is not None and min(work.prompt, cap) + work.context - work.prompt >= cap + every:
            others = (work.batch - 1) * kept_bytes(site.shape, cap)
            most = max(most, others + choosing_bytes(policies, site, cap + every, cap))
        return most

    def step(self, work: Work, card: Card) -> dict[str, float | None]:
        """Seconds that each limit gives a decode step in which every row has `context` tokens."""
        return self._forward(card, self.held(work) - 1, 1, rows=work.batch, is_decode=True)

    def first_token(self, work: Work, card: Card) -> dict[str, float | None]:
        """Likewise until a row that comes alone has its first token."""
        starts = range(0, work.prompt, work.chunk)
        chunks = [self._forward(card, start, min(work.chunk, work.prompt - start)) for start in starts]
        return {limit: FIRST_TOKEN_GAP + sum(chunk[limit] for chunk in chunks) for limit in chunks[0]}

    def _forward(
        self, card: Card, before: int, num_tokens: int, rows: int = 1, is_decode: bool = False
    ) -> dict[str, float | None]:
        """Of a forward of `num_tokens` of each row behind `before` others."""
        policies, site = self.outline(before + num_tokens)
        visible, placement, model = policies.retention.num_visible, policies.placement, self.model
        planes = planes_of(site.shape, policies, site.block_size)
        is_masked = visible(before + num_tokens) < before + num_tokens
        reached = self._reached(planes, is_masked)
        seen = min(before + num_tokens, visible(before + num_tokens) + num_tokens - 1)
        read, link = placement.read_bytes(seen, planes, site, is_decode=is_decode)
        pairs = num_tokens * (visible(before + 1) + visible(before + num_tokens)) / 2
        gap = KERNEL_GAP * KERNELS_PER_LAYER
        if planes["v"][1] == HALF_BYTES:
            gap += KERNEL_GAP * KERNELS_OF_4_BITS
        if is_decode and is_masked and policies.retention.sinks:
            gap += KERNEL_GAP * KERNELS_OF_SINKS
        if is_decode and placement.reads_some:
            gap += TOP_N_GAP
        gaps = gap * model.num_layers
        memory = (model.read / PRODUCTS_READ + rows * read / reached.read) / card.bandwidth + gaps
        by_library = not is_decode and not is_masked and before + num_tokens > SHORT_ROW
        rate = LIBRARY_RATE if by_library else MASKED_RATE if is_masked else reached.rate
        compute = rows * (model.products(num_tokens) + model.attention(pairs) / rate) / card.rate + gaps
        if by_library:
            compute += LIBRARY_GAP * model.num_layers
        streams = link != 0 and (placement.prefetches or not is_decode)
        if link is not None:
            link = rows * link / card.link
            memory += 0 if streams else link
        if streams and not is_decode:  # a kernel takes the chunk's own V out, and the others wait for it
            out = rows * placement.read_bytes(num_tokens, planes, site, is_decode=False)[1] / card.link
            memory, compute = memory + out, compute + out
        host = STREAM_GAP * model.num_layers if streams else 0.0
        return {"memory": memory, "link": link, "compute": compute, "host": host}

    def _reached(self, planes: Planes, is_masked: bool) -> Attention:
        if "k_scale" not in planes:
            return ATTENTION["numbers"]
        config, is_of_4_bits = self.model.config, planes["v"][1] == HALF_BYTES
        if is_masked or not (is_of_4_bits or config.num_attention_heads > config.num_key_value_heads):
            return ATTENTION["codes"]
        return ATTENTION["4 bits" if is_of_4_bits else "codes of query groups"]


class Native:
    """The native DynamicCache: the batch padded to its longest row, prompts fed whole, and K or V of one layer there
    twice, as every step concatenates.
    """

    name = "baseline"

    def __init__(self, model: Model):
        self.model = model

    def memory(self, work: Work) -> tuple[dict[str, int], int]:
        model = self.model
        token = model.config.num_key_value_heads * model.head_dim * model.itemsize  # bytes of K, or V, of a layer
        kept, plane = 2 * model.num_layers * token * work.batch, work.context * work.batch * token
        prefill = kept * work.prompt + model.workspace(work.batch * work.prompt, work.batch)
        decode = kept * work.context + model.workspace(work.batch, work.batch) + plane
        return {"gpu": kept * work.context}, max(prefill, decode) - kept * work.context

    def choosing(self, work: Work) -> int:
        return 0

    def num_visible(self, context: int) -> int:
        return context

    def step(self, work: Work, card: Card) -> None:
        return None  # the host bounds it, and a card says nothing about that

    first_token = step


def plan(name: str, options: dict[str, object], model: Model, work: Work, card: Card) -> Plan:
    """One strategy on one card.

    Raises:
        ValueError: as `build`.
    """
    if name == "baseline" and options:
        raise ValueError(f"unknown option {', '.join(options)}: 'baseline' takes no options")
    system = Native(model) if name == "baseline" else Ours(name, options, model)

    def memory(work: Work) -> tuple[dict[str, int], int]:
        tiers, workspace = system.memory(work)
        return tiers, workspace + system.choosing(work)

    def beyond(context: int) -> int:
        return max(0, system.num_visible(context) - longest_row(model.config))

    def fits(work: Work) -> bool:
        if beyond(work.context):
            return False
        tiers, workspace = memory(work)
        return model.weights + tiers["gpu"] + workspace <= card.usable

    tiers, workspace = memory(work)
    longest = largest(lambda n: fits(replace(work, context=n)))
    found = Plan(
        system.name, options, tiers, model.weights, workspace,
        missing=max(0, model.weights + tiers["gpu"] + workspace - card.usable),
        longest_context=longest,
        longest_context_bound=None if longest is None else "model" if beyond(longest + 1) else "memory",
        largest_batch=largest(lambda n: fits(replace(work, batch=n))),
        beyond=beyond(work.context),
    )  # fmt: skip
    step, ttft = system.step(work, card), system.first_token(work, card)
    if step is None:
        return replace(found, unknown="native steps wait for the host's processor, not for the card")
    ttft_bound = max(ttft, key=ttft.__getitem__)
    found = replace(found, ttft=ttft[ttft_bound], ttft_bound=ttft_bound)
    if step["link"] is None:
        return replace(found, unknown="how much a step fetches depends on the text")
    bound = max(step, key=step.__getitem__)
    return replace(found, step=step[bound], step_bound=bound)


def waits_for_host(model: Model, card: Card) -> bool:
    """Whether the model is so small for the card that times which know the card alone say little."""
    return model.weights < TOO_SOON * card.bandwidth


def largest(fits: Callable[[int], bool], limit: int = 1 << 28) -> int | None:
    """The largest number that fits, where every smaller one does; None for whatever is beyond `limit`."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
        if high > limit:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def settings() -> Iterator[tuple[str, dict[str, object]]]:
    """What a plan looks at unless told: every strategy, the reads of offload, and all sums of those that save memory.

    `prefix` is in no sum: it takes what its rows would without it, less what they share.
    """
    yield "baseline", {}
    saving = []
    for name, preset in STRATEGIES.items():
        if name != "baseline":
            yield name, {}
        if preset.answers in ("retention", "placement", "codec"):
            saving.append((name, {}))
        if "top_n" in preset.options:
            saving.append((name, {"top_n": 128}))
            yield saving[-1]
    for count in (2, 3, 4):
        for parts in combinations(saving, count):
            names = [name for name, _ in parts]
            if len({STRATEGIES[name].answers for name in names}) == count:
                yield "+".join(names), {name: value for _, options in parts for name, value in options.items()}


def plan_all(chosen: Sequence[tuple[str, dict[str, object]]], model: Model, work: Work, card: Card) -> list[Plan]:
    """What each of them takes; of several, those that do not serve the model say why.

    Raises:
        ValueError: none does.
    """
    found = []
    for name, options in chosen:
        try:
            found.append(plan(name, options, model, work, card))
        except ValueError as error:
            found.append(Plan(name, options, {"gpu": 0}, model.weights, 0, 0, refused=str(error)))
    if all(each.refused for each in found):
        raise ValueError(found[0].refused)
    return found
