"""`netllm data fetch` and `check`, against a repository that is made here and has the layout of NetLLM's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

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

    def bring(self, to: Path, **changes: object) -> int:
        given = {"repository": self.folder.as_uri(), "commit": self.commit, "sums": self.sums} | changes
        return fetch.fetch_data(to, **given)  # type: ignore[arg-type]

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
    to, listings, move = tmp_path / "to", [], fetch._move

    def look_and_move(files: Path, folder: Path, names: list[str]) -> None:
        monkeypatch.delenv("GIT_DIR", raising=False)
        listings.append(git(files.parent / "clone", "cat-file", "--batch-all-objects", "--batch-check"))
        move(files, folder, names)

    monkeypatch.setattr(fetch, "_move", look_and_move)
    assert upstream.bring(to) == len(upstream.sums)
    big = git(upstream.folder, "rev-parse", f"{upstream.commit}:viewport_prediction/big.bin")
    assert big not in listings[0], "the rest of the repository never reaches the disk"
    assert sums_of(to) == upstream.sums
    assert len(Registry(to).trace_set("sample-test")) == 9
    assert upstream.bring(to, repository="file:///nowhere") == 0, "complete: no git at all"
    git(upstream.folder, "config", "uploadpack.allowFilter", "false")
    monkeypatch.chdir(tmp_path)
    upstream.bring(Path("beside"), repository="upstream")  # both relative, and a server without filters
    assert sums_of(tmp_path / "beside") == upstream.sums


def test_what_an_interrupted_fetch_left_does_no_harm(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "to" / fetch.STAGING / "clone" / ".git").mkdir(parents=True)
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


def test_a_clone_s_configuration_runs_nothing(upstream: Upstream, tmp_path: Path) -> None:
    """A partial clone whose configuration names commands, for every occasion that git knows."""
    clone, ran = tmp_path / "clone", tmp_path / "ran"
    shutil.copytree(upstream.folder, clone)
    (tmp_path / "evil").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "evil").chmod(0o755)
    command = str(tmp_path / "evil")
    with open(clone / ".git" / "config", "a") as config:
        config.write(
            f"[core]\nfsmonitor = {command}\nsshCommand = {command}\nhooksPath = {tmp_path}\npager = {command}\n"
        )
        config.write(f'[remote "origin"]\nurl = {upstream.folder}\npromisor = true\nuploadpack = {command}\n')
        config.write(f'[filter "broken"]\nsmudge = {command}\nclean = {command}\n')
    shutil.rmtree(clone / ".git" / "objects")
    (clone / ".git" / "objects").mkdir()
    upstream.bring(tmp_path / "to", source=clone)
    assert sums_of(tmp_path / "to") == upstream.sums
    assert not ran.exists()


def test_a_changed_file_in_the_destination_is_not_overwritten_unasked(upstream: Upstream, tmp_path: Path) -> None:
    to, names = tmp_path / "to", list(upstream.sums)
    upstream.bring(to)
    (to / names[3]).write_text("mine\n")
    (to / names[5]).unlink()
    stray = to / "traces" / "test" / "sample-test" / "stray"
    stray.write_text("0 1\n1 2\n")
    found = fetch.check_data(to, upstream.sums)
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
    for changes in ({"repository": "file:///nowhere"}, {"repository": "http://127.0.0.1:9/x"}, {"commit": "0" * 40}):
        with pytest.raises(OSError, match=r"git fetch failed: .*--from$") as caught:
            upstream.bring(tmp_path / "to", **changes)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        upstream.bring(tmp_path / "to", commit="main")
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


@pytest.mark.parametrize("line", ["abc  x", "0" * 64 + "  ../x", "0" * 64 + "  /etc/x", "0" * 64 + "  a\\b", ""])
def test_broken_sums(tmp_path: Path, line: str) -> None:
    (tmp_path / "sums").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"sums:1: expected"):
        fetch.read_sums(tmp_path / "sums")


def test_committed_sums_are_those_of_the_real_data(real_data: Path) -> None:
    sums = fetch.read_sums()
    assert len(sums) == 516
    assert fetch.check_data(real_data)["right"] == list(sums)


def test_the_commands(upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def netllm(*words: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["data", *words])
        return int(stopped.value.code or 0)

    to, sums = str(tmp_path / "to"), str(tmp_path / "sums")
    Path(sums).write_text("".join(f"{digest}  {name}\n" for name, digest in upstream.sums.items()))
    where = ["--repository", upstream.folder.as_uri(), "--commit", upstream.commit, "--sums", sums]
    count, name = len(upstream.sums), next(iter(upstream.sums))
    assert netllm("fetch", to, *where, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"folder": to, "files": count, "brought": count}
    assert netllm("check", to, "--sums", sums) == 0
    flip(tmp_path / "to" / name)
    assert netllm("check", to, "--sums", sums) == 1
    assert f"1 wrong: {name}" in capsys.readouterr().out
    assert netllm("fetch", to, "--from", str(upstream.folder), *where) == 2
    assert netllm("fetch", to, "--from", str(upstream.folder), *where, "--replace") == 0
    assert sums_of(tmp_path / "to") == upstream.sums
