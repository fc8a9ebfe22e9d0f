"""Look into a run by hand: choose a trace, step through its chunks, turn a switch and play that trace again.

    explore(evidence)        # in a notebook; widgets for a person

All of it but the widgets is in `Explorer`, which needs no browser.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
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
from netllm_lib.abr.episodes import Episodes, Observation, Progress
from netllm_lib.abr.optimum import Plans, best_plans, regret
from netllm_lib.abr.play import play, rollout
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.simple import Prefixed, Replay
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.simulator import Simulator

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

    def __init__(self, evidence: Evidence, plans: Plans | None = None) -> None:
        """`plans` are the optimum's for all episodes of the run; without them the oracle is planned trace by trace.

        Raises ValueError if there is no test to look at.
        """
        if evidence.table is None:
            raise ValueError("there is no table of chunks to look at: give the folder of a test (notebook 05)")
        self.evidence, self.table, self.plans = evidence, evidence.table, plans
        self.simulator = recorded(evidence)  # None: traces or video are not at hand
        self.config: EvalConfig | None = None  # of replays; None: nothing can be played again
        if self.simulator is not None and evidence.subject is not None:
            self.config = evidence.subject.config
        self.labels = list(dict.fromkeys(self.table["trace"]))
        self.order, self.ordered_by = self._order()  # what is missing per trace, the most first, and against what
        self.trace, self.chunk = str(self.order.index[0]), 1
        self.runs = [*evidence.tables, *([ORACLE] if self.simulator is not None else [])]  # all that can be drawn
        ranked = sorted(evidence.tables, key=lambda name: -qoe.summarise(evidence.tables[name]).reward)
        self.shown = (*dict.fromkeys([evidence.run, *ranked][:2]), *self.runs[len(evidence.tables) :])
        self._replays: dict[str, pd.DataFrame] = {}
        self._of_trace = functools.cache(lambda trace, what: what())  # what is computed once for each trace

    def choices(self) -> list[tuple[str, str]]:
        """(label, trace) for a dropdown, the worst trace first."""
        return [(f"{value:+.3f}  {name}", str(name)) for name, value in self.order.items()]

    def _order(self) -> tuple[pd.Series, str]:
        reward, reference = qoe.per_trace(self.table)["reward"], self.evidence.reference
        if self.plans is not None:
            missing, against = regret(self.table, self.plans), "regret"
        elif reference is not None:
            missing, against = qoe.per_trace(self.evidence.tables[reference])["reward"] - reward, f"below {reference}"
        else:
            missing, against = -reward, "lowest reward"
        return missing.sort_values(ascending=False, na_position="last", kind="stable"), against

    # --- what happened

    @property
    def rows(self) -> pd.DataFrame:
        """The run's chunks of the chosen trace."""
        return self.table[self.table["trace"] == self.trace]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables of chunks of what is shown, of the chosen trace: policies, the oracle, and the replay where there is one."""
        found = {name: self.evidence.tables[name] for name in self.shown if name in self.evidence.tables}
        if ORACLE in self.shown and self.simulator is not None:
            found[ORACLE] = self._of_trace(self.trace, self._oracle)
        if self.trace in self._replays:
            found[REPLAY] = self._replays[self.trace]
        return {name: t[t["trace"] == self.trace] for name, t in (found or {self.evidence.run: self.table}).items()}

    def _oracle(self) -> pd.DataFrame:
        simulator = self._episodes([self._row])
        plans = self.plans or best_plans(simulator.traces, simulator.video, simulator.episodes)
        levels = plans.levels[[self._row]] if self.plans else plans.levels
        return play(Replay(levels, ORACLE), simulator).assign(trace=self.trace)

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
        states = rollout(Replay(decisions.levels_of(self.rows)), self._episodes([self._row]), keep_states=True).states
        assert states is not None
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
        return decisions.optimum(self.rows, self._episodes([self._row])).values[0]

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
        rows = list(range(max(0, self._row - before), self._row + 1))
        levels = decisions.levels_of(self.table[self.table["trace"].isin([self.labels[row] for row in rows])])
        start = np.array([*[CHUNKS] * (len(rows) - 1), 1])
        assert self.simulator is not None
        excerpt = Prefixed(_Excerpt(policy, self.simulator.episodes, rows), levels, start)
        played = play(excerpt, self._episodes(rows), progress=progress).tail(CHUNKS)
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

    def _episodes(self, rows: list[int]) -> Simulator:
        assert self.simulator is not None
        return decisions.alone(self.simulator, rows)


class _Excerpt(Policy):
    """A policy over some of the episodes of a test, with the random numbers that it has in the whole of it."""

    def __init__(self, policy: Policy, episodes: Episodes, rows: Sequence[int]) -> None:
        self.policy, self.episodes, self.rows = policy, episodes, np.asarray(rows)
        self.name, self.played, self.extras = policy.name, policy.played, policy.extras  # type: ignore[method-assign]
        self.carries_state, self.acts_after_last = policy.carries_state, policy.acts_after_last

    def reset(self, episodes: Episodes) -> None:
        self.policy.reset(self.episodes)

    def act(self, observation: Observation) -> np.ndarray:
        return self.policy.act(replace(observation, episode=self.rows[observation.episode]))


# --- widgets ------------------------------------------------------------------------------------------------------------


def explore(evidence: Evidence, plans: Plans | None = None) -> Any:
    """Widgets around an `Explorer`, for JupyterLab; the last value of a cell shows them."""
    import ipywidgets as w

    explorer = Explorer(evidence, plans)

    def layout(width: str) -> Any:
        return w.Layout(width=width)

    trace = w.Dropdown(
        options=explorer.choices(), value=explorer.trace, description=f"trace ({explorer.ordered_by})",
        style={"description_width": "initial"}, layout=layout("30em"),
    )  # fmt: skip
    chunk = w.IntSlider(1, 1, CHUNKS - 1, description="chunk", layout=layout("26em"))
    back, on = (w.Button(icon=icon, layout=layout("3em")) for icon in ("step-backward", "step-forward"))
    shown = w.SelectMultiple(options=explorer.runs, value=explorer.shown, description="shown", layout=layout("20em"))
    button = w.Button(description="Replay this trace", icon="play", button_style="primary")
    live = w.Checkbox(value=False, description="at every change", indent=False)
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
                status.value = f"<b>{type(error).__name__}</b>: {error}"

        return called

    def again(_: Any) -> None:
        explorer.replay(lambda done, total: setattr(status, "value", f"replaying: {done} of {total} chunks"))

    def set_trace(change: Any) -> None:
        explorer.trace = change["new"]
        if live.value:
            again(change)

    def set_switch(change: Any) -> None:
        explorer.turn(**{change["owner"].name: change["new"]})
        if live.value:
            again(change)

    config, subject = explorer.config, explorer.evidence.subject
    switches: dict[str, Any] = {}
    if config is not None and subject is not None:
        narrow = {"style": {"button_width": "6em"}}
        switches = {
            "choose": w.ToggleButtons(options=["argmax", "sample"], value=config.choose, description="level", **narrow),
            "context": w.ToggleButtons(
                options=["clear", "leak"], value=config.context, description="context", **narrow
            ),
            "target_return_scale": w.BoundedFloatText(
                config.target_return_scale, min=-10, max=10, step=0.1, description="target ×"
            ),
            "w": w.BoundedIntText(config.w or subject.meta.settings.w, min=1, max=CHUNKS - 1, description="window"),
        }
    for name, field in switches.items():
        field.name = name
        field.observe(guarded(set_switch), "value")
    button.on_click(guarded(again))
    trace.observe(guarded(set_trace), "value")
    chunk.observe(guarded(lambda change: setattr(explorer, "chunk", change["new"])), "value")
    shown.observe(guarded(lambda change: setattr(explorer, "shown", tuple(change["new"]))), "value")
    back.on_click(lambda _: setattr(chunk, "value", max(1, chunk.value - 1)))
    on.on_click(lambda _: setattr(chunk, "value", min(CHUNKS - 1, chunk.value + 1)))
    redraw()
    fields = list(switches.values())
    controls = [w.VBox(fields[:2]), w.VBox(fields[2:]), w.VBox([button, live])]
    if explorer.config is None:
        controls = [w.HTML("weights, PLM, traces or video are missing: this run can be looked at, not played again")]
    return w.VBox([w.HBox([trace, back, on, chunk]), w.HBox([shown, *controls]), status, image, text])
