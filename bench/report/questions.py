"""The page of questions: what people ask, answered from the result lines; `questions.md`.

A question is answered by one machine: the one that answers most of all questions, a GPU before a CPU, else the next.
Where none does, the page says why, and which command does.
"""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import bench.suites.all  # noqa: F401  registers the workloads
from bench.lines import Found, hosts_of, machine_of
from bench.markdown import table, unique
from bench.report.answers import QUESTIONS, Answer, Measured, Question
from bench.report.page import blame, page_of
from bench.workload import WORKLOADS, Target


@dataclass(frozen=True)
class Answered:
    """A question with what is known of it; sentences may hold `code`."""

    asked: str
    answer: Answer | None
    source: str  # machine, model, conditions, commit; empty where there is no answer
    missing: str  # what would tell more, or why there is no answer


def answered(lines: Sequence[dict]) -> list[Answered]:
    """All questions, in their order.

    Raises:
        ValueError: results that are not what an answer is made of.
    """
    names = unique(map(machine_of, lines))
    machines = [Measured(Found([line for line in lines if machine_of(line) == name])) for name in names]
    answers = {(machine.name, question.asked): _of(machine, question) for machine in machines for question in QUESTIONS}

    def rank(machine: Measured) -> tuple:
        return machine.found.on_gpu, sum(answers[machine.name, question.asked] is not None for question in QUESTIONS)

    machines.sort(key=rank, reverse=True)
    found = []
    for question in QUESTIONS:
        chosen = next((machine for machine in machines if answers[machine.name, question.asked]), None)
        if chosen is None:
            found.append(Answered(question.asked, None, "", _why_not(question, machines)))
            continue
        answer = answers[chosen.name, question.asked]
        found.append(Answered(question.asked, answer, _source(chosen, answer), _more(question, chosen, machines)))
    return found


def _of(machine: Measured, question: Question) -> Answer | None:
    with blame(machine.name):
        return question.answer(machine)


def _source(machine: Measured, answer: Answer) -> str:
    models = unique(f"{line['model']}, {line['dtype']}" for line in answer.lines)
    commits = unique(line["commit"][:12] for line in answer.lines)
    host = f"host {hosts_of(answer.lines)}" if machine.found.on_gpu else ""
    parts = [machine.name, " and ".join(models), answer.conditions, host, f"commit {', '.join(commits)}"]
    return "; ".join(filter(None, parts))


# --- what is missing


def _why_not(question: Question, machines: Sequence[Measured]) -> str:
    workload = question.workloads[0]
    failed = [
        f"On {machine.name} it did not run: {line['error']}."
        for machine in machines
        for line in machine.found.lines
        if line["workload"] == workload and line["status"] != "ok"
    ]
    why = " ".join(unique(failed)) or "No machine whose results are here has measured it."
    return f"{why} {_command(workload)} measures it."


def _more(question: Question, chosen: Measured, machines: Sequence[Measured]) -> str:
    """What the machine that answers has not measured, and that a GPU with results has not measured what a CPU has."""
    absent = [w for w in question.workloads if not chosen.all(w) and _devices(w)[chosen.found.on_gpu]]
    texts = ["More would be said there by " + ", by ".join(map(_command, absent)) + "."] * bool(absent)
    best, first = machines[0], question.workloads[0]
    if best.found.on_gpu and not chosen.found.on_gpu and _devices(first)[True]:
        texts.append(f"Not measured on {best.name}: there, {_command(first)} measures it.")
    return " ".join(texts)


def _command(workload: str) -> str:
    suite = next(iter(WORKLOADS[workload].cases))
    only_gpu = "" if _devices(workload)[False] else " on a GPU"
    return f"`make bench SUITE={suite} ONLY={shlex.quote(f'^{workload} /')}`{only_gpu}"


def _devices(workload: str) -> dict[bool, bool]:
    """On a GPU, and not: whether the workload has cases there."""
    return {
        device == "cuda": any(list(cases(Target(workload, device))) for cases in WORKLOADS[workload].cases.values())
        for device in ("cuda", "cpu")
    }


# --- the two forms of the page


def render(lines: Sequence[dict]) -> str:
    """As Markdown, to stand in the folder of the tables."""
    parts = [
        "# Questions, answered from the results",
        "Written by `make report`; nothing is typed. Each answer is of one machine, named below it with the model and "
        "the conditions; a link leads to the whole table. A name that ends in `-random` is a model's shape with random "
        "weights, which is asked with random token ids and serves for speed and memory.",
    ]
    for number, one in enumerate(answered(lines), 1):
        parts += [f"## {number}. {one.asked}", *_paragraphs(one)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _paragraphs(one: Answered) -> Iterator[str]:
    if one.answer:
        yield one.answer.text
        pairs = unique((line["workload"], page_of(line["suite"])) for line in one.answer.lines)
        yield f"{one.source}. Tables: " + ", ".join(f"[{workload}]({page})" for workload, page in pairs) + "."
        yield table(one.answer.head, one.answer.rows) if one.answer.rows else ""
    yield one.missing


def as_html(lines: Sequence[dict]) -> str:
    """As a list of definitions, without the tables: these stand further down the page."""
    return "\n".join(
        f"<dt>{html.escape(one.asked)}</dt>\n<dd>{_code(one.answer.text if one.answer else one.missing)}"
        + (f"<br><small>{_code(f'{one.source}. {one.missing}'.strip())}</small>" if one.answer else "")
        + "</dd>"
        for one in answered(lines)
    )


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
