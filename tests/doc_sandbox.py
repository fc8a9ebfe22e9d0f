"""What the tests of the documents' commands need: the blocks, and a checkout in which bash runs every command as it is."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from markdown_it import MarkdownIt

from llm_fixtures import write_plm
from netllm_lib import runs
from netllm_lib.abr import fetch, synthetic
from netllm_lib.abr.policies.pensieve import SHAPES, save_actor
from netllm_lib.abr.traces import SAMPLE, Registry
from run_fixtures import SmallRun, make_runs
from upstream_tree import write_tree

NETLLM = """#!{python}
import sys
from pathlib import Path
sys.path.insert(0, {library!r})
from netllm_lib import cli, runs
from netllm_lib.abr import fetch
runs.PROJECT = Path({checkout!r})
fetch.REPOSITORY, fetch.COMMIT, fetch.SUMS = {repository!r}, {commit!r}, runs.PROJECT.with_name("sums")
fetch.PROTOCOLS = "file"
cli.main()
"""
TOP = ("traces", "videos", "all_models")


@dataclass(frozen=True)
class Command:
    """A command of a document. A comment `# exits with 1` says another exit code than zero."""

    where: str
    text: str
    code: int = 0


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file. `line` is that of its first line of content."""

    path: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(runs.PROJECT)}:{self.line}"

    @property
    def commands(self) -> list[Command]:
        """Those of an `sh` block: its lines without comments, lines that end with a backslash joined."""
        lines = self.text.replace("\\\n", "").splitlines() if self.language == "sh" else []
        parts = [[*re.split(r"(?:^|\s+)# ", line, maxsplit=1), ""] for line in lines]
        codes = [re.search(r"exits with (\d+)", comment) for _, comment, *_ in parts]
        texts = zip([text.strip() for text, *_ in parts], codes, strict=True)
        return [Command(self.where, text, int(code[1]) if code else 0) for text, code in texts if text]


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file, in order."""
    fences = [token for token in MarkdownIt().parse(path.read_text()) if token.type == "fence" and token.map]
    return [Block(path, token.map[0] + 2, token.info, token.content) for token in fences if token.map]


@dataclass
class Sandbox:
    """A checkout and a home folder below `root` in which the documents' commands run.

    The checkout has this one's sources, notebooks and environments, synthetic traces under the names of NetLLM's, tiny PLMs, and
    what `make demo` leaves in reports/. The home folder has `NetLLM`: a clone of the original with its data, in which a run was
    made. `netllm data fetch` brings its data from there, checked by its sums.
    """

    root: Path
    namespaces: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """Names that a document's Python blocks have defined so far."""

    def __post_init__(self) -> None:
        self.checkout, self.home = self.root / "checkout", self.root / "home"
        data = self.checkout / "data"
        self.environment = {
            **os.environ,
            "HOME": str(self.home),
            "HF_HUB_OFFLINE": "1",
            "NETLLM_DATA": str(data / "netllm"),
            "NETLLM_REPORTS": str(self.checkout / "reports"),
            "NETLLM_CACHE": str(data / "cache"),
            "PATH": f"{self.checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def restore(self) -> None:
        """Everything as it was when the sandbox was made."""
        self.namespaces.clear()
        for place in (self.checkout, self.home):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(self.root / "pristine" / place.name, place, symlinks=True)

    def run(self, command: Command) -> str:
        """Run a command in bash and return its output. AssertionError if it ends with another exit code than the one to expect."""
        words = ["bash", "-o", "pipefail", "-c", command.text]
        done = subprocess.run(
            words, cwd=self.checkout, env=self.environment, timeout=600, capture_output=True, text=True
        )
        shown = f"{command.where}: {command.text}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == command.code, shown
        return done.stdout

    def execute(self, block: Block) -> None:
        """Run a Python block after those before it in the same document, as if the library lay in the checkout."""
        names = self.namespaces.setdefault(block.path, {"__name__": "__main__"})
        code = compile("\n" * (block.line - 1) + block.text, str(block.path), "exec")
        project, variables = (
            mock.patch.object(runs, "PROJECT", self.checkout),
            mock.patch.dict(os.environ, self.environment),
        )
        with project, variables, contextlib.chdir(self.checkout), contextlib.redirect_stdout(io.StringIO()):
            exec(code, names)


# --- the checkout -------------------------------------------------------------------------------------------------------


def make_sandbox(root: Path) -> Sandbox:
    """Make the checkout and the home folder; takes about ten seconds."""
    sandbox = Sandbox(root)
    checkout, tree = sandbox.checkout, sandbox.home / "NetLLM"
    checkout.mkdir(parents=True)
    for name in (".venv-tf", "docs", "notebooks", "netllm_lib", "tests", "Makefile", "pyproject.toml"):
        if (runs.PROJECT / name).exists():
            (checkout / name).symlink_to(runs.PROJECT / name)
    cache = checkout / "data" / "cache"
    cache.mkdir(parents=True)
    (checkout / "data" / "sample").symlink_to(SAMPLE)
    (runs.cache_root() / "plms").mkdir(parents=True, exist_ok=True)
    (cache / "plms").symlink_to(runs.cache_root() / "plms")

    written = write_tree(tree)
    data = tree / fetch.INSIDE
    _write_data(data, cache)
    _link_environment(runs.PROJECT / ".venv", checkout / ".venv", tree.as_uri(), _commit(tree))
    files = sorted(path for top in TOP for path in (data / top).rglob("*") if path.is_file())
    (root / "sums").write_text("".join(f"{runs.file_hash(f, 64)}  {f.relative_to(data)}\n" for f in files))
    for top in TOP:
        shutil.copytree(data / top, checkout / "data" / "netllm" / top)
    base = checkout / "downloaded_plms" / "llama" / "base"
    shutil.copytree(written.plm, base)
    write_plm(checkout / "downloaded_plms" / "mistral" / "base", "mistral")
    with mock.patch.dict(os.environ, sandbox.environment):
        make_runs(SmallRun(checkout / "data" / "netllm", checkout / "reports", "demo-3f4f5f"), str(base), 1)
    _write_other_tools_files(checkout)
    for folder in (checkout, sandbox.home):
        shutil.copytree(folder, root / "pristine" / folder.name, symlinks=True)
    return sandbox


def _link_environment(real: Path, link: Path, repository: str, commit: str) -> None:
    """An environment that is the real one but for its `netllm`, which knows the checkout and the clone."""
    (link / "bin").mkdir(parents=True)
    for path in [*real.resolve().iterdir(), *(real.resolve() / "bin").iterdir()]:
        place = link / path.relative_to(real.resolve())
        if place not in (link / "bin", link / "bin" / "netllm"):
            place.symlink_to(path)
    known = {"library": str(runs.PROJECT), "checkout": str(link.parent), "repository": repository, "commit": commit}
    (link / "bin" / "netllm").write_text(NETLLM.format(python=sys.executable, **known))
    (link / "bin" / "netllm").chmod(0o755)


def _write_data(root: Path, cache: Path) -> None:
    """Synthetic traces and a video under NetLLM's names, beside the bundled sample, and an actor that was exported before."""
    synthetic.write_traces(synthetic.generate_traces("fcc-train", 100, 17), root, "train")
    synthetic.write_traces(synthetic.generate_traces("fcc-test", 6, 18), root, "test")
    synthetic.write_video(synthetic.generate_video("video1", 17), root)
    for name in ("traces", "videos"):
        shutil.copytree(SAMPLE / name, root / name, dirs_exist_ok=True)
    weights = root / "all_models" / "genet" / "nn_model_ep_9900.ckpt.data-00000-of-00001"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    weights.with_name("nn_model_ep_9900.ckpt.index").write_bytes(b"index")
    rng = np.random.default_rng(0)
    layers = {f"{name}/W": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in SHAPES.items()}
    layers |= {f"{name}/b": np.zeros(shape[-1], np.float32) for name, shape in SHAPES.items()}
    save_actor(layers, cache / "actors" / f"genet-{runs.file_hash(weights, digits=10)}.safetensors")


def _commit(folder: Path) -> str:
    """Make a repository of a folder, its weights left out as in the original's; returns the commit."""
    (folder / ".gitignore").write_text("downloaded_plms/\nft_plms/\nartifacts/\n")
    asked = "init -q -b main|config user.name t|config user.email t@t|config uploadpack.allowFilter true"
    asked += "|config uploadpack.allowAnySHA1InWant true|add -A|commit -q -m NetLLM|rev-parse HEAD"
    for words in asked.split("|"):
        done = subprocess.run(["git", *words.split()], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _write_other_tools_files(checkout: Path) -> None:
    """Traces as other tools write them, for `netllm data import`, and chunks of a video."""
    whole, video = Registry(SAMPLE).trace_set("sample-test"), Registry(SAMPLE).video("sample")
    for name in ("lte_logs", "sabre_traces"):
        (checkout / name).mkdir()
    for trace in whole.traces[:3]:
        stamps = np.arange(1, 100_000, int(12 / trace.mean_mbps))  # packets at an even pace
        (checkout / "lte_logs" / trace.name).write_text("\n".join(map(str, stamps)) + "\n")
        periods = [{"duration_ms": 1000, "bandwidth_kbps": 1000 * rate} for rate in trace.mbps[1:].tolist()]
        (checkout / "sabre_traces" / f"{trace.name}.json").write_text(json.dumps(periods))
    trace = whole.traces[0]
    rows = [f"{time_s:g},{mbps * 1000:.0f}" for time_s, mbps in zip(trace.time_s, trace.mbps, strict=True)]
    (checkout / "log.csv").write_text("\n".join(["t,down", *rows]) + "\n")
    kbps = [300, 750, 1200, 1850, 2850, 4300]
    for bitrate, sizes in zip(kbps, video.sizes_bytes, strict=True):
        (checkout / "encoded" / str(bitrate)).mkdir(parents=True)
        for number, size in enumerate(sizes):
            (checkout / "encoded" / str(bitrate) / f"chunk{number:03}.m4s").write_bytes(bytes(size // 100))
