"""The bandwidth model of the bundled sample, and the command that writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from netllm_lib.abr.synthetic import BandwidthModel, generate_traces
from netllm_lib.abr.traces import SAMPLE
from netllm_lib.cli import main


def test_the_command_writes_the_bundled_sample(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "generate", str(tmp_path)])
    assert stopped.value.code == 0
    for folder in ("traces", "videos"):
        files = sorted(path for path in (SAMPLE / folder).rglob("*") if path.is_file())
        assert len(files) > 5
        for path in files:
            assert (tmp_path / path.relative_to(SAMPLE)).read_bytes() == path.read_bytes()


def test_traces_follow_the_model() -> None:
    model = BandwidthModel(spread=0.3, samples=400, memory=0.6, jitter=0.3, regimes=(0.0,), floor_mbps=0.5)
    traces = generate_traces("t", 200, 1, model)
    logs = np.log([trace.mbps for trace in traces.traces])
    assert logs.min() == pytest.approx(np.log(0.5), abs=1e-6)
    free = logs[(logs > np.log(0.5)).all(axis=1)]
    wander = free - free.mean(axis=1, keepdims=True)
    assert wander.var() == pytest.approx(model.jitter**2 / (1 - model.memory**2), rel=0.1)
    assert np.mean(wander[:, 1:] * wander[:, :-1]) / wander.var() == pytest.approx(model.memory, abs=0.05)
