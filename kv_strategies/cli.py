"""`kv-strategies generate | batch | convert | plan | bench | report | explain | ...`: the package from a shell."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .shell import ended

if TYPE_CHECKING:
    import torch

    from .batch import Answering
    from .cluster import Cluster


def main(argv: list[str] | None = None) -> int:
    rank = os.environ.get("RANK", "0")  # of several that hold one model, the first is the one that speaks
    return ended(f"kv-strategies{f' (rank {rank})' if rank != '0' else ''}", partial(_run, argv, rank == "0"))


def _run(argv: list[str] | None, is_first: bool) -> int:
    from . import plan_command
    from .models.room import NoRoom

    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.command in ("bench", "report"):
        options.extra = [*options.extra, *rest]
    elif rest:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        with contextlib.nullcontext() if is_first else contextlib.redirect_stdout(io.StringIO()):
            return options.run(options)
    except NoRoom as error:
        raise ValueError(f"{error}; {plan_command.beside(error)}") from error


def _parser() -> argparse.ArgumentParser:
    from . import plan_command

    parser = argparse.ArgumentParser(
        prog="kv-strategies",
        description="KV-cache strategies on a patched Transformers.",
        epilog="Exit status: 0 done, 1 refused or failed (the last line on standard error says why), 2 a command line "
        "that cannot be read, 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="continue a prompt with a strategy and print what it held")
    generate.add_argument("prompt", nargs="+", help="one or more prompts; they run as one batch")
    generate.add_argument("--strategy", default="paged", help="a name or a sum of names (default: %(default)s)")
    generate.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the strategy")
    generate.add_argument(
        "--model", help="a folder, a hub id, a gguf file, or a known random shape (default: SmolLM2-135M-Instruct)"
    )
    _add_dtype(generate)
    count = plan_command.positive(int)
    generate.add_argument("--max-new-tokens", type=count, default=64)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--chat", action="store_true", help="put the prompts into the model's chat form")
    generate.add_argument("--json", action="store_true", help="print results and statistics as one JSON object")
    generate.set_defaults(run=_generate)

    plan = commands.add_parser(
        "plan",
        help="what fits a card, how fast it would be, what bounds it, and what it was measured to lose",
        description="Plan strategies on a card that need not be here; docs/plan.md reads the table column by column.",
        epilog="Example: kv-strategies plan --model llama-3.1-8b-random --context 32k --batch 8 --gpu-memory 24GB",
    )
    plan_command.add_arguments(plan)
    plan.set_defaults(run=_plan)

    for name, help_text in (("bench", "measure strategies and native caches"), ("report", "write tables and plots")):
        command = commands.add_parser(name, help=help_text, add_help=False)
        command.set_defaults(run=_bench, extra=["report"] if name == "report" else [])

    batch = commands.add_parser("batch", help="answer a file of prompts, line by line")
    batch.add_argument("prompts", type=Path, help="JSON lines, see `kv_strategies/batch.py`")
    batch.add_argument("out", type=Path, help="to write; it must not exist, unless --resume is given")
    batch.add_argument("--resume", action="store_true", help="go on with an output file that is there")
    batch.add_argument("--strategy", default="prefix", help="a name or a sum of names (default: %(default)s)")
    batch.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the strategy")
    batch.add_argument("--model", help="as of generate")
    _add_dtype(batch)
    batch.add_argument(
        "--max-new-tokens", type=count, default=64, help="of lines that do not say (default: %(default)s)"
    )
    batch.add_argument("--json", action="store_true", help="print one JSON object")
    batch.add_argument(
        "--address", help="answer on a Ray cluster: `auto` for the one this machine is in, HOST:PORT, or `local`"
    )
    batch.add_argument("--replicas", type=count, help="of the model, on the cluster (default: as many as fit)")
    batch.add_argument("--gpus", type=float, help="of a replica (default: 1 where the cluster has any)")
    batch.add_argument("--cpus", type=float, help="of a replica (default: 1)")
    batch.set_defaults(run=_batch)

    convert = commands.add_parser("convert", help="write a model as a folder of Llama architecture")
    convert.add_argument("source", help="a folder, a hub id or a gguf file: Llama, Qwen, Qwen2, Mistral")
    convert.add_argument("folder", type=Path, help="to make; it must not exist")
    convert.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: theirs)")
    convert.add_argument("--json", action="store_true", help="print one JSON object")
    convert.set_defaults(run=_convert)

    explain = commands.add_parser("explain", help="show how a strategy works on a small example")
    explain.add_argument("strategy", help="a name, as --strategy takes it")
    explain.add_argument("--json", action="store_true", help="print one JSON object")
    explain.set_defaults(run=_explain)

    diff = commands.add_parser("explain-diff", help="where two strategies first part, and whether rounding explains it")
    diff.add_argument("a", help="a strategy, as --strategy takes it")
    diff.add_argument("b", help="another one; `baseline` is the native cache")
    diff.add_argument("prompt", nargs="+", help="one or more prompts")
    diff.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of whichever takes it")
    diff.add_argument("--model", help="as of generate")
    _add_dtype(diff)
    diff.add_argument("--max-new-tokens", type=count, default=64)
    diff.add_argument("--json", action="store_true", help="print one JSON object")
    diff.set_defaults(run=_explain_diff)

    completion = commands.add_parser("completion", help="print what makes a shell complete this command")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    completion.set_defaults(run=_completion)
    return parser


def _generate(options: argparse.Namespace) -> int:
    from . import Request, Runner, build
    from .models import load_model
    from .registry import check
    from .step.requests import FAILED

    texts = [_as_text(prompt) for prompt in options.prompt]
    given = _parse_options(options)
    check(options.strategy, given)
    model, tokenizer = load_model(options.model, **_of_dtype(options.dtype))
    if tokenizer is None:
        raise ValueError(f"{options.model} has random weights and no tokenizer; it serves benchmarks only")
    strategy = build(options.strategy, model, **given)
    requests = []
    for text in texts:
        if options.chat:
            message = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(text).input_ids
        requests.append(Request(ids, options.max_new_tokens, options.temperature, seed=options.seed))
    results = Runner(model, strategy, warm_up=False).generate(requests)
    answers = [tokenizer.decode(result.token_ids, skip_special_tokens=True) for result in results]
    if options.json:
        rows = [
            {
                "prompt": prompt,
                "text": text,
                "num_tokens": len(result.token_ids),
                "num_cached_tokens": result.num_cached_tokens,
                "finish_reason": result.finish_reason,
                "ttft": result.timings.ttft,
                "itl": result.timings.itl,
            }
            for prompt, text, result in zip(texts, answers, results, strict=True)
        ]
        print(json.dumps({"results": rows, "stats": strategy.stats()}))
    else:
        for prompt, text, result in zip(texts, answers, results, strict=True):
            times = result.timings
            print(f"--- {prompt}\n{text}")
            rate = f", then {len(times.itl) / sum(times.itl):.1f} tokens/s" if times.itl else ""
            print(f"    [{len(result.token_ids)} tokens, {result.finish_reason}; first after {times.ttft:.2f} s{rate}]")
        print(_in_words(strategy.stats()))
    if num_failed := sum(result.finish_reason == "error" for result in results):
        raise RuntimeError(f"{num_failed} of {len(results)} answers ended with an error: {FAILED}")
    return 0


def _in_words(stats: dict) -> str:
    """What a person wants to know of `Strategy.stats`."""
    if "num_blocks" not in stats:
        return f"strategy {stats['strategy']}"
    tiers = ", ".join(f"{size / 1e6:.1f} MB on {tier}" for tier, size in stats["kv_bytes_per_tier"].items())
    lines = [
        f"strategy {stats['strategy']}: {stats['num_blocks']} blocks of {stats['block_size']} tokens, "
        f"{stats['bytes_per_token']:.0f} bytes a token; {tiers}",
        f"prompt tokens: {stats['prompt_tokens']}, of which {stats['hit_tokens']} were there already; blocks kept for "
        f"later: {stats['blocks_cached']}",
    ]
    moved = stats["bytes_to_device"] + stats["bytes_to_host"]
    if moved:
        lines.append(
            f"over the link: {stats['bytes_to_device'] / 1e6:.1f} MB to the device, "
            f"{stats['bytes_to_host'] / 1e6:.1f} MB to the host"
        )
    return "\n".join(lines)


def _as_text(argument: str) -> str:
    """What a shell gave, whatever the locale: it must be UTF-8."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt {argument!r} is not UTF-8: {error.reason} at byte {error.start}") from None


def _parse_option(text: str) -> tuple[str, object]:
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--option takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _parse_options(options: argparse.Namespace) -> dict[str, object]:
    return dict(map(_parse_option, options.option))


def _plan(options: argparse.Namespace) -> int:
    from . import plan_command

    return plan_command.run(options, _parse_options(options))


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise RuntimeError("completion takes the package shtab: pip install 'kv-strategies[completion]'") from None
    print(shtab.complete(_parser(), options.shell))
    return 0


def _checkout() -> Path | None:
    """The checkout of the project around the current folder, else the one that this package was installed from."""
    folders = [folder := Path.cwd(), *folder.parents, Path(__file__).resolve().parents[1]]
    return next(
        (root for root in folders if (root / "bench/__main__.py").exists() and (root / "kv_strategies").is_dir()), None
    )


def _bench(options: argparse.Namespace) -> int:
    """The bench of the checkout, in this process's place."""
    root = _checkout()
    if root is None:
        raise RuntimeError(
            "the bench is not part of the installed package, and there is no checkout of the project in or above "
            f"{Path.cwd()}. Get one (git clone), run `make patch` in it, and run this again from inside it"
        )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "bench", *options.extra]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})


def _batch(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .batch import Batch
    from .registry import check

    given = _parse_options(options)
    check(options.strategy, given)
    if not options.prompts.is_file():
        raise ValueError(f"there is no file {options.prompts}")
    if not options.address and {options.replicas, options.gpus, options.cpus} != {None}:
        raise ValueError("--replicas, --gpus and --cpus are of a cluster: say which with --address")
    is_first = os.environ.get("RANK", "0") == "0"  # the one that reads and writes the answers
    if options.address and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--address answers by replicas that have a GPU each, and torchrun spreads one model: choose")
    batch = Batch(options.prompts, options.out, resume=options.resume) if is_first else None
    model = str(Path(options.model).resolve()) if options.model and Path(options.model).exists() else options.model
    load = partial(load_answering, model, options.strategy, given, options.max_new_tokens, options.dtype)
    answer = _cluster(load, options) if options.address else load()
    if not options.address:
        batch = answer.runner.strategy.ranks.first(lambda: batch)
    if not is_first:
        return 1 if batch.follow(answer).num_failed else 0
    try:
        found = batch.run(
            answer,
            report=lambda message: tqdm.write(message, file=sys.stderr),
            progress=not options.address,  # Ray shows its own
        )
    except BaseException:
        if options.out.exists():
            print(f"kv-strategies: {options.out} holds what is answered: go on with --resume", file=sys.stderr)
        raise
    if options.json:
        print(json.dumps(found._asdict()))
    else:
        print(
            f"{found.num_answered} answered, {found.num_failed} failed, {found.num_resumed} were there; {options.out}"
        )
    return 1 if found.num_failed else 0


def load_answering(
    model: str | None, strategy: str, options: dict[str, object], max_new_tokens: int, dtype: str | None = None
) -> Answering:
    """What answers lines, by names alone: so another machine can make the same."""
    from . import Runner, build
    from .batch import Answering
    from .models import load_model

    loaded, tokenizer = load_model(model, **_of_dtype(dtype))
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer")
    runner = Runner(loaded, build(strategy, loaded, **options), tokenizer=tokenizer)
    return Answering(runner, tokenizer, max_new_tokens=max_new_tokens)


def _add_dtype(command: argparse.ArgumentParser) -> None:
    from .plan_command import DTYPES

    command.add_argument("--dtype", choices=DTYPES, help="of the model (default: float32 on a CPU, bfloat16 on a GPU)")


def _of_dtype(name: str | None) -> dict[str, torch.dtype]:
    """What `load_model` is told of it."""
    import torch

    return {"dtype": getattr(torch, name)} if name else {}


def _cluster(load: Callable[[], Answering], options: argparse.Namespace) -> Cluster:
    try:
        from .cluster import Cluster
    except ImportError:
        raise RuntimeError("--address takes the package ray: pip install 'kv-strategies[cluster]'") from None
    return Cluster(load, options.address, replicas=options.replicas, gpus=options.gpus, cpus=options.cpus)


def _convert(options: argparse.Namespace) -> int:
    from .models.convert import convert

    folder = convert(options.source, options.folder, options.dtype)
    print(json.dumps({"folder": str(folder)}) if options.json else f"written to {folder}")
    return 0


def _explain_diff(options: argparse.Namespace) -> int:
    from . import build
    from .compare import first_difference
    from .models import load_model
    from .registry import check, options_of_each

    prompts = [_as_text(prompt) for prompt in options.prompt]
    names = (options.a, options.b)
    each = options_of_each(names, _parse_options(options))
    for name, given in zip(names, each, strict=True):
        check(name, given)
    model, tokenizer = load_model(options.model, **_of_dtype(options.dtype))
    if tokenizer is None:
        raise ValueError(f"{options.model} has random weights and no tokenizer; it serves benchmarks only")
    pair = [build(name, model, **given) for name, given in zip(names, each, strict=True)]
    found = first_difference(*pair, [tokenizer(text).input_ids for text in prompts], options.max_new_tokens)
    if options.json:
        print(json.dumps({"difference": found and asdict(found) | {"is_rounding": found.is_rounding}}))
        return 0
    if found is None:
        print(f"{options.a} and {options.b} give the same {options.max_new_tokens} tokens for every prompt")
        return 0
    shown = [repr(tokenizer.decode([token])) if token >= 0 else "the end" for token in found.tokens]
    print(
        f"they part at new token {found.token} of {prompts[found.prompt]!r}: {options.a} says {shown[0]}, "
        f"{options.b} {shown[1]}\n"
        f"margin of the two: {found.margin:+.5f} in {str(model.dtype).removeprefix('torch.')}, {found.exact:+.5f} in "
        f"float32; the dtype moves a logit there by {found.rounding:.5f}"
    )
    print(
        "rounding accounts for it" if found.is_rounding else "rounding does NOT account for it: an answer has changed"
    )
    return 0


def _explain(options: argparse.Namespace) -> int:
    """The example of each part of the name: of the module that answers its question."""
    from .registry import STRATEGIES, parts_of

    shown = {}
    for part in parts_of(options.strategy):
        preset, text = STRATEGIES[part], io.StringIO()
        name = "kv_strategies.paged" if preset.answers == "layout" else preset.make.__module__
        module = importlib.import_module("kv_strategies.baseline" if part == "baseline" else name)
        with contextlib.redirect_stdout(text):
            module.main() if hasattr(module, "main") else print(f"{part}: {preset.summary}")
        shown[part] = {"answers": preset.answers, "summary": preset.summary, "example": text.getvalue()}
    print(json.dumps(shown) if options.json else "".join(part["example"] for part in shown.values()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
