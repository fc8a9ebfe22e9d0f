"""Checkpoints that the original wrote, and the way to write them: a LoRA adapter with modules_except_plm.bin, or model.bin."""

from __future__ import annotations

import dataclasses
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from netllm_lib import checkpoint, config, runs, safe_pickle
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, PolicySettings
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.returns import ReturnScale
from netllm_lib.safe_pickle import Part

MODULES, BIN_ADAPTER, WHOLE = "modules_except_plm.bin", "adapter_model.bin", "model.bin"
NO_POSITIONS = "wpe.weight"
"""Positions of a gpt2: the original adds none, so its files hold none and ours are zero."""
DERIVED_BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias")
"""Saved by older libraries among the weights, computed from the config by newer ones."""


class ForeignAdapter(ValueError):
    """An adapter of another PLM: the original loads it without a word, and it changes nothing."""


def problem_of(error: Exception) -> str:
    """The id of the finding that an error of `load_upstream_checkpoint` amounts to."""
    if isinstance(error, checkpoint.NotFinite):
        return "non-finite"
    return "adapter-not-applied" if isinstance(error, ForeignAdapter) else "wrong-checkpoint"


def adapter_problem(folder: Path) -> tuple[str, str] | None:
    """(what an adapter shows without its PLM, the id of the finding that it amounts to); None where it shows nothing."""
    try:
        tensors = _read_adapter(folder)[1] if (folder / checkpoint.ADAPTER_CONFIG).is_file() else {}
    except (ValueError, OSError) as error:
        return str(error), problem_of(error)
    b = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if b and not any(bool(tensor.any()) for tensor in b):
        return f"{folder}: LoRA's B matrices are all zero: the adapter adds nothing to the PLM", "adapter-not-applied"
    return None


def load_upstream_checkpoint(
    folder: Path, plm: PLMConfig, scale: ReturnScale, w: int = 20
) -> tuple[PolicyNetwork, checkpoint.CheckpointMeta]:
    """A checkpoint that the original wrote: adapter (.bin or .safetensors) and modules_except_plm.bin, or model.bin.

    `plm` says which PLM and how many layers; LoRA settings and sizes are read from the files. The original keeps reward
    range and target return in the pool, so `scale` must come from it. Every key and shape has to fit; only LoRA
    weights of layers that an early stop never reaches are left out. Nothing in the files is executed.
    """
    whole = not (folder / checkpoint.ADAPTER_CONFIG).is_file()
    if whole and not (folder / WHOLE).is_file():
        said = f"neither {checkpoint.ADAPTER_CONFIG} (LoRA) nor {WHOLE} (rank -1); not a model the original saved"
        raise FileNotFoundError(f"{folder}: {said}")
    path = folder / (WHOLE if whole else MODULES)
    lora: dict[str, Any] = {"rank": -1} if whole else read_lora(folder / checkpoint.ADAPTER_CONFIG)
    inner, modules = {}, _read(path)
    if whole:
        inner, modules = (_below(modules, prefix) for prefix in ("plm.", "modules_except_plm."))
    else:
        adapter_path, inner = _read_adapter(folder)
        checkpoint.check_rank({key: value.shape for key, value in inner.items()}, lora["rank"], adapter_path)
    try:
        sizes = NetworkConfig(
            state_feature_dim=modules["0.fc1.0.weight"].shape[0], max_timestep=modules["1.weight"].shape[0] - 2
        )
    except (KeyError, IndexError):
        raise ValueError(f"{path}: no state encoder or timestep table; not saved by the original") from None
    if sizes.max_timestep != scale.max_timestep:
        said = f"made for episodes of {sizes.max_timestep + 1} decisions, the pool given has {scale.max_timestep + 1}"
        raise ValueError(f"{path}: {said}: it is not the training pool")
    try:
        network = checkpoint.build(PolicyNetwork, dataclasses.replace(plm, **lora), sizes, folder)
    except ValueError as error:
        if whole:
            raise
        # raises if it is the PLM's fault
        checkpoint.build(PolicyNetwork, dataclasses.replace(plm, rank=0), sizes, folder)
        raise ForeignAdapter(str(error)) from None
    checkpoint.load_strictly(nn.ModuleList(network.around_plm().values()), modules, path)
    model, layer = network.plm.model, re.compile(r"(?:^|\.)(?:layers|h|block)\.(\d+)\.")
    # an early stop leaves out the layers that it does not reach
    inner = {k: v for k, v in inner.items() if (m := layer.search(k)) is None or int(m[1]) < network.plm.layers}
    if whole:
        inner = {key: value for key, value in inner.items() if not key.endswith(DERIVED_BUFFERS)}
        inner |= {key: value for key, value in model.state_dict().items() if key == NO_POSITIONS}
        checkpoint.load_strictly(model, _with_own_tokens(inner, model), path)
    else:
        try:
            checkpoint.load_adapter(network, inner, adapter_path)
        except ValueError as error:
            foreign = inner.keys() != checkpoint.adapter_weights(network).keys()
            raise ForeignAdapter(str(error)) if foreign else error from None
    return network.eval(), checkpoint.describe(network, PolicySettings(w, scale))


def save_upstream_checkpoint(folder: Path, network: PolicyNetwork) -> Path:
    """Write what the original's `load_model` reads: a LoRA adapter with modules_except_plm.bin, or model.bin for rank -1."""
    plm = network.plm
    if plm.config.rank == 0:
        raise ValueError("the original has no form for a frozen PLM without LoRA")
    modules = checkpoint.on_cpu(nn.ModuleList(network.around_plm().values()).state_dict())
    with runs.atomic_path(Path(folder)) as aside:
        aside.mkdir(parents=True)
        if plm.config.rank > 0:
            torch.save(checkpoint.on_cpu(checkpoint.adapter_weights(network)), aside / BIN_ADAPTER)
            torch.save(modules, aside / MODULES)
            runs.write_json(aside / checkpoint.ADAPTER_CONFIG, checkpoint.adapter_config(network))
        else:
            inner = plm.model.state_dict()
            if plm.config.layers is not None:  # the original keeps layers that an early stop does not reach
                inner = load_plm(dataclasses.replace(plm.config, layers=None)).model.state_dict() | inner
            whole = {f"plm.{key}": value for key, value in checkpoint.on_cpu(inner).items() if key != NO_POSITIONS}
            whole |= checkpoint.on_cpu(checkpoint.module_weights(network))
            whole |= {f"modules_except_plm.{key}": value for key, value in modules.items()}
            torch.save(whole, aside / WHOLE)
    return Path(folder)


def _below(weights: checkpoint.Weights, prefix: str) -> checkpoint.Weights:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _read(path: Path) -> checkpoint.Weights:
    """A file of weights, all of them finite."""
    weights = checkpoint.read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
    bad = [key for key, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        said = f"{bad[0]} holds NaN or infinity ({len(bad)} of {len(weights)} tensors): the training diverged"
        raise checkpoint.NotFinite(f"{path}: {said}")
    return weights


def _read_adapter(folder: Path) -> tuple[Path, checkpoint.Weights]:
    paths = [folder / name for name in (checkpoint.ADAPTER, BIN_ADAPTER) if (folder / name).is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder / BIN_ADAPTER}: missing, and no {checkpoint.ADAPTER} either")
    return paths[0], _read(paths[0])


@dataclasses.dataclass(frozen=True)
class _Lora:
    """What is read of adapter_config.json."""

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r is {self.r}")


def read_lora(path: Path) -> dict[str, Any]:
    """LoRA's settings in an adapter_config.json, as a PLMConfig has them. Raises ValueError, naming the file."""
    values, names = runs.read_json(path), [field.name for field in dataclasses.fields(_Lora)]
    wanted = {name: values.get(name) for name in names} if isinstance(values, dict) else values
    lora: _Lora = config.parse(_Lora, wanted, f"{path}: not a LoRA adapter config")
    settings = {"rank": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
    return {**settings, "target_modules": tuple(sorted(lora.target_modules))}


def _with_own_tokens(weights: checkpoint.Weights, model: Any) -> checkpoint.Weights:
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


# --- files of tensors ---------------------------------------------------------------------------------------------------

_STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class _Ordered(dict[str, Any], Part):
    """An OrderedDict; its state, the versions of modules, is left out."""

    def __init__(self, *_: Any):
        super().__init__()


def _tensor(numbers: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    if type(numbers) is not torch.Tensor or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise ValueError("a tensor without numbers")
    return numbers.as_strided(size, stride, offset)


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


def read_bin(path: Path) -> checkpoint.Weights:
    """A PyTorch file of tensors, read without running anything that is in it.

    Not by PyTorch, whose reader allows more than tensors (`bytearray(10**10)`), unpacks, and compares no checksums.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the checkpoint is incomplete")
    try:
        with zipfile.ZipFile(path) as archive:
            weights = _read_archive(archive, path.stat().st_size)
    except Exception as error:  # whatever a broken file provokes is a broken file
        raise ValueError(f"{path}: damaged, or holds more than tensors ({runs.first_line(error)})") from None
    if not isinstance(weights, dict) or not all(type(value) is torch.Tensor for value in weights.values()):
        raise ValueError(f"{path}: not a dictionary of tensors")
    return dict(weights)


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("packed, which PyTorch never does")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its parts are larger than the file")
    (pickled,) = (member.filename for member in members if member.filename.endswith("data.pkl"))
    storages: dict[str, torch.Tensor] = {}

    def stored(identifier: Any) -> torch.Tensor:
        _, dtype, key, _, _ = identifier  # ("storage", its class, its file, a device, how many numbers)
        if type(key) is not str or not isinstance(dtype, torch.dtype):
            raise ValueError("numbers of an unknown kind")
        if key not in storages:
            data = bytearray(archive.read(f"{pickled.removesuffix('data.pkl')}data/{key}"))
            storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return storages[key]

    return safe_pickle.load(archive.read(pickled), _NAMES, stored)
