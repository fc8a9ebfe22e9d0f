"""Curves of a training for TensorBoard and MLflow, beside the tables that the training keeps anyway.

TensorBoard's file is always written; MLflow is asked for by name. A training that goes on continues the same curves: it knows its
earlier points, from which TensorBoard's file is written anew, and MLflow gets those that it does not have yet. Curves are a
by-product: a writer that fails says so and writes no more, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from netllm_lib import runs

TENSORBOARD = "tensorboard"  # folder of the event file in the training folder
MLFLOW = "mlflow.json"  # file in the training folder that says which MLflow run it is
AT_ONCE = 500  # points that MLflow gets together; it takes up to 1000

Values = Mapping[str, float | None]
"""Of some curves, by name. Those that are None or not finite are left out."""


def check(track: str) -> None:
    """Raise ValueError for a tracker that is unknown or not installed, before any work is done."""
    if track not in ("", "mlflow"):
        raise ValueError(f'track={track!r}: known is "mlflow"; TensorBoard is always written')
    if track == "mlflow" and importlib.util.find_spec("mlflow") is None:
        advice = "pip install 'netllm-companion[mlflow]', or leave track out"
        raise ValueError(f'track="mlflow": MLflow is not installed; {advice}')


class Curves:
    """Where the points of a training go. A context that closes the files; MLflow's run has FAILED unless `finished` is set.

    Raises OSError if MLflow is asked for and its store cannot be used.
    """

    def __init__(self, folder: Path, track: str, settings: Mapping[str, Any], tags: Mapping[str, str]):
        self.finished, self._writers = False, list[Any]()
        flat = {
            str(name): value if isinstance(value, str | int | float | bool) else str(value)[:200]
            for name, value in pd.json_normalize(dict(settings)).iloc[0].items()
        }
        try:
            self._writers.append(EventFile(folder / TENSORBOARD, flat))
        except (OSError, ImportError) as error:
            warnings.warn(f"no curves are written for TensorBoard: {error}", stacklevel=2)
        if track == "mlflow":
            try:
                self._writers.append(MlflowRun(folder, flat, tags))
            except Exception as error:
                raise OSError(f"MLflow cannot be used: {runs.first_line(error)}") from error

    def log(self, step: int, values: Values) -> None:
        """Add a point to each curve, after `step` optimizer steps."""
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        self._each(lambda writer: writer.log(step, finite))

    def flush(self) -> None:
        """See that everything so far can be read by others."""
        self._each(lambda writer: writer.flush())

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda writer: writer.close(self.finished))

    def _each(self, do: Callable[[Any], None]) -> None:
        for writer in list(self._writers):
            try:
                do(writer)
            except Exception as error:  # a full disk, a server that is gone: no reason to lose the training
                self._writers.remove(writer)
                warnings.warn(f"{type(writer).__name__} writes no more curves: {runs.first_line(error)}", stacklevel=2)


class EventFile:
    """TensorBoard's file, with the settings as its hyperparameters."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        # purge_step: a TensorBoard that has read the earlier file drops its points
        self._writer = SummaryWriter(str(folder), purge_step=0)
        for summary in hparams(settings, {"final/loss": 0.0, "final/score": 0.0, "final/seconds": 0.0}):
            self._writer._get_file_writer().add_summary(summary)  # `add_hparams` makes a folder of its own
        self.flush = self._writer.flush

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class MlflowRun:
    """A run in the store that $MLFLOW_TRACKING_URI names, by default files in `reports/mlflow`; its id is in `mlflow.json`."""

    def __init__(self, folder: Path, settings: dict[str, Any], tags: Mapping[str, str]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its newest versions ask for consent
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes
        import mlflow

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (runs.reports_root() / "mlflow").absolute().as_uri()
        self._client = client = mlflow.MlflowClient(tracking_uri=uri)
        self._queue: list[Any] = []
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "netllm"
        experiment = client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else client.create_experiment(name)
        kept = runs.read_json(folder / MLFLOW)["run_id"] if (folder / MLFLOW).is_file() else ""
        found = client.search_runs([number], f"attributes.run_id = '{kept}'")  # those that are not deleted
        run = found[0] if found else client.create_run(number, run_name=folder.name, tags=dict(tags))
        self._id = run.info.run_id
        client.update_run(self._id, status="RUNNING")
        runs.write_json(folder / MLFLOW, {"run_id": self._id})
        for name in settings.keys() - run.data.params.keys():
            client.log_param(self._id, name, str(settings[name])[:500])
        histories = {name: client.get_metric_history(self._id, name) for name in run.data.metrics}
        self._sent = {name: max(point.step for point in history) for name, history in histories.items()}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        new = {name: value for name, value in values.items() if step > self._sent.get(name, -1)}
        self._queue += [Metric(name, value, int(time.time() * 1000), step) for name, value in new.items()]
        self._sent |= dict.fromkeys(new, step)
        if len(self._queue) >= AT_ONCE:
            self.flush()

    def flush(self) -> None:
        while self._queue:
            self._client.log_batch(self._id, metrics=self._queue[:AT_ONCE])
            del self._queue[:AT_ONCE]

    def close(self, finished: bool) -> None:
        self.flush()
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")
