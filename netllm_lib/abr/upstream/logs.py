"""What a run of the original leaves behind as text: result files, training losses, console logs, and the names of its folders.

Everything here only reads (or writes) text; weights are read by `checkpoint`, pools by `upstream`, whole runs by `importing`.

    data/ft_plms/<type>_<size>/<pool>_ss_<step>/rank_…_seed_…/early_stop_<k>_{console.log, best_model/, checkpoint/<epoch>/}
    artifacts/results/<traces>_<video>/trace_num_<n>_fixed_<bool>/<type>_<size>/early_stop_<k>_rank_…_seed_…/result_sim_abr_…
    artifacts/exp_pools/<traces>_<video>/<policies>/seed_<s>_trace_num_<n>_fixed_<bool>/exp_pool.pkl

The console log does not hold the `Namespace(…)` line with all arguments: the original prints that before it opens the log, so
only a copy of the terminal has it. `read_console` understands both.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from netllm_lib.abr import qoe
from netllm_lib.abr.traces import CHUNKS, TraceSet
from netllm_lib.plm_files import ALIASES, FAMILIES
from netllm_lib.runs import atomic_path

RESULT_PREFIX = "result_sim_abr_"
RESULT_COLUMNS = (
    "time_s", "bitrate_kbps", "buffer_s", "rebuffer_s", "size_bytes", "delay_ms", "smoothness_mbps", "reward",
)  # fmt: skip
"""Of a result file, tab-separated, in this order."""
POLICIES = ("genet", "udr_1", "udr_2", "udr_3", "udr_real", "mpc", "bba")
"""The original's baselines, which are also its behaviour policies."""

# --- result files -------------------------------------------------------------------------------------------------------

_MOST_BYTES = 1_000_000  # a result file has about 5 kB


def read_result_file(path: Path, trace: str | None = None) -> pd.DataFrame:
    """The 48 chunks of one `result_sim_abr_…` file, in the columns of `play`'s table: trace, chunk, level, bitrate_kbps, …

    `trace` names the trace; else it is what follows `result_sim_abr_` in the file's name. Raises ValueError naming file, line and
    value for a file that is cut, has other columns, a number that is not finite, a bitrate that is not one of the six, or
    a reward or smoothness that does not follow from the rest of the line.
    """
    path = Path(path)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, a result file has {CHUNKS} short lines")
    lines = path.read_bytes().decode("ascii", errors="replace").replace("\r\n", "\n").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows = [_result_line(line, f"{path}:{number}") for number, line in enumerate(lines[:CHUNKS], start=1)]
    if len(lines) != CHUNKS:
        raise ValueError(
            f"{path}: {len(lines)} lines, a result file has {CHUNKS}"
            + ("; it is cut, copy it again or remove it" if len(lines) < CHUNKS else "")
        )
    values = np.array(rows)
    table = pd.DataFrame(dict(zip(RESULT_COLUMNS, values.T, strict=True)))
    _check_chunks(table, path)
    name = path.name.removeprefix(RESULT_PREFIX) if trace is None else trace
    return pd.DataFrame(
        {
            "trace": np.full(CHUNKS, name, dtype=object),
            "chunk": np.arange(CHUNKS),
            "level": np.searchsorted(qoe.BITRATES_KBPS, table["bitrate_kbps"]),
            "bitrate_kbps": table["bitrate_kbps"].astype(np.int64),
            "buffer_s": table["buffer_s"],
            "rebuffer_s": table["rebuffer_s"],
            "size_bytes": table["size_bytes"].astype(np.int64),
            "delay_ms": table["delay_ms"],
            "smoothness_mbps": table["smoothness_mbps"],
            "reward": table["reward"],
            "time_s": table["time_s"],
        }
    )


def _result_line(line: str, where: str) -> list[float]:
    fields = line.split("\t")
    if len(fields) != len(RESULT_COLUMNS):
        raise ValueError(f"{where}: {len(fields)} columns, expected {len(RESULT_COLUMNS)}: {line[:60]!r}")
    values = []
    for column, field in zip(RESULT_COLUMNS, fields, strict=True):
        try:
            value = float(field)
        except ValueError:
            raise ValueError(f"{where}: {column} is {field[:30]!r}, not a number") from None
        if not math.isfinite(value) or "_" in field:
            raise ValueError(f"{where}: {column} is {field[:30]}, not a finite number")
        values.append(value)
    return values


def _check_chunks(table: pd.DataFrame, path: Path) -> None:
    def refuse(bad: np.ndarray | pd.Series, column: str, reason: str) -> None:
        wrong = np.flatnonzero(bad)
        if len(wrong):
            value = float(table[column].iloc[wrong[0]])
            raise ValueError(f"{path}:{wrong[0] + 1}: {column} is {value:.6g}, {reason}")

    kbps = table["bitrate_kbps"].to_numpy()
    refuse(~np.isin(kbps, qoe.BITRATES_KBPS), "bitrate_kbps", f"not one of {qoe.BITRATES_KBPS.tolist()}")
    size = table["size_bytes"].to_numpy()
    refuse((size <= 0) | (size != np.floor(size)) | (size > 2**53), "size_bytes", "not a number of bytes")
    for column in ("buffer_s", "rebuffer_s", "delay_ms"):
        refuse(table[column].to_numpy() < 0, column, "which cannot be negative")
    # the first chunk's change is that from the level before the video; a modified original may start at another one
    change = np.abs(np.diff(kbps, prepend=kbps[0])) / 1000
    change[0] = table["smoothness_mbps"].iloc[0]
    off = ~np.isclose(table["smoothness_mbps"], change, rtol=0, atol=1e-6)
    refuse(off, "smoothness_mbps", "which is not the change of the bitrate")
    follows = kbps / 1000 - qoe.REBUFFER_PENALTY * table["rebuffer_s"] - table["smoothness_mbps"]
    off = ~np.isclose(table["reward"], follows, rtol=1e-9, atol=1e-6)
    refuse(off, "reward", "which does not follow from bitrate, rebuffering and smoothness")


def write_result_file(path: Path, chunks: pd.DataFrame, *, blank_line: bool = False) -> Path:
    """Write a trace's 48 chunks byte for byte as the original does; its baselines add a blank line, its LLM test does not."""
    columns = [_as_written(column, chunks[column].tolist()) for column in RESULT_COLUMNS]
    lines = ["\t".join(fields) for fields in zip(*columns, strict=True)]
    if len(lines) != CHUNKS:
        raise ValueError(f"{path}: {len(lines)} chunks to write, a result file has {CHUNKS}")
    with atomic_path(Path(path)) as aside:
        aside.write_text("\n".join(lines) + ("\n\n" if blank_line else "\n"))
    return Path(path)


def _as_written(column: str, values: list[float]) -> list[str]:
    kind = int if column in ("bitrate_kbps", "size_bytes") else float
    return [str(kind(value)) for value in values]


def result_files(folder: Path) -> list[Path]:
    """The `result_sim_abr_*` files directly in a folder, sorted by name."""
    return sorted(path for path in Path(folder).glob(f"{RESULT_PREFIX}*") if path.is_file())


def trace_of(name: str, traces: TraceSet | str | None = None) -> str:
    """The trace that a result file's name stands for: `result_sim_abr_<trace folder>_<trace>`.

    The folder's name can be split off only if it is known: from a trace set (whose folder may have subfolders), or given as a
    name. Otherwise `<trace folder>_<trace>` is returned as it is.
    """
    raw = name.removeprefix(RESULT_PREFIX)
    if isinstance(traces, TraceSet):
        rest = raw.removeprefix(f"{traces.name}_")
        return rest if rest in traces.names else raw
    return raw.removeprefix(f"{traces}_") if traces else raw


def read_results(folder: Path, traces: TraceSet | str | None = None) -> pd.DataFrame:
    """All result files of a folder as one table of chunks, in the order in which the traces were played.

    The files may lie in the folder or in a single folder somewhere below it. The original's clock runs on from trace to trace,
    which tells the order. `traces` shortens the names, see `trace_of`. Raises FileNotFoundError if there are no result
    files, and ValueError for several folders of them or for the first file that is broken.
    """
    folder = Path(folder)
    leaves = [folder] if result_files(folder) else result_folders(folder)
    if not leaves:
        raise FileNotFoundError(f"{folder}: no {RESULT_PREFIX}* files in it or below it")
    if len(leaves) > 1:
        shown = ", ".join(str(leaf.relative_to(folder)) for leaf in leaves[:4])
        raise ValueError(f"{folder}: {len(leaves)} folders of result files below it, name one of them: {shown}")
    parts = [read_result_file(path, trace_of(path.name, traces)) for path in result_files(leaves[0])]
    parts.sort(key=lambda part: float(part["time_s"].iloc[0]))  # stable: by name where the clock does not tell
    return pd.concat(parts, ignore_index=True)


def result_folders(folder: Path) -> list[Path]:
    """Every folder at or below `folder` that holds result files, sorted."""
    return sorted({path.parent for path in Path(folder).rglob(f"{RESULT_PREFIX}*") if path.is_file()})


# --- training losses ----------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """The content of `train_losses.txt`."""

    values: (
        np.ndarray
    )  # [micro-steps] float64, the loss of each window in the order of training, epochs joined; may hold NaN
    truncated: bool  # the last line was cut and is left out


_LOSS = re.compile(r"[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|inf|nan)")


def train_losses(path: Path) -> Losses:
    """The losses that the original writes when training has ended, one `%.6f` a line.

    A last line without its end and with fewer decimals is a cut one: it is left out and reported. Raises ValueError naming
    file, line and value for anything else that is not a number, and for a file without any.
    """
    path = Path(path)
    lines = path.read_bytes().decode("ascii", errors="replace").replace("\r\n", "\n").split("\n")
    last = lines.pop()  # nothing, when the last line is whole
    decimals = len(lines[0].partition(".")[2]) if lines else 6
    whole = _LOSS.fullmatch(last) and (last in ("nan", "inf") or len(last.partition(".")[2]) >= decimals)
    truncated = not whole and re.fullmatch(r"[-+.\d]+|na?|in?", last) is not None
    if last and not truncated:
        lines.append(last)
    for number, line in enumerate(lines, start=1):
        if not _LOSS.fullmatch(line):
            raise ValueError(f"{path}:{number}: {line[:40]!r} is not a loss")
    if not lines:
        raise ValueError(f"{path}: no losses in it")
    return Losses(np.array(lines, dtype=np.float64), truncated)


def write_train_losses(path: Path, values: Iterable[float]) -> Path:
    """Write losses as the original does."""
    with atomic_path(Path(path)) as aside:
        aside.write_text("".join(f"{value:.6f}\n" for value in values))
    return Path(path)


# --- console log --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What is printed after an epoch of training."""

    epoch: int | None  # from 0; None where an excerpt does not tell
    loss_mean: float | None  # over the epoch's windows
    loss_std: float | None
    time_s: float | None


@dataclasses.dataclass(frozen=True)
class Progress:
    """A progress line, printed every 100 windows."""

    epoch: int | None
    step: int  # window of this epoch, from 0
    loss: float  # mean since the epoch began


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is printed after an evaluation on the test traces while training."""

    epoch: int | None
    episodes_return: float | None  # sum of the normalised rewards / scale
    episodes_len: int | None  # chunks that count
    best_return: float | None
    time_s: float | None
    saved: bool  # it was the best so far, and the model was saved as the best


@dataclasses.dataclass(frozen=True)
class Test:
    """What is printed by a test (`--test`), or by a baseline's."""

    __test__ = False  # not for pytest

    mean_reward: float
    time_s: float | None
    files: int | None  # result files that the mean is over
    model: str | None  # folder that the weights came from
    results: str | None  # folder that the result files went to


@dataclasses.dataclass(frozen=True)
class Console:
    """A console log of the original, or whatever part of it there is."""

    arguments: tuple[dict[str, Any], ...]  # of every `Namespace(…)` line: the command's arguments, defaults included
    pool: dict[
        str, float
    ]  # reward range, returns, timesteps and levels of the training pool; a copy of the terminal has them
    epochs: tuple[Epoch, ...]
    progress: tuple[Progress, ...]
    evaluations: tuple[Evaluation, ...]
    checkpoints: tuple[str, ...]  # folders, in the order of saving
    best_models: tuple[str, ...]
    tests: tuple[Test, ...]
    earlier_runs: int  # training runs in the same text before this one; they are left out
    cut_start: bool  # begins in the middle of a run
    cut_end: bool  # ends within an epoch, an evaluation or a test

    @property
    def cut(self) -> bool:
        """True if the text is visibly only a part of a log."""
        return self.cut_start or self.cut_end

    @property
    def mean_reward(self) -> float | None:
        """Of the last test."""
        return self.tests[-1].mean_reward if self.tests else None

    @property
    def last_epoch(self) -> int | None:
        """The last epoch that ended."""
        known = [epoch.epoch for epoch in self.epochs if epoch.epoch is not None]
        return known[-1] if known else None

    @property
    def last_step(self) -> int | None:
        """Windows trained on since training began, at least: progress is printed every 100 windows only."""
        if not self.progress and self.last_epoch is None:
            return None
        per_epoch = max((line.step for line in self.progress), default=-1) + 1
        last = self.progress[-1] if self.progress else None
        ended = 0 if self.last_epoch is None else self.last_epoch + 1
        open_epoch = last is not None and last.epoch is not None and last.epoch >= ended
        return ended * per_epoch + (last.step + 1 if last is not None and open_epoch else 0)

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights are in the folder of the best model."""
        saved = [evaluation.epoch for evaluation in self.evaluations if evaluation.saved]
        return saved[-1] if saved else None


_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|inf|nan)"


def _value(name: str) -> str:
    """A number in a printed dictionary: NumPy 2 prints `np.float64(1.5)` for 1.5. What follows shows that it is whole."""
    return rf"(?:(?:np|numpy)\.(?:float|int)\d+\()?(?P<{name}>{_NUMBER})(?=\s*[,}})])"


_EVENT = re.compile(
    "|".join(
        [
            r"Step\s+(?P<step>\d+)\s+-\s+mean train loss\s+(?P<step_loss>\d+\.\d{6}|inf|nan)\b",
            r"Training Iteration #(?P<header>\d+)(?=\s)",
            r"(?P<training>Training Information)",
            r"(?P<evaluation>Evaluation Information)",
            rf"'time/training':\s*{_value('train_time_s')}",
            rf"'training/train_loss_(?P<loss_key>mean|std)':\s*{_value('loss')}",
            rf"'(?P<eval_key>best_return|episodes_len|episodes_return|time/evaluation)':\s*{_value('eval_value')}",
            rf"'(?P<pool_key>(?:max|min)_(?:reward|return|timestep|action))':\s*{_value('pool_value')}",
            r"Checkpoint saved at:[ \t]*(?P<checkpoint>\S[^\n]*)(?=\n)",
            r"Best model saved at:[ \t]*(?P<best>\S[^\n]*)(?=\n)",
            r"Load model from:[ \t]*(?P<model>\S[^\n]*)(?=\n)",
            r"(?<=\n)(?P<files>\d+)[ \t]*(?=\n)",
            rf"'time':\s*{_value('test_time_s')},\s*'mean_reward':\s*{_value('test_mean')}",
            rf"Test time:\s*(?P<printed_time_s>{_NUMBER})(?=\s)",
            rf"Mean reward:\s*(?P<printed_mean>{_NUMBER})(?=[\s.,;)]|$)",
            rf"\{{'[^'\n]+':\s*{_value('baseline_mean')}\}}\s+[-+]?\d",
            r"Results saved at:[ \t]*(?P<results>\S[^\n]*)",
            r"(?P<namespace>Namespace\()",
        ]
    )
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_MOST_ARGUMENTS = 20_000  # characters of a Namespace line


def read_console(source: Path | str) -> Console:
    """What the original printed: `source` is a log file (a Path) or the text itself (a str).

    Any part of a log will do, also one that was mailed, quoted, or mixed with other output. Raises ValueError if no line
    of the original's is in it. If the text holds several training runs, the last one is returned.
    """
    text = source if isinstance(source, str) else Path(source).read_text(encoding="utf-8", errors="replace")
    reader = _ConsoleReader()
    text = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    for event in _EVENT.finditer(text):
        reader.read(event, text)
    if not reader.found:
        what = "the text" if isinstance(source, str) else str(source)
        raise ValueError(
            f"{what}: no line that the original prints in it (such as 'Step 0 - mean train loss  2.119107')"
        )
    return reader.result()


class _ConsoleReader:
    """Takes the events in the order of printing: an epoch's progress lines come before its `Training Iteration` line, the
    numbers of the epoch, its checkpoint, and its evaluation after it."""

    def __init__(self) -> None:
        self.found = False
        self.arguments: list[dict[str, Any]] = []
        self.pool: dict[str, float] = {}
        self.earlier_runs = 0
        self._forget()
        self.open_steps: list[Progress] = []  # of an epoch whose header has not come yet
        self.cut_start = False

    def _forget(self) -> None:
        self.epochs: list[Epoch] = []
        self.progress: list[Progress] = []
        self.evaluations: list[Evaluation] = []
        self.checkpoints: list[str] = []
        self.best: list[str] = []
        self.tests: list[Test] = []
        self.header: int | None = None  # the last one
        self.nameless = False  # the numbers of an epoch came before any header
        self.training: dict[str, float] | None = None  # of the epoch being read
        self.evaluation: dict[str, float] | None = None
        self.saved = False
        self.test: dict[str, Any] | None = None

    def read(self, event: re.Match[str], text: str) -> None:
        if event["files"] is not None and (self.test is None or "mean_reward" in self.test):
            return  # a number that stands alone means something only within a test
        start = not self.found
        self.found = True
        if self.header is None and any(
            event[key] is not None for key in ("evaluation", "eval_key", "checkpoint", "best")
        ):
            self.cut_start = True  # they follow an epoch, whose header is not here
        if event["step"] is not None:
            if start and int(event["step"]) > 0:
                self.cut_start = True
            self._step(int(event["step"]), float(event["step_loss"]))
        elif event["header"] is not None:
            self._header(int(event["header"]))
        elif event["training"] is not None:
            self._end_training()
            self.training = {}
        elif event["train_time_s"] is not None:
            self._number("train_time_s", float(event["train_time_s"]))
        elif event["loss_key"] is not None:
            self._number(event["loss_key"], float(event["loss"]))
        elif event["evaluation"] is not None:
            self._end_evaluation()
            self.evaluation = {}
        elif event["eval_key"] is not None:
            if self.evaluation is None or event["eval_key"] in self.evaluation:
                self._end_evaluation()
                self.evaluation = {}
            self.evaluation[event["eval_key"]] = float(event["eval_value"])
        elif event["pool_key"] is not None:
            self.pool[event["pool_key"]] = float(event["pool_value"])
        elif event["checkpoint"] is not None:
            self.checkpoints.append(event["checkpoint"].strip())
        elif event["best"] is not None:
            self._end_evaluation()
            self.best.append(event["best"].strip())
            self.saved = True
        elif event["namespace"] is not None:
            arguments = _namespace(text[event.start() : event.start() + _MOST_ARGUMENTS])
            if arguments:
                self.arguments.append(arguments)
        else:
            self._test(event)

    def _step(self, step: int, loss: float) -> None:
        self._end_training()
        self._end_evaluation()
        if self.open_steps and step <= self.open_steps[-1].step:  # a header is missing in between
            self.progress += self.open_steps
            self.open_steps = []
        self.open_steps.append(Progress(None, step, loss))

    def _header(self, number: int) -> None:
        self._end_training()
        self._end_evaluation()
        if self.header is not None and number <= self.header:  # training began anew
            self.earlier_runs += 1
            self._forget()
            self.cut_start = False
        if self.header is None:
            if number > 0:
                self.cut_start = True
            if self.nameless and len(self.epochs) == 1 and number > 0:
                self.epochs = [dataclasses.replace(epoch, epoch=number - 1) for epoch in self.epochs]
                self.evaluations = [dataclasses.replace(e, epoch=number - 1) for e in self.evaluations]
        self.progress += [dataclasses.replace(line, epoch=number) for line in self.open_steps]
        self.open_steps = []
        self.header = number
        self.training = {}

    def _number(self, key: str, value: float) -> None:
        if self.training is None or key in self.training:
            self._end_training()
            self.training = {}
        if self.header is None:
            self.cut_start = self.nameless = True
        self.training[key] = value

    def _end_training(self) -> None:
        if self.training:
            numbers = self.training
            epoch = Epoch(self.header, numbers.get("mean"), numbers.get("std"), numbers.get("train_time_s"))
            self.epochs.append(epoch)
        self.training = None

    def _end_evaluation(self) -> None:
        if self.evaluation:
            numbers = self.evaluation
            length = numbers.get("episodes_len")
            self.evaluations.append(
                Evaluation(
                    self.header,
                    numbers.get("episodes_return"),
                    None if length is None else int(length),
                    numbers.get("best_return"),
                    numbers.get("time/evaluation"),
                    self.saved,
                )
            )
            self.saved = False
        self.evaluation = None

    def _test(self, event: re.Match[str]) -> None:
        if event["model"] is not None:
            self._end_test()
            self.test = {"model": event["model"].strip()}
            return
        if self.test is None or (event["test_mean"] is not None and "mean_reward" in self.test):
            self._end_test()
            self.test = {}
        if event["files"] is not None:
            self.test["files"] = int(event["files"])
        elif event["test_mean"] is not None:
            self.test |= {"mean_reward": float(event["test_mean"]), "time_s": float(event["test_time_s"])}
        elif event["printed_time_s"] is not None:
            self.test.setdefault("time_s", float(event["printed_time_s"]))
        elif event["printed_mean"] is not None:
            self.test.setdefault("mean_reward", float(event["printed_mean"]))
        elif event["baseline_mean"] is not None:
            self.test["mean_reward"] = float(event["baseline_mean"])
        elif event["results"] is not None:
            self.test["results"] = event["results"].strip()
            self._end_test()

    def _end_test(self) -> None:
        if self.test is not None and "mean_reward" in self.test:
            fields = {name: self.test.get(name) for name in ("mean_reward", "time_s", "files", "model", "results")}
            self.tests.append(Test(**fields))  # type: ignore[arg-type]
        self.test = None

    def result(self) -> Console:
        unfinished = bool(self.open_steps) or self.training == {} or self.evaluation == {}
        unfinished |= bool(self.training) and len(self.training or {}) < 3
        unfinished |= bool(self.evaluation) and len(self.evaluation or {}) < 4
        unfinished |= self.test is not None and "mean_reward" not in self.test
        self._end_training()
        self._end_evaluation()
        self._end_test()
        following = None if self.header is None else self.header + 1
        self.progress += [dataclasses.replace(line, epoch=following) for line in self.open_steps]
        return Console(
            arguments=tuple(self.arguments),
            pool=self.pool,
            epochs=tuple(self.epochs),
            progress=tuple(self.progress),
            evaluations=tuple(self.evaluations),
            checkpoints=tuple(self.checkpoints),
            best_models=tuple(self.best),
            tests=tuple(self.tests),
            earlier_runs=self.earlier_runs,
            cut_start=self.cut_start,
            cut_end=unfinished,
        )


def _namespace(text: str) -> dict[str, Any] | None:
    """The arguments of a `Namespace(…)` at the beginning of `text`; None if it is cut or not plain values."""
    quote, end = "", None
    for position, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[position - 1] != "\\" else quote
        elif letter in "'\"":
            quote = letter
        elif letter == ")":
            end = position + 1
            break
    if end is None:
        return None
    written = re.sub(r"\n[> ]*", "", text[:end])  # wrapped, perhaps quoted
    try:
        call = ast.parse(written, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        return {str(item.arg): ast.literal_eval(item.value) for item in call.keywords if item.arg is not None}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return None


# --- folder names -------------------------------------------------------------------------------------------------------

_REAL = r"-?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|inf|nan)"
_MODEL = "|".join(POLICIES)
_MODELS = rf"(?:{_MODEL})(?:_(?:{_MODEL}))*"
_TRAINED = re.compile(
    rf"rank_(?P<rank>-?\d+)_w_(?P<w>\d+)_gamma_(?P<gamma>{_REAL})_sfd_(?P<state_feature_dim>\d+)_lr_(?P<lr>{_REAL})"
    rf"_wd_(?P<weight_decay>{_REAL})_warm_(?P<warmup_steps>\d+)_epochs_(?P<epochs>\d+)_seed_(?P<seed>-?\d+)"
)
_TESTED = re.compile(
    rf"(?:early_stop_(?P<early_stop>-?\d+)_)?rank_(?P<rank>-?\d+)_w_(?P<w>\d+)_gamma_(?P<gamma>{_REAL})"
    rf"_tgt_scale_(?P<target_return_scale>{_REAL})_seed_(?P<test_seed>-?\d+)"
)
_SAVED = re.compile(r"early_stop_(?P<early_stop>-?\d+)_(?:best_model|checkpoint|console\.log)")
_POOL_AND_STEP = re.compile(r"(?P<pool>.+)_ss_(?P<sample_step>None|-?\d+)")
_POOL = re.compile(
    rf"(?:(?P<set>.+?_[^_]+)_(?P<models>{_MODELS})|(?P<other_set>[^_]+_[^_]+)_(?P<other>.+))"
    r"_seed_(?P<pool_seed>-?\d+)_trace_num_(?P<pool_trace_num>-?\d+)_fixed_(?P<pool_fixed>True|False)"
)
_POOL_LEAF = re.compile(
    r"seed_(?P<pool_seed>-?\d+)_trace_num_(?P<pool_trace_num>-?\d+)_fixed_(?P<pool_fixed>True|False)"
)
_TEST_SET = re.compile(r"trace_num_(?P<test_trace_num>\d+)_fixed_(?P<test_fixed>True|False)")
_BASELINE = re.compile(r"seed_(?P<test_seed>-?\d+)")
PLM_TYPES = (*dict.fromkeys([*FAMILIES.values(), *ALIASES, "llava"]),)
_PLM = re.compile(rf"(?P<plm_type>{'|'.join(map(re.escape, PLM_TYPES))})_(?P<plm_size>.+)")

_REALS = frozenset({"gamma", "lr", "weight_decay", "target_return_scale"})


def settings_of(path: Path | str) -> dict[str, Any]:
    """The settings that the folder names of a path tell, at whatever level; empty if none of them is one of the original's.

    - pool: `pool` (its name), `train_traces`, `train_video`, `pool_models`, `pool_seed`, `pool_trace_num`, `pool_fixed`
    - training: `plm_type`, `plm_size`, `sample_step`, `rank`, `w`, `gamma`, `state_feature_dim`, `lr`, `weight_decay`,
      `warmup_steps`, `epochs`, `seed`, `early_stop` (the original's `--which-layer`)
    - test: `test_traces`, `test_video`, `test_trace_num`, `test_fixed`, `plm_type`, `plm_size`, `early_stop`, `rank`, `w`, `gamma`,
      `target_return_scale`, `test_seed`; a baseline's: `policy` in place of what belongs to the PLM

    Names of trace sets may hold underscores, names of videos may not.
    """
    parts = str(path).replace("\\", "/").split("/")
    found: dict[str, Any] = {}
    for index, part in enumerate(parts):
        before = parts[index - 1] if index else ""
        following = parts[index + 1] if index + 1 < len(parts) else ""
        if match := _TRAINED.fullmatch(part):
            found |= _typed(match)
        elif match := _TESTED.fullmatch(part):
            found |= _typed(match)
            in_results = index > 1 and _TEST_SET.fullmatch(parts[index - 2]) is not None
            found |= _plm_of(before, in_results)
        elif match := _SAVED.fullmatch(part):
            found |= _typed(match)
        elif match := _POOL_AND_STEP.fullmatch(part):
            found |= _pool_of(match["pool"]) | {"sample_step": _plain(match["sample_step"])}
            found |= _plm_of(before, index > 1 and parts[index - 2] == "ft_plms")
        elif match := _POOL_LEAF.fullmatch(part):
            if index > 1:
                found |= _pool_of("_".join(parts[index - 2 : index + 1]))
        elif match := _TEST_SET.fullmatch(part):
            found |= _typed(match) | _pair(before, "test_traces", "test_video")
            leaf = parts[index + 2] if index + 2 < len(parts) else ""
            if seed := _BASELINE.fullmatch(leaf):
                found |= {"policy": following} | _typed(seed)
    return found


def run_of(path: Path) -> tuple[Path, int] | None:
    """The training run that a file or folder belongs to: its folder `rank_…_seed_…` and the early stop; None if there is none.

    Several early stops share a folder, so both are needed to tell runs apart.
    """
    for place in (path, *path.parents):
        if match := _SAVED.fullmatch(place.name):
            return place.parent, int(match["early_stop"])
    return None


def results_label(folder: Path) -> str:
    """A name for a folder of result files: the one in which its test's settings begin, as a rule `results`."""
    for index, part in enumerate(folder.parts):
        if _TEST_SET.fullmatch(part) and index > 1:
            return folder.parts[index - 2]
    return "results" if _TESTED.fullmatch(folder.name) else folder.name


def _typed(match: re.Match[str]) -> dict[str, Any]:
    return {
        key: float(value) if key in _REALS else _plain(value)
        for key, value in match.groupdict().items()
        if value is not None
    }


def _plain(value: str) -> Any:
    return {"True": True, "False": False, "None": None}[value] if value[0] in "TFN" else int(value)


def _pair(name: str, first: str, second: str) -> dict[str, str]:
    """`<traces>_<video>`, split at the last underscore."""
    traces, _, video = name.rpartition("_")
    return {first: traces, second: video} if traces and video else {}


def _plm_of(name: str, certain: bool) -> dict[str, str]:
    """`<type>_<size>`; of an unknown type only where the place in the path leaves no doubt."""
    if match := _PLM.fullmatch(name):
        return match.groupdict()
    return _pair(name, "plm_type", "plm_size") if certain else {}


def _pool_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"pool": name}
    if match := _POOL.fullmatch(name):
        found |= _pair(match["set"] or match["other_set"], "train_traces", "train_video")
        models = match["models"] or match["other"]
        found["pool_models"] = tuple(re.findall(_MODEL, models)) if match["models"] else (models,)
        numbers = ("pool_seed", "pool_trace_num", "pool_fixed")
        found |= {key: _plain(match[key]) for key in numbers}
    return found


def pool_name(settings: Mapping[str, Any]) -> str:
    """How the folders of a training run call the pool: the last three folders of its path, joined."""
    return "_".join(_pool_parts(settings))


def pool_path(settings: Mapping[str, Any]) -> Path:
    """Where the original's pool generation writes, below `artifacts/exp_pools`."""
    return Path(*_pool_parts(settings), "exp_pool.pkl")


def _pool_parts(settings: Mapping[str, Any]) -> tuple[str, str, str]:
    s = settings
    return (
        f"{s['train_traces']}_{s['train_video']}",
        "_".join(s["pool_models"]),
        f"seed_{s['pool_seed']}_trace_num_{s['pool_trace_num']}_fixed_{s['pool_fixed']}",
    )


def model_path(settings: Mapping[str, Any]) -> Path:
    """Where a training run goes, below `data/ft_plms`."""
    s = settings
    return Path(
        f"{s['plm_type']}_{s['plm_size']}",
        f"{s['pool']}_ss_{s['sample_step']}",
        f"rank_{s['rank']}_w_{s['w']}_gamma_{s['gamma']}_sfd_{s['state_feature_dim']}_lr_{s['lr']}_wd_{s['weight_decay']}"
        f"_warm_{s['warmup_steps']}_epochs_{s['epochs']}_seed_{s['seed']}",
    )


def results_path(settings: Mapping[str, Any]) -> Path:
    """Where a test's result files go, below `artifacts/results`; a baseline's if the settings name a `policy`."""
    s = settings
    test = Path(f"{s['test_traces']}_{s['test_video']}", f"trace_num_{s['test_trace_num']}_fixed_{s['test_fixed']}")
    if "policy" in s:
        return test / s["policy"] / f"seed_{s['test_seed']}"
    return (
        test
        / f"{s['plm_type']}_{s['plm_size']}"
        / f"early_stop_{s['early_stop']}_rank_{s['rank']}_w_{s['w']}_gamma_{s['gamma']}"
        f"_tgt_scale_{s['target_return_scale']}_seed_{s['test_seed']}"
    )
