"""A gguf file, model and tokenizer, as llama.cpp writes it: of llama or qwen2 kind, unpacked to plain weights.

    load_model("model.gguf")

What Transformers reads from it by itself is not all that the file says, so four things are put right or refused:

    rope scaling    linear and yarn stand among the file's values, which the reader drops
    rope_freqs      Llama 3.1 and later turn low frequencies slower. llama.cpp stores the factors as a tensor, which the
                    reader drops as well: the rope scaling that gives these factors is looked for
    pre-tokenizer   the file names it ("smollm", "qwen2"); of one that is unknown here text would be cut otherwise than
                    in training
    tensors         one that is missing, of another shape, or that no module has a place for, is named
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel

KINDS = ("llama", "qwen2")
#: What the names of pre-tokenizers mean that Transformers does not know: None where its own choice is right.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(  # single digits
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": None,
    "default": None,
}
#: Rope scalings of Llama 3.1 (factor 8) and 3.2 (factor 32).
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_FACTORS = (8.0, 32.0)


class OtherKind(ValueError):
    """A gguf file of a kind that the strategies do not run."""

    def __init__(self, path: Path, kind: str):
        super().__init__(f"{path} is of kind {kind!r}; the strategies run gguf files of kind {' or '.join(KINDS)}")
        self.kind = kind


def open_gguf(path: Path) -> GGUFReader:
    """A file of a kind that can be loaded.

    Raises:
        ValueError: no whole gguf file, or of another kind.
        RuntimeError: the gguf package is not installed.
    """
    try:
        from gguf import GGUFReader
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known
    except ImportError as error:
        raise RuntimeError(
            f"reading {path.name} needs the gguf package (pip install gguf) and Transformers 5.24: {error}"
        ) from error
    try:
        reader = GGUFReader(path)
    except Exception as error:  # as in `_naming`
        raise ValueError(f"{path} is no gguf file, or is cut short: {error}") from error
    kind, pre = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre")
    if kind not in KINDS:
        raise OtherKind(path, kind)
    if _field(reader, f"{kind}.expert_count"):
        raise ValueError(f"{path} is a mixture of experts, which the strategies do not run")
    if (num_parts := _field(reader, "split.count") or 1) > 1:
        raise ValueError(f"{path} is one of the {num_parts} files of a model: merge them, llama-gguf-split --merge")
    if _splits_words(reader) and pre is not None and pre not in known and pre not in _PRE_TOKENIZERS:
        raise ValueError(f"{path} names a pre-tokenizer {pre!r}, which is unknown here: text would be cut otherwise")
    return reader


def config_of(path: Path, reader: GGUFReader) -> PreTrainedConfig:
    """What would be the config of an open file, whose tensors are those that it asks for.

    Raises:
        ValueError: as `load_gguf`.
    """
    with _naming(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path.parent.absolute(), gguf_file=path.name)
        shape = AutoModelForCausalLM.from_config(config)
    _check_tensors(path, reader, shape)
    if (scaling := _scaling(path, reader, config)) is not None:
        config.rope_parameters = scaling | {"rope_theta": config.rope_parameters["rope_theta"]}
    return config


def load_gguf(path: Path, reader: GGUFReader, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as Transformers has it, of class Llama or Qwen2, and its tokenizer, from an open file.

    Raises:
        ValueError: something in it would be computed otherwise than llama.cpp does.
    """
    from transformers import GgufConfig

    source = {"pretrained_model_name_or_path": str(path.parent.absolute()), "gguf_file": path.name}
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = config_of(path, reader)
        with _naming(path):
            model = AutoModelForCausalLM.from_pretrained(
                **source, config=config, quantization_config=GgufConfig(dequantize=True), dtype=dtype
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
    finally:
        if was_shown:
            logging.enable_progress_bar()
    if _splits_words(reader) and (make := _PRE_TOKENIZERS.get(_field(reader, "tokenizer.ggml.pre"))):
        tokenizer.backend_tokenizer.pre_tokenizer = make()
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config.eos_token_id = _field(reader, "tokenizer.ggml.eos_token_id")
    return model, tokenizer


def _splits_words(reader: GGUFReader) -> bool:
    return _field(reader, "tokenizer.ggml.model") == "gpt2"


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Readers raise whatever they meet where numbers are others than were written."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _check_tensors(path: Path, reader: GGUFReader, model: PreTrainedModel) -> None:
    """Raises ValueError where the file has one too many, or lacks one, which the reader would draw at random; or where
    one has another shape than the file's own numbers say.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[model.config.model_type.upper()], model.config.num_hidden_layers)
    wanted = {
        names.get_name(name, try_suffixes=(".weight", ".bias")): tuple(weight.shape)
        for name, weight in model.state_dict().items()
    }
    found = {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in reader.tensors}
    found.pop("rope_freqs.weight", None)
    optional = {"output.weight"} if model.config.tie_word_embeddings else set()
    missing, extra = sorted(wanted.keys() - found.keys() - optional), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"the tensors of {path} are not those of a {model.config.model_type} model: "
            f"missing {', '.join(missing) or 'none'}; unexpected {', '.join(extra) or 'none'}"
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise ValueError(
                f"{path} holds {name} of shape {list(shape)}, and its own numbers ask for {list(wanted[name])}"
            )


def _scaling(path: Path, reader: GGUFReader, config: PreTrainedConfig) -> dict[str, Any] | None:
    """The rope scaling that the file has."""
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    told = _told_scaling(path, reader, config)
    return told if factors is None else _found_scaling(path, config, torch.tensor(factors))


def _told_scaling(path: Path, reader: GGUFReader, config: PreTrainedConfig) -> dict[str, Any] | None:
    """What the file's values say, as llama.cpp reads them."""
    begin = f"{config.model_type}.rope.scaling."
    told = {name.removeprefix(begin): _field(reader, name) for name in reader.fields if name.startswith(begin)}
    kind, factor = told.pop("type", "linear"), told.pop("factor", None)
    length = told.pop("original_context_length", config.max_position_embeddings)
    told.pop("finetuned", None)  # which changes nothing
    factor = factor or _field(reader, f"{config.model_type}.rope.scale_linear") or 1.0
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if told or kind not in ("linear", "yarn"):
        raise ValueError(
            f"{path} scales its rotary embedding in a way that is unknown here: {', '.join(sorted(told)) or repr(kind)}"
        )
    scaling = {"rope_type": kind, "factor": factor}
    return scaling if kind == "linear" else scaling | {"original_max_position_embeddings": length}


def _found_scaling(path: Path, config: PreTrainedConfig, factors: Tensor) -> dict[str, Any]:
    """The rope scaling by whose factors [D / 2] frequencies are divided."""
    plain = LlamaRotaryEmbedding(LlamaConfig(**config.to_dict())).inv_freq
    for factor in _LLAMA3_FACTORS:
        scaled = LlamaConfig(**config.to_dict())
        scaled.rope_parameters = {**_LLAMA3, "factor": factor, "rope_theta": config.rope_parameters["rope_theta"]}
        if torch.allclose(plain / LlamaRotaryEmbedding(scaled).inv_freq, factors, rtol=1e-4):
            return {**_LLAMA3, "factor": factor}
    raise ValueError(
        f"{path} divides the frequencies of its rotary embedding by factors from {factors.min():.3g} to "
        f"{factors.max():.3g}, which are not those of Llama 3's rope scaling: it cannot be loaded exactly"
    )
