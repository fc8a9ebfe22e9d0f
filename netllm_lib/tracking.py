"""Curves of a training for TensorBoard and MLflow, beside the tables that the training keeps anyway.

TensorBoard's file is always written, unless its package is absent; MLflow is asked for by name. A training that goes on
continues the same curves: the training knows its points, TensorBoard's file is written anew from them, and MLflow gets those that
it does not have. Curves are a by-product: a writer that fails says so and writes no more, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from netllm_lib import runs

TENSORBOARD = "tensorboard"  # folder of the event file in the training folder
MLFLOW = "mlflow.json"  # file in the training folder that says which MLflow run it is
EXPERIMENT = "netllm"  # MLflow's experiment, unless $MLFLOW_EXPERIMENT_NAME names another
AT_ONCE = 500  # values that are sent to MLflow together; its limit is 1000

Point = tuple[int, Mapping[str, float | None]]
"""Steps that are done, and the values of some curves then. Values that are None or not finite are left out."""


def check(track: str) -> None:
    """Raise ValueError for a tracker that is unknown or not installed, before any work is done."""
    if track not in ("", "mlflow"):
        raise ValueError(f'track={track!r}: known is "mlflow"; TensorBoard is always written')
    if track == "mlflow" and importlib.util.find_spec("mlflow") is None:
        raise ValueError(
            "track=\"mlflow\": MLflow is not installed; pip install 'netllm-companion[mlflow]', or leave track out"
        )


class Curves:
    """Where the points of the training in `folder` go; without arguments nowhere. A context that closes the files."""

    def __init__(
        self,
        folder: Path | None = None,
        track: str = "",
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        earlier: Sequence[Point] = (),
    ):
        """Begin with the points `earlier`. Raises OSError if MLflow was asked for and its store cannot be used."""
        self._writers: list[Any] = []
        if folder is None:
            return
        settings = flat(parameters or {})
        if importlib.util.find_spec("tensorboard") is None:
            _warn("TensorBoard is not installed: no curves are written for it (pip install tensorboard)")
        else:
            try:
                self._writers.append(EventFile(folder / TENSORBOARD, settings))
            except OSError as error:
                _warn(f"no curves are written for TensorBoard: {_first_line(error)}")
        if track == "mlflow":
            try:
                self._writers.append(MlflowRun(folder, settings, tags or {}))
            except Exception as error:
                raise OSError(f"MLflow at {_shown(_tracking_uri())}: {_first_line(error)}") from error
        for step, values in earlier:
            self.log(step, values)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a point to each curve."""
        finite = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        self._each(lambda writer: writer.log(step, finite))

    def flush(self) -> None:
        """See that everything so far can be read by others."""
        self._each(lambda writer: writer.flush())

    def finish(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add the final figures, and say that the training is finished."""
        self.log(step, values)
        self._each(lambda writer: writer.finish())

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda writer: writer.close())

    def _each(self, do: Callable[[Any], None]) -> None:
        for writer in list(self._writers):
            try:
                do(writer)
            except Exception as error:  # a full disk, a server that is gone: no reason to lose the training
                self._writers.remove(writer)
                _warn(f"{type(writer).__name__} writes no more curves: {_first_line(error)}")


class EventFile:
    """TensorBoard's file, with the settings as its hyperparameters."""

    FINAL = ("final/loss", "final/score", "final/seconds")

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        # a TensorBoard that is watching forgets what the earlier files told it
        self._writer = SummaryWriter(str(folder), purge_step=0)
        experiment, session, self._session_end = hparams(dict(settings), dict.fromkeys(self.FINAL, 0.0))
        self._summaries: Any = self._writer.file_writer
        for summary in (experiment, session):
            self._summaries.add_summary(summary)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        self._summaries.add_summary(self._session_end)

    def close(self) -> None:
        self._writer.close()


class MlflowRun:
    """A run in the store that $MLFLOW_TRACKING_URI names, by default files in `reports/mlflow`.

    `mlflow.json` in the training folder keeps its id. Points are sent together, at resume points and when there are many.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], tags: Mapping[str, str]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its newest versions ask for consent
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes
        import mlflow

        self._client = mlflow.MlflowClient(tracking_uri=_tracking_uri())
        self._queue: list[Any] = []
        self._status = "FAILED"
        self.run_id = self._continued(folder) or self._created(folder, tags)
        known = self._client.get_run(self.run_id).data
        for name, value in settings.items():
            if name not in known.params:
                self._client.log_param(self.run_id, name, str(value)[:500])
        histories = {name: self._client.get_metric_history(self.run_id, name) for name in known.metrics}
        self._sent = {name: max(metric.step for metric in history) for name, history in histories.items()}

    def _continued(self, folder: Path) -> str | None:
        """The run that this folder had in this store, if it is still there."""
        kept = runs.read_json(folder / MLFLOW) if (folder / MLFLOW).is_file() else None
        if not isinstance(kept, dict) or kept.get("store") != _shown(_tracking_uri()):
            return None
        from mlflow.exceptions import MlflowException

        try:
            if self._client.get_run(kept["run_id"]).info.lifecycle_stage == "active":
                self._client.update_run(kept["run_id"], status="RUNNING")
                return str(kept["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        return None

    def _created(self, folder: Path, tags: Mapping[str, str]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        revision = {"mlflow.source.git.commit": runs.git_revision() or "unknown"}
        run_id: str = self._client.create_run(number, run_name=folder.name, tags={**tags, **revision}).info.run_id
        runs.write_json(folder / MLFLOW, {"store": _shown(_tracking_uri()), "experiment": name, "run_id": run_id})
        return run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        for name, value in values.items():
            if step > self._sent.get(name, -1):
                self._queue.append(Metric(name, value, int(time.time() * 1000), step))
                self._sent[name] = step
        if len(self._queue) >= AT_ONCE:
            self.flush()

    def flush(self) -> None:
        while self._queue:
            self._client.log_batch(self.run_id, metrics=self._queue[:AT_ONCE])
            del self._queue[:AT_ONCE]

    def finish(self) -> None:
        self._status = "FINISHED"

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self.run_id, self._status)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as `a.b` -> value; lists as text, None as "none"."""
    result: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            plain = value if isinstance(value, str | int | float | bool) else str(value)[:200]
            result[f"{prefix}{key}"] = "none" if value is None else plain
    return result


def _tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or (runs.reports_root() / "mlflow").absolute().as_uri()


def _shown(uri: str) -> str:
    """An address without the name and password that may be in it."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
