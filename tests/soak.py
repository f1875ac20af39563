"""`make soak`: worlds of the checker with fresh seeds, for as long as wanted; failures are made small and printed.

python tests/soak.py --minutes 60                              every composition in turn
python tests/soak.py --only prefix+offload:disk --seed 17      one world again, as a failure said
python tests/soak.py --device cuda --minutes 10                with CUDA graphs, steps launched ahead, lanes of copies

On a machine without a venv:

PYTHONPATH=transformers-dev/src:. python3 tests/soak.py --device cuda --minutes 10
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from checker import ALL, MODEL, Failure, run_world, shrink


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help=f"compositions, by commas, of {', '.join(ALL)}")
    parser.add_argument("--seed", type=int, help="run this world alone")
    parser.add_argument("--ops", default="", help="of this world only these operations, by commas")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many")
    options = parser.parse_args()
    cases = options.only.split(",") if options.only else ALL
    if unknown := set(cases) - set(ALL):
        parser.error(f"unknown composition {', '.join(sorted(unknown))}; known are {', '.join(ALL)}")
    torch.set_num_threads(1)
    MODEL.to(options.device)
    gc.freeze()
    if options.seed is not None:
        only = [int(op) for op in options.ops.split(",")] if options.ops else None
        found = [run_world(case, options.seed, only) for case in cases]
        for one in found:
            print(one if isinstance(one, Failure) else dict(one))
        return any(isinstance(one, Failure) for one in found)

    first = random.SystemRandom().randrange(10**6) * 1000
    where = torch.cuda.get_device_name() if MODEL.device.type == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}: {options.minutes:g} minutes")
    print(f"{len(cases)} compositions, seeds from {first}")
    end, total, failures, seed = time.time() + 60 * options.minutes, Counter(), [], first
    told = time.time()
    while time.time() < end and len(failures) < options.failures:
        for case in cases:
            found = run_world(case, seed)
            if isinstance(found, Failure):
                failures.append(found)
                print(f"\n{case}, seed {seed}: {shrink(found)}\n", flush=True)
            else:
                total += found
                total["worlds"] += 1
            if time.time() - told > 60:
                told = time.time()
                print(f"{(end - told) / 60:.0f} minutes left: {report(total)}", flush=True)
            if time.time() > end:
                break
        seed += 1
    print(f"{report(total)}; {len(failures)} failures")
    for failure in failures:
        print(f"  ONLY={failure.case} SEED={failure.seed}: {failure.what.splitlines()[0][:150]}")
    return bool(failures)


def report(total: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in total.most_common())


if __name__ == "__main__":
    sys.exit(main())
