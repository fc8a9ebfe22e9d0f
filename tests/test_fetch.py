"""`netllm data fetch`, against a repository that is made here and has the layout of NetLLM's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from netllm_lib import runs
from netllm_lib.abr import fetch, synthetic
from netllm_lib.abr.traces import Registry
from netllm_lib.cli import main

SETTINGS = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false"]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *SETTINGS, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def sums_of(folder: Path) -> dict[str, str]:
    """Of everything under a folder but lock files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {path.relative_to(folder).as_posix(): runs.file_hash(path, 64) for path in files}


class Upstream:
    def __init__(self, folder: Path, commit: str, sums: dict[str, str]):
        self.folder, self.commit, self.sums, self.data = folder, commit, sums, folder / fetch.INSIDE

    @contextmanager
    def as_netllm(self, **changes: object) -> Iterator[None]:
        """What the library takes for NetLLM's repository is this one."""
        sums = self.folder.with_name("sums")
        sums.write_text("".join(f"{digest}  {name}\n" for name, digest in self.sums.items()))
        known: Any = {
            "COMMIT": self.commit,
            "SUMS": sums,
            "PROTOCOLS": "file",
            "REPOSITORY": self.folder.as_uri(),
        } | changes
        with mock.patch.multiple(fetch, **known):
            yield

    def bring(self, to: Path, commit: str = "", **how: Any) -> int:
        with self.as_netllm(**({"COMMIT": commit} if commit else {})):
            return fetch.fetch_data(to, **({"repository": self.folder.as_uri()} | how))

    def check(self, folder: Path) -> dict[str, list[str]]:
        with self.as_netllm():
            return fetch.check_data(folder)

    def commit_change(self, change: Callable[[Path], object]) -> str:
        """A commit on top whose data was changed."""
        change(self.data)
        git(self.folder, "add", "-A")
        git(self.folder, "commit", "-q", "-m", "changed")
        return git(self.folder, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """A commit with the data, and files elsewhere that nobody asked for."""
    folder = tmp_path_factory.mktemp("made") / "upstream"
    data = folder / fetch.INSIDE
    synthetic.write_sample(data, train=20, test=9)
    (data / "all_models" / "genet").mkdir(parents=True)
    (data / "all_models" / "genet" / "nn.ckpt.index").write_bytes(bytes(range(256)) * 4)
    (data / "traces" / "train" / "sample-train" / "windows lines [1].log").write_bytes(b"0 1\r\n1 2\r\n2 1\r\n")
    sums = sums_of(data)
    (folder / "viewport_prediction").mkdir()
    (folder / "viewport_prediction" / "big.bin").write_bytes(os.urandom(300_000))
    (folder / ".gitattributes").write_text("* text eol=lf\n*.index filter=broken\n")
    git(folder, "init", "-q")
    (folder / ".git" / "info" / "attributes").write_text("* -text -filter\n")  # commit the bytes as they are
    for setting in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
        git(folder, "config", setting, "true")
    return Upstream(folder, Upstream(folder, "", sums).commit_change(lambda data: None), sums)


@pytest.fixture
def upstream(made: Upstream, tmp_path: Path) -> Upstream:
    """A repository of the test's own."""
    shutil.copytree(made.folder, tmp_path / "upstream", symlinks=True)
    return Upstream(tmp_path / "upstream", made.commit, made.sums)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_fetch_is_complete_byte_exact_and_leaves_nothing_else(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text('[core]\nautocrlf = true\neol = crlf\n[filter "broken"]\nsmudge = false\nrequired = true\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "of a hook"))
    to, listings, checkout = tmp_path / "to", [], fetch._checkout

    def checkout_and_look(repository: str, clone: Path) -> Path:
        tree = checkout(repository, clone)
        monkeypatch.delenv("GIT_DIR", raising=False)
        listings.append(git(clone, "cat-file", "--batch-all-objects", "--batch-check"))
        return tree

    monkeypatch.setattr(fetch, "_checkout", checkout_and_look)
    assert upstream.bring(to) == len(upstream.sums)
    big = git(upstream.folder, "rev-parse", f"{upstream.commit}:viewport_prediction/big.bin")
    assert big not in listings[0], "the rest of the repository never reaches the disk"
    assert sums_of(to) == upstream.sums
    assert len(Registry(to).trace_set("sample-test")) == 9
    assert upstream.bring(to, repository="file:///nowhere") == 0, "complete: no git at all"
    git(upstream.folder, "config", "uploadpack.allowFilter", "false")
    monkeypatch.chdir(tmp_path)
    upstream.bring(Path("beside"))  # relative, and a server without filters
    assert sums_of(tmp_path / "beside") == upstream.sums


def test_what_an_interrupted_fetch_left_does_no_harm(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "to" / fetch.STAGING / "clone" / ".git" / "info").mkdir(parents=True)
    (tmp_path / "to" / fetch.STAGING / "data").mkdir()
    with runs.lock(tmp_path / "to" / fetch.STAGING), pytest.raises(runs.Busy):
        upstream.bring(tmp_path / "to")
    upstream.bring(tmp_path / "to")
    assert sums_of(tmp_path / "to") == upstream.sums


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "1 of its files are not what the sums say"),
        (lambda path: path.unlink(), "1 files are not there"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "1 of its files are not what the sums say"),
    ],
)
@pytest.mark.parametrize("way", ["git", "clone", "folder"])
def test_a_wrong_file_is_refused_by_name(
    upstream: Upstream, tmp_path: Path, change: Callable[[Path], object], message: str, way: str
) -> None:
    name = "traces/test/sample-test/sample-test_004"
    commit = upstream.commit_change(lambda data: change(data / name))
    source = {"git": None, "clone": upstream.folder, "folder": upstream.data}[way]
    with pytest.raises((ValueError, FileNotFoundError), match=f"{message}: {name}"):
        upstream.bring(tmp_path / "to", commit=commit, source=source)
    assert not sums_of(tmp_path / "to")


def test_from_a_folder(upstream: Upstream, tmp_path: Path) -> None:
    for i, place in enumerate(("", "adaptive_bitrate_streaming", fetch.INSIDE)):
        upstream.bring(tmp_path / str(i), source=upstream.folder / place, repository="file:///nowhere")
        assert sums_of(tmp_path / str(i)) == upstream.sums
    with pytest.raises(FileNotFoundError, match="no traces/ in it"):
        upstream.bring(tmp_path / "other", source=tmp_path / "0" / "videos")


COMMANDS = """
[core]
fsmonitor = {evil}
sshCommand = {evil}
hooksPath = {hooks}
attributesFile = {hooks}/attributes
[remote "origin"]
url = {url}
promisor = true
uploadpack = {evil}
[filter "broken"]
smudge = {evil}
process = {evil}
[uploadpack]
packObjectsHook = {evil}
[submodule "inner"]
url = {url}
update = !{evil}
[include]
path = {hooks}/included
"""


@pytest.fixture
def hostile(upstream: Upstream, tmp_path: Path) -> tuple[Path, Path]:
    """(a partial clone that names a command for every occasion that git knows, the file that this command would make)."""
    clone, hooks, ran = tmp_path / "clone", tmp_path / "hooks", tmp_path / "ran"
    shutil.copytree(upstream.folder, clone)
    hooks.mkdir()
    for name in (
        "evil",
        "post-checkout",
        "reference-transaction",
        "post-index-change",
        "pre-auto-gc",
        "fsmonitor-watchman",
    ):
        (hooks / name).write_text(f"#!/bin/sh\necho {name} >> {ran}\n")
        (hooks / name).chmod(0o755)
    shutil.copytree(hooks, clone / ".git" / "hooks", dirs_exist_ok=True)
    (hooks / "attributes").write_text("* filter=broken\n")
    (hooks / "included").write_text(f"[core]\neditor = {hooks / 'evil'}\n")
    (clone / ".git" / "info" / "attributes").write_text("* filter=broken diff=broken\n")
    (clone / ".gitmodules").write_text(f'[submodule "inner"]\npath = inner\nurl = {upstream.folder}\n')
    with open(clone / ".git" / "config", "a") as config:
        config.write(COMMANDS.format(evil=hooks / "evil", hooks=hooks, url=upstream.folder))
    replaced = clone / ".git" / "refs" / "replace"
    replaced.mkdir(parents=True)
    (replaced / upstream.commit).write_text(f"{'1' * 40}\n")
    shutil.rmtree(clone / ".git" / "objects")
    (clone / ".git" / "objects" / "info").mkdir(parents=True)
    (clone / ".git" / "objects" / "info" / "alternates").write_text(f"{upstream.folder}/.git/objects\n")
    return clone, ran


def test_a_clone_s_configuration_runs_nothing(
    hostile: tuple[Path, Path], upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither as the source, nor as the repository, nor where a link in the destination leads to it, nor from inside it."""
    clone, ran = hostile
    monkeypatch.chdir(clone)
    upstream.bring(tmp_path / "to", source=clone)
    assert sums_of(tmp_path / "to") == upstream.sums
    protocols = fetch.PROTOCOLS
    for repository in (str(clone), ".", clone.as_uri(), f"ext::{tmp_path / 'hooks' / 'evil'}", f"--upload-pack={ran}"):
        with upstream.as_netllm(PROTOCOLS=protocols), pytest.raises(OSError, match="git [a-z]+ failed"):
            fetch.fetch_data(tmp_path / "other", repository=repository)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / fetch.STAGING).symlink_to(tmp_path)
    with pytest.raises(FileExistsError):
        upstream.bring(tmp_path / "linked")
    assert (clone / ".git" / "config").is_file()
    assert not ran.exists()
    subprocess.run(["git", "-C", str(clone), "status"], capture_output=True)
    assert ran.exists(), "the trap works"


def test_pipes_devices_and_huge_files_in_a_source(upstream: Upstream, tmp_path: Path) -> None:
    path = upstream.data / "traces" / "test" / "sample-test" / "sample-test_004"
    path.unlink()
    for make, message in (
        (lambda: os.mkfifo(path), "1 files are not there"),
        (lambda: path.symlink_to("/dev/zero"), "1 files are not there"),
        (lambda: path.write_bytes(bytes(fetch.MOST_BYTES + 1)), "50000001 bytes"),
    ):
        make()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            upstream.bring(tmp_path / "to", source=upstream.data)
        path.unlink()
    assert not sums_of(tmp_path / "to")


def test_a_changed_file_in_the_destination_is_not_overwritten_unasked(upstream: Upstream, tmp_path: Path) -> None:
    to, names = tmp_path / "to", list(upstream.sums)
    upstream.bring(to)
    (to / names[3]).write_text("mine\n")
    (to / names[5]).unlink()
    stray = to / "traces" / "test" / "sample-test" / "stray"
    stray.write_text("0 1\n1 2\n")
    found = upstream.check(to)
    assert (found["wrong"], found["missing"]) == ([names[3]], [names[5]])
    assert found["foreign"] == ["traces/test/sample-test/stray"]
    with pytest.raises(ValueError, match=rf"1 of its files are not what the sums say: {names[3]}.*--replace"):
        upstream.bring(to)
    assert not (to / names[5]).exists(), "nothing is changed before all is well"
    assert upstream.bring(to, replace=True) == 2
    assert stray.read_text() == "0 1\n1 2\n"
    stray.unlink()
    assert sums_of(to) == upstream.sums


def test_errors_are_one_line_with_advice(upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"repository": "file:///nowhere"}, {"repository": "https://127.0.0.1:9/x"}, {"commit": "0" * 40}):
        with pytest.raises(OSError, match=r"git fetch failed: .*--from$") as caught:
            upstream.bring(tmp_path / "to", **changes)
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"git is not installed.*--from"):
        upstream.bring(tmp_path / "to")


def test_a_full_disk_is_named(upstream: Upstream, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(900_000))
    for source in (None, upstream.data):
        with pytest.raises(runs.StorageError, match="the disk is full"):
            upstream.bring(small_disk / "to", source=source)
    (small_disk / "ballast").unlink()
    assert upstream.bring(small_disk / "to", source=upstream.data) == len(upstream.sums)


def test_committed_sums_are_those_of_the_real_data(real_data: Path) -> None:
    sums = fetch.read_sums()
    assert len(sums) == 516
    assert fetch.check_data(real_data)["right"] == list(sums)


def test_the_commands(upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def netllm(*words: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["data", *words])
        return int(stopped.value.code or 0)

    to, name, count = str(tmp_path / "to"), next(iter(upstream.sums)), len(upstream.sums)
    with upstream.as_netllm():
        assert netllm("fetch", to, "--json") == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last == {"folder": to, "files": count, "brought": count, "foreign": []}
        (tmp_path / "to" / name).with_name("stray").touch()
        assert netllm("fetch", to) == 0
        assert "1 other files lie among them: " in capsys.readouterr().out
        (tmp_path / "to" / name).with_name("stray").unlink()
        flip(tmp_path / "to" / name)
        assert netllm("fetch", to, "--from", str(upstream.folder)) == 2
        assert netllm("fetch", to, "--from", str(upstream.folder), "--replace") == 0
    assert sums_of(tmp_path / "to") == upstream.sums
