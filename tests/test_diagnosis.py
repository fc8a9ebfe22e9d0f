"""Findings: each rule fires on what it is made for, and is silent on a healthy run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from netllm_lib.abr import report
from netllm_lib.abr.diagnose import CHANCE, Evidence, behaviour_entropy, diagnose
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Observation, Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.simple import Constant
from netllm_lib.abr.pool import ExperiencePool, generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry

REGISTRY = Registry(SAMPLE)
TRACES, VIDEO = REGISTRY.trace_set("sample-test"), REGISTRY.video("sample")
EPISODES = sound_episodes(TRACES)
HEALTHY = {
    "steps": 600,
    "warmup_steps": 60,
    "lr": 1e-3,
    "lr_peak": 1e-3,
    "final_loss": 0.3,
    "crossing": 0,
    "windows": 600,
}


class Careless(Policy):
    """MPC that plays the top level now and then."""

    name = "careless"

    def __init__(self, share: float):
        self.inner, self.share = RobustMPC(VIDEO), share

    def reset(self, episodes) -> None:
        self.inner.reset(episodes)
        self.slips = np.random.default_rng(0).random((len(episodes), 48)) < self.share

    def act(self, observation: Observation) -> np.ndarray:
        return np.where(self.slips[observation.episode, observation.chunk - 1], 5, self.inner.act(observation))


def table(policy: Policy):
    return play(policy, Simulator(TRACES, VIDEO, EPISODES))


@pytest.fixture(scope="module")
def tables() -> dict:
    return {
        "mpc": table(RobustMPC(VIDEO)),
        "bba": table(BBA()),
        "mpc (original)": table(RobustMPC(VIDEO, MPCConfig.upstream())),
    }


@pytest.fixture(scope="module")
def pool() -> ExperiencePool:
    return generate_pool(RobustMPC(VIDEO), TRACES, VIDEO, EPISODES)


def found(evidence: Evidence) -> dict:
    return {finding.id: finding for finding in diagnose(evidence)}


def test_a_healthy_run_has_no_cause(tables: dict, pool: ExperiencePool) -> None:
    twin = {"llm": tables["mpc"]} | tables
    findings = diagnose(Evidence(twin, "llm", pool=pool, training=HEALTHY))
    assert not [f for f in findings if f.severity != "note"]


@pytest.mark.parametrize(
    ("changes", "identity", "severity"),
    [
        ({"lr_peak": 3.2e-4, "warmup_steps": 2000}, "warmup-too-long", "cause"),
        ({"final_loss": 1.7}, "undertrained", "cause"),
        ({"final_loss": 1.0}, "undertrained", "suspect"),
        ({"final_loss": math.nan}, "non-finite", "cause"),
        ({"crossing": 240}, "crossing-windows", "suspect"),
    ],
)
def test_training_findings(tables: dict, pool: ExperiencePool, changes: dict, identity: str, severity: str) -> None:
    findings = found(Evidence({"llm": tables["mpc"]} | tables, "llm", pool=pool, training=HEALTHY | changes))
    assert findings[identity].severity == severity
    assert next(iter(findings)) == identity


def test_reward_findings(tables: dict) -> None:
    careless = found(Evidence({"llm": table(Careless(0.05))} | tables, "llm"))
    assert careless["rare-bad-actions"].effect > 0.05
    assert careless["gap-rebuffering"].evidence["baseline"] == "mpc"
    stuck = found(Evidence({"llm": table(Constant(0))} | tables, "llm"))
    assert stuck["level-collapse"].severity == "cause"
    assert stuck["gap-quality"].effect > 0


def test_protocol_findings(tables: dict) -> None:
    clean = np.arange(len(TRACES)) < 10
    twin = {"llm": tables["mpc"]} | tables
    findings = found(Evidence(twin, "llm", handicapped=("mpc (original)",), clean=clean))
    assert findings["test-leakage"].evidence["overlapping"] == 20
    assert "mpc" in findings["too-few-traces"].evidence["undecided"]
    assert "test-leakage" not in found(Evidence(twin, "llm", clean=np.ones(30, bool)))


def test_behaviour_entropy_by_hand(pool: ExperiencePool) -> None:
    states = np.zeros((4, 6, 6), np.float32)
    states[:, 0, -1] = np.array([300, 300, 4300, 4300]) / 4300
    hand = ExperiencePool(states, np.array([0, 1, 5, 5]), np.arange(4.0), np.array([False, False, False, True]))
    marginal, conditional = behaviour_entropy(hand)
    assert marginal == pytest.approx(1.5 * math.log(2))  # shares 1/4, 1/4, 1/2
    assert conditional == pytest.approx(0.5 * math.log(2))  # a coin after 300 kbps, certain after 4300
    real = behaviour_entropy(pool)
    assert real[1] < real[0] < CHANCE


def test_summary_shows_table_and_top_findings(tables: dict) -> None:
    evidence = Evidence(
        {"llm": table(Constant(0))} | tables, "llm", setting={"traces": "sample-test", "video": "sample"}
    )
    league = report.league(evidence.tables)
    assert league.index[-1] in ("llm", "bba")
    assert (league["low"] <= league["reward"]).all()
    text = report.summary(league, diagnose(evidence), evidence.setting)
    assert "mpc (original)" in text
    assert "level-collapse" in text
    gaps = report.trace_gaps(evidence.tables["llm"], evidence.tables["mpc"])
    np.testing.assert_allclose(gaps["reward"], gaps[["quality", "rebuffering", "smoothness"]].sum(axis=1))
    assert report.timeline_policies(evidence.tables, "llm", "mpc")[:2] == ["llm", "mpc"]
    assert replace(evidence, run="mpc").run == "mpc"
