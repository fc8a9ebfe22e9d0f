"""The environment checks: each of them can pass, and each can fail with advice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from netllm_lib import envcheck
from netllm_lib.abr import checks
from netllm_lib.envcheck import Check

CHECKS = [Check("a", "pass", "fine"), Check("b", "warn", "hm", "look"), Check("c", "fail", "broken", "mend it")]


def test_failed_checks_are_named() -> None:
    envcheck.require(CHECKS[:2])
    with pytest.raises(envcheck.CheckFailed, match=r"^c: broken \(mend it\)$"):
        envcheck.require(CHECKS)
    assert envcheck.as_text(CHECKS[:2]) == "pass  a: fine\nwarn  b: hm\n      → look"
    (check,) = envcheck.guarded("thing", lambda: [][1])
    assert (check.name, check.status) == ("thing", "fail")
    assert "IndexError" in check.found


def test_python_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert envcheck.packages_check("llm").status == "pass"
    wanted = ["numpy>=99", "nosuchpackage", "scipy", "x; python_version<'3'"]
    monkeypatch.setattr(
        envcheck, "_project", lambda: {"requires-python": ">=9", "optional-dependencies": {"llm": wanted}}
    )
    old, misfits = envcheck.python_check(), envcheck.packages_check("llm")
    assert (old.status, misfits.status) == ("fail", "fail")
    assert misfits.found.startswith("numpy ")
    assert misfits.found.endswith(", needs >=99; nosuchpackage is not installed")


def test_memory_is_compared_with_the_machine(tmp_path: Path) -> None:
    assert checks.memory_check("smollm2", 4).status == "pass"
    huge: dict[str, Any] = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 200}
    LlamaConfig(**huge, num_attention_heads=64).save_pretrained(tmp_path)
    too_much = checks.memory_check(str(tmp_path), None)
    assert too_much.status == "fail"
    assert "fewer layers" in too_much.advice
    assert checks.memory_check(str(tmp_path / "nothing"), None).status == "warn"


def test_plm_folder_that_is_not_complete(tmp_path: Path) -> None:
    check = envcheck.plm_check(str(tmp_path))
    assert check.status == "fail"
    assert "config.json" in check.found
    assert envcheck.plm_check("tiny-llama", load=True).status == "pass"
    assert envcheck.plm_check("someone/some-model").status == "warn"


def test_data_folder(tmp_path: Path) -> None:
    missing = checks.data_check(tmp_path / "nothing")
    assert missing.status == "fail"
    assert "data/netllm" in missing.advice
    traces, video = tmp_path / "traces" / "test" / "slow", tmp_path / "videos" / "clip_sizes"
    for folder in (traces, video):
        folder.mkdir(parents=True)
    (traces / "a").write_text("0 1.5\n1 2.5\n2 2.0\n")
    assert checks.data_check(tmp_path).status == "fail"
    for level in range(6):
        (video / f"video_size_{level}").write_text(f"{100_000 * (level + 1)}\n" * 49)
    check = checks.data_check(tmp_path)
    assert (check.status, check.found) == ("pass", f"{tmp_path}: traces slow (1); videos clip")
    assert checks.actors_check(tmp_path).status == "warn"
    (traces / "a").write_text("0 1.5\n1 fast\n")
    broken = checks.data_check(tmp_path)
    assert broken.status == "fail"
    assert str(traces / "a") in broken.found


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "kernels" / "netllm-gone"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/no/such/python", "-m", "x"], "display_name": "x"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert envcheck.kernel_problem("python3") is None
    assert "no Jupyter kernel named netllm-other" in str(envcheck.kernel_problem("netllm-other"))
    assert "does not exist" in str(envcheck.kernel_problem("netllm-gone"))
    assert envcheck.kernel_check("netllm-gone").status == "fail"


def test_importing_needs_neither_torch_nor_papermill() -> None:
    program = (
        "import sys, netllm_lib.envcheck, netllm_lib.cli\n"
        "print(sorted({'torch', 'papermill', 'tensorflow', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
