"""Checks of the environment that need to know bitrate adaptation: its data, its actors, and the memory of its network."""

from __future__ import annotations

from pathlib import Path

import psutil

from netllm_lib import envcheck
from netllm_lib.abr import traces
from netllm_lib.envcheck import GB, Check, guarded, packages_check, python_check

DATA_ADVICE = "netllm data fetch, or put NetLLM's data/ folder at data/netllm, or name it by $NETLLM_DATA or --data"


def llm_checks(
    data: str | Path | None = None, plm: str = "smollm2", layers: int | None = None, load: bool = False
) -> list[Check]:
    """All checks of the PyTorch environment.

    `data` is where the traces are (None: the places that `find_registry` searches); `plm` and `layers` are those of the
    fine-tuning. The PLM's weights are read only with `load`.
    """
    return [
        *guarded("packages", lambda: [python_check(), packages_check(), packages_check("llm")]),
        *guarded("device", envcheck.device_checks),
        *guarded("PLM", lambda: [envcheck.plm_check(plm, load)]),
        *guarded("disk", lambda: [envcheck.disk_check()]),
        *guarded("kernels", lambda: [envcheck.kernel_check(name) for name in envcheck.KERNELS]),
        *guarded("memory", lambda: [memory_check(plm, layers)]),
        *guarded("data", lambda: [data_check(data)]),
    ]


def tf_checks(data: str | Path | None = None) -> list[Check]:
    """All checks of the TensorFlow environment, to be run inside it."""
    return [
        *guarded("packages", lambda: [python_check(), packages_check(), packages_check("tf")]),
        *guarded("TensorFlow", lambda: [envcheck.tensorflow_check()]),
        *guarded("disk", lambda: [envcheck.disk_check()]),
        *guarded("data", lambda: [data_check(data)]),
        *guarded("actors", lambda: [actors_check(data)]),
    ]


def memory_check(plm: str, layers: int | None) -> Check:
    """Memory that training with the default settings takes, estimated without loading anything, against the device's."""
    import torch

    from netllm_lib.abr.batches import example_batch
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.plm import PLMConfig, sketch_plm
    from netllm_lib.preflight import estimate_memory
    from netllm_lib.schedule import TrainConfig

    config, batch = PLMConfig(plm, layers=layers), 8
    free, total, device = envcheck.available_memory_gb(), psutil.virtual_memory().total / GB, "memory"
    if torch.cuda.is_available():
        config = PLMConfig(plm, layers=layers, device="cuda", dtype="bfloat16")
        free, total = (size / GB for size in torch.cuda.mem_get_info())
        device = torch.cuda.get_device_name()
    try:
        network = PolicyNetwork(sketch_plm(config))
        needed = estimate_memory(network, example_batch(batch), TrainConfig()).peak / GB
    except (ValueError, OSError) as error:
        return Check("memory", "warn", f"not estimated: {error}", "name a PLM's folder")
    found = (
        f"about {needed:.1f} GB to train and test {layers or 'all'} layers of {plm} (LoRA rank {config.rank}, batch {batch}, "
        f"{config.dtype} weights); {free:.1f} GB of {device} free"
    )
    if needed <= 0.9 * free:
        return Check("memory", "pass", found)
    advice = "close what else runs there; or fewer layers, a smaller batch, bfloat16 weights, or gradient checkpointing"
    return Check("memory", "fail" if needed > total else "warn", found, advice)


def data_check(data: str | Path | None = None) -> Check:
    """Trace sets and videos that the registry finds, every trace parsed."""
    try:
        registry = traces.find_registry(data)
        sets = [f"{name} ({len(each)})" for name, each in registry.trace_sets().items()]
        videos = [registry.video(name).name for name in registry.video_folders()]
    except (ValueError, OSError) as error:
        return Check("data", "fail", str(error), DATA_ADVICE)
    found = f"{registry.root}: traces {', '.join(sets) or 'none'}; videos {', '.join(videos) or 'none'}"
    if registry.root == traces.SAMPLE:
        return Check("data", "warn", found, f"the bundled synthetic sample; for real traces {DATA_ADVICE}")
    return Check("data", "pass", found) if sets and videos else Check("data", "fail", found, DATA_ADVICE)


def actors_check(data: str | Path | None = None) -> Check:
    """TensorFlow checkpoints of Genet and UDR, which notebook 02 exports."""
    actors = traces.find_registry(data).actor_folders()
    if actors:
        return Check("actors", "pass", ", ".join(actors))
    advice = f"runs go on without Genet and UDR; their checkpoints come with NetLLM's data: {DATA_ADVICE}"
    return Check("actors", "warn", "no TensorFlow checkpoints", advice)
