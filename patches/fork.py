"""The fork as a short patch series: build the patched tree, and export it again.

`patches/` is the whole fork. `upstream.txt` pins one source archive by its hash; `upstreams.txt` lists the tested
releases and the folder of patches that each takes. There `series` gives their order.

    upstream.txt ──fetch──> archive ──unpack──> commit, tag `upstream` ──git am──> one commit a patch
     patches/RELEASES/*.patch, series  <─────────refresh (git format-patch)──────────────┘

The tree, `transformers-dev/`, has a git repository of its own. It is built beside its place and moved there whole, so
an interrupted run leaves what was there before. A tree that holds work of yours (an uncommitted edit, a commit that the
series lacks, another branch, a stash) is never replaced. Identity and dates are fixed: the same pin and series give
the same commit ids on every machine, and import followed by export gives the same bytes.

Nothing but the standard library, git, and (to fetch) pip.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TREE = "transformers-dev"

# What a patch file looks like is fixed here, whatever the user's git is set to.
FORMAT_PATCH = (
    *("format-patch", "--no-numbered", "--zero-commit", "--no-signature", "--full-index", "--no-renames", "--no-color"),
    *("--no-ext-diff", "--no-textconv", "--no-attach", "--no-thread", "--diff-algorithm=myers", "--unified=3"),
    *("--stat=72", "--src-prefix=a/", "--dst-prefix=b/"),
)


class ForkError(Exception):
    """A condition the user can act on; the text says what was found and what to do."""


@dataclass(frozen=True)
class Pin:
    """One source archive, by name, version and sha256."""

    name: str
    version: str
    sha256: str

    @property
    def archive(self) -> str:
        return f"{self.name}-{self.version}.tar.gz"

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def verify(self, archive: Path) -> None:
        """Raise ForkError unless the file is the pinned one."""
        if not archive.is_file():
            raise ForkError(f"{archive}: there is no such file; SDIST= names the archive {self.archive}")
        actual = sha256(archive)
        if actual != self.sha256:
            raise ForkError(
                f"{archive} is not the pinned archive of {self}; nothing was unpacked\n"
                f"  expected sha256 {self.sha256}\n"
                f"  actual   sha256 {actual}"
            )


@dataclass(frozen=True)
class Release:
    """A release of upstream to build on, and the folder in `patches/` with the series it takes."""

    pin: Pin
    folder: str


def read_pins(path: Path) -> list[Pin]:
    """The pins of a file of pip requirements, one a line, each with one sha256."""
    form = r"([A-Za-z0-9._-]+)==(\S+) --hash=sha256:([0-9a-f]{64})"
    return [Pin(*row) for row in read_rows(path, form, "NAME==VERSION --hash=sha256:(64 hex digits)")]


def read_releases(path: Path) -> list[Release]:
    """The releases of a file of pip requirements, each behind the folder of its series."""
    form = r"([A-Za-z0-9._-]+) +([A-Za-z0-9._-]+)==(\S+) --hash=sha256:([0-9a-f]{64})"
    rows = read_rows(path, form, "FOLDER NAME==VERSION --hash=sha256:(64 hex digits)")
    return [Release(Pin(*pin), folder) for folder, *pin in rows]


def read_rows(path: Path, form: str, wanted: str) -> list[tuple[str, ...]]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(form, line.strip())
        if match is None:
            raise ForkError(f"{path}:{number}: expected {wanted}, found: {line}")
        rows.append(match.groups())
    return rows


class Fork:
    """The fork of one checkout: `root/patches` and `root/transformers-dev`."""

    def __init__(self, root: Path):
        self.root = root
        self.patches = root / "patches"
        self.tree = root / TREE
        self.cache = root / ".cache"
        self.new = root / f".{TREE}.new"
        self.old = root / f".{TREE}.old"

    # What the checkout asks for

    def pin(self) -> Pin:
        pins = read_pins(self.patches / "upstream.txt")
        if len(pins) != 1:
            raise ForkError(f"patches/upstream.txt names {len(pins)} archives; it pins exactly one")
        return pins[0]

    def tested(self) -> list[Release]:
        """The releases of `upstreams.txt`, newest first."""
        if not (releases := read_releases(self.patches / "upstreams.txt")):
            raise ForkError("patches/upstreams.txt lists no release")
        return releases

    def release(self, version: str | None = None) -> Release:
        """The release that is pinned, or the tested one of that version."""
        pin, tested = self.pin(), self.tested()
        if version in (None, pin.version):
            # A pin that is not among the tested ones is on its way there: the newest patches are tried on it.
            return next((release for release in tested if release.pin == pin), Release(pin, tested[0].folder))
        for release in tested:
            if release.pin.version == version:
                return release
        raise ForkError(
            f"{pin.name} {version} is not a tested release; UPSTREAM= takes one of "
            f"{', '.join(release.pin.version for release in tested)}. `make patch` alone builds on {pin.version}"
        )

    def series(self, release: Release) -> list[Path]:
        folder = self.patches / release.folder
        if not (folder / "series").is_file():
            raise ForkError(f"patches/{release.folder}/series is missing; it lists the patches for {release.pin}")
        names = [line.strip() for line in (folder / "series").read_text().splitlines()]
        paths = [folder / name for name in names if name and not name.startswith("#")]
        for path in paths:
            if not path.is_file():
                raise ForkError(f"patches/{release.folder}/series lists {path.name}, which is not there")
        return paths

    def inputs(self, release: Release) -> str:
        """A fingerprint of a pin and its series: a tree built from the same needs no rebuilding."""
        digest = hashlib.sha256(release.pin.requirement.encode())
        for path in self.series(release):
            digest.update(b"\0" + path.read_bytes())
        return digest.hexdigest()

    def places_of(self, release: Release) -> Release:
        """The release whose line numbers and file ids the series has: the newest of those that share it."""
        tested = self.tested()
        return next(one for one in tested if one.folder == release.folder) if release in tested else release

    def built_on(self) -> Release:
        """What the tree was built on."""
        return self.release(self.recorded("upstream") or None)

    # The verbs

    def patch(self, sdist: Path | None = None, keep_edits: bool = False, upstream: str | None = None) -> None:
        """Bring `transformers-dev` to the pin, or to the tested release `upstream`; a second run changes nothing.

        Raises ForkError, and leaves the tree as it is, where it holds work of the user's. With `keep_edits` a tree is
        used as it stands: with such work (what `make test` wants while a patch is being written), and on the release
        that was last chosen.
        """
        with self.locked():
            chosen = upstream or (self.recorded("chosen") if keep_edits else "")
            release = self.release(chosen or None)
            pin = release.pin
            if sdist is not None:
                pin.verify(sdist)
            work = self.work_in_tree()
            if work and keep_edits and upstream in (None, self.recorded("upstream")):
                print(f"{TREE}: used as it is, with work that the series lacks (make refresh exports commits)")
                return
            if work:
                raise ForkError(
                    f"{TREE} holds work that a rebuild would lose:\n{indent(work)}\n"
                    "Nothing was changed. To keep it: commit it there, then `make refresh`.\n"
                    f"To drop it: `rm -rf {TREE}/.git {TREE}/[!.]*`, then `make patch`."
                )
            if self.recorded("inputs") == self.inputs(release):
                self.choose(self.tree, release)
                if not keep_edits or (chosen and not upstream):
                    print(f"{self.describe(release)}, up to date")
                return
            self.build(release, self.fetch(pin, sdist))

    def refresh(self, check: bool = False, force: bool = False) -> None:
        """Export the commits of `transformers-dev` above `upstream` into `patches/`; with `check` only compare."""
        with self.locked():
            if not (self.tree / ".git").is_dir():
                raise ForkError(f"{TREE} has not been built; run `make patch` first")
            self.refuse_unfinished()
            if uncommitted := git(self.tree, "status", "--porcelain"):
                raise ForkError(
                    f"{TREE} has edits that are not committed, so no patch would hold them:\n{indent(uncommitted)}\n"
                    "Commit them there (or amend the commit they belong to), then run this again."
                )
            release = self.built_on()
            folder = self.patches / release.folder
            exported = self.export()
            present = {path.name: path.read_bytes() for path in sorted(folder.glob("[0-9]*.patch"))}
            present["series"] = (folder / "series").read_bytes()
            but = "byte for byte"
            if (places_of := self.places_of(release)) != release:
                exported = {name: keep_places(present.get(name), text) for name, text in exported.items()}
                but = f"but for line numbers, which are those of {places_of.pin}"
            if exported == present:
                print(f"patches/{folder.name} holds the {len(exported) - 1} commits of {TREE}, {but}")
            elif check:
                sys.stdout.write(difference(f"patches/{folder.name}", present, exported))
                raise ForkError(
                    f"patches/{folder.name} and the commits of {TREE} differ, as shown; `make refresh` exports them"
                )
            elif self.recorded("inputs") != self.inputs(release) and not force:
                raise ForkError(
                    f"patches/ has changed since {TREE} was built, and an export would overwrite that change.\n"
                    "Run `make patch` first to build the tree from it, or `make refresh FORCE=1` to overwrite it."
                )
            else:
                self.write(folder, exported, present)
            if not check:
                self.record(self.tree, release)

    def upstreams(self, into: Path) -> list[Path]:
        """Unpack every archive of `upstreams.txt` under `into`, apply its series with no fuzz; return the trees."""
        return [self.unpack_patched(release, self.fetch(release.pin), into) for release in self.tested()]

    def unpack_patched(self, release: Release, archive: Path, into: Path) -> Path:
        """A tree under `into`, without a history, patched with no fuzz; ForkError where a patch does not apply."""
        tree = into / f"{release.pin.name}-{release.pin.version}"
        shutil.rmtree(tree, ignore_errors=True)
        unpack(archive, tree)
        for path in self.series(release):
            # Its own ceiling, or git would take the tree for a part of the repository around it.
            done = run_git(tree, "apply", str(path), env={"GIT_CEILING_DIRECTORIES": str(into)})
            if done.returncode:
                raise ForkError(does_not_apply(path, release, done.stderr))
        return tree

    def clean(self) -> None:
        """Remove the tree, unless it holds work of the user's."""
        with self.locked():
            if work := self.work_in_tree():
                raise ForkError(f"{TREE} holds work that the series lacks, and stays:\n{indent(work)}")
            for path in self.tree.iterdir() if self.tree.is_dir() else ():
                if path.name != ".gitignore":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    # The archive

    def fetch(self, pin: Pin, sdist: Path | None = None) -> Path:
        """The pinned archive in `.cache/`: already there, copied from `sdist`, or fetched by pip."""
        cached = self.cache / pin.archive
        if sdist is None and cached.is_file() and sha256(cached) == pin.sha256:
            return cached
        with tempfile.TemporaryDirectory(dir=self.cache) as folder:
            if sdist is None:
                self.download(pin, Path(folder))
            else:
                shutil.copyfile(sdist, Path(folder, pin.archive))
            pin.verify(Path(folder, pin.archive))
            os.replace(Path(folder, pin.archive), cached)
        return cached

    def download(self, pin: Pin, folder: Path) -> None:
        """pip fetches the archive; it checks the hash before it opens it."""
        print(f"fetching {pin}", flush=True)
        wanted = folder / "upstream.txt"
        wanted.write_text(pin.requirement + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", pin.name]
        pip += ["--require-hashes", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(wanted)]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            said = indent((done.stderr + done.stdout).strip()[-2000:])
            if "DO NOT MATCH THE HASHES" in said:
                raise ForkError(f"{pin}: the archive is not the pinned one; nothing was unpacked\n{said}")
            raise ForkError(
                f"{pin} could not be fetched:\n{said}\n"
                f"Without a network, `make patch SDIST=FILE` takes an archive {pin.archive} that is already on disk."
            )

    # The tree

    def build(self, release: Release, archive: Path) -> None:
        """Build the tree beside its place, then move it there."""
        new, pin = self.new, release.pin
        print(f"unpacking {pin} into {TREE}", flush=True)
        try:
            unpack(archive, new)
            if (self.tree / ".gitignore").exists():
                shutil.copy(self.tree / ".gitignore", new)
            git(new, "init", "--quiet", "--initial-branch=main", "--template=")
            git(new, "config", "core.autocrlf", "false")
            (new / ".git/info").mkdir()
            (new / ".git/info/exclude").write_text("# belongs to the repository around this one\n/.gitignore\n")
            git(new, "add", "--all")
            message = f"{pin}, as published\n\n{pin.archive}\nsha256 {pin.sha256}\n"
            git(new, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", message)
            git(new, "tag", "upstream")
            stopped = self.apply(new, release)
            if stopped and (self.tree / ".git").is_dir():
                # The old tree has the files the patches were made for, which a three-way merge needs.
                git(new, "am", "--abort")
                git(new, "fetch", "--quiet", "--no-tags", str(self.tree), "HEAD")
                stopped = self.apply(new, release)
            resolvable = stopped and git(new, "ls-files", "--unmerged")
            if stopped and not resolvable:
                raise ForkError(f"{stopped}\nNothing was changed. Mend the patch, or see `Upgrading` in the README.")
            self.record(new, release, finished=not stopped)
            self.choose(new, release)
            self.swap()
        finally:
            shutil.rmtree(new, ignore_errors=True)
        if stopped:
            raise ForkError(
                f"{stopped}\nThe three-way merge left conflicts in {TREE}. Resolve them there, `git add` the files,\n"
                "`git am --continue`, then `make refresh` and `make test`."
            )
        print(self.describe(release))

    def describe(self, release: Release) -> str:
        other = "" if release.pin == self.pin() else f" (UPSTREAM=; the pin is {self.pin().version})"
        return f"{TREE}: {release.pin}{other} with the {len(self.series(release))} patches of patches/{release.folder}"

    def apply(self, tree: Path, release: Release) -> str:
        """`git am` the series, one commit a patch; the reason where it stopped, else an empty string."""
        series = self.series(release)
        if not series:
            return ""
        flags = ["--3way", "--quiet", "--committer-date-is-author-date", "--no-gpg-sign"]
        done = run_git(tree, "am", *flags, *map(str, series))
        if done.returncode == 0:
            return ""
        path = series[int((tree / ".git/rebase-apply/next").read_text()) - 1]
        # `git am --3way` does not say where; a dry run against the commit does.
        index = {"GIT_INDEX_FILE": str(tree / ".git/dry-run")}
        git(tree, "read-tree", "HEAD", env=index)
        dry = run_git(tree, "apply", "--check", "--cached", str(path), env=index)
        return does_not_apply(path, release, dry.stderr or done.stderr + done.stdout)

    def swap(self) -> None:
        if self.tree.exists():
            self.tree.rename(self.old)
        self.new.rename(self.tree)
        shutil.rmtree(self.old, ignore_errors=True)

    def record(self, tree: Path, release: Release, finished: bool = True) -> None:
        """Note in the tree's repository what it was built from, and which commit the series ends at."""
        git(tree, "config", "fork.inputs", self.inputs(release))
        git(tree, "config", "fork.upstream", release.pin.version)
        if finished:
            git(tree, "config", "fork.head", git(tree, "rev-parse", "HEAD"))

    def choose(self, tree: Path, release: Release) -> None:
        """Note that the tree stays on this release until another is asked for; one on the pin follows the pin."""
        git(tree, "config", "fork.chosen", "" if release.pin == self.pin() else release.pin.version)
        built = self.cache / "built.txt"  # changes when the release does: what is installed in .venv depends on it
        if not built.is_file() or built.read_text() != f"{release.pin.requirement}\n":
            built.write_text(f"{release.pin.requirement}\n")

    def recorded(self, key: str) -> str:
        return run_git(self.tree, "config", "--local", f"fork.{key}").stdout.strip()

    def work_in_tree(self) -> str:
        """What the tree holds that a rebuild would lose, in words; an empty string where there is nothing."""
        if not (self.tree / ".git").is_dir():
            foreign = [path.name for path in self.tree.glob("*") if path.name != ".gitignore"]
            return f"files without a repository: {', '.join(sorted(foreign)[:5])}" if foreign else ""
        self.refuse_unfinished()
        head = self.recorded("head") or git(self.tree, "rev-parse", "upstream")
        found = git(self.tree, "status", "--porcelain").splitlines()
        found += git(self.tree, "log", "--all", "HEAD", f"^{head}", "--format=commit %h %s").splitlines()
        if not found and git(self.tree, "rev-parse", "HEAD") != head:
            found = [f"HEAD is not where the series ends, at {head[:12]}"]
        return "\n".join(found[:20] + ["..."] * (len(found) > 20))

    def refuse_unfinished(self) -> None:
        if (self.tree / ".git/rebase-apply").exists() or (self.tree / ".git/rebase-merge").exists():
            raise ForkError(
                f"{TREE} is in the middle of applying patches. Resolve the conflicts there, `git add` the files,\n"
                "`git am --continue` (or `git rebase --continue`), then `make refresh`."
            )

    # The export

    def export(self) -> dict[str, bytes]:
        """The commits above `upstream` as patch files, with the `series` that lists them."""
        if merges := git(self.tree, "log", "--merges", "--format=%h %s", "upstream..HEAD"):
            raise ForkError(f"a series is a straight line, but {TREE} has merges; rebase them away:\n{indent(merges)}")
        with tempfile.TemporaryDirectory() as folder:
            git(self.tree, *FORMAT_PATCH, "--output-directory", folder, "upstream..HEAD")
            files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        files["series"] = "".join(f"{name}\n" for name in files).encode()
        return files

    def write(self, folder: Path, exported: dict[str, bytes], present: dict[str, bytes]) -> None:
        for name, text in exported.items():
            if present.get(name) != text:
                temporary = folder / f".{name}.new"
                temporary.write_bytes(text)
                os.replace(temporary, folder / name)
                print(f"wrote patches/{folder.name}/{name}")
        for name in present.keys() - exported.keys():
            (folder / name).unlink()
            print(f"removed patches/{folder.name}/{name}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One run at a time, beginning with what an interrupted one left."""
        self.cache.mkdir(exist_ok=True)
        with open(self.cache / "fork.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ForkError("another run is working on this checkout; wait for it to end") from None
            if self.new.exists():
                print(f"an earlier run was interrupted; its unfinished tree is cleared, {TREE} is as it was")
                shutil.rmtree(self.new)
            if self.old.exists() and not self.tree.exists():
                self.old.rename(self.tree)
            shutil.rmtree(self.old, ignore_errors=True)
            yield


def unpack(archive: Path, into: Path) -> None:
    """Unpack a source archive without its top folder; plain files only, modes 644 and 755."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(*Path(member.name).parts[1:])
            if member.isdir():
                continue
            if not member.isfile() or path.is_absolute() or ".." in path.parts or path.parts[:1] == (".git",):
                raise ForkError(f"{archive.name} holds {member.name}, which is no plain file below its top folder")
            target = into / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)
            target.chmod(0o755 if member.mode & 0o100 else 0o644)
            os.utime(target, (member.mtime, member.mtime))


def run_git(tree: Path, *args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """git in `tree` with a fixed identity and none of the user's settings, hooks or surrounding repository."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    clean |= {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_DATE": "2000-01-01T00:00:00+0000",
        "GIT_COMMITTER_DATE": "2000-01-01T00:00:00+0000",
        "LC_ALL": "C",
        "TZ": "UTC",
    }
    for role in ("AUTHOR", "COMMITTER"):
        clean |= {f"GIT_{role}_NAME": "InferKVCache", f"GIT_{role}_EMAIL": "inferkvcache@users.noreply.invalid"}
    # A checkout mounted from elsewhere belongs to another user; git heeds this setting on the command line only.
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "-c",
        "core.hooksPath=/dev/null",
        "-c",
        "gc.auto=0",
        "-C",
        str(tree),
        *args,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=clean | (env or {}), errors="surrogateescape")


def git(tree: Path, *args: str, env: dict[str, str] | None = None) -> str:
    done = run_git(tree, *args, env=env)
    if done.returncode:
        raise ForkError(f"git {' '.join(args[:3])} failed in {tree}:\n{indent(done.stderr or done.stdout)}")
    return done.stdout.rstrip("\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def does_not_apply(path: Path, release: Release, said: str) -> str:
    """The error for a patch that git refuses, from what git said: its first line tells which and where."""
    where = re.search(r"patch failed: (.+):(\d+)", said)
    place = f" at {where[1]}, line {where[2]}" if where else ""
    return f"patches/{path.parent.name}/{path.name} does not apply to {release.pin}{place}:\n{indent(said.strip())}"


def keep_places(present: bytes | None, exported: bytes) -> bytes:
    """The patch as it is present, where the exported one differs from it in line numbers and file ids alone."""

    def without_places(patch: bytes) -> bytes:
        patch = re.sub(rb"^index [0-9a-f]+\.\.[0-9a-f]+", b"index", patch, flags=re.MULTILINE)
        return re.sub(rb"^@@ -\d+(,\d+)? \+\d+(,\d+)? @@", rb"@@ -0\1 +0\2 @@", patch, flags=re.MULTILINE)

    return present if present and without_places(present) == without_places(exported) else exported


def difference(folder: str, present: dict[str, bytes], exported: dict[str, bytes]) -> str:
    lines: list[str] = []
    for name in sorted(present.keys() | exported.keys()):
        before, after = (
            side.get(name, b"").decode(errors="replace").splitlines(keepends=True) for side in (present, exported)
        )
        lines += difflib.unified_diff(before, after, f"{folder}/{name}", f"{TREE}: {name}")
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fork.py", description="Build and export the patched tree.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True)
    patch = verbs.add_parser("patch", help="bring transformers-dev to a release and its series")
    patch.add_argument("--sdist", type=Path, metavar="FILE", help="the pinned archive, already on disk")
    patch.add_argument("--keep-edits", action="store_true", help="use a tree that holds work of yours as it is")
    patch.add_argument("--upstream", metavar="VERSION", help="a tested release to build on in place of the pin")
    refresh = verbs.add_parser("refresh", help="export the commits of transformers-dev into patches/")
    refresh.add_argument("--check", action="store_true", help="only compare; fail where they differ")
    refresh.add_argument("--force", action="store_true", help="overwrite patches that changed since the build")
    upstreams = verbs.add_parser("upstreams", help="unpack and patch every release of upstreams.txt")
    upstreams.add_argument("--into", type=Path, required=True, metavar="DIR")
    verbs.add_parser("clean", help="remove transformers-dev, unless it holds work of yours")
    args = parser.parse_args(argv)
    fork = Fork(args.root)
    try:
        if args.verb == "patch":
            fork.patch(args.sdist, args.keep_edits, args.upstream or None)
        elif args.verb == "refresh":
            fork.refresh(args.check, args.force)
        elif args.verb == "upstreams":
            print(*fork.upstreams(args.into.resolve()), sep="\n")
        else:
            fork.clean()
    except ForkError as error:
        print(f"{args.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{args.verb}: interrupted; nothing was changed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
