"""What could this machine do at best? Every suite begins with it, and holds its times against what it finds."""

from __future__ import annotations

from bench.case import Bench
from bench.probes.limits import limits
from bench.workload import Workload, register


def run_machine(bench: Bench) -> dict:
    bench.say("measuring memory bandwidth")
    return {"limits": limits(bench.case.device, bench.params.get("size"))}


register(
    Workload(
        "machine",
        run_machine,
        "what could this machine do at best? (read and copy bandwidth, the link to the host)",
        cases={},
        words=lambda result: ", ".join(f"{name} {value / 1e9:.1f} GB/s" for name, value in result["limits"].items()),
    )
)
