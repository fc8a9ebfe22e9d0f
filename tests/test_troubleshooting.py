"""docs/troubleshooting.md quotes messages that the sources have, and many of them are what a user really gets."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_fixtures import tiny_network, toy_pool, train_on, write_plm
from netllm_lib import notebooks, runs
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.synthetic import write_sample
from netllm_lib.runs import PROJECT
from netllm_lib.train import TrainConfig
from test_cli import run

PAGE = PROJECT / "docs" / "troubleshooting.md"
OTHERS = "Messages of other programs"


def quoted() -> list[str]:
    """The messages that the page quotes, without those of other programs; … stands for what varies."""
    own = PAGE.read_text().split(f"## {OTHERS}")[0]
    return [match[1] for match in re.finditer(r"^\| `(.+?)` \|", own, flags=re.MULTILINE)]


def pattern(message: str) -> str:
    """A regular expression for what a quoted message may look like."""
    return ".*?".join(re.escape(part) for part in message.split("…"))


def texts() -> list[str]:
    """All strings of the library, parts of one message joined, … for values that are filled in."""
    found: list[str] = []
    for path in sorted((PROJECT / "netllm_lib").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w*\}", "…", node.value))
    return found


def test_every_quoted_message_is_in_the_sources() -> None:
    """It is one of them, or each of its fixed parts is: a path, say, and what is wrong with it may be two strings."""
    sources = "\n".join(texts())
    whole = [re.compile(pattern(text), re.DOTALL) for text in texts() if len(text.replace("…", "")) >= 9]
    assert len(quoted()) >= 40
    for message in quoted():
        parts = [part.strip(" :;,'()") for part in message.split("…")]
        assert max(map(len, parts)) >= 9, f"{message!r} says too little to be found"
        for part in [] if any(text.fullmatch(message) for text in whole) else parts:
            assert len(part) < 6 or part in sources, f"{message!r}: no message of the library has {part!r}"


# --- the real thing -----------------------------------------------------------------------------------------------------


def said(*words: str) -> str:
    """What `netllm words…` says when it fails: one line."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        assert run(*words) in (1, 2)
    (line,) = [line for line in errors.getvalue().splitlines() if line.startswith("netllm: ")]
    return line.removeprefix("netllm: ").removeprefix("error: ")


def raised(work: Callable[[], object]) -> str:
    with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
        work()
    return str(caught.value)


def checked(message: str, text: str) -> None:
    assert message in quoted(), f"the page does not quote {message!r}"
    assert re.match(pattern(message), text), f"the page quotes {message!r}, a user gets {text!r}"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of a few traces; $NETLLM_REPORTS is empty beside it."""
    write_sample(tmp_path / "data", train=4, test=2)
    monkeypatch.setenv("NETLLM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path / "reports"))
    return tmp_path / "data"


def test_words_of_the_command_line(data: Path) -> None:
    checked("no notebook …; known: …", said("run", "nosuch"))
    checked("… has no parameter '…'…; known: …", said("run", "03", "-p", "episode", "4"))
    checked("…: parameter … is …, got …", said("run", "03", "-p", "episodes", "many"))
    checked("unknown policy …; known: …", said("play", "--policy", "nosuch"))
    checked("… … not found under … (there: …)", said("play", "--policy", "bba", "--traces", "nosuch"))


def test_broken_data(data: Path, tmp_path: Path) -> None:
    checked(
        "… …: no folder traces/ in it (expected traces/, videos/, all_models/)",
        said("data", "list", "--data", str(tmp_path)),
    )
    trace = next((data / "traces" / "test" / "sample-test").iterdir())
    for line, message in (
        ("0 fast", '…: expected "time_s Mbps", found …'),
        ("1 1\n1 2", "…: time does not increase (…)"),
    ):
        trace.write_text(line + "\n")
        checked(message, said("play", "--policy", "bba"))
    (data / "traces" / "train" / "sample-test").mkdir()
    checked("trace set … lies in two places: … and …", said("data", "list"))
    shutil.rmtree(data / "traces" / "test")
    checked("…: no trace set in it", said("play", "--policy", "bba"))


def test_units(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("time_s,mbps\n0,1\n1,2\n")
    words = ("data", "import", str(tmp_path / "log.csv"), str(tmp_path / "new"), "--format", "csv")
    checked("--unit …: name the unit, one of …", said(*words))


def test_notebooks_that_fail(data: Path, tmp_path: Path) -> None:
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    def fail(source: str, timeout_s: float = 100, name: str = "netllm-llm") -> str:
        cells = [new_code_cell('run_dir: str = ""', metadata={"tags": ["parameters"]}), new_code_cell(source)]
        kernel = {"name": name, "display_name": "NetLLM (PyTorch)", "language": "python"}
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "a.ipynb")
        return raised(lambda: notebooks.run_notebook(tmp_path / "a.ipynb", timeout_s=timeout_s))

    checked("no Jupyter kernel named …", fail("pass", name="nosuch").partition(": ")[2])
    failed = fail('raise ValueError("broken")')
    checked("…: cell … of … (…): …; executed so far: …", failed)
    assert "ValueError: broken" in failed
    checked("time limit of … s reached", fail("import time; time.sleep(60)", timeout_s=1).split("): ")[1])
    checked("the kernel died (often: out of memory)", fail("import os; os.kill(os.getpid(), 9)").split("): ")[1])
    checked("… ran, but did not write … to …", fail("pass"))
    folder, *_ = (tmp_path / "reports" / "runs" / "a").glob("run-*")
    with runs.lock(folder):
        message = "…: process … is writing it; wait until it is done, or end that process"
        checked(message, raised(lambda: runs.lock(folder).__enter__()))
    checked("no finished run of … under …: run that notebook first", raised(lambda: runs.latest("05_test")))


def test_pools(tmp_path: Path) -> None:
    checked("…: no such experience pool", said("pool", "show", str(tmp_path / "nosuch.npz")))
    (tmp_path / "exp_pool.pkl").write_bytes(b"not a pickle")
    checked("…: not a sound experience pool (…)", said("pool", "show", str(tmp_path / "exp_pool.pkl")))
    same = toy_pool(1)
    flat = ExperiencePool(same.states, same.actions, np.zeros(len(same)), same.dones)
    message = "all rewards of the pool are …: there is no range to normalise them by"
    checked(message, raised(lambda: make_windows(flat)))


def test_plms_and_checkpoints(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netllm_lib.abr.model import load_policy
    from netllm_lib.checkpoint import describe, save_checkpoint
    from netllm_lib.plm import PLMConfig, load_plm

    monkeypatch.chdir(tmp_path)
    checked("no PLM …; looked in …", raised(lambda: load_plm(PLMConfig("llama/nosuch"))))
    folder = write_plm(tmp_path / "plm", "llama")
    checked("layers=…: … has layers 1 to …", raised(lambda: load_plm(PLMConfig(str(folder), layers=9))))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    checked(
        "…: a cut download, or no safetensors (…); download it again", raised(lambda: load_plm(PLMConfig(str(folder))))
    )
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    checked("…: a Git LFS pointer, not the file itself", raised(lambda: load_plm(PLMConfig(str(folder)))))
    weights.unlink()
    message = "…: no weights (model.safetensors or pytorch_model.bin, or their shards with an index); download them"
    checked(message, raised(lambda: load_plm(PLMConfig(str(folder)))))

    network, pool = tiny_network(), toy_pool()
    save_checkpoint(tmp_path / "policy", network, describe(network, make_windows(pool).settings))
    other = write_plm(tmp_path / "other", "llama", hidden=192)
    text = raised(lambda: load_policy(tmp_path / "policy", plm_source=str(other)))
    checked("… belongs to another PLM: it was trained on …", text)
    checked("…: missing; is … a checkpoint folder?", said("play", "--policy", str(data)))


def test_training(tmp_path: Path) -> None:
    network, windows = tiny_network(lora=False), make_windows(toy_pool(), WindowConfig(w=5))
    train_on(network, windows, TrainConfig(epochs=1, batch=32), tmp_path)
    message = "… holds a run with another configuration, data or PLM"
    again = TrainConfig(epochs=2, batch=32)
    checked(message, raised(lambda: train_on(network, windows, again, tmp_path)))
    message = "the loss is … at optimizer step …: lower the learning rate, or use float32"
    wild = TrainConfig(epochs=9, batch=32, lr=1e30, lr_around=1e30, clip="none", warmup=0.0)
    checked(message, raised(lambda: train_on(tiny_network(lora=False), windows, wild, tmp_path / "wild")))
