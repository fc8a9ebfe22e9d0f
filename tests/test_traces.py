"""Parsing traces and videos, the registry, and overlap between trace sets."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from netllm_lib.abr import synthetic
from netllm_lib.abr.traces import (
    SAMPLE,
    Registry,
    Trace,
    TraceSet,
    find_registry,
    overlapping,
    read_trace,
    read_trace_set,
    read_video,
    split_validation,
)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "empty trace"),
        ("0 1\n", 1, "empty trace"),
        ("0 1\n1 x\n", 2, "expected \"time_s Mbps\", found '1 x'"),
        ("0 1\n1 2 3\n", 2, "expected"),
        ("0 1\n\n1\n", 3, "expected"),
        ("0 1\n1 2\n1 3\n", 3, r"does not increase \(1.0 s, 3.0 Mbps"),
        ("0 1\n2 2\n\n1 3\n", 4, "does not increase"),
        ("0 1\n1 -2\n", 2, "may be negative"),
        ("-5 1\n1 1\n", 1, r"may be negative \(-5.0 s"),
        ("0 1\n1 nan\n", 2, "finite"),
        ("0 1\ninf 2\n", 2, "finite"),
        ("0 5\n1 0\n2 0\n", 3, "0 bytes in 2 s, no chunk would ever arrive"),
        ("0 5\n1 1e-9\n", 2, "no chunk would ever arrive"),
        ("0 5\n1e-13 1\n", 2, "no chunk would ever arrive"),
        ("\u4f60 \u597d\n", 1, "expected"),
    ],
)
def test_broken_trace_names_file_line_and_value(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "t"
    for encoding in ("utf-8", "utf-16", "gb18030"):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=message) as caught:
            read_trace(path)
        assert str(caught.value).startswith(f"{path}:{line}: ")


def test_trace_set_is_sorted_skips_dotfiles_and_reads_pointers(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        write(tmp_path / name, "0 1\n1 2\n2 3\n")
    (tmp_path / "mahimahi_ptrs.pkl").write_bytes(pickle.dumps([1, 2]))
    traces = read_trace_set(tmp_path)
    assert traces.names == ["a", "b"]
    assert traces.start_ptrs is not None
    assert traces.start_ptrs.tolist() == [1, 2]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: not a file"):
        read_trace_set(tmp_path)


@pytest.mark.parametrize("pointers", [[1], [1, 9], {"a": 1}, [1, "2"], [1, True]])
def test_broken_pointer_file(tmp_path: Path, pointers: object) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, "0 1\n1 2\n2 3\n")
    (tmp_path / "mahimahi_ptrs.pkl").write_bytes(pickle.dumps(pointers))
    with pytest.raises(ValueError, match="mahimahi_ptrs.pkl: no start pointers"):
        read_trace_set(tmp_path)


def test_video_errors(tmp_path: Path) -> None:
    folder = synthetic.write_video(synthetic.generate_video("v", 1), tmp_path)
    assert read_video(folder).sizes_bytes.shape == (6, 49)
    text = (folder / "video_size_3").read_text()
    (folder / "video_size_3").write_text("\n".join(text.splitlines()[:47]))
    with pytest.raises(ValueError, match="video_size_3: 47 chunks, at least 48"):
        read_video(folder)
    for size in ("-5", "0", "9" * 30):
        (folder / "video_size_3").write_text(text.replace("\n", f"\n{size}\n", 1))
        with pytest.raises(ValueError, match="video_size_3:2: expected a chunk size"):
            read_video(folder)
    (folder / "video_size_3").unlink()
    with pytest.raises(FileNotFoundError, match="level 3 is missing"):
        read_video(folder)


def test_registry_names_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NETLLM_DATA", raising=False)
    registry = Registry(SAMPLE)
    assert registry.default_traces("train") == "sample-train"
    assert registry.default_traces("test") == "sample-test"
    with pytest.raises(FileNotFoundError, match="there: sample-test, sample-train"):
        registry.trace_set("fcc-test")
    with pytest.raises(FileNotFoundError, match="--data"):
        find_registry(tmp_path / "nothing")
    monkeypatch.setenv("NETLLM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="NETLLM_DATA"):
        find_registry()
    assert find_registry(SAMPLE).root == SAMPLE


def test_the_bundled_sample_is_what_the_generator_makes(tmp_path: Path) -> None:
    synthetic.write_sample(tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(SAMPLE) for path in SAMPLE.rglob("*") if path.is_file())
    assert all((tmp_path / file).read_bytes() == (SAMPLE / file).read_bytes() for file in files)


def test_traces_and_videos_show_themselves_in_a_line() -> None:
    shown = repr(synthetic.generate_video("v", seed=1)), repr(synthetic.generate_trace("t", (1,)))
    assert shown[0].startswith("Video('v', 49 chunks, mean Mbps by level [")
    assert shown[1].startswith("Trace('t', 220 samples, 219 s, mean ")
    assert max(map(len, shown)) < 120  # a notebook ends cells with them


def test_overlap_is_by_content_not_by_name() -> None:
    traces = synthetic.generate_traces("a", 4, 1)
    first = traces.traces[0]
    cut = Trace("other name", first.time_s[:50], first.mbps[100:150])
    tiny = Trace("tiny", first.time_s[:3], first.mbps[:3])
    others = TraceSet("b", (cut, tiny, *synthetic.generate_traces("c", 2, 2).traces))
    assert overlapping(others, traces).tolist() == [True, False, False, False]


def test_validation_shares_nothing_with_training() -> None:
    traces = synthetic.generate_traces("a", 20, 1)
    twins = [Trace(f"twin {t.name}", t.time_s, np.roll(t.mbps, 7)) for t in traces.traces[:10]]
    both = TraceSet("both", (*traces.traces, *twins))
    for seed in range(5):
        train, validation = split_validation(both, 0.2, seed)
        assert len(train) + len(validation) == 30
        assert 3 <= len(validation) <= 9
        assert not overlapping(validation, train).any()
    assert split_validation(both, 0.2, 0)[1].names == split_validation(both, 0.2, 0)[1].names
    with pytest.raises(ValueError, match="share content"):
        split_validation(TraceSet("x", (traces.traces[0], twins[0])), 0.5, 0)
