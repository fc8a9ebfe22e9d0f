"""Training curves: what TensorBoard and MLflow hold, also after breaks and kills, and that training never depends on them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from netllm_lib.abr.peers import Peers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from llm_fixtures import tiny_network, toy_pool
from netllm_lib import runs, tracking, train
from netllm_lib.abr import finetune
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.train import TrainConfig, TrainResult

POOL = toy_pool(2)
CONFIG = TrainConfig(
    epochs=2, batch=2, w=8, precision="float32", windows="stride", stride=16, accumulation=2, checkpoint_steps=1
)
STEPS = 4  # 2 an epoch

Curves = dict[str, list[tuple[int, float]]]


class Break(Exception):
    pass


def score(network: PolicyNetwork) -> float:
    return float(next(iter(network.trainable().values())).detach().abs().sum())


def run(folder: Path, break_at: int = 0, config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
    """Train; with `break_at`, up to an exception after that step and before its resume point."""

    def progress(done: int, *_: Any) -> None:
        if done == break_at:
            raise Break

    network = tiny_network(rank=4, lora=False, layers=1)
    return train.train(network, POOL, config, folder=folder, validate=score, progress=progress, **options)


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


def curves(folder: Path) -> Curves:
    """Curves as TensorBoard shows them, without those of time."""
    found = events(folder)
    names = [name for name in found.Tags()["scalars"] if not name.endswith("seconds")]
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in names}


def assert_curves_of(result: TrainResult, found: Curves) -> None:
    """One point a step, counted from 1, with the numbers of the tables; one point a validation."""
    steps = result.history.groupby("step")
    expected = {
        "train/loss": steps["loss"].mean(),
        "train/grad_norm": steps["grad_norm"].last(),
        "train/lr": steps["lr"].last(),
        "train/lr_around": steps["lr_around"].last(),
    }
    for name, values in expected.items():
        assert [step for step, _ in found[name]] == list(range(1, STEPS + 1)), name
        np.testing.assert_allclose([value for _, value in found[name]], values, rtol=1e-6)
    scores = result.evaluations
    assert [step for step, _ in found["validation/score"]] == scores["step"].tolist() == [2, 4]
    np.testing.assert_allclose([value for _, value in found["validation/score"]], scores["score"], rtol=1e-6)
    assert [step for step, _ in found["final/loss"]] == [STEPS]
    assert found["final/score"][0][1] == pytest.approx(scores["score"].max())


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_curves_and_settings(tmp_path: Path) -> None:
    result = run(tmp_path)
    found = events(tmp_path)
    assert_curves_of(result, curves(tmp_path))
    assert [event.step for event in found.Scalars("train/seconds")] == [1, 2, 3, 4]
    assert found.Scalars("final/seconds")[0].value == pytest.approx(result.seconds)
    session = hparams(found, "_hparams_/session_start_info").session_start_info.hparams
    assert session["train.lr"].number_value == CONFIG.lr
    assert session["plm.source"].string_value == "tiny-llama"
    metrics = hparams(found, "_hparams_/experiment").experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"final/loss", "final/score", "final/seconds"}
    assert "_hparams_/session_end_info" in found.summary_metadata


def hparams(found: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)


@pytest.mark.parametrize("breaks", [[1], [2], [2, 3, 3, 4]])
def test_a_resumed_run_continues_its_curves(tmp_path: Path, breaks: list[int]) -> None:
    """A break leaves the point of a step that is taken again: after step 2 a validation lies between them."""
    for step in breaks:
        with pytest.raises(Break):
            run(tmp_path / "broken", step)
    assert_curves_of(run(tmp_path / "broken"), curves(tmp_path / "broken"))
    run(tmp_path / "straight")
    assert curves(tmp_path / "broken") == curves(tmp_path / "straight")
    files = [path.name for path in (tmp_path / "broken" / "tensorboard").iterdir()]
    assert len(files) == len(breaks) + 1


def test_what_was_written_at_a_resume_point_comes_again(tmp_path: Path) -> None:
    """The point of the last step that is kept is among those that the new sitting hides: it must be there once."""
    settings: dict[str, Any] = {"parameters": {}, "tags": {}}
    first = tracking.start(tmp_path, **settings, done=0, earlier=[])
    for step in (1, 2, 3):
        first.log(step, {"a": step, "b": float("nan")})
    known = [tracking.Point(step, {"a": step}) for step in (1, 2)]
    with tracking.start(tmp_path, **settings, done=2, earlier=known) as second:
        second.log(3, {"a": 30})
    assert curves(tmp_path) == {"a": [(1, 1), (2, 2), (3, 30)]}
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()
    with tracking.start(tmp_path, **settings, done=2, earlier=known) as third:
        third.log(3, {"a": 31})
    assert curves(tmp_path) == {"a": [(1, 1), (2, 2), (3, 31)]}


def test_files_sort_by_sitting_whatever_the_clock_says(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    folder.mkdir()
    (folder / "events.out.tfevents.9999999990.000000").touch()
    for done in (0, 1):
        with tracking.start(tmp_path, parameters={}, tags={}, done=done, earlier=[]) as tracker:
            tracker.log(done + 1, {"a": 0.5})
    assert sorted(path.name for path in folder.iterdir())[1:] == [
        f"events.out.tfevents.9999999990.{number:06d}" for number in (1, 2)
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
import test_tracking
def kill(self, point, log=test_tracking.tracking.EventFile.log):
    log(self, point)
    if point.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
test_tracking.tracking.EventFile.log = kill
test_tracking.run(Path(sys.argv[1]))
"""


def test_a_killed_run_leaves_what_can_be_read(tmp_path: Path) -> None:
    """By SIGKILL after its third step; then with half a record at the end, as a power cut may leave it; then it goes on."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [step for step, _ in curves(tmp_path)["train/loss"]] == [1, 2, 3]
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert [step for step, _ in curves(tmp_path)["train/loss"]] == [1, 2]
    assert_curves_of(run(tmp_path), curves(tmp_path))


def test_without_tensorboard_a_line_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    monkeypatch.setattr(tracking, "_told", set())
    with pytest.warns(UserWarning, match="TensorBoard is not installed"):
        run(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "b")
    assert not (tmp_path / "a" / "tensorboard").exists()


def test_training_goes_on_when_its_curves_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: tracking.EventFile, point: tracking.Point) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "_told", set())
    monkeypatch.setattr(tracking.EventFile, "log", full)
    with pytest.warns(UserWarning, match="EventFile writes no more curves.*No space left"):
        result = run(tmp_path / "full")
    assert result.final.is_dir()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tensorboard").touch()
    with pytest.warns(UserWarning, match="no curves are written"):
        run(tmp_path / "file")


def test_the_numbers_of_a_training_do_not_depend_on_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "off").mkdir()
        (tmp_path / "off" / "tensorboard").touch()
        off, on = run(tmp_path / "off"), run(tmp_path / "on")
    pd.testing.assert_frame_equal(off.history.drop(columns="seconds"), on.history.drop(columns="seconds"))
    keys = [runs.read_json(folder / "result.json")["key"] for folder in (tmp_path / "off", tmp_path / "on")]
    assert keys[0] == keys[1]


def test_only_the_leading_process_tracks(tmp_path: Path) -> None:
    class Follower(Peers):
        rank, size = 1, 2

    windows = CONFIG.cut(POOL)
    for peers, writers in ((Peers(), 1), (Follower(), 0)):
        network = tiny_network(rank=4, lora=False, layers=1)
        tracker = train._Run(network, windows, CONFIG, tmp_path / str(writers), peers)._tracker()
        assert len(tracker.writers) == writers
    assert not (tmp_path / "0").exists()


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


def client(store: Path | str) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=store.as_uri() if isinstance(store, Path) else store)


def mlflow_curves(store: Path, run_id: str) -> Curves:
    found = client(store)
    names = [name for name in found.get_run(run_id).data.metrics if not name.endswith("seconds")]
    return {name: [(m.step, m.value) for m in found.get_metric_history(run_id, name)] for name in names}


def test_mlflow_keeps_parameters_curves_and_tags(tmp_path: Path, store: Path) -> None:
    result = run(tmp_path / "training", track="mlflow")
    kept = runs.read_json(tmp_path / "training" / "mlflow.json")
    found = client(store).get_run(kept["run_id"])
    assert_curves_of(result, mlflow_curves(store, kept["run_id"]))
    assert curves(tmp_path / "training").keys() == mlflow_curves(store, kept["run_id"]).keys()
    assert found.info.status == "FINISHED"
    assert client(store).get_experiment(found.info.experiment_id).name == "netllm"
    assert found.data.params["train.lr"] == "0.001"
    assert found.data.params["plm.rank"] == "4"
    assert found.data.tags["pool_hash"] == POOL.content_hash()
    assert found.data.tags["mlflow.source.git.commit"] == (runs.git_revision() or "unknown")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize("breaks", [[3], [2, 4]])
def test_a_resumed_run_is_the_same_run_of_mlflow(tmp_path: Path, store: Path, breaks: list[int]) -> None:
    for step in breaks:
        with pytest.raises(Break):
            run(tmp_path / "broken", step, track="mlflow")
        run_id = runs.read_json(tmp_path / "broken" / "mlflow.json")["run_id"]
        assert client(store).get_run(run_id).info.status == "FAILED"
    result = run(tmp_path / "broken", track="mlflow")
    assert runs.read_json(tmp_path / "broken" / "mlflow.json")["run_id"] == run_id
    assert_curves_of(result, mlflow_curves(store, run_id))
    assert client(store).get_run(run_id).info.status == "FINISHED"
    assert len(client(store).search_runs([client(store).get_run(run_id).info.experiment_id])) == 1


def test_mlflow_asked_for_in_the_middle_and_at_the_end(tmp_path: Path, store: Path) -> None:
    """It gets what was before, once."""
    with pytest.raises(Break):
        run(tmp_path / "middle", 3)
    for folder, sittings in ((tmp_path / "middle", 2), (tmp_path / "end", 3)):
        for track in ["", "mlflow", "mlflow"][-sittings:]:
            result = run(folder, track=track)
        run_id = runs.read_json(folder / "mlflow.json")["run_id"]
        assert_curves_of(result, mlflow_curves(store, run_id))
        assert client(store).get_run(run_id).info.status == "FINISHED"


def test_a_run_that_was_deleted_from_the_store_begins_anew(tmp_path: Path, store: Path) -> None:
    with pytest.raises(Break):
        run(tmp_path / "training", 3, track="mlflow")
    first = runs.read_json(tmp_path / "training" / "mlflow.json")["run_id"]
    client(store).delete_run(first)
    result = run(tmp_path / "training", track="mlflow")
    second = runs.read_json(tmp_path / "training" / "mlflow.json")["run_id"]
    assert second != first
    assert_curves_of(result, mlflow_curves(store, second))


def test_the_store_and_experiment_that_the_environment_names(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mine").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "abr")
    run(tmp_path / "training", track="mlflow")
    run_id = runs.read_json(tmp_path / "training" / "mlflow.json")["run_id"]
    experiment = client(tmp_path / "mine").get_run(run_id).info.experiment_id
    assert client(tmp_path / "mine").get_experiment(experiment).name == "abr"
    assert not store.exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the id of a run belongs to its store
    run(tmp_path / "training", track="mlflow")
    assert runs.read_json(tmp_path / "training" / "mlflow.json")["run_id"] != run_id


def test_a_store_that_fails_on_the_way_does_not_end_the_training(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: tracking.MlflowRun) -> None:
        raise ConnectionError("the server is gone\nsecond line")

    monkeypatch.setattr(tracking, "_told", set())
    monkeypatch.setattr(tracking.MlflowRun, "flush", gone)
    with pytest.warns(UserWarning, match="MlflowRun writes no more curves: the server is gone$"):
        result = run(tmp_path / "training", track="mlflow")
    assert_curves_of(result, curves(tmp_path / "training"))


def test_a_store_that_cannot_be_used_ends_it_before_it_begins(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.parent.mkdir(parents=True)
    store.touch()
    with pytest.raises(OSError, match="^MLflow at file://"):
        run(tmp_path / "training", track="mlflow")
    assert not (tmp_path / "training" / "result.json").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://user:secret@host/path")
    with pytest.raises(OSError, match="^MLflow at nonsense://host/path"):
        run(tmp_path / "training", track="mlflow")


def test_asked_for_and_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find(name))
    with pytest.raises(ValueError, match=r"pip install 'netllm-companion\[mlflow\]'"):
        run(tmp_path / "training", track="mlflow")
    assert not (tmp_path / "training").exists()
    run(tmp_path / "training")


def test_an_unknown_tracker(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='known is "mlflow"'):
        run(tmp_path / "training", track="wandb")
    job = finetune.Job("no.npz", str(tmp_path), track="wandb")
    with pytest.raises(ValueError, match='known is "mlflow"'):
        finetune.finetune(job)


def test_a_job_names_its_tracker(tmp_path: Path, store: Path) -> None:
    from netllm_lib.plm import PLMConfig

    POOL.save(tmp_path / "pool")
    plm = PLMConfig("tiny-llama", rank=4, layers=1)
    config = dataclasses.replace(CONFIG, epochs=1)
    job = finetune.Job(str(tmp_path / "pool"), str(tmp_path / "f"), plm, train=config, track="mlflow")
    runs.write_json(tmp_path / "job.json", job)
    finetune.finetune(finetune.read_job(tmp_path / "job.json"))
    run_id = runs.read_json(tmp_path / "f" / "mlflow.json")["run_id"]
    assert [step for step, _ in mlflow_curves(store, run_id)["train/loss"]] == [1, 2]
