"""Training windows from an experience pool: w consecutive transitions with their return-to-go and timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from netllm_lib import arrays, runs
from netllm_lib.abr.advantage import advantage_weights
from netllm_lib.abr.model import FEATURES, HISTORY, Batch, PolicySettings
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.returns import ReturnScale, episode_ends, pool_returns
from netllm_lib.task import Numbers

if TYPE_CHECKING:
    from netllm_lib.abr.pool import ExperiencePool

Learn = Literal["actions", "values", "best"]
VALUE_FLOOR = -8.0  # what is worse than the best level by more is all the same: no policy needs to know how bad it is


@dataclass(frozen=True)
class WindowConfig:
    """Which windows are cut from a pool, and how their return-to-go is made."""

    windows: Literal["episode", "stride", "upstream"] = "episode"
    """"episode": as few windows as cover each episode, spread evenly, so that every transition is in at least one;
    "stride": in each episode one window every `stride` steps, and one that ends with the episode;
    "upstream": one every min(stride or w, w) transitions of the concatenated pool, across episodes; what is left at the
    end of the pool is not used.
    With w of an episode's length, "episode" gives whole episodes; shorter episodes are padded and masked."""
    w: int = 20  # transitions in a window; the paper says 10, the original's code defaults to 20
    stride: int | None = None  # transitions from one window to the next, the original's sample_step; None: w
    gamma: float = 1.0  # discount of the return-to-go
    scale: float = 1000.0  # divides the return-to-go

    def __post_init__(self) -> None:
        if self.windows not in ("episode", "stride", "upstream"):
            raise ValueError(f'windows={self.windows!r}: use "episode", "stride" or "upstream"')
        if self.w < 1 or (self.stride is not None and self.stride < 1):
            raise ValueError(f"w={self.w}, stride={self.stride}: both must be at least 1")

    @classmethod
    def upstream(cls, **changes: Any) -> WindowConfig:
        """The original's windows."""
        return cls(**({"windows": "upstream"} | changes))


@dataclass(frozen=True)
class Windows:
    """All windows of a pool, a `task.Data`; they share the pool's arrays, so many overlapping windows cost nothing.

    Only `batch` touches the states: those of a memory-mapped pool stay on disk until then.
    """

    states: np.ndarray  # float32 [transitions, 6, 6], the pool's own
    actions: torch.Tensor  # int64 [transitions]
    returns: torch.Tensor  # float32 [transitions]
    timesteps: torch.Tensor  # int64 [transitions]
    targets: torch.Tensor  # what is to be predicted, see Batch: int64 [transitions] or float32 [transitions, 6]
    weights: torch.Tensor | None  # float32 [transitions] how much each counts; all the same if None
    starts: np.ndarray  # int64 [windows] first transition
    lengths: np.ndarray  # int64 [windows] transitions that count, w unless the episode is shorter
    config: WindowConfig
    scale: ReturnScale
    learn: Learn
    advantage: float | None  # temperature of the weights
    key: str  # hash of all this

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def settings(self) -> PolicySettings:
        """What a test of a policy that is trained on these windows must know."""
        return PolicySettings(self.config.w, self.scale)

    @property
    def facts(self) -> dict[str, Any]:
        """How the windows were made, and how many of them span two episodes."""
        made = {"learn": self.learn, "advantage": self.advantage, "pool_hash": self.scale.pool_hash}
        return {**runs.plain(self.config), **made, "crossing": int(self.crossing.sum())}

    @property
    def crossing(self) -> np.ndarray:
        """Bool [windows]: does the window hold parts of two episodes."""
        episode = np.cumsum(self.timesteps.numpy() == 0)
        return episode[self.starts] != episode[self.starts + self.lengths - 1]

    def labels(self, numbers: Numbers | None = None) -> int:
        """Transitions in the windows with these numbers (None: all), those in two windows twice, padding not counted."""
        return int(self.lengths[slice(None) if numbers is None else numbers].sum())

    def batch(self, numbers: Numbers) -> Batch:
        """The windows with these numbers. Padding repeats the window's last transition."""
        steps, lengths = np.arange(self.config.w), self.lengths[numbers][:, None]
        index = self.starts[numbers][:, None] + np.minimum(steps, lengths - 1)  # [batch, w] transitions
        mask, states, rows = (torch.from_numpy(array) for array in (steps < lengths, self.states[index], index))
        arrays.give_back(self.states)  # a page of a mapped pool comes with a megabyte around it
        weights = None if self.weights is None else self.weights[rows]
        inputs = (states, self.actions[rows], self.returns[rows], self.timesteps[rows])
        return Batch(*inputs, None if bool(mask.all()) else mask, self.targets[rows], weights)


def make_windows(
    pool: ExperiencePool,
    config: WindowConfig | None = None,
    *,
    like: ReturnScale | None = None,
    values: np.ndarray | None = None,
    learn: Learn = "actions",
    advantage: float | None = None,
) -> Windows:
    """Cut a pool into windows, and say what is to be learnt from them.

    `like` normalises with another pool's scale, as a validation pool must be. `learn`: the pool's actions; or, of the `values`
    [transitions, 6] of all levels, the "values" as distances to the best level, or the "best" level. `advantage` weights the
    actions by how much better than usual they went, see `advantage_weights`. Raises ValueError when no window fits, and for
    values that are missing or not needed.
    """
    config = config or WindowConfig()
    if (values is None) != (learn == "actions") or (values is not None and values.shape != (len(pool), LEVELS)):
        given = "none" if values is None else f"an array {values.shape}"
        raise ValueError(
            f'learn="{learn}" with {given} as values: "actions" needs none, others [{len(pool)}, {LEVELS}]'
        )
    if advantage is not None and (advantage <= 0 or learn != "actions"):
        raise ValueError(f'advantage={advantage}, learn="{learn}": it is above 0, and for actions only')
    returns, scale = pool_returns(pool, config.gamma, config.scale, like)
    ends = episode_ends(pool.dones)
    begins = np.r_[0, ends[:-1]]
    actions = torch.from_numpy(pool.actions.astype(np.int64))
    targets = [] if values is None else [arrays.array_hash(np.asarray(values, dtype=np.float32))]
    return Windows(
        pool.states,
        actions,
        returns=torch.from_numpy(returns.astype(np.float32)),
        timesteps=torch.from_numpy(np.arange(len(returns)) - np.repeat(begins, ends - begins)),
        targets=actions if values is None else make_targets(values, learn),
        weights=None if advantage is None else torch.from_numpy(advantage_weights(pool, advantage)),
        **_cut(config, begins, ends),
        config=config,
        scale=scale,
        learn=learn,
        advantage=advantage,
        key=runs.content_hash([pool.content_hash(), config, scale, learn, advantage, *targets]),
    )


def example_batch(windows: int, w: int = 20) -> Batch:
    """Windows of zeros, for an estimate of memory without a pool."""
    levels = torch.zeros((windows, w), dtype=torch.long)
    return Batch(torch.zeros(windows, w, FEATURES, HISTORY), levels, levels.float(), levels, None, levels)


def make_targets(values: np.ndarray, learn: Learn) -> torch.Tensor:
    """The best level int64 [T], or the distance of every level to it, float32 [T, 6]."""
    known = torch.from_numpy(np.asarray(values, dtype=np.float32))
    if learn == "best":
        return known.argmax(dim=-1)
    return (known - known.amax(dim=-1, keepdim=True)).clamp(min=VALUE_FLOOR)


def _cut(config: WindowConfig, begins: np.ndarray, ends: np.ndarray) -> dict[str, np.ndarray]:
    w, stride = config.w, config.stride or config.w
    if config.windows == "upstream":
        starts = np.arange(0, ends[-1] - w + 1, min(stride, w))
        if not len(starts):
            raise ValueError(f"the pool has {ends[-1]} transitions, fewer than one window of {w}")
        return {"starts": starts, "lengths": np.full(len(starts), w)}
    parts = []
    for length in np.unique(ends - begins):
        last = max(0, length - w)  # offset of the window that ends with the episode
        if config.windows == "episode":
            offsets = np.rint(np.linspace(0, last, -(-int(length) // w))).astype(np.int64)
        else:
            offsets = np.unique(np.r_[np.arange(0, last + 1, stride), last])
        parts.append((begins[ends - begins == length][:, None] + offsets).ravel())
    starts = np.sort(np.concatenate(parts))
    return {"starts": starts, "lengths": np.minimum(w, ends[np.searchsorted(ends, starts, side="right")] - starts)}
