"""NetLLM's own data: brought by git, or copied from a folder, and checked file by file.

`netllm_data.sha256` beside this module, in the format of sha256sum, says which files there are and what is in them. Nothing
appears in the destination before all of it is there and right, so that nobody takes half of the data for the whole.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from netllm_lib import runs

REPOSITORY = "https://github.com/duowuyms/NetLLM"
COMMIT = "32136668e6f20fd0deea44eefbdd4373d6cab178"
INSIDE = "adaptive_bitrate_streaming/data"  # folder of the repository that has the data
SUMS = Path(__file__).with_name("netllm_data.sha256")
STAGING = ".fetch"  # in the destination, while a fetch is at work

# Files arrive byte for byte. The user's other settings stay: proxies, certificates and mirrors are among them.
GIT_SETTINGS = {
    "core.autocrlf": "false",
    "core.eol": "lf",
    "core.symlinks": "false",  # a link becomes a small file, which then has the wrong sum
    "core.sparseCheckout": "true",
    "core.sparseCheckoutCone": "false",
    "core.hooksPath": os.devnull,
    "http.lowSpeedLimit": "100",  # bytes/s; a dead connection ends after a minute
    "http.lowSpeedTime": "60",
}
GIT_NEVER_ASKS = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "SSH_ASKPASS_REQUIRE": "never", "LC_ALL": "C"}
GIT_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY")


def read_sums(path: Path = SUMS) -> dict[str, str]:
    """Relative path -> SHA-256, of a file in the format of sha256sum. Raises ValueError by file and line."""
    sums: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?([^\\:]+)", line)
        if match is None or any(part in ("", ".", "..") for part in match[2].split("/")):
            raise ValueError(f'{path}:{number}: expected "SHA-256  path inside a folder", found {line[:100]!r}')
        sums[match[2]] = match[1]
    if not sums:
        raise ValueError(f"{path}: no sums in it")
    return dict(sorted(sums.items()))


def check_data(folder: Path, sums: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Names of files that are "right", "wrong" (other bytes than the sums say) or "missing", relative to `folder`; and "foreign"
    ones beside them, which the sums do not know and which change a trace set or video."""
    folder, sums = Path(folder), read_sums() if sums is None else sums
    found: dict[str, list[str]] = {"right": [], "wrong": [], "missing": []}
    for name, digest in sums.items():
        found[_state(folder / name, digest)].append(name)
    places = {(folder / name).parent for name in sums}
    beside = [path for place in places for path in place.glob("[!.]*") if path.is_file()]
    return found | {"foreign": sorted({path.relative_to(folder).as_posix() for path in beside} - sums.keys())}


def fetch_data(
    folder: Path,
    *,
    source: Path | None = None,
    repository: str = REPOSITORY,
    commit: str = COMMIT,
    sums: Mapping[str, str] | None = None,
    replace: bool = False,
) -> int:
    """Bring the files of `sums` that `folder` lacks, from `repository` at `commit`, or from `source`; returns how many.

    `source` is an unpacked archive or a clone, of which the work tree is read: git never runs there, because a clone's
    configuration can name commands that git would run. Files that are there and right stay.

    Raises ValueError naming files that are wrong, in the source or (unless `replace`) in `folder`; FileNotFoundError if the
    source lacks files, or git is not installed; OSError if git fails; runs.Busy if another process fetches to `folder`.
    """
    folder, sums = Path(folder), read_sums() if sums is None else sums
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        raise ValueError(f"commit {commit!r}: give the whole hash, 40 hexadecimal digits")
    staging = folder / STAGING
    with runs.storage_errors(folder), runs.lock(staging):
        found = check_data(folder, sums)
        if found["wrong"] and not replace:
            raise ValueError(
                f"{folder}: {len(found['wrong'])} of its files are not what the sums say: {few(found['wrong'])}; move them away, "
                "or fetch them anew with --replace"
            )
        wanted = {name: sums[name] for name in (*found["wrong"], *found["missing"])}
        if wanted:
            shutil.rmtree(staging, ignore_errors=True)  # of a fetch that was interrupted
            try:
                tree = _checkout(repository, commit, staging / "clone") if source is None else _data_in(Path(source))
                _copy(tree, staging / "data", wanted, str(source or repository))
                _move(staging / "data", folder, list(wanted))
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return len(wanted)


def _state(path: Path, digest: str) -> str:
    if not path.is_file():
        return "wrong" if path.exists() else "missing"
    return "right" if runs.file_hash(path, 64) == digest else "wrong"


def few(names: list[str], show: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:show]) + (f" and {len(names) - show} more" if len(names) > show else "")


def _data_in(source: Path) -> Path:
    for place in (source / INSIDE, source / "data", source):
        if (place / "traces").is_dir():
            return place
    raise FileNotFoundError(f"{source}: no folder {INSIDE} and no traces/ in it; is something checked out there?")


def _copy(tree: Path, to: Path, wanted: Mapping[str, str], source: str) -> None:
    """Copy files, and compare the copies with their sums."""
    if missing := [name for name in wanted if not (tree / name).is_file()]:
        raise FileNotFoundError(f"{source}: {len(missing)} files are not there: {few(missing)}")
    for name in wanted:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tree / name, to / name)
    if wrong := [name for name, digest in wanted.items() if _state(to / name, digest) != "right"]:
        raise ValueError(f"{source}: {len(wrong)} files are not what the sums say: {few(wrong)}; nothing was changed")


def _move(files: Path, folder: Path, names: list[str]) -> None:
    """Put checked files in place: whole folders where nothing is there yet, traces last, as `find_registry` goes by them."""
    for top in sorted({name.split("/")[0] for name in names}, key=lambda top: (top == "traces", top)):
        if not (folder / top).exists():
            os.replace(files / top, folder / top)
            continue
        for name in names:
            if name.split("/")[0] == top:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(files / name, folder / name)
    runs.flush(folder)


def _checkout(repository: str, commit: str, clone: Path) -> Path:
    """The data folder of a new clone that holds nothing else: without history, and without the contents of other files."""
    url = os.path.abspath(repository) if os.path.isdir(repository) else repository
    clone.mkdir(parents=True)
    _git(clone, repository, "init", "--quiet", "--template=")
    (clone / ".git" / "info").mkdir()
    (clone / ".git" / "info" / "attributes").write_text("* -text -eol -ident -filter -working-tree-encoding\n")
    (clone / ".git" / "info" / "sparse-checkout").write_text(f"/{INSIDE}/\n")
    _git(clone, repository, "remote", "add", "origin", url)
    _git(clone, repository, "fetch", "--quiet", "--no-tags", "--depth=1", "--filter=blob:none", "origin", commit)
    _git(clone, repository, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    return clone / INSIDE


def _git(folder: Path, repository: str, *words: str) -> None:
    """Run git in a clone of our own, never asking anything. Errors are one line that says what to do."""
    settings = [word for key, value in GIT_SETTINGS.items() for word in ("-c", f"{key}={value}")]
    environment = {key: value for key, value in os.environ.items() if key not in GIT_OF_A_HOOK} | GIT_NEVER_ASKS
    environment.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=30")
    command = ["git", "-C", str(folder), *settings, *words]
    elsewhere = "or clone it elsewhere and name the clone with --from"
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        raise FileNotFoundError(f"git is not installed; install it, {elsewhere}") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        if shutil.disk_usage(folder).free < 2**20:  # git does not always say why it could not write
            raise OSError(f"git {words[0]}: No space left on device")
        line = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1])
        raise OSError(f"{repository}: git {words[0]} failed: {line}; check commit, network and proxy, {elsewhere}")
