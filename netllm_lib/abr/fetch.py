"""NetLLM's own data: brought by git, or from a clone or folder, and checked file by file.

`netllm_data.sha256` beside this module, in the format of sha256sum, says which files there are and what is in them. What is
fetched lies in the hidden folder `.fetch` of the destination until all of it is there and right, so that an interrupted
fetch goes on where it was and nobody takes half of the data for the whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from netllm_lib import runs

REPOSITORY = "https://github.com/duowuyms/NetLLM"
COMMIT = "32136668e6f20fd0deea44eefbdd4373d6cab178"
INSIDE = "adaptive_bitrate_streaming/data"  # folder of the repository that has the data
SUMS = Path(__file__).with_name("netllm_data.sha256")
STAGING = ".fetch"
BATCH = 64  # files that one request asks for: what an interruption can lose
OLDEST_GIT = (2, 25)

# Files arrive byte for byte, no program of the repository or of the user's settings runs, nothing asks. The user's other
# settings stay: proxies, certificates and mirrors are among them.
GIT_SETTINGS = {
    "core.autocrlf": "false",
    "core.eol": "lf",
    "core.symlinks": "false",  # a link becomes a small file, which then has the wrong sum
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.sparseCheckout": "true",
    "core.sparseCheckoutCone": "false",
    "submodule.recurse": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "protocol.version": "2",
    "http.lowSpeedLimit": "100",  # bytes/s; a dead connection ends after a minute
    "http.lowSpeedTime": "60",
}
ATTRIBUTES = "* -text -eol -ident -filter -working-tree-encoding\n"

Progress = Callable[..., None]  # (files done, files in all)


@dataclass(frozen=True)
class Check:
    """What a folder holds of the data. Paths are relative to it, with slashes, sorted."""

    folder: Path
    right: tuple[str, ...]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]  # other bytes than the sums say
    extra: tuple[str, ...]  # files that the sums do not know; hidden ones are not looked at

    @property
    def complete(self) -> bool:
        return not self.missing and not self.wrong

    def __str__(self) -> str:
        total = len(self.right) + len(self.missing) + len(self.wrong)
        lines = [f"{self.folder}: {len(self.right)} of {total} files are there and right"]
        for word, paths in (("wrong", self.wrong), ("missing", self.missing)):
            if paths:
                lines.append(f"{len(paths)} {word}: {_few(paths)}")
        known = {str(PurePosixPath(path).parent) for path in (*self.right, *self.missing, *self.wrong)}
        among = [path for path in self.extra if str(PurePosixPath(path).parent) in known]
        if among:
            lines.append(f"{len(among)} foreign among them, which change a trace set or video: {_few(among)}")
        if len(self.extra) > len(among):
            lines.append(f"{len(self.extra) - len(among)} more in folders of their own, not looked at")
        return "\n".join(lines)


@dataclass(frozen=True)
class Fetched:
    """What a fetch did: files that were there already, files that it brought, and files of the source that it left out."""

    folder: Path
    kept: int
    brought: int
    ignored: tuple[str, ...]
    source: str


# --- sums ---------------------------------------------------------------------------------------------------------------


def read_sums(path: Path = SUMS) -> dict[str, str]:
    """Relative path -> SHA-256, of a file in the format of sha256sum. Raises ValueError by file and line."""
    sums: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if match is None:
            raise ValueError(f'{path}:{number}: expected "SHA-256  path", found {line[:60]!r}')
        name = match[2].removeprefix("./")
        parts = name.split("/")
        if name.startswith("\\") or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{path}:{number}: {name!r} is not a path inside a folder")
        if name in sums:
            raise ValueError(f"{path}:{number}: {name!r} is listed twice")
        sums[name] = match[1]
    if not sums:
        raise ValueError(f"{path}: no sums in it")
    return dict(sorted(sums.items()))


def check_data(folder: Path, sums: Mapping[str, str] | None = None, progress: Progress | None = None) -> Check:
    """Compare a folder with the sums. Raises FileNotFoundError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; `netllm data fetch` brings the data")
    sums = read_sums() if sums is None else sums
    found: dict[str, list[str]] = {"right": [], "missing": [], "wrong": []}
    for done, (name, digest) in enumerate(sums.items(), start=1):
        found[_state(folder / name, digest)].append(name)
        if progress:
            progress(done, len(sums))
    extra = [name for name in _files_of(folder) if name not in sums]
    return Check(folder, tuple(found["right"]), tuple(found["missing"]), tuple(found["wrong"]), tuple(extra))


def _state(path: Path, digest: str) -> str:
    if not path.is_file():
        return "wrong" if path.is_dir() else "missing"
    return "right" if runs.file_hash(path, 64) == digest else "wrong"


def _files_of(folder: Path) -> list[str]:
    names = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def _few(names: Iterable[str], show: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:show]) + (f" and {len(names) - show} more" if len(names) > show else "")


# --- fetch --------------------------------------------------------------------------------------------------------------


def fetch_data(
    folder: Path,
    *,
    source: Path | None = None,
    repository: str = REPOSITORY,
    commit: str = COMMIT,
    sums: Mapping[str, str] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Fetched:
    """Bring every file of `sums` to `folder`, from `repository` at `commit`, or from `source`.

    `source` is a clone (its copy of `commit` is read, else of what it has checked out; never its work tree) or a folder that
    was unpacked. Files that are there and right stay. Nothing appears in `folder` before all files are there and right; an
    interrupted fetch continues. `progress` is called with (files done, files in all).

    Raises ValueError naming files that are wrong, in the source or (unless `replace`) in `folder`; FileNotFoundError if the
    source lacks files, or git is not installed; OSError if git fails; runs.Busy if another process fetches to `folder`.
    """
    folder = Path(folder)
    sums = read_sums() if sums is None else sums
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        raise ValueError(f"commit {commit!r}: give the whole hash, 40 hexadecimal digits")
    said = str(source) if source is not None else f"{repository} at {commit[:12]}"
    staging = folder / STAGING
    files = staging / "files"
    ignored: tuple[str, ...] = ()
    with runs.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with runs.lock(staging):
                states = {name: _state(folder / name, digest) for name, digest in sums.items()}
                _refuse_wrong(folder, states, replace)
                wanted = {name: digest for name, digest in sums.items() if states[name] != "right"}
                if wanted:
                    files.mkdir(parents=True, exist_ok=True)
                    with _opened(source, repository, commit, staging) as tree:
                        ignored = tuple(sorted(set(tree.names()) - set(sums)))
                        _stage(tree, files, wanted, said, progress)
                    _move(files, folder, list(wanted))
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            for place in (files, staging, folder):  # leave nothing behind where nothing arrived
                with contextlib.suppress(OSError):
                    place.rmdir()
    return Fetched(folder, len(sums) - len(wanted), len(wanted), ignored, said)


def _refuse_wrong(folder: Path, states: Mapping[str, str], replace: bool) -> None:
    wrong = [name for name, state in states.items() if state == "wrong" and (not replace or (folder / name).is_dir())]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} of its files are not what the sums say: {_few(wrong)}; move them away"
            + ("" if replace else ", or fetch them anew with --replace")
        )


class Tree:
    """Files of a source by path relative to the data folder."""

    def names(self) -> list[str]:
        """Relative paths of all files."""
        raise NotImplementedError

    def bring(self, names: list[str], to: Path) -> None:
        """Write some of the files under `to`."""
        raise NotImplementedError


def _stage(tree: Tree, files: Path, sums: Mapping[str, str], source: str, progress: Progress | None) -> None:
    """Bring what `files` lacks of `sums` there, batch by batch; a file gets its name there once it is checked."""
    there = set(tree.names())
    if missing := [name for name in sums if name not in there]:
        raise FileNotFoundError(f"{source}: {len(missing)} files are not there: {_few(missing)}")
    for name in set(_files_of(files)) - set(sums):  # of an interrupted fetch by other sums
        (files / name).unlink()
    left = [name for name, digest in sums.items() if _state(files / name, digest) != "right"]
    wrong: list[str] = []
    for first in range(0, len(left), BATCH):
        batch = left[first : first + BATCH]
        arrived = runs.aside_of(files.parent / "arrived")
        try:
            tree.bring(batch, arrived)
            for name in batch:
                if _state(arrived / name, sums[name]) != "right":
                    wrong.append(f"{name} ({_size(arrived / name)})")
                    continue
                (files / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(arrived / name, files / name)
        finally:
            shutil.rmtree(arrived, ignore_errors=True)
        if progress:
            progress(len(sums) - len(left) + first + len(batch), len(sums))
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} files are not what the sums say: {_few(wrong)}; nothing was changed")


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes" if path.is_file() else "not a file"


def _move(files: Path, folder: Path, names: list[str]) -> None:
    """Put checked files in place: whole folders where nothing is there yet, traces last, as `find_registry` goes by them."""
    for top in sorted({name.split("/")[0] for name in names}, key=lambda top: (top == "traces", top)):
        if not os.path.lexists(folder / top):
            os.replace(files / top, folder / top)
            continue
        for name in names:
            if name.split("/")[0] == top:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(files / name, folder / name)
    runs.flush_folder(folder)


# --- sources ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(source: Path | None, repository: str, commit: str, staging: Path) -> Iterator[Tree]:
    """The repository, or a clone (with or without work tree), or a folder with the data in it."""
    if source is None:
        with _from_git(repository, commit, staging) as tree:
            yield tree
        return
    source = Path(source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder")
    if (source / ".git").exists() or ((source / "HEAD").is_file() and (source / "objects").is_dir()):
        git_version()
        yield _Clone(Git(source), commit)
        return
    for place in (source / INSIDE, source / "data", source):
        if (place / "traces").is_dir():
            yield _Folder(place)
            return
    raise FileNotFoundError(f"{source}: neither a clone nor a folder with {INSIDE} or traces/ in it")


class _Folder(Tree):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        return _files_of(self.folder)

    def bring(self, names: list[str], to: Path) -> None:
        for name in names:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, to / name)


class _Clone(Tree):
    """Files as a commit has them, read from the objects of a clone."""

    def __init__(self, git: Git, commit: str) -> None:
        self.git = git
        there = git.run("cat-file", "-e", f"{commit}^{{commit}}", check=False).returncode == 0
        # a clone of another day has the same data as a rule, and the sums decide
        self.objects = _ls_tree(git, commit if there else "HEAD")
        if not self.objects:
            raise FileNotFoundError(f"{git.folder}: a clone, but {INSIDE} is not in it")

    def names(self) -> list[str]:
        return list(self.objects)

    def bring(self, names: list[str], to: Path) -> None:
        wanted = "".join(f"{self.objects[name]}\n" for name in names).encode()
        out = self.git.run("cat-file", "--batch", input=wanted).stdout
        for name in names:
            head, _, out = out.partition(b"\n")
            if not re.fullmatch(rb"[0-9a-f]+ blob [0-9]+", head):
                raise FileNotFoundError(f"{self.git.folder}: the clone lacks {name} (a partial one?)")
            size = int(head.split()[2])
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(out[:size])
            out = out[size + 1 :]


class _Sparse(Tree):
    """A partial clone without the files' contents, whose sparse checkout asks for a batch of them at a time."""

    def __init__(self, git: Git, commit: str) -> None:
        self.git, self.commit = git, commit
        self.objects = _ls_tree(git, commit)

    def names(self) -> list[str]:
        return list(self.objects)

    def bring(self, names: list[str], to: Path) -> None:
        patterns = "".join("/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", f"{INSIDE}/{name}") + "\n" for name in names)
        (self.git.folder / ".git" / "info" / "sparse-checkout").write_text(patterns)
        self.git.run("read-tree", "-m", "-u", self.commit)
        os.replace(self.git.folder / INSIDE, to)


@contextlib.contextmanager
def _from_git(repository: str, commit: str, staging: Path) -> Iterator[Tree]:
    """A new partial clone in `staging`, removed afterwards. After a kill the next process, which has the lock, removes it."""
    git_version()
    place = runs.aside_of(staging / "clone")
    place.mkdir(parents=True)
    git = Git(place, repository)
    try:
        git.run("init", "--quiet", "--template=")
        info = place / ".git" / "info"
        info.mkdir(exist_ok=True)
        (info / "attributes").write_text(ATTRIBUTES)
        (info / "sparse-checkout").write_text("/nothing\n")
        git.run("config", "remote.origin.url", os.path.abspath(repository) if os.path.isdir(repository) else repository)
        git.run("fetch", "--quiet", "--no-tags", "--depth=1", "--filter=blob:none", "origin", commit)
        yield _Sparse(git, commit)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _ls_tree(git: Git, commit: str) -> dict[str, str]:
    """Path relative to the data folder -> object, of the plain files of a commit."""
    objects = {}
    for entry in git.run("ls-tree", "-r", "-z", "--full-tree", commit, "--", f"{INSIDE}/").stdout.split(b"\0"):
        if entry:
            about, _, path = entry.partition(b"\t")
            mode, _, name = about.decode().split()
            if mode.startswith("100"):  # neither links nor submodules
                objects[os.fsdecode(path).removeprefix(f"{INSIDE}/")] = name
    return objects


@dataclass(frozen=True)
class Git:
    """Runs git in a folder, never asking anything. Errors are one line that says what to do."""

    folder: Path
    repository: str | None = None

    def run(self, *words: str, input: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """`git words…` in the folder. With `check`, OSError or ValueError with git's own last line and what to do if it fails."""
        settings = [word for key, value in GIT_SETTINGS.items() for word in ("-c", f"{key}={value}")]
        # "--git-dir" and its like may come from a hook that this runs in
        environment = {key: value for key, value in os.environ.items() if key not in _OF_A_HOOK} | _QUIET
        environment.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=30")
        command = ["git", "-C", str(self.folder), *settings, *words]
        done = subprocess.run(command, input=input, capture_output=True, env=environment, check=False)
        if check and done.returncode:
            raise self._error(words[0], done.stderr.decode(errors="replace"))
        return done

    def _error(self, word: str, said: str) -> Exception:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        told = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines or ["no message"]
        line = re.sub(r"^(fatal|error): ", "", told[0])
        full = "unable to write" in said and shutil.disk_usage(self.folder).free < 2**20  # git does not say why
        if full or "No space left on device" in said:
            return OSError("No space left on device")  # runs.storage_errors makes the message
        if "dubious ownership" in said:
            return OSError(
                f"{self.folder}: git does not read another user's clone; name its folder {INSIDE}, or run "
                f"git config --global --add safe.directory {self.folder}"
            )
        if self.repository is None:
            return OSError(f"{self.folder}: git {word} failed: {line}")
        if re.search(r"not our ref|unadvertised object|remote ref|no such commit", said, re.IGNORECASE):
            return ValueError(f"{self.repository}: the commit is not there ({line}); name another one with --commit")
        return OSError(
            f"{self.repository}: git {word} failed: {line}; check network and proxy, or clone it elsewhere and "
            "name the clone with --from"
        )


_OF_A_HOOK = {
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_NAMESPACE", "GIT_COMMON_DIR", "GIT_PREFIX", "GIT_CEILING_DIRECTORIES",
}  # fmt: skip
_QUIET = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",
    "SSH_ASKPASS_REQUIRE": "never",
    "GCM_INTERACTIVE": "never",
    "LC_ALL": "C",
}


def git_version() -> tuple[int, ...]:
    """Version of git. Raises FileNotFoundError if there is none, OSError if it is too old."""
    advice = f"or bring the data from a clone or an unpacked archive of {REPOSITORY} with --from"
    try:
        said = subprocess.run(["git", "--version"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        raise FileNotFoundError(f"git is not installed; install it, {advice}") from None
    match = re.search(r"(\d+)\.(\d+)", said)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < OLDEST_GIT:
        raise OSError(
            f"{said.strip() or 'git of unknown version'} is too old (2.25 is needed); get a newer one, {advice}"
        )
    return version
