"""What is measured: a suite is a folder or a file, a workload a file in it; see `../workload.py` for what that holds.

`python -m bench workloads` prints the questions; README.md says what each suite is for. Accuracy and speed are separate
cases. Importing one of them makes all known, in the order of `all.py`: that order is the order of cases and tables,
whoever imports what first.
"""

import bench.suites.all  # noqa: F401
