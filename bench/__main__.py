"""`python -m bench`: run a suite case by case, each in a fresh process, and write the report.

    python -m bench                                   the default suite on the machine at hand
    python -m bench --suite limit --only 'machine|decode'
    python -m bench --model llama-2-7b-random --out results
    python -m bench report                            tables and plots once more, from the results there are

Every case appends one JSON line to <out>/<suite>-<device>.jsonl, also when it fails, runs out of time or is killed.
A suite may be run in parts (`--only`): parts with the same --out come together in one table, and so do all `.jsonl`
files of a folder, whatever their names and wherever they were made. Of a case that ran twice the later line counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from bench import CORES, machine, report
from bench.cases import SUITES, Case, model_name, suite
from bench.systems import missing

RESULTS = Path(__file__).resolve().parent / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Compare KV-cache strategies and native caches."
    )
    parser.add_argument("command", nargs="?", choices=["run", "report"], default="run", help="report: only write it")
    parser.add_argument("--suite", default="default", choices=list(SUITES))
    parser.add_argument("--model", help="a folder, a hub id or llama-2-7b-random (default: the embedded SmolLM2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go (default: bench/results)")
    parser.add_argument("--only", metavar="PATTERN", help="run only cases whose name matches this regular expression")
    parser.add_argument("--full", action="store_true", help="cost on a CPU: texts and settings of a GPU; hours")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(argv)

    if options.command == "report":
        print(report.write(options.out))
        return 0
    cases = suite(options.suite, options.device, options.model or None, full=options.full)
    if options.only:
        cases = [case for case in cases if re.search(options.only, case.name)]
    if options.list or not cases:
        print("\n".join(case.name for case in cases) or f"no case matches {options.only!r}")
        return 0 if cases else 2
    results = options.out / f"{options.suite}-{machine.device_name(options.device)}.jsonl"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = run_all(cases, results, options.suite)
    report.write(options.out)
    table = report.page_of(options.suite, options.out)
    print(f"\n{table.read_text()}")
    print(f"Results: {results}\nTable:   {table}")
    if failed:
        print(f"{failed} of {len(cases)} cases failed; their rows say why.")
    return 0


def run_all(cases: list[Case], results: Path, suite_name: str) -> int:
    """Runs the cases in order and appends one JSON line each to `results`. Returns how many failed."""
    results.parent.mkdir(parents=True, exist_ok=True)
    systems = list(dict.fromkeys(case.system for case in cases if case.workload != "machine"))
    models = list(dict.fromkeys(f"{model_name(c.model)} ({c.dtype})" for c in cases if c.workload != "machine"))
    print(f"{len(cases)} cases on {results.stem.split('-', 1)[1]}, each in a fresh process.")
    print(f"Compared: {'; '.join(systems)}")
    print(f"Models:   {', '.join(models)}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, tqdm(total=len(cases), unit="case") as bar:
        for case in cases:
            bar.set_description_str(case.name)
            line = run_one(case, Path(scratch), suite_name, say=lambda text: bar.set_postfix_str(text[:60]))
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            failed += line["status"] not in ("ok", "skipped")
            bar.write(f"{case.name}: {report.in_words(line)}", file=sys.stdout)
            bar.update()
    return failed


def run_one(case: Case, scratch: Path, suite_name: str, say=lambda text: None) -> dict:
    """One case in a fresh process; whatever happens to it becomes the JSON line returned."""
    head = {
        "suite": suite_name,
        "workload": case.workload,
        "system": case.system,
        "model": model_name(case.model),
        "dtype": case.dtype,
        "device": machine.device_name(case.device),
        "params": case.params,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if reason := missing(case.system, case.device):
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
    if case.device == "cpu":  # threads that stay on their cores: steadier times
        environment = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} | environment
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.case", str(case_path), str(result_path), str(scratch)],
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


if __name__ == "__main__":
    sys.exit(main())
