"""The bench as a command: whatever happens to a case becomes a line, and whatever is asked wrongly is said at once."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import resource
import shutil
import stat
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from bench import driver, lines, machine, report, worker
from bench.__main__ import main
from bench.case import Case, model_name
from bench.driver import run_all, run_one
from bench.systems import missing
from bench.workload import WORKLOADS, Workload, register

ROOT = machine.ROOT
TOY = (
    """
import os, sys
from bench.markdown import by_system
from bench.workload import Claim, Workload, register

def run(bench):
    bench.say("thinking")
    match bench.case.system:
        case "killed": os.kill(os.getpid(), 9)
        case "out of memory": raise MemoryError("no room for it")
    return {"answer": bench.params["question"] * 2}

register(Workload(
    "toy", run, "what is twice the question?",
    cases={"toys": lambda to: [to.case(name, "float32", {"question": 21}) for name in ("""
    + "SYSTEMS"
    + """)]},
    words=lambda result: f"the answer is {result['answer']}",
    tables=lambda found, model: "**Toys**\\n\\n" + by_system(
        found.of("toy", model), {"twice": lambda result: str(result["answer"])}),
    claims=[Claim("twice {question}", "at least 40", 40, lambda result: result["answer"], "{:d}")],
))
"""
)


def toy(folder: Path, *systems: str) -> None:
    (folder / "toy.py").write_text(TOY.replace("SYSTEMS", ", ".join(map(repr, systems)) + ","))


def bench(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m bench` in a process of its own, from `folder`."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench", "--device", "cpu", *arguments]
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_case_end_to_end_and_a_failing_one_beside_it(tmp_path, tiny):
    accuracy = {"lengths": [1, 17, 33], "new_tokens": 5}
    cases = [
        Case("accuracy", "no such system", tiny, "float32", "cpu", accuracy),
        Case("accuracy", "paged", tiny, "float32", "cpu", accuracy),
        Case("throughput", "offloaded", tiny, "float32", "cpu", {"lengths": [4], "new_tokens": 2, "repeats": 1}),
    ]
    results = tmp_path / "default-cpu.jsonl"
    assert run_all(cases, results, "default", keep_failures=True) == 1
    failed, paged, skipped = map(json.loads, results.read_text().splitlines())
    assert failed["status"] == "failed" and "no such system" in failed["error"]
    equal = {"prompts": 3, "identical": 3, "divergence": None}
    assert paged["result"] == equal | {"identical_again": 3, "hit_rate": 0.0}
    assert paged["model"] == model_name(tiny) and tiny not in results.read_text()
    assert skipped["status"] == "skipped" and skipped["error"] == missing("offloaded", "cpu")
    assert "no such system" in report.write(tmp_path).read_text()


def test_a_process_that_dies_or_hangs_is_a_line(tmp_path, monkeypatch):
    case = Case("machine", "limits", None, "float32", "cpu", timeout=30)
    for script, status, error in [
        ("kill -9 $$", "failed", "ended by signal 9 (out of memory?)"),
        ("echo a last word >&2; exit 3", "failed", "ended with status 3: a last word"),
    ]:
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))
        line = run_one(case, tmp_path, "default")
        assert (line["status"], line["error"]) == (status, error)
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    line = run_one(Case("machine", "limits", None, "float32", "cpu", timeout=1), tmp_path, "default")
    assert (line["status"], line["error"]) == ("timeout", "stopped after 1 s")


def test_a_case_has_all_cores_whatever_openmp_is_told(tmp_path):
    """Told to bind threads, OpenMP binds the process that starts the cases to one core."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    expected = subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout
    command = [sys.executable, "-m", "bench", "--device", "cpu", "--only", "machine", "--out", str(tmp_path)]
    bound = clean | {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    done = subprocess.run(command, env=bound, capture_output=True, check=True, cwd=machine.ROOT, text=True)
    assert done.stdout.startswith("1 case on cpu, each in a fresh process.\nmachine / limits: ")
    (found,) = map(json.loads, (tmp_path / "default-cpu.jsonl").read_text().splitlines())
    assert found["machine"]["threads"] == int(expected)


# --- a workload from outside


def test_a_workload_from_outside_runs_into_a_table(tmp_path):
    toy(tmp_path, "a", "b")
    done = bench(tmp_path, "--load", "toy", "--suite", "toys", "--only", "toy", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "the answer is 42" in done.stdout
    page = (tmp_path / "out" / "toys_table.md").read_text()
    assert "| a | 42 |" in page and "| b | 42 |" in page and "| toy | twice 21 | at least 40 | 42 | - |" in page
    assert "| toy | toys | what is twice the question? |" in bench(tmp_path, "workloads", "--load", "toy").stdout
    unloaded = bench(tmp_path, "report", "--out", "out")
    assert unloaded.returncode == 0
    assert "no workload of this name is known here (`--load MODULE`): toy" in (
        tmp_path / "out" / "toys_table.md").read_text()  # fmt: skip


def test_a_narrow_terminal_shows_the_time_left(tmp_path, monkeypatch):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 40))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run_all([Case("machine", "limits", None, "float32", "cpu", {"size": 1 << 20})], tmp_path / "a-cpu.jsonl", "a")
    shown = [text for text in re.split(r"[\r\n]+", os.read(ours, 1 << 16).decode()) if text.strip()]
    assert all(len(text) <= 40 and re.match(r"[01]/1 \[\d\d:\d\d<[\d?]", text) for text in shown), shown
    assert any("machine / limits" in text for text in shown)


def test_a_name_is_taken_once():
    def run(bench):
        return {}

    with pytest.raises(ValueError, match="there is a workload 'accuracy' already"):
        register(Workload("accuracy", run, "another?", cases={}))
    assert WORKLOADS["accuracy"].run is not run


@pytest.mark.parametrize("run", [lambda bench: {}, functools.partial(dict, answer=1)])
def test_what_a_process_could_not_import_is_refused(run):
    with pytest.raises(ValueError, match="run of 'mine' must be a function of a module"):
        register(Workload("mine", run, "which?", cases={}))
    assert "mine" not in WORKLOADS


def test_a_workload_may_measure_by_a_function_of_another_file(tmp_path, tiny):
    workload = WORKLOADS["long context"]
    assert workload.run.__module__ != workload.cases["limit"].__module__
    params = {"points": [[1, 33]], "new_tokens": 3, "repeats": 1, "warm_points": True}
    line = run_one(Case("long context", "paged", tiny, "float32", "cpu", params), tmp_path, "limit")
    assert line["status"] == "ok", line


# --- failures, and runs that are interrupted


def test_failures_stay_out_of_the_results_unless_asked(tmp_path):
    toy(tmp_path, "a", "killed", "out of memory")
    arguments = ["--load", "toy", "--suite", "toys", "--only", "toy", "--out", "out"]
    done = bench(tmp_path, *arguments)
    assert done.returncode == 1 and "2 of 3 cases failed" in done.stdout
    out = tmp_path / "out"
    assert [line["system"] for line in lines.read(out)] == ["a"]
    killed, no_memory = lines.read(out / "failed")
    assert killed["error"] == "ended by signal 9 (out of memory?)"
    assert no_memory["error"] == "MemoryError: no room for it"
    assert "killed" not in (out / "toys_table.md").read_text()
    assert bench(tmp_path, *arguments, "--keep-failures", "--resume").returncode == 1
    assert [line["system"] for line in lines.read(out)] == ["a", "killed", "out of memory"]  # "a" was done already
    assert "| out of memory | failed: MemoryError: no room for it |" in (out / "toys_table.md").read_text()


def test_files_that_are_not_there_are_not_named(tmp_path):
    toy(tmp_path, "killed")
    arguments = ["--load", "toy", "--suite", "toys", "--only", "toy", "--out", "out"]
    done = bench(tmp_path, *arguments)
    assert done.returncode == 1 and "There is no result: all failed; --keep-failures makes" in done.stdout
    assert "Results:" not in done.stdout and "Table:" not in done.stdout
    found = json.loads(bench(tmp_path, *arguments, "--json").stdout)
    assert found == {"results": "out/toys-cpu.jsonl", "table": "out/toys_table.md", "cases": 1, "failed": 1}
    kept = bench(tmp_path, *arguments, "--keep-failures").stdout
    assert "Results: out/toys-cpu.jsonl\nTable:   out/toys_table.md\n" in kept and "There is no result" not in kept


def test_git_ignores_what_failed():
    path = report.RESULTS / "failed" / "default-cpu.jsonl"
    assert subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=ROOT).returncode == 0


def test_resume_skips_what_the_same_code_measured_here(tmp_path, monkeypatch):
    cases = [Case("machine", "limits", None, "float32", "cpu", {"size": size}) for size in (1 << 20, 1 << 21)]
    results = tmp_path / "default-cpu.jsonl"
    assert driver.done_already(cases, results) == []
    lines.append(results, run_one(cases[0], tmp_path, "default"))
    assert driver.done_already(cases, results) == cases[:1]
    monkeypatch.setenv("BENCH_COMMIT", "another")
    assert driver.done_already(cases, results) == []


def test_what_other_uncommitted_changes_measured_is_measured_again(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    root.mkdir()
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    (root / "code.py").write_text("1")
    subprocess.run([*git, "add", "code.py"], check=True)
    case = Case("machine", "limits", None, "float32", "cpu", {"size": 1 << 20})
    measured = run_one(case, tmp_path, "default")
    monkeypatch.setattr(machine, "ROOT", root)
    lines.append(tmp_path / "r.jsonl", measured | machine.commit())
    assert driver.done_already([case], tmp_path / "r.jsonl") == [case]
    (root / "code.py").write_text("2")
    assert machine.commit()["dirty"] and driver.done_already([case], tmp_path / "r.jsonl") == []
    subprocess.run([*git, "commit", "-q", "-a", "-m", "second"], check=True)
    assert machine.commit().keys() == {"commit", "dirty"} and not machine.commit()["dirty"]


def test_models_of_one_name_are_told_apart(tmp_path, capsys, monkeypatch):
    """Checkpoints are called alike. The place itself, which is nobody's business, stands in no line."""
    monkeypatch.setattr("bench.command.check_models", lambda cases: None)
    results, found = tmp_path / "default-cpu.jsonl", []
    for run in ("run1", "run2"):
        (tmp_path / run / "checkpoint").mkdir(parents=True)
        found.append(Case("machine", "limits", str(tmp_path / run / "checkpoint"), "float32", "cpu", {"size": 1 << 20}))
    lines.append(results, run_one(found[0], tmp_path, "default"))
    assert str(tmp_path) not in results.read_text()
    assert driver.done_already(found, results) == found[:1]
    given = ["--device", "cpu", "--only", "throughput / paged /", "--out", str(tmp_path), "--model", found[1].model]
    assert main(given) == 2
    assert "has results of another model named checkpoint, which lay in another folder" in capsys.readouterr().err
    assert model_name(".") == ROOT.name and model_name("a/b.v1") == "b.v1" and model_name(None) == model_name("")


def test_a_name_as_it_is_listed_is_taken_as_it_stands(capsys):
    name = "throughput / paged, generate() / SmolLM2-135M-Instruct / float32"
    assert main(["--device", "cpu", "--list", "--only", name]) == 0
    assert capsys.readouterr().out == f"{name}\n"


def test_a_figure_that_is_no_number_is_a_failure(tmp_path):
    measured = worker.run(
        lambda bench: {"perplexity": float("nan")}, Case("toy", "a", None, "float32", "cpu"), tmp_path, print
    )
    assert measured["status"] == "failed" and "not JSON compliant" in measured["error"]
    path = tmp_path / "default-cpu.jsonl"
    path.write_text(json.dumps(LINE | {"result": {"perplexity": float("nan")}}) + "\n")
    with pytest.raises(ValueError, match=r"default-cpu.jsonl, line 1 is no JSON \(NaN is no figure"):
        lines.read(tmp_path)


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "run_all", interrupted)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["--device", "cpu", "--only", "machine", "--out", str(tmp_path)]) == 130
    assert "--resume goes on from there" in capsys.readouterr().err


def test_a_full_disk_leaves_whole_lines_and_loses_none(tmp_path):
    path = tmp_path / "default-cpu.jsonl"
    program = f"""
import resource
from pathlib import Path
from bench import driver, lines
path = Path({str(path)!r})
driver._append(path, {{"n": 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
for write in (lambda: driver._append(path, {{"n": "x" * 50}}),
              lambda: lines.write_whole(path, lambda draft: draft.write_text("y" * 50))):
    try:
        write()
    except OSError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert path.read_text() == '{"n": 1}\n' and os.listdir(tmp_path) == [path.name]
    assert done.stdout.count(f"cannot write to {path}: File too large") == 2, done.stderr
    assert "x" * 50 in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20


@pytest.mark.parametrize("first", ["bench.report.frontier", "bench.suites.tensorflow"])
def test_workloads_have_one_order_whatever_is_imported_first(first):
    program = f"import {first}, bench.workload; print(*bench.workload.WORKLOADS, sep=';')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    ours = [name for name, workload in WORKLOADS.items() if workload.run.__module__.startswith("bench.suites.")]
    assert done.stdout.strip().split(";") == ours, done.stderr


def test_the_process_of_a_case_imports_what_it_measures_and_no_more():
    """What a suite imports at its top is in the peak memory of every case on a CPU."""
    program = "import bench.worker, bench.suites, sys; print({'kv_strategies', 'tensorflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# --- what is asked wrongly


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "/no/such/folder"], "--model /no/such/folder: there is no folder /no/such/folder"),
        (["--model", './it\'s "quoted"'], "there is no folder ./it's"),
        (["--model", "no-such-random"], "unknown random model 'no-such-random'; known are llama-2-7b-random"),
        (["--only", "["], "--only '[' is no regular expression: unterminated character set"),
        (["--only", "no such peer"], "no case of suite default matches 'no such peer'. A name is workload / system"),
        (["--suite", "other"], "unknown suite 'other'; known are default, equality"),
        (["--device", "gpu"], "--device gpu: give cpu, cuda or cuda:0"),
        (["--device", "cuda:99"], f"--device cuda:99: torch finds {torch.cuda.device_count()} GPUs here"),
        (["workloads", "stray"], "workloads takes no stray"),
        (["--load", "no_such_module"], "--load no_such_module: ModuleNotFoundError: No module named 'no_such_module'"),
        (["--load", ".x"], "--load .x: TypeError: the 'package' argument is required"),
        (["compare", "", ""], "compare takes two results, each a folder, a file or a commit: give A= and B="),
        (["report", "--out", "/no/such/folder"], "--out /no/such/folder: there is no such folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(driver, "run_all", lambda *_, **__: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    assert main(["--device", "cpu", *out, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text, said",
    [
        ("def", "SyntaxError: "),
        ("nowhere", "NameError: name 'nowhere' is not defined"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise ValueError('one\\ntwo')", "ValueError: one;"),
    ],
)
def test_a_module_that_fails_is_said(tmp_path, capsys, monkeypatch, text, said):
    (tmp_path / "broken_workloads.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["workloads", "--load", "broken_workloads"]) == 2
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith(f"bench: --load broken_workloads: {said}")


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_model_of_another_kind_is_refused_before_anything_runs(tmp_path, capsys, monkeypatch, kind):
    import gguf

    monkeypatch.setattr(driver, "run_all", lambda *_, **__: pytest.fail("it ran"))
    if kind == "gguf":
        model = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(model, "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    else:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "mamba"}')
    assert main(["--device", "cpu", "--out", str(tmp_path / "out"), "--model", str(model)]) == 2
    assert f"{model} is a model of type 'mamba'" in capsys.readouterr().err


def test_one_json_object_and_all_else_elsewhere(tmp_path, capsys):
    toy(tmp_path, "a", "killed")
    arguments = ["--load", "toy", "--suite", "toys", "--only", "toy", "--out", "out", "--json"]
    done = bench(tmp_path, *arguments)
    assert json.loads(done.stdout) == {
        "results": "out/toys-cpu.jsonl", "table": "out/toys_table.md", "cases": 2, "failed": 1,
    } and "the answer is 42" in done.stderr and done.returncode == 1  # fmt: skip
    for command in ("workloads", "report", "plan-check"):
        assert main([command, "--out", str(tmp_path / "out"), "--json"]) == 0
        json.loads(capsys.readouterr().out)


def test_letters_that_a_terminal_lacks(tmp_path):
    """A model's name in the tables, in a C locale: files are UTF-8, and the terminal gets codes."""
    line = LINE | {"model": "modèle", "status": "failed", "error": "naïve"}
    (tmp_path / "mine.jsonl").write_text(json.dumps({k: v for k, v in line.items() if k != "result"}) + "\n")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = bench(tmp_path, "report", "--out", ".", **plain)
    assert done.returncode == 0, done.stderr
    assert "naïve" in (tmp_path / "comparison_table.md").read_text(encoding="utf-8")


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/below"):
        assert main(["--device", "cpu", "--only", "machine", "--out", str(tmp_path / out)]) == 2
        assert "is no folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


LINE = {
    "suite": "default", "workload": "throughput", "system": "paged", "model": "m", "dtype": "float32", "device": "cpu",
    "params": {"lengths": [1], "new_tokens": 1}, "time": "2026-01-01T00:00:00+00:00", "status": "ok", "result": {},
    "machine": {"cpu": "A processor", "cores": 2, "threads": 2}, "versions": {}, "commit": "0123", "dirty": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"suite": "default", ', "mine.jsonl, line 2 is no JSON"),
        ("[1, 2]", "mine.jsonl, line 2 is not a result of this bench: a list, not an object"),
        ('{"time": "today", "rows": []}', "mine.jsonl, line 2 is not a result of this bench: without suite, workload"),
        (json.dumps(LINE | {"schema": 9}), "line 2 is not a result of this bench: its schema is 9, this bench reads 1"),
        ("[" * 5000, "mine.jsonl, line 2 is no JSON (nested too deeply)"),
        *[
            (
                json.dumps(LINE | {"machine": LINE["machine"] | changed}),
                f"mine.jsonl, line 2 is not a result of this bench: without {said} of the right type",
            )
            for changed, said in [
                ({"gpu": 5}, "machine.gpu, machine.gpu_memory"),
                ({"gpu": "a card", "gpu_memory": "80 GB"}, "machine.gpu_memory"),
                ({"cpu": None, "cores": [2]}, "machine.cpu, machine.cores"),
                ({"instructions": {}}, "machine.instructions"),
            ]
        ],
        (json.dumps(LINE), "the results of m on CPU: A processor, 2 cores are not what comparison.py shows (KeyError"),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, capsys, text, said):
    table = tmp_path / "comparison_table.md"
    table.write_text("as it was")
    failed = {name: value for name, value in LINE.items() if name != "result"} | {"status": "failed", "error": "e"}
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(failed)}\n{text}\n")
    assert main(["report", "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
    assert table.read_text() == "as it was"


H200 = [line for line in lines.read(report.RESULTS) if line["machine"].get("gpu") == "NVIDIA H200"]


@pytest.mark.parametrize("name", ["../../elsewhere", "a\0b", "m" * 300, "ü" * 300])
def test_a_name_in_the_results_leads_nowhere_else(tmp_path, name):
    """Files are named after models and suites."""
    out = tmp_path / "one" / "two"
    out.mkdir(parents=True)
    paged = next(line for line in H200 if (line["workload"], line["system"]) == ("throughput", "paged"))
    cost = next(
        line
        for line in H200
        if line["workload"] == "cost" and any(row.get("kept_tokens_mean") for row in line["result"]["rows"])
    )
    found = [paged | {"model": name, "device": name}, cost | {"model": name, "suite": name}]
    (out / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    report.write(out)
    assert len([*out.glob("*.png")]) == 2 and len([*out.glob("*_table.md")]) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != out] == []


@pytest.mark.parametrize("workload", sorted({line["workload"] for line in H200}))
def test_a_workload_alone_is_a_report(tmp_path, capsys, workload):
    """Without the limits of the machine too: predictions of time are left out, and what is left is said."""
    alone = [line for line in H200 if line["workload"] == workload]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in alone))
    assert main(["report", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert (tmp_path / "report.html").exists() or "that takes vl-convert-python" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["plan-check", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert (workload == "machine") != ("NVIDIA H200: no times, since its limits were not measured" in out)
    assert "| step |" not in out and "| TTFT |" not in out


def test_there_is_nothing_to_check(tmp_path, capsys):
    assert main(["plan-check", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"bench: there are no results in {tmp_path}\n"


# --- the ways in


def kv_strategies(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The console script of a package installed in `site`: no current folder on its path."""
    script = "import sys; from kv_strategies.cli import main; sys.exit(main())"
    paths = [str(site), *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(path) != ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_installed_command_finds_the_checkout(tmp_path):
    site = tmp_path / "site"
    shutil.copytree(ROOT / "kv_strategies", site / "kv_strategies", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (ROOT, ROOT / "tests"):
        found = kv_strategies(site, folder, "bench", "--device", "cpu", "--list", "--only", "machine")
        assert (found.returncode, found.stdout) == (0, "machine / limits\n"), found.stderr
    report_here = kv_strategies(site, ROOT, "report", "--out", str(tmp_path))
    assert (report_here.returncode, report_here.stdout) == (0, f"{tmp_path / 'comparison_table.md'}\n")
    outside = kv_strategies(site, tmp_path, "bench")
    assert outside.returncode == 1 and "run this again from inside it" in outside.stderr


@pytest.mark.parametrize("asked", [{"RESUME": "1"}, {"RESUME": "0", "KEEP_FAILURES": "no"}])
@pytest.mark.parametrize("only", ["x|y", "(paged$|window) # $(HOME) ${HOME}"])
def test_make_passes_everything_on(tmp_path, only, asked):
    """Whatever the variables hold; the interpreter shows what it was given."""
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\n[ "$2" != bench ] || printf "%s\\n" "$@"\n')
    shown.chmod(shown.stat().st_mode | stat.S_IXUSR)
    values = {"MODEL": """a 'b' "c" ;d""", "SUITE": "limit", "ONLY": only, "OUT": "some folder"}
    command = ["make", "-s", "bench", f"PYTHON={shown}", *(f"{k}={v}" for k, v in (values | asked).items())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    options = [f"--{name.lower()}={value}" for name, value in values.items()]
    options += ["--resume"] * (asked["RESUME"] == "1")
    assert made.stdout.splitlines() == ["-m", "bench", *options], made.stderr
