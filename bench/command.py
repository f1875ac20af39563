"""What `python -m bench` does (`__main__.py` says how it is called): the command line, and who answers it."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import bench.suites.all  # noqa: F401  registers the workloads
from bench import compare, driver, lines, machine, report
from bench.case import Case, model_name, place_of
from bench.measure import reason
from bench.report import browse, predictions
from bench.report.page import blame
from bench.workload import LOADED, WORKLOADS, questions, suite, suites


class Refused(Exception):
    """What was asked cannot be done; nothing was run."""


def run_command(argv: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compare KV-cache strategies and native caches.",
        epilog="Exit status: 0 all done, 1 a case failed or results cannot be read, 2 refused before anything ran, "
        "130 interrupted.",
    )
    commands = ["run", "report", "picture", "plan-check", "compare", "workloads"]
    parser.add_argument("command", nargs="?", choices=commands, default="run", help="all but run measure nothing")
    parser.add_argument("sides", nargs="*", metavar="A B", help="of compare: a folder, a file or a commit each")
    parser.add_argument("--suite", default="default", help=f"{', '.join(suites())} (default: %(default)s)")
    parser.add_argument("--model", help="a folder, a hub id or llama-2-7b-random (default: the embedded SmolLM2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="where results go (default: bench/results)")
    parser.add_argument("--only", metavar="PATTERN", help="run only cases whose name matches this regular expression")
    parser.add_argument("--resume", action="store_true", help="skip what this commit has measured here already")
    parser.add_argument("--keep-failures", action="store_true", help="failed cases are rows of the results as well")
    parser.add_argument("--load", action="append", default=[], metavar="MODULE", help="registers workloads of yours")
    parser.add_argument("--full", action="store_true", help="cost on a CPU: texts and settings of a GPU; hours")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and all else on standard error")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(argv)
    out = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr if options.json else out):
            status, said, text = answer(options)
        print(json.dumps(said) if options.json else text, file=out, end="\n" if options.json or text else "")
        return status
    except Refused as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def answer(options: argparse.Namespace) -> tuple[int, dict | list, str]:
    """The exit status, and what was found as JSON and in words."""
    load(options.load)
    if options.command != "compare" and options.sides:
        raise Refused(f"{options.command} takes no {' '.join(options.sides)}")
    if options.command == "workloads":
        return (
            0,
            [{"name": w.name, "suites": list(w.cases), "question": w.question} for w in WORKLOADS.values()],
            questions(),
        )
    if options.command == "compare":
        if len(options.sides) != 2 or not all(options.sides):  # `make bench-compare` hands on what it lacks as ""
            raise Refused("compare takes two results, each a folder, a file or a commit: give A= and B=")
        changed = compare.compare(*map(compare.read, options.sides))
        return 0, asdict(changed), compare.render(changed)
    if options.command == "run":
        return run(options)
    if not options.out.is_dir():
        raise Refused(f"--out {options.out}: there is no such folder")
    if options.command == "plan-check":
        ran = lines.read(options.out)
        if not ran:
            raise ValueError(f"there are no results in {options.out}")
        with blame("this folder"):
            found, left_out = predictions.compare(ran), predictions.unmeasured(ran)
        print(*left_out, sep="\n", end="\n\n" * bool(left_out))
        rows = [asdict(one) | {"error": one.error, "is_within": one.is_within} for one in found]
        return 0, rows, predictions.render(found)
    if options.command == "picture":
        taken = browse.take_pictures(options.out / "report.html", options.out)
        return 0, {"pictures": [str(path) for path in taken]}, "\n".join(map(str, taken))
    path = report.write(options.out)
    return 0, {"table": str(path), "page": str(options.out / "report.html")}, str(path)


def run(options: argparse.Namespace) -> tuple[int, dict | list, str]:
    cases = choose(options)
    if options.list:
        names = [case.name for case in cases]
        return 0, names, "\n".join(names)
    check_out(options.out)
    check_models(cases)
    results = options.out / f"{options.suite}-{machine.device_name(options.device)}.jsonl"
    check_places(cases, options.out)
    done = driver.done_already(cases, results) if options.resume else []
    if done:
        print(f"{len(done)} of {len(cases)} cases are in {results} already.")
        cases = [case for case in cases if case not in done]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        failed = driver.run_all(cases, results, options.suite, keep_failures=options.keep_failures)
    except (KeyboardInterrupt, SystemExit) as error:
        print(f"\nInterrupted. What is done stands in {results}; --resume goes on from there.", file=sys.stderr)
        return error.code if isinstance(error, SystemExit) else 130, {"results": str(results), "interrupted": True}, ""
    report.write(options.out)
    table = report.page_of(options.suite, options.out)
    said = [f"\n{table.read_text()}"] if table.exists() else []
    said += [f"{name:<8} {path}" for name, path in (("Results:", results), ("Table:", table)) if path.exists()]
    if failed and not options.keep_failures:
        what = f"The {failed} that failed are not among them" if results.exists() else "There is no result: all failed"
        said.append(f"{what}; --keep-failures makes them rows that say why.")
    found = {"results": str(results), "table": str(table), "cases": len(cases), "failed": failed}
    return bool(failed), found, "\n".join(said)


def load(modules: Sequence[str]) -> None:
    """Imports them from the current folder too, as the processes of the cases do."""
    if modules:
        sys.path.append(os.getcwd())
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a module of the user's may fail in any way
            raise Refused(f"--load {name}: {reason(error)}; give a module's name, importable from here") from error
        LOADED.append(name)


def choose(options: argparse.Namespace) -> list[Case]:
    check_device(options.device)
    if options.suite not in suites():
        raise Refused(f"unknown suite {options.suite!r}; known are {', '.join(suites())}")
    cases = suite(options.suite, options.device, options.model or None, full=options.full)
    if not options.only:
        return cases
    try:
        pattern = re.compile(options.only)
    except re.error as error:
        raise Refused(f"--only {options.only!r} is no regular expression: {error}") from None
    chosen = [case for case in cases if pattern.search(case.name) or options.only in case.name]  # or as --list has it
    if not chosen:
        workloads = dict.fromkeys(case.workload for case in cases)
        systems = dict.fromkeys(case.system for case in cases)
        raise Refused(
            f"no case of suite {options.suite} matches {options.only!r}. A name is workload / system / model / dtype; "
            f"workloads: {', '.join(workloads)}; systems: {'; '.join(systems)}"
        )
    return chosen


def check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Refused(f"--device {name}: give cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refused(f"--device {name}: torch finds {torch.cuda.device_count()} GPUs here")


def check_out(folder: Path) -> None:
    """Can results go there, and are those that are there in order? Else hours of work would end without a table."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines.read(folder)
    except (FileExistsError, NotADirectoryError):
        raise Refused(f"--out {folder} is no folder, and none can be made there") from None
    except (OSError, ValueError) as error:
        raise Refused(str(error)) from None
    if not os.access(folder, os.W_OK):
        raise Refused(f"--out {folder}: nothing may be written there")


def check_places(cases: Sequence[Case], folder: Path) -> None:
    """One name in a table is one model."""
    found = {(line["model"], line.get("place")) for line in lines.read(folder)} if folder.is_dir() else set()
    for spec in dict.fromkeys(case.model for case in cases if case.workload != "machine"):
        name, place = model_name(spec), place_of(spec)
        if place and any(other == name and at not in (None, place) for other, at in found):
            raise Refused(
                f"--model {spec}: {folder} has results of another model named {name}, which lay in another folder; put "
                "these elsewhere (--out), or give the folder another name"
            )


def check_models(cases: Sequence[Case]) -> None:
    """Is there a model of every name, and of a kind that runs? Once, and not in every case anew."""
    from kv_strategies.models.load import model_shape

    for spec in dict.fromkeys(case.model for case in cases if case.workload != "machine"):
        try:
            model_shape(spec, torch.float32)
        except (OSError, ValueError) as error:
            raise Refused(f"--model {spec}: {error}" if spec else str(error)) from None
