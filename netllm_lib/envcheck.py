"""Checks of the environment: what notebooks 01 and 02 show, and `netllm check` prints.

The checks here know no task; `abr/checks.py` adds those of data and memory, and says which are made where.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from netllm_lib import runs

GB = 1e9
DISK_NEEDED_GB, DISK_WANTED_GB = 1.0, 5.0
KERNELS = {"netllm-llm": "make env", "netllm-tf": "make env-tf"}
"""Kernels that the notebooks name, and what makes them."""


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


def as_text(checks: Iterable[Check]) -> str:
    """The checks for a terminal: a line each, and advice under those that need it."""
    lines = [(f"{c.status:4}  {c.name}: {c.found}", f"      → {c.advice}" if c.advice else "") for c in checks]
    return "\n".join(line for pair in lines for line in pair if line)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that failed."""
    return [check for check in checks if check.status == "fail"]


def require(checks: Iterable[Check]) -> None:
    """Raise CheckFailed, naming every failed check and what to do; return quietly if there is none."""
    if bad := failed(checks):
        raise CheckFailed("; ".join(f"{check.name}: {check.found} ({check.advice})" for check in bad))


def guarded(name: str, checks: Callable[[], list[Check]]) -> list[Check]:
    """The checks, or one fail if they broke: a table with a hole in it helps more than a traceback."""
    try:
        return checks()
    except Exception as error:
        return [Check(name, "fail", f"{type(error).__name__}: {error}", "the check itself broke; see the message")]


# --- Python, packages, kernels ---------------------------------------------------------------------------------------


def _project() -> dict[str, Any]:
    return tomllib.loads((runs.PROJECT / "pyproject.toml").read_text())["project"]


def python_check() -> Check:
    """Python against `requires-python`."""
    wanted, found = _project()["requires-python"], f"{platform.python_version()} at {sys.executable}"
    fits = SpecifierSet(wanted).contains(platform.python_version(), prereleases=True)
    return Check("Python", "pass", found) if fits else Check("Python", "fail", found, f"use Python {wanted}")


def packages_check(extra: str = "") -> Check:
    """Installed versions against the requirements of an extra of the project; "": what it needs everywhere."""
    project = _project()
    good, misfits = list[str](), list[str]()
    for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            misfits.append(f"{wanted.name} is not installed")
            continue
        if wanted.specifier.contains(version, prereleases=True):
            good.append(f"{wanted.name} {version}")
        else:
            misfits.append(f"{wanted.name} {version}, needs {wanted.specifier}")
    name, advice = f"packages ({extra or 'core'})", f"in the checkout: pip install -e '.[{extra}]'"
    return Check(name, "fail", "; ".join(misfits), advice) if misfits else Check(name, "pass", ", ".join(good))


def tensorflow_check() -> Check:
    """Does TensorFlow import here, and on what does it compute."""
    errors = os.dup(2)
    try:
        with open(
            os.devnull, "wb"
        ) as nothing:  # its C++ writes of its own optimisations, whatever level of logs is asked for
            os.dup2(nothing.fileno(), 2)
            tensorflow = importlib.import_module("tensorflow")
            devices = [device.device_type for device in tensorflow.config.list_physical_devices()]
    except ImportError as error:
        return Check("TensorFlow", "fail", str(error), "make env-tf")
    finally:
        os.dup2(errors, 2)
        os.close(errors)
    return Check("TensorFlow", "pass", f"{tensorflow.__version__} on {', '.join(devices)}")


def kernel_problem(name: str) -> str | None:
    """Why a notebook cannot start this Jupyter kernel, and what to do; None if it can."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    advice = KERNELS.get(name, f"python -m ipykernel install --sys-prefix --name {name}, in its environment")
    try:
        program = KernelSpecManager().get_kernel_spec(name).argv[0]
    except NoSuchKernel:
        return f"no Jupyter kernel named {name}; make it: {advice}"
    if program not in ("python", "python3") and shutil.which(program) is None:
        return f"the kernel {name} starts {program}, which does not exist; make it again: {advice}"
    return None


def kernel_check(name: str) -> Check:
    """Can the notebooks that name this kernel start. Only notebook 02 needs the one of TensorFlow."""
    if problem := kernel_problem(name):
        return Check(f"kernel {name}", "warn" if name == "netllm-tf" else "fail", problem, KERNELS.get(name, ""))
    return Check(f"kernel {name}", "pass", "registered")


# --- device, memory, disk, model ---------------------------------------------------------------------------------------


def device_checks() -> list[Check]:
    """What torch can compute on: every GPU, or the CPU; their free memory, and whether bfloat16 is fast there."""
    import torch

    from netllm_lib.plm import fast_dtype

    checks = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / GB:.1f} of {total / GB:.1f} GB free, CUDA {torch.version.cuda}"
        old = torch.cuda.get_device_capability(index) < (8, 0)
        advice = "no bfloat16 before compute capability 8.0: use float16 or float32" if old else ""
        checks.append(Check(f"device cuda:{index}", "warn" if old else "pass", found, advice))
    if checks:
        return checks
    bf16 = "yes" if fast_dtype(torch.device("cpu")) else "no"
    found = f"{torch.get_num_threads()} threads, {available_memory_gb():.1f} GB memory free, fast bf16: {bf16}"
    if shutil.which("nvidia-smi"):
        found = f"an NVIDIA driver is here, but torch {torch.__version__} sees no GPU; {found}"
        return [Check("device cpu", "warn", found, "install a torch that fits the driver: make env TORCH=…")]
    return [Check("device cpu", "pass", found)]


def available_memory_gb() -> float:
    """Main memory that this process may still take: the machine's, or less where a container sets a limit."""
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        available = max(0, min(available, int(most) - int(used.read_text())))
    return available / GB


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


def plm_check(plm: str, load: bool = False) -> Check:
    """Is the PLM's folder complete; with `load`, do its weights load."""
    from netllm_lib.plm_files import check_plm, find_plm

    if problems := check_plm(plm):
        return Check("PLM", "fail", f"{plm}: {'; '.join(problems)}", "see the message; --plm names another model")
    if plm not in ("smollm2", "tiny-llama") and isinstance(find_plm(plm), str):
        found = f"{plm}: a name on the Hugging Face hub, not checked"
        return Check("PLM", "warn", found, "download it, and name the folder")
    if not load:
        return Check("PLM", "pass", f"{plm}: files complete")
    from netllm_lib.plm import PLMConfig, load_plm

    try:
        loaded = load_plm(PLMConfig(plm, rank=0))
    except (ValueError, OSError) as error:
        return Check("PLM", "fail", str(error), "download the model again, or name another")
    return Check("PLM", "pass", f"{plm}: loads, {loaded.layers} layers, hidden size {loaded.hidden_size}")
