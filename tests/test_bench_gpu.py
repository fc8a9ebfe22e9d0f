"""The GPU script runs, as far as a CPU can tell, and counts operations rightly."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
import gpu

from llm_fixtures import toy_pool
from netllm_lib.abr.batches import make_windows


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.md"
    table = gpu.main(["--device", "cpu", "--small", "--out", str(out)])
    assert capsys.readouterr().out.strip().endswith(table[-1])
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["device", "PLM", "test of 3 traces"]
    assert table[-1] in out.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main([])


def test_counted_operations(tmp_path: Path) -> None:
    """The formula against PyTorch's own count of a step, less that of the modules around the PLM; it leaves out fused attention."""
    size = gpu.Size(256, 768, 4, 4, 2, 16, 1, (2,), 1, 1)
    network = gpu.make(size, torch.device("cpu"), tmp_path, attention="fast")
    network.plm.base.float()
    network.train()
    batch = make_windows(toy_pool()).batch([0, 1])
    around = FlopCounterMode(display=False)
    with around:
        network.embed(*batch[:4]).sum().backward()
    whole = FlopCounterMode(display=False)
    with whole:
        network.loss(batch)[0].backward()
    counted = (whole.get_total_flops() - around.get_total_flops()) / 2
    assert gpu.matrix_flop(size, 20) == pytest.approx(counted, rel=0.01)
    assert (
        4.0e12 < gpu.training_flop(dataclasses.replace(gpu.FULL, kv_heads=32, intermediate=11008), 20) < 4.3e12
    )  # Llama-2-7B
