"""A model that finds no memory is told so before it is read: how much, and what would fit."""

from __future__ import annotations

import pytest
import torch
from common import tiny_llama
from safetensors.torch import load_file, save_file

from kv_strategies.cli import main
from kv_strategies.models import load_model, room

FLOAT32 = sum(parameter.numel() for parameter in tiny_llama().parameters()) * 4


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def free(monkeypatch):
    """Bytes that are free, by the kind of device."""
    found = {"cpu": 1 << 40, "cuda": 1 << 40}
    monkeypatch.setattr(room, "free_bytes", lambda place: found[place.type])
    return found


def test_the_last_byte_counts(folder, free):
    free["cpu"] = FLOAT32
    load_model(folder, device="cpu")
    free["cpu"] = FLOAT32 - 1
    with pytest.raises(room.NoRoom, match=r"tiny takes 0.00 GB in float32.*in bfloat16 or float16 it takes"):
        load_model(folder, device="cpu")
    load_model(folder, device="cpu", dtype=torch.float16)
    free["cpu"] = FLOAT32 // 2 - 1
    with pytest.raises(room.NoRoom, match="nor does it fit in bfloat16"):
        load_model(folder, device="cpu")
    with pytest.raises(room.NoRoom, match="several devices"):
        load_model(folder, device="cpu", dtype=torch.bfloat16)


def test_nothing_is_read_before(folder, free, monkeypatch):
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weights"):
        load_model(folder, device="cpu")
    free["cpu"] = 0
    with pytest.raises(room.NoRoom):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(("spec", "place"), [("folder", "cpu"), ("folder", "cuda"), ("llama-3.1-8b-random", "cuda")])
def test_a_gpu_and_the_way_there(folder, free, spec, place):
    """Weights of files pass through host memory; random ones are drawn where they stay."""
    spec = folder if spec == "folder" else spec
    free[place] = 1000
    with pytest.raises(room.NoRoom, match=rf"GB of {place}(:0)? memory are free"):
        load_model(spec, device="cuda:0")


def test_the_command_says_what_would_fit_beside(free, capsys):
    free["cpu"] = free["cuda"] = int(16e9)
    command = ["explain-diff", "paged", "int8", "hello", "--model", "llama-2-7b-random", "--dtype", "float32"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "llama-2-7b-random takes 26.95 GB in float32, and 16.00 GB of" in said
    room_for = dict(part.split(" ", 1) for part in said.split("room beside the weights for: ")[1].strip().split(", "))
    tokens = {name: int(told.split()[0]) for name, told in room_for.items() if told[0].isdigit()}
    assert 0 < tokens["paged"] < tokens["offload"] < tokens["int8"] and "any number" in room_for["window"]


def test_what_is_free_is_what_the_machine_says():
    told = room.free_bytes(torch.device("cpu"))
    assert 1 << 20 < told < 1 << 50


@pytest.mark.parametrize("version", (1, 2))
def test_a_container_grants_less_than_the_host_has(version, tmp_path, monkeypatch):
    host = room.free_bytes(torch.device("cpu"))
    folder = tmp_path if version == 2 else tmp_path / "memory"
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(exist_ok=True)
    (folder / "memory.stat").write_text("anon 1\ninactive_file 300\nactive_file 7\n")
    for limit, used, free in (("1000", "800", 500), ("1000", "2000", 0), ("max", "800", None), ("", "", None)):
        for name, text in zip(names, (limit, used), strict=True):
            (folder / name).write_text(text and f"{text}\n")
        assert room._free_of_the_container(tmp_path) == free
    assert room._free_of_the_container(tmp_path / "none") is None
    monkeypatch.setattr(room, "_free_of_the_container", lambda: 4096)
    assert room.free_bytes(torch.device("cpu")) == 4096 < host
