"""Runs cases, each in a fresh process, and appends one JSON line each to a file, whatever becomes of it.

    <out>/<suite>-<device>.jsonl          what was measured, and what this machine cannot run: the tables are made of it
    <out>/failed/<suite>-<device>.jsonl   what failed, ran out of time or was killed, and why; git ignores it

A line is written when its case is done, whole or not at all. So an interrupted run is continued by what it has left to
do: `done_already` finds the cases that the same code measured on the same machine with the same numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from bench import CORES, lines, machine
from bench.case import Case, model_name, place_of
from bench.systems import missing
from bench.workload import LOADED, WORKLOADS, in_words

BAR = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}] {bar:5} {desc}{postfix}"  # a narrow terminal cuts off the end


def run_all(cases: Sequence[Case], results: Path, suite_name: str, *, keep_failures: bool = False) -> int:
    """Runs the cases in order, a line each. Returns how many failed; `keep_failures` puts these among the results too.

    Raises:
        OSError: a line could not be written. The file is as it was, and the error says the line.
    """
    failures = results if keep_failures else results.parent / "failed" / results.name
    systems = list(dict.fromkeys(case.system for case in cases if case.workload != "machine"))
    models = list(dict.fromkeys(f"{model_name(c.model)} ({c.dtype})" for c in cases if c.workload != "machine"))
    number = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
    print(f"{number} on {results.stem.split('-', 1)[1]}, each in a fresh process.")
    if systems:  # not the limits of the machine alone
        print(f"Compared: {'; '.join(systems)}")
        print(f"Models:   {', '.join(models)}")
    sys.stdout.flush()
    failed = 0
    bar = tqdm(total=len(cases), bar_format=BAR)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, bar:
        for case in cases:
            bar.set_postfix_str("", refresh=False)  # of the case before
            bar.set_description_str(case.name)
            line = run_one(case, Path(scratch), suite_name, say=lambda text: bar.set_postfix_str(text[:60]))
            has_failed = line["status"] not in ("ok", "skipped")
            _append(failures if has_failed else results, line)
            failed += has_failed
            bar.write(f"{case.name}: {in_words(line)}", file=sys.stdout)
            bar.update()
    if failed:
        print(f"{failed} of {len(cases)} cases failed. Their lines: {failures}", flush=True)
    return failed


def _append(path: Path, line: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines.append(path, line)
    except OSError as error:
        raise OSError(
            f"cannot write to {path}: {error.strerror}. It holds all cases before this one; make room and go on with "
            f"--resume. The line that is not there:\n{json.dumps(line)}"
        ) from error


def done_already(cases: Sequence[Case], results: Path) -> list[Case]:
    """Those that `results` has a line for: of this commit, this machine, these versions and these numbers."""
    here = _conditions(machine.conditions(cases[0].device))
    found = lines.read_file(results) if results.exists() else []
    done = {_key(line) for line in found if line["status"] in ("ok", "skipped") and _conditions(line) == here}
    return [case for case in cases if _key(_head(case)) in done]


def _key(line: dict) -> str:
    """What a case asks, and of what."""
    names = ("workload", "system", "model", "dtype", "params", "place")
    return json.dumps([line.get(name) for name in names], sort_keys=True)


def _conditions(line: dict) -> list:
    about = {name: value for name, value in line["machine"].items() if name != "threads"}
    return [line["commit"], line["dirty"], line.get("changes"), line["versions"], about]


def _head(case: Case) -> dict:
    return {
        "workload": case.workload,
        "system": case.system,
        "model": model_name(case.model),
        "dtype": case.dtype,
        "device": machine.device_name(case.device),
        "params": case.params,
    } | ({"place": place} if (place := place_of(case.model)) else {})


def run_one(case: Case, scratch: Path, suite_name: str, say=lambda text: None) -> dict:
    """One case in a fresh process; whatever happens to it becomes the JSON line returned."""
    head = {"schema": lines.SCHEMA, "suite": suite_name, **_head(case)}
    head["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    if reason := missing(case.system, case.device) or WORKLOADS[case.workload].lacking(case):
        return head | {"status": "skipped", "error": reason} | machine.conditions(case.device)
    start = time.perf_counter()
    outcome = _in_process(case, scratch, say)
    return head | {"seconds": round(time.perf_counter() - start, 1)} | outcome


def _in_process(case: Case, scratch: Path, say) -> dict:
    case_path, result_path, log_path = (scratch / name for name in ("case.json", "result.json", "log.txt"))
    case_path.write_text(case.to_json())
    result_path.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(machine.ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # A peer that compiles on first use looks for ninja, which is installed beside this interpreter.
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    if case.device == "cpu":  # threads that stay on their cores: steadier times
        environment = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} | environment
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "bench.worker", WORKLOADS[case.workload].address, ",".join(LOADED),
                str(case_path), str(result_path), str(scratch),
            ],
            stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, CORES),
        )  # fmt: skip
        listener = threading.Thread(target=lambda: [say(text.strip()) for text in process.stdout], daemon=True)
        listener.start()
        try:
            process.wait(case.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return {"status": "timeout", "error": f"stopped after {case.timeout} s"} | machine.conditions(case.device)
        except BaseException:  # interrupted or ended: no case outlives the bench
            process.kill()
            raise
        listener.join(5)
    if result_path.exists():
        return json.loads(result_path.read_text())
    if process.returncode < 0:
        hint = " (out of memory?)" if process.returncode == -9 else ""
        reason = f"ended by signal {-process.returncode}{hint}"
    else:
        last = log_path.read_text().strip().splitlines()[-1:] or ["no message"]
        reason = f"ended with status {process.returncode}: {last[0]}"
    return {"status": "failed", "error": reason[:300]} | machine.conditions(case.device)
