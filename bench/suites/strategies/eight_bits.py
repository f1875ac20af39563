"""A decode step over codes of 8 and 4 bits against bfloat16, and the bytes a token takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bench import measure
from bench.case import Bench
from bench.markdown import milliseconds, of_each, table
from bench.suites.strategies import shape_cases
from bench.systems import Capacity, filled, ours
from bench.workload import Claim, Workload, register

CODECS = ("int8", "fp8", "k8v4", "int4")


def run_8_bits(bench: Bench) -> dict:
    """Steps behind contexts that nobody computed (`filled`): they read as much."""
    batch, context, new_tokens = (bench.params[name] for name in ("batch", "context", "new_tokens"))
    capacity = Capacity([[context + new_tokens] * batch])
    prompts = bench.prompts([context] * batch, seed=1)
    found: dict[str, object] = {}
    for name in ("paged", *CODECS):
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


def _claims(name: str, step_at_most: float | None, tokens_at_least: float, as_of: str = "") -> Iterable[Claim]:
    def of(figure: Callable[[dict, dict], float]) -> Callable[[dict], float | None]:
        def value(result: dict) -> float | None:
            found = result.get(name, {"error": "not run"})
            return None if "error" in found else figure(found, result["paged"])

        return value

    step = of(lambda own, paged: own["step"]["median"] / paged["step"]["median"])
    tokens = of(lambda own, paged: paged["bytes_per_token"] / own["bytes_per_token"])
    if step_at_most:
        what = f"{name}, {{batch}} x {{context}}: step / paged step"
        yield Claim(what, f"at most {step_at_most}{as_of}", step_at_most, step, "{:.2f}", at_most=True)
    what = f"{name}: tokens in the same memory"
    yield Claim(what, f"at least {tokens_at_least}x{as_of}", tokens_at_least, tokens, "{:.2f}x")


CLAIMS = [
    *_claims("int8", 0.68, 1.9),
    *_claims("fp8", 0.68, 1.9, " (as int8)"),
    *_claims("int4", None, 3.5),
]


def _table(result: dict) -> str:
    rows = []
    for name in ("paged", *CODECS):
        found = result.get(name, {"error": "not run"})
        if "error" in found:
            rows.append([name, found["error"], ""])
        else:
            rows.append([name, milliseconds(found["step"]), f"{found['bytes_per_token'] / 1024:.1f}"])
    title = f"**8 and 4 bits: {result['batch']} requests of {result['context']} tokens**\n\n"
    return title + table(["", "decode step, ms", "KV, KiB a token"], rows)


register(
    Workload(
        "8 bits",
        run_8_bits,
        "a decode step over codes of 8 and 4 bits against bfloat16, and the bytes a token takes",
        cases={"strategies": shape_cases("int8", ON_GPU, ON_CPU)},
        tables=of_each("8 bits", _table),
        claims=CLAIMS,
    )
)
