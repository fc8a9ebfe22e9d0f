"""The GPU script runs, as far as a CPU can tell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
import gpu


def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    table = gpu.main(["--device", "cpu", "--small"])
    assert capsys.readouterr().out.strip().endswith(table[-1])
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["device", "PLM", "test of 3 traces"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main([])
