"""Rebuild a checkout from the parts of `make bundle`, on a host without a network.

    python3 rebuild.py --into FOLDER [--parts DIR] [--python INTERPRETER]

Checks every part and the whole against `manifest.json`, unpacks into a new folder, and runs `make patch` and
`make model` there with an interpreter that already has torch. Nothing is installed into it. Afterwards, in FOLDER,
`make bench PYTHON=INTERPRETER` and `make test PYTHON=INTERPRETER` work as anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


class RebuildError(Exception):
    """A part is missing or damaged, or the folder is taken; the text says which."""


def join(parts: Path, manifest: dict, whole: Path) -> None:
    """Write the parts, each checked, one after another; then check the whole."""
    total = hashlib.sha256()
    with open(whole, "wb") as sink:
        for part in manifest["parts"]:
            path = parts / part["name"]
            if not path.is_file():
                raise RebuildError(f"{path} is missing; the bundle has {len(manifest['parts'])} parts")
            data = path.read_bytes()
            if (found := hashlib.sha256(data).hexdigest()) != part["sha256"]:
                raise RebuildError(f"{path} is damaged: expected sha256 {part['sha256']}, found {found}; copy it again")
            total.update(data)
            sink.write(data)
    if total.hexdigest() != manifest["sha256"]:
        raise RebuildError("the joined parts are not the whole that manifest.json names; copy the bundle again")


def unpack(whole: Path, commit: str, into: Path) -> None:
    """The repository at `commit`, with the other files in their places."""
    with tarfile.open(whole) as tar:
        for member in tar:
            if not member.isfile() or member.name.startswith("/") or ".." in Path(member.name).parts:
                raise RebuildError(f"the bundle holds {member.name}, which is no plain file below its top folder")
            target = into / member.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)
    run(["git", "init", "--quiet", "--initial-branch=main"], into)
    run(["git", "fetch", "--quiet", "history", "HEAD:refs/heads/bundle"], into)
    run(["git", "reset", "--quiet", "--hard", commit], into)
    run(["git", "branch", "--quiet", "-D", "bundle"], into)
    (into / "history").unlink()


def run(command: list[str], folder: Path) -> None:
    print("$", *command, flush=True)
    if subprocess.run(command, cwd=folder).returncode:
        raise RebuildError(f"`{' '.join(command)}` failed in {folder}")


def main() -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(prog="rebuild.py", description="Rebuild a checkout from the parts of a bundle.")
    parser.add_argument("--into", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument(
        "--parts", type=Path, default=here, help="where the parts and manifest.json lie (default: here)"
    )
    parser.add_argument("--python", default=sys.executable, help="an interpreter with torch (default: this one)")
    args = parser.parse_args()
    into = args.into.resolve()
    # A path holds from the new folder too; a symbolic link is kept, for it is what makes a virtual environment one.
    python = str(Path(args.python).absolute()) if "/" in args.python else args.python
    try:
        if into.exists():
            raise RebuildError(f"{into} exists; name a folder that does not, or remove it")
        if not (args.parts / "manifest.json").is_file():
            raise RebuildError(f"{args.parts} holds no manifest.json; --parts names the folder of the bundle")
        manifest = json.loads((args.parts / "manifest.json").read_text())
        into.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into.parent) as scratch:
            join(args.parts, manifest, Path(scratch, "whole"))
            unpack(Path(scratch, "whole"), manifest["commit"], Path(scratch, "checkout"))
            Path(scratch, "checkout").rename(into)
        for target in ("patch", "model"):
            run(["make", target, f"PYTHON={python}"], into)
    except RebuildError as error:
        print(f"rebuild: {error}", file=sys.stderr)
        return 1
    print(f"{into} is ready: cd there, then make bench PYTHON={python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
