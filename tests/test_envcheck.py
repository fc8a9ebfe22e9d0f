"""The environment checks: each of them can pass, and each can fail with advice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from transformers import LlamaConfig

from netllm_lib import envcheck
from netllm_lib.envcheck import Check

CHECKS = [Check("a", "pass", "fine"), Check("b", "warn", "hm", "look"), Check("c", "fail", "broken", "mend it")]


def test_require_names_what_failed() -> None:
    envcheck.require(CHECKS[:2])
    with pytest.raises(envcheck.CheckFailed, match=r"^c: broken \(mend it\)$"):
        envcheck.require(CHECKS)


def test_tables() -> None:
    table = envcheck.as_table(CHECKS)
    assert list(table.columns) == ["check", "status", "found", "advice"]
    assert list(table["status"]) == ["pass", "warn", "fail"]
    assert envcheck.as_text(CHECKS, 40).splitlines() == [
        "pass  a  fine",
        "warn  b  hm",
        "         → look",
        "fail  c  broken",
        "         → mend it",
    ]


def test_python() -> None:
    assert envcheck.python_check().status == "pass"
    old = envcheck.python_check((3, 10))
    assert old.status == "fail"
    assert ">=3.11" in old.advice


def test_packages_fit_the_pins() -> None:
    for name, extra in (("core", ""), ("llm", "llm")):
        assert [check.status for check in envcheck.package_checks(name, extra)] == ["pass"]


def test_package_misfits(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        Requirement("numpy>=99"),
        Requirement("nosuchpackage"),
        Requirement("scipy"),
        Requirement("x; python_version<'3'"),
    ]
    monkeypatch.setattr(envcheck, "requirements", lambda extra: wanted)
    summary, old, missing = envcheck.package_checks("llm", "llm")
    assert summary.status == "fail"
    assert summary.found.startswith("scipy ")
    assert (old.name, old.status, old.advice) == ("numpy", "fail", 'pip install "numpy>=99"')
    assert (missing.name, missing.found) == ("nosuchpackage", "not installed")


def test_requirements_of_an_installed_package_equal_those_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails after a change of pyproject.toml: `make env`."""
    from_checkout = {extra: {str(r) for r in envcheck.requirements(extra)} for extra in ("", "llm")}
    monkeypatch.setattr(envcheck, "_project", dict)
    for extra, expected in from_checkout.items():
        assert {str(requirement) for requirement in envcheck.requirements(extra)} == expected


def test_memory_check_compares_with_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert envcheck.memory_check("smollm2", 4).status == "pass"
    huge: dict[str, Any] = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 200}
    LlamaConfig(**huge, num_attention_heads=64).save_pretrained(tmp_path)
    too_much = envcheck.memory_check(str(tmp_path), None)
    assert too_much.status == "fail"
    assert "fewer layers" in too_much.advice
    monkeypatch.setattr(envcheck, "_plm_shape", lambda plm: None)
    assert envcheck.memory_check("unknown", None).status == "warn"


def test_device_is_named() -> None:
    first, *_ = envcheck.device_checks()
    assert first.name.startswith("device ")
    assert "memory" in first.found
    assert "bf16" in first.found


def test_plm_folder_that_is_not_complete(tmp_path: Path) -> None:
    (check, *_) = envcheck.plm_checks(str(tmp_path))
    assert check.status == "fail"
    assert "config.json" in check.found
    assert [check.status for check in envcheck.plm_checks("tiny-llama", load=True)] == ["pass"]


def test_data_folder_that_is_not_there(tmp_path: Path) -> None:
    for check in (envcheck.data_check(tmp_path / "nothing"), envcheck.actors_check(tmp_path / "nothing")):
        assert check.status == "fail"
        assert "data/netllm" in check.advice


def test_data_folder(tmp_path: Path) -> None:
    traces, video = tmp_path / "traces" / "test" / "slow", tmp_path / "videos" / "clip_sizes"
    for folder in (traces, video):
        folder.mkdir(parents=True)
    (traces / "a").write_text("0 1.5\n1 2.5\n2 2.0\n")
    without_video = envcheck.data_check(tmp_path)
    assert without_video.status == "fail"
    for level in range(6):
        (video / f"video_size_{level}").write_text(f"{100_000 * (level + 1)}\n" * 49)
    check = envcheck.data_check(tmp_path)
    assert (check.status, check.found) == ("pass", f"{tmp_path}: traces slow (1); videos clip")
    assert envcheck.actors_check(tmp_path).status == "warn"
    (traces / "a").write_text("0 1.5\n1 fast\n")
    broken = envcheck.data_check(tmp_path)
    assert broken.status == "fail"
    assert str(traces / "a") in broken.found


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "GB free" in envcheck.disk_check(tmp_path / "not" / "yet").found
    monkeypatch.setattr(envcheck, "DISK_NEEDED_GB", 1e9)
    assert envcheck.disk_check(tmp_path).status == "fail"


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "kernels" / "netllm-gone"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/no/such/python", "-m", "x"], "display_name": "x"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert envcheck.kernel_problem("python3") is None
    assert "no Jupyter kernel named netllm-other" in str(envcheck.kernel_problem("netllm-other"))
    assert "does not exist" in str(envcheck.kernel_problem("netllm-gone"))
    monkeypatch.setattr(envcheck, "KERNELS", {"netllm-llm-x": "make env", "netllm-tf": "make env-tf"})
    assert envcheck.kernel_checks()[0].status == "fail"


def test_a_check_that_breaks_is_a_line_in_the_table() -> None:
    (check,) = envcheck._guarded("thing", lambda: [][1])
    assert (check.name, check.status) == ("thing", "fail")
    assert "IndexError" in check.found


def test_importing_needs_neither_torch_nor_papermill() -> None:
    program = (
        "import sys, netllm_lib.envcheck, netllm_lib.notebooks, netllm_lib.pipelines, netllm_lib.cli\n"
        "print(sorted({'torch', 'papermill', 'tensorflow', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
