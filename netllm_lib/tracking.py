"""Curves of a training run for TensorBoard and MLflow, beside the tables that the run keeps anyway.

TensorBoard's files are always written, into `tensorboard/` of the training folder, unless its package is absent; MLflow is
asked for by name. Both are imported only when a training begins. A run that goes on continues the same curves: what an earlier
sitting had written past its last resume point is hidden in TensorBoard, and in MLflow not written a second time.

Tracking is a by-product: once training has begun, a writer that fails says so and writes no more, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit, urlunsplit

from netllm_lib import runs

TENSORBOARD = "tensorboard"
"""Folder of the event files in the training folder."""
MLFLOW = "mlflow.json"
"""File in the training folder that says which MLflow run it is."""
EXPERIMENT = "netllm"
"""MLflow's experiment, unless $MLFLOW_EXPERIMENT_NAME names another."""
KINDS = ("", "mlflow")

_told: set[str] = set()


class Point(NamedTuple):
    """Values of some curves after so many steps."""

    step: int
    values: Mapping[str, float]


class Writer(Protocol):
    """One place that curves go to."""

    def log(self, point: Point) -> None: ...
    def flush(self) -> None: ...
    def end(self, point: Point | None) -> None:
        """`point`: the final figures, None if the training broke off."""


def check(track: str) -> None:
    """Raise ValueError for a tracker that is unknown or not installed, before any work is done."""
    if track not in KINDS:
        raise ValueError(f'track={track!r}: known is "mlflow"; TensorBoard is always written')
    if track == "mlflow" and importlib.util.find_spec("mlflow") is None:
        raise ValueError(
            "track=\"mlflow\": MLflow is not installed; pip install 'netllm-companion[mlflow]', or leave track out"
        )


class Tracker:
    """What training tells of itself, handed to every writer. As a context it closes them, however training ends."""

    def __init__(self, writers: Sequence[Writer] = ()):
        self.writers = list(writers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to each curve. Values that are not finite are left out."""
        point = _finite(Point(step, values))
        self._each(lambda writer: writer.log(point))

    def flush(self) -> None:
        """See that everything so far can be read by others."""
        self._each(lambda writer: writer.flush())

    def finish(self, step: int, values: Mapping[str, float]) -> None:
        """Write the final figures and close."""
        point = _finite(Point(step, values))
        self._each(lambda writer: writer.end(point))
        self.writers = []

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda writer: writer.end(None))
        self.writers = []

    def _each(self, do: Callable[[Writer], None]) -> None:
        for writer in list(self.writers):
            try:
                do(writer)
            except Exception as error:  # a full disk, a server that is gone: no reason to lose the training
                self.writers.remove(writer)
                _warn(f"{type(writer).__name__} writes no more curves: {_first_line(error)}")


def start(
    folder: Path,
    track: str = "",
    *,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    done: int,
    earlier: Iterable[Point],
    tensorboard: bool = True,
) -> Tracker:
    """A tracker for the training in `folder`, of which `done` steps are done, with the points `earlier`.

    `parameters` is any nesting of settings. Raises OSError if MLflow was asked for and its store cannot be used.
    """
    points, settings, writers = [_finite(point) for point in earlier], flat(parameters), list[Writer]()
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        _warn("TensorBoard is not installed: no curves are written for it (pip install tensorboard)")
    elif tensorboard:
        try:
            writers.append(EventFile(folder / TENSORBOARD, settings, done, points))
        except OSError as error:
            _warn(f"no curves are written for TensorBoard: {_first_line(error)}")
    if track == "mlflow":
        try:
            writers.append(MlflowRun(folder, settings, tags, points))
        except Exception as error:
            raise OSError(f"MLflow at {_shown(_tracking_uri())}: {_first_line(error)}") from error
    return Tracker(writers)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as `a.b` -> value; lists as text, None as "none"."""
    result: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            result |= flat(value, f"{name}.")
        elif value is None:
            result[name] = "none"
        else:
            result[name] = value if isinstance(value, str | int | float | bool) else str(value)[:200]
    return result


# --- TensorBoard --------------------------------------------------------------------------------------------------------


class EventFile:
    """An event file of TensorBoard, one a sitting, each event written at once: a kill loses at most part of the last one.

    Written with TensorBoard's own record writer, but without the thread and the queue of its file writer, so that errors of
    the disk turn up here, and under a name that sorts after those of earlier sittings, which the order of reading rests on.
    """

    FINAL = ("final/loss", "final/score", "final/seconds")

    def __init__(self, folder: Path, settings: Mapping[str, Any], done: int, earlier: Sequence[Point]):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import hparams

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        before = sorted(path.name for path in folder.glob("events.out.tfevents.*"))
        newest = [int(match[1]) for name in before if (match := re.match(r"events\.out\.tfevents\.(\d+)\.", name))]
        name = f"events.out.tfevents.{max([int(time.time()), *newest]):010d}.{len(before):06d}"
        self._stream = open(folder / name, "xb", buffering=0)  # noqa: SIM115 - closed by end
        self._records = RecordWriter(self._stream)
        self._write(file_version="brain.Event:2")
        # what is there of this step and later ones is from a sitting that was killed; this step itself comes again below
        self._write(step=done, session_log=SessionLog(status=SessionLog.START))
        experiment, session, self._session_end = hparams(dict(settings), dict.fromkeys(self.FINAL, 0.0))
        self._write(summary=experiment)
        self._write(summary=session)
        for point in earlier:
            if not before or point.step >= done:
                self.log(point)

    def log(self, point: Point) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
        self._write(step=point.step, summary=Summary(value=values))

    def flush(self) -> None:
        """Nothing is held back."""

    def end(self, point: Point | None) -> None:
        if point is not None:
            self.log(point)
            self._write(summary=self._session_end)
        self._stream.close()

    def _write(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())


# --- MLflow -------------------------------------------------------------------------------------------------------------


class MlflowRun:
    """A run in the store that $MLFLOW_TRACKING_URI names, by default files in `reports/mlflow`.

    `mlflow.json` in the training folder keeps its id. Points are sent in batches, at resume points and every few seconds.
    Those that the store has already are not sent again.
    """

    EVERY_S, AT_ONCE = 5.0, 1000  # the store takes no more than a thousand values at once

    def __init__(self, folder: Path, settings: Mapping[str, Any], tags: Mapping[str, str], earlier: Sequence[Point]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # its newest versions ask for consent
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # by default it tries for minutes
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = mlflow.MlflowClient(tracking_uri=_tracking_uri())
        self._queue: list[Any] = []
        self._sent = time.monotonic()
        self.run_id = self._continued(folder) or self._created(folder, tags)
        known = self._client.get_run(self.run_id).data
        missing = [Param(name, str(value)[:500]) for name, value in settings.items() if name not in known.params]
        for first in range(0, len(missing), 100):  # as many as it takes
            self._client.log_batch(self.run_id, params=missing[first : first + 100])
        self._last = {name: self._newest(name) for name in known.metrics}
        for point in earlier:
            self.log(point)

    def _continued(self, folder: Path) -> str | None:
        """The run that this folder had in this store, if it is still there."""
        if not (folder / MLFLOW).is_file():
            return None
        kept = runs.read_json(folder / MLFLOW)
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
        run_id: str = self._client.create_run(number, run_name=folder.name, tags=dict(tags)).info.run_id
        runs.write_json(folder / MLFLOW, {"store": _shown(_tracking_uri()), "experiment": name, "run_id": run_id})
        return run_id

    def _newest(self, name: str) -> int:
        return max((metric.step for metric in self._client.get_metric_history(self.run_id, name)), default=-1)

    def log(self, point: Point) -> None:
        now_ms = int(time.time() * 1000)
        for name, value in point.values.items():
            if point.step > self._last.get(name, -1):
                self._queue.append(self._metric(name, value, now_ms, point.step))
                self._last[name] = point.step
        if len(self._queue) >= self.AT_ONCE // 2 or time.monotonic() - self._sent > self.EVERY_S:
            self.flush()

    def flush(self) -> None:
        while self._queue:
            self._client.log_batch(self.run_id, metrics=self._queue[: self.AT_ONCE])
            del self._queue[: self.AT_ONCE]
        self._sent = time.monotonic()

    def end(self, point: Point | None) -> None:
        if point is not None:
            self.log(point)
        self.flush()
        self._client.set_terminated(self.run_id, "FAILED" if point is None else "FINISHED")


def _tracking_uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or (runs.reports_root() / "mlflow").absolute().as_uri()


def _shown(uri: str) -> str:
    """An address without the name and password that may be in it."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _finite(point: Point) -> Point:
    return Point(point.step, {name: float(value) for name, value in point.values.items() if math.isfinite(value)})


def _warn(message: str) -> None:
    """Once in a process."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=3)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
