"""A case is one system on one workload, run in a process of its own; a `Bench` is what its workload is handed."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from bench import measure
from bench.systems import Capacity, open_system

RAGGED_SEED = 7
DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Case:
    workload: str
    system: str
    model: str | None  # as `load_model` takes it; None is the embedded default
    dtype: str
    device: str
    params: dict = field(default_factory=dict)
    timeout: int = 240  # seconds

    @property
    def name(self) -> str:
        if self.workload == "machine":
            return "machine / limits"
        return " / ".join([self.workload, self.system, model_name(self.model), self.dtype])

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def model_name(spec: str | None) -> str:
    """A model's name without its path."""
    if not spec:
        return DEFAULT_MODEL
    path = Path(spec)
    return path.name if path.name.strip(".") else path.resolve().name  # "." and ".."


def place_of(spec: str | None) -> str | None:
    """What tells models of one name in several folders apart, and names no folder; None of others."""
    if not spec or not Path(spec).exists():
        return None
    return hashlib.sha256(os.fsencode(Path(spec).resolve())).hexdigest()[:12]


def is_random(spec: str | None) -> bool:
    return model_name(spec).endswith("-random")


def ragged(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths spread evenly from the shortest to the longest, in a fixed shuffled order."""
    lengths = [shortest + (longest - shortest) * i // max(1, count - 1) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(RAGGED_SEED)).tolist()
    return [lengths[i] for i in order]


class Bench:
    """What a workload needs: the model, prompts, a word to the user, and a folder shared by the cases of one run."""

    def __init__(self, case: Case, scratch: Path, say: Callable[[str], None] = print) -> None:
        self.case, self.params, self.scratch, self.say = case, case.params, scratch, say
        self.memory = measure.PeakMemory(case.device)

    @cached_property
    def loaded(self) -> tuple:
        from kv_strategies.models import load_model

        self.say("loading the model")
        model, tokenizer = load_model(self.case.model, dtype=getattr(torch, self.case.dtype), device=self.case.device)
        model.generation_config.eos_token_id = None  # every system makes the number of tokens asked for
        return model, tokenizer

    @property
    def model(self):
        return self.loaded[0]

    def prompts(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Natural text where the model has a tokenizer, else random token ids. Another seed, other prompts."""
        from kv_strategies.models.text import prompts

        model, tokenizer = self.loaded
        return prompts(tokenizer, lengths, seed=seed, vocab_size=model.config.vocab_size)

    def open(self, capacity: Capacity):
        return open_system(self.case.system, self.model, capacity)

    def allocated(self) -> int:
        """Bytes that torch holds on the GPU now; 0 on a CPU."""
        self.model  # noqa: B018  the weights are not part of what comes after
        return torch.cuda.memory_allocated(self.case.device) if self.case.device.startswith("cuda") else 0

    def free(self) -> None:
        gc.collect()
        if self.case.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def model_bytes(self) -> dict:
        return {
            "parameter_bytes": sum(p.numel() * p.element_size() for p in self.model.parameters()),
            "kv_bytes_per_token": measure.kv_bytes_per_token(self.model),
        }
