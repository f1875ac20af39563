"""Models that become Llama: gguf files, Mistral, and folders written by `kv-strategies convert`."""

from __future__ import annotations

import json
import random
import resource
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kv_strategies import Request, Runner, build
from kv_strategies.cli import main
from kv_strategies.models import load_model
from kv_strategies.models.convert import convert
from kv_strategies.models.fetch import GGUF_NAME
from kv_strategies.models.load import DEFAULT_MODEL, MODELS

LETTERS = list(bytes_to_unicode().values())
TOKENS = [*LETTERS, "lo", "low", "Ġlow", "<|end|>"]
MERGES = ["l o", "lo w", "Ġ low"]
SMALL = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": len(TOKENS) - 1,
    "bos_token_id": None,
}
IDS = torch.randint(len(TOKENS), (2, 37), generator=torch.Generator().manual_seed(1))
ROPE3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


def random_model(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # norms and biases, too
    return model


def write_gguf(
    path: Path, model, *, tokens=TOKENS, merges=MERGES, pre="qwen2", kind=None, without=(), extra=None, values=None
) -> None:
    """As llama.cpp's converter does; the last token is the end. `values` are more of the model's own."""
    config, own = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, kind or own)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for name, value in (values or {}).items():
        add[type(value)](name.format(own), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[own.upper()], config.num_hidden_layers)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, weight in tensors.items():
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if own == "llama" and part in name:
                weight = weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        stem, _, end = name.rpartition(".")
        if name not in without:
            writer.add_tensor(f"{names.get_name(stem)}.{end}", weight.numpy())
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "config"), [(Qwen2ForCausalLM, Qwen2Config), (LlamaForCausalLM, LlamaConfig)])
def test_a_gguf_file_has_the_logits_of_its_model(kind, config, tied, tmp_path):
    original = random_model(kind, config(**SMALL, tie_word_embeddings=tied))
    write_gguf(tmp_path / "model.gguf", original)
    model, tokenizer = load_model(tmp_path / "model.gguf", device="cpu")
    assert type(model) is LlamaForCausalLM and model.config.tie_word_embeddings == tied
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=0, atol=1e-4)
    assert tokenizer.convert_ids_to_tokens(tokenizer("low low<|end|>").input_ids) == ["low", "Ġlow", "<|end|>"]
    assert tokenizer.decode(tokenizer("日 low").input_ids) == "日 low"
    assert model.generation_config.eos_token_id == len(TOKENS) - 1
    expected = original.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 37:].tolist()
    (found,) = Runner(model, build("prefix", model, num_blocks=16)).generate([Request(IDS[0], max_new_tokens=8)])
    assert found.token_ids == expected


def test_the_rope_scaling_of_llama_3_is_found_by_its_factors(tmp_path):
    size = SMALL | {"max_position_embeddings": 16384}
    original = random_model(LlamaForCausalLM, LlamaConfig(**size, rope_parameters=ROPE3))
    plain = LlamaForCausalLM(LlamaConfig(**size, rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    factors = plain.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    assert factors.max() == 8
    path = tmp_path / "model.gguf"
    write_gguf(path, original, extra={"rope_freqs.weight": factors})
    model, _ = load_model(path, device="cpu")
    positions = torch.arange(37)[None] + 9000
    torch.testing.assert_close(
        model(IDS, position_ids=positions).logits, original(IDS, position_ids=positions).logits, rtol=0, atol=1e-4
    )
    assert model.config.rope_parameters["factor"] == 8
    write_gguf(path, original, extra={"rope_freqs.weight": factors + 1})
    with pytest.raises(ValueError, match=r"by factors from 2 to 9, which are not those of Llama 3"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("kind", [(Qwen2ForCausalLM, Qwen2Config), (LlamaForCausalLM, LlamaConfig)])
@pytest.mark.parametrize(
    ("values", "rope"),
    [
        ({"scaling.type": "linear", "scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        ({"scaling.type": "none", "scaling.factor": 4.0}, {"rope_type": "default"}),
    ],
)
def test_a_gguf_file_keeps_its_rope_scaling(kind, values, rope, tmp_path):
    kind, config = kind
    original = random_model(kind, config(**SMALL, rope_parameters=rope | {"rope_theta": 1e4}))
    write_gguf(tmp_path / "model.gguf", original, values={f"{{}}.rope.{name}": value for name, value in values.items()})
    model, _ = load_model(tmp_path / "model.gguf", device="cpu")
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=0, atol=1e-4)


def test_a_gguf_file_that_is_damaged_says_so(tmp_path):
    path, rng = tmp_path / "model.gguf", random.Random(0)
    write_gguf(path, random_model(Qwen2ForCausalLM, Qwen2Config(**SMALL)))
    whole, refused = path.read_bytes(), 0
    cuts = [whole[:size] for size in (4, 24, 1000, len(whole) - 1)]
    flips = [whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :] for at in range(8, 3000, 40)]
    for content in [*cuts, *flips]:
        path.write_bytes(content)
        try:
            load_model(path, device="cpu")  # of a flipped weight nobody knows
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(cuts) + len(flips) // 2


def test_the_default_models_gguf_file_is_the_default_model():
    model, tokenizer = load_model(MODELS / GGUF_NAME, device="cpu")
    default, its_tokenizer = load_model(device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), default.parameters(), strict=True))
    words = "In 1999 it's 3.14, naïve 日本 🙂<|im_end|>"
    assert tokenizer(words).input_ids == its_tokenizer(words).input_ids
    assert tokenizer.chat_template == its_tokenizer.chat_template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "phi3"}, "of kind 'phi3'; the strategies run gguf files of kind llama or qwen2"),
        ({"pre": "klingon"}, "names a pre-tokenizer 'klingon', which is unknown here"),
        ({"without": {"model.layers.1.mlp.up_proj.weight"}}, "missing blk.1.ffn_up.weight; unexpected none"),
        ({"values": {"{}.rope.scaling.type": "longrope"}}, "scales its rotary embedding in a way.*'longrope'"),
        ({"values": {"{}.rope.scaling.factor": 2.0, "{}.rope.scaling.mscale": 2.0}}, "unknown here: mscale"),
        ({"values": {"split.count": 3}}, "one of the 3 files of a model: merge them"),
        (
            {"values": {"{}.embedding_length": 32}},
            r"token_embd.weight of shape \[260, 64\], and .* ask for \[260, 32\]",
        ),
        ({"extra": {"blk.0.attn_q_norm.weight": torch.ones(16)}}, "missing none; unexpected blk.0.attn_q_norm.weight"),
    ],
)
def test_gguf_files_that_cannot_be_loaded_say_why(options, message, tmp_path):
    write_gguf(tmp_path / "model.gguf", random_model(LlamaForCausalLM, LlamaConfig(**SMALL)), **options)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.gguf", device="cpu")


@pytest.mark.parametrize("window", [None, 128])
def test_mistral_without_a_window_is_llama(window, tmp_path):
    original = random_model(MistralForCausalLM, MistralConfig(**SMALL, head_dim=24, sliding_window=window))
    original.generation_config.eos_token_id = [3, 5]
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    model, _ = load_model(tmp_path, device="cpu")
    assert type(model) is LlamaForCausalLM and model.generation_config.eos_token_id == [3, 5]
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=0, atol=1e-4)
    MistralForCausalLM(MistralConfig(**SMALL, sliding_window=64)).save_pretrained(tmp_path / "windowed")
    with pytest.raises(ValueError, match="sliding window of 64 tokens, which Llama has not"):
        load_model(tmp_path / "windowed")


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (Qwen2ForCausalLM, Qwen2Config, {}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    ],
)
def test_a_folder_is_read_as_its_own_class_reads_it(kind, config, options, tmp_path):
    original = random_model(kind, config(**SMALL, **options))
    original.config.tie_word_embeddings = True  # and the files hold two, which differ
    original.save_pretrained(tmp_path / "given", max_shard_size="40KB", state_dict=original.state_dict())
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "given" / "consolidated.safetensors")
    for folder in (tmp_path / "given", convert(str(tmp_path / "given"), tmp_path / "llama")):
        model, _ = load_model(folder, device="cpu")
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=0, atol=1e-4)


def test_a_sharded_llama_3_folder_keeps_its_rope_scaling(tmp_path):
    config = LlamaConfig(**(SMALL | {"max_position_embeddings": 16384}), rope_parameters=ROPE3)
    original = random_model(LlamaForCausalLM, config)
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, _ = load_model(tmp_path, device="cpu")
    long = IDS.repeat(1, 10)
    torch.testing.assert_close(model(long).logits, original(long).logits, rtol=0, atol=1e-4)


class TestConvert:
    @pytest.mark.parametrize("source", ["qwen2", "mistral", "gguf"])
    def test_what_it_writes_is_a_llama_folder(self, source, tmp_path, capsys):
        if source == "mistral":
            original = random_model(MistralForCausalLM, MistralConfig(**SMALL, sliding_window=None)).bfloat16()
        else:
            original = random_model(Qwen2ForCausalLM, Qwen2Config(**SMALL))
        given, folder = tmp_path / ("model.gguf" if source == "gguf" else "given"), tmp_path / "new" / "llama"
        if source == "gguf":
            write_gguf(given, original)
        else:
            original.save_pretrained(given)
        assert main(["convert", str(given), str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"folder": str(folder)}
        model = LlamaForCausalLM.from_pretrained(folder)
        assert model.dtype == original.dtype
        if source != "gguf":
            original = type(original).from_pretrained(given, dtype=torch.float32)
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(model(IDS).logits, original(IDS).logits, rtol=0, atol=1e-4)
        assert load_model(folder, device="cpu")[1] is None or source == "gguf"

    def test_a_full_disk_names_the_folder_and_leaves_nothing(self, tmp_path, capsys):
        random_model(Qwen2ForCausalLM, Qwen2Config(**SMALL)).save_pretrained(tmp_path / "given")
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        for size in (100, 4000):  # of the config, of the weights
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
                assert main(["convert", str(tmp_path / "given"), str(tmp_path / "new")]) == 1
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            told = capsys.readouterr().err.splitlines()[-1]
            assert f"{tmp_path / 'new'} cannot be written: " in told and "File too large" in told
        assert [path.name for path in tmp_path.iterdir()] == ["given"]

    @pytest.mark.parametrize("options", [[], ["--dtype", "float32"]])
    def test_random_weights_are_refused_at_once(self, options, tmp_path, capsys):
        assert main(["convert", "llama-2-7b-random", str(tmp_path / "new"), *options]) == 1
        assert "random weights: there is nothing to convert" in capsys.readouterr().err

    def test_refusals_leave_nothing(self, tmp_path, capsys):
        assert main(["convert", str(DEFAULT_MODEL), str(tmp_path)]) == 1
        assert "exists already" in capsys.readouterr().err
        assert main(["convert", str(tmp_path / "none"), str(tmp_path / "new")]) == 1
        assert "there is no folder" in capsys.readouterr().err
        MistralConfig(**SMALL, sliding_window=64).save_pretrained(tmp_path / "windowed")
        assert main(["convert", str(tmp_path / "windowed"), str(tmp_path / "new")]) == 1
        assert "sliding window" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["windowed"]
