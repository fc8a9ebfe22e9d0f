"""The Pensieve-family actors Genet and UDR (Xia et al., SIGCOMM 2022), ported to NumPy from their TensorFlow 1 checkpoints.

Reading a checkpoint needs TensorFlow once (`tensorflow_actor.py`, run in the TensorFlow environment); playing does not.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from netllm_lib.abr.episodes import Episodes, Observation
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.arrays import array_hash
from netllm_lib.runs import PROJECT, atomic_path, cache_root, file_hash

DENSE = ("FullyConnected", "FullyConnected_1", "FullyConnected_2")  # state rows 0, 1, 5
CONV = ("Conv1D", "Conv1D_1", "Conv1D_2")  # state rows 2, 3, 4
HIDDEN, OUT = "FullyConnected_3", "FullyConnected_4"
_MOVE_OF_ACTION = np.array([-1, 0, 1])  # action 0: down, 1: stay, 2: up
SHAPES = dict.fromkeys(DENSE, (1, 128)) | dict.fromkeys(CONV, (4, 1, 6, 128)) | {HIDDEN: (768, 128), OUT: (128, 3)}


def latest_checkpoint(folder: Path) -> Path:
    """Path prefix (without ".index") of the checkpoint with the highest step. Raises FileNotFoundError."""
    found = [(re.search(r"_(\d+)\.ckpt\.index$", path.name), path) for path in Path(folder).glob("*.ckpt.index")]
    steps = {int(match[1]): path for match, path in found if match}
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint named …_<step>.ckpt.index")
    return steps[max(steps)].with_suffix("")


def tensorflow_python() -> str | None:
    """A Python with TensorFlow: `$NETLLM_TF_PYTHON`, this one, or that of `.venv-tf`; None if there is none."""
    if named := os.environ.get("NETLLM_TF_PYTHON"):
        return named
    if importlib.util.find_spec("tensorflow"):
        return sys.executable
    beside = PROJECT / ".venv-tf" / "bin" / "python"
    return str(beside) if beside.exists() else None


def load_actor(folder: Path) -> Actor:
    """The actor of the newest checkpoint in `folder`, from the cache; exported to it if it is not there whole (some seconds).

    Raises OSError if that needs TensorFlow and no environment has it.
    """
    checkpoint = latest_checkpoint(folder)
    digest = file_hash(checkpoint.with_name(f"{checkpoint.name}.data-00000-of-00001"), digits=10)
    path = cache_root() / "actors" / f"{Path(folder).name}-{digest}.safetensors"
    if path.exists():
        try:
            return Actor.load(path)
        except ValueError:  # damaged, or of an earlier version: it is made again
            pass
    python = tensorflow_python()
    if python is None:
        raise OSError(
            f"actor {Path(folder).name}: its TensorFlow checkpoint was never exported and no TensorFlow was found; "
            "run `make env-tf` once (or set $NETLLM_TF_PYTHON to a Python that has it)"
        )
    module = "netllm_lib.abr.policies.tensorflow_actor"
    command = [python, "-m", module, str(checkpoint.resolve()), str(path.resolve())]
    quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, cwd=PROJECT, env=quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"exporting {checkpoint} with {python} failed: {reason}")
    return Actor.load(path)


def save_actor(weights: dict[str, np.ndarray], path: Path) -> None:
    """Write an actor's weights, "<layer>/W" and "<layer>/b", with their digest."""
    with atomic_path(path) as aside:
        save_file(weights, aside, metadata={"hash": _digest(weights)})


def _digest(weights: dict[str, np.ndarray]) -> str:
    return array_hash(*(weights[name] for name in sorted(weights)))


class Actor:
    """The actor network: states [N, 6, 6] -> probabilities [N, 3] of the actions down, stay, up. float32 throughout."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self._weights = weights

    @classmethod
    def load(cls, path: Path) -> Actor:
        """Read what `save_actor` wrote. Raises ValueError if the file is damaged."""
        try:
            with safe_open(path, "numpy") as stream:
                weights, about = {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata()  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not an exported actor ({error})") from None
        if (about or {}).get("hash") != _digest(weights):
            raise ValueError(f"{path}: the weights are not those that were exported; delete the file")
        return cls(weights)

    def probabilities(self, states: np.ndarray) -> np.ndarray:
        """[N, 3] float32.

        The convolutions have width 4 with SAME padding over length 1, so only their tap 1 ever meets data.
        """
        x = states.astype(np.float32)
        inputs = [(name, x[:, row, -1:]) for row, name in zip((0, 1), DENSE[:2], strict=True)]
        inputs += [(name, x[:, row]) for row, name in zip((2, 3, 4), CONV, strict=True)]
        features = [self._layer(part, name) for name, part in [*inputs, (DENSE[2], x[:, 5, -1:])]]
        logits = self._linear(self._layer(np.concatenate(features, axis=1), HIDDEN), OUT)
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    def _layer(self, x: np.ndarray, name: str) -> np.ndarray:
        return np.maximum(self._linear(x, name), 0)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self._weights[f"{name}/W"]
        return x @ (weight[1, 0] if name in CONV else weight) + self._weights[f"{name}/b"]


class Pensieve(Policy):
    """An actor as a policy: it moves the level down, keeps it, or moves it up, by the protocol's action draw."""

    draws_actions = True

    def __init__(self, actor: Actor, name: str = "genet"):
        self.actor, self.name = actor, name

    def reset(self, episodes: Episodes) -> None:
        self._draws = episodes.action_draws

    def act(self, observation: Observation) -> np.ndarray:
        draws = self._draws[observation.episode, observation.chunk - 1]
        action = sampled_action(self.actor.probabilities(observation.state), draws)
        return np.clip(observation.last_level + _MOVE_OF_ACTION[action], 0, LEVELS - 1)


def sampled_action(probabilities: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[N] the first action whose cumulated probability [N, 3] exceeds draw / 1000 in float32; 0 if none does."""
    thresholds = (draws / 1000).astype(np.float32)
    return (np.cumsum(probabilities, axis=1) > thresholds[:, None]).argmax(axis=1)
