"""What the tests of the documents' commands need: the documents' blocks, a checkout in which every command runs as it stands, and
a small shell that runs `netllm` in this process."""

from __future__ import annotations

import contextlib
import glob
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import numpy as np
from safetensors.numpy import save_file

import run_fixtures
from llm_fixtures import write_plm
from netllm_lib import cli, runs
from netllm_lib.abr import convert, fetch, synthetic
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.pensieve import SHAPES
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.traces import SAMPLE, Registry, TraceSet, split_validation
from netllm_lib.plm import PLMConfig
from upstream_tree import write_tree

LANGUAGES = ("sh", "text", "python", "toml", "json")
"""Of the fences: commands, output, code that is run; files."""


# --- documents ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file. `line` is that of its first line of content."""

    path: Path
    line: int
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file, in order."""
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None  # line, indent, language
    lines: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = re.fullmatch(r"(\s*)```(\S*)\s*", line)
        if opened is None and fence:
            opened, lines = (number + 1, fence[1], fence[2]), []
        elif opened is not None and fence and not fence[2]:
            found.append(Block(path, opened[0], opened[2], "\n".join(lines) + "\n"))
            opened = None
        elif opened is not None:
            lines.append(line.removeprefix(opened[1]))
    if opened is not None:
        raise ValueError(f"{path}:{opened[0]}: this block is not closed")
    return found


@dataclass(frozen=True)
class Command:
    """A command of a document: one line of an `sh` block without its comment, lines that end with a backslash joined."""

    where: str
    text: str
    code: int = 0
    """The exit code to expect: a comment `# exits with 1` says another one than zero."""


def commands(block: Block) -> list[Command]:
    """The commands of an `sh` block, in order."""
    found, pending = [], ""
    for offset, line in enumerate(block.text.splitlines()):
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1]
            continue
        text, comment = cut(pending + line, "#")
        pending = ""
        told = re.search(r"exits with (\d+)", comment)
        if text.strip():
            where = f"{block.path.relative_to(runs.PROJECT)}:{block.line + offset}"
            found.append(Command(where, text.strip(), int(told[1]) if told else 0))
    return found


def cut(line: str, characters: str) -> tuple[str, str]:
    """A shell line before and from the first of `characters` that is not quoted; a `#` counts only where a word begins."""
    quote = ""
    for position, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in characters and (character != "#" or position == 0 or line[position - 1].isspace()):
            return line[:position], line[position:]
    return line, ""


# --- the checkout -------------------------------------------------------------------------------------------------------


@dataclass
class Sandbox:
    """A checkout and a home folder below `root` in which the documents' commands run.

    The checkout has this one's sources, notebooks and environments, synthetic traces under the names of NetLLM's, tiny PLMs, and
    what `make demo` leaves in reports/. The home folder has `NetLLM`: a clone of the original with its data, in which a run was
    made. `netllm data fetch` brings its data from there, checked by its sums.
    """

    root: Path
    sums: Path
    commit: str
    namespaces: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """Names that a document's Python blocks have defined so far."""
    changed: bool = True
    """Something was run since the sandbox was restored."""

    @property
    def checkout(self) -> Path:
        return self.root / "checkout"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "NETLLM_DATA": str(self.checkout / "data" / "netllm"),
            "NETLLM_REPORTS": str(self.checkout / "reports"),
            "NETLLM_CACHE": str(self.checkout / "data" / "cache"),
            "MINARI_DATASETS_PATH": str(self.home / ".minari" / "datasets"),
            "PATH": f"{self.checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def restore(self) -> None:
        """Everything as it was when the sandbox was made."""
        if not self.changed:
            return
        self.changed = False
        self.namespaces.clear()
        for name in ("checkout", "home"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            shutil.copytree(self.root / "pristine" / name, self.root / name, symlinks=True)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This process as if it had been started in the checkout."""
        self.changed = True
        with (
            mock.patch.dict(os.environ, self.environment),
            mock.patch.object(runs, "PROJECT", self.checkout),
            mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
            mock.patch.object(fetch, "REPOSITORY", (self.home / "NetLLM").as_uri()),
            mock.patch.object(fetch, "COMMIT", self.commit),
            mock.patch.object(fetch, "SUMS", self.sums),
            # completion is for the shell that a command is typed in; under make that would be sh
            mock.patch("shellingham.detect_shell", return_value=("bash", "/bin/bash")),
            contextlib.chdir(self.checkout),
        ):
            yield

    def run(self, command: Command) -> str:
        """Run a command and return its output. AssertionError if it ends with another exit code than the one to expect.

        `[NAME=VALUE…] netllm … [| …] [> …]` runs here, what follows the bar in bash; everything else in bash.
        """
        head, rest = cut(command.text, "|>&;<")
        words = self.words(head)
        given = dict(word.split("=", 1) for word in itertools.takewhile(_assigns, words))
        words = words[len(given) :]
        if words[:1] in (["netllm"], [".venv/bin/netllm"]):
            assert rest[:1] in ("", "|", ">"), f"{command.where}: {command.text}: one command a line"
            with self.inside(), mock.patch.dict(os.environ, given):
                code, output, errors = call(*words[1:])
            if rest and code == command.code:
                code, output, errors = self.bash(f"cat {rest}", output)
        else:
            assert "netllm " not in command.text, f"{command.where}: {command.text}: this shell cannot run netllm so"
            code, output, errors = self.bash(command.text)
        assert code == command.code, f"{command.where}: {command.text}\nexit code {code}\n{output}\n{errors}"
        return output

    def words(self, text: str) -> list[str]:
        """The words of a simple command: quotes taken off, `~` and names with `*` replaced as bash does."""
        found: list[str] = []
        for word in shlex.split(text, posix=False):
            plain = "".join(shlex.split(word))
            if word[:1] in "'\"":
                found.append(plain)
                continue
            if plain.startswith("~/"):
                plain = str(self.home / plain[2:])
            matches = sorted(glob.glob(plain, root_dir=self.checkout)) if "*" in plain else []
            found += matches or [plain]
        return found

    def bash(self, text: str, given: str = "") -> tuple[int, str, str]:
        """A line of bash in the checkout, `given` its standard input: exit code, standard output, standard error."""
        self.changed = True
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", text],
            cwd=self.checkout,
            env={**os.environ, **self.environment},
            input=given,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def execute(self, block: Block) -> str:
        """Run a Python block after those before it in the same document; returns what it printed."""
        printed = io.StringIO()
        names = self.namespaces.setdefault(block.path, {"__name__": "__main__"})
        code = compile("\n" * (block.line - 1) + block.text, str(block.path), "exec")
        with self.inside(), contextlib.redirect_stdout(printed):
            exec(code, names)
        return printed.getvalue()


def _assigns(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


def call(*words: str) -> tuple[int, str, str]:
    """`netllm words…` in this process: exit code, standard output, standard error."""
    out, errors = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            cli.main(words)
        except SystemExit as stop:
            code = stop.code or 0
    return int(code), out.getvalue(), errors.getvalue()


def make_sandbox(root: Path) -> Sandbox:
    """Make the checkout and the home folder; takes about ten seconds."""
    cache = runs.cache_root()
    checkout, home = root / "checkout", root / "home"
    checkout.mkdir(parents=True)
    for name in (".venv", ".venv-tf", "docs", "notebooks", "netllm_lib", "tests", "Makefile", "pyproject.toml"):
        if (runs.PROJECT / name).exists():
            (checkout / name).symlink_to(runs.PROJECT / name)
    (checkout / "data" / "cache").mkdir(parents=True)
    (checkout / "data" / "sample").symlink_to(SAMPLE)
    (cache / "plms").mkdir(parents=True, exist_ok=True)
    (checkout / "data" / "cache" / "plms").symlink_to(cache / "plms")

    tree = write_tree(home / "NetLLM")
    _write_data(home / "NetLLM" / fetch.INSIDE, checkout / "data" / "cache")
    commit = _commit(home / "NetLLM")
    sums = root / "sums"
    data = home / "NetLLM" / fetch.INSIDE
    known = sorted(p for top in ("traces", "videos", "all_models") for p in (data / top).rglob("*") if p.is_file())
    sums.write_text("".join(f"{runs.file_hash(path, 64)}  {path.relative_to(data)}\n" for path in known))
    for top in ("traces", "videos", "all_models"):
        shutil.copytree(data / top, checkout / "data" / "netllm" / top)

    shutil.copytree(tree.plm, checkout / "downloaded_plms" / "llama" / "base")
    write_plm(checkout / "downloaded_plms" / "mistral" / "base", "mistral")
    _write_runs(checkout)
    _write_other_tools_files(checkout)
    for folder in (checkout, home):
        shutil.copytree(folder, root / "pristine" / folder.name, symlinks=True)
    return Sandbox(root, sums, commit)


def _write_data(root: Path, cache: Path) -> None:
    """Synthetic traces and a video under NetLLM's names, beside the bundled sample, and an actor that was exported before."""
    _write_traces(root)
    for name in ("traces", "videos"):
        shutil.copytree(SAMPLE / name, root / name, dirs_exist_ok=True)
    checkpoint = root / "all_models" / "genet" / "nn_model_ep_9900.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.with_name(f"{checkpoint.name}.index").write_bytes(b"index")
    weights = checkpoint.with_name(f"{checkpoint.name}.data-00000-of-00001")
    weights.write_bytes(b"weights")
    rng = np.random.default_rng(0)
    layers = {f"{name}/W": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}
    layers |= {f"{name}/b": np.zeros(shape[-1], np.float32) for name, shape in SHAPES.items()}
    (cache / "actors").mkdir(parents=True)
    save_file(layers, cache / "actors" / f"genet-{runs.file_hash(weights, digits=10)}.safetensors")


def _write_traces(root: Path, **_: int) -> None:
    """A training set that is as large as a document may ask for, a small test set, a video."""
    synthetic.write_traces(synthetic.generate_traces("fcc-train", 100, 17), root, "train")
    synthetic.write_traces(synthetic.generate_traces("fcc-test", 6, 18), root, "test")
    synthetic.write_video(synthetic.generate_video("video1", 17), root)


def _commit(folder: Path) -> str:
    """Make a repository of a folder, its weights left out as in the original's; returns the hash of its commit."""
    (folder / ".gitignore").write_text("downloaded_plms/\nft_plms/\nartifacts/\n")
    settings = ["user.name=t", "user.email=t@t", "init.defaultBranch=main", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *(word for setting in settings for word in ("-c", setting))]
    asked = [["config", f"uploadpack.{name}", "true"] for name in ("allowFilter", "allowAnySHA1InWant")]
    for words in (["init", "-q"], *asked, ["add", "-A"], ["commit", "-q", "-m", "NetLLM"], ["rev-parse", "HEAD"]):
        done = subprocess.run([*command, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _write_runs(checkout: Path) -> None:
    """What `make demo` leaves: runs of notebooks 03, 04 and 05 named demo-…, with traces of data/netllm and the PLM llama/base."""

    def in_a_folder(_: str, rank: int) -> PLMConfig:
        return PLMConfig(str(checkout / "downloaded_plms" / "llama" / "base"), rank=rank)

    with (
        mock.patch.object(run_fixtures, "write_sample", _write_traces),
        mock.patch.object(run_fixtures, "PLMConfig", in_a_folder),
    ):
        small = run_fixtures.prepare_run(checkout / "small", epochs=1)
    for notebook, letters in (("03_experience_pool", "3f"), ("04_finetune", "4f"), ("05_test", "5f")):
        here, there = small.folder(notebook), checkout / "reports" / "runs" / notebook / f"demo-{letters * 6}"
        shutil.copytree(here, there)
        manifest = {"status": "done", "kind": notebook, "name": "demo", "finished": runs.time_text(), "seconds": 1.0}
        runs.write_json(there / runs.MANIFEST, manifest)
    pool = checkout / "reports" / "runs" / "03_experience_pool" / f"demo-{'3f' * 6}"
    _set_validation_aside(pool, small.data)
    moved = {str(small.folder(p.parent.name)): str(p) for p in checkout.glob("reports/runs/*/demo-*")}
    for path in checkout.glob("reports/runs/*/demo-*/*.json"):
        text = path.read_text()
        for here_text, there_text in moved.items():
            text = text.replace(json.dumps(here_text)[1:-1], json.dumps(there_text)[1:-1])
        path.write_text(text)
    shutil.rmtree(checkout / "small")


def _set_validation_aside(folder: Path, data: Path) -> None:
    """Give a pool's folder what notebook 03 also writes, for notebook 04: the split of the traces and a pool of the other part."""
    registry = Registry(data)
    everything, video = registry.trace_set("fcc-train"), registry.video("video1")
    training, held = split_validation(everything, 0.15, 1)
    generate_pool(RobustMPC(video), held, video, sound_episodes(held), path=folder / "validation_pool")
    names = {"train": training.names, "validation": held.names}
    runs.write_json(folder / "split.json", {"traces": everything.name, "video": video.name, **names})


def _write_other_tools_files(checkout: Path) -> None:
    """Traces and a video as other tools write them, for `netllm data import`."""
    registry = Registry(SAMPLE)
    whole = registry.trace_set("sample-test")
    few = TraceSet("sample-test", whole.traces[:3])
    for form, name in (("mahimahi", "lte_logs"), ("sabre", "sabre_traces")):
        convert.export_traces(few, checkout / name, form)
    trace = whole.traces[0]
    rows = [f"{time_s:g},{mbps * 1000:.0f}" for time_s, mbps in zip(trace.time_s, trace.mbps, strict=True)]
    (checkout / "log.csv").write_text("\n".join(["t,down", *rows]) + "\n")
    bits = (registry.video("sample").sizes_bytes.T * 8).tolist()
    for kbps, sizes in zip((300, 750, 1200, 1850, 2850, 4300), registry.video("sample").sizes_bytes, strict=True):
        (checkout / "encoded" / str(kbps)).mkdir(parents=True)
        for number, size in enumerate(sizes):
            with open(checkout / "encoded" / str(kbps) / f"chunk{number:03}.m4s", "wb") as file:
                file.truncate(size // 100)
    movie = {
        "segment_duration_ms": 4000,
        "bitrates_kbps": [300, 750, 1200, 1850, 2850, 4300],
        "segment_sizes_bits": bits,
    }
    (checkout / "movie.json").write_text(json.dumps(movie))
