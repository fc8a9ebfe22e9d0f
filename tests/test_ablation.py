"""Replaying a run with one switch turned at a time, and finding out how a test was really played."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from llm_fixtures import stir, tiny_network
from netllm_lib.abr import qoe
from netllm_lib.abr.batches import pool_returns
from netllm_lib.abr.diagnosis import RULES, Evidence, Subject, diagnose
from netllm_lib.abr.diagnosis import replay as ablation
from netllm_lib.abr.diagnosis.evidence import SWITCHES
from netllm_lib.abr.diagnosis.replay import ALL_SOUND, AS_RUN, RETRAINED
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.evaluate import Test
from netllm_lib.abr.model import PolicyNetwork, PolicySettings
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.llm import EvalConfig
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.pool import ExperiencePool, generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.checkpoint import describe
from netllm_lib.training_run import TrainingRun

REGISTRY = Registry(SAMPLE)
VIDEO = REGISTRY.video("sample")
TRACES = REGISTRY.trace_set("sample-test").subset(range(9))
ROLLING: dict[str, Any] = {"context_window": "rolling", "merge_lora": False}


@pytest.fixture(autouse=True)
def _few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "WINDOWS", (10,))
    monkeypatch.setattr(ablation, "TARGET_SCALES", (10.0,))
    monkeypatch.setattr(ablation, "CHECK_TRACES", 2)


@pytest.fixture(scope="module")
def pool() -> ExperiencePool:
    train = REGISTRY.trace_set("sample-train").subset(range(12))
    episodes = upstream_episodes(train, trace_num=-1, pool=True)
    return generate_pool(RobustMPC(VIDEO, MPCConfig.upstream(pool=True)), train, VIDEO, episodes)


@pytest.fixture(scope="module")
def subject(pool: ExperiencePool) -> Subject:
    network = tiny_network(layers=1)
    with torch.no_grad():  # as if trained: probabilities that differ
        network.action_head.weight.mul_(6)
    return Subject(
        network, describe(network, PolicySettings(4, pool_returns(pool)[1])), EvalConfig(choose="sample", **ROLLING)
    )


def simulator(count: int = len(TRACES)) -> Simulator:
    return Simulator(TRACES, VIDEO, upstream_episodes(TRACES, trace_num=-1, clock="episode").rows(range(count)))


def recorded(subject: Subject, told: EvalConfig | None = None, **given: Any) -> Evidence:
    """The subject's own test beside MPC, and what the records tell of it."""
    tables = {
        "llm": ablation.replay(subject, simulator()),
        "mpc (original)": play(RobustMPC(VIDEO, MPCConfig.upstream()), simulator()),
    }
    said = replace(subject, config=told or subject.config, lora=True, played=None)
    test = Test(tables, "llm", {"fixed": True})
    return Evidence(test, subject=said, traces=TRACES, video=VIDEO, registry=REGISTRY, **given)


def found_by(evidence: Evidence, replayed: ablation.Ablation | None) -> set[str]:
    """Ids of what the rules on weights say of a replay."""
    known = replace(evidence, replayed=replayed)
    return {finding.id for rule in RULES.values() if (finding := rule(known)) and finding.effect is not None}


def test_each_switch_alone_and_all_together(subject: Subject) -> None:
    off = replace(subject, config=replace(subject.config or EvalConfig(), w=2, target_return_scale=2.0))
    evidence = recorded(off)
    found = ablation.ablate(evidence, budget_s=120)
    assert found is not None
    assert found.same_levels == 1
    assert list(found.tables) == [AS_RUN, "sampling", "window-mismatch", "target-return", ALL_SOUND]
    pd.testing.assert_frame_equal(found.tables[AS_RUN], evidence.tables["llm"])
    by_hand = play(ablation.policy_of(off.sound("sampling", "window-mismatch", "target-return")), simulator())
    np.testing.assert_array_equal(found.tables[ALL_SOUND]["level"], by_hand["level"])
    waterfall = found.table()
    assert waterfall is not None
    rows = waterfall.set_index("switch")
    difference = qoe.summarise(found.tables["sampling"]).reward - qoe.summarise(found.tables[AS_RUN]).reward
    assert rows.loc["sampling", "effect"] == pytest.approx(difference)
    assert rows["effect"].isna().tolist() == [True, False, False, False, False]
    assert found_by(evidence, found) == {"sampling", "window-mismatch", "target-return"}


def test_nothing_to_replay(subject: Subject) -> None:
    evidence = recorded(subject)
    assert ablation.ablate(evidence, budget_s=0) is None
    assert ablation.ablate(replace(evidence, subject=None), budget_s=9) is None
    assert ablation.ablate(replace(evidence, traces=None), budget_s=9) is None
    hurried = ablation.ablate(evidence, budget_s=1e-3)
    assert hurried is not None
    assert "--budget" in hurried.too_short
    assert hurried.same_levels == 1, "what the first traces showed is not forgotten"
    assert hurried.table() is None
    assert any("--budget" in line for line in diagnose(evidence, budget_s=1e-3).missing)


@pytest.mark.parametrize(
    ("really", "identity"),
    [
        ({"lora": False}, "adapter-not-applied"),
        ({"config": EvalConfig(choose="sample", w=10, **ROLLING)}, "window-mismatch"),
        ({"config": EvalConfig(choose="sample", target_return_scale=10.0, **ROLLING)}, "target-return"),
    ],
)
def test_how_a_test_was_really_played(subject: Subject, really: dict[str, Any], identity: str) -> None:
    evidence = recorded(replace(subject, **really), told=subject.config)
    found = ablation.ablate(evidence, budget_s=120)
    assert found is not None
    assert found.same_levels == 1
    assert identity in found.subject.off
    assert identity in found_by(evidence, found)


def test_a_test_of_other_weights_is_identified(subject: Subject) -> None:
    other = tiny_network(layers=1)
    with torch.no_grad():
        other.action_head.weight.mul_(-6)
    evidence = recorded(replace(subject, network=other), told=subject.config)
    evidence = replace(evidence, subject=subject, other_weights={"checkpoint/3": lambda: other})
    found = ablation.ablate(evidence, budget_s=120)
    assert found is not None
    assert found.subject.played is other
    assert "wrong-checkpoint" in found.subject.off
    # without that checkpoint at hand it is said that these weights do not give these results
    unknown = replace(evidence, other_weights={})
    found = ablation.ablate(unknown, budget_s=120)
    assert found is not None
    assert found.same_levels is not None
    assert found.same_levels < 0.7
    assert found.unexplained
    assert found_by(unknown, found) & {"wrong-checkpoint", "dropout-on"}


def test_all_traces_are_compared_with_the_record(subject: Subject) -> None:
    """A record that only begins like the test of these weights does not prove anything of their switches."""
    evidence = recorded(subject)
    own, other = evidence.tables["llm"], ablation.replay(subject.sound("sampling"), simulator())
    half = pd.concat([own[own["trace_index"] < 4], other[other["trace_index"] >= 4]], ignore_index=True)
    mixed = replace(evidence, test=Test(dict(evidence.tables) | {"llm": half}, "llm", evidence.setting))
    found = ablation.ablate(mixed, budget_s=120)
    assert found is not None
    assert found.unexplained
    pd.testing.assert_frame_equal(found.tables[AS_RUN], own)


def test_what_was_found_before_the_time_was_over_is_said(subject: Subject) -> None:
    evidence = recorded(replace(subject, lora=False), told=subject.config)
    found = ablation.Ablation(replace(subject, lora=False), {AS_RUN: evidence.tables["llm"]}, 1.0, "time")
    verdict = RULES["adapter-not-applied"](replace(evidence, replayed=found))
    assert verdict is not None
    assert "the adapter applied" in verdict.title


def test_weights_that_tell_their_fault(subject: Subject, pool: ExperiencePool) -> None:
    learned = TrainingRun(final_loss=0.1)

    def first(network: PolicyNetwork, training: TrainingRun | None = None) -> str:
        finding = diagnose(Evidence(subject=replace(subject, network=network), pool=pool, training=training)).first
        assert finding is not None
        return finding.id

    assert first(tiny_network(lora=False, layers=1), learned) == "adapter-not-applied"
    broken = stir(tiny_network(layers=1))
    with torch.no_grad():
        broken.action_head.bias[0] = float("nan")
    assert first(broken) == "non-finite"
    assert first(subject.network, learned) == "wrong-checkpoint", "untrained weights after a training that learnt"
    assert first(subject.network) == "undertrained", "their own loss stands for the one that nobody recorded"


def test_retraining_within_a_budget(subject: Subject, pool: ExperiencePool) -> None:
    evidence = recorded(subject, pool=pool)
    diagnosis = diagnose(evidence, budget_s=0, retrain_s=1)
    rows = diagnosis.waterfall.set_index("switch")
    assert list(rows.index) == [AS_RUN, RETRAINED]
    again, training = ablation.retrain(subject, pool, 0.1)
    assert training.steps
    assert again.meta.settings.pool_hash == pool.content_hash()
    assert again.network is not subject.network


def test_every_switch_is_a_finding_with_a_sound_value(subject: Subject) -> None:
    config = EvalConfig.upstream(in_training=True, w=3, target_return_scale=2.0)
    other = replace(subject.meta.settings.scale, max_reward=99.0)
    wrong = replace(subject, config=config, test_scale=other, lora=False, played=subject.network)
    assert wrong.off == list(SWITCHES)
    sound = wrong.sound(*SWITCHES)
    assert sound.off == []
    assert ablation.policy_of(sound).scale == subject.meta.settings.scale
    assert ablation.policy_of(wrong).scale == other
