"""`netllm data fetch` and `check`, against a repository that is made here and has the layout of NetLLM's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from netllm_lib import runs
from netllm_lib.abr import fetch, synthetic
from netllm_lib.abr.traces import Registry
from netllm_lib.cli import main

BLINDED = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false"]


def git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *BLINDED, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def sums_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): runs.file_hash(path, 64) for path in files}


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, hidden files too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@dataclass(frozen=True)
class Upstream:
    folder: Path
    url: str
    commit: str
    sums: dict[str, str]

    @property
    def data(self) -> Path:
        return self.folder / fetch.INSIDE

    def bring(self, to: Path, **changes: object) -> fetch.Fetched:
        given = {"repository": self.url, "commit": self.commit, "sums": self.sums} | changes
        return fetch.fetch_data(to, **given)  # type: ignore[arg-type]

    def sums_file(self, path: Path) -> Path:
        path.write_text("".join(f"{digest}  {name}\n" for name, digest in self.sums.items()))
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    """A commit with the data, another one on top of it, and files elsewhere that nobody asked for."""
    folder = tmp_path_factory.mktemp("made") / "upstream"
    folder.mkdir()
    data = folder / fetch.INSIDE
    synthetic.write_sample(data, train=20, test=9)
    (data / "all_models" / "genet").mkdir(parents=True)
    (data / "all_models" / "genet" / "nn.ckpt.index").write_bytes(bytes(range(256)) * 4)
    (data / "traces" / "train" / "sample-train" / "windows lines [1].log").write_bytes(b"0 1\r\n1 2\r\n2 1\r\n")
    sums = sums_of(data)
    (data / "ft_plms").mkdir()
    (data / "ft_plms" / "readme").write_text("not wanted\n")
    (folder / "viewport_prediction").mkdir()
    (folder / "viewport_prediction" / "big.bin").write_bytes(os.urandom(300_000))
    (folder / ".gitattributes").write_text("* text eol=lf\n*.index filter=broken\n")
    git(folder, "init", "-q")
    (folder / ".git" / "info" / "attributes").write_text("* -text -filter\n")  # commit the bytes as they are
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "data")
    commit = git(folder, "rev-parse", "HEAD")
    first = next(iter(sums))
    (data / first).write_text("a later commit changed it\n")
    git(folder, "commit", "-q", "-am", "later")
    git(folder, "config", "uploadpack.allowFilter", "true")
    git(folder, "config", "uploadpack.allowAnySHA1InWant", "true")
    return Upstream(folder, folder.as_uri(), commit, sums)


@pytest.fixture
def upstream(made: Upstream, tmp_path: Path) -> Upstream:
    """A repository of the test's own."""
    folder = tmp_path / "upstream"
    shutil.copytree(made.folder, folder, symlinks=True)
    return Upstream(folder, folder.as_uri(), made.commit, made.sums)


def commit_change(upstream: Upstream, change: Callable[[Path], object]) -> str:
    """A commit on top of the pinned one whose data was changed."""
    git(upstream.folder, "checkout", "-q", "-B", "changed", upstream.commit)
    change(upstream.data)
    git(upstream.folder, "add", "-A")
    git(upstream.folder, "commit", "-q", "-m", "changed")
    return git(upstream.folder, "rev-parse", "HEAD")


# --- by git -------------------------------------------------------------------------------------------------------------


def test_a_fetch_is_complete_byte_exact_and_leaves_nothing_else(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text(
        '[core]\n\tautocrlf = true\n\teol = crlf\n[filter "broken"]\n\tsmudge = false\n\trequired = true\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "of a hook"))
    to, told = tmp_path / "to", []
    fetched = upstream.bring(to, progress=lambda done, total: told.append((done, total)))
    assert (fetched.kept, fetched.brought) == (0, len(upstream.sums))
    assert fetched.ignored == ("ft_plms/readme",)
    assert sums_of(to) == upstream.sums
    assert [path.name for path in sorted(to.iterdir())] == ["all_models", "traces", "videos"]
    assert told[-1] == (len(upstream.sums), len(upstream.sums))
    assert len(Registry(to).trace_set("sample-test")) == 9
    monkeypatch.chdir(tmp_path)
    upstream.bring(Path("beside"), repository="upstream")  # both relative
    assert sums_of(tmp_path / "beside") == upstream.sums
    again = upstream.bring(to, repository="file:///nowhere")  # complete: no git at all
    assert (again.kept, again.brought) == (len(upstream.sums), 0)


def test_other_folders_never_reach_the_disk(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it runs, neither the work tree nor the objects hold what lies elsewhere in the repository."""
    monkeypatch.setattr(fetch, "BATCH", 10)
    big = git(upstream.folder, "rev-parse", f"{upstream.commit}:viewport_prediction/big.bin")
    seen: list[set[str]] = []
    blobs: list[int] = []

    def look(done: int, total: int) -> None:
        (clone,) = (tmp_path / "to" / fetch.STAGING).glob(".clone.*")
        seen.append({name for name in files_of(clone) if not name.startswith(".git/")})
        listed = git(clone, "cat-file", "--batch-all-objects", "--batch-check").splitlines()
        assert not any(line.startswith(big) for line in listed)
        assert (clone / ".git" / "shallow").read_text().split() == [upstream.commit]
        blobs.append(sum(" blob " in line for line in listed))

    upstream.bring(tmp_path / "to", progress=look)
    assert all(not names for names in seen), "files of a batch are taken away at once"
    assert blobs[0] == 11  # ten files and .gitattributes, which git itself looks at
    assert blobs == sorted(blobs)
    assert blobs[-1] <= len(upstream.sums) + 1


WORKER = """
import sys, time, json
from pathlib import Path
from netllm_lib.abr import fetch
fetch.BATCH = 8
def progress(done, total):
    print(done, flush=True)
    time.sleep(60)
to, url, commit, sums = sys.argv[1:]
fetch.fetch_data(Path(to), repository=url, commit=commit, sums=json.loads(sums), progress=progress)
"""


def test_it_continues_after_a_kill(upstream: Upstream, tmp_path: Path) -> None:
    to = tmp_path / "to"
    command = [sys.executable, "-c", WORKER, str(to), upstream.url, upstream.commit, json.dumps(upstream.sums)]
    with subprocess.Popen(command, cwd=runs.PROJECT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "8\n"
        with pytest.raises(runs.Busy, match=str(worker.pid)):
            upstream.bring(to)
        os.kill(worker.pid, signal.SIGKILL)
    assert worker.returncode == -signal.SIGKILL
    assert [path.name for path in to.iterdir() if not path.name.startswith(".")] == [], "half of it is not shown"
    kept = {path.name: path.stat().st_ino for path in (to / fetch.STAGING / "files").rglob("*") if path.is_file()}
    assert len(kept) == 8
    told: list[int] = []
    upstream.bring(to, progress=lambda done, total: told.append(done))
    assert sums_of(to) == upstream.sums
    assert {path.name: path.stat().st_ino for path in to.rglob("*") if path.name in kept} == kept, "not fetched again"
    assert min(told) > 8


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, r"1 files are not what the sums say: (\S+) \(\d+ bytes\); nothing was changed"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-3]),
            r"1 files are not what the sums say: (\S+) \(\d+ bytes\)",
        ),
        (lambda path: path.write_bytes(b""), r"1 files are not what the sums say: (\S+) \(0 bytes\)"),
        (lambda path: path.unlink(), r"1 files are not there: (\S+)"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), r"1 files are not there: (\S+)"),
    ],
)
@pytest.mark.parametrize("way", ["git", "clone", "folder"])
def test_a_wrong_file_is_refused_by_name(
    upstream: Upstream, tmp_path: Path, change: Callable[[Path], object], message: str, way: str
) -> None:
    name = "traces/test/sample-test/sample-test_004"
    commit = commit_change(upstream, lambda data: change(data / name))
    source = {"git": None, "clone": upstream.folder, "folder": upstream.data}[way]
    if way == "folder" and (upstream.data / name).is_symlink():
        message = r"1 files are not what the sums say: (\S+)"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        upstream.bring(tmp_path / "to", commit=commit, source=source)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in (tmp_path / "to").glob("*") if not path.name.startswith(".")] == []
    good = upstream.bring(tmp_path / "to")  # what was right of it is kept
    assert sums_of(tmp_path / "to") == upstream.sums
    assert good.brought == len(upstream.sums)


def test_wrong_files_are_counted_and_the_first_named(upstream: Upstream, tmp_path: Path) -> None:
    def change(data: Path) -> None:
        for path in (data / "traces" / "test" / "sample-test").iterdir():
            path.write_text("0 1\n1 1\n")

    commit = commit_change(upstream, change)
    with pytest.raises(ValueError, match=r"9 files .*sample-test_000 .*sample-test_004 \(8 bytes\) and 4 more"):
        upstream.bring(tmp_path / "to", commit=commit)


# --- what lies in the destination ---------------------------------------------------------------------------------------


def test_a_changed_file_in_the_destination_is_not_overwritten_unasked(upstream: Upstream, tmp_path: Path) -> None:
    to = tmp_path / "to"
    upstream.bring(to)
    names = list(upstream.sums)
    (to / names[3]).write_text("mine\n")
    (to / names[5]).unlink()
    own = to / "traces" / "train" / "own" / "a"
    own.parent.mkdir()
    own.write_text("0 1\n1 2\n")
    with pytest.raises(ValueError, match="1 of its files are not what the sums say") as caught:
        upstream.bring(to)
    assert names[3] in str(caught.value)
    assert "--replace" in str(caught.value)
    assert (to / names[3]).read_text() == "mine\n"
    assert not (to / names[5]).exists(), "nothing is changed before all is well"
    repaired = upstream.bring(to, replace=True)
    assert repaired.brought == 2
    assert own.read_text() == "0 1\n1 2\n"
    own.unlink()
    assert sums_of(to) == upstream.sums


def test_a_folder_in_the_place_of_a_file(upstream: Upstream, tmp_path: Path) -> None:
    name = next(iter(upstream.sums))
    (tmp_path / "to" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="move them away$"):
        upstream.bring(tmp_path / "to", replace=True)


def test_check(upstream: Upstream, tmp_path: Path) -> None:
    to, names = tmp_path / "to", list(upstream.sums)
    with pytest.raises(FileNotFoundError, match="netllm data fetch"):
        fetch.check_data(to, upstream.sums)
    upstream.bring(to)
    assert fetch.check_data(to, upstream.sums).complete
    flip(to / names[0])
    (to / names[2]).unlink()
    (to / "traces" / "test" / "sample-test" / "stray").write_text("0 1\n1 1\n")
    (to / "traces" / "test" / "mine").mkdir()
    (to / "traces" / "test" / "mine" / "a").write_text("0 1\n1 1\n")
    found = fetch.check_data(to, upstream.sums)
    assert (found.wrong, found.missing) == ((names[0],), (names[2],))
    assert found.extra == ("traces/test/mine/a", "traces/test/sample-test/stray")
    assert not found.complete
    said = str(found)
    assert f"1 wrong: {names[0]}" in said
    assert "1 foreign among them, which change a trace set or video: traces/test/sample-test/stray" in said
    assert "1 more in folders of their own" in said


# --- from a clone or a folder -------------------------------------------------------------------------------------------


def test_from_a_clone_whatever_is_checked_out(upstream: Upstream, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", upstream.url, str(clone))
    git(clone, "checkout", "-q", "--orphan", "other")
    git(clone, "rm", "-rqf", ".")
    (clone / fetch.INSIDE / "traces").mkdir(parents=True)
    (clone / fetch.INSIDE / "traces" / "dirt").write_text("not of the commit\n")
    fetched = upstream.bring(tmp_path / "to", source=clone, repository="file:///nowhere")
    assert sums_of(tmp_path / "to") == upstream.sums
    assert fetched.ignored == ("ft_plms/readme",)
    git(tmp_path, "clone", "-q", "--bare", upstream.url, str(tmp_path / "bare.git"))
    upstream.bring(tmp_path / "to2", source=tmp_path / "bare.git")
    assert sums_of(tmp_path / "to2") == upstream.sums


def test_from_a_clone_without_the_commit_the_sums_decide(upstream: Upstream, tmp_path: Path) -> None:
    for name, content in (("same", None), ("other", "changed\n")):
        git(upstream.folder, "checkout", "-q", "-B", "again", upstream.commit)
        (upstream.folder / "README").write_text(name)
        if content:
            (upstream.data / next(iter(upstream.sums))).write_text(content)
        git(upstream.folder, "add", "-A")
        git(upstream.folder, "commit", "-q", "-m", "again")
        git(tmp_path, "clone", "-q", "--depth", "1", "--branch", "again", upstream.url, str(tmp_path / name))
    upstream.bring(tmp_path / "to", source=tmp_path / "same")
    assert sums_of(tmp_path / "to") == upstream.sums
    with pytest.raises(ValueError, match="1 files are not what the sums say"):
        upstream.bring(tmp_path / "to2", source=tmp_path / "other")


@pytest.mark.parametrize("place", ["", "adaptive_bitrate_streaming", fetch.INSIDE])
def test_from_an_unpacked_archive(upstream: Upstream, tmp_path: Path, place: str) -> None:
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(upstream.folder), "-c", "core.attributesFile=/dev/null", "archive", upstream.commit],
        check=True,
        capture_output=True,
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(unpacked)], input=archive, check=True)
    assert upstream.bring(tmp_path / "to", source=unpacked / place).ignored == ("ft_plms/readme",)
    assert sums_of(tmp_path / "to") == upstream.sums


def test_a_source_that_is_none(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    git(tmp_path, "init", "-q", str(tmp_path / "new"))
    git(tmp_path / "new", "commit", "-q", "--allow-empty", "-m", "nothing")
    for name, message in (("nowhere", "no such folder"), ("empty", "neither a clone"), ("new", "is not in it")):
        with pytest.raises(FileNotFoundError, match=message):
            upstream.bring(tmp_path / "to", source=tmp_path / name)
        assert not (tmp_path / "to").exists()


# --- what can go wrong --------------------------------------------------------------------------------------------------


def test_errors_of_git_are_one_line_with_advice(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("file:///nowhere", "http://127.0.0.1:9/x", "https://nowhere.invalid/x"):
        with pytest.raises(OSError, match="--from") as caught:
            upstream.bring(tmp_path / "to", repository=url)
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="the commit is not there"):
        upstream.bring(tmp_path / "to", commit="0" * 40)
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        upstream.bring(tmp_path / "to", commit="main")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", str(bin_folder))
    with pytest.raises(FileNotFoundError, match=r"git is not installed.*--from"):
        upstream.bring(tmp_path / "to")
    (bin_folder / "git").write_text("#!/bin/sh\necho git version 2.17.1\n")
    (bin_folder / "git").chmod(0o755)
    with pytest.raises(OSError, match=r"git version 2\.17\.1 is too old.*--from"):
        upstream.bring(tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_server_without_filters_serves_as_well(upstream: Upstream, tmp_path: Path) -> None:
    git(upstream.folder, "config", "uploadpack.allowFilter", "false")
    upstream.bring(tmp_path / "to")
    assert sums_of(tmp_path / "to") == upstream.sums


def test_a_full_disk_is_named(upstream: Upstream, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(900_000))
    for source in (None, upstream.folder, upstream.data):
        with pytest.raises(runs.StorageError, match="the disk is full"):
            upstream.bring(small_disk / "to", source=source)
        assert not [p for p in (small_disk / "to").glob("*") if not p.name.startswith(".")]
    (small_disk / "ballast").unlink()
    upstream.bring(small_disk / "to")
    assert sums_of(small_disk / "to") == upstream.sums


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sums"),
        ("abc  x\n", ":1: expected"),
        (f"{'0' * 64}  ../x\n", "not a path inside"),
        (f"{'0' * 64}  /etc/x\n", "not a path inside"),
        (f"{'0' * 64}  a\\b\n", "not a path inside"),
        (f"{'0' * 64}  a\n{'0' * 64}  ./a\n", ":2: 'a' is listed twice"),
    ],
)
def test_broken_sums(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sums").write_text(text)
    with pytest.raises(ValueError, match=message):
        fetch.read_sums(tmp_path / "sums")


# --- the committed sums, and the commands -------------------------------------------------------------------------------


def test_committed_sums_are_sorted_and_complete() -> None:
    sums = fetch.read_sums()
    names = [line[66:] for line in fetch.SUMS.read_text().splitlines()]
    assert names == sorted(names) == list(sums)
    assert len(sums) == 516
    tops = {name.rsplit("/", 1)[0] for name in names if name.startswith(("traces", "videos"))}
    assert tops == {
        "traces/test/fcc-test", "traces/train/fcc-train", "traces/valid/fcc-valid",
        "videos/video1_sizes", "videos/video2_sizes",
    }  # fmt: skip


def test_committed_sums_are_those_of_the_real_data(real_data: Path) -> None:
    found = fetch.check_data(real_data)
    assert found.complete, str(found)
    assert found.extra == ()


def netllm(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return int(stopped.value.code or 0)


def test_the_commands(upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    to, sums = str(tmp_path / "to"), str(upstream.sums_file(tmp_path / "sums"))
    where = ["--repository", upstream.url, "--commit", upstream.commit, "--sums", sums]
    assert netllm("data", "fetch", to, *where, "--json") == 0
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1]) | {"source": ""} == {
        "folder": to, "files": len(upstream.sums), "kept": 0, "brought": len(upstream.sums),
        "ignored": ["ft_plms/readme"], "source": "",
    }  # fmt: skip
    assert netllm("data", "check", to, "--sums", sums, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["complete"] is True
    name = next(iter(upstream.sums))
    flip(tmp_path / "to" / name)
    assert netllm("data", "check", to, "--sums", sums) == 1
    assert f"1 wrong: {name}" in capsys.readouterr().out
    assert netllm("data", "fetch", to, *where) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert netllm("data", "fetch", to, "--from", str(upstream.folder), *where, "--replace") == 0
    assert sums_of(tmp_path / "to") == upstream.sums
    assert netllm("data", "fetch", str(tmp_path / "x"), "--from", str(upstream.data)) == 2  # not the real data
    assert "516 files are not there" in capsys.readouterr().err
