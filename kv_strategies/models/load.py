"""Models: anything of Llama architecture, by one name.

    load_model()                         the embedded default, SmolLM2-135M-Instruct (`make model` brings it)
    load_model("path/to/folder")         a local folder;  a hub id such as "meta-llama/Llama-2-7b-hf" likewise
    load_model("Qwen/Qwen2.5-0.5B")      Qwen2, Qwen2.5 and Qwen-7B weights, converted exactly (`qwen.py`)
    load_model("mistralai/Mistral-7B-v0.3")   Mistral weights without a sliding window (`mistral.py`)
    load_model("model.gguf")             a gguf file of llama or qwen2 kind, tokenizer included (`gguf.py`)
    load_model("llama-2-7b-random")      the shape with random weights: for speed and memory only

The patched `modeling_llama.py` is what runs all of them. No code from a hub is ever executed.

    python -m kv_strategies.models fetch      brings the default model and the text for prompts (behind `make model`)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from . import fetch, files, gguf, mistral, parallel, qwen
from .room import check_room, num_weights

#: Where models and the text live, beside the package in a checkout. Git ignores it.
MODELS = Path(__file__).resolve().parents[2] / "models"
DEFAULT_MODEL = MODELS / "SmolLM2-135M-Instruct"
TEXT = MODELS / fetch.TEXT_NAME

# Shapes of known models. No eos token, so that a random model never stops early and a run has the length asked for.
_RANDOM = {"eos_token_id": None, "bos_token_id": None, "rms_norm_eps": 1e-5}
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    # The real one ends at 4096 positions; random weights lose nothing beyond it, and longer contexts can be measured.
    "llama-2-7b-random": _RANDOM
    | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama-3.1-8b-random": _RANDOM
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}

MOST_LAYERS = 4096
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

#: From a `config.json`, by its model type, the Llama that computes what it says.
_CONFIGS = {
    "llama": LlamaConfig.from_dict,
    "qwen2": qwen.llama_config,
    "qwen": qwen.llama_config,
    "mistral": mistral.llama_config,
}


def load_model(
    spec: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tp: bool | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase | None]:
    """The model `spec` names, in eval mode, and its tokenizer (None where there is none: random weights).

    Under `torchrun` every rank gets its share of the heads (`parallel.py`, docs/parallel.md).

    Args:
        spec: None for the embedded default, a folder, a hub id, or one of RANDOM_MODELS.
        dtype: float32 on a CPU and bfloat16 on a GPU unless told.
        device: the first GPU where there is one, unless told; over several ranks, the GPU of the rank.
        tp: whether to spread the model over the ranks of `torchrun`; yes where there are several, unless told.

    Raises:
        FileNotFoundError: no such folder (for the default: run `make model`), or no such model on the hub.
        ValueError: not of Llama architecture, an unknown "-random" name, or files that are damaged or do not belong
            together: names the file and what to do. Ranks that cannot share the KV heads evenly.
        NoRoom: a ValueError; there is less memory than the weights take (`room.py`).
    """
    is_parallel = parallel.is_wanted(tp)
    if is_parallel:
        device = parallel.join_ranks(device)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    model, tokenizer = _load(str(spec if spec is not None else DEFAULT_MODEL), dtype, device, is_parallel)
    if is_parallel:
        parallel.cut(model)
    return model.to(device).eval(), tokenizer


def _load(
    spec: str, dtype: torch.dtype, device: torch.device, is_parallel: bool
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase | None]:
    if means_random(spec):
        check_room(spec, num_weights(_random_config(spec)), dtype, device)
        return random_model(spec, dtype=dtype, device=device), None
    if spec.endswith(".gguf"):
        return load_gguf(find_gguf(spec), dtype, device)
    config = read_config(spec)
    if Path(spec).is_dir():
        files.check_folder(Path(spec))
    if str(config.get("model_type")) in _CONFIGS:
        checked, places = llama_config(spec, config), (torch.device("cpu"), device)
        num_shares = parallel.num_ranks() if is_parallel and config["model_type"] == "llama" else 1
        check_room(spec, num_weights(checked) // num_shares, dtype, *places)
    match config.get("model_type"):
        case "llama":
            model = load_original(LlamaForCausalLM, spec, dtype, **(parallel.shards(checked) if is_parallel else {}))
            tokenizer = load_tokenizer(spec)
        case "qwen2" | "mistral" as kind:
            original = load_original(Qwen2ForCausalLM if kind == "qwen2" else MistralForCausalLM, spec, dtype)
            model, tokenizer = as_llama(spec, checked, original), load_tokenizer(spec)
        case "qwen":
            folder = qwen.local_folder(spec)
            model = assemble(spec, checked, qwen.llama_weights(config, folder), dtype)
            qwen.set_generation_config(model, folder)
            tokenizer = qwen.v1_tokenizer(folder)
        case other:
            raise ValueError(
                f"{spec} is a model of type {other!r}. The strategies run on the Llama architecture: give a model "
                "of type 'llama', or 'qwen2', 'qwen' or 'mistral', whose weights are converted to it."
            )
    files.check_token_ids(f"{spec}/generation_config.json", model.generation_config.to_dict(), model.config.vocab_size)
    return model, tokenizer


def model_shape(spec: str | Path | None, dtype: torch.dtype) -> LlamaForCausalLM:
    """The model that `load_model` would give, on the meta device: its sizes, and no weights.

    Args:
        spec: as of `load_model`; or a `.gguf` file, of which its head is read.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; a gguf file of another architecture, or none.
    """
    spec = str(spec if spec is not None else DEFAULT_MODEL)
    if means_random(spec):
        config = _random_config(spec)
    else:
        raw = gguf_config(spec) if spec.endswith(".gguf") else read_config(spec)
        if str(raw.get("model_type")) not in _CONFIGS:
            raise ValueError(
                f"{spec} is a model of type {raw.get('model_type')!r}: the strategies run on the Llama architecture"
            )
        config = llama_config(spec, raw)
        if "quantization_config" in raw:  # which says that the weights are others than these
            config.quantization_config = raw["quantization_config"]
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype).eval()


def gguf_config(spec: str) -> dict[str, Any]:
    """What would be the `config.json` of a gguf file.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; reading it takes the package gguf, which is not installed.
    """
    path = find_gguf(spec)
    try:
        reader = gguf.open_gguf(path)
    except gguf.OtherKind as error:  # said as of a folder
        return {"model_type": error.kind}
    except RuntimeError as error:  # no package
        raise ValueError(str(error)) from error
    return gguf.config_of(path, reader).to_dict()


def read_config(spec: str) -> dict[str, Any]:
    """The `config.json` of a local folder or hub id."""
    path = Path(spec)
    if path.is_dir():
        if (path / "config.json").is_file():
            return files.read_json(path / "config.json")
        instead = "".join(f"; give a gguf file by its name: {found}" for found in sorted(path.glob("*.gguf"))[:1])
        raise FileNotFoundError(f"{spec} is no model folder: it holds no config.json{instead}")
    if path == DEFAULT_MODEL:
        raise FileNotFoundError(f"the default model is not in {spec}: run `make model`")
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {spec}")
    refused = _refused_by_the_hub(spec)
    try:
        return PreTrainedConfig.get_config_dict(spec, local_files_only=refused is not None)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"{spec!r} is neither a local folder nor a model that the hub gives. Check the name; for a gated model "
            f"run `hf auth login` first; without a network give a local folder. The hub client says: {refused or error}"
        ) from error


def means_random(spec: str) -> bool:
    """Whether it is a name of random weights: one of `RANDOM_MODELS`, or one that is to be refused as such."""
    return spec.endswith("-random") and not Path(spec).exists()


def _refused_by_the_hub(spec: str) -> Exception | None:
    """Why it does not give a model, asked once: where nothing is cached its client would ask for half a minute."""
    try:
        get_hf_file_metadata(hf_hub_url(spec, "config.json"))
    except Exception as error:  # of the network, of the name, of the hub's answer
        return error
    return None


def llama_config(spec: str, config: dict[str, Any]) -> LlamaConfig:
    """The Llama that a `config.json` describes, one that can be built."""
    source = spec if spec.endswith(".gguf") else f"{spec}/config.json"
    num_layers = config.get("num_hidden_layers", 1)
    if isinstance(num_layers, int) and not 1 <= num_layers <= MOST_LAYERS:  # asked first: a config makes a list of them
        raise ValueError(f"{source}: num_hidden_layers must be from 1 to {MOST_LAYERS}, got {num_layers}")
    if lacking := [name for name in _SIZES if config.get(name) is None]:  # upstream would take those of Llama-2-7B
        raise ValueError(f"{source} describes no model that could be built: it lacks {', '.join(lacking)}")
    try:
        found = _CONFIGS[config["model_type"]](config)
        files.check_token_ids(source, found.to_dict(), found.vocab_size)
        num_weights(found)  # which builds it
    except (StrictDataclassError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{source} describes no model that could be built: {type(error).__name__}: {error}") from error
    if found.num_attention_heads % found.num_key_value_heads:
        raise ValueError(
            f"{source} describes no model that could be built: num_attention_heads {found.num_attention_heads} is no "
            f"multiple of num_key_value_heads {found.num_key_value_heads}"
        )
    return found


def load_original(kind: type[PreTrainedModel], spec: str, dtype: torch.dtype, **shards: object) -> PreTrainedModel:
    """The model of a folder or hub id as the class of its own runs it."""
    # Upstream would go on with random weights for those that are missing, and without those that it has no place for.
    try:
        model, info = kind.from_pretrained(
            spec, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **shards
        )
    except OSError as error:
        raise FileNotFoundError(f"there are no weights of {spec}: {error}") from error
    except ImportError as error:  # its quantization_config asks for a package
        raise ValueError(f"{spec} cannot be loaded here: {error}") from error
    wrong = []
    if info["missing_keys"]:
        wrong.append(f"lacks weights of the model: {first_few(info['missing_keys'])}")
    if info["unexpected_keys"]:
        wrong.append(
            f"holds weights that the model of its config.json has no place for: {first_few(info['unexpected_keys'])}"
        )
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        wrong.append(f"holds {name} of shape {list(found)}, and its config.json asks for {list(wanted)}")
    if wrong:
        raise ValueError(f"{spec} {'; it '.join(wrong)}; take config and weights from one model")
    # Upstream ties no two weights that the files tell apart, whatever the config says.
    model.config.tie_word_embeddings = model.lm_head.weight is model.model.embed_tokens.weight
    return model


def as_llama(spec: str, config: LlamaConfig, original: PreTrainedModel) -> LlamaForCausalLM:
    """The Llama of this config with the weights of a model that has Llama's names, and when that one stops."""
    weights = qwen.with_o_bias(dict(original.state_dict())) if config.attention_bias else dict(original.state_dict())
    config.tie_word_embeddings = original.config.tie_word_embeddings
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    model = assemble(spec, config, weights, original.dtype)
    model.generation_config = original.generation_config
    return model


def find_gguf(spec: str) -> Path:
    path = Path(spec)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    files.check_gguf(path)
    return path


def load_gguf(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    reader = gguf.open_gguf(path)
    check_room(str(path), sum(int(tensor.n_elements) for tensor in reader.tensors), dtype, torch.device("cpu"), device)
    model, tokenizer = gguf.load_gguf(path, reader, dtype)
    if isinstance(model, LlamaForCausalLM):
        return model, tokenizer
    return as_llama(str(path), qwen.llama_config(model.config.to_dict()), model), tokenizer


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if Path(spec).is_dir() and not any((Path(spec) / name).exists() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(spec)
    except OSError:
        raise
    except Exception as error:  # each kind of tokenizer meets damage in its own words, without the file's name
        raise ValueError(f"{spec}: its tokenizer cannot be read: {error}") from error


def assemble(spec: str, config: LlamaConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> LlamaForCausalLM:
    """A model that holds exactly these weights, without a copy (of that dtype) and without initialising it first."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    if config.tie_word_embeddings:
        weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    wanted, given = model.state_dict().keys(), weights.keys()
    if wanted != given:
        raise ValueError(
            f"the weights of {spec} are not those of its config: missing {first_few(wanted - given)}, "
            f"unexpected {first_few(given - wanted)}"
        )
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # shapes
        raise ValueError(f"the weights of {spec} are not those of its config: {error}") from error
    return finish(model)


def random_model(name: str, *, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A known shape with normal weights (std 0.02, as at the start of training), drawn on the device itself.

    The seed is fixed: two calls give the same weights on the same kind of device.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(_random_config(name)).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return finish(model).to(device)


def _random_config(name: str) -> LlamaConfig:
    if name not in RANDOM_MODELS:
        raise ValueError(f"unknown random model {name!r}; known are {', '.join(RANDOM_MODELS)}")
    return LlamaConfig(**RANDOM_MODELS[name], name_or_path=name)


def finish(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """What a model made on the meta device still lacks: its tied weight, and the rotary table, which no file holds."""
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    return model.eval()


def first_few(names: set[str] | list[str]) -> str:
    names = sorted(names)
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"
