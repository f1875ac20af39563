"""`python -m bench`: run a suite case by case, each in a fresh process, and write the report.

    python -m bench                                   the default suite on the machine at hand
    python -m bench --suite limit --only 'machine|decode'
    python -m bench --model llama-2-7b-random --out results
    python -m bench --resume                          go on with a run that was interrupted
    python -m bench report                            tables and plots once more, from the results there are
    python -m bench picture                           of report.html in a browser without a screen
    python -m bench plan-check                        what `kv-strategies plan` says of the results, and its errors
    python -m bench compare A B                       what changed beyond noise: folders, files or commits
    python -m bench workloads                         what is asked, suite by suite
    python -m bench --load my_module --suite mine     a workload of yours: see workload.py

Every case appends one JSON line to <out>/<suite>-<device>.jsonl when it is done. One that fails, runs out of time or is
killed goes to <out>/failed/ instead, and the exit status is 1; `--keep-failures` makes it a row of the tables.
A suite may be run in parts (`--only`): parts with the same --out come together in one table, and so do all `.jsonl`
files of a folder, whatever their names and wherever they were made. Of a case that ran twice the later line counts.
`--resume` skips the cases that the same commit, with the same uncommitted changes, has measured on this machine.
"""

from __future__ import annotations

import sys

from kv_strategies.shell import ended


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        from . import command  # takes seconds

        return command.run_command(argv)

    return ended("bench", work)


if __name__ == "__main__":
    sys.exit(main())
