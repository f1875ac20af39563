"""One case in this process: `python -m bench.case CASE.json RESULT.json SCRATCH`. The bench starts it; users need not.

What it says on standard output is shown beside the progress bar. The result is a file, so that nothing a library
prints can spoil it.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

from bench import machine
from bench.cases import WORKLOADS, Bench, Case


def run(case: Case, scratch: Path, say) -> dict:
    """The status, what was measured or why it failed, and the conditions: machine, versions, commit."""
    conditions = machine.conditions(case.device)
    try:
        return {"status": "ok", "result": WORKLOADS[case.workload](Bench(case, scratch, say)), **conditions}
    except Exception as error:  # a failing case is a row of the table, not the end of the bench
        traceback.print_exc()
        text = str(error).strip().splitlines()
        return {"status": "failed", "error": f"{type(error).__name__}: {text[0] if text else ''}"[:300], **conditions}


def main(case_path: str, result_path: str, scratch: str) -> None:
    case = Case(**json.loads(Path(case_path).read_text()))
    outcome = run(case, Path(scratch), say=lambda text: print(text, flush=True))
    Path(result_path).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
