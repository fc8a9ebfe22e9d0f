"""Checkpoints of a fine-tuned policy, complete in themselves.

A checkpoint is a folder that holds everything a test needs, so that a test never needs the pool:

    config.json                 CheckpointMeta: PLM and its identity, sizes, window, reward range, target return, pool hash, …
    modules.safetensors         everything around the PLM
    adapter_model.safetensors   LoRA weights, in PEFT's own layout, with adapter_config.json   (LoRA rank > 0)
    plm.safetensors             all PLM weights                                                (rank -1)

What does not fit is an error, never a warning: loading the wrong adapter changes nothing visible and ruins the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from netllm_lib import runs
from netllm_lib.abr.batches import ReturnScale
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.plm import PLM, PLMConfig, load_plm

FORMAT = 1
CONFIG = "config.json"
MODULES = "modules.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
WHOLE_PLM = "plm.safetensors"

Weights = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class CheckpointMeta:
    """What a test must know about a fine-tuned policy."""

    plm: PLMConfig
    plm_identity: str  # of the PLM's weights before fine-tuning, see PLM.identity
    family: str
    hidden_size: int
    layers: int  # that are kept
    network: NetworkConfig
    w: int  # transitions in a training window
    scale: ReturnScale  # reward range, target return, gamma, return scale, longest episode, pool hash
    train: dict[str, Any] | None = None  # the TrainConfig, for the record
    step: int | None = None  # optimizer steps taken
    score: float | None = None  # on the validation traces, if it was selected by them

    @property
    def pool_hash(self) -> str:
        return self.scale.pool_hash


def describe(network: PolicyNetwork, scale: ReturnScale, w: int, train: dict[str, Any] | None = None) -> CheckpointMeta:
    """The meta data of a network that is trained on windows of `w` steps of the pool that `scale` comes from."""
    plm = network.plm
    return CheckpointMeta(
        plm.config, plm.identity, plm.family, plm.hidden_size, plm.layers, network.config, w, scale, train
    )


# --- ours ---------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, network: PolicyNetwork, meta: CheckpointMeta) -> Path:
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
        hashes = {path.name: runs.file_hash(path) for path in sorted(aside.glob("*.safetensors"))}
        runs.write_json(aside / CONFIG, {"format": FORMAT, **runs.plain(meta), "hashes": hashes})
    return Path(folder)


def read_meta(folder: Path) -> CheckpointMeta:
    """The meta data of a checkpoint. Raises FileNotFoundError, or ValueError for a config that is not one of ours."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; is {folder} a checkpoint folder?")
    values = runs.read_json(path)
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: not a checkpoint config of format {FORMAT}")
    values.pop("hashes", None)
    try:
        meta: CheckpointMeta = from_json(CheckpointMeta, values, "")
        if meta.w < 1 or meta.network.max_timestep < 0 or meta.network.state_feature_dim < 1:
            raise ValueError("w, max_timestep and state_feature_dim must be positive")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a complete checkpoint config ({error})") from None
    return meta


def from_json(kind: Any, value: Any, where: str) -> Any:
    """`value`, read from JSON, as the type `kind` of a config's field. Raises ValueError naming the field."""
    options = typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the config'} is {value!r:.60}, expected {kind.__name__}")
        hints = typing.get_type_hints(kind)
        if unknown := sorted(value.keys() - hints.keys()):
            raise ValueError(f"unknown {unknown[:3]!r:.80}{f' in {where}' if where else ''}")
        return kind(**{name: from_json(hints[name], v, f"{where}.{name}".strip(".")) for name, v in value.items()})
    origin, fits = typing.get_origin(kind), False
    if origin in (types.UnionType, typing.Union):
        for option in options:
            with contextlib.suppress(ValueError):
                return from_json(option, value, where)
    elif origin is typing.Literal:
        fits = any(type(value) is type(option) and value == option for option in options)  # 1 is not True
    elif origin is tuple:
        fits = isinstance(value, list) and all(type(item) is options[0] for item in value)
        value = tuple(value) if fits else value
    elif kind is float:
        fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
    else:
        fits = type(value) is (origin or kind)
    if not fits:
        raise ValueError(f"{where} is {value!r:.60}, expected {kind if options else kind.__name__}")
    return value


def load_checkpoint(
    folder: Path,
    plm_source: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    pool_hash: str | None = None,
) -> tuple[PolicyNetwork, CheckpointMeta]:
    """The fine-tuned network, in evaluation mode, and its meta data.

    `plm_source` says where the PLM is on this machine, if not where it was in training. `pool_hash`, if given, must be that of
    the training pool. Raises ValueError saying what does not fit and why, FileNotFoundError for what is missing.
    """
    folder, meta = Path(folder), read_meta(folder)
    if pool_hash is not None and pool_hash != meta.pool_hash:
        raise ValueError(f"{folder} was trained on the pool {meta.pool_hash}, not on {pool_hash}")
    changes: dict[str, Any] = {
        "device": device,
        "placement": None,
        "source": plm_source or meta.plm.source,
        "dtype": dtype or meta.plm.dtype,
    }
    _check_sizes(folder, meta)
    plm, network = build(dataclasses.replace(meta.plm, **changes), meta.network, folder)
    here = (plm.family, plm.hidden_size, plm.layers, plm.identity)
    there = (meta.family, meta.hidden_size, meta.layers, meta.plm_identity)
    if here != there:
        raise ValueError(
            f"{folder} belongs to another PLM: it was trained on {_name(*there)}, {changes['source']!r} is {_name(*here)}"
        )
    load_weights(folder, network)
    _check_hashes(folder)
    return network.eval(), meta


def _check_hashes(folder: Path) -> None:
    """Notice weights that fit but are others: a damaged number, a file copied from another run."""
    hashes = runs.read_json(folder / CONFIG).get("hashes", {})
    if not isinstance(hashes, dict):
        raise ValueError(f"{folder / CONFIG}: hashes are {hashes!r:.40}")
    for name, expected in hashes.items():
        path = folder / Path(name).name
        if not path.is_file() or runs.file_hash(path) != expected:
            raise ValueError(f"{path}: not the file that was saved with this checkpoint; copy the whole folder again")


def build(plm: PLMConfig, network: NetworkConfig, folder: Path) -> tuple[PLM, PolicyNetwork]:
    """A network of the shape that a checkpoint asks for. Settings that no network can have are its fault."""
    try:
        loaded = load_plm(plm)
        return loaded, PolicyNetwork(loaded, network)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{folder}: {first_line(error)}") from error


def _check_sizes(folder: Path, meta: CheckpointMeta) -> None:
    """Refuse a config that does not belong to the weights before a network of the sizes that it names is made."""
    sizes = _shapes(folder / MODULES)
    rows = {
        "state_encoder.fc1.0.weight": meta.network.state_feature_dim,
        "embed_timestep.weight": meta.network.max_timestep + 2,
    }
    for key, expected in rows.items():
        if not sizes.get(key):
            raise ValueError(f"{folder / MODULES}: {key} is missing")
        if sizes[key][0] != expected:
            raise ValueError(f"{folder / MODULES}: {key} has shape {sizes[key]}, {CONFIG} asks for {expected} rows")
    if meta.plm.rank > 0:
        check_rank(_shapes(folder / ADAPTER), meta.plm.rank, folder / ADAPTER)


def check_rank(shapes: Mapping[str, Sequence[int]], rank: int, path: Path) -> None:
    """Refuse an adapter of another rank before LoRA layers are made: a damaged config could ask for huge ones."""
    ranks = {shape[0] for key, shape in shapes.items() if ".lora_A." in key and shape}
    if ranks and ranks != {rank}:
        found = ", ".join(map(str, sorted(ranks)))
        raise ValueError(f"{path}: does not fit LoRA rank {rank}: the shape of its weights says rank {found}")


def load_weights(folder: Path, network: PolicyNetwork) -> None:
    """Copy a checkpoint's weights into a network of the same shape. Raises ValueError if a key or a shape differs."""
    folder, plm = Path(folder), network.plm
    modules = read_safetensors(folder / MODULES)
    if plm.config.rank > 0:
        _check_adapter_config(folder / ADAPTER_CONFIG, network)
        load_adapter(network, read_safetensors(folder / ADAPTER), folder / ADAPTER)
    elif plm.config.rank < 0:
        load_strictly(plm.model, read_safetensors(folder / WHOLE_PLM), folder / WHOLE_PLM)
    load_strictly(nn.ModuleDict(network.around_plm()), modules, folder / MODULES)


# --- weights ------------------------------------------------------------------------------------------------------------


def module_weights(network: PolicyNetwork) -> Weights:
    return nn.ModuleDict(network.around_plm()).state_dict()


def adapter_weights(network: PolicyNetwork) -> Weights:
    import peft

    return peft.get_peft_model_state_dict(network.plm.model, save_embedding_layers=False)


def adapter_config(network: PolicyNetwork) -> dict[str, Any]:
    """PEFT's adapter_config.json, in the fields that all its versions know (the original has 0.6)."""
    config, family = network.plm.config, network.plm.family
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": config.source,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(network.plm.lora_targets),
        "task_type": "FEATURE_EXTRACTION",
    }


def _check_adapter_config(path: Path, network: PolicyNetwork) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    found, expected = runs.read_json(path), adapter_config(network)
    for key in ("peft_type", "r", "lora_alpha", "fan_in_fan_out"):
        if not isinstance(found, dict) or found.get(key) != expected[key]:
            value = found.get(key) if isinstance(found, dict) else found
            raise ValueError(f"{path}: {key} is {value!r}, the checkpoint's config says {expected[key]!r}")


def load_adapter(network: PolicyNetwork, weights: Weights, path: Path) -> None:
    import peft

    expected = adapter_weights(network)
    _compare(expected, weights, path, f"LoRA on {network.plm.family}, rank {network.plm.config.rank}")
    peft.set_peft_model_state_dict(network.plm.model, weights)


def load_strictly(module: nn.Module, weights: Weights, path: Path) -> None:
    _compare(module.state_dict(), weights, path, "the network")
    module.load_state_dict(weights)


def _compare(expected: Weights, found: Weights, path: Path, what: str) -> None:
    """Raise ValueError unless both have the same keys and shapes and all numbers are finite."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [
            f"{len(keys)} {word} (first: {keys[0]})"
            for keys, word in ((missing, "missing"), (extra, "unknown"))
            if keys
        ]
        raise ValueError(f"{path}: does not fit {what}: weights {' and '.join(parts)}")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[key].shape)}"
            raise ValueError(f"{path}: does not fit {what}: {key} has shape {shapes}")
        if tensor.is_floating_point() != expected[key].is_floating_point() or tensor.is_complex():
            raise ValueError(f"{path}: does not fit {what}: {key} has numbers of type {tensor.dtype}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity; the training diverged or the file is damaged")


def read_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        return load_file(path)
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise ValueError(f"{path}: damaged ({first_line(error)})") from None


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by key in a file of safetensors, from its header alone."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        with safe_open(path, "pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except Exception as error:
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
