"""lm-evaluation-harness, which calls `generate()` by itself, with the caches of strategies.

pip install lm-eval
python examples/harness.py
"""

import json
import sys
import tempfile
from pathlib import Path

from kv_strategies import build
from kv_strategies.models import load_model
from kv_strategies.models.load import TEXT

TASK = {
    "task": "verses",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "Below is the beginning of a chapter of the Bible, in the translation of 1611 that is known as the "
    "King James Version. Go on with the chapter, word for word, from where it breaks off.\n\n{{text}}",
    "doc_to_target": "{{goal}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_questions(path: Path, count: int = 8) -> None:
    """The first verses of a chapter each, and the words that follow them."""
    chapters = TEXT.read_text(encoding="utf-8").split("\n\n")
    with path.open("w", encoding="utf-8") as file:
        for chapter in chapters[:count]:
            words = chapter.split(" ")
            file.write(json.dumps({"text": " ".join(words[:40]), "goal": " ".join(words[40:44])}) + "\n")


def main() -> None:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        sys.exit(f"this example runs lm-evaluation-harness: pip install lm-eval ({error})")
    model, tokenizer = load_model()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    with tempfile.TemporaryDirectory() as folder:
        write_questions(questions := Path(folder, "verses.jsonl"))
        task = TASK | {"dataset_kwargs": {"data_files": {"test": str(questions)}}}
        manager, native = TaskManager(include_defaults=False), None
        for name in ("baseline", "paged", "prefix", "int8"):
            strategy = build(name, model) if name == "baseline" else build(name, model, num_blocks=256)
            with strategy.installed():
                found = simple_evaluate(
                    harness, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True
                )
            answers = [sample["resps"][0][0] for sample in found["samples"]["verses"]]
            native = native or answers
            same = sum(a == b for a, b in zip(answers, native, strict=True))
            hits = strategy.stats().get("hit_tokens", 0)
            print(
                f"{name:8} {same} of {len(native)} answers as native, {hits} prompt tokens were there, {answers[0]!r}"
            )


if __name__ == "__main__":
    main()
