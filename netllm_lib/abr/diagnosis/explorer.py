"""Look into a run by hand: choose a trace, step through its chunks, turn a switch and play that trace again.

    explore(evidence)        # in a notebook; widgets for a person

All of it but the widgets is in `Explorer`, which needs no browser.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis import decisions
from netllm_lib.abr.diagnosis.evidence import Evidence, Subject
from netllm_lib.abr.diagnosis.replay import policy_of, recorded
from netllm_lib.abr.diagnosis.timeline import PROBABILITIES, edges, of_trace, timeline
from netllm_lib.abr.episodes import Progress
from netllm_lib.abr.optimum import best_plans, regret
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.simple import Prefixed, Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.text import escaped

if TYPE_CHECKING:
    from netllm_lib.abr.policies.llm import EvalConfig

ORACLE, REPLAY = "oracle", "replay"
FEATURES = (
    ("bitrate of past chunks (Mbps)", qoe.BITRATES_KBPS[-1] / 1000),
    ("buffer after past chunks (s)", 10.0),
    ("throughput of past chunks (Mbps)", 8.0),
    ("download time of past chunks (s)", 10.0),
    ("size of the next chunk, by level (MB)", 1.0),
    ("chunks left", float(CHUNKS)),
)
"""The six rows of the Pensieve state, each with the factor from what the policy sees to the unit named."""
STYLE = """<style>
.netllm-chunk { display: flex; flex-wrap: wrap; gap: 2em; font-size: 85%; line-height: 1.4 }
.netllm-chunk td, .netllm-chunk th { padding: 0 .6em; text-align: right }
</style>"""


class Explorer:
    """One run, looked at trace by trace and chunk by chunk. Its state is plain: `trace`, `chunk`, `shown`, `config`."""

    def __init__(self, evidence: Evidence) -> None:
        """Raises ValueError if there is no test to look at."""
        if evidence.table is None:
            raise ValueError("there is no table of chunks to look at: give the folder of a test (notebook 05)")
        self.evidence, self.table, self.played = evidence, evidence.table, dict(evidence.tables)
        self.simulator = recorded(evidence)  # None: traces or video are not at hand
        self.config: EvalConfig | None = None  # of replays; None: nothing can be played again
        missing, self.ordered_by = -qoe.per_trace(self.table)["reward"], "lowest reward"
        if self.simulator is not None:
            plans = best_plans(self.simulator.traces, self.simulator.video, self.simulator.episodes)
            missing, self.ordered_by = regret(self.table, plans), "regret"
            oracle = play(Replay(plans.levels, ORACLE), self.simulator)
            self.played[ORACLE] = oracle.assign(trace=self.table["trace"].to_numpy())
            self.config = evidence.subject.config if evidence.subject is not None else None
        self.labels = list(dict.fromkeys(self.table["trace"]))
        self.order = missing.sort_values(ascending=False, kind="stable")  # what is missing per trace, the most first
        self.trace, self.chunk = str(self.order.index[0]), 1
        ranked = sorted(evidence.tables, key=lambda name: -qoe.summarise(evidence.tables[name]).reward)
        self.shown = (*dict.fromkeys([evidence.run, *ranked][:2]), *([ORACLE] if ORACLE in self.played else []))
        self._replays: dict[str, pd.DataFrame] = {}
        self._of_trace = functools.cache(lambda trace, what: what())  # what is computed once for each trace

    def choices(self) -> list[tuple[str, str]]:
        """(label, trace) for a dropdown, the worst trace first."""
        return [(f"{value:+.3f}  {name}", str(name)) for name, value in self.order.items()]

    # --- what happened

    @property
    def rows(self) -> pd.DataFrame:
        """The run's chunks of the chosen trace."""
        return self.table[self.table["trace"] == self.trace]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables of chunks of what is shown, of the chosen trace: policies, the oracle, and the replay where there is one."""
        found = {name: self.played[name] for name in self.shown} or {self.evidence.run: self.table}
        if self.trace in self._replays:
            found[REPLAY] = self._replays[self.trace]
        return {name: table[table["trace"] == self.trace] for name, table in found.items()}

    def observation(self) -> pd.DataFrame | None:
        """What the policy saw before it chose the level of `chunk`: the six rows of the state, in units; None without traces.

        Columns are the last six chunks, the newest at the right; for the sizes of the next chunk they are the six levels.
        """
        if self.simulator is None:
            return None
        state = self._of_trace(self.trace, self._states)[self.chunk - 1]
        columns = [*(f"{back} before" for back in range(5, 0, -1)), "last"]
        return pd.DataFrame(state * np.array([[f] for _, f in FEATURES]), [name for name, _ in FEATURES], columns)

    def _states(self) -> np.ndarray:
        assert self.simulator is not None
        player = Replay(decisions.levels_of(self.table))
        states = rollout(player, self.simulator.part([self._row])).states
        return states[0]

    def decision(self) -> pd.DataFrame:
        """The decision at `chunk`, a row for each level.

        Columns: Mbps; MB (size of the chunk) and lost (what the level loses of the summed reward against the best one from here on,
        the best levels following) where traces are at hand; p of the run and of the replay; chosen by, each in its own state.
        """
        table = pd.DataFrame({"Mbps": qoe.BITRATES_KBPS / 1000}, index=pd.RangeIndex(qoe.LEVELS, name="level"))
        if self.simulator is not None:
            table["MB"] = self.simulator.video.sizes_bytes[:, self.chunk] / 1e6
            values = self._of_trace(self.trace, self._values)[self.chunk]
            table["lost"] = values.max() - values
        shown = {self.evidence.run: self.rows} | self.tables()
        for name in (self.evidence.run, REPLAY):
            if name in shown and set(PROBABILITIES) <= set(shown[name].columns):
                table[f"p({name})"] = shown[name][PROBABILITIES].iloc[self.chunk].to_numpy(dtype=float)
        chosen = {name: int(rows["level"].iloc[self.chunk]) for name, rows in shown.items() if len(rows) > self.chunk}
        by_level = [", ".join(name for name, level in chosen.items() if level == here) for here in range(qoe.LEVELS)]
        return table.assign(**{"chosen by": by_level})

    def _values(self) -> np.ndarray:
        assert self.simulator is not None
        return decisions.optimum(self.rows, self.simulator.part([self._row])).values[0]

    # --- playing it again

    def turn(self, **changes: Any) -> EvalConfig:
        """Change switches of the test (fields of `EvalConfig`) for replays; returns the configuration.

        A context that leaks needs the rolling window; a cleared one goes back to the recorded test's. Raises ValueError where
        nothing can be played again.
        """
        config, subject = self._subject()
        if "context" in changes:
            window = "rolling" if changes["context"] == "leak" else (subject.config or config).context_window
            changes |= {"context_window": window}
        self.config = replace(config, **changes)
        return self.config

    def replay(self, progress: Progress | None = None) -> pd.DataFrame:
        """Play the chosen trace again with the switches as they are; its chunks, which `tables` then holds too.

        Random numbers are those of the recorded test. A leaking context begins with the previous traces as recorded.
        """
        config, subject = self._subject()
        policy = policy_of(replace(subject, config=config, played=None))
        before = -(-policy.w // (CHUNKS - 1)) if config.context == "leak" else 0
        start = np.where(np.arange(len(self.labels)) == self._row, 1, CHUNKS)
        player = Prefixed(policy, decisions.levels_of(self.table), start)
        assert self.simulator is not None
        part = self.simulator.part(range(max(0, self._row - before), self._row + 1))
        played = play(player, part, progress=progress).tail(CHUNKS)
        self._replays[self.trace] = played.assign(trace=self.trace).reset_index(drop=True)
        return self._replays[self.trace]

    def replayed(self) -> str:
        """One line: what the replay brought against the run; empty without one."""
        if self.trace not in self._replays:
            return ""
        again = self._replays[self.trace]
        before, after = (float(qoe.chosen(t)["reward"].mean()) for t in (self.rows, again))
        differ = int((self.rows["level"].to_numpy() != again["level"].to_numpy()).sum())
        return f"reward {after:.3f} instead of {before:.3f} ({after - before:+.3f}), {differ} other levels"

    def _subject(self) -> tuple[EvalConfig, Subject]:
        if self.config is None or self.evidence.subject is None:
            raise ValueError("weights, PLM, traces or video are missing: nothing can be played again")
        return self.config, self.evidence.subject

    # --- as a figure and as text

    def png(self, dpi: int = 100) -> bytes:
        """The timeline of the chosen trace, the chosen chunk marked, as a PNG file."""
        tables, trace = self.tables(), None
        if self.simulator is not None:
            trace = self.simulator.traces.traces[int(self.simulator.episodes.trace_index[self._row])]
        figure = Figure(figsize=(11.5, 7.6), layout="constrained")  # with the controls it fits on a screen
        axes = timeline(tables, self.trace, trace, REPLAY if REPLAY in tables else self.evidence.run, figure)
        borders = edges(of_trace(next(iter(tables.values())), self.trace))
        chunk = min(self.chunk, len(borders) - 2)
        for panel in axes:
            panel.axvspan(*borders[chunk : chunk + 2], color="k", alpha=0.25, linewidth=0)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def html(self) -> str:
        """Observation and decision at the chosen chunk, as HTML."""
        if len(self.rows) <= self.chunk:
            return f"<div>this trace has only {len(self.rows)} chunks</div>"
        row: Any = self.rows.iloc[self.chunk].to_dict()
        head = f"<b>chunk {self.chunk}</b>: level {int(row['level'])} was chosen, reward {row['reward']:.3f}"
        head += f", stall {row['rebuffer_s']:.2f} s" if row["rebuffer_s"] > 0 else ""
        if np.isfinite(row.get("return_to_go", np.nan)):
            head += f"; the policy was asked for a return-to-go of {row['return_to_go']:.5f}"
        tables = [table for table in (self.observation(), self.decision().fillna("")) if table is not None]
        cells = [f"<div>{table.to_html(float_format='{:.2f}'.format, border=0, escape=True)}</div>" for table in tables]
        return f"{STYLE}<div>{head}</div><div class='netllm-chunk'>{''.join(cells)}</div>"

    @property
    def _row(self) -> int:
        return self.labels.index(self.trace)


# --- widgets ------------------------------------------------------------------------------------------------------------


def explore(evidence: Evidence) -> Any:
    """Widgets around an `Explorer`, for JupyterLab; the last value of a cell shows them."""
    import ipywidgets as w

    explorer = Explorer(evidence)

    def layout(width: str) -> Any:
        return w.Layout(width=width)

    trace = w.Dropdown(
        options=explorer.choices(), value=explorer.trace, description=f"trace ({explorer.ordered_by})",
        style={"description_width": "initial"}, layout=layout("30em"),
    )  # fmt: skip
    chunk = w.IntSlider(1, 1, CHUNKS - 1, description="chunk", layout=layout("26em"))
    shown = w.SelectMultiple(
        options=list(explorer.played), value=explorer.shown, description="shown", layout=layout("20em")
    )
    button = w.Button(description="Replay this trace", icon="play", button_style="primary")
    image, text, status = w.Image(format="png", layout=w.Layout(max_width="100%")), w.HTML(), w.HTML()

    def redraw() -> None:
        image.value, text.value, status.value = explorer.png(), explorer.html(), explorer.replayed()

    def guarded(action: Callable[[Any], object]) -> Callable[[Any], None]:
        """An exception in a widget's callback would only reach the log."""

        def called(change: Any) -> None:
            try:
                action(change)
                redraw()
            except (ValueError, OSError, RuntimeError) as error:
                status.value = f"<b>{type(error).__name__}</b>: {escaped(error)}"

        return called

    def again(_: Any) -> None:
        explorer.replay(lambda done, total: setattr(status, "value", f"replaying: {done} of {total} chunks"))

    def turn(name: str, change: Any) -> None:
        explorer.turn(**{name: change["new"]})

    def choose(name: str, change: Any) -> None:
        setattr(explorer, name, change["new"])

    config, subject = explorer.config, explorer.evidence.subject
    switches: dict[str, Any] = {}
    if config is not None and subject is not None:
        narrow = {"style": {"button_width": "6em"}}
        switches = {
            "choose": w.ToggleButtons(options=["argmax", "sample"], value=config.choose, description="level", **narrow),
            "context": w.ToggleButtons(
                options=["clear", "leak"], value=config.context, description="context", **narrow
            ),
            "target_return_scale": w.FloatText(config.target_return_scale, description="target ×"),
            "w": w.BoundedIntText(config.w or subject.meta.settings.w, min=1, max=CHUNKS - 1, description="window"),
        }
    for name, field in switches.items():
        field.observe(guarded(functools.partial(turn, name)), "value")
    for name, field in {"trace": trace, "chunk": chunk, "shown": shown}.items():
        field.observe(guarded(functools.partial(choose, name)), "value")
    button.on_click(guarded(again))
    redraw()
    fields = list(switches.values())
    controls = [w.VBox(fields[:2]), w.VBox(fields[2:]), button]
    if explorer.config is None:
        controls = [w.HTML("weights, PLM, traces or video are missing: this run can be looked at, not played again")]
    return w.VBox([w.HBox([trace, chunk]), w.HBox([shown, *controls]), status, image, text])
