"""Hand-written text, changed at random, ends in an error of ours that names the file, or is read; never in a raw one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from netllm_lib import notebooks, pipelines, reports, runs, sweep_file
from test_notebooks import CHOICES, CHOSEN, write_notebook

WORDS = [
    *'\x00é中\ud800\\"=#\n3',
    "nan",
    "-1e999",
    "9" * 400,
    "2" + "0" * 19,
    "true",
    "null",
    "[]",
    "{}",
    "'''",
    "a" * 300,
]
WORDS += ["[" * 3000, "{'a':" * 500, "../..", "/dev/null", "[step]", "[[step]]\n"]
ENCODINGS = ("utf-8", "utf-16", "gbk", "latin-1")


def mutated(text: str, rng: random.Random) -> bytes:
    """One to four changes of characters, words or lines; now and then another encoding, or a flipped byte."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        end = min(len(text), at + rng.choice([0, 1, 5, 30]))
        lines = text.split("\n")
        new = rng.choice([rng.choice(WORDS), chr(rng.randrange(1, 0x500)), rng.choice(lines), ""])
        text = text[:at] + new + text[end:]
    data = bytearray(text.encode(rng.choices(ENCODINGS, [9, 1, 1, 1])[0], errors="replace"))
    if data and rng.random() < 0.2:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setattr(runs, "PROJECT", tmp_path / "a" / "b" / "c")  # where paths begin: few files lie around it
    write_notebook(tmp_path, "a", CHOSEN, "# expected: x.txt", parameters=CHOICES)
    return tmp_path


def pipeline(folder: Path) -> tuple[Path, str, Callable[[Path], object]]:
    text = '# of notebooks\nname = "p"\n[parameters]\nsteps = 3\n[[step]]\nnotebook = "a.ipynb"\ntimeout_s = 1e3\n'
    text += '[[step]]\nnotebook = "a.ipynb"\nname = "b"\nafter = ["a"]\nparameters = { folders = ["{a}/x"], choose = "sample" }\n'
    return folder / "f.toml", text, pipelines.read_pipeline


def sweep(folder: Path) -> tuple[Path, str, Callable[[Path], object]]:
    text = 'name = "s"\nnotebook = "a.ipynb"\nseeds = [1, 2]\nseed_parameters = ["steps"]\ntimeout_s = 60\n[grid]\n'
    text += 'choose = ["argmax", "sample"]\n[[point]]\nfolders = ["x"]\n[[point]]\n[cluster]\ninterface = "ib0"\ncores = 4\n'
    return folder / "f.toml", text, sweep_file.read_sweep


def notebook(folder: Path) -> tuple[Path, str, Callable[[Path], object]]:
    def read(path: Path) -> object:
        opened = notebooks.open_notebook(path)
        return opened.promised, notebooks.input_hashes(opened, opened.fit({}))

    return folder / "f.ipynb", (folder / "a.ipynb").read_text(), read


def manifest(folder: Path) -> tuple[Path, str, Callable[[Path], object]]:
    run = runs.open_run("kind", "name", {"a": 1})
    run.note(versions=None, parents={"pool": folder})
    reports.write_index()  # whatever the manifest holds
    path = run.folder / runs.MANIFEST

    def read(_: Path) -> object:
        assert len(reports.list_runs()) == 1
        return run.state, run.done, run.parents, notebooks.fingerprint(run.folder)

    return path, path.read_text(), read


def words(folder: Path) -> tuple[Path, str, Callable[[Path], object]]:
    opened = replace(notebooks.open_notebook(folder / "a.ipynb"), path=folder / "given")

    def read(path: Path) -> object:
        word = path.read_bytes().decode(errors="surrogateescape")
        notebooks.input_hashes(opened, opened.fit({"folders": word}))
        return opened.fit(dict.fromkeys(opened.parameters, word))

    return opened.path, "[1, 'a', {'b': 2.5}], none, x/y", read


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [pipeline, sweep, notebook, manifest, words])
def test_mutations(
    folder: Path, make: Callable[[Path], tuple[Path, str, Callable[[Path], object]]], count: int
) -> None:
    path, text, read = make(folder)
    rng, refused = random.Random(7), 0
    for _ in range(count):
        path.write_bytes(data := mutated(text, rng))
        try:
            read(path)
        except Exception as error:
            refused += 1
            ours = type(error) in (ValueError, FileNotFoundError) and path.name in str(error) and "\n" not in str(error)
            if not ours:
                raise AssertionError(data) from error
    assert refused > count / 10
