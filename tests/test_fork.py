"""The tool behind `make patch` and `make refresh`: on a made-up archive, and the real series on the real one."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

import fork
from kv_strategies.step.upstream import CACHE, with_cache

ROOT = Path(__file__).resolve().parent.parent
LLAMA = "src/transformers/models/llama/modeling_llama.py"


IDENTITY = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com", "-c", "commit.gpgsign=false"]


class Checkout:
    """A checkout with a fork of a made-up project: one file of forty lines, two patches."""

    def __init__(self, root: Path):
        self.root = root
        self.tree = root / "transformers-dev"
        self.patches = root / "patches"
        self.folder = self.patches / "1.0"
        self.model = self.tree / "src/model.py"
        self.folder.mkdir(parents=True)
        self.tree.mkdir(exist_ok=True)
        (self.tree / ".gitignore").write_text("__pycache__/\n")
        self.sdist = self.archive("1.0", self.lines())
        (self.patches / "upstreams.txt").write_text(f"1.0  {(self.patches / 'upstream.txt').read_text()}")
        (self.folder / "series").write_text("")
        self.patch("--sdist", self.sdist)
        self.commit("Say more in line 5", {5: "line 5 and more"})
        self.commit("Say more in line 30", {30: "line 30 and more"})
        self.run("refresh")

    @staticmethod
    def lines(**changed: str) -> list[str]:
        return [changed.get(f"line{n}", f"line {n}") for n in range(1, 41)]

    def archive(self, version: str, lines: list[str]) -> Path:
        """Make a source archive and pin it."""
        path = self.root / f"made-up-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, text in {"setup.py": "pass\n", "src/model.py": "\n".join(lines) + "\n"}.items():
                member = tarfile.TarInfo(f"made-up-{version}/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (self.patches / "upstream.txt").write_text(f"made-up=={version} --hash=sha256:{digest}\n")
        return path

    def run(self, *args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        done = self.attempt(*args, env=env)
        assert done.returncode == 0, done.stderr
        return done

    def attempt(self, *args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, ROOT / "patches/fork.py", "--root", self.root, *args]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))

    def patch(self, *args: str | Path) -> str:
        return self.run("patch", *args).stdout

    def fails(self, *args: str | Path, env: dict[str, str] | None = None) -> str:
        """Run what must fail with a plain message, and change nothing in patches/ or the tree."""
        before = self.snapshot()
        done = self.attempt(*args, env=env)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert self.snapshot() == before
        return done.stderr

    def snapshot(self) -> dict[str, bytes]:
        files = [
            p for top in (self.tree, self.patches) for p in top.rglob("*") if p.is_file() and ".git" not in p.parts
        ]
        return {str(p.relative_to(self.root)): p.read_bytes() for p in files}

    def git(self, *args: str) -> str:
        return subprocess.run(
            ["git", *IDENTITY, *args], cwd=self.tree, check=True, capture_output=True, text=True
        ).stdout

    def edit(self, changed: dict[int, str]) -> None:
        lines = self.model.read_text().splitlines()
        for number, text in changed.items():
            lines[number - 1] = text
        self.model.write_text("\n".join(lines) + "\n")

    def commit(self, message: str, changed: dict[int, str]) -> None:
        self.edit(changed)
        self.git("commit", "--quiet", "--all", "--message", message)

    def replace_in_patch(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


FIRST, SECOND = "0001-Say-more-in-line-5.patch", "0002-Say-more-in-line-30.patch"


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path / "checkout")


# Building and exporting


def test_the_tree_is_upstream_and_one_commit_a_patch(checkout):
    assert checkout.git("log", "--format=%s").splitlines() == [
        "Say more in line 30",
        "Say more in line 5",
        "made-up 1.0, as published",
    ]
    assert checkout.git("describe", "--tags", "HEAD~2").strip() == "upstream"
    assert checkout.git("status", "--porcelain") == ""
    assert (checkout.folder / "series").read_text().split() == [FIRST, SECOND]


def test_a_second_run_changes_nothing(checkout):
    before = checkout.git("rev-parse", "HEAD"), checkout.model.stat().st_mtime_ns
    assert "up to date" in checkout.patch()
    assert (checkout.git("rev-parse", "HEAD"), checkout.model.stat().st_mtime_ns) == before


def test_import_then_export_gives_the_same_bytes_and_every_machine_the_same_commits(checkout, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkout.patches, other / "patches")
    heads = []
    for home in ("plain", "odd"):
        shutil.rmtree(other / "transformers-dev", ignore_errors=True)
        (tmp_path / home).mkdir()
        # A user whose git signs, rewrites line ends, renames branches and runs under a hook of the outer repository.
        config = (
            ""
            if home == "plain"
            else (
                "[user]\nname = Odd\nemail = odd@example.com\n[commit]\ngpgsign = true\n[core]\nautocrlf = true\n"
                "[init]\ndefaultBranch = trunk\n[format]\nnumbered = true\nsignature = odd\n[diff]\nnoprefix = true\n"
            )
        )
        (tmp_path / home / ".gitconfig").write_text(config)
        env = {"HOME": str(tmp_path / home), "GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere", "TZ": "Asia/Tokyo"}
        fork_py = [sys.executable, ROOT / "patches/fork.py", "--root", other]
        subprocess.run([*fork_py, "patch", "--sdist", checkout.sdist], check=True, env=os.environ | env)
        subprocess.run([*fork_py, "refresh", "--check"], check=True, env=os.environ | env)
        git = ["git", "-C", other / "transformers-dev", "rev-parse", "HEAD"]
        heads.append(subprocess.run(git, check=True, capture_output=True).stdout)
    assert heads[0] == heads[1]
    for path in checkout.folder.iterdir():
        assert (other / "patches/1.0" / path.name).read_bytes() == path.read_bytes()


def test_refresh_writes_new_patches_and_removes_dropped_ones(checkout):
    checkout.git("reset", "--quiet", "--hard", "HEAD~1")
    checkout.commit("Say less in line 20", {20: "line"})
    message = checkout.fails("refresh", "--check")
    assert "make refresh" in message
    checkout.run("refresh")
    assert (checkout.folder / "series").read_text().split() == [FIRST, "0002-Say-less-in-line-20.patch"]
    assert not (checkout.folder / SECOND).exists()
    checkout.run("refresh", "--check")
    assert "up to date" in checkout.patch()


def test_refresh_check_prints_the_difference(checkout):
    checkout.git("commit", "--quiet", "--amend", "--message", "Say more in line 30, by hand")
    done = checkout.attempt("refresh", "--check")
    assert done.returncode == 1
    assert "+Subject: [PATCH] Say more in line 30, by hand" in done.stdout


def test_refresh_never_overwrites_patches_that_changed_since_the_build(checkout):
    checkout.replace_in_patch(SECOND, "+line 30 and more", "+line 30 and much more")
    assert "make patch" in checkout.fails("refresh")
    checkout.patch()
    assert "line 30 and much more" in checkout.model.read_text()


def test_a_changed_series_rebuilds_a_clean_tree(checkout):
    (checkout.folder / "series").write_text(f"{FIRST}\n")
    checkout.patch()
    assert "line 5 and more" in checkout.model.read_text()
    assert "line 30 and more" not in checkout.model.read_text()
    assert (checkout.tree / ".gitignore").read_text() == "__pycache__/\n"


def test_both_repositories_stay_clean(tmp_path):
    root = tmp_path / "outer"
    (root / "transformers-dev").mkdir(parents=True)
    (root / "transformers-dev/.gitignore").write_text("__pycache__/\n")
    shutil.copy(ROOT / ".gitignore", root)
    for args in (["init", "--quiet"], ["add", "--all"], [*IDENTITY, "commit", "--quiet", "--message", "Begin"]):
        subprocess.run(["git", *args], cwd=root, check=True)
    checkout = Checkout(root)
    checkout.sdist.unlink()
    shutil.rmtree(checkout.patches)
    (checkout.tree / "__pycache__").mkdir()
    (checkout.tree / "__pycache__/x.pyc").touch()
    for folder in (root, checkout.tree):
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=all"], cwd=folder, capture_output=True
        )
        assert (status.returncode, status.stdout) == (0, b"")


# Bad input: a clear error, and nothing lost


def test_a_wrong_hash_names_both_and_unpacks_nothing(checkout):
    wrong = checkout.root / "wrong.tar.gz"
    wrong.write_bytes(checkout.sdist.read_bytes() + b"x")
    message = checkout.fails("patch", "--sdist", wrong)
    assert "nothing was unpacked" in message
    assert hashlib.sha256(wrong.read_bytes()).hexdigest() in message
    assert hashlib.sha256(checkout.sdist.read_bytes()).hexdigest() in message


def test_pip_checks_the_hash_too(checkout):
    checkout.archive("2.0", checkout.lines(line1="another"))
    pin = (checkout.patches / "upstream.txt").read_text()
    (checkout.patches / "upstream.txt").write_text(re.sub("[0-9a-f]{64}", "0" * 64, pin))
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout.root), "PIP_CONFIG_FILE": os.devnull}
    message = checkout.fails("patch", env=env)
    assert "not the pinned one; nothing was unpacked" in message


def test_no_network_says_how_to_do_without(checkout):
    shutil.rmtree(checkout.root / ".cache")
    checkout.archive("2.0", checkout.lines())
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    nowhere |= {"PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    assert "SDIST=FILE" in checkout.fails("patch", env=nowhere)


def test_a_missing_archive_is_named(checkout):
    assert "no such file" in checkout.fails("patch", "--sdist", checkout.root / "nowhere.tar.gz")


def test_a_bad_list_of_releases_is_named(checkout):
    for text in ("", f"{(checkout.patches / 'upstream.txt').read_text()}", "1.0  made-up==1.0\n"):
        (checkout.patches / "upstreams.txt").write_text(text)
        assert "upstreams.txt" in checkout.fails("patch")


@pytest.mark.parametrize("pin", ["made-up\n", "made-up==1.0\n", "made-up>=1 --hash=sha256:" + "0" * 64 + "\n", ""])
def test_a_bad_pin_is_named(checkout, pin):
    (checkout.patches / "upstream.txt").write_text(pin)
    assert "upstream.txt" in checkout.fails("patch")


def test_a_series_that_lists_a_missing_patch_is_named(checkout):
    (checkout.folder / SECOND).unlink()
    assert SECOND in checkout.fails("patch")


@pytest.mark.parametrize("work", ["edit", "new file", "commit", "branch", "stash", "dropped commit"])
def test_work_in_the_tree_is_never_lost(checkout, work):
    match work:
        case "edit":
            checkout.edit({12: "mine"})
        case "new file":
            (checkout.tree / "src/mine.py").write_text("mine\n")
        case "commit":
            checkout.commit("Mine", {12: "mine"})
        case "branch":
            checkout.git("checkout", "--quiet", "-b", "mine")
            checkout.commit("Mine", {12: "mine"})
            checkout.git("checkout", "--quiet", "main")
        case "stash":
            checkout.edit({12: "mine"})
            checkout.git("stash")
        case "dropped commit":
            checkout.git("reset", "--quiet", "--hard", "HEAD~1")
    (checkout.folder / "series").write_text(f"{FIRST}\n")  # a rebuild is due
    assert "make refresh" in checkout.fails("patch")
    checkout.fails("clean")
    before = checkout.snapshot()
    assert "as it is" in checkout.patch("--keep-edits")
    assert checkout.snapshot() == before


def test_uncommitted_edits_are_not_exported_in_silence(checkout):
    checkout.edit({12: "mine"})
    assert "not committed" in checkout.fails("refresh")
    assert "not committed" in checkout.fails("refresh", "--check")


def test_files_without_a_repository_are_left_alone(checkout):
    shutil.rmtree(checkout.tree / ".git")
    assert "without a repository" in checkout.fails("patch")


def test_clean_leaves_only_the_gitignore(checkout):
    checkout.run("clean")
    assert [path.name for path in checkout.tree.iterdir()] == [".gitignore"]
    checkout.patch()
    assert checkout.model.exists()


KILL = """
import os, pathlib, signal, sys
import fork
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
moment, rename = sys.argv[2], pathlib.Path.rename
if moment == "between the renames":
    pathlib.Path.rename = lambda path, to: die() if path.name.endswith(".new") else rename(path, to)
else:
    setattr(fork.Fork, moment, die)
fork.Fork(pathlib.Path(sys.argv[1])).patch()
"""


@pytest.mark.parametrize("moment", ["apply", "swap", "between the renames"])
def test_an_interrupted_run_is_made_good_by_the_next(checkout, moment):
    before = checkout.snapshot()
    (checkout.folder / "series").write_text(f"{FIRST}\n")
    killed = subprocess.run([sys.executable, "-c", KILL, checkout.root, moment], cwd=ROOT / "patches")
    assert killed.returncode == -signal.SIGKILL
    if moment != "between the renames":
        after = checkout.snapshot()
        assert {name: after[name] for name in before if name != "patches/1.0/series"} == {
            name: text for name, text in before.items() if name != "patches/1.0/series"
        }
    assert "interrupted" in checkout.patch()
    assert "line 5 and more" in checkout.model.read_text()
    assert "line 30 and more" not in checkout.model.read_text()
    assert (checkout.tree / ".gitignore").exists()
    leftovers = {path.name for path in checkout.root.iterdir() if path.name.startswith(".transformers-dev")}
    assert leftovers == set()


def test_two_runs_at_once_do_not_mix(checkout):
    with fork.Fork(checkout.root).locked():
        assert "another run" in checkout.fails("patch")


def test_a_patch_that_no_longer_applies_names_patch_file_and_line(checkout):
    checkout.replace_in_patch(SECOND, " line 28\n", " line 28 as it was\n")
    message = checkout.fails("patch")
    assert SECOND in message
    assert re.search(r"src/model\.py, line 2\d", message)


def test_a_patch_that_is_no_patch_is_named(checkout):
    (checkout.folder / SECOND).write_text("nothing of the kind\n")
    assert SECOND in checkout.fails("patch")


# Another upstream


def test_another_upstream_is_taken_where_the_series_applies(checkout):
    sdist = checkout.archive("2.0", checkout.lines(line15="line 15 of 2.0"))
    checkout.patch("--sdist", sdist)
    assert "line 15 of 2.0" in checkout.model.read_text()
    assert "line 30 and more" in checkout.model.read_text()
    checkout.run("refresh")
    checkout.run("refresh", "--check")


def test_another_upstream_is_merged_three_way(checkout):
    # Line 28 is context of the second patch, so that it does not apply as it stands.
    sdist = checkout.archive("2.0", checkout.lines(line28="line 28 of 2.0"))
    checkout.patch("--sdist", sdist)
    text = checkout.model.read_text()
    assert "line 28 of 2.0" in text
    assert "line 30 and more" in text
    checkout.run("refresh")
    assert " line 28 of 2.0" in (checkout.folder / SECOND).read_text()


def test_a_conflict_is_left_to_be_resolved(checkout):
    sdist = checkout.archive("2.0", checkout.lines(line30="line 30 of 2.0"))
    done = checkout.attempt("patch", "--sdist", sdist)
    assert done.returncode == 1
    assert SECOND in done.stderr
    assert "git am --continue" in done.stderr
    assert "<<<<<<<" in checkout.model.read_text()
    for verb in ("patch", "refresh"):
        assert "in the middle of" in checkout.fails(verb)

    checkout.model.write_text(
        "\n".join(checkout.lines(line5="line 5 and more", line30="line 30 of 2.0 and more")) + "\n"
    )
    checkout.git("add", "src/model.py")
    checkout.git("am", "--continue")
    assert "make refresh" in checkout.fails("patch")
    checkout.run("refresh")
    checkout.run("refresh", "--check")
    assert "up to date" in checkout.patch()
    assert "+line 30 of 2.0 and more" in (checkout.folder / SECOND).read_text()


# Several releases, each with its series


@pytest.fixture
def two_releases(checkout) -> Checkout:
    """2.0 is the pin and has patches of its own: line 30 is another there, and so is the second patch."""
    text = (checkout.patches / "upstreams.txt").read_text()
    shutil.copytree(checkout.folder, checkout.patches / "2.0")
    checkout.folder = checkout.patches / "2.0"
    checkout.replace_in_patch(SECOND, "-line 30\n+line 30 and more", "-line 30 of 2.0\n+line 30 of 2.0 and more")
    checkout.archive("2.0", checkout.lines(line30="line 30 of 2.0"))
    (checkout.patches / "upstreams.txt").write_text(f"2.0  {(checkout.patches / 'upstream.txt').read_text()}{text}")
    (checkout.root / ".cache").mkdir(exist_ok=True)
    shutil.copy(checkout.root / "made-up-2.0.tar.gz", checkout.root / ".cache")
    assert "made-up 2.0 with the 2 patches of patches/2.0" in checkout.patch()
    return checkout


def built(checkout: Checkout) -> str:
    """The release that the tree is built on, as the stamp for what is installed says too."""
    subject = checkout.git("log", "-1", "--format=%s", "upstream").strip()
    stamp = (checkout.root / ".cache/built.txt").read_text()
    assert stamp.startswith(subject.removesuffix(", as published").replace(" ", "==") + " --hash")
    assert ("line 30 of 2.0 and more" in checkout.model.read_text()) == ("2.0" in subject)
    return subject.split()[1].rstrip(",")


def test_another_tested_release_takes_its_own_patches_and_stays_until_the_pin_is_asked_for(two_releases):
    said = two_releases.patch("--upstream", "1.0")
    assert "made-up 1.0 (UPSTREAM=; the pin is 2.0) with the 2 patches of patches/1.0" in said
    assert built(two_releases) == "1.0"
    assert "made-up 1.0" in two_releases.patch("--keep-edits"), "`make test` and `make bench` use it, and say so"
    assert built(two_releases) == "1.0"
    assert "up to date" in two_releases.patch("--upstream", "1.0")
    two_releases.patch()
    assert built(two_releases) == "2.0"
    two_releases.patch("--upstream", "1.0")
    two_releases.patch("--upstream", "2.0")
    assert two_releases.patch("--keep-edits") == ""
    assert built(two_releases) == "2.0"


def test_a_tree_on_the_pin_follows_the_pin(two_releases):
    pins = (two_releases.patches / "upstreams.txt").read_text().splitlines()
    (two_releases.patches / "upstream.txt").write_text(pins[1].split(maxsplit=1)[1] + "\n")
    two_releases.patch("--keep-edits")
    assert built(two_releases) == "1.0"


def test_a_release_that_is_not_tested_is_refused_with_those_that_are(two_releases):
    message = two_releases.fails("patch", "--upstream", "1.5")
    assert "made-up 1.5 is not a tested release" in message
    assert "2.0, 1.0" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("options", [(), ("--keep-edits",)])
def test_a_choice_of_release_never_loses_edits(two_releases, options):
    two_releases.edit({12: "mine"})
    assert "make refresh" in two_releases.fails("patch", "--upstream", "1.0", *options)
    assert "as it is" in two_releases.patch("--upstream", "2.0", "--keep-edits")


def test_refresh_writes_to_the_series_that_the_tree_was_built_with(two_releases):
    newest = {path.name: path.read_bytes() for path in two_releases.folder.iterdir()}
    two_releases.patch("--upstream", "1.0")
    two_releases.run("refresh", "--check")
    two_releases.commit("Say less in line 20", {20: "line"})
    assert "+Subject: [PATCH] Say less in line 20" in two_releases.attempt("refresh", "--check").stdout
    two_releases.run("refresh")
    two_releases.run("refresh", "--check")
    assert (two_releases.patches / "1.0/0003-Say-less-in-line-20.patch").is_file()
    assert {path.name: path.read_bytes() for path in two_releases.folder.iterdir()} == newest
    assert "up to date" in two_releases.patch("--upstream", "1.0")


def test_a_series_has_the_line_numbers_of_the_newest_of_its_releases(checkout):
    upstreams = checkout.patches / "upstreams.txt"
    newest = (checkout.patches / "upstream.txt").read_text()
    sdist = checkout.archive("0.9", ["line 0", *checkout.lines()])
    upstreams.write_text(f"{upstreams.read_text()}1.0  {(checkout.patches / 'upstream.txt').read_text()}")
    (checkout.patches / "upstream.txt").write_text(newest)
    before = {path.name: path.read_bytes() for path in checkout.folder.iterdir()}
    checkout.patch("--upstream", "0.9", "--sdist", sdist)
    assert "those of made-up 1.0" in checkout.run("refresh", "--check").stdout
    checkout.run("refresh")
    assert {path.name: path.read_bytes() for path in checkout.folder.iterdir()} == before
    checkout.git("commit", "--quiet", "--amend", "--message", "Say more in line 30, by hand")
    assert "+Subject: [PATCH] Say more in line 30, by hand" in checkout.attempt("refresh", "--check").stdout
    checkout.run("refresh")
    assert (checkout.folder / FIRST).read_bytes() == before[FIRST]
    assert "@@ -28,7 +28,7 @@" in (checkout.folder / "0002-Say-more-in-line-30-by-hand.patch").read_text()
    checkout.patch()
    checkout.run("refresh")  # on the newest again: its numbers
    assert "@@ -27,7 +27,7 @@" in (checkout.folder / "0002-Say-more-in-line-30-by-hand.patch").read_text()
    checkout.run("refresh", "--check")


def test_every_release_is_patched_with_its_series(two_releases):
    trees = two_releases.run("upstreams", "--into", two_releases.root / "build").stdout.split()
    texts = [Path(tree, "src/model.py").read_text() for tree in trees]
    assert "line 30 of 2.0 and more" in texts[0]
    assert "line 30 and more" in texts[1]
    shutil.copy(two_releases.patches / "1.0" / SECOND, two_releases.folder / SECOND)
    message = two_releases.fails("upstreams", "--into", two_releases.root / "build")
    assert f"patches/2.0/{SECOND} does not apply to made-up 2.0 at src/model.py, line 27" in message


# The archive


@pytest.mark.parametrize("name", ["top/../../outside", "top/.git/config"])
def test_an_archive_cannot_write_elsewhere(tmp_path, name):
    path = tmp_path / "bad.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(fork.ForkError, match="no plain file"):
        fork.unpack(path, tmp_path / "tree")
    assert not (tmp_path / "outside").exists()


# The real series


RELEASES = fork.Fork(ROOT).tested()
SERIES = {release.folder: fork.Fork(ROOT).series(release) for release in RELEASES}


@pytest.fixture(scope="module")
def real() -> fork.Release:
    """The release that this checkout is built on: the pin, or another that `make patch UPSTREAM=` chose."""
    return fork.Fork(ROOT).built_on()


@pytest.fixture(scope="module")
def real_archive(real) -> Path:
    """Its archive: `make patch` has left it in .cache."""
    return fork.Fork(ROOT).fetch(real.pin)


@pytest.fixture(scope="module")
def real_tree(real, real_archive, tmp_path_factory) -> Path:
    """The tree, built anew in a folder of its own."""
    root = tmp_path_factory.mktemp("real")
    shutil.copytree(ROOT / "patches", root / "patches", ignore=shutil.ignore_patterns("__pycache__"))
    assert fork.main(["--root", str(root), "patch", "--upstream", real.pin.version, "--sdist", str(real_archive)]) == 0
    return root


def changed_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if re.match(r"[+-](?![+-])", line)]


def test_the_pin_is_the_newest_tested_release():
    assert fork.Fork(ROOT).pin() == RELEASES[0].pin
    readme = (ROOT / "README.md").read_text()
    assert all(release.pin.version in readme for release in RELEASES)
    assert {path.parent.name for path in (ROOT / "patches").glob("*/series")} == set(SERIES)


@pytest.mark.parametrize("folder", SERIES)
def test_the_series_is_small_and_imports_nothing(folder):
    changed = [line for path in SERIES[folder] for line in changed_lines(path)]
    assert 0 < len(changed) < 30
    assert not [line for line in changed if "import" in line or "kv_strategies" in line]


@pytest.mark.parametrize("folder", SERIES)
def test_the_series_changes_one_file_of_upstream(folder):
    for path in SERIES[folder]:
        assert set(re.findall(r"^diff --git a/(\S+) b/\S+$", path.read_text(), re.MULTILINE)) == {LLAMA}


@pytest.mark.parametrize("folder", SERIES)
def test_every_patch_says_why_it_is_one_and_when_it_can_go(folder):
    for path in SERIES[folder]:
        message = path.read_text().partition("\n---\n")[0]
        assert "Why this cannot be done without a patch:" in message
        assert "It can go when" in message
        assert re.search(r"^Forwarded: (no|not-needed|https?://\S+)$", message, re.MULTILINE)


def test_the_series_are_one_but_for_the_name_of_the_cache():
    """Patches and messages; what is left of a patch without its context and its place in the file."""

    def essence(path: Path) -> list[str]:
        message = path.read_text().partition("\n---\n")[0]
        return (message + "\n".join(changed_lines(path))).replace("past_key_values", "cache").splitlines()

    first, *others = [[essence(path) for path in series] for series in SERIES.values()]
    assert others == [first] * len(others)


def test_the_series_round_trips_byte_for_byte(real_tree):
    assert fork.main(["--root", str(real_tree), "refresh", "--check"]) == 0


def test_the_series_applies_without_fuzz(real, real_archive, tmp_path):
    """git never fuzzes; `patch -F0`, where that program is installed, agrees."""
    tools = [["git", "apply"]] + [["patch", "-p1", "-F0", "-s", "-i"]] * bool(shutil.which("patch"))
    for tool in tools:
        tree = tmp_path / tool[0]
        fork.unpack(real_archive, tree)
        for path in SERIES[real.folder]:
            env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
            subprocess.run([*tool, path], cwd=tree, check=True, env=env)
        assert ".attend(" in (tree / LLAMA).read_text()


@pytest.mark.upstream
def test_the_imported_transformers_is_patched():
    from transformers.models.llama import modeling_llama

    text = Path(modeling_llama.__file__).read_text()
    assert f'hasattr({CACHE}, "attend")' in text
    assert f'getattr({CACHE}, "plan_forward", create_causal_mask)' in text


def test_without_a_strategy_the_patched_model_is_upstream_to_the_bit(real, real_archive, tmp_path):
    """Upstream's file and the patched one, in one process, on one set of random weights."""
    fork.unpack(real_archive, tmp_path)
    patched = tmp_path / "patched.py"
    shutil.copy(tmp_path / LLAMA, patched)
    for path in SERIES[real.folder]:
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        subprocess.run(["git", "apply", path], cwd=tmp_path, check=True, env=env)
    files = {"upstream": patched, "patched": tmp_path / LLAMA}

    config = LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.arange(26).reshape(2, 13) % 97
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding, so that upstream builds a dense mask
    outcomes = {}
    for name, file in files.items():
        spec = importlib.util.spec_from_file_location(f"transformers.models.llama.modeling_{name}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        model = module.LlamaForCausalLM(config).eval()
        with torch.inference_mode():
            plain = model(ids, use_cache=False).logits
            cache = DynamicCache(config=config)
            first = model(ids, attention_mask=mask, **with_cache(cache)).logits
            longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            second = model(ids[:, :1], attention_mask=longer, **with_cache(cache)).logits
        outcomes[name] = (plain, first, second, *(t for layer in cache.layers for t in (layer.keys, layer.values)))
    assert len(outcomes["upstream"]) == 7
    for upstream, patched in zip(outcomes["upstream"], outcomes["patched"], strict=True):
        assert torch.equal(upstream, patched)
