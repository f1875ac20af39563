"""Speculative decoding: several tokens a step where a text repeats itself, and the same tokens as without.

python examples/speculate.py
"""

import time

from kv_strategies import Request, Runner, build
from kv_strategies.models import load_model
from kv_strategies.speculative import PromptLookup


def main() -> None:
    model, tokenizer = load_model()
    chant = "holy, holy, holy, "
    request = Request(tokenizer(chant * 8).input_ids, max_new_tokens=96)
    found = {}
    for name, speculate in (("plain", None), ("prompt lookup", PromptLookup())):
        runner = Runner(model, build("paged", model, num_blocks=64), speculate=speculate)
        runner.generate([Request(request.token_ids, max_new_tokens=24)])  # warm
        begin = time.perf_counter()
        (result,) = runner.generate([request])
        seconds = time.perf_counter() - begin - result.timings.ttft
        found[name] = result.token_ids
        right = f", {runner.num_accepted} of {runner.num_proposed} guesses right" if speculate else ""
        print(f"{name}: {(len(result.token_ids) - 1) / seconds:.1f} tokens/s{right}")
    print("the same tokens:", found["plain"] == found["prompt lookup"])


if __name__ == "__main__":
    main()
