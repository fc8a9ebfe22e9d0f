"""Checkpoints that nobody should trust: mutated, truncated, made to harm."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_fixtures import tiny_network, toy_pool
from netllm_lib.abr.model import PolicySettings, load_policy
from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint, save_upstream_checkpoint
from netllm_lib.checkpoint import describe, save_checkpoint
from netllm_lib.plm import PLMConfig
from netllm_lib.returns import pool_returns
from test_fuzz import Call, attempt, mutate

ADAPTERS = {
    "ours": ("adapter_model.safetensors", "modules.safetensors"),
    "theirs": ("adapter_model.bin", "modules_except_plm.bin"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `ours` and `theirs` with the same small policy."""
    root, network = tmp_path_factory.mktemp("checkpoints"), tiny_network(rank=2, layers=1)
    _, scale = pool_returns(toy_pool())
    save_checkpoint(root / "ours", network, describe(network, PolicySettings(20, scale)))
    save_upstream_checkpoint(root / "theirs", network)
    return root


def load_again(folder: Path) -> Any:
    if folder.name == "ours":
        return load_policy(folder)[0]
    return load_upstream_checkpoint(folder, PLMConfig("tiny-llama", layers=1), pool_returns(toy_pool())[1])[0]


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_mutated_weights(checkpoints: Path, tmp_path: Path, kind: str, count: int) -> None:
    """Mutated files are refused by name, or hold the very numbers that were saved."""
    folder = tmp_path / kind
    original = load_again(checkpoints / folder.name).state_dict()
    rng = random.Random(4)
    for name in ADAPTERS[folder.name]:
        shutil.copytree(checkpoints / folder.name, folder, dirs_exist_ok=True)
        data = (folder / name).read_bytes()
        head = 600 if folder.name == "ours" else len(data)
        for _ in range(count):
            at = rng.randrange(1, len(data)) if rng.random() < 0.5 else rng.randrange(1, head)
            mutated = bytearray(data)
            mutated[at] ^= 1 << rng.randrange(8)
            if rng.random() < 0.3:
                mutated = bytearray(mutate(rng, data, [data]))
            (folder / name).write_bytes(mutated)
            network, message = attempt(lambda: load_again(folder))
            if network is None:
                assert name in message
            else:
                assert all(torch.equal(value, original[key]) for key, value in network.state_dict().items())


VALUES = [None, -1, 0, 10**12, 10**400, 1.5, -0.5, "", "x", True, [], {}, [None], {"a": 1}]


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "file"), [("ours", "config.json"), ("ours", "adapter_config.json"), ("theirs", "adapter_config.json")]
)
def test_mutated_configs(checkpoints: Path, tmp_path: Path, kind: str, file: str, count: int) -> None:
    """Configs with a value replaced, or with damaged text, are refused, or make a network."""
    folder = tmp_path / kind
    shutil.copytree(checkpoints / folder.name, folder)
    text = (folder / file).read_text()
    rng, refused = random.Random(5), 0
    for _ in range(count):
        values = json.loads(text)
        target = rng.choice([values, *(values[key] for key in ("plm", "network", "scale") if key in values)])
        target[rng.choice([*target, "unknown"])] = rng.choice(VALUES)
        mutated = json.dumps(values).encode() if rng.random() < 0.7 else mutate(rng, text.encode(), [text.encode()])
        (folder / file).write_bytes(mutated)
        network, message = attempt(lambda: load_again(folder), (ValueError, FileNotFoundError))
        if network is None:
            refused += 1
            assert str(folder) in message or "no PLM" in message
    assert refused > 0.25 * count


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"w": Call(bytearray, 10**10)}, "bytearray"),
        ({"w": Call(os.system, "echo run > /dev/null")}, "system"),
        ({"w": Call(eval, "1")}, "eval"),
        ({"w": Call(set, [1])}, "set"),
        ({"w": 3}, "not a dictionary of tensors"),
        ([1, 2], "not a dictionary of tensors"),
    ],
)
def test_bins_hold_nothing_but_tensors(checkpoints: Path, tmp_path: Path, content: Any, reason: str) -> None:
    folder = Path(shutil.copytree(checkpoints / "theirs", tmp_path / "theirs"))
    for name in ADAPTERS["theirs"]:
        whole = (folder / name).read_bytes()
        replace_pickle(folder / name, pickle.dumps(content, protocol=2))
        with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
            load_again(folder)
        (folder / name).write_bytes(whole)


def replace_pickle(path: Path, data: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Put other opcodes into a PyTorch file, with a checksum that fits."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)


def test_packed_bins_and_wrong_checksums(checkpoints: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints / "theirs", tmp_path / "theirs"))
    path = folder / "modules_except_plm.bin"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        member = next(m for m in archive.infolist() if m.filename.endswith("/data/0"))
        number = member.header_offset + 30 + len(member.filename) + 200
    replace_pickle(path, pickled, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"modules_except_plm\.bin.*packed"):
        load_again(folder)
    path.write_bytes(whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1 :])
    with pytest.raises(ValueError, match=r"modules_except_plm\.bin.*CRC"):
        load_again(folder)
    path.write_bytes(whole)
    load_again(folder)


def test_weights_of_another_checkpoint_are_noticed(checkpoints: Path, tmp_path: Path) -> None:
    """The right keys and shapes with other numbers: a file copied from another run."""
    folder = Path(shutil.copytree(checkpoints / "ours", tmp_path / "ours"))
    path = folder / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not the file that was saved"):
        load_again(folder)
