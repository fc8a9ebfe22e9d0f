"""Other tools' files: round trips, units, broken lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netllm_lib.abr import convert, synthetic
from netllm_lib.abr.qoe import BITRATES_KBPS
from netllm_lib.abr.traces import SAMPLE, Registry, Trace, read_trace_set, read_video
from netllm_lib.cli import main

READERS: dict[str, Callable[[Path], Trace]] = {
    "mahimahi": convert.read_mahimahi,
    "csv": partial(convert.read_csv, unit="Mbps"),
    "sabre": convert.read_sabre,
}


@st.composite
def traces(draw: st.DrawFn, whole_seconds: bool = False, most_mbps: float = 60) -> Trace:
    """A playable trace that begins at 0 s."""
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


def there_and_back(folder: Path, trace: Trace, form: str) -> Trace:
    path = folder / f"t{convert.SUFFIXES[form]}"
    path.write_text(convert.WRITERS[form](trace))
    return READERS[form](path)


@settings(max_examples=80, deadline=None)
@given(traces())
def test_csv_and_sabre_keep_the_trace(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    folder = tmp_path_factory.mktemp("there")
    back = there_and_back(folder, trace, "csv")
    assert np.array_equal(back.time_s, trace.time_s)
    assert np.array_equal(back.mbps, trace.mbps)
    back = there_and_back(folder, trace, "sabre")
    np.testing.assert_allclose(back.time_s, trace.time_s, rtol=0, atol=1e-6)
    np.testing.assert_allclose(back.mbps[1:], trace.mbps[1:], rtol=0, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(traces(whole_seconds=True, most_mbps=5))
def test_mahimahi_carries_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    """At every whole second within one packet; the end is the same; a second time nothing changes."""
    folder = tmp_path_factory.mktemp("mahimahi")
    back = there_and_back(folder, trace, "mahimahi")
    assert back.time_s[-1] == pytest.approx(trace.time_s[-1])
    difference = np.abs(bytes_until(back, seconds := np.arange(trace.time_s[-1] + 1)) - bytes_until(trace, seconds))
    assert difference.max() <= 1500 + 1e-3
    stamps = (folder / "t.mahimahi").read_text().split()
    assert bytes_until(back, trace.time_s[-1:]) == pytest.approx(len(stamps) * 1500)
    np.testing.assert_allclose(there_and_back(folder, back, "mahimahi").mbps, back.mbps, atol=1e-9)


def test_mahimahi_by_hand(tmp_path: Path) -> None:
    """Three packets in the first second (one at 0, one at its very end), none in the second, one after half of the third."""
    (tmp_path / "m").write_text("0\n500\n1000\n2500\n")
    trace = convert.read_mahimahi(tmp_path / "m")
    assert trace.time_s.tolist() == [0, 1, 2, 2.5]
    np.testing.assert_allclose(trace.mbps, [0.036, 0.036, 0, 0.024])
    one = Trace("t", np.array([0.0, 1, 2]), np.array([9.0, 0.012, 0.024]))
    assert convert.mahimahi_text(one).split() == ["1000", "1500", "2000"]


def test_columns_and_units_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.log.csv"
    path.write_text("\ufeffwhen;rtt;down;up\n10000;30;1500;900\n\n11000;31;1000;800\n")
    read = partial(convert.read_csv, path, time="when", time_unit="ms")
    trace = read(bandwidth="down", unit="kbps")
    assert (trace.name, trace.time_s.tolist(), trace.mbps.tolist()) == ("x.log", [0, 1], [1.5, 1])
    np.testing.assert_allclose(read(bandwidth="down", unit="kB/s").mbps, [12, 8])
    with pytest.raises(ValueError, match="no column 'Down'; name one of when, rtt, down, up with --bandwidth"):
        read(bandwidth="Down", unit="kbps")
    with pytest.raises(ValueError, match="--unit Kbps: name the unit of bandwidths, one of Mbps, kbps"):
        read(bandwidth="down", unit="Kbps")


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("mahimahi", "", "packet times must"),
        ("mahimahi", "1\n\nx\n", r"expected a packet's time .*'x'"),
        ("mahimahi", "5\n4\n", "never decrease"),
        ("csv", "time_s,mbps\n0,1\n", "1 samples"),
        ("csv", "time_s,mbps\n0,1\n\n1,x\n", r":4: could not convert string to float: 'x'"),
        ("csv", "time_s,mbps\n0,1\n1,2,3\n", r":3: another number of fields than the header's 2"),
        ("csv", "time_s,mbps\n0,1\n1,nan\n", "sample 2 has nan Mbps"),
        ("csv", "time_s,mbps\n0,1\n1,-2\n", "sample 2 has -2 Mbps at 1 s"),
        ("csv", "time_s,mbps\n0,1\n1,2\n1,2\n", "sample 3 has 2 Mbps at 1 s; .*times must increase"),
        ("csv", 'time_s,mbps\n0,"1\n', r"x:\d: "),
        ("sabre", "", "not valid JSON"),
        ("sabre", '[{"duration_ms": 1000}]', "it needs 0.bandwidth_kbps"),
        ("sabre", '[{"duration_ms": 1000, "bandwidth_kbps": NaN}]', "bandwidth_kbps"),
        ("sabre", '[{"duration_ms": 1000, "bandwidth_kbps": 1500}, {"duration_ms": 0, "bandwidth_kbps": 1}]', "sample 3"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_by_name(tmp_path: Path, form: str, text: str, message: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        READERS[form](tmp_path / "x")
    assert str(caught.value).startswith(str(tmp_path / "x"))
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(READERS)), st.text(alphabet='0123456789.,-e\n[]{}":timesbpk nau_', max_size=120))
def test_any_text_is_a_trace_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, form: str, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_text(text)
    try:
        trace = READERS[form](path)
    except ValueError:
        return
    assert (np.diff(trace.time_s) > 0).all()
    assert (trace.mbps >= 0).all()


# --- folders and commands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(convert.SUFFIXES))
def test_a_whole_set_there_and_back(tmp_path: Path, form: str) -> None:
    sample = Registry(SAMPLE).trace_set("sample-test").subset(range(8))
    convert.export_traces(sample, tmp_path / "out", form)
    with pytest.raises(FileExistsError, match="name a new folder"):
        convert.export_traces(sample, tmp_path / "out", form)
    bring = partial(convert.import_traces, tmp_path / "out", tmp_path / "root", READERS[form], name="back")
    _, written = bring(split="test")
    back = read_trace_set(written)
    assert back.names == sample.names
    for a, b in zip(sample.traces, back.traces, strict=True):
        assert b.mean_mbps == pytest.approx(a.mean_mbps, abs=0.013 if form == "mahimahi" else 1e-6)
    with pytest.raises(FileExistsError, match="back is there"):
        bring(split="test")
    with pytest.raises(FileExistsError, match="back is there"):
        bring(split="train", replace=True)
    bring(split="test", replace=True)


def movie(path: Path, **changes: object) -> Path:
    sizes = synthetic.generate_video("v", 3, chunks=50).sizes_bytes
    made = {"segment_duration_ms": 4000, "bitrates_kbps": BITRATES_KBPS.tolist()}
    changes = {"segment_sizes_bits": (sizes.T * 8).tolist()} | changes
    path.write_text(json.dumps(made | changes))
    return path


def test_a_movie_becomes_a_video(tmp_path: Path) -> None:
    video, folder = convert.import_movie(movie(tmp_path / "m.json"), tmp_path / "root")
    assert folder == tmp_path / "root" / "videos" / "m_sizes"
    assert np.array_equal(read_video(folder).sizes_bytes, synthetic.generate_video("v", 3, chunks=50).sizes_bytes)
    assert video.name == "m"
    with pytest.raises(FileExistsError, match="m_sizes is there"):
        convert.import_movie(tmp_path / "m.json", tmp_path / "root")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_duration_ms": 3000}, "segments of 4000 ms"),
        ({"bitrates_kbps": [300, 750]}, "as in the reward"),
        ({"segment_sizes_bits": [[1] * 6] * 47}, "at least 48 segments"),
        ({"segment_sizes_bits": [[1e6] * 5] * 48}, "with 6 sizes each"),
        ({"segment_sizes_bits": (np.tile(BITRATES_KBPS, (48, 1)) * 500).tolist()}, "are they in bits"),
    ],
)  # fmt: skip
def test_movies_that_cannot_be_played(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.import_movie(movie(tmp_path / "m.json", **changes), tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def netllm(*words: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["data", *words])
        return int(stopped.value.code or 0)

    out, root = str(tmp_path / "out"), str(tmp_path / "root")
    assert netllm("export", "sample-test", out, "--format", "sabre", "--data", str(SAMPLE), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"folder": out, "traces": 30}
    assert netllm("import", out, root, "--format", "sabre", "--name", "m", "--split", "test", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["traces"] == 30
    (tmp_path / "x.csv").write_text("t,rate\n0,1000\n1,1500\n")
    words = ["import", str(tmp_path / "x.csv"), root, "--format", "csv", "--time", "t", "--bandwidth", "rate"]
    assert netllm(*words) == 2
    assert "--unit (none): name the unit of bandwidths, one of Mbps, kbps" in capsys.readouterr().err
    assert netllm(*words, "--unit", "kbps") == 0
    assert Registry(tmp_path / "root").trace_set("x").traces[0].mbps.tolist() == [1, 1.5]
    assert netllm("import", str(movie(tmp_path / "film.json")), root, "--format", "movie") == 0
    assert list(Registry(tmp_path / "root").video_folders()) == ["film"]
