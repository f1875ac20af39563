"""A decode step of int8 and fp8 against bfloat16, and the bytes a token takes."""

from __future__ import annotations

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.strategies import shape_cases
from bench.systems import Capacity, filled, ours
from bench.workload import Claim, Workload, register


def run_8_bits(bench: Bench) -> dict:
    """Steps behind contexts that nobody computed (`filled`): they read as much."""
    batch, context, new_tokens = (bench.params[name] for name in ("batch", "context", "new_tokens"))
    capacity = Capacity([[context + new_tokens] * batch])
    prompts = bench.prompts([context] * batch, seed=1)
    found: dict[str, object] = {}
    for name in ("paged", "int8", "fp8"):
        bench.say(name)
        try:
            system = ours(bench.model, name, capacity)
        except ValueError as error:  # a GPU without fp8
            found[name] = {"error": str(error)}
            continue
        with filled(system.strategy):
            system(prompts, 4)  # kernels compile, the graph is captured
            steps = measure.steady_steps(system(prompts, new_tokens).times)
        found[name] = {
            "step": measure.spread(steps),
            "bytes_per_token": system.strategy.stats()["bytes_per_token"],
        }
        del system
        bench.free()
    return found


ON_GPU = {"batch": 32, "context": 2048, "new_tokens": 24}
ON_CPU = {"batch": 4, "context": 128, "new_tokens": 8}


def _claims(name: str, as_of: str = "") -> list[Claim]:
    def step(result: dict) -> float | None:
        found = result[name]
        return None if "error" in found else found["step"]["median"] / result["paged"]["step"]["median"]

    def tokens(result: dict) -> float | None:
        found = result[name]
        return None if "error" in found else result["paged"]["bytes_per_token"] / found["bytes_per_token"]

    what = f"{name}, {{batch}} x {{context}}: step / paged step"
    return [
        Claim(what, f"at most 0.7{as_of}", 0.7, step, "{:.2f}", at_most=True),
        Claim(f"{name}: tokens in the same memory", f"at least 1.9x{as_of}", 1.9, tokens, "{:.2f}x"),
    ]


CLAIMS = [*_claims("int8"), *_claims("fp8", " (as int8)")]


def _table(result: dict) -> str:
    rows = []
    for name in ("paged", "int8", "fp8"):
        found = result[name]
        if "error" in found:
            rows.append([name, found["error"], ""])
        else:
            rows.append([name, milliseconds(found["step"]), f"{found['bytes_per_token'] / 1024:.1f}"])
    title = f"**8 bits: {result['batch']} requests of {result['context']} tokens**\n\n"
    return title + table(["", "decode step, ms", "KV, KiB a token"], rows)


register(
    Workload(
        "8 bits",
        run_8_bits,
        "a decode step of int8 and fp8 against bfloat16, and the bytes a token takes",
        cases={"strategies": shape_cases("int8", ON_GPU, ON_CPU)},
        tables=of_each("8 bits", _table),
        claims=CLAIMS,
    )
)
