"""`make bundle`: a checkout with all it needs, in parts, for a host without a network.

    build/bundle/  rebuild.py  manifest.json  part-00  part-01 ...

The parts, joined, are one tar: the repository with its history (so that results there name the right commit), and what
`make patch` and `make model` would fetch, in the places where they look first. `rebuild.py` needs nothing but Python
and git and runs both commands with the host's own interpreter.

The host brings torch, triton, numpy, safetensors, tokenizers, huggingface_hub, regex, typer, pyyaml, tqdm, requests and
matplotlib; for the tests also pytest, pytest-xdist and hypothesis. `wheels.txt` lists the pure-Python wheels that
travel along. The model travels as its gguf file, a fifth of the size of the float32 weights made from it.

The same commit gives the same parts: order, times and owners in the tar are fixed.
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
import zipfile
from pathlib import Path

from fork import Fork, ForkError, git, read_pins, run_git

PART_SIZE = 56 << 20  # bytes; what may be carried to such a host in one go is often 64 MiB


def collect(root: Path, scratch: Path) -> dict[str, Path]:
    """Name in the rebuilt checkout -> file here, for all that git does not hold."""
    from kv_strategies.models.fetch import GGUF_NAME, TEXT_NAME

    fork = Fork(root)
    pin = fork.pin()
    files = {f".cache/{pin.archive}": fork.fetch(pin)}
    for name in (GGUF_NAME, TEXT_NAME):
        files[f"models/{name}"] = root / "models" / name
    site = scratch / "site"
    for wheel in download_wheels(fork.patches / "wheels.txt", scratch / "wheels"):
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(site)
    return files | {f".cache/site/{p.relative_to(site)}": p for p in site.rglob("*") if p.is_file()}


def download_wheels(pins: Path, folder: Path) -> list[Path]:
    """The wheels that `pins` lists, fetched by pip, which checks their hashes."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--require-hashes",
    ]
    done = subprocess.run([*pip, "--dest", str(folder), "--requirement", str(pins)], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != len(read_pins(pins)):
        raise ForkError(f"the wheels of {pins.name} could not be fetched:\n{done.stderr.strip()}")
    return wheels


def write_bundle(root: Path, files: dict[str, Path], into: Path, part_size: int = PART_SIZE) -> dict:
    """Write HEAD of the repository at `root` and `files` as a bundle to the folder `into`; return its manifest.

    Raises ForkError where a file is missing. What `into` held is replaced at the end.
    """
    for name, path in files.items():
        if not path.is_file():
            raise ForkError(f"{name} is missing; `make patch` and `make model` bring it")
    into.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".bundle-", dir=into.parent))
    try:
        commit = git(root, "rev-parse", "HEAD")
        history = new / "history"
        git(root, "-c", "pack.threads=1", "bundle", "create", "--quiet", str(history), "HEAD")
        whole = new / "whole"
        write_tar(whole, files | {"history": history})
        history.unlink()
        manifest = {"commit": commit, "sha256": sha256(whole.read_bytes()), "parts": []}
        with open(whole, "rb") as file:
            while data := file.read(part_size):
                name = f"part-{len(manifest['parts']):02}"
                (new / name).write_bytes(data)
                manifest["parts"].append({"name": name, "size": len(data), "sha256": sha256(data)})
        whole.unlink()
        (new / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        shutil.copy(Path(__file__).with_name("rebuild.py"), new)
        new.chmod(0o755)
        shutil.rmtree(into, ignore_errors=True)
        new.rename(into)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return manifest


def write_tar(path: Path, files: dict[str, Path]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(name)  # time 0, owner 0, mode 644
            member.size = files[name].stat().st_size
            with open(files[name], "rb") as file:
                tar.addfile(member, file)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(prog="bundle.py", description="Write a bundle for a host without a network.")
    parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    into = root / "build/bundle"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            manifest = write_bundle(root, collect(root, Path(scratch)), into)
    except ForkError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    for part in manifest["parts"]:
        print(f"{part['name']}  {part['size'] / (1 << 20):.1f} MiB")
    print(f"build/bundle holds commit {manifest['commit'][:12]}; on the host: python3 rebuild.py --into FOLDER")
    if run_git(root, "status", "--porcelain").stdout:
        print("bundle: changes that are not committed are not in it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
