"""QoE on tables that a reader checks by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from netllm_lib.abr import qoe


def table() -> pd.DataFrame:
    first = [("a", 0, 300, 1.0, 300), ("a", 1, 750, 0.0, 300), ("a", 2, 750, 0.5, 750)]
    second = [("b", 0, 300, 2.0, 300), ("b", 1, 4300, 0.0, 300), ("b", 2, 300, 0.0, 4300)]
    rows = first + second
    frame = pd.DataFrame(rows, columns=["trace", "chunk", "bitrate_kbps", "rebuffer_s", "previous"])
    frame["smoothness_mbps"] = (frame["bitrate_kbps"] - frame["previous"]).abs() / 1000
    frame["reward"] = qoe.reward(*(frame[name].to_numpy() for name in ("bitrate_kbps", "rebuffer_s", "previous")))
    return frame


def test_reward_by_hand() -> None:
    assert qoe.reward(np.array([750]), np.array([0.5]), np.array([300]))[0] == pytest.approx(0.75 - 2.15 - 0.45)


def test_means_leave_the_first_chunk_out() -> None:
    quality = qoe.summarise(table())
    assert quality.bitrate_mbps == pytest.approx((0.75 + 0.75 + 4.3 + 0.3) / 4)
    assert quality.rebuffer_s == pytest.approx(0.125)
    assert quality.smoothness_mbps == pytest.approx((0.45 + 0 + 4 + 4) / 4)
    assert quality.reward == pytest.approx(quality.bitrate_mbps - 4.3 * quality.rebuffer_s - quality.smoothness_mbps)


def test_per_trace_parts_add_up() -> None:
    parts = qoe.per_trace(table())
    assert parts.index.tolist() == ["a", "b"]
    np.testing.assert_allclose(parts["reward"], parts["quality"] - parts["rebuffering"] - parts["smoothness"])
    assert parts.loc["b", "smoothness"] == 4.0
