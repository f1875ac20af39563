"""The TensorFlow peer: the native cache's tokens in each of its ways, and its case, with the extra and without."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.suites.all  # noqa: F401  registers the workloads
from bench import machine
from bench.case import Case
from bench.driver import run_one
from bench.lines import Found
from bench.suites.tensorflow import CONTEXTS, tables
from bench.systems import TENSORFLOW, Native
from bench.workload import suite

WORKLOAD = next(iter(CONTEXTS))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """Query groups, a head of its own, weights as large as make attention matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None)
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


@pytest.mark.tensorflow
def test_every_way_gives_the_tokens_of_the_native_cache(tiny):
    """Prompts one after the other, shorter ones behind longer: what these left in a cache is not seen."""
    from bench.peers import tensorflow_llama as peer
    from kv_strategies.models import load_model

    native, model = Native(load_model(tiny, device="cpu")[0], None), peer.Llama(tiny)
    assert [f"tensorflow, {way}" for way in peer.WAYS] == TENSORFLOW
    prompts = [torch.randint(128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (17, 1, 5)]
    generators = {way: start(model, 17 + 12) for way, start in peer.WAYS.items()}
    for prompt in prompts:
        (expected,) = native([prompt], 12).token_ids
        for way, generate in generators.items():
            assert generate(prompt, 12) == expected, way
            assert generate(prompt, 1) == expected[:1], way


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "change, said",
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "plain rotary embedding"),
        ({"model_type": "mistral"}, "knows Llama"),
        ({"attention_bias": True}, "no biases"),
        (None, "no folder with safetensors"),
    ],
)
def test_a_model_it_does_not_know(tiny, tmp_path, change, said):
    from bench.peers.tensorflow_llama import Llama

    if change:
        config = json.loads((tiny / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.safetensors").symlink_to(tiny / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        Llama(tmp_path)


@pytest.mark.tensorflow
def test_the_case_in_a_fresh_process(tiny, tmp_path):
    params = {"context": 20, "new_tokens": 6, "repeats": 2}
    systems = ["paged", "tensorflow, two graphs"]
    lines = [
        run_one(Case(WORKLOAD, system, str(tiny), "float32", "cpu", params), tmp_path, "tensorflow")
        for system in systems
    ]
    assert [line["status"] for line in lines] == ["ok"] * 2, lines
    peer = lines[-1]["result"]
    assert peer["framework"].startswith("TensorFlow 2.") and peer["memory"] > 0
    assert [len(tokens) for tokens in peer["tokens"]] == [6, 6, 6]
    page = tables(Found(lines), lines[0]["model"])
    assert all(f"| {system} |" in page for system in systems) and page.count("| yes |") == 2
    peer["tokens"][1][2] += 1
    assert "| 2 of 3 prompts |" in tables(Found(lines), lines[0]["model"])


def test_without_the_extra_its_row_says_why(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    case = Case(WORKLOAD, TENSORFLOW[0], str(tiny), "float32", "cpu")
    line = run_one(case, tmp_path, "tensorflow")
    assert line["status"] == "skipped" and "tensorflow is not installed: pip install" in line["error"]
    assert f"| {TENSORFLOW[0]} | not run |" in tables(Found([line]), line["model"])


def test_nothing_else_imports_it():
    modules = "bench.command, bench.worker, kv_strategies.plan_command, kv_strategies.cli, kv_strategies.runner"
    program = f"import sys, {modules}; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=machine.ROOT, check=True)


def test_the_suite_holds_every_way_at_every_length():
    names = {(case.workload, case.system) for case in suite("tensorflow", "cpu")}
    assert names >= {(workload, system) for workload in CONTEXTS for system in TENSORFLOW}
