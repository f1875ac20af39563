"""A system prompt: computed once, shared by all requests, saved, and there again after a restart.

python examples/saved_prefix.py
"""

import tempfile
from pathlib import Path

from kv_strategies import Request, Runner, build
from kv_strategies.models import load_model


def main() -> None:
    model, tokenizer = load_model()
    system = tokenizer("You answer in one short sentence, kindly and without a joke. " * 6).input_ids
    questions = [tokenizer(text).input_ids for text in (" What is water?", " Who wrote Hamlet?")]

    strategy = build("prefix", model, num_blocks=128)
    print(f"{strategy.preload(system)} tokens of the system prompt are computed ahead, and stay")
    for result in Runner(model, strategy).generate([Request(system + q, max_new_tokens=8) for q in questions]):
        print(f"request {result.request_id}: {result.num_cached_tokens} tokens were there")

    with tempfile.TemporaryDirectory() as folder:
        print(f"{strategy.save(Path(folder, 'prefix'))} blocks saved")
        restarted = build("prefix", model, num_blocks=128)  # another process, say
        print(restarted.load(Path(folder, "prefix")))
        (result,) = Runner(model, restarted).generate([Request(system + questions[0], max_new_tokens=8)])
        print(f"after the restart: {result.num_cached_tokens} tokens were there")


if __name__ == "__main__":
    main()
