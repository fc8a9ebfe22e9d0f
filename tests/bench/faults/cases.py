"""Cases: a run with a fault as a user would have it on disk, and apart from it what is true of it."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llm_fixtures import write_plm
from netllm_lib import runs
from netllm_lib.abr import batches
from netllm_lib.abr.diagnosis import paired
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.pool import ExperiencePool, generate_pool
from netllm_lib.abr.synthetic import generate_traces
from netllm_lib.abr.traces import Registry
from netllm_lib.stats import Interval
from netllm_lib.train import mean_loss
from planted_plants import Plant
from planted_runs import HIDDEN, TRAININGS, Bench, Trained

GRADES = ("mild", "medium", "strong")
COSTS = 0.05  # mean reward: a fault that costs less is harmless

IDS: dict[str, tuple[str, ...]] = {
    # what a case may be called: synonyms that count as the same. Those of today's diagnosis first, then proposed ones.
    "label-shift": ("shifted-labels", "levels-reversed"),
    "adapter-not-applied": ("adapter-scaled",),
    "wrong-checkpoint": ("other-weights", "damaged-weights", "not-reproduced"),
    "sampling": ("temperature",),
    "dropout-on": (),
    "context-leak": (),
    "window-mismatch": (),
    "target-return": ("target-not-updated",),
    "wrong-pool": (),
    "warmup-too-long": (),
    "diverged": ("loss-rises",),
    "learning-rate": (),
    "undertrained": (),
    "weak-teacher": (),
    "pool-too-small": (),
    "video-shift": (),
    "trace-shift": (),
    "level-collapse": (),
    "rare-bad-actions": (),
    "protocol-mismatch": (),
    "broken-pool": ("pool-inconsistent", "pool-units", "pool-history", "pool-sizes", "other-ladder"),
    "reward-mismatch": ("pool-rewards", "broken-rewards"),
    "overfit": ("overfitting", "one-trace", "repeated-episodes"),
    "broken-traces": ("damaged-traces", "trace-units", "other-trace-files"),
    "return-scale": ("gamma",),
    "weight-decay": (),
    "other-lora-alpha": ("lora-alpha",),
    "other-plm": ("wrong-plm", "another-plm"),
    "wrong-layer": ("early-stop",),
    "level-mapping": ("levels-mapped",),
    "test-states": ("test-units", "broken-test-states"),
    "untrained": ("untrained-network",),
    "cut-log": ("log-cut", "stopped-early"),
    "printed-mean": ("log-mean-mismatch",),
    "other-traces": ("wrong-traces", "results-of-other-traces"),
    "mixed-results": ("two-runs",),
    "plays-bba": ("bba",),
    "plays-constant": ("constant", "constant-level"),
    "plays-last-level": ("copycat",),
    "plays-random": ("random", "random-levels"),
    "late": ("late-reaction", "lagging"),
}


def accepted(truth: Sequence[str]) -> set[str]:
    """All ids by which a diagnosis may call what is true."""
    return {name for id in truth for name in (id, *IDS[id])}


@dataclass
class Draw:
    """How severe a fault is: every number is drawn from the range of the grade, and remembered."""

    grade: int  # 0: mild, 1: medium, 2: strong
    rng: np.random.Generator
    drawn: list[float] = field(default_factory=list)

    def between(self, *ranges: tuple[float, float]) -> float:
        """A number of the grade's range, of which there are three; uniform in its logarithm if it spans more than a factor 3."""
        low, high = ranges[self.grade]
        wide = low > 0 and high > 3 * low
        value = float(np.exp(self.rng.uniform(np.log(low), np.log(high))) if wide else self.rng.uniform(low, high))
        self.drawn.append(value)
        return value

    def one_of(self, *lists: Sequence[Any]) -> Any:
        """One of the grade's values, of which there are three lists."""
        values = lists[self.grade]
        number = int(self.rng.integers(len(values)))
        self.drawn.append(number)
        return values[number]

    def count(self, *ranges: tuple[float, float]) -> int:
        return round(self.between(*ranges))


@dataclass(frozen=True)
class Operator:
    """One way of breaking a run, or of having one that is as it should be."""

    name: str
    group: str  # what is broken: pool, training, checkpoint, test, logs, results; or healthy
    truth: tuple[str, ...]  # ids, see IDS
    make: Callable[[FaultBench, Draw], Plant]
    measurement: bool  # the policy is as it was, only what is said of it is wrong

    @property
    def what(self) -> str:
        return (self.make.__doc__ or "").strip().rstrip(".")


OPERATORS: dict[str, Operator] = {}
Make = TypeVar("Make", bound=Callable[["FaultBench", Draw], Plant])


def operator(group: str, truth: str = "", measurement: bool = False) -> Callable[[Make], Make]:
    """Register a function as an operator; its name and its docstring are those of the operator."""

    def register(make: Make) -> Make:
        name = make.__name__.replace("_", "-")
        OPERATORS[name] = Operator(name, group, tuple(truth.split()), make, measurement)
        return make

    return register


@dataclass(frozen=True)
class Case:
    """A run on disk, and what is true of it."""

    operator: str
    severity: str
    seed: int
    folders: tuple[Path, ...]  # what the diagnoser is given
    options: dict[str, str]  # and of its options: data, pool, plm
    truth: tuple[str, ...]
    effect: Interval | None  # healthy twin − run on the same traces; None for a healthy run
    measurement: bool
    drawn: tuple[float, ...]  # how severe

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

    def save(self, path: Path) -> None:
        runs.write_json(path, runs.plain(self))

    @classmethod
    def read(cls, path: Path) -> Case:
        values = json.loads(path.read_text())
        effect = values["effect"] and Interval(*values["effect"])
        folders = tuple(Path(folder) for folder in values["folders"])
        lists = {"truth": tuple(values["truth"]), "drawn": tuple(values["drawn"])}
        return cls(**values | lists | {"effect": effect, "folders": folders})


def generate(name: str, severity: str, seed: int, folder: Path, bench: FaultBench | None = None) -> Case:
    """Write the run below `folder`, which then holds what a user would have and nothing of the truth."""
    bench = bench or shared_bench()
    about, draw = OPERATORS[name], draw_of(name, severity, seed)
    planted = about.make(bench, draw)(bench, folder)
    options = {"data": str(bench.data)} | {key: str(value) for key, value in planted.options.items()}
    table, twin, effect = planted.table, planted.twin, None
    if table is not None and twin is not None and about.group != "healthy":
        effect = paired(twin, table)
    return Case(
        name, severity, seed, planted.folders, options, about.truth, effect, about.measurement, tuple(draw.drawn)
    )


def draw_of(name: str, severity: str, seed: int) -> Draw:
    grade = GRADES.index(severity)
    return Draw(grade, np.random.default_rng([seed, grade, zlib.crc32(name.encode())]))


def drawn_severity(name: str, seed: int) -> str:
    """The severity that a seed gives an operator if none is asked for."""
    return GRADES[np.random.default_rng([seed, zlib.crc32(name.encode())]).integers(len(GRADES))]


# --- what the runs are made of ------------------------------------------------------------------------------------------


class FaultBench(Bench):
    """The bench of the planted faults, on which any pool can be learnt by any recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, ExperiencePool] = {}
        self.held_out: dict[str, ExperiencePool] = {}  # by training: validation pools
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
        if held is not None:
            self.held_out[name] = held
        return name

    def learn_mpc(self, **recipe: Any) -> str:
        """The pool of sound MPC, by another recipe."""
        return self.learn(self.pool("mpc"), self.validation, **recipe)

    def learn_changed(self, change: Callable[[ExperiencePool], ExperiencePool], **recipe: Any) -> str:
        """A changed pool of sound MPC; the validation pool came the same way."""
        return self.learn(change(self.pool("mpc")), change(self.validation), **{"epochs": 3} | recipe)

    def trained(self, name: str) -> Trained:  # type: ignore[override]
        if name not in self.done:
            trained = self._trained(name)
            held = self.validation if name == "healthy" else self.held_out.get(name)
            if held is not None and not name.startswith("original"):
                windows = batches.make_windows(held, trained.windows, like=trained.meta.settings.scale)
                run = replace(trained.run, held_out_loss=mean_loss(trained.network, windows))
                trained = replace(trained, run=run)
            self.done[name] = trained
        return self.done[name]

    def _trained(self, name: str) -> Trained:
        while True:
            try:
                return super().trained(name)
            except runs.Busy:  # another process trains the same
                time.sleep(2)

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
        shutil.copytree(self.data, folder)
        other = copy.copy(self)
        other.data, other.registry = folder, Registry(folder)
        return other


@functools.cache
def shared_bench() -> FaultBench:
    return FaultBench()
