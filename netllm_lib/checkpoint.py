"""Checkpoints of a fine-tuned policy, complete in themselves.

A checkpoint is a folder that holds everything a test needs, so that a test never needs the pool:

    config.json                 CheckpointMeta: PLM and its identity, sizes, window, reward range, target return, pool hash, …
    modules.safetensors         everything around the PLM
    adapter_model.safetensors   LoRA weights, in PEFT's own layout, with adapter_config.json   (LoRA rank > 0)
    plm.safetensors             all PLM weights                                                (rank -1)

What does not fit is an error, never a warning: loading the wrong adapter changes nothing visible and ruins the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from netllm_lib import config, runs
from netllm_lib.plm import PLM, PLMConfig, load_plm, sketch_plm
from netllm_lib.task import Network

FORMAT = 2
CONFIG = "config.json"
MODULES = "modules.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
WHOLE_PLM = "plm.safetensors"

Weights = dict[str, torch.Tensor]
N = TypeVar("N", bound=Network)


class NotFinite(ValueError):
    """Weights that hold NaN or infinity: the training diverged, or the file is damaged."""


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """What a test must know about a fine-tuned network."""

    task: str
    plm: PLMConfig
    plm_identity: str  # of the PLM's weights before fine-tuning, see PLM.identity
    family: str
    hidden_size: int
    layers: int  # that are kept
    network: Any  # sizes around the PLM, the network's `Config`
    settings: Any  # what else a test must know of the training, the network's `Settings`
    train: dict[str, Any] | None = None  # the TrainConfig, and under "data" the facts of its data, for the record
    step: int | None = None  # optimizer steps taken
    score: float | None = None  # of its validation, if it was selected by one


def describe(network: Network, settings: Any, train: dict[str, Any] | None = None) -> CheckpointMeta:
    """The meta data of a network that is trained with these settings of its task."""
    plm = network.plm
    shape = (plm.config, plm.identity, plm.family, plm.hidden_size, plm.layers)
    return CheckpointMeta(network.task, *shape, network.config, settings, train)


def save_checkpoint(folder: Path, network: Network, meta: CheckpointMeta) -> Path:
    """Write a checkpoint folder, whole or not at all; an older one of the same name is replaced. Returns `folder`."""
    with runs.atomic_path(Path(folder)) as aside:
        aside.mkdir(parents=True)
        save_file(_contiguous(module_weights(network)), aside / MODULES)
        plm = network.plm
        if plm.config.rank > 0:
            save_file(_contiguous(adapter_weights(network)), aside / ADAPTER, metadata={"format": "pt"})
            runs.write_json(aside / ADAPTER_CONFIG, adapter_config(network))
        elif plm.config.rank < 0:
            save_file(_contiguous(plm.model.state_dict()), aside / WHOLE_PLM)
        hashes = {path.name: runs.file_hash(path) for path in sorted(aside.iterdir())}
        runs.write_json(aside / CONFIG, {"format": FORMAT, **runs.plain(meta), "hashes": hashes})
    return Path(folder)


def read_meta(folder: Path, kind: type[Network] | None = None) -> CheckpointMeta:
    """The meta data of a checkpoint; `network` and `settings` are dataclasses of `kind`, or, without it, dictionaries.

    Raises FileNotFoundError, or ValueError for a config that is not one of ours, or of another task than `kind`'s.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; is {folder} a checkpoint folder?")
    values = runs.read_json(path)
    if not isinstance(values, dict) or (version := values.pop("format", None)) not in (1, FORMAT):
        raise ValueError(f"{path}: not a checkpoint config of format {FORMAT}")
    values.pop("hashes", None)
    if version == 1:  # when bitrate adaptation was the only task
        values |= {"task": "abr", "settings": {name: values.pop(name, None) for name in ("w", "scale")}}
    meta: CheckpointMeta = config.parse(CheckpointMeta, values, f"{path}: not a complete checkpoint config")
    if kind is None:
        return meta
    if meta.task != kind.task:
        raise ValueError(f"{path}: a checkpoint of the task {meta.task!r:.40}, not of {kind.task!r}")
    network: Any = config.parse(kind.Config, meta.network, f"{path}: network")
    settings: Any = config.parse(kind.Settings, meta.settings, f"{path}: settings")
    return dataclasses.replace(meta, network=network, settings=settings)


def load_checkpoint(
    folder: Path, kind: type[N], plm_source: str | None = None, device: str = "cpu", dtype: str | None = None
) -> tuple[N, CheckpointMeta]:
    """The fine-tuned network, in evaluation mode, and its meta data.

    `plm_source` says where the PLM is on this machine, if not where it was in training. Raises ValueError saying what does not
    fit and why, FileNotFoundError for what is missing.
    """
    folder, meta = Path(folder), read_meta(folder, kind)
    here: dict[str, Any] = {"device": device, "placement": None}
    here |= {"source": plm_source or meta.plm.source, "dtype": dtype or meta.plm.dtype}
    plm = dataclasses.replace(meta.plm, **here)
    _check_before_loading(folder, meta, kind, plm)
    network = build(kind, plm, meta.network, folder)
    _check_plm(folder, meta, network.plm)
    load_weights(folder, network)
    _check_hashes(folder)
    return network.eval(), meta


def build(kind: type[N], plm: PLMConfig, sizes: Any, folder: Path, load: Callable[[PLMConfig], PLM] = load_plm) -> N:
    """A network of the shape that a checkpoint asks for. Settings that no network can have are its fault."""
    try:
        return kind(load(plm), sizes)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{folder}: {first_line(error)}") from error


def _check_before_loading(folder: Path, meta: CheckpointMeta, kind: type[Network], plm: PLMConfig) -> None:
    """Refuse a config that does not belong to the weights before there is a network of the sizes that it names."""
    with torch.device("meta"):
        sketch = build(kind, plm, meta.network, folder, sketch_plm)
    _check_plm(folder, meta, sketch.plm)
    _compare(module_weights(sketch), read_safetensors(folder / MODULES), folder / MODULES, "the network")
    if plm.rank > 0:
        adapter = read_safetensors(folder / ADAPTER)
        check_rank({key: value.shape for key, value in adapter.items()}, plm.rank, folder / ADAPTER)
        _compare(adapter_weights(sketch), adapter, folder / ADAPTER, "LoRA")


def _check_plm(folder: Path, meta: CheckpointMeta, plm: PLM) -> None:
    here = (plm.family, plm.hidden_size, plm.layers, plm.identity or meta.plm_identity)  # a sketch has no identity
    there = (meta.family, meta.hidden_size, meta.layers, meta.plm_identity)
    if here != there:
        raise ValueError(
            f"{folder} belongs to another PLM: it was trained on {_name(*there)}, {plm.config.source!r} is {_name(*here)}"
        )


def _check_hashes(folder: Path) -> None:
    """Notice files that fit but are others: a damaged number, a file copied from another run."""
    hashes = runs.read_json(folder / CONFIG).get("hashes", {})
    if not isinstance(hashes, dict):
        raise ValueError(f"{folder / CONFIG}: hashes are {hashes!r:.40}")
    for name, expected in hashes.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
        if runs.file_hash(path) != expected:
            raise ValueError(f"{path}: not the file that was saved with this checkpoint; copy the whole folder again")


def check_rank(shapes: Mapping[str, Sequence[int]], rank: int, path: Path) -> None:
    """Refuse an adapter of another rank before LoRA layers are made: a damaged config could ask for huge ones."""
    ranks = {shape[0] for key, shape in shapes.items() if ".lora_A." in key and shape}
    if ranks and ranks != {rank}:
        found = ", ".join(map(str, sorted(ranks)))
        raise ValueError(f"{path}: does not fit LoRA rank {rank}: the shape of its weights says rank {found}")


def load_weights(folder: Path, network: Network) -> None:
    """Copy a checkpoint's weights into a network of the same shape. Raises ValueError if a key or a shape differs."""
    folder, plm = Path(folder), network.plm
    modules = read_safetensors(folder / MODULES)
    if plm.config.rank > 0:
        load_adapter(network, read_safetensors(folder / ADAPTER), folder / ADAPTER)
    elif plm.config.rank < 0:
        load_strictly(plm.model, read_safetensors(folder / WHOLE_PLM), folder / WHOLE_PLM)
    load_strictly(nn.ModuleDict(network.around_plm()), modules, folder / MODULES)


# --- weights ------------------------------------------------------------------------------------------------------------


def module_weights(network: Network) -> Weights:
    return nn.ModuleDict(network.around_plm()).state_dict()


def adapter_weights(network: Network) -> Weights:
    import peft

    return peft.get_peft_model_state_dict(network.plm.model, save_embedding_layers=False)


def adapter_config(network: Network) -> dict[str, Any]:
    """PEFT's adapter_config.json, in the fields that all its versions know (the original has 0.6)."""
    plm, family = network.plm.config, network.plm.family
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": plm.source,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": plm.lora_alpha,
        "lora_dropout": plm.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": plm.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(network.plm.lora_targets),
        "task_type": "FEATURE_EXTRACTION",
    }


def load_adapter(network: Network, weights: Weights, path: Path) -> None:
    import peft

    expected = adapter_weights(network)
    _compare(expected, weights, path, f"LoRA on {network.plm.family}, rank {network.plm.config.rank}")
    peft.set_peft_model_state_dict(network.plm.model, weights)


def load_strictly(module: nn.Module, weights: Weights, path: Path) -> None:
    _compare(module.state_dict(), weights, path, "the network")
    module.load_state_dict(weights)


def _compare(expected: Weights, found: Weights, path: Path, what: str) -> None:
    """Raise ValueError unless both have the same keys, shapes and kinds of numbers, and all numbers are finite."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        listed = [(keys, word) for keys, word in ((missing, "missing"), (extra, "unknown")) if keys]
        parts = " and ".join(f"{len(keys)} {word} (first: {keys[0]})" for keys, word in listed)
        raise ValueError(f"{path}: does not fit {what}: weights {parts}")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[key].shape)}"
            raise ValueError(f"{path}: does not fit {what}: {key} has shape {shapes}")
        if tensor.is_floating_point() != expected[key].is_floating_point() or tensor.is_complex():
            raise ValueError(f"{path}: does not fit {what}: {key} has numbers of type {tensor.dtype}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFinite(f"{path}: {key} holds NaN or infinity; the training diverged or the file is damaged")


def read_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        return load_file(path)
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise ValueError(f"{path}: damaged ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _contiguous(weights: Weights) -> Weights:
    """Copies for safetensors, which refuses tensors that share memory (t5's tied embeddings)."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}


def on_cpu(weights: Weights) -> Weights:
    return {key: value.detach().cpu() for key, value in weights.items()}


def _name(family: str, hidden: int, layers: int, identity: str) -> str:
    return f"{family} ({layers} layers, hidden {hidden}, identity {identity})"
