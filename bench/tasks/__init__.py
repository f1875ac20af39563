"""Tasks on long texts: a context, questions about it, and answers that are right or wrong.

    story.py       what a task writes, and how it becomes tokens of a wanted length
    needles.py     a fact among many sentences: single, multikey, multivalue, multiquery
    tracking.py    variables that are given each other's values
    counting.py    which words of a list come most often
    retrieval.py   two questions behind one context: in one conversation, or each by itself
    power.py       how hard a task may be for a model

The first three are in the manner of RULER (Hsieh et al. 2024, arXiv 2404.06654), the fourth of SCBench (Li et al. 2024,
arXiv 2412.10319). All are written from a seed over the King James text, without a network. A task is one function from
a random generator and a level to a `Story`, and one entry here; its levels begin with what the papers ask of large
models and end with what a small one can do.
"""

from __future__ import annotations

from bench.tasks import counting, needles, retrieval, tracking
from bench.tasks.story import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (*needles.TASKS, *tracking.TASKS, *counting.TASKS, *retrieval.TASKS)
}
