"""Synthetic bandwidth traces and video sizes: the bundled sample, and material for tests and training.

Bandwidth follows a Markov-modulated log-normal model, as broadband logs suggest: a trace has a mean drawn from a log-normal
distribution; its logarithm then wanders as a first-order autoregression around one of a few regimes (good, usual, poor,
bad), which change at random:

    log mbps[i] = level + regime[i] + wander[i]      (never below the floor)
    level ~ N(log median_mbps, spread^2), once a trace
    regime[i] = regime[i-1], or with probability interval_s / regime_s one of `regimes` anew
    wander[i] = memory * wander[i-1] + N(0, jitter^2), wander[0] = 0

Videos are variable-bit-rate: one complexity series per video scales all levels together, as an encoder does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from netllm_lib.abr.qoe import BITRATES_KBPS, CHUNKS
from netllm_lib.abr.traces import Trace, TraceSet, Video
from netllm_lib.runs import atomic_path


@dataclass(frozen=True)
class BandwidthModel:
    """Parameters of the trace generator. The defaults resemble fixed-line and mobile logs of 0.3 to 4 Mbps."""

    median_mbps: float = 1.15  # of the traces' means
    spread: float = 0.45  # standard deviation of the logarithm of the traces' means
    samples: int = 220
    interval_s: float = 1.0
    memory: float = 0.7  # autoregression of the log bandwidth from sample to sample
    jitter: float = 0.22  # standard deviation of its innovations
    regime_s: float = 45.0  # mean stay in a regime
    regimes: tuple[float, ...] = (0.25, 0.0, 0.0, -0.3, -0.7)  # log factors, equally likely
    floor_mbps: float = 0.02


def generate_trace(name: str, seed: tuple[int, ...], model: BandwidthModel = BandwidthModel()) -> Trace:
    """One trace of the model; the same seed gives the same trace."""
    rng = np.random.default_rng(seed)
    level = np.log(model.median_mbps) + model.spread * rng.standard_normal()
    change = rng.random(model.samples) < model.interval_s / model.regime_s
    change[0] = True
    regime = np.array(model.regimes)[rng.integers(0, len(model.regimes), model.samples)]
    regime = regime[np.maximum.accumulate(np.where(change, np.arange(model.samples), 0))]
    noise = model.jitter * rng.standard_normal(model.samples)
    wander = np.zeros(model.samples)
    for i in range(1, model.samples):
        wander[i] = model.memory * wander[i - 1] + noise[i]
    mbps = np.maximum(np.exp(level + regime + wander), model.floor_mbps)
    return Trace(name, np.round(np.arange(model.samples) * model.interval_s, 3), np.round(mbps, 6))


def generate_traces(name: str, count: int, seed: int, model: BandwidthModel = BandwidthModel()) -> TraceSet:
    """`count` traces named `<name>_<number>`."""
    return TraceSet(name, tuple(generate_trace(f"{name}_{i:03d}", (seed, i), model) for i in range(count)))


def generate_video(name: str, seed: int, chunks: int = CHUNKS + 1, variation: float = 0.18) -> Video:
    """Variable-bit-rate chunk sizes around the nominal bitrates of 4-second chunks.

    `variation` is the standard deviation of the logarithm of a chunk's complexity; half of it is shared with the chunk before.
    """
    rng = np.random.default_rng([seed, 1])
    complexity = np.zeros(chunks)
    for i in range(chunks):
        complexity[i] = (0.5 * complexity[i - 1] if i else 0.0) + variation * rng.standard_normal()
    own = 0.04 * rng.standard_normal((len(BITRATES_KBPS), chunks))
    nominal = BITRATES_KBPS[:, None] * 1000 / 8 * 4
    return Video(name, np.round(nominal * np.exp(complexity + own)).astype(np.int64))


def write_traces(traces: TraceSet, root: Path, split: str) -> Path:
    """Write a trace set as `<root>/traces/<split>/<name>/`; replaces a folder of that name as a whole."""
    folder = Path(root) / "traces" / split / traces.name
    with atomic_path(folder) as aside:
        aside.mkdir()
        for trace in traces.traces:
            lines = [f"{time_s:.10g} {mbps:.6f}" for time_s, mbps in zip(trace.time_s, trace.mbps, strict=True)]
            (aside / trace.name).write_text("\n".join(lines) + "\n")
    return folder


def write_video(video: Video, root: Path) -> Path:
    """Write chunk sizes as `<root>/videos/<name>_sizes/`."""
    folder = Path(root) / "videos" / f"{video.name}_sizes"
    with atomic_path(folder) as aside:
        aside.mkdir()
        for level, sizes in enumerate(video.sizes_bytes):
            (aside / f"video_size_{level}").write_text("\n".join(str(size) for size in sizes) + "\n")
    return folder


def write_sample(root: Path, train: int = 60, test: int = 30, seed: int = 7) -> None:
    """The bundled sample: trace sets `sample-train` and `sample-test`, video `sample`. Made by `netllm data generate`."""
    write_traces(generate_traces("sample-train", train, seed), root, "train")
    write_traces(generate_traces("sample-test", test, seed + 1), root, "test")
    write_video(generate_video("sample", seed), root)
