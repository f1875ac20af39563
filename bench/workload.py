"""A workload is one function and one registration: what it asks, its cases, what it must reach, how it is shown.

    def run(bench):                                                # a fresh process, a `Bench`: a small dict for JSON
        system = bench.open(Capacity([[65]]))
        return {"ttft": system(bench.prompts([64], seed=1), 1).times[0][0]}

    register(Workload(
        "first", run, "how soon is the first token of 64 there?",
        cases={"mine": lambda to: to.each(["baseline", "paged"], "float32")},          # suite -> its cases
        words=lambda result: f"{result['ttft']:.3f} s",
        tables=lambda found, model: by_system(
            found.of("first", model), {"TTFT, s": lambda result: f"{result['ttft']:.3f}"}
        ),
        claims=[Claim("time to the first token", "at most 1 s", 1.0, lambda result: result["ttft"], at_most=True)],
    ))

Ours are in `suites/`, a file each; `python -m bench workloads` prints the table of all. One from outside is such a
file, importable by name: `python -m bench --load my_module --suite mine` runs it, `python -m bench report --load
my_module` shows it. Its cases run in processes of their own, which import the module of its function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.case import Bench, Case
from bench.lines import Found
from bench.markdown import table
from bench.systems import expand


@dataclass(frozen=True)
class Claim:
    """One figure that a workload must reach."""

    what: str  # may name numbers of the result: "{context} tokens"
    target: str
    bound: float
    value: Callable[[dict], float | None]  # of the parameters and the result
    shown: str = "{:.1f}x"
    at_most: bool = False
    only: Callable[[dict], bool] | None = None  # the claim is about those of the result's points, not about the whole

    def of(self, line: dict) -> list[dict]:
        """What it is evaluated on: the parameters with the points it is about, or with the whole result."""
        if self.only is None:
            return [line["params"] | line["result"]]
        return [line["params"] | point for point in line["result"]["points"] if self.only(point)]

    def verdict(self, value: float) -> str:
        if value <= self.bound if self.at_most else value >= self.bound:
            return "reached"
        return f"missed by {abs(value / self.bound - 1):.1%}" if self.bound else "missed"


@dataclass(frozen=True)
class Target:
    """Where a suite is to run, and the workload that is asked for its cases there."""

    workload: str
    device: str
    model: str | None = None  # what the user asked for in place of the models of the suite
    full: bool = False  # on a CPU, texts and settings of a GPU

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def case(
        self, system: str, dtype: str, params: dict | None = None, timeout: int = 240, model: str | None = None
    ) -> Case:
        """On `model`, or what the user asked for; `timeout` in seconds."""
        return Case(self.workload, system, model or self.model, dtype, self.device, params or {}, timeout)

    def each(self, systems: Iterable[str], dtype: str, params: dict | None = None, **others) -> list[Case]:
        """A case for every system; `systems.EVERY` stands for every strategy. `others` as in `case`."""
        return [self.case(system, dtype, params, **others) for system in expand(systems)]


@dataclass(frozen=True)
class Workload:
    name: str
    run: Callable[[Bench], dict]  # of a module: a case's own process imports it
    question: str
    cases: Mapping[str, Callable[[Target], Iterable[Case]]]  # suite -> its cases there
    tables: Callable[[Found, str], str] | None = None  # of a machine's lines and a model; once where several share it
    words: Callable[[dict], str] | None = None  # of a result, for the terminal; what it claims, where there is none
    claims: Sequence[Claim] = ()
    lacking: Callable[[Case], str | None] = lambda case: None  # why this machine cannot run a case

    @property
    def address(self) -> str:
        """Of `run`, as `pkgutil.resolve_name` takes it."""
        return f"{self.run.__module__}:{getattr(self.run, '__qualname__', '<no name>')}"


WORKLOADS: dict[str, Workload] = {}
#: Modules that `--load` names: the process of a case imports them as well, for the strategies they may register.
LOADED: list[str] = []


def register(workload: Workload) -> Workload:
    """Makes a workload known by its name.

    Raises:
        ValueError: another has that name, or a case's own process could not import its `run`.
    """
    known, address = WORKLOADS.get(workload.name), workload.address
    if known and known.address != address:
        raise ValueError(f"there is a workload {workload.name!r} already, in {known.run.__module__}")
    if "<" in address:  # a lambda, a function within a function, a partial
        raise ValueError(f"run of {workload.name!r} must be a function of a module: a process imports it")
    WORKLOADS[workload.name] = workload
    return workload


def suites() -> list[str]:
    return list(dict.fromkeys(name for workload in WORKLOADS.values() for name in workload.cases))


def suite(name: str, device: str, model: str | None = None, *, full: bool = False) -> list[Case]:
    """The cases of a suite, workload by workload, behind the limits of the machine. `model` replaces the default models
    of the suite; `full` measures costs on a CPU with the texts and settings of a GPU.

    Raises:
        ValueError: no workload has cases for a suite of this name.
    """
    if name not in suites():
        raise ValueError(f"unknown suite {name!r}; known are {', '.join(suites())}")
    cases = [Case("machine", "limits", model, "float32", device)]
    for workload in WORKLOADS.values():
        if name in workload.cases:
            target = Target(workload.name, device, model, full)
            cases += [replace(case, workload=workload.name) for case in workload.cases[name](target)]
    return cases


def in_words(line: dict) -> str:
    """One line for the terminal when a case is done."""
    if line["status"] != "ok":
        return f"{line['status']}: {line['error']}"
    workload = WORKLOADS[line["workload"]]
    if workload.words:
        return workload.words(line["result"])
    found = [(claim, claim.value(point)) for claim in workload.claims for point in claim.of(line)]
    return ", ".join(f"{claim.shown.format(v)} ({claim.target})" for claim, v in found if v is not None) or "done"


def questions() -> str:
    """The table of all workloads."""
    rows = [[w.name, ", ".join(w.cases) or "every", w.question] for w in WORKLOADS.values()]
    return table(["workload", "suites", "question"], rows)
