"""`kv-strategies generate | bench | report | explain`: the package from a shell."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

EXPLAINED = ("paged", "prefix", "window", "offload", "quantized")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="kv-strategies", description="KV-cache strategies on a patched Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="continue a prompt with a strategy and print what it held")
    generate.add_argument("prompt", nargs="+", help="one or more prompts; they run as one batch")
    generate.add_argument("--strategy", default="paged", help="a name or a sum of names (default: %(default)s)")
    generate.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the strategy")
    generate.add_argument("--model", help="a folder, a hub id, or a known random shape (default: the embedded model)")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--chat", action="store_true", help="put the prompts into the model's chat form")
    generate.set_defaults(run=_generate)

    for name, help_text in (("bench", "measure strategies and native caches"), ("report", "write tables and plots")):
        command = commands.add_parser(name, help=help_text, add_help=False)
        command.set_defaults(run=_bench, extra=["report"] if name == "report" else [])

    explain = commands.add_parser("explain", help="show how a strategy works on a small example")
    explain.add_argument("strategy", choices=EXPLAINED)
    explain.set_defaults(run=_explain)

    options, rest = parser.parse_known_args(argv)
    if options.command in ("bench", "report"):
        options.extra = [*options.extra, *rest]
    elif rest:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"kv-strategies: {error}", file=sys.stderr)
        return 1


def _generate(options: argparse.Namespace) -> int:
    from . import Request, Runner, build
    from .models import load_model

    model, tokenizer = load_model(options.model)
    if tokenizer is None:
        raise ValueError(f"{options.model} has random weights and no tokenizer; it serves benchmarks only")
    strategy = build(options.strategy, model, **dict(map(_parse_option, options.option)))
    stop = model.generation_config.eos_token_id
    stops = stop if isinstance(stop, list) else [stop] if stop is not None else []
    requests = []
    for text in options.prompt:
        if options.chat:
            message = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer(text).input_ids
        requests.append(
            Request(ids, options.max_new_tokens, options.temperature, seed=options.seed, stop_token_ids=stops)
        )
    runner = Runner(model, strategy)
    for text, result in zip(options.prompt, runner.generate(requests), strict=True):
        times = result.timings
        print(f"--- {text}\n{tokenizer.decode(result.token_ids, skip_special_tokens=True)}")
        rate = f", then {len(times.itl) / sum(times.itl):.1f} tokens/s" if times.itl else ""
        print(f"    [{len(result.token_ids)} tokens, {result.finish_reason}; first after {times.ttft:.2f} s{rate}]")
    print(json.dumps(strategy.stats()))
    return 0


def _parse_option(text: str) -> tuple[str, object]:
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--option takes NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _bench(options: argparse.Namespace) -> int:
    """The bench of the checkout around the current folder, else of the one that this package was installed from, in
    this process's place."""
    folders = [folder := Path.cwd(), *folder.parents, Path(__file__).resolve().parents[1]]
    roots = [
        root for root in folders if (root / "bench" / "__main__.py").exists() and (root / "kv_strategies").is_dir()
    ]
    if not roots:
        raise RuntimeError(
            "the bench is not part of the installed package, and there is no checkout of the project in or above "
            f"{Path.cwd()}. Get one (git clone), run `make patch` in it, and run this again from inside it"
        )
    path = os.pathsep.join(filter(None, [str(roots[0]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "bench", *options.extra]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})


def _explain(options: argparse.Namespace) -> int:
    importlib.import_module(f"kv_strategies.{options.strategy}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
