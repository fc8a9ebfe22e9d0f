"""Traces in and out: mahimahi packet timestamps, CSV, sabre's JSON; chunk sizes from a sabre movie.

A trace's first sample marks where time begins; its bandwidth is never used (see `traces.Trace`). In the CSV it is the first
row; the other two formats have no place for it. A CSV row's bandwidth therefore applies to the time since the row
before. All imported traces begin at 0 s. Mahimahi and sabre define their units; those of a CSV are said by the caller.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from netllm_lib import runs
from netllm_lib.abr.qoe import BITRATES_KBPS, CHUNKS, LEVELS
from netllm_lib.abr.synthetic import write_traces, write_video
from netllm_lib.abr.traces import POINTER_FILE, Registry, Trace, TraceSet, Video
from netllm_lib.config import parse

TO_MBPS = {"Mbps": 1.0, "kbps": 1e-3, "bps": 1e-6, "MB/s": 8.0, "kB/s": 8e-3, "B/s": 8e-6}
TO_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
PACKET_MBIT = 1500 * 8 / 1e6  # what mahimahi lets through at each timestamp
LATENCY_MS = 80.0  # the simulator's round trip, written to sabre files
SUFFIXES = {"mahimahi": ".mahimahi", "csv": ".csv", "sabre": ".json"}


def import_traces(
    source: Path,
    root: Path,
    read: Callable[[Path], Trace],
    *,
    name: str | None = None,
    split: str = "train",
    replace: bool = False,
) -> tuple[TraceSet, Path]:
    """A file, or all files of a folder, as the trace set `<root>/traces/<split>/<name>/`: (trace set, its folder).

    `read` is one of the readers below. Raises ValueError by file for what cannot be read, FileNotFoundError if there are no
    files, and FileExistsError if the root has a trace set of that name, unless `replace`.
    """
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    files = [path for path in files if path.is_file() and not path.name.startswith(".") and path.name != POINTER_FILE]
    if not files:
        raise FileNotFoundError(f"{source}: no such file, or no files in it (folders in it are not searched)")
    name, split = _checked(name or _stem(source)), _checked(split)
    there = Registry(root).trace_folders().get(name)
    _check_free(there, replace and there is not None and there.parent.name == split)
    traces = TraceSet(name, tuple(read(path) for path in files))
    return traces, write_traces(traces, root, split)


def export_traces(traces: TraceSet, folder: Path, form: str) -> Path:
    """Write each trace as a file of a new folder; `form` is one of WRITERS. Start pointers are not exported.

    Raises FileExistsError if the folder has files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: there are files in it; name a new folder")
    with runs.atomic_path(folder) as aside:
        aside.mkdir()
        for trace in traces.traces:
            (aside / f"{trace.name}{SUFFIXES[form]}").write_text(WRITERS[form](trace))
    return folder


def import_movie(path: Path, root: Path, name: str | None = None, replace: bool = False) -> tuple[Video, Path]:
    """A sabre movie as `<root>/videos/<name>_sizes/`: (video, its folder). Errors as of `read_movie` and `import_traces`."""
    name = _checked(name or _stem(path))
    _check_free(Registry(root).video_folders().get(name), replace)
    video = read_movie(path, name)
    return video, write_video(video, root)


def _check_free(there: Path | None, replace: bool) -> None:
    if there is not None and not replace:
        raise FileExistsError(f"{there} is there; give another --name, or --replace it")


def _stem(path: Path) -> str:
    """Names of traces have dots in them: only what `export_traces` adds is taken off."""
    return path.stem if path.suffix in SUFFIXES.values() else path.name


def _checked(name: str) -> str:
    if name.startswith(".") or name != Path(name).name or "\\" in name:
        raise ValueError(f"{name!r} cannot be the name of a folder for traces or a video")
    return name


def _trace(path: Path, time_s: np.ndarray, mbps: np.ndarray) -> Trace:
    """A trace that can be played, beginning at 0 s. Raises ValueError by file and sample."""
    if len(time_s) < 2:
        raise ValueError(f"{path}: {len(time_s)} samples, at least two are needed")
    with np.errstate(invalid="ignore", over="ignore"):  # of times that are not finite, which are refused below
        time_s = np.array([float(f"{value:.10g}") for value in time_s - time_s[0]])  # as trace files have it
        steps_s = np.diff(time_s, prepend=-1)
    bad = ~(np.isfinite(time_s) & np.isfinite(mbps) & (mbps >= 0) & (steps_s > 0))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(
            f"{path}: sample {i + 1} has {mbps[i]:g} Mbps at {time_s[i]:.10g} s; bandwidths must be numbers that are not "
            "negative, and times must increase"
        )
    if not mbps[1:].any():
        raise ValueError(f"{path}: bandwidth is zero throughout")
    return Trace(_stem(path), time_s, mbps)


def read_mahimahi(path: Path, interval_s: float = 1.0) -> Trace:
    """Packet timestamps, one time in milliseconds a line, counted over intervals of `interval_s`.

    The trace ends with the last packet, as mahimahi then begins again; its bytes are those of the packets.
    """
    if not interval_s >= 0.001:
        raise ValueError(f"--interval {interval_s}: give seconds, at least 0.001")
    try:
        stamps = np.array([float(line) for line in path.read_text().split("\n") if line.strip()]) / 1000
    except ValueError as error:
        raise ValueError(f"{path}: expected a packet's time in milliseconds on every line ({error})") from None
    if not len(stamps) or not np.isfinite(stamps).all() or (np.diff(stamps, prepend=0) < 0).any() or stamps[-1] == 0:
        raise ValueError(f"{path}: packet times must be finite, never decrease, and end after 0 ms")
    whole = math.ceil(round(stamps[-1] / interval_s, 9))
    edges_s = np.append(np.arange(whole) * interval_s, stamps[-1])
    # a packet at the edge of two intervals ends the first one; rounding must not carry it over
    counts = np.diff(np.searchsorted(stamps, edges_s + 1e-7, side="right"), prepend=0)
    counts[1] += counts[0]  # packets at 0 ms
    mbps = counts[1:] * PACKET_MBIT / np.diff(edges_s)
    return _trace(path, edges_s, np.append(mbps[0], mbps))


def mahimahi_text(trace: Trace) -> str:
    """Packet timestamps of a trace: at the millisecond by which each 1500 bytes have come together.

    The last line is the trace's end, by which mahimahi knows when to begin again: at any time the bytes so far are within one
    packet of the trace's.
    """
    time_ms = (trace.time_s - trace.time_s[0]) * 1000
    packets = np.append(0.0, np.cumsum(trace.mbps[1:] * np.diff(time_ms) / 1000 / PACKET_MBIT))
    number = np.arange(1, int(packets[-1] + 1e-9) + 1)
    sample = np.minimum(np.searchsorted(packets, number - 1e-9), len(packets) - 1)
    share = (number - packets[sample - 1]) / (packets[sample] - packets[sample - 1])
    stamps = np.ceil(time_ms[sample - 1] + share * np.diff(time_ms)[sample - 1] - 1e-6).astype(np.int64)
    end_ms = max(math.ceil(time_ms[-1] - 1e-6), 1)
    if not len(stamps) or stamps[-1] < end_ms:
        stamps = np.append(stamps, end_ms)
    return "\n".join(map(str, stamps.tolist())) + "\n"


def read_csv(path: Path, unit: str, bandwidth: str = "mbps", time: str = "time_s", time_unit: str = "s") -> Trace:
    """The columns `bandwidth` (in `unit`, one of TO_MBPS) and `time` (in `time_unit`, one of TO_S) of a table with a header.

    Fields are separated by comma, semicolon or tab. Raises ValueError by file and line.
    """
    if unit not in TO_MBPS:
        raise ValueError(f"--unit {unit or '(none)'}: name the unit of bandwidths, one of {', '.join(TO_MBPS)}")
    if time_unit not in TO_S:
        raise ValueError(f"--time-unit {time_unit}: name the unit of times, one of {', '.join(TO_S)}")
    samples = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as stream:
        separator = max(",;\t", key=stream.readline().count)
        stream.seek(0)
        rows = csv.DictReader(stream, delimiter=separator, strict=True)
        try:
            header = rows.fieldnames or []
            for option, column in (("--time", time), ("--bandwidth", bandwidth)):
                if header.count(column) != 1:
                    raise ValueError(f"no column {column!r}; name one of {', '.join(header) or 'none'} with {option}")
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"another number of fields than the header's {len(header)}")
                samples.append((float(row[time]) * TO_S[time_unit], float(row[bandwidth]) * TO_MBPS[unit]))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}:{max(rows.line_num, 1)}: {error}") from None
    time_s, mbps = np.array(samples, dtype=float).reshape(-1, 2).T
    return _trace(path, time_s, mbps)


def csv_text(trace: Trace) -> str:
    """Columns time_s and mbps, every digit kept."""
    return pd.DataFrame({"time_s": trace.time_s, "mbps": trace.mbps}).to_csv(index=False)


@dataclass(frozen=True)
class Period:
    """A part of a sabre trace. Its latency is not read: the simulator's is 80 ms."""

    duration_ms: float
    bandwidth_kbps: float
    latency_ms: float = LATENCY_MS


def read_sabre(path: Path) -> Trace:
    """A list of periods with constant bandwidth."""
    periods: list[Period] = parse(list[Period], runs.read_json(path), str(path))
    end_s = np.cumsum([period.duration_ms / 1000 for period in periods])
    mbps = [period.bandwidth_kbps / 1000 for period in periods]
    return _trace(path, np.append(0.0, end_s), np.array([*mbps[:1], *mbps]))


def sabre_text(trace: Trace) -> str:
    """Periods between a trace's samples."""
    steps_ms, kbps = np.diff(trace.time_s) * 1000, trace.mbps[1:] * 1000
    periods = [Period(round(ms, 6), round(rate, 6)) for ms, rate in zip(steps_ms.tolist(), kbps.tolist(), strict=True)]
    return json.dumps(runs.plain(periods), indent=1) + "\n"


@dataclass(frozen=True)
class Movie:
    """Chunk sizes as sabre has them."""

    segment_duration_ms: float
    bitrates_kbps: list[float]
    segment_sizes_bits: list[list[float]]  # by segment and bitrate


def read_movie(path: Path, name: str) -> Video:
    """Chunk sizes of a sabre movie.

    Raises ValueError unless it has the six bitrates of the reward (within 10 %), 4-second chunks, and at least 48 of them.
    """
    movie: Movie = parse(Movie, runs.read_json(path), str(path))
    kbps, segments = np.array(movie.bitrates_kbps), movie.segment_sizes_bits
    if movie.segment_duration_ms != 4000 or len(segments) < CHUNKS or {len(sizes) for sizes in segments} != {LEVELS}:
        raise ValueError(f"{path}: at least {CHUNKS} segments of 4000 ms with {LEVELS} sizes each are needed")
    if len(kbps) != LEVELS or not np.allclose(kbps, BITRATES_KBPS, rtol=0.1, atol=0):
        raise ValueError(f"{path}: the bitrates must be {BITRATES_KBPS.tolist()} kbps (within 10 %), as in the reward")
    bits = np.array(segments).T
    ratio = bits.mean(axis=1) / 4000 / kbps
    if bits.min() < 8 or ratio.max() > 4 or ratio.min() < 1 / 4:
        raise ValueError(f"{path}: mean sizes are {np.round(ratio, 3).tolist()} times the bitrates: are they in bits?")
    return Video(name, np.ceil(bits / 8).astype(np.int64))


WRITERS: dict[str, Callable[[Trace], str]] = {"mahimahi": mahimahi_text, "csv": csv_text, "sabre": sabre_text}
