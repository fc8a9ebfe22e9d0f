"""Cases: a run with a fault as a user would have it on disk, and apart from it what is true of it."""

from __future__ import annotations

import copy
import functools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_fixtures import write_plm
from netllm_lib import runs
from netllm_lib.abr import batches
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.pool import ExperiencePool, generate_pool
from netllm_lib.abr.synthetic import generate_traces
from netllm_lib.abr.traces import Registry
from netllm_lib.stats import Interval
from netllm_lib.train import mean_loss
from planted_runs import HIDDEN, TRAININGS, Bench, Trained

GRADES = ("mild", "medium", "strong")
COSTS = 0.05  # mean reward: a fault that costs less is harmless

IDS: dict[str, str] = {
    # what may be true of a case, and further ids that count as the same; first those that a diagnosis had when this was written
    "label-shift": "shifted-labels levels-reversed", "adapter-not-applied": "adapter-scaled", "sampling": "temperature",
    "wrong-checkpoint": "other-weights damaged-weights not-reproduced", "dropout-on": "", "context-leak": "", "wrong-pool": "",
    "window-mismatch": "", "target-return": "target-not-updated", "warmup-too-long": "", "diverged": "loss-rises",
    "learning-rate": "", "undertrained": "", "weak-teacher": "", "pool-too-small": "", "video-shift": "", "trace-shift": "",
    "level-collapse": "", "rare-bad-actions": "", "protocol-mismatch": "",
    # proposed ones
    "broken-pool": "pool-inconsistent pool-units pool-history pool-sizes other-ladder", "reward-mismatch": "pool-rewards",
    "overfit": "overfitting one-trace repeated-episodes", "broken-traces": "damaged-traces trace-units", "return-scale": "gamma",
    "weight-decay": "", "other-lora-alpha": "lora-alpha", "other-plm": "wrong-plm another-plm", "wrong-layer": "early-stop",
    "level-mapping": "levels-mapped", "test-states": "test-units", "untrained": "untrained-network",
    "cut-log": "log-cut stopped-early", "printed-mean": "log-mean-mismatch", "other-traces": "wrong-traces",
    "mixed-results": "two-runs", "plays-bba": "bba", "plays-constant": "constant", "plays-last-level": "copycat",
    "plays-random": "random", "late": "late-reaction lagging",
}  # fmt: skip


def accepted(truth: Sequence[str]) -> set[str]:
    """All ids by which a diagnosis may call what is true."""
    return {name for id in truth for name in (id, *IDS[id].split())}


@dataclass(frozen=True)
class Case:
    """A run on disk, and what is true of it."""

    operator: str
    severity: str
    seed: int
    folders: tuple[Path, ...]  # what the diagnoser is given
    options: dict[str, str]  # and of its options: data, pool, plm
    truth: tuple[str, ...]  # ids, see IDS
    effect: Interval | None  # healthy twin − run on the same traces; None for a healthy run
    measurement: bool  # the policy is as it was, only what is said of it is wrong
    drawn: Any  # how severe

    @property
    def name(self) -> str:
        return f"{self.operator} {self.severity} {self.seed}"

    @property
    def kind(self) -> str:
        """What is asked of a diagnosis. "harmful": its first finding, no mere note, is true; "measured": so, at any severity;
        "harmless": it names no cause; "open", where the interval of a cost holds zero: no cause that is not true."""
        if self.measurement:
            return "measured"
        if self.effect is None or self.effect.mean < COSTS:
            return "harmless"
        return "harmful" if self.effect.low > 0 else "open"


class FaultBench(Bench):
    """The bench of the planted faults, on which any pool can be learnt by any recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, ExperiencePool] = {}  # pools by name
        self.held_out: dict[str, ExperiencePool] = {"healthy": self.validation}  # by training: validation pools
        self.done: dict[str, Trained] = {}

    def pool(self, name: str) -> ExperiencePool:  # type: ignore[override]
        return self.made[name] if name in self.made else super().pool(name)

    @functools.cached_property
    def validation(self) -> ExperiencePool:
        """Sound MPC on 20 traces that are nobody else's."""
        traces, video = generate_traces("bench-valid", 20, 60), self.video()
        return generate_pool(RobustMPC(video), traces, video, sound_episodes(traces))

    def learn(
        self, pool: ExperiencePool, held: ExperiencePool | None = None, original: bool = False, **recipe: Any
    ) -> str:
        """The name of a training on `pool`, with the loss on `held` measured at its end; `recipe` as in TRAININGS."""
        name = runs.content_hash([pool.content_hash(), recipe])
        name = f"original-{name}" if original else f"sound-{name}"
        self.made[name], TRAININGS[name] = pool, (name, recipe)
        if held is not None and not original:
            self.held_out[name] = held
        return name

    def learn_mpc(self, **recipe: Any) -> str:
        """The pool of sound MPC, by another recipe."""
        return self.learn(self.pool("mpc"), self.validation, **recipe)

    def trained(self, name: str) -> Trained:  # type: ignore[override]
        while name not in self.done:
            try:
                trained = super().trained(name)
            except runs.Busy:  # another process trains the same
                time.sleep(2)
                continue
            if held := self.held_out.get(name):
                windows = batches.make_windows(held, trained.windows, like=trained.meta.settings.scale)
                run = replace(trained.run, held_out_loss=mean_loss(trained.network, windows))
                trained = replace(trained, run=run)
            self.done[name] = trained
        return self.done[name]

    def with_plm(self, family: str) -> FaultBench:
        """The same with a random PLM of another family."""
        other = copy.copy(self)
        other.root, other.done = self.root / "families" / family, {}
        other.plm = other.root / "downloaded_plms" / family / "tiny"
        if not other.plm.is_dir():
            write_plm(other.plm, family, layers=2, hidden=HIDDEN)
        return other

    def elsewhere(self, folder: Path) -> FaultBench:
        """The same with its data copied to `folder`, to be changed there."""
        other = copy.copy(self)
        other.data = shutil.copytree(self.data, folder)
        other.registry = Registry(other.data)
        return other
