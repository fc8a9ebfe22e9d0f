"""Quality of experience: the linear QoE of Pensieve (SIGCOMM 2017, section 5.1), which NetLLM uses as reward.

reward = bitrate in Mbps - 4.3 * rebuffering in seconds - |change of bitrate| in Mbps, per chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

BITRATES_KBPS = np.array([300, 750, 1200, 1850, 2850, 4300])
LEVELS = len(BITRATES_KBPS)
CHUNKS = 48  # of a video that an episode plays; size files may list more
REBUFFER_PENALTY = 4.3  # Mbps per second of rebuffering: the highest bitrate


def reward(bitrate_kbps: np.ndarray, rebuffer_s: np.ndarray, previous_kbps: np.ndarray) -> np.ndarray:
    """Reward per chunk, any shape. The order of operations is the original's, so results are bit-equal to it."""
    return bitrate_kbps / 1000 - REBUFFER_PENALTY * rebuffer_s - np.abs(bitrate_kbps - previous_kbps) / 1000


class Quality(NamedTuple):
    """Means over chunks, pooled over traces; the first chunk of each trace, which no policy chooses, is left out."""

    reward: float
    bitrate_mbps: float
    rebuffer_s: float  # seconds of rebuffering per chunk
    smoothness_mbps: float  # |change of bitrate| per chunk


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a table of chunks that a policy chose: all but each trace's first chunk."""
    return table[table["chunk"] > 0]


def summarise(table: pd.DataFrame) -> Quality:
    """Mean reward and its three parts of a table of chunks. The reward is the figure that the original prints."""
    rows = chosen(table)
    reward, kbps, rebuffer_s, smoothness_mbps = rows[["reward", "bitrate_kbps", "rebuffer_s", "smoothness_mbps"]].mean()
    return Quality(float(reward), float(kbps / 1000), float(rebuffer_s), float(smoothness_mbps))


def per_trace(table: pd.DataFrame) -> pd.DataFrame:
    """Means by trace in playing order: reward and its parts, all in reward units (Mbps), so that

    reward = quality - rebuffering - smoothness. Index: trace.
    """
    rows = chosen(table)
    parts = rows[["trace", "reward"]].assign(
        quality=rows["bitrate_kbps"] / 1000,
        rebuffering=REBUFFER_PENALTY * rows["rebuffer_s"],
        smoothness=rows["smoothness_mbps"],
    )
    return parts.groupby("trace", sort=False).mean()
