"""Other tools' files: bytes, units, broken lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netllm_lib.abr import convert
from netllm_lib.abr.traces import SAMPLE, Registry, Trace, read_trace_set
from netllm_lib.cli import main

READERS: dict[str, Callable[[Path], Trace]] = {
    "mahimahi": convert.read_mahimahi,
    "csv": partial(convert.read_csv, unit="Mbps"),
    "sabre": convert.read_sabre,
}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 90_000), min_size=1, max_size=200).map(sorted))
def test_mahimahi_keeps_the_bytes(tmp_path_factory: pytest.TempPathFactory, stamps: list[int]) -> None:
    path = tmp_path_factory.mktemp("mahimahi") / "m"
    stamps[-1] += 1000  # it ends after 0 ms, with two samples at least
    path.write_text("".join(f"{stamp}\n" for stamp in stamps))
    trace = convert.read_mahimahi(path)
    assert (trace.mbps[1:] * np.diff(trace.time_s)).sum() * 1e6 / 8 == pytest.approx(1500 * len(stamps))
    assert trace.time_s[-1] == pytest.approx(stamps[-1] / 1000)


def test_mahimahi_by_hand(tmp_path: Path) -> None:
    """Three packets in the first second (one at 0, one at its very end), none in the second, one after half of the third."""
    (tmp_path / "m").write_text("0\n500\n1000\n2500\n")
    trace = convert.read_mahimahi(tmp_path / "m")
    assert trace.time_s.tolist() == [0, 1, 2, 2.5]
    np.testing.assert_allclose(trace.mbps, [0.036, 0.036, 0, 0.024])


def test_sabre_by_hand(tmp_path: Path) -> None:
    (tmp_path / "s.1.json").write_text(
        '[{"duration_ms": 1000, "bandwidth_kbps": 1500}, {"duration_ms": 500.5, "bandwidth_kbps": 800, "latency_ms": 20}]'
    )
    trace = convert.read_sabre(tmp_path / "s.1.json")
    assert (trace.name, trace.time_s.tolist(), trace.mbps.tolist()) == ("s.1", [0, 1, 1.5005], [1.5, 1.5, 0.8])


def test_columns_and_units_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.log.csv"
    path.write_text("\ufeffwhen;rtt;down;up\n10000;30;1500;900\n\n11000;31;1000;800\n")
    read = partial(convert.read_csv, path, time="when", time_unit="ms")
    trace = read(bandwidth="down", unit="kbps")
    assert (trace.name, trace.time_s.tolist(), trace.mbps.tolist()) == ("x.log", [0, 1], [1.5, 1])
    np.testing.assert_allclose(read(bandwidth="down", unit="kB/s").mbps, [12, 8])
    with pytest.raises(
        ValueError, match=r"no column 'Down'; name one of \['when', 'rtt', 'down', 'up'\] with --bandwidth"
    ):
        read(bandwidth="Down", unit="kbps")
    with pytest.raises(ValueError, match="--unit Kbps: name the unit, one of Mbps, kbps"):
        read(bandwidth="down", unit="Kbps")


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("mahimahi", "", "packet times must"),
        ("mahimahi", "1\n\nx\n", r":3: expected a packet's time in ms, found 'x'"),
        ("mahimahi", "1\n1e15\n", "more than 1000000 s"),
        ("mahimahi", "5\n4\n", "never decrease"),
        ("csv", "time_s,mbps\n0,1\n", r"empty trace \(1 samples"),
        ("csv", "time_s,mbps\n0,1\n\n1,x\n", r":4: could not convert string to float: 'x'"),
        ("csv", "time_s,mbps\n0,1\n1,2,3\n", r":3: another number of fields than the header's 2"),
        ("csv", "time_s,mbps\n0,1\n1,nan\n", "sample 1: time and bandwidth must be finite"),
        ("csv", "time_s,mbps\n0,1\n1,-2\n", "sample 1: .* may be negative"),
        ("csv", "time_s,mbps\n0,1\n1,2\n1,2\n", "sample 2: time does not increase"),
        ("csv", 'time_s,mbps\n0,"1\n', r"x:\d: "),
        ("sabre", "", "not valid JSON"),
        ("sabre", '[{"duration_ms": 1000}]', "it needs 0.bandwidth_kbps"),
        ("sabre", '[{"duration_ms": 1000, "bandwidth_kbps": NaN}]', "bandwidth_kbps"),
        ("sabre", '[{"duration_ms": 1000, "bandwidth_kbps": 1500}, {"duration_ms": 0, "bandwidth_kbps": 1}]', "sample 2"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_by_name(tmp_path: Path, form: str, text: str, message: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        READERS[form](tmp_path / "x")
    assert str(caught.value).startswith(str(tmp_path / "x"))
    assert "\n" not in str(caught.value)


# --- folders and commands -----------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_trace_set(tmp_path: Path) -> None:
    sample = Registry(SAMPLE).trace_set("sample-test").subset(range(8))
    (tmp_path / "out").mkdir()
    for trace in sample.traces:
        table = pd.DataFrame({"time_s": trace.time_s, "mbps": trace.mbps})
        table.to_csv(tmp_path / "out" / f"{trace.name}.csv", index=False)
    bring = partial(convert.import_traces, tmp_path / "out", tmp_path / "root", READERS["csv"], name="back")
    _, written = bring(split="test")
    assert replace(read_trace_set(written), name=sample.name).content_hash == sample.content_hash
    with pytest.raises(FileExistsError, match="back is there"):
        bring(split="test")
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        bring(split="../up")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def netllm(*words: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["data", *words])
        return int(stopped.value.code or 0)

    (tmp_path / "x.csv").write_text("t,rate\n0,1000\n1,1500\n")
    words = ["import", str(tmp_path / "x.csv"), str(tmp_path / "root"), "--format", "csv", "--time", "t"]
    assert netllm(*words, "--bandwidth", "rate") == 2
    assert "--unit (none): name the unit, one of Mbps, kbps" in capsys.readouterr().err
    assert netllm(*words, "--bandwidth", "rate", "--unit", "kbps", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["mean_mbps"] == {"x": 1.5}
    assert Registry(tmp_path / "root").trace_set("x").traces[0].mbps.tolist() == [1, 1.5]
