"""Fine-tuning: steps, rates, clipping, resuming to the bit, selection, and the original's own steps."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from conftest import GOLDEN, Golden
from llm_fixtures import batch_loss, tiny_network, toy_pool, train_on
from netllm_lib.abr.batches import WindowConfig, Windows, make_windows, pool_returns
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork, load_policy
from netllm_lib.abr.pool import load_pool
from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint
from netllm_lib.checkpoint import read_meta
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.runs import read_json
from netllm_lib.train import Plan, TrainConfig, TrainingRun, mean_loss, preflight

POOL = toy_pool(4)  # 12 windows of 20 steps
WINDOWS = make_windows(POOL, WindowConfig("stride", w=8, stride=16))
THEIRS = make_windows(POOL, WindowConfig.upstream(w=8, stride=5))
FAST = TrainConfig(epochs=2, batch=2, precision="float32")  # 16 windows, 8 steps an epoch


def weights(network: PolicyNetwork) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.trainable().items()}


def run(
    folder: Path, config: TrainConfig = FAST, network: PolicyNetwork | None = None, **options: Any
) -> tuple[PolicyNetwork, Any]:
    network = network or tiny_network(lora=False, layers=1)
    return network, train_on(network, options.pop("data", WINDOWS), config, folder, **options)


# --- plan -----------------------------------------------------------------------------------------------------------


def test_rates_of_the_sound_schedule() -> None:
    plan = Plan(TrainConfig(epochs=5, batch=8, warmup=0.1), samples=160)
    assert (plan.steps, plan.warmup) == (100, 10)
    rates = [plan.rate(step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert max(rates) == 1
    assert rates[54] == pytest.approx(0.05 + 0.95 / 2)
    assert rates[-1] == pytest.approx(0.05)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_rates_of_the_original() -> None:
    """A pool of 100 traces: 8 steps an epoch, 640 in all, against a warm-up of 2000."""
    plan = Plan(TrainConfig.upstream(), samples=235)
    assert (plan.steps, plan.short_steps, plan.warmup, plan.rate(0)) == (640, 80, 2000, 1 / 2000)
    assert plan.peak == pytest.approx(0.32)
    assert Plan(TrainConfig.upstream(warmup_steps=2), 235).rate(500) == 1


def test_preflight_tells_what_is_wrong() -> None:
    network = tiny_network(lora=False, layers=1)
    before = weights(network)
    flight = preflight(network, make_windows(toy_pool(20), WindowConfig.upstream()), TrainConfig.upstream())
    for part in [
        "never passes 8%",
        "span two episodes",
        "incomplete",
        "160 (3760 micro-batches)",
        "2000 steps = 1250%",
    ]:
        assert part in str(flight)
    assert (flight.seconds or 0) > 0
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in network.trainable().items())
    sound = preflight(network, make_windows(toy_pool(20)), TrainConfig(epochs=40, batch=8), measure=False)
    assert (sound.plan.peak, sound.crossing, sound.warnings, sound.seconds) == (1, 0, (), None)


@pytest.mark.parametrize(("config", "windows"), [
    (dataclasses.replace(FAST, accumulation=3), WINDOWS),
    (TrainConfig.upstream(epochs=2, accumulation=4, warmup_steps=20), THEIRS),
], ids=["sound", "upstream"])  # fmt: skip
def test_preflight_says_what_training_then_does(tmp_path: Path, config: TrainConfig, windows: Windows) -> None:
    network = tiny_network(lora=False, layers=1)
    flight = preflight(network, windows, config, measure=False)
    plan, result = flight.plan, run(tmp_path, config, network, data=windows)[1]
    history = result.history
    assert (result.steps, result.warmup_steps, result.lr_peak) == (plan.steps, plan.warmup, config.lr * plan.peak)
    assert result.facts["crossing"] == flight.crossing
    assert plan.micro_batches == len(history)
    assert plan.steps == history["step"].nunique() == read_meta(tmp_path / "final").step
    assert (config.lr * plan.peak, config.lr_around * plan.peak) == tuple(history[["lr", "lr_around"]].max())
    assert plan.short_steps == (history.groupby("step").size() < config.accumulation).sum()


# --- steps ----------------------------------------------------------------------------------------------------------


def test_it_learns_what_can_be_learnt(tmp_path: Path) -> None:
    config = TrainConfig(epochs=20, batch=4, precision="float32", lr_around=3e-3)
    network = PolicyNetwork(load_plm(PLMConfig("tiny-llama", rank=8, layers=1)), NetworkConfig(8, timestep_init=0.02))
    windows = make_windows(toy_pool(8, learnable=True), WindowConfig(w=12))
    held_out = make_windows(toy_pool(4, seed=5, learnable=True), windows.config, like=windows.scale)
    assert mean_loss(network, held_out) > 1.5
    result = train_on(network, windows, config, tmp_path, held_out=held_out)
    assert result.held_out_loss == mean_loss(network, held_out) < 1
    assert (result.final_loss or 9) < 0.5
    assert TrainingRun.read(tmp_path).held_out_loss == result.held_out_loss


def test_history_has_a_row_for_each_micro_batch(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    config = dataclasses.replace(FAST, accumulation=3)
    _, result = run(tmp_path, config, progress=lambda done, total, info: calls.append((done, total)))
    history = result.history
    assert history["step"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]
    assert history["epoch"].tolist() == [0] * 8 + [1] * 8
    assert history["grad_norm"].notna().tolist() == [False, False, True, False, False, True, False, True] * 2
    assert calls == [(step, 6) for step in range(1, 7)]
    assert result.best == result.final == tmp_path / "final"
    assert (history["lr_around"] / history["lr"]).to_numpy() == pytest.approx(10)


def test_accumulating_equals_one_large_batch(tmp_path: Path) -> None:
    """With clipping once a step; with the original's clipping at each micro-batch it does not."""
    network = tiny_network(lora=False, layers=1, lora_dropout=0.0)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    small = dataclasses.replace(FAST, epochs=1, batch=1, accumulation=4, order=(3, 1, 2, 0), max_grad_norm=1e-3)
    configs = {"large": dataclasses.replace(small, batch=4, accumulation=1), "step": small}
    configs |= {"micro": dataclasses.replace(small, clip="micro"), "none": dataclasses.replace(small, clip="none")}
    ends, norms = {}, {}
    for name, config in configs.items():
        network.load_state_dict(start)
        _, result = run(tmp_path / name, config, network)
        ends[name] = torch.cat([p.grad.flatten() for p in network.trainable().values() if p.grad is not None])
        norms[name] = result.history["grad_norm"]
        assert result.history["clipped"].any() == (name != "none")
    assert float(ends["large"].norm()) == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(ends["step"], ends["large"], atol=1e-7, rtol=1e-3)
    assert torch.nn.functional.cosine_similarity(ends["micro"], ends["large"], dim=0) < 0.98
    assert norms["micro"].notna().all()
    assert float(ends["none"].norm()) > 0.01


def test_incomplete_last_step(tmp_path: Path) -> None:
    """A step of 1 out of 4 micro-batches: its whole mean, or as in the original a quarter of it."""
    norms, one = {}, dataclasses.replace(FAST, epochs=1, batch=1, accumulation=4, order=(5,))
    for last_group in ("mean", "upstream"):
        config = dataclasses.replace(one, last_group=last_group)
        _, result = run(tmp_path / last_group, config, tiny_network(lora=False, layers=1, lora_dropout=0.0))
        norms[last_group] = result.history["grad_norm"][0]
    assert norms["mean"] == pytest.approx(4 * norms["upstream"], rel=1e-4)


def test_padding_does_not_count() -> None:
    network, pool = tiny_network(), toy_pool(2, length=5)
    padded, whole = (make_windows(pool, WindowConfig(w=w)).batch([0, 1]) for w in (8, 5))
    torch.testing.assert_close(batch_loss(network, padded), batch_loss(network, whole))


def test_orders() -> None:
    seeded = Plan(FAST, 16)
    assert sorted(seeded.order_of(0)) == list(range(16))
    assert seeded.order_of(0).tolist() == seeded.order_of(0).tolist() != seeded.order_of(1).tolist()
    theirs = Plan(TrainConfig.upstream(), 16)
    torch.manual_seed(3)
    first = theirs.order_of(0)
    torch.manual_seed(3)
    loader: Any = torch.utils.data.DataLoader(range(16), batch_size=1, shuffle=True)  # type: ignore[arg-type]
    assert first.tolist() == [int(x) for x in loader]
    with pytest.raises(ValueError, match="from 0 to 15"):
        Plan(dataclasses.replace(FAST, order=(16,)), 16)


# --- resuming, see also test_resume -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def die_at(step: int) -> Any:
    def progress(done: int, *_: Any) -> None:
        if done == step:
            raise Killed

    return progress


def test_a_broken_run_of_the_original_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Its order comes from PyTorch's random stream, which has to go on as well."""
    config = TrainConfig.upstream(epochs=2, accumulation=4, warmup_steps=2, validate_epochs=1)
    options: dict[str, Any] = {"data": THEIRS, "validate": lambda net: float(net.action_head.weight.sum().detach())}
    torch.manual_seed(0)
    straight, expected = run(tmp_path / "straight", config, **options)
    torch.manual_seed(0)
    for step in (4, 11):  # before there is a resume point in the first epoch, and after
        with pytest.raises(Killed):
            run(tmp_path / "killed", config, progress=die_at(step), **options)
        torch.manual_seed(99)
    resumed, result = run(tmp_path / "killed", config, **options)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(straight).items())
    for ours, theirs in ((result.history, expected.history), (result.evaluations, expected.evaluations)):
        pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"))


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    network, result = run(tmp_path)
    fresh = tiny_network(lora=False, layers=1)
    _, again = run(tmp_path, network=fresh, progress=lambda *_: pytest.fail("it trains again"))
    assert all(torch.equal(value, weights(fresh)[name]) for name, value in weights(network).items())
    pd.testing.assert_frame_equal(again.history, result.history)
    assert again.seconds == result.seconds


def results(folder: Path) -> list[Any]:
    """Everything that comes of a training when it is called again."""
    network, result = run(folder, validate=lambda net: float(net.action_head.weight.sum().detach()))
    best, meta = load_policy(result.best)
    figures = dataclasses.replace(result, history=None, evaluations=None, final=None, best=None, seconds=None)
    tables = [result.history.drop(columns="seconds").to_csv(), result.evaluations.drop(columns="seconds").to_csv()]
    return [figures, meta, *tables, *(p.tolist() for net in (network, best) for p in weights(net).values())]


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("times", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_damage_is_noticed_or_changes_nothing(tmp_path: Path, killed: bool, times: int) -> None:
    """Flipped bits and cut ends in every file that is read back: another result never comes of it."""
    rng, whole, broken = np.random.default_rng(8), tmp_path / "whole", tmp_path / "broken"
    expected = results(tmp_path / "straight")
    if killed:
        with pytest.raises(Killed):
            run(whole, progress=die_at(9), validate=lambda net: float(net.action_head.weight.sum().detach()))
    else:
        results(whole)
    left = [path for path in sorted(whole.rglob("*")) if path.is_file() and path.parent.name != "tensorboard"]
    files = [path for path in left if path.name == "state.pt"] if killed else left
    noticed = 0
    for path in files * times:
        data, name = bytearray(path.read_bytes()), path.relative_to(whole)
        if rng.random() < 0.9:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            del data[rng.integers(len(data)) :]
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        (broken / name).write_bytes(data)
        try:
            assert results(broken) == expected, name
        except (ValueError, OSError) as error:
            said = str(error)
        else:
            continue
        assert re.search(f"{broken / name}.*delete .* (to begin this training anew|and make it again)", said)
        noticed += 1
    assert noticed > 0.8 * len(files) * times > 2


def test_another_run_in_the_folder(tmp_path: Path) -> None:
    run(tmp_path)
    networks: list[dict[str, Any]] = [{"layers": 2}, {"rank": 4}, {"lora_alpha": 8}, {"lora_dropout": 0.2}]
    others: list[dict[str, Any]] = [{"network": tiny_network(lora=False, **{"layers": 1, **plm})} for plm in networks]
    for change in [{"config": dataclasses.replace(FAST, lr=2e-3)}, *others]:
        with pytest.raises(ValueError, match="another configuration"):
            run(tmp_path, **change)


def test_training_does_not_disturb_the_random_stream(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    run(tmp_path)
    assert torch.equal(torch.rand(1), expected)


# --- selection ------------------------------------------------------------------------------------------------------


def test_best_checkpoint_is_that_of_the_best_score(tmp_path: Path) -> None:
    scores, kept = iter([1.0, 3.0, 2.0]), []

    def validate(network: PolicyNetwork) -> float:
        assert not network.training
        kept.append(weights(network))
        return next(scores)

    network, result = run(tmp_path, dataclasses.replace(FAST, epochs=5, validate_epochs=2), validate=validate)
    assert result.evaluations["epoch"].tolist() == [2, 4, 5]
    assert (read_meta(result.best).step, read_meta(result.best).score) == (32, 3.0)
    best, _ = load_policy(result.best)
    final, _ = load_policy(result.final)
    assert all(torch.equal(value, weights(best)[name]) for name, value in kept[1].items())
    assert all(torch.equal(value, weights(final)[name]) for name, value in weights(network).items())


def test_validations_come_when_the_original_has_them() -> None:
    """After epochs 0, k, 2k, …: after the first always, after the last only by chance."""
    for epochs, every, expected in ((4, 2, [1, 3]), (3, 2, [1, 3]), (2, 5, [1])):
        config = TrainConfig(epochs, validate_epochs=every, validate_when="upstream")
        assert [epoch for epoch in range(1, epochs + 1) if config.validates_after(epoch)] == expected
    assert not TrainConfig(epochs=4, validate_epochs=2).validates_after(1)


LOGS = sorted(p.relative_to(GOLDEN) for p in GOLDEN.glob("upstream_run/*/ft_plm/*/*/*console.log")) or [Path("absent")]


@pytest.mark.golden
@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.parts[1] if len(path.parts) > 1 else "absent")
def test_validations_of_a_recorded_run(golden: Golden, path: Path) -> None:
    """The epochs after which its log has an evaluation are those of the preset, and of no other spacing."""
    sections = re.split(r"=+ Training Iteration #(\d+) =+", golden(path).read_text())[1:]
    numbers = [int(number) for number in sections[::2]]
    evaluated = [number + 1 for number, text in zip(numbers, sections[1::2], strict=True) if "time/evaluation" in text]
    assert numbers == list(range(len(numbers)))
    fitting = [
        every
        for every in range(1, len(numbers) + 1)
        for config in [TrainConfig.upstream(epochs=len(numbers), validate_epochs=every)]
        if [epoch for epoch in range(1, len(numbers) + 1) if config.validates_after(epoch)] == evaluated
    ]
    assert fitting == [evaluated[1] - evaluated[0]]
    assert evaluated[0] == 1


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    short = PolicyNetwork(load_plm(PLMConfig("tiny-llama", rank=0)), NetworkConfig(8, max_timestep=10))
    with pytest.raises(ValueError, match="max_timestep=46"):
        train_on(short, WINDOWS, FAST, tmp_path)
    broken = tiny_network()
    with torch.no_grad():
        broken.action_head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="loss is nan"):
        train_on(broken, WINDOWS, FAST, tmp_path / "nan")
    impossible: list[dict[str, Any]] = [{"epochs": 0}, {"batch": 0}, {"accumulation": 0}, {"validate_epochs": 0}]
    for change in impossible:
        with pytest.raises(ValueError, match="at least 1"):
            dataclasses.replace(FAST, **change)


# --- the original ---------------------------------------------------------------------------------------------------

TRAINED = sorted(p.relative_to(GOLDEN) for p in GOLDEN.glob("plm/*/train_layer*.npz")) or [Path("absent")]


@pytest.mark.golden
@pytest.mark.parametrize("path", TRAINED, ids=str)
def test_steps_of_the_original(golden: Golden, tmp_path: Path, path: Path) -> None:
    """Losses, gradient norms and rates of 12 micro-batches, and the weights after three optimizer steps."""
    recorded, folder = np.load(golden(path)), golden(path).parent
    meta, layer = read_json(folder / "meta.json"), int(path.stem.removeprefix("train_layer"))
    pool = load_pool(golden("plm", "mpc100_exp_pool.pkl"))
    _, scale = pool_returns(pool, scale=meta["scale"])
    plm = PLMConfig.upstream(str(folder / "plm"), layers=None if layer < 0 else layer + 1, plm_dropout=0.0)
    network, _ = load_upstream_checkpoint(folder / "adapter", plm, scale, meta["w"])
    for module in network.modules():  # the recorded run had LoRA's dropout off, too
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fields = ["accumulation", "lr", "lr_around", "warmup_steps", "weight_decay", "max_grad_norm"]
    recorded_as = ["accum", "lr_base", "lr_base", "warmup", "weight_decay", "clip"]
    numbers = {field: recorded[key].item() for field, key in zip(fields, recorded_as, strict=True)}
    config = TrainConfig.upstream(epochs=1, order=tuple(recorded["order"].tolist()), **numbers)
    windows = make_windows(pool, WindowConfig.upstream(w=meta["w"], scale=meta["scale"]))
    np.testing.assert_array_equal(windows.starts[recorded["order"]], recorded["window_start"])
    history = train_on(network, windows, config, tmp_path).history
    np.testing.assert_allclose(history["loss"], recorded["loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(history["grad_norm"], recorded["grad_norm_before_clip"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(history["lr"][:: config.accumulation], recorded["lr"], rtol=1e-12)
    ours = {name.removeprefix("plm.base_model.model."): p.detach() for name, p in network.trainable().items()}
    compared = 0
    for key in recorded.files:
        name = re.sub("^(action_head|embed_return|embed_timestep)_(weight|bias)$", r"\1.\2", key.removeprefix("lora:"))
        if name in ours:
            np.testing.assert_allclose(ours[name], recorded[key], atol=1e-5, rtol=0, err_msg=key)
            compared += 1
    assert compared == 4 + sum("lora_" in name for name in ours)
