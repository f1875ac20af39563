"""How near a strategy comes to the limits of the machine: the Llama shapes on a GPU, the embedded model on a CPU.

All that is compared within a workload ran in one process on the same weights. What fails within a workload is a point
that says why, not the end of the others. What must be reached, and what others reach, stands in `table.py`: one table
of all of them here.
"""

SHAPE = "llama-2-7b-random"  # what runs on a GPU, where no model is asked for
