"""Training curves: what TensorBoard and MLflow hold, also after breaks and kills, and that training never depends on them."""

from __future__ import annotations

import importlib.util
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from llm_fixtures import tiny_network, toy_pool, train_on
from netllm_lib import runs, tracking
from netllm_lib.abr.batches import WindowConfig, make_windows
from netllm_lib.train import TrainConfig

WINDOWS = make_windows(toy_pool(2), WindowConfig("stride", w=8, stride=16))
CONFIG = TrainConfig(epochs=2, batch=2, precision="float32", accumulation=2, checkpoint_steps=1)
STEPS = 4  # 2 an epoch

Curves = dict[str, list[tuple[int, float]]]


class Break(Exception):
    pass


def run(folder: Path, break_at: int = 0, **options: Any) -> Any:
    """Train; with `break_at`, up to an exception after that step and before its resume point."""

    def progress(done: int, *_: Any) -> None:
        if done == break_at:
            raise Break

    network = tiny_network(rank=4, lora=False, layers=1)
    score = lambda net: float(next(iter(net.trainable().values())).detach().abs().sum())  # noqa: E731
    return train_on(network, WINDOWS, CONFIG, folder, validate=score, progress=progress, **options)


def breaks(folder: Path, step: int, **options: Any) -> None:
    with pytest.raises(Break):
        run(folder, step, **options)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


def curves(folder: Path) -> Curves:
    """Curves as TensorBoard shows them, without those of time."""
    found = events(folder)
    names = [name for name in found.Tags()["scalars"] if not name.endswith("seconds")]
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in names}


def assert_curves_of(result: Any, found: Curves) -> None:
    """One point a step, counted from 1, with the numbers of the tables; one point a validation."""
    steps, scores = result.history.groupby("step"), result.evaluations
    expected = {"train/loss": steps["loss"].mean()}
    expected |= {f"train/{name}": steps[name].last() for name in ("grad_norm", "lr", "lr_around")}
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == list(range(1, STEPS + 1)), name
        np.testing.assert_allclose([value for _, value in found[name]], values, rtol=1e-6)
    assert [step for step, _ in found["validation/score"]] == scores["step"].tolist() == [2, 4]
    np.testing.assert_allclose([value for _, value in found["validation/score"]], scores["score"], rtol=1e-6)
    assert [step for step, _ in found["final/loss"]] == [STEPS]
    assert found["final/score"][0][1] == pytest.approx(result.best_score)


def test_curves_and_settings(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert_curves_of(result, curves(tmp_path))
    found = events(tmp_path)

    def hparams(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(found.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)

    session = hparams("session_start_info").session_start_info.hparams
    assert session["train.lr"].number_value == CONFIG.lr
    assert session["plm.source"].string_value == "tiny-llama"
    metrics = hparams("experiment").experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"final/loss", "final/score", "final/seconds"}


@pytest.mark.parametrize("steps", [[1], [2, 3, 3, 4]])
def test_a_resumed_run_continues_its_curves(tmp_path: Path, steps: list[int]) -> None:
    """A break leaves the point of a step that is taken again; for kills at any moment see test_resume."""
    for step in steps:
        breaks(tmp_path, step)
    assert_curves_of(run(tmp_path), curves(tmp_path))


def test_training_goes_on_when_its_curves_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tensorboard").touch()
    with pytest.warns(UserWarning, match="no curves are written"):
        off = run(tmp_path / "file")
    on = run(tmp_path / "on")
    pd.testing.assert_frame_equal(off.history.drop(columns="seconds"), on.history.drop(columns="seconds"))
    assert off.key == on.key

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking.EventFile, "log", full)
    with pytest.warns(UserWarning, match="EventFile writes no more curves.*No space left"):
        assert run(tmp_path / "full").final == tmp_path / "full" / "final"


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default store of a fresh reports folder; whoever reaches for the network is caught."""
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed: MLflow NOT tested")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it reaches for the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("it reaches for the network"))
    return tmp_path / "reports" / "mlflow"


def client(store: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=store.as_uri())


def kept_id(folder: Path) -> str:
    return str(runs.read_json(folder / "mlflow.json")["run_id"])


def mlflow_curves(store: Path, run_id: str) -> Curves:
    found = client(store)
    names = [name for name in found.get_run(run_id).data.metrics if not name.endswith("seconds")]
    return {name: [(m.step, m.value) for m in found.get_metric_history(run_id, name)] for name in names}


def test_mlflow_keeps_parameters_curves_and_tags(tmp_path: Path, store: Path) -> None:
    result = run(tmp_path / "training", track="mlflow")
    run_id = kept_id(tmp_path / "training")
    found = client(store).get_run(run_id)
    assert_curves_of(result, mlflow_curves(store, run_id))
    assert found.info.status == "FINISHED"
    assert client(store).get_experiment(found.info.experiment_id).name == "netllm"
    assert (found.data.params["train.lr"], found.data.params["plm.rank"]) == ("0.001", "4")
    assert found.data.tags["data"] == WINDOWS.key
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_resumed_run_is_the_same_run_of_mlflow(tmp_path: Path, store: Path) -> None:
    """Also where MLflow is asked for in the middle only: it gets what was before, once."""
    for step, track in ((2, ""), (3, "mlflow"), (4, "mlflow")):
        breaks(tmp_path / "broken", step, track=track)
    run_id = kept_id(tmp_path / "broken")
    assert client(store).get_run(run_id).info.status == "FAILED"
    result = run(tmp_path / "broken", track="mlflow")
    assert kept_id(tmp_path / "broken") == run_id
    assert_curves_of(result, mlflow_curves(store, run_id))
    assert client(store).get_run(run_id).info.status == "FINISHED"


def test_a_run_that_the_store_no_longer_has_begins_anew(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    breaks(tmp_path / "training", 3, track="mlflow")
    first = kept_id(tmp_path / "training")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine.as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "abr")
    result = run(tmp_path / "training", track="mlflow")
    assert kept_id(tmp_path / "training") != first
    assert_curves_of(result, mlflow_curves(mine, kept_id(tmp_path / "training")))
    assert client(mine).get_experiment_by_name("abr") is not None


def test_a_store_that_fails(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way it does not end the training; at the beginning it does."""

    def gone(self: tracking.MlflowRun) -> None:
        raise ConnectionError("the server is gone\nsecond line")

    with monkeypatch.context() as broken:
        broken.setattr(tracking.MlflowRun, "flush", gone)
        with pytest.warns(UserWarning, match="MlflowRun writes no more curves: the server is gone$"):
            result = run(tmp_path / "training", track="mlflow")
    assert_curves_of(result, curves(tmp_path / "training"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://user:secret@host/path")
    with pytest.raises(OSError, match=r"^MLflow cannot be used: ") as refused:
        run(tmp_path / "other", track="mlflow")
    assert "secret" not in str(refused.value)
    assert not (tmp_path / "other" / "training.json").exists()


def test_trackers_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='known is "mlflow"'):
        run(tmp_path / "training", track="wandb")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'netllm-companion\[mlflow\]'"):
        run(tmp_path / "training", track="mlflow")
    assert not (tmp_path / "training").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(tmp_path / "training")
