"""`make upstream-news`: what the index offers beyond the tested releases, and whether it fits; one line a release.

    transformers 5.25.0: patches/5.24 applies, 37 passed in 30.1s, sha256 0a1b...
    transformers 5.26.0: patches/5.24 applies, FAILED tests/test_generate.py::test_crop - KeyError: ..., sha256 2c3d...
    transformers 5.27.0: patches/5.24/0001-Let-a-cache-compute-the-attention.patch does not apply at FILE, line 248

Newer is what has a higher version than the newest tested release. Its archive is not pinned yet, so the hash is printed
and not checked. The tests are the fast ones for equality; `make test-upstreams` has them all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from fork import Fork, ForkError, Pin, Release, sha256

FAST_TESTS = ("tests/test_upstream.py", "tests/test_generate.py")


def news(fork: Fork) -> Iterator[str]:
    """A line a newer release, oldest first, or one line that says there is none. Raises ForkError without an index."""
    newest = fork.tested()[0]
    name = newest.pin.name
    versions = sorted(Version(version) for version in offered(name))
    newer = [str(version) for version in versions if version > Version(newest.pin.version)]
    for version in newer:
        yield f"{name} {version}: {verdict(fork, name, version)}"
    if not newer:
        yield f"the index offers nothing newer than {newest.pin}"


def verdict(fork: Fork, name: str, version: str) -> str:
    """Whether the newest series applies to that release, and the fast tests pass on it."""
    (fork.root / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="news-", dir=fork.root / "build") as folder:
        try:
            archive = download(name, version, Path(folder))
        except ForkError as error:
            return f"its source archive could not be fetched ({error})"
        release = Release(Pin(name, version, sha256(archive)), fork.tested()[0].folder)
        try:
            tree = fork.unpack_patched(release, archive, Path(folder).resolve())
        except ForkError as error:
            return str(error).splitlines()[0].replace(f" to {release.pin}", "").rstrip(":")
        return f"patches/{release.folder} applies, {run_tests(fork.root, tree)}, sha256 {release.pin.sha256}"


def offered(name: str) -> list[str]:
    """The versions in the index that pip is set up for, without pre-releases."""
    done = pip("index", "versions", name)
    found = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise ForkError(
            f"the index that pip is set up for does not answer for {name}, so what is new is not known:\n"
            f"  {last_line(done.stderr)}"
        )
    return [version.strip() for version in found[1].split(",")]


def download(name: str, version: str, folder: Path) -> Path:
    """The source archive of a release that is not pinned."""
    done = pip("download", "--quiet", "--no-deps", "--no-binary", name, "--dest", str(folder), f"{name}=={version}")
    archive = folder / f"{name}-{version}.tar.gz"
    if done.returncode or not archive.is_file():
        raise ForkError(last_line(done.stderr))
    return archive


def run_tests(root: Path, tree: Path) -> str:
    """What pytest says last, or the first test that fails."""
    path = os.pathsep.join([str(tree / "src"), os.environ.get("PYTHONPATH") or str(root)])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "upstream", "-p", "no:cacheprovider", *FAST_TESTS]
    done = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    failed = re.search(r"^(FAILED|ERROR) .+$", done.stdout, re.MULTILINE)
    return failed[0] if done.returncode and failed else last_line(done.stdout or done.stderr)


def pip(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(command, capture_output=True, text=True)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]


def main() -> int:
    try:
        for line in news(Fork(Path(__file__).resolve().parent.parent)):
            print(line, flush=True)
    except ForkError as error:
        print(f"upstream-news: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
