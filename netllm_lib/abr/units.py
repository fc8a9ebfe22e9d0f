"""Units of bandwidth and time in other people's files: told by a header, or caught when they are wrong."""

from __future__ import annotations

import math
import re
from pathlib import Path

TO_MBPS = {"Mbps": 1.0, "kbps": 1e-3, "bps": 1e-6, "MB/s": 8.0, "kB/s": 8e-3, "B/s": 8e-6}
TO_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
PLAUSIBLE_MBPS = (0.05, 100.0)
PLAUSIBLE_STEP_S = (0.01, 30.0)
TYPICAL_MBPS = 2.0  # to choose between units that are all plausible
EPOCH_S = (1e9, 2.2e9)  # 2001 to 2039: no trace is that long, so such times count from 1970


# --- headers ------------------------------------------------------------------------------------------------------------

_TIME = re.compile(
    r"(?:unix_?|epoch_?)?(?:time|timestamp|ts|t|epoch|elapsed|seconds)(?:_?(s|sec|secs|seconds|ms|msec|us|usec|ns))?"
)
_TIME_UNITS = {
    "s": "s",
    "sec": "s",
    "secs": "s",
    "seconds": "s",
    "ms": "ms",
    "msec": "ms",
    "us": "us",
    "usec": "us",
    "ns": "ns",
}
_BYTES = re.compile(r"(?:^|_)([MmKk]?)(?:B|[Bb]ytes?)(?:ps|_?(?:/|per_?)_?(?:s|sec|second)|_s)$")
_BITS = re.compile(r"(?:^|_)([MmKk]?)(?:b|[Bb]its?)(?:ps|PS|_?(?:/|per_?)_?(?:s|sec|second)|_s)$")
_BANDWIDTH = re.compile(r"bandwidth|throughput|bit_?rate|capacity|goodput|^bw$|^rate$|^speed$", re.IGNORECASE)


def time_unit_of(header: str) -> tuple[bool, str | None]:
    """(whether a column is a time by its header, its unit or None): time_s, timestamp_ms, t."""
    match = _TIME.fullmatch(_plain(header).lower())
    return match is not None, _TIME_UNITS.get(match[1] or "") if match else None


def bandwidth_unit_of(header: str) -> tuple[bool, str | None]:
    """(whether a column is a bandwidth by its header, its unit or None): mbps, bandwidth_kbps, bytes_per_s, MB/s, rate."""
    plain = _plain(header)
    for pattern, units in ((_BYTES, ("B/s", "kB/s", "MB/s")), (_BITS, ("bps", "kbps", "Mbps"))):
        if match := pattern.search(plain if "B" in plain else plain.lower()):
            return True, units[" km".index(match[1].lower() or " ")]
    if match := re.search(r"(?:^|_)([MK])BPS$", plain):  # all in capitals: bits, as everywhere
        return True, {"M": "Mbps", "K": "kbps"}[match[1]]
    return bool(_BANDWIDTH.search(plain)), None


def _plain(header: str) -> str:
    return re.sub(r"[\s().\[\]-]+", "_", header.strip()).strip("_")


# --- plausibility -------------------------------------------------------------------------------------------------------


def epoch_unit(first: float) -> str | None:
    """The unit in which a time is a date of 2001 to 2039, if there is one."""
    return next((unit for unit, factor in TO_S.items() if EPOCH_S[0] <= first * factor <= EPOCH_S[1]), None)


def check_bandwidth(path: Path, mean: float, unit: str) -> None:
    """Raises ValueError if a mean bandwidth in `unit` is implausible, naming what it would be in each other unit."""
    low, high = PLAUSIBLE_MBPS
    if low <= mean * TO_MBPS[unit] <= high:
        return
    others = {other: mean * factor for other, factor in TO_MBPS.items() if other != unit}
    fitting = {other: mbps for other, mbps in others.items() if low <= mbps <= high}
    told = ", ".join(f"{mbps:.3g} if {other}" for other, mbps in others.items())
    likely = min(fitting, key=lambda other: abs(math.log(fitting[other] / TYPICAL_MBPS)), default=None)
    advice = f"give --unit {likely}, as is likely, or --unit {unit}" if likely else f"give --unit, {unit}"
    raise ValueError(
        f"{path}: its mean bandwidth would be {mean * TO_MBPS[unit]:.4g} Mbps, read as {unit} (in Mbps: {told}); {advice} "
        "if that is meant"
    )


def check_step(path: Path, step: float, unit: str) -> None:
    """Raises ValueError if a time step in `unit` is implausible, naming the likely unit."""
    low, high = PLAUSIBLE_STEP_S
    if low <= step * TO_S[unit] <= high:
        return
    fitting = {other: step * factor for other, factor in TO_S.items() if low <= step * factor <= high}
    likely = min(fitting, key=lambda other: abs(math.log(fitting[other])), default=None)
    advice = (
        f"give --time-unit {likely}, as is likely, or --time-unit {unit}" if likely else f"give --time-unit, {unit}"
    )
    raise ValueError(
        f"{path}: its samples would be {step * TO_S[unit]:.4g} s apart, times read as {unit}; {advice} if that is meant"
    )


def check_packet_times(path: Path, mean_mbps: float) -> None:
    """Raises ValueError if packets, their times read as milliseconds, make an implausible mean bandwidth."""
    low, high = PLAUSIBLE_MBPS
    if low <= mean_mbps <= high:
        return
    fitting = [unit for unit, factor in TO_S.items() if low <= mean_mbps * TO_S["ms"] / factor <= high]
    advice = f"give --time-unit {fitting[0]}, as is likely, or --time-unit ms" if fitting else "give --time-unit ms"
    raise ValueError(
        f"{path}: its mean bandwidth would be {mean_mbps:.4g} Mbps, packet times read as ms; {advice} if that is meant"
    )
