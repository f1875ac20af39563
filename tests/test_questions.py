"""The page of questions: its figures are those of the lines; what no line answers says why, and what measures it."""

from __future__ import annotations

import re
import shlex

from test_bench import CPU, GPU, context, line, spread, throughput

from bench import lines as result_lines
from bench import report
from bench.report import questions
from bench.report.answers import QUESTIONS
from bench.suites.default.pool import AGAIN, DISK, HOST
from bench.workload import WORKLOADS, suite


def pool_point(share, way, rate, **changes):
    point = {"label": f"{share} {way}", "share": share, "way": way, "kv_bytes": 3_000_000_000, "preemptions": 2.0}
    point |= {"tokens_per_second": spread(rate), "computed_again": 90.0, "brought_back": 7.0, "identical": 2}
    return point | changes


def at_once(requests, rate):
    times = {"p50": 0.01 * requests, "p90": 0.02 * requests, "p99": 0.03 * requests}
    return {"requests": requests, "tokens_per_second": rate, "ttft": times, "itl": times, "peak": 5_000_000_000}


def on_gpu(workload, system, result, **params):
    return line(workload, system, result, GPU, params=params)


BATCH = {"lengths": [10, 20], "new_tokens": 5}


def measured_lines():
    baseline = throughput("baseline", 50.0, 20 << 30, about=GPU)
    baseline["result"]["kv"] = {"bytes": 50_000_000, "tokens": 900, "places": 1800}
    paged = throughput("paged", 200.0, 40 << 30, about=GPU)
    paged["result"]["kv_bytes_per_token"] = 1_000_000
    seen = context("paged", 0.060, GPU)
    near = {"batch": 1, "context": 512, "ttft": spread(1.0), "step": spread(0.030), "step_bytes": 559_040_000}
    seen["result"]["points"].append(near)
    seen["params"]["new_tokens"] = 4
    seen["result"]["kv_bytes_per_token"] = 10_000
    points = [pool_point(1, AGAIN, 400.0), pool_point(2, AGAIN, 404.0), pool_point(0.5, AGAIN, 300.0)]
    points += [pool_point(0.5, HOST, 360.0), pool_point(0.5, DISK, 0, error="OSError: full")]
    hit = {"shared": 4096, "new": 64, "cold": spread(30.0), "hit": spread(3.0), "native": spread(40.0)}
    kernels = [["linear_kernel", 1, 0.003], ["decode_kernel", 1, 0.001]]
    profile = [{"name": "paged", "busy_share": 0.9, "kernels": kernels}, {"name": "offload", "busy_share": 0.5}]
    shared = {"cascade": spread(2.0), "apart": spread(8.0), "blocks_used": 10, "blocks_apart": 80}
    row = {"perplexity": 10.1, "baseline_perplexity": 10.0, "mean_kl": 2e-3, "top1_agreement": 0.98}
    parted = {"prompt": 0, "prompt_length": 9, "token": 3, "margin": 0.25}
    return [
        on_gpu("machine", "limits", {"limits": {"read": 20e9, "copy": 10e9}}),
        baseline, paged, seen,
        on_gpu("pool", "paged", {"points": points}, **BATCH),
        on_gpu("concurrency", "paged", {"points": [at_once(1, 10.0), at_once(8, 96.0), at_once(64, 100.0)]}, **BATCH),
        on_gpu("prefix", "prefix", {"points": [hit]}),
        on_gpu("profile", "every strategy", {"entries": profile}, context=4096),
        on_gpu("fan-out", "prefix", shared | {"bytes_per_block": 10**9}, candidates=8, candidate_tokens=2, history=64),
        on_gpu("cost", "8 bits", {"rows": [row | {"label": "int8", "strategy": "int8"}], "judged": 100}),
        on_gpu("accuracy", "paged", {"prompts": 9, "identical": 9, "divergence": None}, lengths=[1, 30]),
        on_gpu("accuracy", "int8", {"prompts": 9, "identical": 4, "divergence": parted}, lengths=[1, 30]),
    ]  # fmt: skip


#: In the order of the questions: what must stand in the answer to the lines above.
SAID = [
    ["3.0% of them empty", "1800 (50.0% empty)", "2 times that size gives 1.01x", "0.5 times that size gives 0.75x"],
    ["hold 10.0 GB", "would hold 80.0 GB", "8 times as much", "take 14000 ms"],
    ["2 of 2 end", "computed again: 2 preemptions, 0.75x", "host memory: 2 preemptions, 0.90x", "| OSError: full |"],
    ["4.0 times the tokens/s", "hold 0.50 of its K and V"],
    ["10.0 times sooner with 4096 tokens"],
    ["`int8` changes perplexity by +1.00%", "98.0% of all places", "2.0e-03 nats"],
    ["0.50 GB", "0.05 times as much", "500 tokens take as much"],
    ["1 of 1 systems", "60.00", "75% is `linear_kernel`, 25% is `decode_kernel`"],
    ["more than 55390 tokens", "1% at 1 x 512", "8% at 1 x 4608"],
    ["Not always", "1 of 2 kinds of step", "offload, 50%"],
    ["21.47 GB (baseline)", "25% to 50% of the card's 85.9 GB"],
    ["8 gives 96.0 tokens/s, within 5% of the most (64): 9.6 times those of 1", "80.0 ms"],
    ["From 1 to 64 requests at once tokens/s grow 10.0 times", "grows 64.0 times"],
    ["33.3 tokens/s behind 512 tokens and 16.7 behind 4608, 0.50 of that"],
    ["`paged` give the tokens", "`int8` 4 of 9", "| new token 3 | 0.25 |"],
]


def sections(lines):
    return questions.render(lines).split("\n## ")[1:]


def test_answers_hold_the_figures_of_the_lines():
    lines = measured_lines()
    for section, said in zip(sections(lines), SAID, strict=True):
        assert not [text for text in said if text not in section], section
        assert "A card; some-model, float32" in section and "](" in section and "commit 0123456789ab" in section
        assert "; host " in section  # what a ratio to a native cache depends on


def test_a_gpu_comes_first_and_a_cpu_answers_only_what_no_gpu_has():
    of_cpu = [one | {"device": "cpu", "machine": CPU} for one in measured_lines()]
    of_gpu = [one for one in measured_lines() if one["workload"] != "concurrency"]
    found = questions.answered([*of_cpu, *of_gpu])
    assert {one.source.split(";")[0] for one in found[:11]} == {"A card"}
    assert found[12].source.startswith("CPU: A processor")
    assert "Not measured on A card" in found[12].missing and "ONLY='^concurrency /'" in found[12].missing


def commands(text):
    return re.findall(r"`make bench ([^`]+)`", text)


def test_what_is_not_answered_says_why_and_what_measures_it():
    found = questions.answered([line("prefix", "prefix", error="OutOfMemoryError: no room", about=GPU)])
    assert len(found) == len(QUESTIONS) == 15 and not any(one.answer for one in found)
    assert "OutOfMemoryError: no room" in next(one.missing for one in found if "preload" in one.asked)
    for one, question in zip(found, QUESTIONS, strict=True):
        assert "measures it." in one.missing
        options = dict(word.split("=", 1) for word in shlex.split(commands(one.missing)[0]))
        chosen = {
            case.workload
            for device in ("cpu", "cuda")
            for case in suite(options["SUITE"], device)
            if re.search(options["ONLY"], case.name)
        }
        assert chosen == {question.workloads[0]}


def test_questions_look_at_workloads_that_there_are():
    assert {workload for question in QUESTIONS for workload in question.workloads} <= set(WORKLOADS)


def test_the_committed_results_answer_or_say_what_would():
    for section in sections(result_lines.read(report.RESULTS)):
        assert "commit " in section or "measures it." in section, section
        assert not re.search(r"\| - \|", section), section
    for page in re.findall(r"\]\((\w+\.md)\)", questions.render(result_lines.read(report.RESULTS))):
        assert (report.RESULTS / page).exists()


def test_text_from_outside_is_text_in_html():
    text = questions.as_html([line("throughput", "paged", error="<script>`x`")])
    assert "&lt;script&gt;<code>x</code>" in text and "<script>" not in text
