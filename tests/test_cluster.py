"""A file of prompts over two small replicas on this machine: what comes back, whatever dies or is interrupted."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from itertools import groupby

import pytest
from common import tiny_llama

from kv_strategies import Runner, build
from kv_strategies.batch import Answering, Batch, Line
from kv_strategies.cli import load_answering, main
from kv_strategies.models.load import DEFAULT_MODEL, load_model, load_tokenizer

ray = pytest.importorskip("ray", reason="ray comes with the extra 'test'; a machine without a venv may lack it")

from kv_strategies.cluster import Cluster, _parts, beginnings  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`.*` is deprecated:DeprecationWarning")  # Ray's own settings

REPLICAS = 2
WORDS = ["stone", "river", "light", "house", "morning", "bread", "field", "water", "night", "garden"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_small(folder: str) -> Answering:
    """Little more than one prompt in a forward: the third finds what the first has computed."""
    model, tokenizer = load_model(folder)
    runner = Runner(model, build("prefix", model, num_blocks=256), max_batch_tokens=128, tokenizer=tokenizer)
    return Answering(runner, tokenizer, max_new_tokens=8)


@pytest.fixture(scope="module")
def load(model):
    return partial(load_small, str(model))


@pytest.fixture(scope="module")
def cluster(load):
    """One CPU for each replica, and one to read and sort with."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a replica does not find the tests
    ray.init("local", num_cpus=REPLICAS + 1, object_store_memory=100 << 20, include_dashboard=False)
    yield partial(Cluster, load)
    ray.shutdown()


@pytest.fixture
def prompts(tmp_path):
    """Four long beginnings of twelve lines each, mixed, and lines that cannot be answered."""
    rng = random.Random(0)
    starts = [" ".join(rng.choices(WORDS, k=80)) for _ in range(4)]
    lines = [
        json.dumps({"prompt": f"{start} {i} {' '.join(rng.choices(WORDS, k=4))}", "temperature": i % 2, "id": i})
        for i in range(12)
        for start in starts
    ] + ["", "{", '{"prompt": 7}', "[]"]
    rng.shuffle(lines)
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def expected(prompts, load):
    """What one machine answers."""
    return {row["line"]: row for row in load()(Batch(prompts, prompts.with_name("none")).lines)}


def answers(path) -> dict[int, dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["line"] for row in rows}) == len(rows), "a line was answered twice"
    return {row["line"]: row for row in rows}


def num_cached(rows) -> int:
    return sum(sample.pop("num_cached_tokens") for row in rows.values() for sample in row.get("samples", ()))


def replicas() -> list:
    """Their processes."""
    import psutil  # which a machine without ray may lack, too

    return [child for child in psutil.Process().children(recursive=True) if "ray::MapWorker" in child.name()]


def test_answers_and_hits_are_those_of_one_machine(prompts, expected, cluster, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("kv_strategies.cluster._PART", prompts.stat().st_size // 3)
    summary = Batch(prompts, tmp_path / "out").run(cluster(), report=told.append)
    assert summary == (48, 3, 0) and len(told) == 3
    found = answers(tmp_path / "out")
    num_found, num_expected = num_cached(found), num_cached(expected)
    assert found == expected
    # Of the twelve lines of a beginning one computes it here; in each replica one, and one that starts beside it.
    assert num_expected * (12 - 2 * REPLICAS) / (12 - 1) <= num_found <= num_expected


@pytest.mark.slow
def test_dead_replicas_lose_nothing_and_repeat_nothing(prompts, expected, cluster, tmp_path):
    dead = []

    def killing(lines):
        for row in cluster()(lines):
            yield row
            if not dead:
                dead.extend(replicas())
                for process in dead:
                    process.kill()

    summary = Batch(prompts, tmp_path / "out").run(killing)
    assert summary == (48, 3, 0) and len(dead) == REPLICAS
    found = answers(tmp_path / "out")
    num_cached(found), num_cached(expected)
    assert found == expected


def test_a_resumed_run_goes_on_exactly(prompts, expected, model, cluster, tmp_path, capsys):
    out = tmp_path / "out"
    done = [json.dumps(row) for row in list(expected.values())[:40]]
    out.write_text("\n".join(done)[:-10])
    options = ["--model", str(model), "--max-new-tokens", "8", "--option", "num_blocks=256", "--address", "local"]
    assert main(["batch", str(prompts), str(out), *options, "--replicas", "1"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["batch", str(prompts), str(out), *options, "--replicas", "1", "--resume", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["num_resumed"] == 39
    found = answers(out)
    num_cached(found), num_cached(expected)
    assert found == expected


def test_what_cannot_run_says_why(prompts, cluster, tmp_path):
    broken = partial(load_answering, str(tmp_path / "none"), "prefix", {}, 8)
    for made, error, message in (
        (cluster(replicas=REPLICAS + 1), ValueError, "room for 2 replicas of 0 GPUs and 1 CPUs"),
        (cluster(gpus=1), ValueError, "room for 0 replicas of 1 GPUs"),
        (cluster(cpus=0), ValueError, "a replica takes a GPU or a CPU"),
        (Cluster(broken, replicas=1), RuntimeError, "a replica failed: FileNotFoundError: "),
    ):
        with pytest.raises(error, match=message):
            Batch(prompts, tmp_path / "out").run(made)
        assert not (tmp_path / "out").exists()
    assert Batch(prompts, tmp_path / "out").lines


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_a_file_read_in_parts_is_the_file(prompts, monkeypatch, end):
    prompts.write_text(prompts.read_text().rstrip() + end)
    lines = Batch(prompts, prompts.with_name("none")).lines
    for size in (1, 400, 5000, 1 << 20):
        monkeypatch.setattr("kv_strategies.cluster._PART", size)
        parts = list(_parts(prompts))
        assert [line for part in parts for line in lines.part(*part)] == list(lines)
        assert size > 400 or len(parts) > 20


def test_sorted_lines_that_begin_alike_are_neighbours():
    """At every depth: those that agree in a beginning stand together."""
    rng = random.Random(1)
    texts = ["".join(rng.choice("ab") * rng.choice([128, 200]) for _ in range(rng.randint(1, 5))) for _ in range(300)]
    lines = [Line(i, "", json.dumps({"prompt": text}).encode()) for i, text in enumerate(texts)]
    in_order = [texts[line.number] for line in sorted(lines, key=beginnings)]
    for depth in range(1, 8):
        length = 128 * depth - len('[null, "')  # in the first piece JSON begins
        starts = [text[:length] for text in in_order if len(text) >= length]
        assert len([start for start, _ in groupby(starts)]) == len(set(starts)) > 1
    assert {beginnings(Line(1, "", text)) for text in (b"{", b"[]", b"\xff", b"[" * 100_000)} == {""}
