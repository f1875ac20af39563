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

ROOT = Path(__file__).resolve().parent.parent
LLAMA = "src/transformers/models/llama/modeling_llama.py"


IDENTITY = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com", "-c", "commit.gpgsign=false"]


class Checkout:
    """A checkout with a fork of a made-up project: one file of forty lines, two patches."""

    def __init__(self, root: Path):
        self.root = root
        self.tree = root / "transformers-dev"
        self.patches = root / "patches"
        self.model = self.tree / "src/model.py"
        self.patches.mkdir(parents=True)
        self.tree.mkdir(exist_ok=True)
        (self.tree / ".gitignore").write_text("__pycache__/\n")
        self.sdist = self.archive("1.0", self.lines())
        (self.patches / "series").write_text("")
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
        path = self.patches / name
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
    assert (checkout.patches / "series").read_text().split() == [FIRST, SECOND]


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
    for path in checkout.patches.iterdir():
        assert (other / "patches" / path.name).read_bytes() == path.read_bytes()


def test_refresh_writes_new_patches_and_removes_dropped_ones(checkout):
    checkout.git("reset", "--quiet", "--hard", "HEAD~1")
    checkout.commit("Say less in line 20", {20: "line"})
    message = checkout.fails("refresh", "--check")
    assert "make refresh" in message
    checkout.run("refresh")
    assert (checkout.patches / "series").read_text().split() == [FIRST, "0002-Say-less-in-line-20.patch"]
    assert not (checkout.patches / SECOND).exists()
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
    (checkout.patches / "series").write_text(f"{FIRST}\n")
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


@pytest.mark.parametrize("pin", ["made-up\n", "made-up==1.0\n", "made-up>=1 --hash=sha256:" + "0" * 64 + "\n", ""])
def test_a_bad_pin_is_named(checkout, pin):
    (checkout.patches / "upstream.txt").write_text(pin)
    assert "upstream.txt" in checkout.fails("patch")


def test_a_series_that_lists_a_missing_patch_is_named(checkout):
    (checkout.patches / SECOND).unlink()
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
    (checkout.patches / "series").write_text(f"{FIRST}\n")  # a rebuild is due
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
    (checkout.patches / "series").write_text(f"{FIRST}\n")
    killed = subprocess.run([sys.executable, "-c", KILL, checkout.root, moment], cwd=ROOT / "patches")
    assert killed.returncode == -signal.SIGKILL
    if moment != "between the renames":
        after = checkout.snapshot()
        assert {name: after[name] for name in before if name != "patches/series"} == {
            name: text for name, text in before.items() if name != "patches/series"
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
    (checkout.patches / SECOND).write_text("nothing of the kind\n")
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
    assert " line 28 of 2.0" in (checkout.patches / SECOND).read_text()


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
    assert "+line 30 of 2.0 and more" in (checkout.patches / SECOND).read_text()


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


@pytest.fixture(scope="module")
def real_archive() -> Path:
    """The pinned archive: `make patch` has left it in .cache."""
    real = fork.Fork(ROOT)
    return real.fetch(real.pin())


@pytest.fixture(scope="module")
def real_tree(real_archive, tmp_path_factory) -> Path:
    """The pinned tree, built anew in a folder of its own."""
    root = tmp_path_factory.mktemp("real")
    shutil.copytree(ROOT / "patches", root / "patches", ignore=shutil.ignore_patterns("__pycache__"))
    fork.main(["--root", str(root), "patch", "--sdist", str(real_archive)])
    return root


def changed_lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if re.match(r"[+-](?![+-])", line)]


def test_the_series_is_small_and_imports_nothing():
    series = fork.Fork(ROOT).series()
    changed = [line for path in series for line in changed_lines(path)]
    assert 0 < len(changed) < 30
    assert not [line for line in changed if "import" in line or "kv_strategies" in line]


def test_the_series_changes_one_file_of_upstream():
    for path in fork.Fork(ROOT).series():
        assert set(re.findall(r"^diff --git a/(\S+) b/\S+$", path.read_text(), re.MULTILINE)) == {LLAMA}


def test_every_patch_says_why_it_is_one_and_when_it_can_go():
    for path in fork.Fork(ROOT).series():
        message = path.read_text().partition("\n---\n")[0]
        assert "Why this cannot be done without a patch:" in message
        assert "It can go when" in message
        assert re.search(r"^Forwarded: (no|not-needed|https?://\S+)$", message, re.MULTILINE)


def test_the_series_round_trips_byte_for_byte(real_tree):
    assert fork.main(["--root", str(real_tree), "refresh", "--check"]) == 0


def test_the_series_applies_without_fuzz(real_archive, tmp_path):
    """git never fuzzes; `patch -F0`, where that program is installed, agrees."""
    tools = [["git", "apply"]] + [["patch", "-p1", "-F0", "-s", "-i"]] * bool(shutil.which("patch"))
    for tool in tools:
        tree = tmp_path / tool[0]
        fork.unpack(real_archive, tree)
        for path in fork.Fork(ROOT).series():
            env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
            subprocess.run([*tool, path], cwd=tree, check=True, env=env)
        assert "past_key_values.attend" in (tree / LLAMA).read_text()


@pytest.mark.upstream
def test_the_imported_transformers_is_patched():
    from transformers.models.llama import modeling_llama

    text = Path(modeling_llama.__file__).read_text()
    assert 'hasattr(past_key_values, "attend")' in text
    assert 'getattr(past_key_values, "plan_forward", create_causal_mask)' in text


def test_without_a_strategy_the_patched_model_is_upstream_to_the_bit(real_archive, tmp_path):
    """Upstream's file and the patched one, in one process, on one set of random weights."""
    fork.unpack(real_archive, tmp_path)
    patched = tmp_path / "patched.py"
    shutil.copy(tmp_path / LLAMA, patched)
    for path in fork.Fork(ROOT).series():
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
            first = model(ids, attention_mask=mask, past_key_values=cache).logits
            longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            second = model(ids[:, :1], attention_mask=longer, past_key_values=cache).logits
        outcomes[name] = (plain, first, second, *(t for layer in cache.layers for t in (layer.keys, layer.values)))
    assert len(outcomes["upstream"]) == 7
    for upstream, patched in zip(outcomes["upstream"], outcomes["patched"], strict=True):
        assert torch.equal(upstream, patched)
