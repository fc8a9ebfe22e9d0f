"""Checkpoints of a fine-tuned policy: ours, complete in themselves, and the original's, read and written.

Ours is a folder that holds everything a test needs, so that a test never needs the pool:

    config.json                 CheckpointMeta: PLM and its identity, sizes, window, reward range, target return, pool hash, …
    modules.safetensors         everything around the PLM
    adapter_model.safetensors   LoRA weights, in PEFT's own layout, with adapter_config.json   (LoRA rank > 0)
    plm.safetensors             all PLM weights                                                (rank -1)

What does not fit is an error, never a warning: loading the wrong adapter changes nothing visible and ruins the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import types
import typing
import zipfile
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
from netllm_lib.opcodes import opcodes
from netllm_lib.plm import PLM, PLMConfig, load_plm

FORMAT = 1
CONFIG = "config.json"
MODULES = "modules.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
WHOLE_PLM = "plm.safetensors"
UPSTREAM_MODULES = "modules_except_plm.bin"
UPSTREAM_ADAPTER = "adapter_model.bin"
UPSTREAM_WHOLE = "model.bin"

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
        save_file(_contiguous(_module_weights(network)), aside / MODULES)
        plm = network.plm
        if plm.config.rank > 0:
            save_file(_contiguous(_adapter_weights(network)), aside / ADAPTER, metadata={"format": "pt"})
            runs.write_json(aside / ADAPTER_CONFIG, _adapter_config(network))
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
    plm, network = _build(dataclasses.replace(meta.plm, **changes), meta.network, folder)
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


def _build(plm: PLMConfig, network: NetworkConfig, folder: Path) -> tuple[PLM, PolicyNetwork]:
    """A network of the shape that a checkpoint asks for. Settings that no network can have are its fault."""
    try:
        loaded = load_plm(plm)
        return loaded, PolicyNetwork(loaded, network)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{folder}: {_first_line(error)}") from error


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
        _check_rank(_shapes(folder / ADAPTER), meta.plm.rank, folder / ADAPTER)


def _check_rank(shapes: Mapping[str, Sequence[int]], rank: int, path: Path) -> None:
    """Refuse an adapter of another rank before LoRA layers are made: a damaged config could ask for huge ones."""
    ranks = {shape[0] for key, shape in shapes.items() if ".lora_A." in key and shape}
    if ranks and ranks != {rank}:
        found = ", ".join(map(str, sorted(ranks)))
        raise ValueError(f"{path}: does not fit LoRA rank {rank}: the shape of its weights says rank {found}")


def load_weights(folder: Path, network: PolicyNetwork) -> None:
    """Copy a checkpoint's weights into a network of the same shape. Raises ValueError if a key or a shape differs."""
    folder, plm = Path(folder), network.plm
    modules = _read_safetensors(folder / MODULES)
    if plm.config.rank > 0:
        _check_adapter_config(folder / ADAPTER_CONFIG, network)
        _load_adapter(network, _read_safetensors(folder / ADAPTER), folder / ADAPTER)
    elif plm.config.rank < 0:
        _load_strictly(plm.model, _read_safetensors(folder / WHOLE_PLM), folder / WHOLE_PLM)
    _load_strictly(nn.ModuleDict(network.around_plm()), modules, folder / MODULES)


# --- the original's -----------------------------------------------------------------------------------------------------


def load_upstream_checkpoint(
    folder: Path, plm: PLMConfig, scale: ReturnScale, w: int = 20
) -> tuple[PolicyNetwork, CheckpointMeta]:
    """A checkpoint that the original wrote: adapter (.bin or .safetensors) and modules_except_plm.bin, or model.bin.

    `plm` says which PLM and how many layers; LoRA settings and sizes are read from the files. The original keeps reward
    range and target return in the pool, so `scale` must come from it. Every key and shape has to fit; only LoRA
    weights of layers that an early stop never reaches are left out. Nothing in the files is executed.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        lora = _read_upstream_lora(folder / ADAPTER_CONFIG)
        modules_path = folder / UPSTREAM_MODULES
        modules = _read_bin(modules_path)
    elif (folder / UPSTREAM_WHOLE).is_file():
        lora, modules_path = {"rank": -1}, folder / UPSTREAM_WHOLE
        whole = _read_bin(modules_path)
        prefix = "modules_except_plm."
        modules = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
    else:
        raise FileNotFoundError(
            f"{folder}: neither {ADAPTER_CONFIG} (LoRA) nor {UPSTREAM_WHOLE} (rank -1); not a model the original saved"
        )
    sizes = _upstream_sizes(modules, modules_path)
    if sizes.max_timestep != scale.max_timestep:
        raise ValueError(
            f"{modules_path}: made for episodes of {sizes.max_timestep + 1} decisions, the pool given has "
            f"{scale.max_timestep + 1}: it is not the training pool"
        )
    adapter: Weights = {}
    adapter_path = folder / UPSTREAM_ADAPTER
    if lora["rank"] > 0:
        if (folder / ADAPTER).is_file():
            adapter_path = folder / ADAPTER
            adapter = _read_safetensors(adapter_path)
        elif adapter_path.is_file():
            adapter = _read_bin(adapter_path)
        else:
            raise FileNotFoundError(f"{adapter_path}: missing, and no {ADAPTER} either")
        _check_rank({key: value.shape for key, value in adapter.items()}, lora["rank"], adapter_path)
    loaded, network = _build(dataclasses.replace(plm, **lora), sizes, folder)
    _load_strictly(nn.ModuleList(network.around_plm().values()), modules, modules_path)
    if loaded.config.rank > 0:
        _load_adapter(network, _without_skipped_layers(adapter, loaded.layers), adapter_path)
    else:
        inner = {key.removeprefix("plm."): value for key, value in whole.items() if key.startswith("plm.")}
        inner = {key: value for key, value in inner.items() if not key.endswith(DERIVED_BUFFERS)}
        inner = _with_own_tokens(inner, loaded.model)
        _load_strictly(loaded.model, _without_skipped_layers(inner, loaded.layers), modules_path)
        named = {key: v for key, v in whole.items() if not key.startswith(("plm.", "modules_except_plm."))}
        _load_strictly(nn.ModuleDict(network.around_plm()), named, modules_path)
    return network.eval(), describe(network, scale, w)


def save_upstream_checkpoint(folder: Path, network: PolicyNetwork) -> Path:
    """Write what the original's `load_model` reads: a LoRA adapter with modules_except_plm.bin, or model.bin for rank -1."""
    plm = network.plm
    if plm.config.rank == 0:
        raise ValueError("the original has no form for a frozen PLM without LoRA")
    modules = _cpu(nn.ModuleList(network.around_plm().values()).state_dict())
    with runs.atomic_path(Path(folder)) as aside:
        aside.mkdir(parents=True)
        if plm.config.rank > 0:
            torch.save(_cpu(_adapter_weights(network)), aside / UPSTREAM_ADAPTER)
            torch.save(modules, aside / UPSTREAM_MODULES)
            runs.write_json(aside / ADAPTER_CONFIG, _adapter_config(network))
        else:
            whole = {f"plm.{key}": value for key, value in _cpu(plm.model.state_dict()).items()}
            whole |= _cpu(_module_weights(network))
            whole |= {f"modules_except_plm.{key}": value for key, value in modules.items()}
            torch.save(whole, aside / UPSTREAM_WHOLE)
    return Path(folder)


DERIVED_BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias")
"""Saved by older libraries among the weights, computed from the config by newer ones."""


def _upstream_sizes(modules: Weights, path: Path) -> NetworkConfig:
    try:
        return NetworkConfig(
            state_feature_dim=modules["0.fc1.0.weight"].shape[0], max_timestep=modules["1.weight"].shape[0] - 2
        )
    except (KeyError, IndexError):
        raise ValueError(f"{path}: no state encoder or timestep table; not saved by the original") from None


def _read_upstream_lora(path: Path) -> dict[str, Any]:
    values = runs.read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a LoRA adapter config")
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: a {values.get('peft_type')!r:.40} adapter; the original uses LORA")
    kinds = {"r": int, "lora_alpha": int, "lora_dropout": float, "target_modules": tuple[str, ...]}
    try:
        rank, alpha, dropout, targets = (from_json(kind, values.get(name), name) for name, kind in kinds.items())
        if rank < 1:
            raise ValueError(f"r is {rank}")
    except ValueError as error:
        raise ValueError(f"{path}: not a LoRA adapter config ({error})") from None
    lora = {"rank": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    return lora | {"target_modules": tuple(sorted(targets))}


def _without_skipped_layers(weights: Weights, layers: int) -> Weights:
    """Drop the weights of layers that an early stop leaves out."""
    index = re.compile(r"(?:^|\.)(?:layers|h|block)\.(\d+)\.")
    found = {key: index.search(key) for key in weights}
    return {key: value for key, value in weights.items() if (m := found[key]) is None or int(m[1]) < layers}


def _with_own_tokens(weights: Weights, model: Any) -> Weights:
    """Give the token embeddings the number of rows that the PLM has: the original resizes them to its tokenizer (a padding
    token more, or fewer than the config says), and inputs_embeds bypass them."""
    own = model.get_input_embeddings().weight
    resized = {}
    for key, expected in model.state_dict().items():
        found = weights.get(key)
        if found is None or found.shape == own.shape or expected.data_ptr() != own.data_ptr():
            continue
        if found.ndim == 2 and found.shape[1] == own.shape[1] and len(found):
            resized[key] = torch.cat([found, own.detach().cpu()[len(found) :].to(found.dtype)])[: len(own)]
    return weights | resized


# --- weights ------------------------------------------------------------------------------------------------------------


def _module_weights(network: PolicyNetwork) -> Weights:
    return nn.ModuleDict(network.around_plm()).state_dict()


def _adapter_weights(network: PolicyNetwork) -> Weights:
    import peft

    return peft.get_peft_model_state_dict(network.plm.model, save_embedding_layers=False)


def _adapter_config(network: PolicyNetwork) -> dict[str, Any]:
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
    found, expected = runs.read_json(path), _adapter_config(network)
    for key in ("peft_type", "r", "lora_alpha", "fan_in_fan_out"):
        if not isinstance(found, dict) or found.get(key) != expected[key]:
            value = found.get(key) if isinstance(found, dict) else found
            raise ValueError(f"{path}: {key} is {value!r}, the checkpoint's config says {expected[key]!r}")


def _load_adapter(network: PolicyNetwork, weights: Weights, path: Path) -> None:
    import peft

    expected = _adapter_weights(network)
    _compare(expected, weights, path, f"LoRA on {network.plm.family}, rank {network.plm.config.rank}")
    peft.set_peft_model_state_dict(network.plm.model, weights)


def _load_strictly(module: nn.Module, weights: Weights, path: Path) -> None:
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


def _read_safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        return load_file(path)
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise ValueError(f"{path}: damaged ({_first_line(error)})") from None


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by key in a file of safetensors, from its header alone."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        with safe_open(path, "pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path}: damaged ({_first_line(error)})") from None


BIN_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z][A-Za-z0-9]*Storage"
)
BIN_OPCODES = frozenset(
    [
        "PROTO",
        "STOP",
        "MARK",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPERSID",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
    ]
)
"""What a file of tensors consists of and refers to. PyTorch's own safe reader allows more, `bytearray(10**10)` for one."""


def _read_bin(path: Path) -> Weights:
    """A PyTorch file of tensors, read without running anything that is in it.

    Three fences stand before PyTorch's safe reader: nothing is packed (few bytes could become many), every checksum fits
    (PyTorch does not compare them, and loads changed numbers), and nothing but tensors is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("packed, which PyTorch never does")
            if sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("its parts are larger than the file")
            if broken := archive.testzip():
                raise ValueError(f"the checksum of {broken} is wrong")
            for member in members:
                if member.filename.endswith("data.pkl"):
                    _check_names(archive.read(member))
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise ValueError(f"{path}: damaged, or holds more than tensors ({_first_line(error)})") from None
    if not isinstance(weights, dict) or not all(
        type(key) is str and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for key, value in weights.items()
    ):
        raise ValueError(f"{path}: holds a {type(weights).__name__} that is not a dictionary of tensors")
    return dict(weights)


def _check_names(data: bytes) -> None:
    for opcode, argument, position in opcodes(data, BIN_OPCODES):
        if opcode == "GLOBAL" and not BIN_NAMES.fullmatch(argument):
            raise ValueError(f"refers to {argument!r:.80} at byte {position}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _contiguous(weights: Weights) -> Weights:
    """Copies for safetensors, which refuses tensors that share memory (t5's tied embeddings)."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}


def _cpu(weights: Weights) -> Weights:
    return {key: value.detach().cpu() for key, value in weights.items()}


def _name(family: str, hidden: int, layers: int, identity: str) -> str:
    return f"{family} ({layers} layers, hidden {hidden}, identity {identity})"
