"""Whether a model is what it was: watched where it cannot tell, at some 0.1 ms a look for 32 layers.

K and V are worth something under the model that computed them alone, and a merged weight or a CUDA graph as long as
the modules that it was made of are there. Models change without a word: an optimizer steps, an adapter is switched, a
hook steers, somebody writes `weight.data = w`. So before blocks are looked up, and before a forward, everything that
the forward reads is compared with what it was: one pass of C loops over modules, their members, hooks and attributes,
and over the version counter and the address of each weight. Only where that pass finds a difference is everything read
anew and described, and the model gets other numbers:

    layout     modules, hooks, code, attributes, where the weights lie      what a merged weight or a graph depends on
    content    and what they hold: load_state_dict, an optimizer's step      what K and V depend on

A description that is met again (an adapter switched back, a hook removed) gets the numbers that it had. Of hooks, and
of methods that somebody has replaced on a module, what they read beside their arguments counts as well, as far as it
shows: tensors, numbers and words in their closures, defaults, globals and owners (how strong a steering is, say).

Writing into `weight.data` in place (`weight.data.add_(x)`, as merges and copies of weights do) is left out of torch's
counters, and weights made in inference mode have none. `Watch.look_closely` reads a few numbers of each weight, and
finds that where it was done to all of a weight. Who writes a few of its numbers so calls `strategy.reset()`.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter, eq, getitem, is_
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle
from transformers import LlamaForCausalLM
from transformers.activations import SiLUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.utils import output_capturing

from .shards import __name__ as shards
from .shards import local, own_forward

_NUM_REMEMBERED = 8  # descriptions, so that a model may come back to what it was
_NUM_SAMPLED = 64  # numbers of each weight
#: Modules of these very classes read nothing but their weights, unless an attribute comes to them (a `forward`, say).
_PLAIN = {nn.Linear, nn.ModuleList, nn.ModuleDict, nn.SiLU, SiLUActivation}
_NOTED = {LlamaForCausalLM, LlamaModel}  # on which anybody may leave notes
#: What every module has, described apart or no matter to a forward without gradients in eval mode.
OWN = set(vars(nn.Module())) | {"config", "generation_config"}
#: Of a configuration, what changes K and V. The rest (paths, versions, special tokens) may differ.
CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "rope_parameters",
    "max_position_embeddings",  # some rotary embeddings scale with it
)
#: Functions of upstream's module that its layers call by name.
_FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half")
#: Where the code of a forward of their classes lies, their own decorators' included.
_HOMES = {package.__name__: package.__file__.removesuffix("__init__.py") for package in (torch, transformers)}
#: How calling a module calls its forward.
_CALLS = {nn.Module.__call__, GradientCheckpointingLayer.__call__}
_version, _forward, _call = attrgetter("_version"), attrgetter("forward"), attrgetter("__call__")
_functions = attrgetter(*_FUNCTIONS)


class Numbers(NamedTuple):
    """Two states of a model that have the same number are the same in what it stands for."""

    layout: int
    content: int


class Watch:
    """What is known of one model. All who ask about it share one (`watch`), which lives as long as any of them."""

    def __init__(self, model: LlamaForCausalLM):
        self.model = model
        self.made: dict[str, object] = {}  # what others have made of the model, under names of theirs
        self.lock = threading.RLock()  # for who looks, and makes something of what he sees
        self._counter = itertools.count()
        self._layouts: OrderedDict[int, _Description] = OrderedDict()
        #: Of a layout and the counters of its weights, the content and a sample of it.
        self._contents: OrderedDict[tuple[int, tuple], tuple[int, bytes]] = OrderedDict()
        self._look()

    @property
    def numbers(self) -> Numbers:
        """Those of the model as it is."""
        with self.lock:
            if not self._snapshot.layout_holds():
                self._look()
            elif not self._snapshot.content_holds():
                self._snapshot.count()
                self._number(self._numbers.layout)
            return self._numbers

    def look_closely(self) -> None:
        """Notice as well what was written into weights behind torch's counters. Waits for the device."""
        with self.lock:
            layout = self.numbers.layout
            known = self._contents.get((layout, self._snapshot.versions))
            if known is not None and known[1] != self._snapshot.sample():
                self._contents.clear()  # counters that were met before say nothing
                self._number(layout)

    @property
    def last(self) -> Numbers:
        """Those of the last look."""
        return self._numbers

    @property
    def is_opaque(self) -> bool:
        """Whether a forward calls what no graph holds, and no file tells of: hooks, or methods of single modules that
        were replaced. As of the last look at `numbers`.
        """
        return self._description.is_opaque

    def adopt(self) -> None:
        """What was done to the model since the last look has changed where its weights lie and no result."""
        with self.lock:
            self._snapshot, self._description = _Snapshot(self.model), _Description(self.model)
            self._layouts[self._numbers.layout] = self._description
            self._contents[self._numbers.layout, self._snapshot.versions] = (
                self._numbers.content,
                self._snapshot.sample(),
            )

    def _look(self) -> None:
        # What is changed by another thread meanwhile differs from the snapshot, which is the elder, at the next look.
        self._snapshot, self._description = _Snapshot(self.model), _Description(self.model)
        known = (number for number, description in self._layouts.items() if description == self._description)
        layout = next(known, None)
        if layout is None:
            layout = next(self._counter)
        self._layouts[layout] = self._description
        self._number(layout)

    def _number(self, layout: int) -> None:
        _use(self._layouts, layout)
        key = layout, self._snapshot.versions
        if key not in self._contents:
            self._contents[key] = next(self._counter), self._snapshot.sample()
        _use(self._contents, key)
        self._numbers = Numbers(layout, self._contents[key][0])


def _use(remembered: OrderedDict, key: Hashable) -> None:
    """It becomes the most recently used; the longest unused are forgotten."""
    remembered.move_to_end(key)
    while len(remembered) > _NUM_REMEMBERED:
        remembered.popitem(last=False)


_WATCHES: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()
_CREATION = threading.Lock()


def watch(model: LlamaForCausalLM) -> Watch:
    """The watch of a model. Keep it: what nobody keeps is forgotten."""
    with _CREATION:
        found = _WATCHES.get(id(model))  # an id is not taken by another model while its watch holds the first
        if found is None:
            found = _WATCHES[id(model)] = Watch(model)
        return found


def running_model() -> LlamaModel | None:
    """The model whose forward is calling. It hands over its configuration, which two models may share, and not itself,
    so this is read from the stack of calls.
    """
    frame = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            return None
        model = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if isinstance(model, LlamaModel):
            return model
        frame = frame.f_back
    return None


def is_upstream(cls: type) -> bool:
    """Whether the forward of a class is the one that it was written with."""
    forward, package = cls.forward, sys.modules[cls.__module__.partition(".")[0]]
    code = getattr(forward, "__code__", None)
    home = package.__file__.removesuffix("__init__.py")
    return (
        code is not None
        and code.co_filename.startswith(home)
        and forward.__module__ == cls.__module__
        and forward.__qualname__ == f"{cls.__qualname__}.forward"
        and cls.__call__ in _CALLS
    )


def is_patched(cls: type) -> bool:
    """Whether somebody has put another forward into a class than it was written with, or another way to call it."""
    is_container = cls.forward is nn.Module.forward and cls.forward.__name__ == "_forward_unimplemented"
    is_own = is_container or _is_as_written(cls, "forward")
    return not (is_own and (cls.__call__ in _CALLS or _is_as_written(cls, "__call__")))


def _is_as_written(cls: type, name: str) -> bool:
    """Whether a method is called what it is called where it was written, and for torch and Transformers lies there."""
    owner = next(base for base in cls.__mro__ if name in vars(base))
    method = vars(owner)[name]
    code, package = getattr(method, "__code__", None), owner.__module__.partition(".")[0]
    is_at_home = package not in _HOMES or (code and code.co_filename.startswith(tuple(_HOMES.values())))
    written_as = getattr(method, "__module__", None), getattr(method, "__qualname__", None)
    return bool(is_at_home) and written_as == (owner.__module__, f"{owner.__qualname__}.{name}")


def has_upstream_functions() -> bool:
    """Whether what the layers call by name is upstream's own."""
    functions = [getattr(modeling_llama, name) for name in _FUNCTIONS]
    return all(
        getattr(function, "__module__", None) == modeling_llama.__name__
        and getattr(getattr(function, "__code__", None), "co_filename", None) == modeling_llama.__file__
        for function in functions
    )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What torch turns the numbers of products into in this thread, as the user has told it, if into anything."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def is_globally_hooked() -> bool:
    """Whether hooks are called in the forward of every module."""
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


def hooks_of(module: nn.Module) -> list[object]:
    """The forward hooks of a module, but for upstream's own that record outputs, which wait until they are wanted, and
    for ours, which change nothing.
    """
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", None) not in (output_capturing.__name__, shards)]


def is_replaced(module: nn.Module) -> bool:
    """Whether calling it runs another forward than its class has. What accelerate puts before the modules of a model
    that is spread over devices (`device_map`) brings their inputs to them, and changes nothing; as little does what
    upstream puts around those that are spread over ranks.
    """
    if "_call_impl" in vars(module):  # what calls the forward
        return True
    if own_forward(module) is None:
        return False
    return not (is_moved(module) and vars(module)["_old_forward"] == type(module).forward.__get__(module))


def is_moved(module: nn.Module) -> bool:
    """Whether accelerate, and nothing else, stands before it, and its weights stay where they are."""
    hook, forward = vars(module).get("_hf_hook"), vars(module).get("forward")
    name = f"{type(hook).__module__}.{type(hook).__qualname__}"
    written = getattr(getattr(forward, "func", None), "__module__", None)
    return name == "accelerate.hooks.AlignDevicesHook" and written == "accelerate.hooks" and not hook.offload


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once; of a sharded one (tensor parallelism) the part that is here."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        yield name, local(tensor)


class _Snapshot:
    """What a model's forward reads, as lists of equal length for `map` to go through."""

    def __init__(self, model: LlamaForCausalLM):
        self._modules = modules = list(model.modules())
        self._types = list(map(type, modules))
        self._kinds = list(dict.fromkeys(self._types))
        self._global = _code(self._kinds), _global_hook_ids()
        hooks = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        self._next_hook = RemovableHandle.next_id  # as long as it stays, no hook has been added anywhere
        self._hook_lengths, self._num_hooks = hooks, sum(map(len, hooks))  # what was empty has to stay so
        self._hooks = [(found, list(found)) for found in hooks if found]
        plain = [kind in _PLAIN for kind in self._types]
        self._lengths = [vars(module) for module, is_plain in zip(modules, plain, strict=True) if is_plain]
        members = [
            members
            for module, is_plain in zip(modules, plain, strict=True)
            for members in (module._parameters, module._buffers)
            if members or not is_plain
        ]
        self._holders = [held for held in members for _ in held]
        self._names = [name for held in members for name in held]
        self._members = list(map(getitem, self._holders, self._names))
        self._lengths += members
        self._length = sum(map(len, self._lengths))
        # Submodules, and attributes with what they hold: those of plain modules can only come, which their number says.
        read = [module._modules for module in modules if module._modules]
        read += [vars(module) for module, is_plain in zip(modules, plain, strict=True) if not is_plain]
        self._read, self._were = read, list(map(_copied, read))
        self._model, self._config = model, _copied(_config(model))
        tensors = [tensor for _, tensor in tensors_of(model)]
        noted = [vars(module) for module in modules if type(module) not in _NOTED]
        tensors += _tensors_in([value for held in noted for name, value in held.items() if name not in OWN])
        self._steering = _steering(modules)
        self._steered_by = list(_tensors_in(map(_told_by, self._steering)))
        tensors += self._steered_by
        self._tensors = [tensor for tensor in tensors if not tensor.is_meta]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._are_contiguous = list(map(Tensor.is_contiguous, self._tensors))
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in self._tensors]
        self._storage_ids = list(dict.fromkeys(storage.cdata for storage in self._storages))
        # A sharded tensor has a counter of its own, for what is done to the whole.
        counted = [*self._tensors, *(tensor for tensor in self._members if tensor is not local(tensor))]
        self._counted = [tensor for tensor in counted if not tensor.is_inference()]
        self._device_types = list(dict.fromkeys(tensor.device.type for tensor in self._tensors))
        self.count()

    def count(self) -> None:
        self.versions = self._count()

    def _count(self) -> tuple:
        return (
            *map(_version, self._counted),
            *map(_words, map(_told_by, self._steering)),
            *map(autocast_dtype, self._device_types),
        )

    @torch.no_grad()
    def sample(self) -> bytes:
        """Some numbers of each weight."""
        parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor, is_contiguous in zip(self._tensors, self._are_contiguous, strict=True):
            if type(tensor) not in (Tensor, nn.Parameter):  # codes of a library's own
                continue
            size = tensor.numel()
            step = size // _NUM_SAMPLED | 1  # odd, so that it meets all columns
            if is_contiguous:  # the same in one call
                some = tensor.as_strided((-(-size // step),), (step,))
            else:
                some = tensor.reshape(-1)[::step]
            parts.setdefault((tensor.device, tensor.dtype), []).append(some)
        return b"".join(torch.cat(each).view(torch.uint8).cpu().numpy().tobytes() for each in parts.values())

    def layout_holds(self) -> bool:
        try:
            return (
                sum(map(len, self._lengths)) == self._length
                and all(map(is_, map(getitem, self._holders, self._names), self._members))
                and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
                and not any(map(torch.UntypedStorage._expired, self._storage_ids))
                and list(map(Tensor.is_contiguous, self._tensors)) == self._are_contiguous
                and list(map(type, self._modules)) == self._types
                and all(map(eq, self._read, self._were))
                and _config(self._model) == self._config
                and (_code(self._kinds), _global_hook_ids()) == self._global
                and self._hooks_hold()
                and _are_same(_tensors_in(map(_told_by, self._steering)), self._steered_by)
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # gone, or tensors that differ
            return False

    def _hooks_hold(self) -> bool:
        next_hook = RemovableHandle.next_id
        if next_hook != self._next_hook:
            if sum(map(len, self._hook_lengths)) != self._num_hooks:
                return False
            self._next_hook = next_hook
        return all(list(hooks) == were for hooks, were in self._hooks)

    def content_holds(self) -> bool:
        return self._count() == self.versions


class _Description:
    """All that a snapshot compares, by value: equal for two states of a model only where nothing differs."""

    def __init__(self, model: LlamaForCausalLM):
        self._alive: list[weakref.ref | StorageWeakRef] = []  # what is described by its id, which must not be reused
        modules = list(model.modules())
        kinds = list(map(type, modules))
        hooks = [
            (number, [key for key, hook in found.items() if hook in wanted])
            for number, module in enumerate(modules)
            if (wanted := hooks_of(module))
            for found in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self.is_opaque = bool(hooks) or is_globally_hooked() or any(map(is_replaced, modules))
        self._parts = [
            [self._id(kind) for kind in kinds],
            [*map(self._id, _code(list(dict.fromkeys(kinds))))],
            _global_hook_ids(),
            hooks,
            [(name, self._id(module)) for name, module in model.named_modules()],
            [(name, *self._place(tensor)) for name, tensor in _members_of(modules)],
            [self._attributes(module) for module in modules],
            [*map(self._place, _tensors_in(map(_told_by, _steering(modules))))],
            self._frozen(_config(model)),
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Description) and self._parts == other._parts and self._is_alive and other._is_alive

    __hash__ = None

    @property
    def _is_alive(self) -> bool:
        return not any(
            ref.expired() if isinstance(ref, StorageWeakRef) else ref is not None and ref() is None
            for ref in self._alive
        )

    def _id(self, value: object) -> int:
        try:
            self._alive.append(weakref.ref(value))
        except TypeError:
            self._alive.append(lambda: value)  # held
        return id(value)

    def _place(self, tensor: Tensor | None) -> tuple:
        if tensor is None:
            return ()
        part = local(tensor)
        if part.is_meta:
            return (self._id(tensor),)
        storage = StorageWeakRef(part.untyped_storage())
        self._alive.append(storage)
        return self._id(tensor), storage.cdata, part.data_ptr(), part.shape, part.stride(), part.dtype, part.device

    def _attributes(self, module: nn.Module) -> Hashable:
        own = vars(module)
        if type(module) in _NOTED:
            return self._frozen({name: own[name] for name in ("forward", "_compiled_call_impl") if name in own})
        return self._frozen({name: value for name, value in own.items() if name not in OWN})

    def _frozen(self, value: object) -> Hashable:
        """Numbers, words and what is made of them by value, anything else by its id."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            return type(value), value
        if isinstance(value, dict):
            return dict, tuple((self._frozen(key), self._frozen(item)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value), tuple(map(self._frozen, value))
        if isinstance(value, set | frozenset):
            return type(value), frozenset(map(self._frozen, value))
        return self._place(value) if torch.is_tensor(value) else self._id(value)


def _tensors_in(values: Iterable[object], depth: int = 8) -> Iterator[Tensor]:
    """The tensors among them, and in lists and dictionaries of them."""
    for value in values:
        if torch.is_tensor(value) and value.layout is torch.strided:
            yield local(value)
        elif depth and isinstance(value, list | tuple):
            yield from _tensors_in(value, depth - 1)
        elif depth and isinstance(value, dict):
            yield from _tensors_in(value.values(), depth - 1)


def _steering(modules: Iterable[nn.Module]) -> list[Callable]:
    """The hooks that are called in a forward, and the methods that were replaced on a module."""
    found = [*global_hooks._global_forward_pre_hooks.values(), *global_hooks._global_forward_hooks.values()]
    for module in modules:
        found += hooks_of(module)
        if is_replaced(module):
            found += [vars(module)[name] for name in ("forward", "_call_impl") if name in vars(module)]
    return found


def _told_by(code: Callable) -> dict[str, object]:
    """What code reads beside its arguments, by name, as far as it shows."""
    found: dict[str, object] = {}
    while isinstance(code, partial):
        found |= {f"argument {number}": value for number, value in enumerate(code.args)} | code.keywords
        code = code.func
    owner = getattr(code, "__self__", None)
    if owner is None and not hasattr(code, "__code__"):  # an object that is called
        owner, code = code, type(code).__call__
    found |= getattr(owner, "__dict__", {})
    function = getattr(code, "__func__", code)
    if (compiled := getattr(function, "__code__", None)) is None:
        return found
    for name, cell in zip(compiled.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty yet
            found[name] = cell.cell_contents
    found |= {f"default {number}": value for number, value in enumerate(function.__defaults__ or ())}
    found |= function.__kwdefaults__ or {}
    return found | {name: function.__globals__[name] for name in compiled.co_names if name in function.__globals__}


def _words(found: dict[str, object]) -> tuple:
    """The numbers and words among them, and in dictionaries of them. Lists are what somebody notes things in."""
    words = []
    for name, value in found.items():
        if isinstance(value, bool | int | float | complex | str | bytes):
            words.append((name, type(value), value))
        elif isinstance(value, dict):
            words.append((name, _words({str(key): item for key, item in value.items() if not isinstance(item, dict)})))
    return tuple(words)


def _are_same(values: Iterable[object], others: Sequence[object]) -> bool:
    values = list(values)
    return len(values) == len(others) and all(map(is_, values, others))


def _members_of(modules: Iterable[nn.Module]) -> Iterator[tuple[tuple[int, str], Tensor | None]]:
    for number, module in enumerate(modules):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield (number, name), tensor


def _code(kinds: list[type]) -> list[object]:
    """The functions that run: those of the classes, and those that upstream's layers call by name."""
    return [*map(_forward, kinds), *map(_call, kinds), *_functions(modeling_llama)]


def _global_hook_ids() -> list[int]:
    return [*global_hooks._global_forward_pre_hooks, *global_hooks._global_forward_hooks]


def _config(model: LlamaForCausalLM) -> dict[str, object]:
    config = vars(model.model.config)
    return {name: config.get(name) for name in CONFIG_KEYS}


def _copied(values: dict[str, object]) -> dict[str, object]:
    """A dictionary, and the lists, sets and dictionaries in it, so that a change of one of them shows; but for those
    that all modules have, which are compared apart.
    """
    return {name: value if name in OWN else _copy(value) for name, value in values.items()}


def _copy(value: object) -> object:
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return value.copy() if isinstance(value, list | set) else value
