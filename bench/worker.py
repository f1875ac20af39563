"""One case in this process: `python -m bench.worker RUN MODULES CASE.json RESULT.json SCRATCH`. The driver starts it.

RUN, as `module:function`, is what measures; MODULES, joined by commas, are what `--load` named. What is said on
standard output is shown beside the progress bar. The result is a file, so that nothing a library prints can spoil it.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from bench import machine
from bench.case import Bench, Case
from bench.lines import write_whole
from bench.measure import reason


def run(measures: Callable[[Bench], dict], case: Case, scratch: Path, say) -> dict:
    """The status, what was measured or why it failed, and the conditions: machine, versions, commit."""
    conditions = machine.conditions(case.device)
    try:
        result = measures(Bench(case, scratch, say))
        json.dumps(result, allow_nan=False)  # a figure that is no number is a fault
        return {"status": "ok", "result": result, **conditions}
    except Exception as error:  # a failing case is a row of the table, not the end of the bench
        traceback.print_exc()
        return {"status": "failed", "error": reason(error)[:300], **conditions}


def main(measures: str, modules: str, case_path: str, result_path: str, scratch: str) -> None:
    for module in filter(None, modules.split(",")):
        importlib.import_module(module)
    case = Case(**json.loads(Path(case_path).read_text()))
    outcome = run(pkgutil.resolve_name(measures), case, Path(scratch), say=lambda text: print(text, flush=True))
    write_whole(Path(result_path), lambda path: path.write_text(json.dumps(outcome)))


if __name__ == "__main__":
    main(*sys.argv[1:])
