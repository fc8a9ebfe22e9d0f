"""Traces in and out: mahimahi packet timestamps, CSV, sabre's JSON; chunk sizes from a sabre movie.

A trace's first sample marks where time begins; its bandwidth is never used (see `traces.Trace`). In the CSV it is the first
row; the other two formats have no place for it. A CSV row's bandwidth therefore applies to the time since the row
before. All imported traces begin at 0 s.

Units are read from the format, the CSV's header, or what the user says. Unless the user says it, mean bandwidth and time
step must be plausible (`units.PLAUSIBLE_MBPS`, `PLAUSIBLE_STEP_S`): this catches kbit/s and bytes/s read as Mbps, and
milliseconds read as seconds. (A factor of 8, bits for bytes, stays in the range and cannot be caught so.)
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from netllm_lib import runs
from netllm_lib.abr import synthetic
from netllm_lib.abr.qoe import BITRATES_KBPS, LEVELS
from netllm_lib.abr.traces import CHUNKS, POINTER_FILE, Registry, Trace, TraceSet, Video
from netllm_lib.abr.units import (
    TO_MBPS,
    TO_S,
    bandwidth_unit_of,
    check_bandwidth,
    check_packet_times,
    check_step,
    epoch_unit,
    time_unit_of,
)

PACKET_BYTES = 1500  # what mahimahi lets through at each timestamp
LATENCY_MS = 80.0  # the simulator's round trip, written to sabre files
SUFFIXES = {"mahimahi": ".mahimahi", "csv": ".csv", "sabre": ".json"}


@dataclass(frozen=True)
class Reading:
    """How files are to be read. What is None is found out, and then checked for plausibility."""

    time: str | None = None  # CSV column
    bandwidth: str | None = None  # CSV column
    unit: str | None = None  # one of TO_MBPS
    time_unit: str | None = None  # one of TO_S
    interval_s: float = 1.0  # mahimahi: packets are counted over intervals of this length

    def __post_init__(self) -> None:
        for option, value, known in (("--unit", self.unit, TO_MBPS), ("--time-unit", self.time_unit, TO_S)):
            if value is not None and value not in known:
                raise ValueError(f"{option} {value}: give one of {', '.join(known)}")
        if not (math.isfinite(self.interval_s) and self.interval_s >= 0.001):
            raise ValueError(f"--interval {self.interval_s}: give seconds, at least 0.001")


# --- folders of files ---------------------------------------------------------------------------------------------------


def import_traces(
    source: Path,
    root: Path,
    form: str,
    *,
    name: str | None = None,
    split: str = "train",
    reading: Reading = Reading(),
    replace: bool = False,
) -> tuple[TraceSet, Path]:
    """A file, or all files of a folder, as the trace set `<root>/traces/<split>/<name>/`: (trace set, its folder).

    `form` is one of SUFFIXES. Raises ValueError by file and line for what cannot be read, and for implausible units;
    FileNotFoundError if there are no files; FileExistsError if the root has a trace set of that name, unless `replace`.
    """
    source, root = Path(source), Path(root)
    files = _source_files(source)
    name = name or _stem(source, form)
    _check_name("trace set", name)
    _check_name("split", split)
    there = Registry(root).trace_folders().get(name)
    if there is not None and not (replace and there.parent.name == split):
        raise FileExistsError(
            f"{there}: a trace set {name!r} is there; give --name" + (", or --replace" * (not replace))
        )
    stems = [_stem(path, form) for path in files]
    names = stems if len(set(stems)) == len(stems) else [path.name for path in files]
    traces = TraceSet(name, tuple(READERS[form](path, n, reading) for path, n in zip(files, names, strict=True)))
    return traces, synthetic.write_traces(traces, root, split)


def export_traces(traces: TraceSet, folder: Path, form: str) -> Path:
    """Write each trace as a file of a new folder. Start pointers are not exported. Raises FileExistsError if it has files."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: there are files in it; name a new folder")
    with runs.atomic_path(folder) as aside:
        aside.mkdir()
        for trace in traces.traces:
            (aside / f"{trace.name}{SUFFIXES[form]}").write_text(WRITERS[form](trace))
    return folder


def import_movie(path: Path, root: Path, name: str | None = None, replace: bool = False) -> tuple[Video, Path]:
    """A sabre movie as `<root>/videos/<name>_sizes/`: (video, its folder). Errors as of `read_movie` and `import_traces`."""
    path, root = Path(path), Path(root)
    name = name or path.name.removesuffix(".json")
    _check_name("video", name)
    there = Registry(root).video_folders().get(name)
    if there is not None and not replace:
        raise FileExistsError(f"{there}: a video {name!r} is there; give --name, or --replace")
    video = read_movie(path, name)
    return video, synthetic.write_video(video, root)


def _source_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder")
    files = sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith(".") and p.name != POINTER_FILE)
    if not files:
        raise FileNotFoundError(f"{source}: no files in it (folders in it are not searched)")
    return files


def _stem(path: Path, form: str) -> str:
    """Names of traces have dots in them: only what `export_traces` adds is taken off."""
    return path.name.removesuffix(SUFFIXES[form])


def _check_name(what: str, name: str) -> None:
    if not name or name.startswith(".") or "/" in name or "\\" in name or name == POINTER_FILE:
        raise ValueError(f"{name!r} cannot be the name of a {what}")


# --- plausibility -------------------------------------------------------------------------------------------------------


def _trace(
    path: Path, name: str, time: np.ndarray, bandwidth: np.ndarray, unit: str, time_unit: str, reading: Reading
) -> Trace:
    """The trace of times and bandwidths in these units, unless they are implausible and the user did not say them."""
    if len(time) < 2:
        raise ValueError(f"{path}: {len(time)} samples, at least two are needed")
    steps = np.diff(time)
    if reading.time_unit is None:
        check_step(path, float(np.median(steps)), time_unit)
    mean = float(np.average(bandwidth[1:], weights=steps))
    if mean == 0:
        raise ValueError(f"{path}: bandwidth is zero throughout, no chunk would ever arrive")
    if reading.unit is None:
        check_bandwidth(path, mean, unit)
    seconds = (time - time[0]) * TO_S[time_unit]
    written = np.array([float(f"{value:.10g}") for value in seconds])  # as trace files have it
    if (np.diff(written) <= 0).any():
        raise ValueError(f"{path}: samples at {seconds[1 + int(np.argmin(np.diff(written)))]} s are too close together")
    return Trace(name, seconds, bandwidth * TO_MBPS[unit])


# --- mahimahi -----------------------------------------------------------------------------------------------------------


def read_mahimahi(path: Path, name: str, reading: Reading = Reading()) -> Trace:
    """Packet timestamps, one whole millisecond a line, counted over intervals of `reading.interval_s`.

    The trace ends with the last packet, as mahimahi then begins again; its bytes are those of the packets.
    """
    stamps = _packet_stamps(path)
    if not len(stamps) or stamps[-1] == 0:
        raise ValueError(f"{path}: {len(stamps)} packets in no time; at least one after 0 ms is needed")
    unit = reading.time_unit or "ms"
    packet_s = stamps * TO_S[unit]
    end_s = packet_s[-1]
    if reading.time_unit is None:
        check_packet_times(path, len(stamps) * PACKET_BYTES * 8 / 1e6 / end_s)
    whole = math.ceil(round(end_s / reading.interval_s, 9))
    edges_s = np.append(np.arange(whole) * reading.interval_s, end_s)
    # a packet at the edge of two intervals ends the first one; rounding must not carry it over
    counts = np.diff(np.searchsorted(packet_s, edges_s + 1e-7, side="right"), prepend=0)
    counts[1] += counts[0]  # packets at 0 ms
    mbps = np.append(0.0, counts[1:] * (PACKET_BYTES * 8 / 1e6) / np.diff(edges_s))
    mbps[0] = mbps[1]
    said = Reading(unit="Mbps", time_unit="s")
    return _trace(path, name, edges_s, mbps, "Mbps", "s", said)


def _packet_stamps(path: Path) -> np.ndarray:
    """[packets] int64. There may be millions: only a broken file is read line by line, to say where."""
    lines = path.read_text(errors="replace").split("\n")
    stamps = [line.strip() for line in lines if line.strip()]
    try:
        if not "".join(stamps).isascii() or not "".join(stamps).isdigit():
            raise ValueError
        numbers = np.array(stamps).astype(np.int64)
        if (numbers[1:] >= numbers[:-1]).all():
            return numbers
    except (ValueError, OverflowError):
        if not stamps:
            return np.zeros(0, dtype=np.int64)
    before = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not re.fullmatch(r"\s*[0-9]{1,18}\s*", line):
            raise ValueError(f"{path}:{number}: expected a packet's time in whole milliseconds, found {line[:60]!r}")
        if int(line) < before:
            raise ValueError(f"{path}:{number}: time {int(line)} decreases (the packet before has {before})")
        before = int(line)
    raise ValueError(f"{path}: packet times cannot be read")


def mahimahi_text(trace: Trace) -> str:
    """Packet timestamps of a trace: at the millisecond by which each 1500 bytes have come together.

    The last line is the trace's end, by which mahimahi knows when to begin again: at any time the bytes so far are within one
    packet of the trace's.
    """
    time_ms = (trace.time_s - trace.time_s[0]) * 1000
    packets = np.append(0.0, np.cumsum(trace.mbps[1:] * np.diff(time_ms) * 1000 / 8 / PACKET_BYTES))
    number = np.arange(1, int(packets[-1] + 1e-9) + 1)
    sample = np.minimum(np.searchsorted(packets, number - 1e-9), len(packets) - 1)
    share = (number - packets[sample - 1]) / (packets[sample] - packets[sample - 1])
    stamps = np.ceil(time_ms[sample - 1] + share * np.diff(time_ms)[sample - 1] - 1e-6).astype(np.int64)
    end_ms = max(math.ceil(time_ms[-1] - 1e-6), 1)
    if not len(stamps) or stamps[-1] < end_ms:
        stamps = np.append(stamps, end_ms)
    return "\n".join(map(str, stamps.tolist())) + "\n"


# --- CSV ----------------------------------------------------------------------------------------------------------------


def read_csv(path: Path, name: str, reading: Reading = Reading()) -> Trace:
    """Two columns of a table with a header; fields are separated by comma, semicolon or tab.

    Columns that are not named in `reading` are found by their headers. Times may count from 1970.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    first = next((line for line in lines if line.strip()), "")
    separator = max(",;\t", key=first.count)
    rows = csv.reader(io.StringIO("\n".join(lines)), delimiter=separator, strict=True)
    header: list[str] = []
    columns = (0, 0)
    times: list[float] = []
    rates: list[float] = []
    for row in _csv_rows(path, rows):
        where = f"{path}:{rows.line_num}"
        if not header:
            header = [field.strip() for field in row]
            columns = _columns(where, header, reading)
            continue
        if len(row) != len(header):
            raise ValueError(f"{where}: {len(row)} fields, the header has {len(header)}")
        time, rate = (_number(where, header[i], row[i]) for i in columns)
        if rate < 0:
            raise ValueError(f"{where}: negative bandwidth {rate:g} in column {header[columns[1]]!r}")
        if times and time <= times[-1]:
            raise ValueError(f"{where}: time {row[columns[0]]} does not increase (the row before has {times[-1]:.15g})")
        times.append(time)
        rates.append(rate)
    if not header:
        raise ValueError(f"{path}: empty file")
    time_header, rate_header = (header[i] for i in columns)
    unit = reading.unit or bandwidth_unit_of(rate_header)[1] or "Mbps"
    time_unit = reading.time_unit or time_unit_of(time_header)[1] or "s"
    if times and reading.time_unit is None and (epoch := epoch_unit(times[0])):
        if time_unit_of(time_header)[1] not in (None, epoch):
            raise ValueError(
                f"{path}: times of column {time_header!r} begin at {times[0]:.15g}, which is a date in {epoch}; give --time-unit "
                f"{epoch}, as is likely, or --time-unit {time_unit} if that is meant"
            )
        time_unit = epoch
    return _trace(path, name, np.array(times), np.array(rates), unit, time_unit, reading)


def _csv_rows(path: Path, rows: Any) -> Any:
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}:{rows.line_num}: {error}") from None
        if any(field.strip() for field in row):
            yield row


def _columns(where: str, header: list[str], reading: Reading) -> tuple[int, int]:
    """Indices of the time and the bandwidth column. Raises ValueError if they cannot be told."""
    if all(re.fullmatch(r"[-+.eE0-9]+", field) for field in header):
        raise ValueError(f"{where}: a header with names of columns is needed, found {','.join(header)[:60]!r}")
    chosen = []
    for option, named, known in (
        ("--time", reading.time, time_unit_of),
        ("--bandwidth", reading.bandwidth, bandwidth_unit_of),
    ):
        found = [i for i, field in enumerate(header) if (field == named if named is not None else known(field)[0])]
        if len(found) != 1:
            said = f"no column {named!r}" if named is not None else f"{len(found)} columns look like it"
            if named is not None and found:
                said = f"{len(found)} columns {named!r}"
            raise ValueError(f"{where}: {said}; name one of {', '.join(header)} with {option}")
        chosen.append(found[0])
    return chosen[0], chosen[1]


def _number(where: str, column: str, field: str) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: expected a number in column {column!r}, found {field[:60]!r}")
    return value


def csv_text(trace: Trace) -> str:
    """Columns time_s and mbps, every digit kept."""
    rows = zip(trace.time_s.tolist(), trace.mbps.tolist(), strict=True)
    return "".join(["time_s,mbps\n", *(f"{time_s!r},{mbps!r}\n" for time_s, mbps in rows)])


# --- sabre --------------------------------------------------------------------------------------------------------------


def read_sabre(path: Path, name: str, reading: Reading = Reading()) -> Trace:
    """A list of periods with duration_ms and bandwidth_kbps. Their latency is left out: the simulator's is 80 ms."""
    periods = _json(path)
    if not isinstance(periods, list) or not periods:
        raise ValueError(f"{path}: expected a list of periods with duration_ms and bandwidth_kbps")
    figures = []
    for number, period in enumerate(periods, start=1):
        where = f"{path}: period {number}"
        if not isinstance(period, dict):
            raise ValueError(
                f"{where}: expected an object with duration_ms and bandwidth_kbps, found {str(period)[:60]}"
            )
        duration, bandwidth = (_figure(where, period, key) for key in ("duration_ms", "bandwidth_kbps"))
        if duration <= 0 or bandwidth < 0:
            raise ValueError(f"{where}: duration_ms {duration:g}, bandwidth_kbps {bandwidth:g}: negative, or no time")
        figures.append((duration, bandwidth))
    table = np.array(figures)
    time = np.append(0.0, np.cumsum(table[:, 0]))
    bandwidth_kbps = np.append(table[0, 1], table[:, 1])
    return _trace(path, name, time, bandwidth_kbps, reading.unit or "kbps", reading.time_unit or "ms", reading)


def sabre_text(trace: Trace) -> str:
    """Periods between a trace's samples."""
    steps_ms, kbps = np.diff(trace.time_s) * 1000, trace.mbps[1:] * 1000
    lines = [
        json.dumps({"duration_ms": round(ms, 6), "bandwidth_kbps": round(rate, 6), "latency_ms": LATENCY_MS})
        for ms, rate in zip(steps_ms.tolist(), kbps.tolist(), strict=True)
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def read_movie(path: Path, name: str) -> Video:
    """Chunk sizes of a sabre movie: segment_duration_ms, bitrates_kbps, segment_sizes_bits by segment and bitrate.

    Raises ValueError unless it has the six bitrates of the reward (within 10 %), 4-second chunks, and at least 48 of them.
    """
    movie = _json(path)
    if not isinstance(movie, dict):
        raise ValueError(f"{path}: expected an object with segment_duration_ms, bitrates_kbps and segment_sizes_bits")
    missing = [k for k in ("segment_duration_ms", "bitrates_kbps", "segment_sizes_bits") if k not in movie]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing; is it a sabre movie?")
    duration = _figure(f"{path}", movie, "segment_duration_ms")
    if duration != 4000:
        raise ValueError(f"{path}: chunks of {duration:g} ms; the simulator plays chunks of 4000 ms, encode it anew")
    rates = movie["bitrates_kbps"]
    if not isinstance(rates, list) or len(rates) != LEVELS:
        count = len(rates) if isinstance(rates, list) else "no list of"
        raise ValueError(f"{path}: {count} bitrates, {LEVELS} are needed: {BITRATES_KBPS.tolist()} kbps")
    kbps = np.array(
        [_figure(f"{path}: bitrate {i}", {"bitrates_kbps": r}, "bitrates_kbps") for i, r in enumerate(rates)]
    )
    if not np.allclose(kbps, BITRATES_KBPS, rtol=0.1, atol=0):
        raise ValueError(
            f"{path}: bitrates {kbps.tolist()} kbps; reward and policies count with {BITRATES_KBPS.tolist()} (within 10 %)"
        )
    segments = movie["segment_sizes_bits"]
    if not isinstance(segments, list) or len(segments) < CHUNKS:
        count = len(segments) if isinstance(segments, list) else "no list of"
        raise ValueError(f"{path}: {count} segments, at least {CHUNKS} are needed")
    sizes = np.empty((LEVELS, len(segments)), dtype=np.int64)
    for number, segment in enumerate(segments, start=1):
        where = f"{path}: segment {number}"
        if not isinstance(segment, list) or len(segment) != LEVELS:
            raise ValueError(f"{where}: expected {LEVELS} sizes, found {str(segment)[:60]}")
        for level, bits in enumerate(segment):
            value = _figure(where, {f"size {level}": bits}, f"size {level}")
            if not 8 <= value < 2**53:
                raise ValueError(f"{where}: size {level} is {value:g} bits")
            sizes[level, number - 1] = math.ceil(value / 8)
    mean_kbps = sizes.mean(axis=1) * 8 / 4000
    if (mean_kbps > 4 * kbps).any() or (mean_kbps < kbps / 4).any():
        raise ValueError(
            f"{path}: mean sizes make {np.round(mean_kbps).tolist()} kbps, the bitrates say {kbps.tolist()}: "
            "are the sizes in bits?"
        )
    return Video(name, sizes)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _figure(where: str, of: dict[str, Any], key: str) -> float:
    def refuse() -> NoReturn:
        raise ValueError(f"{where}: expected a number for {key}, found {str(of.get(key))[:60]}")

    value = of.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse()
    try:
        number = float(value)
    except OverflowError:
        refuse()
    if not math.isfinite(number):
        refuse()
    return number


READERS: dict[str, Callable[[Path, str, Reading], Trace]] = {
    "mahimahi": read_mahimahi,
    "csv": read_csv,
    "sabre": read_sabre,
}
WRITERS: dict[str, Callable[[Trace], str]] = {"mahimahi": mahimahi_text, "csv": csv_text, "sabre": sabre_text}
