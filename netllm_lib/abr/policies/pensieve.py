"""The Pensieve-family actors Genet and UDR (Xia et al., SIGCOMM 2022), ported to NumPy from their TensorFlow 1 checkpoints.

Reading a checkpoint needs TensorFlow once (`export_actor`, run in the TensorFlow environment); playing does not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from netllm_lib.abr.policies.base import Episodes, Observation, Policy
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.runs import atomic_path

DENSE = ("FullyConnected", "FullyConnected_1", "FullyConnected_2")  # state rows 0, 1, 5
CONV = ("Conv1D", "Conv1D_1", "Conv1D_2")  # state rows 2, 3, 4
HIDDEN, OUT = "FullyConnected_3", "FullyConnected_4"
_MOVE_OF_ACTION = np.array([-1, 0, 1])  # action 0: down, 1: stay, 2: up
_SHAPES = {name: (1, 128) for name in DENSE} | {name: (4, 1, 6, 128) for name in CONV} | {HIDDEN: (768, 128), OUT: (128, 3)}


def latest_checkpoint(folder: Path) -> Path:
    """Path prefix (without ".index") of the checkpoint with the highest step. Raises FileNotFoundError."""
    steps = {
        int(match[1]): path for path in Path(folder).glob("*.ckpt.index") if (match := re.search(r"_(\d+)\.ckpt\.index$", path.name))
    }
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint named …_<step>.ckpt.index")
    return steps[max(steps)].with_suffix("")


def export_actor(checkpoint: Path, path: Path) -> Path:
    """Write the actor's weights of a TensorFlow checkpoint prefix as .safetensors. Needs TensorFlow.

    Only the 16 `actor/…/W` and `/b` variables are kept. Raises ValueError if one is missing or has another shape.
    """
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(checkpoint))
    shapes = reader.get_variable_to_shape_map()
    weights = {}
    for layer, shape in _SHAPES.items():
        for part, expected in (("W", shape), ("b", shape[-1:])):
            key = f"actor/{layer}/{part}"
            if tuple(shapes.get(key, ())) != expected:
                raise ValueError(f"{checkpoint}: variable {key} has shape {shapes.get(key)}, expected {list(expected)}")
            weights[f"{layer}/{part}"] = np.ascontiguousarray(reader.get_tensor(key), dtype=np.float32)
    with atomic_path(path) as aside:
        save_file(weights, aside, metadata={"checkpoint": Path(checkpoint).name})
    return path


class Actor:
    """The actor network: states [N, 6, 6] -> probabilities [N, 3] of the actions down, stay, up. float32 throughout."""

    def __init__(self, weights: dict[str, np.ndarray]):
        for layer, shape in _SHAPES.items():
            found = weights.get(f"{layer}/W", np.zeros(0)).shape
            if found != shape:
                raise ValueError(f"actor weights: {layer}/W has shape {found}, expected {shape}")
        self._weights = weights

    @classmethod
    def load(cls, path: Path) -> Actor:
        """Read the weights that `export_actor` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no exported actor; run notebook 02 or `netllm data actors`")
        return cls(load_file(path))

    def probabilities(self, states: np.ndarray) -> np.ndarray:
        """[N, 3] float32.

        The convolutions have width 4 with SAME padding over length 1, so only their tap 1 ever meets data.
        """
        states, w = states.astype(np.float32), self._weights
        features = [_relu(states[:, row, -1:] @ w[f"{name}/W"] + w[f"{name}/b"]) for name, row in zip(DENSE, (0, 1, 5), strict=True)]
        convolved = [_relu(states[:, row, :] @ w[f"{name}/W"][1, 0] + w[f"{name}/b"]) for name, row in zip(CONV, (2, 3, 4), strict=True)]
        merged = np.concatenate([features[0], features[1], *convolved, features[2]], axis=1)
        hidden = _relu(merged @ w[f"{HIDDEN}/W"] + w[f"{HIDDEN}/b"])
        logits = hidden @ w[f"{OUT}/W"] + w[f"{OUT}/b"]
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)


class Pensieve(Policy):
    """An actor as a policy: it moves the level down, keeps it, or moves it up.

    `choose="sample"` (as the original, and the sound form with its own stream per episode) compares the cumulated
    probabilities with the protocol's action draw; "argmax" takes the most likely move.
    """

    draws_actions = True

    def __init__(self, actor: Actor, name: str = "genet", choose: Literal["sample", "argmax"] = "sample"):
        if choose not in ("sample", "argmax"):
            raise ValueError(f'choose must be "sample" or "argmax", not {choose!r}')
        self.actor, self.name, self.choose = actor, name, choose
        self._probabilities = np.zeros((0, 3), dtype=np.float32)

    def reset(self, episodes: Episodes) -> None:
        self._draws = (episodes.action_draws / 1000).astype(np.float32)

    def act(self, observation: Observation) -> np.ndarray:
        self._probabilities = self.actor.probabilities(observation.state)
        if self.choose == "sample":
            draw = self._draws[observation.episode, observation.chunk - 1]
            action = (np.cumsum(self._probabilities, axis=1) > draw[:, None]).argmax(axis=1)  # none exceeds: action 0
        else:
            action = self._probabilities.argmax(axis=1)
        return np.clip(observation.last_level + _MOVE_OF_ACTION[action], 0, LEVELS - 1)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)
