"""Other tools' files: round trips, units that are guessed wrong, broken lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netllm_lib.abr import convert, synthetic
from netllm_lib.abr.qoe import BITRATES_KBPS
from netllm_lib.abr.traces import SAMPLE, Registry, Trace, read_trace_set, read_video
from netllm_lib.abr.units import TO_MBPS, bandwidth_unit_of, time_unit_of
from netllm_lib.cli import main


@st.composite
def traces(draw: st.DrawFn, whole_seconds: bool = False, most_mbps: float = 60) -> Trace:
    """A playable trace that begins at 0 s, with a plausible mean."""
    count = draw(st.integers(2, 25))
    step = st.integers(1, 9) if whole_seconds else st.floats(0.05, 9)
    steps = draw(st.lists(step, min_size=count - 1, max_size=count - 1))
    rates = draw(st.lists(st.one_of(st.just(0.0), st.floats(0.001, most_mbps)), min_size=count, max_size=count))
    rates[-1] = max(rates[-1], 3.0)
    time_s = np.append(0.0, np.cumsum(steps))
    return Trace("t", np.round(time_s, 6), np.round(rates, 6))


def bytes_until(trace: Trace, time_s: np.ndarray) -> np.ndarray:
    carried = np.append(0.0, np.cumsum(trace.mbps[1:] * np.diff(trace.time_s))) * 1e6 / 8
    return np.interp(time_s, trace.time_s, carried)


def there_and_back(folder: Path, trace: Trace, form: str, **said: object) -> Trace:
    path = folder / f"t{convert.SUFFIXES[form]}"
    path.write_text(convert.WRITERS[form](trace))
    return convert.READERS[form](path, "t", convert.Reading(**said))  # type: ignore[arg-type]


ROUNDS = settings(max_examples=80, deadline=None)


@ROUNDS
@given(traces())
def test_csv_keeps_every_bit(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    back = there_and_back(tmp_path_factory.mktemp("csv"), trace, "csv", unit="Mbps", time_unit="s")
    assert np.array_equal(back.time_s, trace.time_s)
    assert np.array_equal(back.mbps, trace.mbps)


@ROUNDS
@given(traces())
def test_sabre_keeps_what_is_used(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    back = there_and_back(tmp_path_factory.mktemp("sabre"), trace, "sabre", unit="kbps", time_unit="ms")
    np.testing.assert_allclose(back.time_s, trace.time_s, rtol=0, atol=1e-6)
    np.testing.assert_allclose(back.mbps[1:], trace.mbps[1:], rtol=0, atol=1e-9)


@ROUNDS
@given(traces(whole_seconds=True, most_mbps=5))
def test_mahimahi_carries_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    """At every whole second within one packet; the end is the same; a second time nothing changes."""
    folder = tmp_path_factory.mktemp("mahimahi")
    back = there_and_back(folder, trace, "mahimahi", time_unit="ms")
    assert back.time_s[-1] == pytest.approx(trace.time_s[-1])
    seconds = np.arange(trace.time_s[-1] + 1)
    difference = bytes_until(back, seconds) - bytes_until(trace, seconds)
    assert np.abs(difference).max() <= convert.PACKET_BYTES + 1e-3
    assert np.abs(difference[:-1]).max() < convert.PACKET_BYTES
    stamps = (folder / "t.mahimahi").read_text().split()
    assert bytes_until(back, trace.time_s[-1:]) == pytest.approx(len(stamps) * convert.PACKET_BYTES)
    again = there_and_back(folder, back, "mahimahi", time_unit="ms")
    np.testing.assert_allclose(again.mbps, back.mbps, atol=1e-9)


def test_mahimahi_by_hand(tmp_path: Path) -> None:
    """Three packets in the first second (one at 0, one at its very end), none in the second, one after half of the third."""
    (tmp_path / "m").write_text("0\n500\n1000\n2500\n")
    trace = convert.read_mahimahi(tmp_path / "m", "m", convert.Reading(time_unit="ms"))
    assert trace.time_s.tolist() == [0, 1, 2, 2.5]
    np.testing.assert_allclose(trace.mbps, [0.036, 0.036, 0, 0.024])
    one = Trace("t", np.array([0.0, 1, 2]), np.array([9.0, 0.012, 0.024]))
    assert convert.mahimahi_text(one).split() == ["1000", "1500", "2000"]
    silent = Trace("t", np.array([0.0, 1, 2]), np.array([9.0, 0.012, 0.0]))
    assert convert.mahimahi_text(silent).split() == ["1000", "2000"], "the last line is the end"


# --- units --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "unit"),
    [
        ("mbps", "Mbps"), ("Mbps", "Mbps"), ("MBPS", "Mbps"), ("Bandwidth (Mbps)", "Mbps"), ("throughput_mbit/s", "Mbps"),
        ("kbps", "kbps"), ("bandwidth_kbps", "kbps"), ("Kbit/s", "kbps"), ("kbits_per_second", "kbps"),
        ("bps", "bps"), ("bits_per_s", "bps"), ("throughput [bit/s]", "bps"),
        ("MB/s", "MB/s"), ("MBps", "MB/s"), ("kBps", "kB/s"), ("rate_kB/s", "kB/s"), ("kbytes/s", "kB/s"),
        ("bytes_per_s", "B/s"), ("Bandwidth_bytes_per_sec", "B/s"), ("B/s", "B/s"),
        ("bandwidth", None), ("DL_bitrate", None), ("rate", None),
    ],
)  # fmt: skip
def test_bandwidth_columns(header: str, unit: str | None) -> None:
    assert bandwidth_unit_of(header) == (True, unit)


@pytest.mark.parametrize("header", ["time", "latency_ms", "rtt", "bytes", "lon", "rsrp", "cell_id", "bitmaps"])
def test_other_columns_are_no_bandwidths(header: str) -> None:
    assert bandwidth_unit_of(header) == (False, None)


@pytest.mark.parametrize(
    ("header", "unit"),
    [
        ("time_s", "s"),
        ("Time (ms)", "ms"),
        ("timestamp_ms", "ms"),
        ("unix_time", None),
        ("t", None),
        ("elapsed_us", "us"),
    ],
)
def test_time_columns(header: str, unit: str | None) -> None:
    assert time_unit_of(header) == (True, unit)


@pytest.mark.parametrize("header", ["latency_ms", "mbps", "duration", "bitrate"])
def test_other_columns_are_no_times(header: str) -> None:
    assert time_unit_of(header) == (False, None)


def table(path: Path, header: str, rates: np.ndarray, times: np.ndarray | None = None) -> Path:
    times = np.arange(len(rates)) if times is None else times
    path.write_text(header + "\n" + "".join(f"{t:.15g},{rate:.15g}\n" for t, rate in zip(times, rates, strict=True)))
    return path


RATES = np.array([1.0, 1.5, 0.5, 2.0, 1.0])


@pytest.mark.parametrize("unit", ["kbps", "B/s"])
def test_a_wrong_unit_is_caught(tmp_path: Path, unit: str) -> None:
    path = table(tmp_path / "wrong.csv", "time_s,bandwidth", RATES / TO_MBPS[unit])
    with pytest.raises(ValueError) as caught:
        convert.read_csv(path, "t")
    said = str(caught.value)
    assert str(path) in said
    assert f"{1.25 / TO_MBPS[unit]:.4g} Mbps, read as Mbps" in said
    assert f"1.25 if {unit}" in said
    assert f"give --unit {unit}, as is likely, or --unit Mbps" in said
    np.testing.assert_allclose(convert.read_csv(path, "t", convert.Reading(unit=unit)).mbps, RATES)
    meant = convert.read_csv(path, "t", convert.Reading(unit="Mbps"))
    np.testing.assert_allclose(meant.mbps, RATES / TO_MBPS[unit])


def test_a_header_that_is_wrong_is_caught_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.00125 Mbps, read as kbps .*1\.25 if Mbps.*--unit Mbps, as is likely"):
        convert.read_csv(table(tmp_path / "x.csv", "time_s,kbps", RATES), "t")


@pytest.mark.parametrize("unit", list(TO_MBPS))
def test_units_of_headers_are_used(tmp_path: Path, unit: str) -> None:
    path = table(tmp_path / "x.csv", f"time_s,rate_{unit}", RATES / TO_MBPS[unit])
    np.testing.assert_allclose(convert.read_csv(path, "t").mbps, RATES)


def test_times_in_other_units(tmp_path: Path) -> None:
    def read(header: str, times: np.ndarray, **said: str) -> list[float]:
        path = table(tmp_path / "x.csv", f"{header},mbps", RATES, times)
        return convert.read_csv(path, "t", convert.Reading(**said)).time_s.round(9).tolist()  # type: ignore[arg-type]

    seconds = np.arange(5.0)
    assert read("time_ms", seconds * 1000) == seconds.tolist()
    assert read("time", seconds + 17) == seconds.tolist(), "begins at 0"
    for factor in (1, 1e3, 1e6):
        assert read("timestamp", (1.7e9 + seconds) * factor) == seconds.tolist(), "a date"
    assert read("timestamp_ms", (1.7e9 + seconds) * 1e3) == seconds.tolist()
    with pytest.raises(ValueError, match=r"1000 s apart, times read as s; give --time-unit ms, as is likely"):
        read("time", seconds * 1000)
    with pytest.raises(ValueError, match=r"0\.001 s apart, times read as ms; give --time-unit s"):
        read("time_ms", seconds)
    with pytest.raises(ValueError, match=r"a date in ms; give --time-unit ms, as is likely, or --time-unit s"):
        read("time_s", (1.7e9 + seconds) * 1e3)
    assert read("time", seconds * 1000, time_unit="s") == (seconds * 1000).tolist()
    assert read("time_s", seconds * 1000, time_unit="ms") == seconds.tolist()


def test_mahimahi_in_microseconds_is_caught(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("".join(f"{i * 8000}\n" for i in range(1, 1001)))
    with pytest.raises(ValueError, match=r"0\.0015 Mbps, packet times read as ms; give --time-unit us, as is likely"):
        convert.read_mahimahi(tmp_path / "m", "m")
    assert convert.read_mahimahi(tmp_path / "m", "m", convert.Reading(time_unit="us")).mean_mbps == pytest.approx(1.5)


# --- broken files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("mahimahi", "", "0 packets"),
        ("mahimahi", "0\n0\n", "2 packets in no time"),
        ("mahimahi", "1\n\n2.5\n", r":3: expected .*'2\.5'"),
        ("mahimahi", "1\n-2\n", r":2: expected"),
        ("mahimahi", "5\n4\n", r":2: time 4 decreases"),
        ("mahimahi", "5\n6 7\n", r":2: expected .*'6 7'"),
        ("mahimahi", "5\n" + "9" * 30, r":2: expected"),
        ("csv", "", "empty file"),
        ("csv", "0,1\n1,2\n", ":1: a header"),
        ("csv", "time_s,mbps\n", "0 samples"),
        ("csv", "time_s,mbps\n0,1\n", "1 samples"),
        ("csv", "time_s,mbps\n0,1\n\n1,x\n", r":4: expected a number in column 'mbps', found 'x'"),
        ("csv", "time_s,mbps\n0,1\n1,\n", r":3: expected a number in column 'mbps', found ''"),
        ("csv", "time_s,mbps\n0,1\n1,nan\n", r":3: expected a number"),
        ("csv", "time_s,mbps\n0,1\n1,2,3\n", r":3: 3 fields, the header has 2"),
        ("csv", "time_s,mbps\n0,1\n1,-2\n", r":3: negative bandwidth"),
        ("csv", "time_s,mbps\n0,1\n1,2\n1,2\n", r":4: time 1 does not increase"),
        ("csv", "time_s,mbps\n0,1\n1,0\n", "zero throughout"),
        ("csv", "time_s,mbps,kbps\n0,1,1\n", r":1: 2 columns look like it; name one of time_s, mbps, kbps with --bandwidth"),
        ("csv", "when,mbps\n0,1\n", r":1: 0 columns look like it; name one of when, mbps with --time"),
        ("csv", 'time_s,mbps\n0,"1\n', r"x:\d: "),
        ("sabre", "", r":1: not JSON"),
        ("sabre", '[\n{"duration_ms": 1000,\n]', r":3: not JSON"),
        ("sabre", "{}", "expected a list"),
        ("sabre", "[3]", "period 1: expected an object"),
        ("sabre", '[{"duration_ms": 1000}]', "period 1: expected a number for bandwidth_kbps, found None"),
        ("sabre", '[{"duration_ms": 1000, "bandwidth_kbps": NaN}]', "expected a number for bandwidth_kbps"),
        ("sabre", '[{"duration_ms": true, "bandwidth_kbps": 1}]', "expected a number for duration_ms, found True"),
        ("sabre", '[{"duration_ms": 1000, "bandwidth_kbps": 1500}, {"duration_ms": 0, "bandwidth_kbps": 1}]', "period 2"),
        ("sabre", '[{"duration_ms": 1, "bandwidth_kbps": ' + "9" * 400 + "}]", "expected a number"),
        ("sabre", '[{"duration_ms": 1000, "bandwidth_kbps": 1.5}]', "--unit Mbps, as is likely"),
        ("sabre", '[{"duration_ms": 1, "bandwidth_kbps": 1500}]', "--time-unit s, as is likely"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_by_name_and_line(tmp_path: Path, form: str, text: str, message: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        convert.READERS[form](tmp_path / "x", "x", convert.Reading())
    assert str(caught.value).startswith(str(tmp_path / "x"))
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(convert.READERS)), st.text(alphabet='0123456789.,-e\n[]{}":timesbpk nau_', max_size=120))
def test_any_text_is_a_trace_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, form: str, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_text(text)
    try:
        trace = convert.READERS[form](path, "x", convert.Reading())
    except ValueError:
        return
    assert (np.diff(trace.time_s) > 0).all()
    assert (trace.mbps >= 0).all()


def test_columns_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("\ufeffwhen;rtt;down;up\n10;30;1500;900\n11;31;1000;800\n")
    trace = convert.read_csv(path, "x", convert.Reading(time="when", bandwidth="down", unit="kbps"))
    assert (trace.time_s.tolist(), trace.mbps.tolist()) == ([0, 1], [1.5, 1])
    with pytest.raises(ValueError, match="no column 'Down'; name one of when, rtt, down, up with --bandwidth"):
        convert.read_csv(path, "x", convert.Reading(time="when", bandwidth="Down"))


# --- folders and commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(convert.SUFFIXES))
def test_a_whole_set_there_and_back(tmp_path: Path, form: str) -> None:
    sample = Registry(SAMPLE).trace_set("sample-test").subset(range(8))
    convert.export_traces(sample, tmp_path / "out", form)
    with pytest.raises(FileExistsError, match="name a new folder"):
        convert.export_traces(sample, tmp_path / "out", form)
    _, written = convert.import_traces(tmp_path / "out", tmp_path / "root", form, name="back", split="test")
    assert written == tmp_path / "root" / "traces" / "test" / "back"
    back = Registry(tmp_path / "root").trace_set("back")
    assert back.names == sample.names
    for a, b in zip(sample.traces, back.traces, strict=True):
        assert b.mean_mbps == pytest.approx(a.mean_mbps, abs=0.013 if form == "mahimahi" else 1e-6)
        if form == "csv":
            assert np.array_equal(a.mbps, b.mbps)
    with pytest.raises(FileExistsError, match="'back' is there"):
        convert.import_traces(tmp_path / "out", tmp_path / "root", form, name="back", split="test")
    with pytest.raises(FileExistsError, match="'back' is there; give --name$"):
        convert.import_traces(tmp_path / "out", tmp_path / "root", form, name="back", split="train", replace=True)
    convert.import_traces(tmp_path / "out", tmp_path / "root", form, name="back", split="test", replace=True)


def test_the_real_traces_there_and_back(real_data: Path, tmp_path: Path) -> None:
    """Their names have dots, their means are plausible, their clocks are not even."""
    real = Registry(real_data).trace_set("fcc-train")
    real = real.subset(range(0, len(real), 8))
    for form in ("csv", "sabre"):
        convert.export_traces(real, tmp_path / form, form)
        convert.import_traces(tmp_path / form, tmp_path / "root", form, name=form)
        back = read_trace_set(tmp_path / "root" / "traces" / "train" / form)
        assert back.names == real.names
        for a, b in zip(real.traces, back.traces, strict=True):
            np.testing.assert_allclose(b.time_s, a.time_s, rtol=0, atol=1e-5)
            np.testing.assert_allclose(b.mbps[1:], a.mbps[1:], rtol=0, atol=1e-6)


def test_names_and_sources(tmp_path: Path) -> None:
    for name in ("a.csv", "b.log.csv", ".hidden"):
        table(tmp_path / name, "time_s,mbps", RATES)
    read, _ = convert.import_traces(tmp_path, tmp_path / "root", "csv", name="n")
    assert read.names == ["a", "b.log"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert.import_traces(tmp_path / "nowhere", tmp_path / "root", "csv")
    with pytest.raises(FileNotFoundError, match="no files in it"):
        convert.import_traces(tmp_path / "root", tmp_path / "root", "csv")
    for name in ("../x", "", ".x"):
        with pytest.raises(ValueError, match="cannot be the name|split"):
            convert.import_traces(tmp_path / "a.csv", tmp_path / "root", "csv", split=name)


def movie(path: Path, **changes: object) -> Path:
    sizes = synthetic.generate_video("v", 3, chunks=50).sizes_bytes
    made = {
        "segment_duration_ms": 4000,
        "bitrates_kbps": BITRATES_KBPS.tolist(),
        "segment_sizes_bits": (sizes.T * 8).tolist(),
    }
    path.write_text(json.dumps(made | changes))
    return path


def test_a_movie_becomes_a_video(tmp_path: Path) -> None:
    video, folder = convert.import_movie(movie(tmp_path / "m.json"), tmp_path / "root")
    assert folder == tmp_path / "root" / "videos" / "m_sizes"
    assert np.array_equal(read_video(folder).sizes_bytes, synthetic.generate_video("v", 3, chunks=50).sizes_bytes)
    assert video.name == "m"
    with pytest.raises(FileExistsError, match="'m' is there"):
        convert.import_movie(tmp_path / "m.json", tmp_path / "root")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_duration_ms": 3000}, "chunks of 3000 ms; the simulator plays chunks of 4000 ms"),
        ({"bitrates_kbps": [300, 750]}, "2 bitrates, 6 are needed"),
        ({"bitrates_kbps": [230, 331, 477, 688, 991, 1427]}, "reward and policies count with"),
        ({"segment_sizes_bits": [[1] * 6] * 47}, "47 segments, at least 48"),
        ({"segment_sizes_bits": [[1e6] * 5] * 48}, "segment 1: expected 6 sizes"),
        ({"segment_sizes_bits": [[1e6] * 5 + [0]] * 48}, "segment 1: size 5 is 0 bits"),
        ({"segment_sizes_bits": [[1e6] * 5 + ["x"]] * 48}, "segment 1: expected a number for size 5"),
        (
            {"segment_sizes_bits": (np.tile(BITRATES_KBPS, (48, 1)) * 500).tolist()},
            "are the sizes in bits",
        ),
    ],
)  # fmt: skip
def test_movies_that_cannot_be_played(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.import_movie(movie(tmp_path / "m.json", **changes), tmp_path / "root")
    assert not (tmp_path / "root").exists()


def netllm(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return int(stopped.value.code or 0)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, root = str(tmp_path / "out"), str(tmp_path / "root")
    assert netllm("data", "export", "sample-test", out, "--format", "sabre", "--data", str(SAMPLE), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"folder": out, "traces": 30}
    assert netllm("data", "import", out, root, "--format", "sabre", "--name", "m", "--split", "test", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["traces"] == 30
    path = table(tmp_path / "x.csv", "t,rate", RATES * 1000)
    assert netllm("data", "import", str(path), root, "--format", "csv") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "--unit kbps, as is likely" in said[0]
    assert netllm("data", "import", str(path), root, "--format", "csv", "--unit", "kbps", "--name", "x") == 0
    assert Registry(tmp_path / "root").trace_set("x").traces[0].mbps.tolist() == RATES.tolist()
    assert netllm("data", "import", str(path), root, "--format", "csv", "--unit", "Kbps") == 2
    assert "--unit Kbps: give one of Mbps, kbps" in capsys.readouterr().err
    assert netllm("data", "import", str(movie(tmp_path / "film.json")), root, "--format", "movie") == 0
    assert list(Registry(tmp_path / "root").video_folders()) == ["film"]
