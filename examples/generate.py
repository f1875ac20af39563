"""Plain `generate()` with a strategy: give it a cache, and nothing else changes.

python examples/generate.py
"""

import torch

from kv_strategies import build
from kv_strategies.models import load_model


def main() -> None:
    model, tokenizer = load_model()
    strategy = build("prefix", model, num_blocks=256)  # long-lived: it owns the memory, calls come and go
    prompt = tokenizer("The quick brown fox jumps over the lazy dog. " * 8 + "The fox", return_tensors="pt")
    prompt = prompt.to(model.device)
    native = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    for call in ("first", "second"):
        cache = strategy.cache(prompt)  # the prompt is given, so what an earlier call has computed of it is skipped
        skipped = cache.get_seq_length()
        out = model.generate(**prompt, cache=cache, max_new_tokens=20, do_sample=False)
        print(f"{call} call: {skipped} of {prompt.input_ids.shape[1]} prompt tokens were there already")
        print("   the native cache's tokens" if torch.equal(out, native) else "   OTHER tokens than the native cache's")
    print(tokenizer.decode(out[0, prompt.input_ids.shape[1] :]))


if __name__ == "__main__":
    main()
