"""What a pool can teach, before hours of training: what a small network earns that clones it for seconds.

A PLM that is trained soundly on the same pool ends near the estimate, or above it: the small transformer sees whole episodes,
and what it cannot copy is mostly what the pool does not show. It is an estimate of the pool, not of the PLM.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pandas as pd

from netllm_lib.abr import checkpoint
from netllm_lib.abr.improve import ImproveConfig, small_network
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.llm import LLMPolicy
from netllm_lib.abr.pool import ExperiencePool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.train import Progress, train

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
    """The table of chunks that `improve.small_network` plays in `held` after about so many steps on the pool's actions.

    `held` holds validation episodes: no content of theirs may be in the pool. `advantage` weights the actions, see
    `TrainConfig`. `progress` hears of every training step.
    """
    episodes = len(pool.episode_starts)
    longest = int(pool.episode_lengths.max())
    network = small_network(seed, max_timestep=longest - 1)
    epochs = max(1, round(steps * BATCH / episodes))
    shape = dataclasses.replace(ImproveConfig().train, w=longest, batch=BATCH, epochs=epochs)
    config = dataclasses.replace(shape, advantage=advantage, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        train(network, pool, config, folder=Path(folder), progress=progress)
    return play(LLMPolicy(network, checkpoint.describe(network, config.cut(pool).scale, config.w)), held)
