"""Findings: each rule fires on what it is made for, and is silent on a healthy run."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis import (
    CHANCE,
    Effect,
    Evidence,
    Finding,
    Recipe,
    behaviour_entropy,
    diagnose,
    regret,
    with_baselines,
)
from netllm_lib.abr.episodes import sound_episodes, upstream_episodes
from netllm_lib.abr.evaluate import Test
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.simple import Constant
from netllm_lib.abr.pool import ExperiencePool, generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.findings import FINDINGS, Diagnosis, Rule, Verdict, judged
from netllm_lib.runs import read_json
from netllm_lib.training_run import TrainingRun
from planted_runs import Careless

REGISTRY = Registry(SAMPLE)
TRACES, VIDEO = REGISTRY.trace_set("sample-test"), REGISTRY.video("sample")
EPISODES = sound_episodes(TRACES)
TRAIN = REGISTRY.trace_set("sample-train")
HEALTHY = TrainingRun(
    steps=600, warmup_steps=60, lr=1e-3, lr_peak=1e-3, final_loss=0.3, samples=600, facts={"crossing": 0}
)
RISING = pd.DataFrame({"loss": np.r_[np.linspace(1.8, 0.9, 400), np.linspace(0.9, 2.5, 200)]})


def careless(share: float) -> Careless:
    """MPC that plays the top level now and then."""
    return Careless(RobustMPC(VIDEO), share, lowest=5)


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


def found(evidence: Evidence) -> dict[str, Finding]:
    return {finding.id: finding for finding in diagnose(evidence).findings}


def evidence_of(
    tables: dict, policy: Policy | str | pd.DataFrame, setting: dict[str, Any] | None = None, **given: Any
) -> Evidence:
    """A run beside the baselines; a name takes the baseline's own table as the run's."""
    played = tables[policy] if isinstance(policy, str) else table(policy) if isinstance(policy, Policy) else policy
    return Evidence(Test({"llm": played} | tables, "llm", setting or {}), **given)


def test_a_healthy_run_has_no_cause(tables: dict, pool: ExperiencePool) -> None:
    findings = found(evidence_of(tables, "mpc", pool=pool, training=HEALTHY))
    assert not [f.id for f in findings.values() if f.severity != "note"]


@pytest.mark.parametrize(
    ("changes", "identity"),
    [
        ({"lr_peak": 3.2e-4, "warmup_steps": 2000, "final_loss": 1.7}, "warmup-too-long"),
        ({"final_loss": 1.7}, "undertrained"),
        ({"lr": 1e-4, "lr_peak": 1e-4, "final_loss": 1.5}, "learning-rate"),
        ({"lr": 5e-2, "lr_peak": 5e-2, "final_loss": 1.9}, "learning-rate"),
        ({"final_loss": math.nan}, "non-finite"),
        ({"history": RISING, "final_loss": 2.5}, "diverged"),
    ],
)
def test_training_causes(tables: dict, pool: ExperiencePool, changes: dict, identity: str) -> None:
    training = replace(HEALTHY, **changes)
    poor = diagnose(evidence_of(tables, Constant(5), pool=pool, training=training))
    assert poor.first is not None
    assert (poor.first.id, poor.first.severity) == (identity, "cause")
    # the same mistake in a run that is as good as its baselines cost nothing; broken numbers stay broken
    fine = found(evidence_of(tables, "mpc", pool=pool, training=training))
    assert fine[identity].severity == ("cause" if identity == "non-finite" else "note")


def test_habits_of_a_learnt_policy_are_notes(tables: dict, pool: ExperiencePool) -> None:
    training = replace(HEALTHY, clip="micro", accumulation=32, clipped=0.9, facts={"crossing": 240})
    findings = found(evidence_of(tables, "mpc", pool=pool, training=training))
    assert findings["clipping"].severity == findings["crossing-windows"].severity == "note"
    unlearnt = replace(training, final_loss=1.7)
    findings = found(evidence_of(tables, Constant(5), pool=pool, training=unlearnt))
    assert findings["clipping"].severity == findings["crossing-windows"].severity == "suspect"


def test_reward_findings(tables: dict) -> None:
    slips = found(evidence_of(tables, careless(0.05)))
    assert slips["rare-bad-actions"].evidence["cost"] > 0.05
    assert slips["gap"].evidence["rebuffering"] > slips["gap"].evidence["quality"]
    stuck = found(evidence_of(tables, Constant(5)))
    assert stuck["level-collapse"].severity == "cause"
    assert stuck["level-collapse"].evidence["share"] == 1


@pytest.mark.parametrize(
    ("setting", "identity"),
    [
        ({"choose": "sample"}, "sampling"),
        ({"context": "leak"}, "context-leak"),
        ({"dropout": True}, "dropout-on"),
        ({"w": 10}, "window-mismatch"),
        ({"target_return_scale": 2.0}, "target-return"),
        ({"video": "video2"}, "video-shift"),
    ],
)
def test_settings_are_named_and_sound_ones_are_not(tables: dict, setting: dict, identity: str) -> None:
    recipe = Recipe(video="video1", w=20)
    sound = {"choose": "argmax", "context": "clear", "dropout": False, "w": 20, "target_return_scale": 1.0}
    sound["video"] = "video1"
    assert identity in found(evidence_of(tables, careless(0.05), sound | setting, recipe=recipe))
    assert identity not in found(evidence_of(tables, careless(0.05), sound, recipe=recipe))


def test_pool_findings(tables: dict, pool: ExperiencePool) -> None:
    slips = careless(0.1)
    shifted = replace(pool, actions=np.roll(pool.actions, 1))
    findings = diagnose(evidence_of(tables, slips, pool=shifted, training=HEALTHY)).findings
    assert (findings[0].id, findings[0].severity) == ("label-shift", "cause")
    assert findings[0].evidence["the_level_before"] > 0.9
    assert "label-shift" not in found(evidence_of(tables, slips, pool=pool, training=HEALTHY))
    few = ExperiencePool(pool.states[: 47 * 3], pool.actions[: 47 * 3], pool.rewards[: 47 * 3], pool.dones[: 47 * 3])
    assert found(evidence_of(tables, slips, pool=few, training=HEALTHY))["pool-too-small"].severity == "cause"
    poor = generate_pool(Constant(3), TRAIN, VIDEO, sound_episodes(TRAIN))
    learnt = replace(HEALTHY, final_loss=0.01)  # always the same level: nothing is easier
    weak = found(evidence_of(tables, slips, pool=poor, training=learnt, registry=REGISTRY))
    assert weak["weak-teacher"].severity == "cause"
    assert weak["pool-too-small"].evidence["absent"] == [0, 1, 2, 4, 5]
    slow = replace(pool, states=(pool.states * np.where(np.arange(6) == 2, 8, 1)[:, None]).astype(np.float32))
    assert found(evidence_of(tables, slips, pool=slow, training=HEALTHY))["trace-shift"].severity == "cause"


def test_video_shift_is_seen_in_the_states(tables: dict, pool: ExperiencePool) -> None:
    larger = replace(VIDEO, sizes_bytes=(VIDEO.sizes_bytes * 1.5).astype(np.int64))
    assert "video-shift" not in found(evidence_of(tables, careless(0.1), pool=pool, video=VIDEO))
    shift = found(evidence_of(tables, careless(0.1), pool=pool, video=larger))["video-shift"]
    assert shift.severity == "cause"
    assert shift.evidence["size_ratio"] == pytest.approx(1.5, rel=1e-2)


def test_protocol_findings(tables: dict) -> None:
    clean = np.arange(len(TRACES)) < 10
    findings = found(evidence_of(tables, "mpc", clean=clean))
    assert findings["test-leakage"].evidence["overlapping"] == 20
    assert "mpc" in findings["too-few-traces"].evidence["undecided"]
    assert "test-leakage" not in found(evidence_of(tables, "mpc", clean=np.ones(30, bool)))
    assert "protocol-mismatch" not in findings


@pytest.mark.parametrize("how", ["short", "twice", "half", "first level"])
def test_results_that_cannot_be_compared(tables: dict, how: str) -> None:
    played = table(careless(0.05))
    if how == "short":
        played = played[played["chunk"] < 47]
    elif how == "twice":
        played = pd.concat([played, played[played["trace"] == TRACES.names[0]]])
    elif how == "half":
        played = played[played["trace"].isin(TRACES.names[:15])]
    else:
        played = played.assign(level=np.where(played["chunk"] == 0, 2, played["level"]))
    assert found(evidence_of(tables, played, {"trace_num": 30}))["protocol-mismatch"].severity == "cause"


def test_a_switch_that_closes_the_gap_comes_first() -> None:
    effect = Effect(1.0, 0.5, 1.5, "by hand")
    note = Rule("note", "", "", lambda _: Verdict("note", ""))
    loss = Rule("loss", "", "", lambda _: Verdict("cause", ""))
    switch = Rule("switch", "", "", lambda closes: Verdict("cause", "", effect=effect, closes=closes))
    assert [f.id for f in judged([note, loss, switch], True)] == ["switch", "loss", "note"]
    assert [f.id for f in judged([note, loss, switch], False)] == ["loss", "switch", "note"]
    assert Effect(0.1, -0.1, 0.3, "").noise
    assert not effect.noise


def test_a_rule_speaks_or_is_silent(tmp_path: Path) -> None:
    """A symptom is a suspect where something else is a cause; what was found is written as JSON without NaN."""
    symptom = Rule(
        "low", "high", "raise it", lambda given: Verdict("cause", "low") if given < 9 else None, symptom=True
    )
    cause = Rule(
        "odd", "even", "halve it", lambda given: Verdict("cause", "odd", {"n": math.nan}) if given % 2 else None
    )
    assert judged((symptom, cause), 10) == ()
    assert [(f.id, f.severity) for f in judged((symptom, cause), 8)] == [("low", "cause")]
    both = judged((symptom, cause), 7)
    assert [(f.id, f.severity, f.fix) for f in both] == [("odd", "cause", "halve it"), ("low", "suspect", "raise it")]
    Diagnosis(both, measure="error").save(tmp_path)
    saved = read_json(tmp_path / FINDINGS)
    assert saved["measure"] == "error"
    said = {"id": "odd", "severity": "cause", "title": "odd", "evidence": {"n": None}, "rule": "even"}
    assert saved["findings"][0] == said | {"fix": "halve it", "effect": None}


def test_a_rule_that_fails_is_named_and_hides_no_other(tables: dict) -> None:
    odd: Any = object()  # no pool at all
    diagnosis = diagnose(evidence_of(tables, Constant(5), pool=odd))
    assert {"level-collapse", "gap"} <= {finding.id for finding in diagnosis.findings}
    assert any("weak-teacher" in line and "AttributeError" in line for line in diagnosis.missing)


def test_a_baseline_that_cannot_be_read_hides_no_other(tables: dict, tmp_path: Path) -> None:
    registry = Registry(shutil.copytree(SAMPLE, tmp_path / "data"))
    (tmp_path / "data" / "all_models" / "genet").mkdir(parents=True)
    for ending in ("index", "meta", "data-00000-of-00001"):
        (tmp_path / "data" / "all_models" / "genet" / f"nn_model_ep_1.ckpt.{ending}").write_text("broken")
    alone = Evidence(Test({"llm": tables["bba"]}, "llm"), registry=registry, traces=TRACES, video=VIDEO)
    found = with_baselines(alone)
    assert set(found.tables) == {"llm", "mpc", "bba", "mpc (original)"}
    assert any("Genet" in line for line in found.missing)


def test_a_run_below_sound_mpc_is_failing(tables: dict) -> None:
    """The original's MPC is not the measure where sound MPC has played the same traces."""
    below = evidence_of(tables, careless(0.01))
    assert below.reference == "mpc"
    assert below.failing
    broken = dict(below.tables) | {"mpc": tables["mpc"].assign(reward=np.nan)}
    assert replace(below, test=Test(broken, "llm")).reference == "mpc (original)"


def test_foreign_names_cannot_write_into_the_terminal() -> None:
    told = Verdict("cause", "tensor \x1b[2J <b>", {}, "look")
    text = str(Diagnosis((Finding(**vars(told), rule=Rule("odd", "", "", lambda _: None)),), missing=("\x07",)))
    assert "tensor  <b>" in text
    assert not {"\x1b", "\x07"} & set(text)


def test_behaviour_entropy_by_hand(pool: ExperiencePool) -> None:
    states = np.zeros((4, 6, 6), np.float32)
    states[:, 0, -1] = np.array([300, 300, 4300, 4300]) / 4300
    hand = ExperiencePool(states, np.array([0, 1, 5, 5]), np.arange(4.0), np.array([False, False, False, True]))
    marginal, conditional = behaviour_entropy(hand)
    assert marginal == pytest.approx(1.5 * math.log(2))  # shares 1/4, 1/4, 1/2
    assert conditional == pytest.approx(0.5 * math.log(2))  # a coin after 300 kbps, certain after 4300
    real = behaviour_entropy(pool)
    assert real[1] < real[0] < CHANCE


def test_several_seeds_are_pooled(tables: dict) -> None:
    runs = [table(careless(share)) for share in (0.03, 0.05, 0.08)]
    seeds = tuple(Test({"llm": played}, "llm") for played in runs[1:])
    evidence = evidence_of(tables, runs[0], seeds=seeds)
    pooled = diagnose(evidence).over_seeds
    assert pooled is not None
    reference = qoe.summarise(tables["mpc"]).reward
    assert pooled.mean == pytest.approx(np.mean([qoe.summarise(run).reward for run in runs]) - reference)
    assert evidence.gap is not None
    assert pooled.high - pooled.low > 0
    assert diagnose(replace(evidence, seeds=())).over_seeds is None
    with pytest.raises(ValueError, match="other traces"):
        diagnose(replace(evidence, seeds=(Test({"llm": runs[1][runs[1]["trace"] != TRACES.names[0]]}, "llm"),)))


def test_regret_to_the_optimum(tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path))
    few = TRACES.subset(range(4))
    episodes = upstream_episodes(few, trace_num=-1, clock="episode")
    played = play(RobustMPC(VIDEO), Simulator(few, VIDEO, episodes))
    evidence = Evidence(Test({"mpc": played}, "mpc", {"fixed": True}), traces=few, video=VIDEO)
    below = regret(evidence)
    assert below is not None
    assert below.high < 0, "nobody is above the optimum"
    assert regret(replace(evidence, traces=None)) is None
