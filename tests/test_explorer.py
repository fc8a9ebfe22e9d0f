"""The explorer of notebook 06 without a browser: what it shows, and traces that are played again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis import Evidence
from netllm_lib.abr.diagnosis import load as sources
from netllm_lib.abr.diagnosis.explorer import REPLAY, Explorer, explore
from netllm_lib.abr.diagnosis.replay import recorded
from netllm_lib.abr.evaluate import Test
from run_fixtures import SmallRun, prepare_run, write_test

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return prepare_run(tmp_path_factory.mktemp("run"), test_traces=4, epochs=0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def tested(run: SmallRun) -> Callable[..., Evidence]:
    """The run, tested with some switches turned."""
    found: dict[str, Evidence] = {}

    def with_switches(**switches: Any) -> Evidence:
        name = "-".join(["test", *(f"{key}={value}" for key, value in switches.items())])
        if name not in found:
            found[name] = sources.load(write_test(run, name, **switches), data=run.data)
        return found[name]

    return with_switches


def test_worst_traces_come_first(tested: Callable[..., Evidence]) -> None:
    explorer = Explorer(tested())
    assert explorer.ordered_by == "regret"
    assert explorer.order.min() >= 0
    assert explorer.order.is_monotonic_decreasing
    rewards = {name: qoe.per_trace(explorer.played[name])["reward"] for name in ("oracle", "llm")}
    np.testing.assert_allclose((rewards["oracle"] - rewards["llm"])[explorer.order.index], explorer.order)
    assert [name for _, name in explorer.choices()] == list(explorer.order.index)
    assert explorer.choices()[0] == (f"{explorer.order.iloc[0]:+.3f}  {explorer.trace}", explorer.trace)


def test_observation_is_what_the_policy_saw_in_units(tested: Callable[..., Evidence]) -> None:
    evidence = tested()
    explorer = Explorer(evidence)
    explorer.chunk = 9
    seen = explorer.observation()
    assert seen is not None
    rows = explorer.table[explorer.table["trace"] == explorer.trace]
    past = rows.iloc[3:9]
    np.testing.assert_allclose(seen.iloc[0], past["bitrate_kbps"] / 1000, rtol=1e-6)
    np.testing.assert_allclose(seen.iloc[1], past["buffer_s"], rtol=1e-6)
    np.testing.assert_allclose(seen.iloc[2], 8 * past["size_bytes"] / past["delay_ms"] / 1000, rtol=1e-6)
    np.testing.assert_allclose(seen.iloc[3], past["delay_ms"] / 1000, rtol=1e-6)
    assert evidence.video is not None
    np.testing.assert_allclose(seen.iloc[4], evidence.video.sizes_bytes[:, 9] / 1e6, rtol=1e-6)
    assert seen.iloc[5, -1] == pytest.approx(48 - 9)
    assert all("(" in name or name == "chunks left" for name in seen.index)


def test_decision_tells_probabilities_and_what_each_level_loses(tested: Callable[..., Evidence]) -> None:
    explorer = Explorer(tested())
    explorer.chunk = 5
    table = explorer.decision()
    row = explorer.table[explorer.table["trace"] == explorer.trace].iloc[5]
    np.testing.assert_allclose(table["p(llm)"], row[[f"p{level}" for level in range(6)]].astype(float))
    assert table["p(llm)"].idxmax() == row["level"]
    assert "llm" in table["chosen by"][row["level"]]
    assert table["lost"].min() == 0
    assert "chunk 5" in explorer.html()
    assert "throughput of past chunks (Mbps)" in explorer.html()


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"choose": "sample"},
        {"choose": "sample", "draws": "stream", "target_return_scale": 2.0, "w": 5},
        {"context": "leak", "context_window": "rolling", "extra_step": True, "w": 3},
    ],
    ids=["sound", "sampled", "one stream", "leaking"],
)
def test_a_replay_as_recorded_is_the_record(tested: Callable[..., Evidence], switches: dict[str, Any]) -> None:
    explorer = Explorer(tested(**switches))
    for trace in (explorer.labels[0], explorer.labels[-1]):
        explorer.trace = trace
        again = explorer.replay()
        rows = explorer.table[explorer.table["trace"] == trace]
        assert again["level"].to_list() == rows["level"].to_list()
        np.testing.assert_allclose(again["p0"].iloc[1:], rows["p0"].iloc[1:], atol=1e-5)
        assert explorer.replayed().endswith("0 other levels")


def test_switches_change_the_replay_and_the_figure(tested: Callable[..., Evidence]) -> None:
    explorer = Explorer(tested())
    before = explorer.png(dpi=40)
    assert before.startswith(PNG)
    assert explorer.turn(choose="sample").choose == "sample"
    done: list[int] = []
    again = explorer.replay(lambda chunk, total: done.append(chunk))
    assert done[-1] == 48
    rows = explorer.table[explorer.table["trace"] == explorer.trace]
    assert (again["level"].to_numpy() != rows["level"].to_numpy()).any()
    assert REPLAY in explorer.tables()
    assert "p(replay)" in explorer.decision()
    after = explorer.png(dpi=40)
    assert after != before
    explorer.chunk = 20
    assert explorer.png(dpi=40) != after
    assert explorer.turn(context="leak").context_window == "rolling"
    assert explorer.turn(context="clear").context_window == "cached"


def test_less_is_shown_where_less_is_known(tested: Callable[..., Evidence]) -> None:
    evidence = tested()
    without = Explorer(replace(evidence, subject=None))
    assert without.config is None
    with pytest.raises(ValueError, match="nothing can be played again"):
        without.replay()
    with pytest.raises(ValueError, match="nothing can be played again"):
        without.turn(choose="sample")
    logs = Explorer(replace(evidence, traces=None, video=None, test=Test({"llm": evidence.tables["llm"]}, "llm")))
    assert logs.observation() is None
    assert list(logs.played) == ["llm"]
    assert logs.ordered_by == "lowest reward"
    assert "lost" not in logs.decision()
    assert logs.png(dpi=40).startswith(PNG)
    with pytest.raises(ValueError, match="no table of chunks"):
        Explorer(Evidence())


def test_episodes_are_refused_where_the_table_does_not_follow_from_them(tested: Callable[..., Evidence]) -> None:
    evidence = tested()
    table = evidence.tables["llm"]
    assert recorded(evidence) is not None
    changed = {
        "rewards": table.assign(reward=table["reward"] + 0.1),
        "order": table.iloc[::-1].reset_index(drop=True),
        "short": table[table["chunk"] < 47],
        "names": table.assign(trace="other"),
    }
    for other in changed.values():
        assert recorded(replace(evidence, test=Test({"llm": other}, "llm", evidence.setting))) is None


def test_widgets_follow_the_explorer(tested: Callable[..., Evidence]) -> None:
    box = explore(tested())
    (trace, chunk), (shown, switches, numbers, again) = box.children[0].children, box.children[1].children
    status, image, text = box.children[2:]
    first = bytes(image.value)
    trace.value = trace.options[1][1]
    assert image.value != first
    chunk.value = 2
    assert "chunk 2" in text.value
    switches.children[0].value = "sample"
    numbers.children[0].value = 5.0
    assert status.value == ""
    again.click()
    explorer = Explorer(tested())
    explorer.trace = trace.value
    explorer.turn(choose="sample", target_return_scale=5.0)
    explorer.replay()
    assert status.value == explorer.replayed()
    shown.value = ("llm",)
    assert bytes(image.value).startswith(PNG)


def test_widgets_say_what_went_wrong(tested: Callable[..., Evidence], monkeypatch: pytest.MonkeyPatch) -> None:
    box = explore(tested())
    status = box.children[2]

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of <img src=x>")

    monkeypatch.setattr(Explorer, "replay", broken)
    box.children[1].children[-1].click()
    assert status.value == "<b>RuntimeError</b>: out of &lt;img src=x&gt;"
