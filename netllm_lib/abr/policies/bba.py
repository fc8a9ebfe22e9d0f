"""BBA: buffer-based adaptation (Huang et al., SIGCOMM 2014), as Pensieve and NetLLM ship it."""

from __future__ import annotations

import numpy as np

from netllm_lib.abr.episodes import Observation
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import LEVELS

RESERVOIR_S = 5.0
CUSHION_S = 10.0


class BBA(Policy):
    """Level 0 below the reservoir, the top level above reservoir + cushion, linear (rounded down) in between.

    The original does the same: there is no other form.
    """

    name = "bba"

    def act(self, observation: Observation) -> np.ndarray:
        level = (LEVELS - 1) * (observation.buffer_s - RESERVOIR_S) / CUSHION_S
        return np.clip(level, 0, LEVELS - 1).astype(np.int64)
