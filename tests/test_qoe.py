"""QoE on tables that a reader checks by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from netllm_lib.abr import qoe


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [("a", 0, 300, 1.0, 300), ("a", 1, 750, 0.0, 300), ("a", 2, 750, 0.5, 750)]
    rows += [("b", 0, 300, 2.0, 300), ("b", 1, 4300, 0.0, 300), ("b", 2, 300, 0.0, 4300)]
    frame = pd.DataFrame(rows, columns=["trace", "chunk", "bitrate_kbps", "rebuffer_s", "previous"])
    frame["smoothness_mbps"] = (frame["bitrate_kbps"] - frame["previous"]).abs() / 1000
    frame["reward"] = qoe.reward(*(frame[name].to_numpy() for name in ("bitrate_kbps", "rebuffer_s", "previous")))
    return frame


def test_means_leave_the_first_chunk_out(table: pd.DataFrame) -> None:
    bitrate, smoothness = (0.75 + 0.75 + 4.3 + 0.3) / 4, (0.45 + 0 + 4 + 4) / 4
    assert qoe.summarise(table) == pytest.approx((bitrate - 4.3 * 0.125 - smoothness, bitrate, 0.125, smoothness))


def test_per_trace_parts_add_up(table: pd.DataFrame) -> None:
    parts = qoe.per_trace(table)
    assert parts["smoothness"].to_dict() == pytest.approx({"a": 0.225, "b": 4.0})
    np.testing.assert_allclose(parts["reward"], parts["quality"] - parts["rebuffering"] - parts["smoothness"])
