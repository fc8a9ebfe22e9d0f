"""Bandwidth traces, video chunk sizes, and the registry that finds them on disk.

Layout of a root folder (the original's `data/` folder works as it is):

    <root>/traces/<split>/<name>/<file>               one line per sample: "time_s Mbps"
    <root>/videos/<name>_sizes/video_size_<level>     one line per chunk: bytes
    <root>/all_models/<name>/*.ckpt.*                 TensorFlow checkpoints of Genet and UDR

A new trace set or video is a new folder; no code changes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse.csgraph

from netllm_lib import safe_pickle
from netllm_lib.abr import FETCHED
from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.arrays import array_hash
from netllm_lib.runs import PROJECT, read_bytes, read_text

POINTER_FILE = "mahimahi_ptrs.pkl"
MOST_TRACE_BYTES, MOST_VIDEO_BYTES = 50_000_000, 1_000_000
OVERLAP_RUN = 4  # consecutive distinct bandwidths that two traces must share to count as the same recording
LEAST_PASS_BYTES, LEAST_PASS_S = 1000.0, 0.001
"""Of one pass through a trace: a chunk of megabytes then takes thousands of passes, not millions."""
MOST_CHUNK_BYTES = 999_999_999
SAMPLE = PROJECT / "data" / "sample"


@dataclass(frozen=True)
class Trace:
    """One bandwidth trace: `mbps[i]` applies over (time_s[i-1], time_s[i]]; `mbps[0]` is never used.

    Raises ValueError for samples that the simulator could not play.
    """

    name: str
    time_s: np.ndarray  # [samples] float64, strictly increasing, from any time on
    mbps: np.ndarray  # [samples] float64, >= 0

    def __post_init__(self) -> None:
        if problem := _problem(self.time_s, self.mbps):
            raise ValueError(f"trace {self.name}, sample {problem[0]}: {problem[1]}")

    def __repr__(self) -> str:
        samples = f"{len(self.mbps)} samples, {self.duration_s:.0f} s, mean {self.mean_mbps:.3f} Mbps"
        return f"Trace({self.name!r}, {samples})"

    @property
    def duration_s(self) -> float:
        """From the first sample to the last."""
        return float(self.time_s[-1] - self.time_s[0])

    @property
    def mean_mbps(self) -> float:
        """Time-weighted mean bandwidth."""
        return float(np.average(self.mbps[1:], weights=np.diff(self.time_s)))


def _problem(time_s: np.ndarray, mbps: np.ndarray) -> tuple[int, str] | None:
    """The first sample with which a trace cannot be played, and why; None if it can."""
    if time_s.shape != mbps.shape or time_s.ndim != 1 or len(mbps) < 2:
        return max(len(mbps) - 1, 0), f"empty trace ({len(mbps)} samples; at least two are needed)"
    for bad, why in (
        (~(np.isfinite(time_s) & np.isfinite(mbps)), "time and bandwidth must be finite"),
        ((time_s < 0) | (mbps < 0), "neither time nor bandwidth may be negative"),
        (np.diff(time_s, prepend=-1.0) <= 0, "time does not increase"),
    ):
        if bad.any():
            at = int(bad.argmax())
            return at, f"{why} ({time_s[at]} s, {mbps[at]} Mbps)"
    duration_s, pass_bytes = time_s[-1] - time_s[0], float((mbps[1:] * np.diff(time_s)).sum()) * 1e6 / 8
    if pass_bytes < LEAST_PASS_BYTES or duration_s < LEAST_PASS_S:
        return len(mbps) - 1, f"{pass_bytes:.3g} bytes in {duration_s:.3g} s, no chunk would ever arrive"
    return None


def read_trace(path: Path) -> Trace:
    """Parse a trace file. Raises ValueError naming file, line and value for anything the simulator could not play."""
    numbers, samples = [], []
    for number, line in enumerate(read_text(path, MOST_TRACE_BYTES).splitlines(), start=1):
        if words := line.split():
            try:
                time_s, mbps = map(float, words)
            except ValueError:
                raise ValueError(f'{path}:{number}: expected "time_s Mbps", found {line[:60]!r}') from None
            numbers.append(number)
            samples.append((time_s, mbps))
    times, rates = np.array(samples).reshape(-1, 2).T.copy()
    if problem := _problem(times, rates):
        raise ValueError(f"{path}:{numbers[problem[0]] if numbers else 1}: {problem[1]}")
    return Trace(Path(path).name, times, rates)


@dataclass(frozen=True, eq=False)
class TraceSet:
    """A named, ordered set of traces, with the start pointers that a pointer file fixes (or None)."""

    name: str
    traces: tuple[Trace, ...]
    start_ptrs: np.ndarray | None = None  # [N] index 1..samples-1 at which each trace starts, from the pointer file

    def __len__(self) -> int:
        return len(self.traces)

    def __repr__(self) -> str:
        pointers = "no" if self.start_ptrs is None else "fixed"
        return f"TraceSet({self.name!r}, {len(self)} traces, {len(self.packed[1])} samples, {pointers} start pointers)"

    @property
    def names(self) -> list[str]:
        """The traces' names, in order."""
        return [trace.name for trace in self.traces]

    @cached_property
    def packed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(offsets [N+1], time_s, mbps): all samples concatenated, for the compiled simulator."""
        offsets = np.cumsum([0, *(len(trace.mbps) for trace in self.traces)], dtype=np.int64)
        times, rates = ([getattr(trace, name) for trace in self.traces] for name in ("time_s", "mbps"))
        return offsets, np.concatenate(times), np.concatenate(rates)

    @cached_property
    def packed_from_zero(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`packed`, with the clock of each trace beginning at 0."""
        offsets, time_s, mbps = self.packed
        return offsets, time_s - np.repeat(time_s[offsets[:-1]], np.diff(offsets)), mbps

    @cached_property
    def content_hash(self) -> str:
        """Digest of all samples, names and start pointers."""
        pointers = np.zeros(0) if self.start_ptrs is None else self.start_ptrs
        return array_hash(*self.packed, np.array(self.names), pointers)

    @cached_property
    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """[runs] 64-bit digests of all runs of OVERLAP_RUN distinct bandwidths, and [runs] the traces that they are in."""
        digests, owners = [], []
        for number, trace in enumerate(self.traces):
            bits = trace.mbps[np.concatenate([[True], np.diff(trace.mbps) != 0])].view(np.uint64)
            mixed = (bits ^ (bits >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> 27)) * np.uint64(0x94D049BB133111EB)
            length = min(OVERLAP_RUN, len(bits))  # a trace that has fewer shares them only with such a one
            factors = np.arange(1, 2 * length, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            windows = np.lib.stride_tricks.sliding_window_view(mixed, length)
            digests.append((windows * factors).sum(axis=1, dtype=np.uint64) + np.uint64(length))
            owners.append(np.full(len(digests[-1]), number))
        return np.concatenate(digests), np.concatenate(owners)

    def subset(self, index: Sequence[int] | np.ndarray, name: str | None = None) -> TraceSet:
        """The traces at `index`, in that order."""
        chosen = tuple(self.traces[i] for i in index)
        pointers = None if self.start_ptrs is None else self.start_ptrs[np.asarray(index)]
        return TraceSet(name or self.name, chosen, pointers)

    def describe(self) -> pd.DataFrame:
        """One row per trace: duration_s, and mean_mbps, the time-weighted mean bandwidth."""
        rows = [(trace.duration_s, trace.mean_mbps) for trace in self.traces]
        return pd.DataFrame(rows, index=self.names, columns=["duration_s", "mean_mbps"])


def _read_pointers(path: Path, traces: tuple[Trace, ...]) -> np.ndarray:
    """The original's pickled list of start pointers."""
    try:
        values = safe_pickle.load(read_bytes(path, MOST_VIDEO_BYTES))
        if type(values) is not list or [type(value) for value in values] != [int] * len(traces):
            raise ValueError(f"not a list of {len(traces)} integers, one for each trace")
        for value, trace in zip(values, traces, strict=True):
            if not 1 <= value < len(trace.mbps):
                raise ValueError(f"{value} is outside 1..{len(trace.mbps) - 1} of trace {trace.name}")
    except ValueError as error:
        raise ValueError(f"{path}: no start pointers: {error}") from None
    return np.array(values, dtype=np.int64)


def read_trace_set(folder: Path) -> TraceSet:
    """All traces of a folder, sorted by file name; dotfiles are skipped, a pointer file is read."""
    folder = Path(folder)
    files = sorted(path for path in folder.iterdir() if not path.is_dir() and not path.name.startswith("."))
    traces = tuple(read_trace(path) for path in files if path.name != POINTER_FILE)
    if not traces:
        raise FileNotFoundError(f"{folder}: no trace files in it")
    pointers = folder / POINTER_FILE
    return TraceSet(folder.name, traces, _read_pointers(pointers, traces) if pointers.exists() else None)


@dataclass(frozen=True, eq=False)
class Video:
    """Chunk sizes of a video in all six levels. Raises ValueError for sizes that the simulator could not play."""

    name: str
    sizes_bytes: np.ndarray  # [6, chunks >= 48] int64

    def __post_init__(self) -> None:
        sizes = self.sizes_bytes
        if sizes.ndim != 2 or len(sizes) != LEVELS or sizes.shape[1] < CHUNKS or sizes.dtype.kind not in "iu":
            raise ValueError(f"video {self.name}: sizes must be integers [{LEVELS}, at least {CHUNKS} chunks]")
        if sizes.min() < 1 or sizes.max() > MOST_CHUNK_BYTES:
            raise ValueError(f"video {self.name}: chunk sizes must be from 1 to {MOST_CHUNK_BYTES} bytes")

    def __repr__(self) -> str:
        mbps = np.round(self.sizes_bytes[:, :CHUNKS].mean(axis=1) * 8 / 4e6, 3).tolist()
        return f"Video({self.name!r}, {self.sizes_bytes.shape[1]} chunks, mean Mbps by level {mbps})"

    @cached_property
    def content_hash(self) -> str:
        return array_hash(self.sizes_bytes)


def read_video(folder: Path) -> Video:
    """Chunk sizes from `video_size_0` … `video_size_5`. Raises ValueError or FileNotFoundError naming file and line."""
    folder, levels = Path(folder), []
    for level in range(LEVELS):
        path = folder / f"video_size_{level}"
        if not path.exists():
            raise FileNotFoundError(f"{path}: size file of level {level} is missing ({LEVELS} levels are needed)")
        lines = read_text(path, MOST_VIDEO_BYTES).splitlines()
        for number, line in enumerate(lines, start=1):
            if not re.fullmatch(r"\s*([1-9][0-9]{0,8}\s*)?", line):
                raise ValueError(f"{path}:{number}: expected a chunk size in bytes, found {line[:60]!r}")
        levels.append([int(line) for line in lines if line.strip()])
        if len(levels[-1]) < CHUNKS:
            raise ValueError(f"{path}: {len(levels[-1])} chunks, at least {CHUNKS} are needed")
    chunks = list(zip(*levels, strict=False))  # as many as the shortest level has
    return Video(folder.name.removesuffix("_sizes"), np.array(chunks, dtype=np.int64).T.copy())


# --- registry -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registry:
    """Trace sets, videos and actor checkpoints under one root folder."""

    root: Path

    def trace_folders(self) -> dict[str, Path]:
        """Trace set name -> folder. A name that occurs in two splits is an error."""
        folders: dict[str, Path] = {}
        for path in sorted(self.root.glob("traces/*/[!.]*/")):
            if path.name in folders:
                raise ValueError(f"trace set {path.name!r} lies in two places: {folders[path.name]} and {path}")
            folders[path.name] = path
        return folders

    def video_folders(self) -> dict[str, Path]:
        """Video name -> folder with its size files."""
        return {path.name.removesuffix("_sizes"): path for path in sorted(self.root.glob("videos/*_sizes/"))}

    def actor_folders(self) -> dict[str, Path]:
        """Genet/UDR actor name -> folder with its TensorFlow checkpoints."""
        return {path.name: path for path in sorted(self.root.glob("all_models/*")) if any(path.glob("*.ckpt.index"))}

    def trace_set(self, name: str) -> TraceSet:
        """The trace set `name`; `default_traces` names the ones to use when nothing is asked for."""
        return read_trace_set(self._lookup(self.trace_folders(), name, "trace set"))

    def video(self, name: str) -> Video:
        """The video `name`; `default_video` names the one to use when nothing is asked for."""
        return read_video(self._lookup(self.video_folders(), name, "video"))

    def default_traces(self, split: str) -> str:
        """Name of the first trace set of a split ("train" or "test")."""
        sets = [name for name, path in self.trace_folders().items() if path.parent.name == split]
        return _first(sets, self.root / "traces" / split, "trace set")

    def default_video(self) -> str:
        """Name of the first video."""
        return _first(list(self.video_folders()), self.root / "videos", "video")

    def _lookup(self, found: dict[str, Path], name: str, what: str) -> Path:
        if name not in found:
            known = ", ".join(found) or "none"
            raise FileNotFoundError(f"{what} {name!r} not found under {self.root} (there: {known})")
        return found[name]

    def trace_sets(self) -> dict[str, TraceSet]:
        """All trace sets by name."""
        return {name: read_trace_set(folder) for name, folder in self.trace_folders().items()}

    def describe(self, sets: Mapping[str, TraceSet] | None = None) -> pd.DataFrame:
        """One row per trace set: split, traces, hours, extremes and median of the traces' durations in seconds, and quantiles
        over traces of the mean bandwidth in Mbps. `sets` are those that were read already (all)."""
        folders, rows = self.trace_folders(), []
        for name, traces in (sets or self.trace_sets()).items():
            duration_s, mean_mbps = (traces.describe()[column] for column in ("duration_s", "mean_mbps"))
            lengths = (duration_s.sum() / 3600, *duration_s.quantile([0, 0.5, 1]))
            quantiles = mean_mbps.quantile([0, 0.25, 0.5, 0.75, 1])
            rows.append((name, folders[name].parent.name, len(traces), *lengths, *quantiles))
        columns = ["trace set", "split", "traces", "hours", "min_s", "median_s", "max_s"]
        return pd.DataFrame(rows, columns=[*columns, "min", "q25", "median", "q75", "max"])


def _first(names: list[str], folder: Path, what: str) -> str:
    if not names:
        raise FileNotFoundError(f"{folder}: no {what} in it")
    return names[0]


def find_registry(data: str | Path | None = None) -> Registry:
    """The data to use: `data`, else `$NETLLM_DATA`, else `data/netllm` of the checkout, else the bundled sample.

    Raises FileNotFoundError if a folder that was named does not exist or holds no traces.
    """
    if named := data or os.environ.get("NETLLM_DATA"):
        if not (Path(named) / "traces").is_dir():
            source = "--data" if data else "$NETLLM_DATA"
            raise FileNotFoundError(
                f"{source} {named}: no folder traces/ in it (expected traces/, videos/, all_models/)"
            )
        return Registry(Path(named))
    return Registry(FETCHED if (FETCHED / "traces").is_dir() else SAMPLE)


# --- overlap between trace sets -----------------------------------------------------------------------------------------


def overlapping(traces: TraceSet, others: TraceSet) -> np.ndarray:
    """[len(traces)] bool: True where a trace shares content with any trace of `others`.

    Two traces overlap when they share four consecutive distinct bandwidths: the same recording, whatever its file name
    or start. A policy trained on one has seen the other.
    """
    digests, owners = traces.runs
    return np.bincount(owners, pd.Index(digests).isin(others.runs[0]), len(traces)) > 0


def overlap_matrix(sets: Mapping[str, TraceSet]) -> pd.DataFrame:
    """[sets x sets] int: how many traces of the row's set share content with any trace of the column's (see `overlapping`)."""
    counts = [[int(overlapping(traces, others).sum()) for others in sets.values()] for traces in sets.values()]
    return pd.DataFrame(counts, index=list(sets), columns=list(sets), dtype=int)


def split_validation(traces: TraceSet, share: float, seed: int) -> tuple[TraceSet, TraceSet]:
    """(train, validation): about `share` of the traces, at least one, no content of which occurs in the rest.

    Traces that share content move together, so that selection on the validation set is not selection on training data.
    """
    if not 0 < share < 1:
        raise ValueError(f"validation share must lie between 0 and 1, not {share}")
    count, (digests, owners) = len(traces), traces.runs
    _, run = np.unique(digests, return_inverse=True)
    nodes = count + len(run)  # the traces, and behind them the runs that are in them
    graph = scipy.sparse.coo_array((np.ones(len(run)), (owners, count + run)), shape=(nodes, nodes))
    group_of = scipy.sparse.csgraph.connected_components(graph, directed=False)[1][:count]
    group_count = int(group_of.max()) + 1
    if group_count < 2:
        raise ValueError(f"{traces.name}: all traces share content, no validation set can be cut from them")
    groups: list[list[int]] = [np.flatnonzero(group_of == group).tolist() for group in range(group_count)]
    held, wanted = list[int](), max(1, round(share * count))
    for group in np.random.default_rng(seed).permutation(group_count):
        if len(held) < wanted and len(held) + len(groups[group]) <= min(wanted * 1.5, count - 1):
            held += groups[group]
    held = sorted(held or sorted(groups, key=len)[0])
    rest = np.setdiff1d(np.arange(count), held)
    return traces.subset(rest, f"{traces.name} (train part)"), traces.subset(held, f"{traces.name} (validation part)")
