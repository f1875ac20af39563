"""One model over two processes (gloo, float32): what one process answers, and what becomes of ranks that go wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import torch
from common import tiny_llama

from bench.case import Bench, Case
from bench.lines import Found
from bench.suites import parallel
from bench.workload import WORKLOADS, suite
from kv_strategies.models import load_model
from kv_strategies.models.load import DEFAULT_MODEL, load_tokenizer
from kv_strategies.models.text import prompts as natural

pytestmark = pytest.mark.upstream
ROOT = Path(__file__).resolve().parents[1]


def environment(gpus: str = "", **more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return (
        os.environ
        | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        | {"CUDA_VISIBLE_DEVICES": gpus, **more}
    )


def run_ranks(scenario: str, folder: Path, gpus: str = "") -> list[tuple[int, object, str]]:
    """Of each of two ranks: exit status, what it found, what it said."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/ranks.py"), scenario, str(folder)],
            env=environment(gpus, RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [processes[0].communicate(timeout=400)[1]]
        if scenario == "stopped":  # the other one has ended with it standing there
            processes[1].kill()
        said.append(processes[1].communicate(timeout=400)[1])
    finally:
        for process in processes:
            process.kill()
    outcomes = [folder / f"{scenario}.{rank}.json" for rank in range(2)]
    found = [json.loads(path.read_text()) if path.exists() else None for path in outcomes]
    return list(zip([process.returncode for process in processes], found, said, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama(vocab_size=62, num_layers=3).save_pretrained(folder / "tiny")
    tiny_llama(num_heads=3, num_kv_heads=3).save_pretrained(folder / "three")
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "worded")
    tokenizer.save_pretrained(folder / "worded")
    rows = [{"prompt": "one two three"}, {"prompt": 7}, {"prompt": "four", "temperature": 0.9}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    outcomes = run_ranks("equal", folder)
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    return [found for _, found, _ in outcomes]


def test_the_answers_are_those_of_one_process(found, folder):
    model, _ = load_model(folder / "tiny", dtype=torch.float32, device="cpu")
    alone = json.loads(json.dumps(ranks.answers(model, folder)))
    for name, expected in alone.items():
        assert found[0]["answers"][name] == expected, name
    assert found[0]["made"] == found[1]["made"] == [ranks.made(tied) for tied in (False, True)]
    assert any(preempted for _, _, preempted, _ in alone.values())
    assert found[1]["answers"] == found[0]["answers"]


def test_ranks_decide_alike(found):
    for name in ("unseeded", "generated", "deadline", "asynchronous", "changed", "blocks"):
        assert found[0][name] == found[1][name], name
    first, second = found[0]["unseeded"]
    assert first != second
    (reason, count), other = found[0]["deadline"]
    assert (reason, other) == ("deadline", ["length", 60]) and 0 < count < 60
    reasons = {name: result[0] for name, result in found[0]["asynchronous"]}
    assert reasons["b"] == reasons["d"] == "length" and reasons["a"] in ("cancelled", "length")
    computed, met, *changed = found[0]["changed"]
    assert met > computed == 0 and changed == [0, 0]


def test_the_pool_is_that_of_the_rank_with_least_memory(found):
    assert found[0]["blocks"] == found[1]["blocks"] > 0
    one_block = 2 * 3 * 16 * 16 * 4  # K and V, layers, tokens, numbers of one head, bytes
    assert found[0]["blocks"] == int(found[0]["free"] // 4 // 2 * 1e-4) // one_block  # each of two has half


def test_a_rank_takes_its_own_saved_heads_alone(found):
    for rank, (num_saved, num_loaded, name, foreign, damaged, num_kept) in enumerate(each["saved"] for each in found):
        assert num_saved == num_loaded > 0 and name == f"cache.rank{rank}of2"
        assert f"rank is {1 - rank} of 2 there and {rank} of 2 here" in foreign
        assert "rank 0 found" in damaged and "rank 1 blocks" in damaged and num_kept == 0


def test_what_cannot_be_shared_is_refused(found):
    for deterministic, blocks, heads, device, deadline, target, order in (each["refused"] for each in found):
        assert "deterministic=True serves a model that one process holds" in deterministic
        assert "the ranks disagree on what to build" in blocks and "9 blocks" in blocks and "on rank 1" in blocks
        assert "2 ranks cannot share the 3 KV heads" in heads and "(1, 3)" in heads
        assert "target_itl goes by the clock" in target and "shortest_first goes by the clock" in order
        assert "leave the device out" in device and "the baseline knows a deadline by its own clock" in deadline


def test_the_first_rank_speaks_and_writes(found, folder):
    assert found[0]["cli"][0] == 0 and "--- one two" in found[0]["cli"][1] and found[1]["cli"] == [0, "", ""]
    status, said, error = found[0]["batch"]
    assert status == 1 and "2 answered, 1 failed" in said and "line 2: prompt must be text" in error
    assert found[1]["batch"] == [1, "", ""]
    assert "0 answered, 1 failed, 3 were there" in found[0]["again"][1] and found[1]["again"] == [1, "", ""]
    rows = [json.loads(row) for row in (folder / "out.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in rows) == [1, 2, 3]


GONE = "rank 1 of 2 is gone: no sign of life"
GOES_WRONG = {
    "plan": ("rank 1 of 2 is about to compute 0 1 rows, 20 tokens", [0, 0]),
    "prompt": ("rank 1 of 2 is about to compute generate (1, 7) [] None", [0, 0]),
    "killed": (GONE, [0, -signal.SIGKILL]),
    "stopped": (GONE, [-signal.SIGALRM, -signal.SIGKILL]),  # gloo would not let the first one exit
}


@pytest.mark.parametrize("gpus", ["", pytest.param("0,1", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scenario", GOES_WRONG)
def test_a_rank_that_goes_wrong_is_named_by_all(folder, scenario, gpus):
    if gpus and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    (message, statuses), outcomes = GOES_WRONG[scenario], run_ranks(scenario, folder, gpus)
    if gpus:  # which way NCCL lets one go that is not killed is NCCL's
        statuses = [status if status == -signal.SIGKILL else outcomes[i][0] for i, status in enumerate(statuses)]
    assert [status for status, _, _ in outcomes] == statuses, outcomes
    for status, found, said in outcomes:
        for error in found or (
            [] if status == -signal.SIGKILL else [said]
        ):  # one that could not be woken has logged it
            assert message in error


def test_one_process_is_not_several():
    with pytest.raises(ValueError, match="start them with torchrun"):
        load_model(tp=True)


def test_torchrun_refuses_a_model_whose_heads_do_not_divide():
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kv_strategies.cli"]
    ended = subprocess.run(
        [*run, "generate", "One, two,", "--max-new-tokens", "2"],
        env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode and "kv-strategies: 2 ranks cannot share the 3 KV heads" in ended.stderr


@pytest.mark.slow
def test_the_64_prompts(folder):
    """The default model with a fourth KV head, whose three query heads the output does not look at: the same model, and
    two ranks can share it.
    """
    model, tokenizer = load_model(dtype=torch.float32, device="cpu")
    asked = natural(tokenizer, [1 + 3 * i for i in range(64)], seed=11)
    (folder / "prompts.json").write_text(json.dumps(asked))
    widen(model).save_pretrained(folder / "widened")
    alone = ranks.prompts(folder)
    outcomes = run_ranks("prompts", folder)
    assert [found for _, found, _ in outcomes] == [alone, alone], outcomes


@torch.no_grad()
def widen(model):
    config = model.config
    for layer in model.model.layers:
        attention, size = layer.self_attn, config.head_dim
        group = config.num_attention_heads // config.num_key_value_heads
        for module, count in ((attention.q_proj, group), (attention.k_proj, 1), (attention.v_proj, 1)):
            module.weight = torch.nn.Parameter(torch.cat([module.weight, module.weight[: count * size]]))
        columns = attention.o_proj.weight.new_zeros(config.hidden_size, group * size)
        attention.o_proj.weight = torch.nn.Parameter(torch.cat([attention.o_proj.weight, columns], dim=1))
    config.num_attention_heads += group
    config.num_key_value_heads += 1
    return model


def test_the_bench_runs_one_and_two_ranks(folder, monkeypatch):
    params = {"ranks": [1, 2], "decode": [[1, 40], [2, 24]], "prefill": [40], "new_tokens": 8, "repeats": 1}
    params["size"] = 1 << 20
    case = Case("parallel", "paged", str(folder / "tiny"), "float32", "cpu", params)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    points = parallel.run_parallel(Bench(case, folder, say=lambda text: None))["points"]
    assert [(p["ranks"], p["what"], p["rows"], p["tokens"]) for p in points] == [
        (ranks, *at) for ranks in (1, 2) for at in (("decode", 1, 40), ("decode", 2, 24), ("prefill", 1, 40))
    ]
    one, two = points[:3], points[3:]
    assert [point["faster"] for point in one] == [1.0] * 3 and all(point["faster"] > 0 for point in two)
    for alone, shared in zip(one[:2], two[:2], strict=True):
        assert shared["bytes"] == alone["bytes"] and shared["limit"] > shared["sums"]["median"] > 0
    line = {"workload": "parallel", "system": "paged", "model": "tiny", "dtype": "float32", "status": "ok", "time": "1"}
    shown = WORKLOADS["parallel"].tables(Found([line | {"params": params, "result": {"points": points}}]), "tiny")
    assert "| decode | 2 x 24 | 2 |" in shown and len(shown.splitlines()) == 10


def test_the_bench_says_that_gpus_are_lacking(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (case,) = suite("parallel", "cuda")[1:]
    assert WORKLOADS["parallel"].lacking(case) == "needs 2 GPUs, 1 are here"
    assert WORKLOADS["parallel"].lacking(replace(case, device="cpu")) is None
