"""`make load`: requests of mixed sizes, round after round, through a pool of a twentieth of what a round takes.

All finish, each with the tokens that it gives alone; on a GPU with CUDA graphs and steps launched ahead, and everywhere
with idle blocks going to host memory and from there to a disk, and coming back whenever they can. A short table says
how long the last one waited and what memory did, and OUT/load.json the same of each round.

    python tests/load.py --minutes 10 --device cuda --out build/load

On a machine without a venv:

    PYTHONPATH=transformers-dev/src:. python3 tests/load.py --minutes 10 --device cuda --out build/load
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import VOCAB, tiny_llama

from kv_strategies import Request, Runner, build
from kv_strategies.tiers.rates import Rates

BLOCK_SIZE, LONGEST = 4, 40  # tokens of a block, and new ones of a request at most


class Load:
    """Rounds of `count` requests for one strategy, whose pool holds a twentieth of a round."""

    def __init__(self, name: str, count: int, *, device: str = "cpu", seed: int = 0, **options):
        self.model = tiny_llama(num_heads=2, num_kv_heads=1).to(device)
        self.rng, self.count = random.Random(seed), count
        self.alone: list[tuple[list[int], list[int]]] = []  # prompts, and what they give
        while len(self.alone) < 60:
            prompt = [self.rng.randrange(VOCAB) for _ in range(self.rng.choice([1, 2, 5, 12, 40]))]
            if (tokens := alone(self.model, prompt)) is not None:
                self.alone.append((prompt, tokens))
        self._next = self._draw()
        self.num_blocks_together = sum(
            -(-(len(request.token_ids) + request.max_new_tokens - 1) // BLOCK_SIZE) for request, _ in self._next
        )
        num_blocks = self.num_blocks_together // 20
        self.strategy = build(name, self.model, num_blocks=num_blocks, block_size=BLOCK_SIZE, **options)
        self.runner = Runner(self.model, self.strategy, max_num_seqs=1024, max_batch_tokens=2048)

    def _draw(self) -> list[tuple[Request, list[int]]]:
        """Requests, and the tokens that they must give."""
        drawn = []
        for index in range(self.count):
            (prompt, tokens), num_new = self.rng.choice(self.alone), self.rng.choice([1, 2, 4, 6, 6, LONGEST])
            drawn.append((Request(prompt, max_new_tokens=num_new, request_id=index), tokens[:num_new]))
        return drawn

    def round(self) -> dict[str, float]:
        """All requests at once, to their end.

        Raises:
            AssertionError: a request is lost, has other tokens than alone, or was overtaken.
        """
        asked, runner = self._next, self.runner
        self._next = self._draw()
        preempted, begun, steps = runner.num_preemptions, time.perf_counter(), 0
        runner.submit([request for request, _ in asked])
        first, found, before, most = {}, {}, 0, 0
        while runner.num_running or runner.num_waiting:
            steps += 1
            if steps == 20:  # warm
                gc.collect()
                before = resident_bytes()
            for event in runner.step():
                first.setdefault(event.request_id, (steps, time.perf_counter() - begun))
                if event.result is not None:
                    assert event.request_id not in found, f"two results of request {event.request_id}"
                    found[event.request_id] = event.result.token_ids
            most = max(most, resident_bytes())
        wrong = [i for i, (_, tokens) in enumerate(asked) if found.get(i) != tokens]
        assert not wrong, f"requests {wrong[:10]} of {self.count} are not as alone"
        assert list(first) == sorted(first), "first come, first served"
        self.strategy.check_integrity()
        assert runner.num_preemptions > preempted
        stats = self.strategy.stats()
        assert stats["blocks_used"] == 0
        waits = [wait for _, wait in first.values()]
        return {
            "requests": self.count,
            "seconds": time.perf_counter() - begun,
            "steps": steps,
            "preemptions": runner.num_preemptions - preempted,
            "longest wait, steps": max(step for step, _ in first.values()),
            "longest wait, s": max(waits),
            "median wait, s": sorted(waits)[len(waits) // 2],
            "bytes grown": most - before,
            "process, MB": resident_bytes() / 1e6,
            "device, MB": torch.cuda.memory_reserved() / 1e6 if self.model.device.type == "cuda" else 0.0,
            "blocks brought back so far": stats.get("tier_blocks_promoted", 0),
        }


def alone(model, prompt: list[int]) -> list[int] | None:
    """What a prompt gives through the native cache; None where a near tie decides, which rounding could turn."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.cat(out.logits).float().topk(2, dim=-1).values
    is_clear = float((best[:, 0] - best[:, 1]).min()) > 1e-3
    return out.sequences[0, len(prompt) :].tolist() if is_clear else None


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--requests", type=int, default=2000, help="of a round")
    parser.add_argument("--out", type=Path, help="a folder for load.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    end, rounds = time.time() + 60 * options.minutes, []
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Rates, "seconds_saved", lambda *_, **__: 1.0):
        tiers = {"resident": "kv", "host_bytes": 1 << 20, "disk_path": folder, "disk_bytes": 1 << 22}
        load = Load("prefix+offload", options.requests, device=options.device, **tiers)
        on_gpu = load.model.device.type == "cuda"
        setting = {
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "torch": torch.__version__,
            "CUDA graphs": load.runner._graphs is not None,
            "blocks of the pool": load.strategy.pool.num_blocks,
            "blocks of a round": load.num_blocks_together,
        }
        while time.time() < end or not rounds:
            rounds.append(load.round())
    first, last = rounds[0], rounds[-1]
    total = setting | {
        "rounds": len(rounds),
        "requests, all as alone": sum(row["requests"] for row in rounds),
        "preemptions": sum(row["preemptions"] for row in rounds),
        "blocks brought back": last["blocks brought back so far"],
        "longest wait, s": round(max(row["longest wait, s"] for row in rounds), 3),
        "longest wait, steps": max(row["longest wait, steps"] for row in rounds),
        "process, MB, first and last round": [round(row["process, MB"], 1) for row in (first, last)],
        "device, MB, first and last round": [round(row["device, MB"], 1) for row in (first, last)],
    }
    for what, value in total.items():
        print(f"{what:<36}{value}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "load.json").write_text(json.dumps(total | {"of each round": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
