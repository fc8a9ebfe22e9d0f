"""What a pool can teach, before hours of training: what a small network earns that clones it for seconds.

What a small transformer that sees whole episodes cannot copy is mostly what the pool does not show: the estimate is one of the
pool, not of the PLM. After seconds it is still a little below what longer training gives.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from netllm_lib import checkpoint
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.abr.improve import ImproveConfig, small_network
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.train import Progress, train

BATCH = 16  # episodes in a step


def cloning_estimate(
    pool: ExperiencePool,
    held: Simulator,
    steps: int = 150,
    *,
    advantage: float | None = None,
    seed: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """The table of chunks that `improve.small_network` plays in `held` after so many steps on the pool's actions.

    `held` holds validation episodes: no content of theirs may be in the pool. `advantage` weights the actions, see
    `make_windows`. `progress` hears of every training step.
    """
    rng, episodes = np.random.default_rng(seed), len(pool.episode_starts)
    longest = int(pool.episode_lengths.max())
    network = small_network(seed, max_timestep=longest - 1)
    passes = [rng.permutation(episodes) for _ in range(-(-steps * BATCH // episodes))]
    order = tuple(np.concatenate(passes)[: steps * BATCH].tolist())  # of a large pool a part, of a small one many times
    config = dataclasses.replace(ImproveConfig().train, batch=BATCH, epochs=1, order=(order,), seed=seed)
    windows = make_windows(pool, WindowConfig(w=longest), advantage=advantage)
    with tempfile.TemporaryDirectory() as folder:
        train(network, windows, config, folder=Path(folder), settings=windows.settings, progress=progress)
    return play(LLMPolicy(network, checkpoint.describe(network, windows.settings)), held)
