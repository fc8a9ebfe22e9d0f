"""Traces of other tools: mahimahi packet timestamps, CSV, sabre's JSON.

A trace's first sample marks where time begins; its bandwidth is never used (see `traces.Trace`). In the CSV it is the first
row; the other two formats have no place for it. A CSV row's bandwidth therefore applies to the time since the row
before. All imported traces begin at 0 s. Mahimahi and sabre define their units; those of a CSV are said by the caller.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from netllm_lib import runs
from netllm_lib.abr.synthetic import write_traces
from netllm_lib.abr.traces import POINTER_FILE, Registry, Trace, TraceSet
from netllm_lib.config import parse

TO_MBPS = {"Mbps": 1.0, "kbps": 1e-3, "bps": 1e-6, "MB/s": 8.0, "kB/s": 8e-3, "B/s": 8e-6}
TO_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
PACKET_MBIT = 1500 * 8 / 1e6  # what mahimahi lets through at each timestamp
MOST_S = 1_000_000  # eleven days


def import_traces(
    source: Path,
    root: Path,
    read: Callable[[Path], Trace],
    *,
    name: str | None = None,
    split: str = "train",
) -> tuple[TraceSet, Path]:
    """A file, or all files of a folder, as the trace set `<root>/traces/<split>/<name>/`: (trace set, its folder).

    `read` is one of the readers below. Raises ValueError by file for what cannot be read, FileNotFoundError if there are no
    files, and FileExistsError if the root has a trace set of that name.
    """
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [path for path in files if path.is_file() and not path.name.startswith(".") and path.name != POINTER_FILE]
    if not files:
        raise FileNotFoundError(f"{source}: no such file, or no files in it (folders in it are not searched)")
    name = name or (source.name if source.is_dir() else source.stem)
    for word in (name, split):
        if word.startswith(".") or word != Path(word).name or "\\" in word:
            raise ValueError(f"{word!r} cannot be the name of a folder for traces")
    if (there := Registry(root).trace_folders().get(name)) is not None:
        raise FileExistsError(f"{there} is there; give another --name, or remove it")
    traces = TraceSet(name, tuple(read(path) for path in files))
    return traces, write_traces(traces, root, split)


def _trace(path: Path, time_s: np.ndarray, mbps: np.ndarray) -> Trace:
    """A trace that begins at 0 s. Raises ValueError by file and sample if it cannot be played."""
    known = path.suffix in (".mahimahi", ".csv", ".json")  # names of traces may have dots in them
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # of times that are not finite, which are refused
            time_s = np.array([float(f"{value:.10g}") for value in time_s - time_s[:1]])  # as trace files have it
            return Trace(path.stem if known else path.name, time_s, mbps)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_mahimahi(path: Path) -> Trace:
    """Packet timestamps, one time in milliseconds a line, counted over intervals of a second.

    The trace ends with the last packet, as mahimahi then begins again; its bytes are those of the packets.
    """
    stamps = []
    for number, line in enumerate(runs.read_text(path).split("\n"), start=1):
        try:
            stamps += [float(line) / 1000] if line.strip() else []
        except ValueError:
            raise ValueError(f"{path}:{number}: expected a packet's time in ms, found {line[:60]!r}") from None
    if not np.isfinite(stamps).all() or (np.diff(stamps, prepend=0) < 0).any() or not any(stamps):
        raise ValueError(f"{path}: packet times must be finite, never decrease, and end after 0 ms")
    if stamps[-1] > MOST_S:
        raise ValueError(f"{path}: it ends after {stamps[-1]:g} s, more than {MOST_S} s")
    edges_s = np.append(np.arange(math.ceil(round(stamps[-1], 9))), stamps[-1])
    # a packet at the edge of two intervals ends the first one; rounding must not carry it over
    counts = np.diff(np.searchsorted(stamps, edges_s + 1e-7, side="right"), prepend=0)
    counts[1] += counts[0]  # packets at 0 ms
    mbps = counts[1:] * PACKET_MBIT / np.diff(edges_s)
    return _trace(path, edges_s, np.append(mbps[0], mbps))


def read_csv(path: Path, unit: str, bandwidth: str = "mbps", time: str = "time_s", time_unit: str = "s") -> Trace:
    """The columns `bandwidth` (in `unit`, one of TO_MBPS) and `time` (in `time_unit`, one of TO_S) of a table with a header.

    Fields are separated by comma, semicolon or tab. Raises ValueError by file and line.
    """
    for option, word, known in (("--unit", unit, TO_MBPS), ("--time-unit", time_unit, TO_S)):
        if word not in known:
            raise ValueError(f"{option} {word or '(none)'}: name the unit, one of {', '.join(known)}")
    lines, samples = runs.read_text(path).split("\n"), []
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=lines[0].count), strict=True)
    try:
        header = rows.fieldnames or []
        for option, column in (("--time", time), ("--bandwidth", bandwidth)):
            if header.count(column) != 1:
                raise ValueError(f"no column {column!r}; name one of {header!r:.200} with {option}")
        for row in rows:
            if None in row or None in row.values():
                raise ValueError(f"another number of fields than the header's {len(header)}")
            samples.append((float(row[time]) * TO_S[time_unit], float(row[bandwidth]) * TO_MBPS[unit]))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}:{max(rows.line_num, 1)}: {error!s:.200}") from None
    time_s, mbps = np.array(samples, dtype=float).reshape(-1, 2).T
    return _trace(path, time_s, mbps)


@dataclass(frozen=True)
class Period:
    """A part of a sabre trace. Its latency is not used: the simulator's is 80 ms."""

    duration_ms: float
    bandwidth_kbps: float
    latency_ms: float = 0.0


def read_sabre(path: Path) -> Trace:
    """A list of periods with constant bandwidth."""
    periods: list[Period] = parse(list[Period], runs.read_json(path), str(path))
    end_s = np.cumsum([period.duration_ms / 1000 for period in periods])
    mbps = [period.bandwidth_kbps / 1000 for period in periods]
    return _trace(path, np.append(0.0, end_s), np.array([*mbps[:1], *mbps]))
