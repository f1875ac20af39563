"""More context than the device has room for: V lies in host memory, idle blocks move on to a disk.

python examples/offload.py
"""

import tempfile

from kv_strategies import Request, Runner, build
from kv_strategies.models import load_model
from kv_strategies.models.text import prompts


def main() -> None:
    model, tokenizer = load_model()
    texts = prompts(tokenizer, [300, 280, 260, 240], seed=1)
    with tempfile.TemporaryDirectory() as folder:
        strategy = build(
            "prefix+offload",
            model,
            num_blocks=40,  # 640 tokens, for 1080 of prompts
            host_bytes=200 << 20,
            disk_path=folder,
            disk_bytes=200 << 20,
        )
        runner = Runner(model, strategy, max_num_seqs=2)
        for visit in ("first", "second"):
            results = runner.generate([Request(text, max_new_tokens=4) for text in texts])
            found = sum(result.num_cached_tokens for result in results)
            print(f"{visit} visit: {found} of {sum(map(len, texts))} prompt tokens were found")
        stats = strategy.stats()
        print(f"blocks brought back from lower tiers: {stats['tier_blocks_promoted']}")
        print(f"bytes a tier: {stats['kv_bytes_per_tier']}")


if __name__ == "__main__":
    main()
