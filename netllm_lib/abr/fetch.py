"""NetLLM's own data: brought by git, or copied from a folder, and checked file by file.

`netllm_data.sha256` beside this module, in the format of sha256sum, says which files there are and what is in them. Nothing
appears in the destination before all of it is there and right, so that nobody takes half of the data for the whole.
"""

from __future__ import annotations

import os
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

# Files arrive byte for byte (a link becomes a small file, which then has the wrong sum), and a dead connection ends after a minute.
# The user's other settings stay: proxies, certificates and mirrors are among them. From a folder on this machine git takes nothing,
# because it would follow that folder's configuration, which can name commands.
GIT_SETTINGS = (
    f"core.autocrlf=false core.eol=lf core.symlinks=false core.hooksPath={os.devnull} core.sparseCheckout=true "
    "core.sparseCheckoutCone=false http.lowSpeedLimit=100 http.lowSpeedTime=60"
)
GIT_NEVER_ASKS = {"GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "SSH_ASKPASS_REQUIRE": "never", "LC_ALL": "C"}
PROTOCOLS = "https:http:ssh:git"
ELSEWHERE = "or clone it elsewhere and name the clone with --from"
GIT_OF_A_HOOK = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
)
MOST_BYTES = 50_000_000  # of one file


def read_sums(path: Path | None = None) -> dict[str, str]:
    """Relative path -> SHA-256."""
    pairs = (line.split("  ", 1) for line in (path or SUMS).read_text().splitlines())
    return {name: digest for digest, name in pairs}


def check_data(folder: Path, sums: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """Names of files that are "right", "wrong" (other bytes) or "missing", relative to `folder`, and "foreign" ones beside them,
    which change a trace set or video."""
    sums = read_sums() if sums is None else sums
    found: dict[str, list[str]] = {"right": [], "wrong": [], "missing": []}
    for name, digest in sums.items():
        path = folder / name
        right = path.is_file() and runs.file_hash(path, 64) == digest
        found["right" if right else "wrong" if path.exists() else "missing"].append(name)
    places = {(folder / name).parent for name in sums}
    beside = [path for place in places for path in place.glob("[!.]*") if path.is_file()]
    return found | {"foreign": sorted({path.relative_to(folder).as_posix() for path in beside} - sums.keys())}


def fetch_data(folder: Path, *, source: Path | None = None, repository: str = REPOSITORY, replace: bool = False) -> int:
    """Bring the files that `folder` lacks, from `repository`, or from `source`; returns how many.

    `source` is an unpacked archive or a clone, of which the work tree is read: git never runs there, because a clone's
    configuration can name commands that git would run. Files that are there and right stay. Raises ValueError naming files
    that are wrong, in the source or (unless `replace`) in `folder`; OSError if files are missing or git fails; runs.Busy.
    """
    sums, origin, staging = read_sums(), source or repository, folder / STAGING
    with runs.storage_errors(folder), runs.lock(staging):
        found = check_data(folder)
        if found["wrong"] and not replace:
            raise ValueError(f"{folder}: {_wrong(found['wrong'])}; move them away, or fetch them anew with --replace")
        wanted = {name: sums[name] for name in (*found["wrong"], *found["missing"])}
        shutil.rmtree(staging, ignore_errors=True)  # of a fetch that was interrupted
        if not wanted:
            return 0
        try:
            staging.mkdir()  # new: a link that lies there leads to somebody else's clone
            tree = _checkout(repository, staging / "clone") if source is None else _data_in(source)
            if missing := [name for name in wanted if not (tree / name).is_file()]:
                raise FileNotFoundError(f"{origin}: {len(missing)} files are not there: {few(missing)}")
            for name in wanted:
                (staging / "data" / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / "data" / name).write_bytes(runs.read_bytes(tree / name, MOST_BYTES))
            if wrong := check_data(staging / "data", wanted)["wrong"]:
                raise ValueError(f"{origin}: {_wrong(wrong)}; nothing was changed")
            for name in sorted(wanted, key=lambda name: name.startswith("traces/")):  # by which `find_registry` goes
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / "data" / name, folder / name)
            runs.flush(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return len(wanted)


def few(names: list[str]) -> str:
    """The first five of a list of names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _wrong(names: list[str]) -> str:
    return f"{len(names)} of its files are not what the sums say: {few(names)}"


def _data_in(source: Path) -> Path:
    for place in (source / INSIDE, source / "data", source):
        if (place / "traces").is_dir():
            return place
    raise FileNotFoundError(f"{source}: no folder {INSIDE} and no traces/ in it; is something checked out there?")


def _checkout(repository: str, clone: Path) -> Path:
    """The data folder of a new clone that holds nothing else: without history, and without the contents of other files."""
    (clone / ".git" / "info").mkdir(parents=True)
    (clone / ".git" / "info" / "attributes").write_text("* -text -eol -ident -filter -working-tree-encoding\n")
    (clone / ".git" / "info" / "sparse-checkout").write_text(f"/{INSIDE}/\n")
    settings = [word for setting in GIT_SETTINGS.split() for word in ("-c", setting)]
    environment = {key: value for key, value in os.environ.items() if key not in GIT_OF_A_HOOK} | GIT_NEVER_ASKS
    environment["GIT_ALLOW_PROTOCOL"] = PROTOCOLS
    environment.setdefault("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=30")
    for words in (
        ["init", "--quiet", "--template="],
        ["remote", "add", "--", "origin", repository],
        [
            "fetch",
            "--quiet",
            "--no-tags",
            "--no-recurse-submodules",
            "--depth=1",
            "--filter=blob:none",
            "origin",
            COMMIT,
        ],
        ["checkout", "--quiet", "--detach", "FETCH_HEAD"],
    ):
        command = ["git", "-C", str(clone), *settings, *words]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
        except FileNotFoundError:
            raise FileNotFoundError(f"git is not installed; install it, {ELSEWHERE}") from None
        if done.returncode:
            if shutil.disk_usage(clone).free < 2**20:  # git does not always say why it could not write
                raise OSError(f"git {words[0]}: No space left on device")
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            line = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[-1])
            raise OSError(f"{repository}: git {words[0]} failed: {line}; check network and proxy, {ELSEWHERE}")
    return clone / INSIDE
