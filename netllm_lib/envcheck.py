"""Checks of the environment: what notebooks 01 and 02 show, and `netllm check` prints.

Every check ends as pass, warn or fail, says what was found, and what to do about it. A check never raises: what breaks
is reported as a fail. `require` turns fails into an exception, so that a headless notebook stops.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from netllm_lib import runs

DISTRIBUTION = "netllm-companion"
GB = 1e9
DISK_NEEDED_GB, DISK_WANTED_GB = 1.0, 5.0
KERNELS = {"netllm-llm": "make env", "netllm-tf": "make env-tf"}
"""Kernels that the notebooks name, and what makes them."""
DATA_ADVICE = "netllm data fetch, or put NetLLM's data/ folder at data/netllm, or name it by $NETLLM_DATA or --data"
SMOLLM2_SHAPE = (30, 576)
"""Layers and hidden size of SmolLM2-135M, which has no folder until it is unpacked for the first time."""


class CheckFailed(RuntimeError):
    """At least one check of the environment failed."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    status: Literal["pass", "warn", "fail"]
    found: str
    advice: str = ""
    """What to do; empty where nothing needs doing."""


def llm_checks(
    data: str | Path | None = None,
    plm: str = "smollm2",
    layers: int | None = None,
    *,
    rank: int = 128,
    batch: int = 8,
    load: bool = False,
) -> list[Check]:
    """Checks of the PyTorch environment.

    `data` is where the traces are (None: the places that the registry searches); `plm`, `layers`, `rank`, `batch` are
    as in fine-tuning. The PLM's weights are read only with `load`.
    """
    return [
        python_check(),
        *package_checks("core", ""),
        *package_checks("llm", "llm"),
        *_guarded("device", device_checks),
        *_guarded("PLM", lambda: plm_checks(plm, load)),
        *_guarded("memory", lambda: [memory_check(plm, layers, rank=rank, batch=batch)]),
        *_guarded("data", lambda: [data_check(data)]),
        disk_check(),
        *_guarded("kernels", kernel_checks),
    ]


def tf_checks(data: str | Path | None = None) -> list[Check]:
    """Checks of the TensorFlow environment, to be run inside it."""
    return [
        python_check(),
        *package_checks("core", ""),
        *package_checks("tf", "tf"),
        *_guarded("TensorFlow", lambda: [tensorflow_check()]),
        *_guarded("data", lambda: [data_check(data)]),
        *_guarded("actors", lambda: [actors_check(data)]),
        disk_check(),
    ]


def as_table(checks: Iterable[Check]) -> Any:
    """The checks as a pandas table: check, status, found, advice."""
    import pandas as pd

    rows = [(check.name, check.status, check.found, check.advice) for check in checks]
    return pd.DataFrame(rows, columns=["check", "status", "found", "advice"])


def as_text(checks: Iterable[Check], width: int | None = None) -> str:
    """The checks for a terminal: one paragraph each, advice under those that need it."""
    width = width or min(shutil.get_terminal_size((110, 24)).columns, 140)
    checks = list(checks)
    column = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        label = f"{check.status:4}  {check.name:{column}}  "
        lines += textwrap.wrap(check.found, width, initial_indent=label, subsequent_indent=" " * len(label)) or [label]
        if check.advice:
            indent = " " * len(label) + "→ "
            lines += textwrap.wrap(check.advice, width, initial_indent=indent, subsequent_indent=" " * len(indent))
    return "\n".join(lines)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that failed."""
    return [check for check in checks if check.status == "fail"]


def require(checks: Iterable[Check]) -> None:
    """Raise CheckFailed, naming every failed check and what to do; return quietly if there is none."""
    if bad := failed(checks):
        raise CheckFailed("; ".join(f"{check.name}: {check.found} ({check.advice})" for check in bad))


def _guarded(name: str, checks: Callable[[], list[Check]]) -> list[Check]:
    """The checks, or one fail if they broke: a table with a hole in it helps more than a traceback."""
    try:
        return checks()
    except Exception as error:
        return [Check(name, "fail", f"{type(error).__name__}: {error}", "the check itself broke; see the message")]


# --- Python and packages --------------------------------------------------------------------------------------------


def python_check(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Python against `requires-python`."""
    wanted = _project().get("requires-python", ">=3.11")
    found = f"{platform.python_version()} at {sys.executable}"
    if SpecifierSet(wanted).contains(f"{version[0]}.{version[1]}"):
        return Check("Python", "pass", found)
    return Check("Python", "fail", found, f"use Python {wanted}: make env PYTHON=/path/to/python3.11")


def package_checks(name: str, extra: str) -> list[Check]:
    """Installed versions against the requirements of an extra ("" for the base): one line, and one per misfit."""
    good, misfits = [], []
    install = f'pip install -e ".[{extra}]"' if extra else "pip install -e ."
    for requirement in requirements(extra):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        version = _installed(requirement.name)
        if version is None:
            misfits.append(Check(requirement.name, "fail", "not installed", f"in the checkout: {install}"))
        elif not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, needs {requirement.specifier}"
            misfits.append(Check(requirement.name, "fail", found, f'pip install "{requirement}"'))
        else:
            good.append(f"{requirement.name} {version}")
    summary = Check(
        f"packages ({name})", "fail" if misfits else "pass", ", ".join(good) or "none", install if misfits else ""
    )
    return [summary, *misfits]


def requirements(extra: str = "") -> list[Requirement]:
    """What the project requires: its base dependencies, or those of one extra alone.

    From `pyproject.toml` of the checkout, else from the metadata of the installed package, which may be older.
    """
    project = _project()
    if project:
        texts = project["optional-dependencies"].get(extra, []) if extra else project["dependencies"]
        return [Requirement(text) for text in texts]
    found = []
    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        belongs = re.search(r"extra == ['\"]([\w-]+)['\"]", text)
        if (belongs[1] if belongs else "") == extra:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                requirement.marker = None
                found.append(requirement)
    return found


def _project() -> dict[str, Any]:
    path = runs.PROJECT / "pyproject.toml"
    return tomllib.loads(path.read_text())["project"] if path.is_file() else {}


def _installed(name: str) -> str | None:
    # Builds of TensorFlow for one kind of machine have names of their own, and any of them will do.
    names = (
        ["tensorflow", "tensorflow-cpu", "tensorflow-macos", "tensorflow-intel"]
        if name.startswith("tensorflow")
        else []
    )
    for candidate in [name, *names]:
        try:
            return importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


# --- device and memory ----------------------------------------------------------------------------------------------


def device_checks() -> list[Check]:
    """What torch can compute on: every GPU with memory, driver and bfloat16, or the CPU with cores and memory."""
    try:
        import torch
    except ImportError as error:
        return [Check("torch", "fail", str(error), 'pip install -e ".[llm]"')]
    driver = _nvidia_driver()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{_cpu_name()}, {cores} cores, {available_memory_gb():.1f} GB memory free, bf16 {_yes(_cpu_has_bf16())}"
    if torch.cuda.is_available():
        checks = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            bf16 = properties.major >= 8
            found = (
                f"{properties.name}, {total / GB:.1f} GB memory, {free / GB:.1f} free, driver {driver or 'unknown'}, "
                f"CUDA {torch.version.cuda}, bf16 {_yes(bf16)}"
            )
            advice = "" if bf16 else "no bfloat16 before compute capability 8.0: use float16 or float32"
            checks.append(Check(f"device cuda:{index}", "pass" if bf16 else "warn", found, advice))
        return [*checks, Check("CPU", "pass", cpu)]
    if torch.backends.mps.is_available():
        return [Check("device mps", "warn", f"Apple GPU; {cpu}", "not tested by this project: compare with device=cpu")]
    if driver:
        why = (
            "a CPU build"
            if torch.version.cuda is None
            else f"built for CUDA {torch.version.cuda}, too new for the driver?"
        )
        advice = "install a torch that fits the driver: make env TORCH=..., or go on, on the CPU"
        return [Check("device cpu", "warn", f"GPU driver {driver} present, but torch is {why}; {cpu}", advice)]
    return [Check("device cpu", "pass", cpu)]


def memory_check(plm: str, layers: int | None, *, rank: int = 128, batch: int = 8) -> Check:
    """Memory that fine-tuning `plm` with this batch would take, estimated without loading it, against the device's."""
    shape = _plm_shape(plm)
    if shape is None:
        return Check("memory", "warn", f"size of {plm} unknown", "name a folder with a config.json")
    kept = min(layers or shape[0], shape[0])
    try:
        import torch

        from netllm_lib.memory import estimate_memory
        from netllm_lib.plm import PLMConfig
        from netllm_lib.train import TrainConfig
    except ImportError as error:
        return Check("memory", "warn", f"not estimated: {error}", "see the check of packages")
    available, total, device = available_memory_gb(), psutil.virtual_memory().total / GB, "memory"
    config = PLMConfig(plm, layers=kept, rank=rank)
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        available, total, device = free / GB, whole / GB, torch.cuda.get_device_name()
        config = PLMConfig(plm, layers=kept, rank=rank, device="cuda", dtype="bfloat16")
    needed = estimate_memory(config, TrainConfig(batch=batch)).peak / GB
    found = (
        f"about {needed:.1f} GB to train and test {kept} of {shape[0]} layers of {plm} (LoRA rank {rank}, batch {batch}, "
        f"{config.dtype} weights); {available:.1f} GB of {device} free"
    )
    advice = (
        "fewer layers, a smaller batch, bfloat16 weights, or gradient checkpointing (training turns it on when it must)"
    )
    if needed > total:
        return Check("memory", "fail", found, advice)
    if needed > 0.9 * available:
        return Check("memory", "warn", found, f"close what else runs there, or: {advice}")
    return Check("memory", "pass", found)


def available_memory_gb() -> float:
    """Main memory that this process may still take: the machine's, or less where a container sets a limit."""
    available = float(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit.isdigit():
            available = min(available, int(limit) - int(used))
    except OSError:
        pass  # no container
    return max(available, 0.0) / GB


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
        return (
            "avx512_bf16" in flags or "amx_bf16" in flags or re.search(r"^Features.*\bbf16\b", flags, re.M) is not None
        )
    except OSError:
        return False


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


# --- model, data, disk ----------------------------------------------------------------------------------------------


def plm_checks(plm: str, load: bool = False) -> list[Check]:
    """Is the PLM's folder complete; with `load`, do its weights load."""
    from netllm_lib.plm_files import check_plm, find_plm

    if problems := check_plm(plm):
        return [
            Check("PLM", "fail", f"{plm}: {problem}", "see the message; --plm names another model")
            for problem in problems
        ]
    shape = _plm_shape(plm)
    size = f"{shape[0]} layers, hidden size {shape[1]}" if shape else "size unknown"
    if plm not in ("smollm2", "tiny-llama") and not isinstance(find_plm(plm), Path):
        return [
            Check(
                "PLM", "warn", f"{plm}: a name on the Hugging Face hub, not checked", "download it, and name the folder"
            )
        ]
    if not load:
        return [Check("PLM", "pass", f"{plm}: files complete, {size}")]
    from netllm_lib.plm import PLMConfig, load_plm

    try:
        load_plm(PLMConfig(source=plm, rank=0))
    except Exception as error:
        return [
            Check("PLM", "fail", f"{plm}: {type(error).__name__}: {error}", "download the model again, or name another")
        ]
    return [Check("PLM", "pass", f"{plm}: loads, {size}")]


def _plm_shape(plm: str) -> tuple[int, int] | None:
    """Layers and hidden size, from the model's config.json."""
    from netllm_lib.plm_files import describe_folder, find_plm

    if plm == "smollm2":
        return SMOLLM2_SHAPE
    if plm == "tiny-llama":
        return (2, 192)
    try:
        folder = find_plm(plm)
    except (FileNotFoundError, ValueError):
        return None
    report = describe_folder(folder, weights=False) if isinstance(folder, Path) else None
    return (report.layers, report.hidden_size) if report and report.layers and report.hidden_size else None


def data_check(data: str | Path | None = None) -> Check:
    """Trace sets and videos that the registry finds, every trace parsed."""
    from netllm_lib.abr import traces

    try:
        registry = traces.find_registry(data)
        table = registry.describe()
        videos = [registry.video(name) for name in registry.video_folders()]
    except (ValueError, OSError) as error:
        return Check("data", "fail", str(error), DATA_ADVICE)
    sets = ", ".join(f"{name} ({count})" for name, count in zip(table["trace set"], table["traces"], strict=True))
    found = f"{registry.root}: traces {sets or 'none'}; videos {', '.join(registry.video_folders()) or 'none'}"
    if not sets or not videos:
        return Check("data", "fail", found, DATA_ADVICE)
    if registry.root == traces.SAMPLE:
        return Check("data", "warn", found, f"the bundled synthetic sample; for real traces {DATA_ADVICE}")
    return Check("data", "pass", found)


def actors_check(data: str | Path | None = None) -> Check:
    """TensorFlow checkpoints of Genet and UDR, which notebook 02 exports."""
    from netllm_lib.abr import traces

    try:
        actors = traces.find_registry(data).actor_folders()
    except (ValueError, OSError) as error:
        return Check("actors", "fail", str(error), DATA_ADVICE)
    if not actors:
        advice = f"runs go on without Genet and UDR; their checkpoints come with NetLLM's data: {DATA_ADVICE}"
        return Check("actors", "warn", "no TensorFlow checkpoints", advice)
    return Check("actors", "pass", ", ".join(actors))


def disk_check(folder: Path | None = None) -> Check:
    """Free space where reports go."""
    folder = folder or runs.reports_root()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GB
    found = f"{free:.1f} GB free at {folder}"
    if free < DISK_NEEDED_GB:
        return Check("disk", "fail", found, "free some space, or set $NETLLM_REPORTS to a folder on another disk")
    if free < DISK_WANTED_GB:
        return Check("disk", "warn", found, "enough for the demo; large models and sweeps want more")
    return Check("disk", "pass", found)


# --- kernels --------------------------------------------------------------------------------------------------------


def kernel_python(name: str) -> str | None:
    """The Python that a registered Jupyter kernel starts; None if there is no such kernel."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        program = KernelSpecManager().get_kernel_spec(name).argv[0]
    except NoSuchKernel:
        return None
    return sys.executable if program in ("python", "python3") else program


def kernel_problem(name: str) -> str | None:
    """Why a notebook cannot start this kernel, and what to do; None if it can."""
    advice = KERNELS.get(
        name, f"python -m ipykernel install --sys-prefix --name {name}, in the environment it stands for"
    )
    program = kernel_python(name)
    if program is None:
        return f"no Jupyter kernel named {name}; make it: {advice}"
    if shutil.which(program) is None:
        return f"the kernel {name} starts {program}, which does not exist; make it again: {advice}"
    return None


def kernel_checks() -> list[Check]:
    """The notebooks' kernels, and the TensorFlow inside the second one. Only notebook 02 needs that one."""
    checks = []
    for name, advice in KERNELS.items():
        optional = name == "netllm-tf"
        if problem := kernel_problem(name):
            checks.append(Check(f"kernel {name}", "warn" if optional else "fail", problem, advice))
            continue
        program = kernel_python(name) or ""
        found, status = program, "pass"
        if optional:
            version = _tensorflow_of(program)
            found = f"{program}, TensorFlow {version or 'missing'}"
            status = "pass" if version else "warn"
        checks.append(
            Check(f"kernel {name}", "pass" if status == "pass" else "warn", found, "" if status == "pass" else advice)
        )
    return checks


def _tensorflow_of(python: str) -> str | None:
    """Version of TensorFlow in another environment, asked of its Python without the ten seconds of an import."""
    names = ["tensorflow-cpu", "tensorflow", "tensorflow-macos"]
    program = (
        "import importlib.metadata as m, json\n"
        "names = [((d.metadata['Name'] or '').replace('_', '-').lower(), d.version) for d in m.distributions()]\n"
        f"print(json.dumps([version for name, version in names if name in {names}]))"
    )
    try:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        return next(iter(json.loads(done.stdout)), None)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def tensorflow_check() -> Check:
    """Does TensorFlow import here, and on what does it compute."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        tensorflow = importlib.import_module("tensorflow")
    except ImportError as error:
        return Check("TensorFlow", "fail", str(error), "make env-tf")
    devices = [device.device_type for device in tensorflow.config.list_physical_devices()]
    return Check("TensorFlow", "pass", f"{tensorflow.__version__} on {', '.join(devices)}")
