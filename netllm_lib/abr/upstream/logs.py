"""What a run of the original leaves behind as text: result files, training losses and console logs.

The console log does not hold the `Namespace(…)` line with all arguments: the original prints that before it opens the log, so
only a copy of the terminal has it. `read_console` understands both.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from netllm_lib import runs
from netllm_lib.abr import qoe
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.traces import TraceSet

RESULT_PREFIX = "result_sim_abr_"
RESULT_COLUMNS = (
    "time_s", "bitrate_kbps", "buffer_s", "rebuffer_s", "size_bytes", "delay_ms", "smoothness_mbps", "reward",
)  # fmt: skip
"""Of a result file, tab-separated, in this order."""
MOST_RESULT_BYTES = 1_000_000
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|inf|nan)"
_NUMBER_ALONE = re.compile(_NUMBER)


# --- result files -------------------------------------------------------------------------------------------------------


def read_result_file(path: Path) -> pd.DataFrame:
    """The 48 chunks of one `result_sim_abr_…` file, in the columns of `play`'s table: chunk, level, bitrate_kbps, …

    Raises ValueError naming file, line and value for a file that is cut, has other columns, a number that is not finite, a bitrate
    that is not one of the six, or a reward or smoothness that does not follow from the rest of the line.
    """
    lines = runs.read_text(path, MOST_RESULT_BYTES).rstrip("\n").split("\n")
    rows = [line.split("\t") for line in lines[:CHUNKS]]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(RESULT_COLUMNS):
            said = f"{len(row)} columns, expected {len(RESULT_COLUMNS)}: {lines[number - 1][:60]!r}"
            raise ValueError(f"{path}:{number}: {said}")
        for column, field in zip(RESULT_COLUMNS, row, strict=True):
            if not _NUMBER_ALONE.fullmatch(field) or not np.isfinite(float(field)):
                raise ValueError(f"{path}:{number}: {column} is {field[:30]!r}, not a finite number")
    if len(lines) != CHUNKS:
        raise ValueError(f"{path}: {len(lines)} lines, a result file has {CHUNKS}")
    table = pd.DataFrame(rows, columns=list(RESULT_COLUMNS), dtype=np.float64)
    _check_chunks(table, path)
    table = table.astype({"bitrate_kbps": np.int64, "size_bytes": np.int64})
    table["chunk"] = np.arange(CHUNKS)
    table["level"] = np.searchsorted(qoe.BITRATES_KBPS, table["bitrate_kbps"])
    return table[["chunk", "level", *RESULT_COLUMNS[1:], "time_s"]]


def _check_chunks(table: pd.DataFrame, path: Path) -> None:
    kbps, stall, change, size = (
        table[name].to_numpy() for name in ("bitrate_kbps", "rebuffer_s", "smoothness_mbps", "size_bytes")
    )
    # the first chunk's change is that from the level before the video; a modified original may start at another one
    changes = np.append(change[0], np.abs(np.diff(kbps)) / 1000)
    reward = kbps / 1000 - qoe.REBUFFER_PENALTY * stall - change
    checks: list[tuple[str, Any, str]] = [
        ("bitrate_kbps", ~np.isin(kbps, qoe.BITRATES_KBPS), f"not one of {qoe.BITRATES_KBPS.tolist()}"),
        ("size_bytes", (size <= 0) | (size != np.floor(size)) | (size > 2**53), "not a number of bytes"),
        *((name, table[name] < 0, "which cannot be negative") for name in ("buffer_s", "rebuffer_s", "delay_ms")),
        ("smoothness_mbps", ~np.isclose(change, changes, rtol=0, atol=1e-6), "which is not the change of the bitrate"),
        (
            "reward",
            ~np.isclose(table["reward"], reward, rtol=1e-9, atol=1e-6),
            "which does not follow from bitrate, rebuffering and smoothness",
        ),
    ]
    for column, bad, reason in checks:
        for row in np.flatnonzero(bad)[:1]:
            raise ValueError(f"{path}:{row + 1}: {column} is {table[column].iloc[row]:.6g}, {reason}")


def result_files(folder: Path) -> list[Path]:
    """The `result_sim_abr_*` files directly in a folder, sorted by name."""
    return sorted(path for path in folder.glob(f"{RESULT_PREFIX}*") if path.is_file())


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
    """All result files directly in a folder as one table of chunks, with the column `trace`, in the order in which the traces were
    played: the original's clock runs on from one to the next.

    `traces` shortens the names, see `trace_of`. Raises FileNotFoundError if there are no result files, and ValueError for the
    first one that is broken.
    """
    parts: list[pd.DataFrame] = []
    for path in result_files(folder):
        parts.append(read_result_file(path))
        parts[-1].insert(0, "trace", trace_of(path.name, traces))
    if not parts:
        raise FileNotFoundError(f"{folder}: no {RESULT_PREFIX}* files in it")
    parts.sort(key=lambda part: float(part["time_s"].iloc[0]))  # stable: by name where the clock does not tell
    return pd.concat(parts, ignore_index=True)


# --- training losses ----------------------------------------------------------------------------------------------------


class Losses(NamedTuple):
    """The content of `train_losses.txt`."""

    values: np.ndarray  # [micro-steps] float64, one per window in the order of training, epochs joined; may hold NaN
    truncated: bool  # the last line was cut and is left out


def train_losses(path: Path) -> Losses:
    """The losses that the original writes when training has ended, one `%.6f` a line.

    A last line without its end is a cut one: it is left out and reported. Raises ValueError naming file, line and value for
    anything else that is not a number, and for a file without any.
    """
    *lines, last = runs.read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not _NUMBER_ALONE.fullmatch(line):
            raise ValueError(f"{path}:{number}: {line[:40]!r} is not a loss")
    if not lines:
        raise ValueError(f"{path}: no losses in it")
    return Losses(np.array(lines, dtype=np.float64), bool(last))


# --- console log --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Epoch:
    """What is printed about an epoch of training; None what is not."""

    epoch: int  # from 0
    loss_mean: float | None = None  # over the epoch's windows
    loss_std: float | None = None
    seconds: float | None = None  # of training
    episodes_return: float | None = None  # of an evaluation on the test traces: sum of the normalised rewards / scale
    saved: bool = False  # as the best model so far


@dataclasses.dataclass
class Console:
    """A console log of the original, or as much of it as there is."""

    arguments: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of every `Namespace(…)` line
    epochs: list[Epoch] = dataclasses.field(default_factory=list)
    folders: list[str] = dataclasses.field(default_factory=list)  # of checkpoints and best models, as they were saved
    model: str | None = None  # folder that the last test's weights came from
    mean_reward: float | None = None  # of the last test
    earlier_runs: int = 0  # trainings in the same text before this one; they are left out
    cut: bool = False  # begins or ends in the middle of a run

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights are in the folder of the best model."""
        return next((epoch.epoch for epoch in reversed(self.epochs) if epoch.saved), None)


_EPOCH_KEYS = {
    "time/training": "seconds",
    "training/train_loss_mean": "loss_mean",
    "training/train_loss_std": "loss_std",
    "episodes_return": "episodes_return",
}
_MOST_LINE = 20_000  # characters; the longest line of the original, its arguments, has about a thousand
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_EVENT = re.compile(
    r"Step\s+\d+\s+-\s+mean train loss\s+(?P<step>\S)"
    r"|Training Iteration #(?P<epoch>\d{1,9}) "
    # NumPy 2 prints np.float64(1.5) for 1.5
    rf"|'(?P<key>[\w/]+)':\s*(?:np\.float\d+\()?(?P<value>{_NUMBER})(?=\s*[,}})])"
    r"|Checkpoint saved at:\s*(?P<checkpoint>\S.*)"
    r"|Best model saved at:\s*(?P<best>\S.*)"
    r"|Load model from:\s*(?P<model>\S.*)"
    rf"|Mean reward:\s*(?P<mean>{_NUMBER})"
    r"|(?P<arguments>Namespace\(.*)"
)


def read_console(source: Path | str) -> Console:
    """What the original printed: `source` is a log file (a Path) or the text itself (a str).

    The beginning and the end may be cut, and lines of other programs or marks of a mail may stand in between. Raises ValueError if
    no line of the original's is in it. If the text holds several training runs, the last one is returned. Takes time in
    proportion to the text.
    """
    text = source if isinstance(source, str) else runs.read_text(source)
    *lines, _ = _ESCAPES.sub("", text).split("\n")  # what follows the last end of a line is cut
    console, known, running = Console(), False, False
    for event in (event for line in lines if len(line) <= _MOST_LINE for event in _EVENT.finditer(line)):
        kind, said = str(event.lastgroup), event[event.lastgroup or 0].strip()
        now = console.epochs[-1] if console.epochs else Epoch(-1)  # the numbers before the first epoch's line are lost
        match kind:
            case "step":  # an epoch's progress comes before its line, its numbers and evaluation after it
                running = True
            case "epoch":
                if int(said) <= now.epoch:  # training began anew
                    console = Console(arguments=console.arguments, earlier_runs=console.earlier_runs + 1)
                console.cut |= not console.epochs and int(said) > 0
                console.epochs.append(Epoch(int(said)))
                running = False
            case "value" if event["key"] in _EPOCH_KEYS:
                setattr(now, _EPOCH_KEYS[event["key"]], float(said))
            case "value" if event["key"] != "mean_reward":
                continue
            case "value" | "mean":
                console.mean_reward = float(said)
            case "arguments":
                if (arguments := _namespace(said)) is None:
                    continue
                console.arguments.append(arguments)
            case "model":
                console.model, console.mean_reward = said, None
            case _:
                console.folders.append(said)
                now.saved |= kind == "best"
        known = True
    if not known:
        what = "the text" if isinstance(source, str) else source
        raise ValueError(
            f"{what}: no line that the original prints in it (such as 'Step 0 - mean train loss  2.119107')"
        )
    unfinished = bool(console.epochs) and console.epochs[-1].loss_std is None
    console.cut |= running or unfinished or (console.model is not None and console.mean_reward is None)
    return console


def is_console(path: Path) -> bool:
    """Whether a file begins as a log of the original's does."""
    try:
        with open(path, "rb") as stream:
            return bool(read_console(runs.decoded(stream.read(200_000))))
    except (ValueError, OSError):
        return False


def _namespace(text: str) -> dict[str, Any] | None:
    """The arguments of a `Namespace(…)`; None if it is not a list of names and plain values."""
    try:
        call: Any = ast.parse(text[: text.rindex(")") + 1], mode="eval").body
        return {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
    except (SyntaxError, ValueError, TypeError, AttributeError, MemoryError, RecursionError):
        return None
