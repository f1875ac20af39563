"""Many requests at once through the runner, their tokens as they come.

python examples/stream.py
"""

from kv_strategies import Request, Runner, build
from kv_strategies.models import load_model


def main() -> None:
    model, tokenizer = load_model()
    runner = Runner(model, build("paged", model, num_blocks=256), max_num_seqs=4)
    texts = ["One, two, three,", "The capital of France is", "Roses are red, violets are"]
    requests = [Request(tokenizer(text).input_ids, max_new_tokens=12, request_id=text) for text in texts]
    written = dict.fromkeys(texts, "")
    for event in runner.stream(requests):  # leaving this loop early cancels what is left
        written[event.request_id] += tokenizer.decode([event.token_id])
        if event.result is not None:
            timings = event.result.timings
            print(f"{event.request_id!r} -> {written[event.request_id]!r}")
            print(f"   {event.result.finish_reason}; first token after {timings.ttft * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
