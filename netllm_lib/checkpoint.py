"""Checkpoints of a fine-tuned network, complete in themselves.

A checkpoint is a folder that holds everything a test needs, so that a test never needs the training data:

    config.json                 CheckpointMeta: the task and its settings, the PLM and its identity, sizes, and a hash of each file
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
from netllm_lib.plm_files import plm_here
from netllm_lib.task import Network

FORMAT = 2
CONFIG = "config.json"
REMEDY = "copy the whole folder again, or delete it and make it again"
MODULES = "modules.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
WHOLE_PLM = "plm.safetensors"
ADAPTER_KEYS = """alpha_pattern auto_mapping bias fan_in_fan_out init_lora_weights layers_pattern layers_to_transform lora_alpha
    lora_dropout modules_to_save peft_type r rank_pattern revision"""
"""Of PEFT's adapter_config.json, those that all its versions know (the original has 0.6)."""

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
        for name, weights in _weights(network).items():
            save_file(on_cpu(weights), aside / name, metadata={"format": "pt"})
        if network.plm.has_lora:
            runs.write_json(aside / ADAPTER_CONFIG, adapter_config(network))
        hashes = {path.name: runs.file_hash(path) for path in sorted(aside.iterdir())}
        runs.write_sealed(aside / CONFIG, {"format": FORMAT, **runs.plain(meta), "hashes": hashes})
    return Path(folder)


def read_meta(folder: Path, kind: type[Network] | None = None) -> CheckpointMeta:
    """The meta data of a checkpoint; `network` and `settings` are dataclasses of `kind`, or, without it, dictionaries.

    Raises FileNotFoundError, or ValueError for a config that is not one of ours, or of another task than `kind`'s.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; is {folder} a checkpoint folder?")
    values = runs.read_sealed(path, REMEDY)
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
    here: dict[str, Any] = {"source": plm_source or plm_here(meta.plm.source), "dtype": dtype or meta.plm.dtype}
    plm = dataclasses.replace(meta.plm, device=device, placement=None, **here)
    with torch.device("meta"):  # a config must fit the weights before there is a network of the sizes that it names
        sketch = build(kind, plm, meta.network, folder, sketch_plm)
    _check_plm(folder, meta, sketch.plm)
    _read_weights(folder, sketch)
    network = build(kind, plm, meta.network, folder)
    _check_plm(folder, meta, network.plm)
    load_weights(folder, network)
    return network.eval(), meta


def build(kind: type[N], plm: PLMConfig, sizes: Any, folder: Path, load: Callable[[PLMConfig], PLM] = load_plm) -> N:
    """A network of the shape that a checkpoint asks for. Settings that no network can have are its fault."""
    try:
        return kind(load(plm), sizes)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{folder}: {runs.first_line(error)}") from error


def _check_plm(folder: Path, meta: CheckpointMeta, plm: PLM) -> None:
    here = (plm.family, plm.layers, plm.hidden_size, plm.identity or meta.plm_identity)  # a sketch has no identity
    there = (meta.family, meta.layers, meta.hidden_size, meta.plm_identity)
    if here != there:
        trained, found = ("{} ({} layers, hidden {}, identity {})".format(*shape) for shape in (there, here))
        source = repr(plm.config.source)
        raise ValueError(f"{folder} belongs to another PLM: it was trained on {trained}, {source} is {found}")


def _check_hashes(folder: Path) -> None:
    """Notice files that fit but are others: a damaged number, a file copied from another run."""
    hashes = runs.read_json(folder / CONFIG).get("hashes", {})
    known: dict[str, str] = config.parse(dict[str, str], hashes, f"{folder / CONFIG}: hashes")
    for name, expected in known.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
        if runs.file_hash(path) != expected:
            raise ValueError(f"{path}: not the file that was saved with this checkpoint; {REMEDY}")


def check_rank(shapes: Mapping[str, Sequence[int]], rank: int, path: Path) -> None:
    """Refuse an adapter of another rank before LoRA layers are made: a damaged config could ask for huge ones."""
    ranks = {shape[0] for key, shape in shapes.items() if ".lora_A." in key and shape}
    if ranks and ranks != {rank}:
        found = ", ".join(map(str, sorted(ranks)))
        raise ValueError(f"{path}: does not fit LoRA rank {rank}: the shape of its weights says rank {found}")


# --- weights ------------------------------------------------------------------------------------------------------------


def load_weights(folder: Path, network: Network) -> None:
    """Copy a checkpoint's weights into a network of the same shape. Raises ValueError if a key, a shape or a file differs."""
    found = _read_weights(Path(folder), network)
    _check_hashes(Path(folder))
    if ADAPTER in found:
        load_adapter(network, found[ADAPTER], Path(folder) / ADAPTER)
    if WHOLE_PLM in found:
        network.plm.model.load_state_dict(found[WHOLE_PLM])
    nn.ModuleDict(network.around_plm()).load_state_dict(found[MODULES])


def _weights(network: Network) -> dict[str, Weights]:
    """What a checkpoint keeps, by file."""
    plm = network.plm
    lora = {ADAPTER: adapter_weights(network)} if plm.has_lora else {}
    return {MODULES: module_weights(network)} | (lora if plm.config.rank >= 0 else {WHOLE_PLM: plm.model.state_dict()})


def _read_weights(folder: Path, network: Network) -> dict[str, Weights]:
    """The same from a folder; ValueError for what does not fit the network."""
    found = {name: read_safetensors(folder / name) for name in _weights(network)}
    for name, expected in _weights(network).items():
        _compare(expected, found[name], folder / name)
    return found


def module_weights(network: Network) -> Weights:
    """Of the modules around the PLM."""
    return nn.ModuleDict(network.around_plm()).state_dict()


def adapter_weights(network: Network) -> Weights:
    """Of LoRA, under PEFT's names."""
    import peft

    return peft.get_peft_model_state_dict(network.plm.model, save_embedding_layers=False)


def adapter_config(network: Network) -> dict[str, Any]:
    """PEFT's adapter_config.json, in the fields that all its versions know (the original has 0.6)."""
    lora = network.plm.model.peft_config["default"].to_dict()
    fixed = {"inference_mode": True, "task_type": "FEATURE_EXTRACTION", "peft_type": "LORA"}
    fixed |= {"base_model_name_or_path": network.plm.config.source, "target_modules": list(network.plm.lora_targets)}
    return {name: lora[name] for name in ADAPTER_KEYS.split()} | fixed


def load_adapter(network: Network, weights: Weights, path: Path) -> None:
    """Copy LoRA weights, which have to fit in every key and shape."""
    import peft

    _compare(adapter_weights(network), weights, path)
    peft.set_peft_model_state_dict(network.plm.model, weights)


def load_strictly(module: nn.Module, weights: Weights, path: Path) -> None:
    """Copy weights into a module, which they have to fit in every key and shape."""
    _compare(module.state_dict(), weights, path)
    module.load_state_dict(weights)


def _compare(expected: Weights, found: Weights, path: Path) -> None:
    """Raise ValueError unless both have the same keys, shapes and kinds of numbers, and all numbers are finite."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    listed = [
        f"{len(keys)} {word} (first: {keys[0]})" for keys, word in ((missing, "missing"), (extra, "unknown")) if keys
    ]
    if listed:
        raise ValueError(f"{path}: does not fit the network: weights {' and '.join(listed)}")
    for key, tensor in found.items():
        want = expected[key]
        if (tensor.shape, tensor.is_floating_point()) != (want.shape, want.is_floating_point()) or tensor.is_complex():
            kinds = f"{tensor.dtype} of shape {list(tensor.shape)}, not {want.dtype} of shape {list(want.shape)}"
            raise ValueError(f"{path}: does not fit the network: {key} is {kinds}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFinite(f"{path}: {key} holds NaN or infinity; the training diverged or the file is damaged")


def read_safetensors(path: Path) -> Weights:
    """The tensors in a file; FileNotFoundError or a ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        return load_file(path)
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise ValueError(f"{path}: damaged ({runs.first_line(error)}); {REMEDY}") from None


def on_cpu(weights: Weights) -> Weights:
    """Copies; safetensors refuses tensors that share memory (t5's tied embeddings)."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}
