"""Look into a run by hand: choose a trace, step through its chunks, turn a switch and play that trace again.

    explore(evidence)        # in a notebook; widgets for a person

All of it but the widgets is in `Explorer`, which needs no browser.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from netllm_lib.abr import qoe
from netllm_lib.abr.diagnosis import decisions
from netllm_lib.abr.diagnosis.evidence import Evidence
from netllm_lib.abr.diagnosis.replay import can_replay, episodes_of
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
SHOWN = 3  # policies in the figure at first
STYLE = """<style>
.netllm-chunk { display: flex; flex-wrap: wrap; gap: 2em; font-size: 85%; line-height: 1.4 }
.netllm-chunk td, .netllm-chunk th { padding: 0 .6em; text-align: right }
</style>"""
SIZE = (11.5, 7.6)  # of the figure in inches: with the controls it fits on a screen


class Explorer:
    """One run, looked at trace by trace and chunk by chunk. Its state is plain: `trace`, `chunk`, `shown`, `config`."""

    def __init__(self, evidence: Evidence, plans: Plans | None = None) -> None:
        """`plans` are the optimum's for all episodes of the run; without them the oracle is planned trace by trace.

        Raises ValueError if there is no test to look at.
        """
        if evidence.table is None:
            raise ValueError("there is no table of chunks to look at: give the folder of a test (notebook 05)")
        self.evidence = evidence
        self.table = evidence.table
        self.plans = plans
        self.episodes = recorded_episodes(evidence)
        self.labels = list(dict.fromkeys(self.table["trace"]))
        self.order, self.ordered_by = self._order()
        self.trace = str(self.order.index[0])
        self.chunk = 1
        others = sorted(evidence.tables, key=lambda name: -qoe.summarise(evidence.tables[name]).reward)
        self.shown: tuple[str, ...] = tuple(dict.fromkeys([evidence.run, *others]))[: SHOWN - 1]
        if self.episodes is not None:
            self.shown += (ORACLE,)
        self.config: EvalConfig | None = evidence.subject.config if evidence.subject and self.can_replay else None
        self._replays: dict[str, pd.DataFrame] = {}
        self._of_trace: dict[tuple[str, str], Any] = {}
        self._figure: tuple[object, Figure] | None = None

    # --- what there is to choose from

    @property
    def can_replay(self) -> bool:
        """Are weights, PLM, traces and video at hand?"""
        return self.episodes is not None and can_replay(self.evidence)

    @property
    def runs(self) -> list[str]:
        """Everything that can be drawn: the policies of the test, the oracle where traces and video are at hand."""
        return [*self.evidence.tables, *([ORACLE] if self.episodes is not None else [])]

    def choices(self) -> list[tuple[str, str]]:
        """(label, trace) for a dropdown, the worst trace first."""
        return [(f"{value:+.3f}  {name}", str(name)) for name, value in self.order.items()]

    def _order(self) -> tuple[pd.Series, str]:
        """What is missing per trace, the most first, and against what: the optimum, the reference, or nothing."""
        reward = qoe.per_trace(self.table)["reward"]
        reference = self.evidence.reference
        if self.plans is not None:
            missing, against = regret(self.table, self.plans), "regret"
        elif reference is not None:
            missing, against = qoe.per_trace(self.evidence.tables[reference])["reward"] - reward, f"below {reference}"
        else:
            missing, against = -reward, "lowest reward"
        return missing.sort_values(ascending=False, na_position="last", kind="stable"), against

    # --- what happened

    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables of chunks of what is shown, of the chosen trace: policies, the oracle, and the replay where there is one."""
        found = {
            name: self.oracle() if name == ORACLE else self.evidence.tables[name]
            for name in self.shown
            if name in self.runs
        }
        if self.trace in self._replays:
            found[REPLAY] = self._replays[self.trace]
        if not found:
            found = {self.evidence.run: self.table}
        return {name: table[table["trace"] == self.trace] for name, table in found.items()}

    def oracle(self) -> pd.DataFrame:
        """The chunks of the chosen trace under the offline optimum."""

        def made() -> pd.DataFrame:
            simulator = self._simulator([self._row])
            if self.plans is not None:
                levels = self.plans.levels[[self._row]]
            else:
                levels = best_plans(simulator.traces, simulator.video, simulator.episodes).levels
            return play(Replay(levels, ORACLE), simulator).assign(trace=self.trace)

        return self._once(ORACLE, made)

    def observation(self) -> pd.DataFrame | None:
        """What the policy saw before it chose the level of `chunk`: the six rows of the state, in units; None without traces.

        Columns are the last six chunks, the newest at the right; for the sizes of the next chunk they are the six levels.
        """
        if self.episodes is None:
            return None

        def made() -> np.ndarray:
            levels = decisions.levels_of(self.table[self.table["trace"] == self.trace])
            states = rollout(Replay(levels), self._simulator([self._row]), keep_states=True).states
            assert states is not None
            return states[0]

        state = self._once("states", made)[self.chunk - 1]
        values = [row * factor for row, (_, factor) in zip(state, FEATURES, strict=True)]
        columns = [*(f"{back} before" for back in range(5, 0, -1)), "last"]
        return pd.DataFrame(values, index=[name for name, _ in FEATURES], columns=columns)

    def decision(self) -> pd.DataFrame:
        """The decision at `chunk`, a row for each level.

        Columns: Mbps; MB (size of the chunk) and lost (what the level loses of the summed reward against the best one from here on,
        the best levels following) where traces are at hand; p of the run and of the replay; chosen by, each in its own state.
        """
        table = pd.DataFrame({"Mbps": qoe.BITRATES_KBPS / 1000}, index=pd.RangeIndex(qoe.LEVELS, name="level"))
        if self.episodes is not None:
            assert self.evidence.video is not None
            table["MB"] = self.evidence.video.sizes_bytes[:, self.chunk] / 1e6
            values = self._values()[self.chunk]
            table["lost"] = values.max() - values
        shown = {self.evidence.run: self.table[self.table["trace"] == self.trace]} | self.tables()
        chosen = {name: int(rows["level"].iloc[self.chunk]) for name, rows in shown.items() if len(rows) > self.chunk}
        for name in (self.evidence.run, REPLAY):
            if name in shown and set(PROBABILITIES) <= set(shown[name].columns):
                table[f"p({name})"] = shown[name][PROBABILITIES].iloc[self.chunk].to_numpy(dtype=float)
        table["chosen by"] = [
            ", ".join(name for name, level in chosen.items() if level == here) for here in range(qoe.LEVELS)
        ]
        return table

    def _values(self) -> np.ndarray:
        """[chunks, 6] what each level was worth in the states of the run."""

        def made() -> np.ndarray:
            rows = self.table[self.table["trace"] == self.trace]
            return decisions.optimum(rows, self._simulator([self._row])).values[0]

        return self._once("values", made)

    # --- playing it again

    def turn(self, **changes: Any) -> EvalConfig:
        """Change switches of the test (fields of `EvalConfig`) for replays; returns the configuration.

        A context that leaks needs the rolling window; a cleared one goes back to the recorded test's. Raises ValueError where
        nothing can be played again.
        """
        if self.config is None:
            raise ValueError("weights, PLM, traces or video are missing: nothing can be played again")
        assert self.evidence.subject is not None
        recorded = self.evidence.subject.config
        assert recorded is not None
        if "context" in changes:
            leak = changes["context"] == "leak"
            changes |= {"context_window": "rolling" if leak else recorded.context_window}
        self.config = replace(self.config, **changes)
        return self.config

    def replay(self, progress: Progress | None = None) -> pd.DataFrame:
        """Play the chosen trace again with the switches as they are; its chunks, which `tables` then holds too.

        Random numbers are those of the recorded test. A leaking context begins with the previous traces as recorded.
        """
        from netllm_lib.abr.policies.llm import LLMPolicy

        if self.config is None:
            raise ValueError("weights, PLM, traces or video are missing: nothing can be played again")
        subject = self.evidence.subject
        assert subject is not None
        assert self.episodes is not None
        scale = subject.test_scale or subject.meta.settings.scale
        policy = LLMPolicy(
            subject.network,
            replace(subject.meta, settings=replace(subject.meta.settings, scale=scale)),
            self.config,
            REPLAY,
        )
        before = -(-policy.w // (CHUNKS - 1)) if self.config.context == "leak" else 0
        rows = list(range(max(0, self._row - before), self._row + 1))
        levels = decisions.levels_of(self.table[self.table["trace"].isin([self.labels[row] for row in rows])])
        start = np.array([*[CHUNKS] * (len(rows) - 1), 1])
        excerpt = Prefixed(_Excerpt(policy, self.episodes, rows), levels, start)
        played = play(excerpt, self._simulator(rows), progress=progress).tail(CHUNKS)
        self._replays[self.trace] = played.assign(trace=self.trace).reset_index(drop=True)
        self._figure = None
        return self._replays[self.trace]

    def replayed(self) -> str:
        """One line: what the replay brought against the run; empty without one."""
        if self.trace not in self._replays:
            return ""
        rows = self.table[self.table["trace"] == self.trace]
        again = self._replays[self.trace]
        before, after = (float(qoe.chosen(t)["reward"].mean()) for t in (rows, again))
        differ = int((rows["level"].to_numpy() != again["level"].to_numpy()).sum())
        return f"reward {after:.3f} instead of {before:.3f} ({after - before:+.3f}), {differ} other levels"

    # --- as a figure and as text

    def png(self, dpi: int = 100) -> bytes:
        """The timeline of the chosen trace, the chosen chunk marked, as a PNG file."""
        tables = self.tables()
        key = (self.trace, tuple(tables), id(self._replays.get(self.trace)))
        if self._figure is None or self._figure[0] != key:
            self._figure = (key, self._draw(tables))
        figure = self._figure[1]
        subject = of_trace(next(iter(tables.values())), self.trace)
        chunk = min(self.chunk, len(subject) - 1)
        begin, end = edges(subject)[chunk : chunk + 2]
        marks = [axes.axvspan(begin, end, color="k", alpha=0.18, linewidth=0) for axes in figure.axes if axes.lines]
        marks += [axes.axvspan(begin, end, color="k", alpha=0.18, linewidth=0) for axes in figure.axes[:1]]
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        for mark in marks:
            mark.remove()
        return buffer.getvalue()

    def _draw(self, tables: Mapping[str, pd.DataFrame]) -> Figure:
        trace = pointer = None
        if self.episodes is not None:
            assert self.evidence.traces is not None
            trace = self.evidence.traces.traces[int(self.episodes.trace_index[self._row])]
            pointer = int(self.episodes.start_ptr[self._row])
        subject = REPLAY if REPLAY in tables else self.evidence.run
        figure = Figure(figsize=SIZE, layout="constrained")
        timeline(tables, self.trace, trace, pointer, subject if subject in tables else None, figure)
        return figure

    def html(self) -> str:
        """Observation and decision at the chosen chunk, as HTML."""
        rows = self.table[self.table["trace"] == self.trace]
        if len(rows) <= self.chunk:
            return f"<div>this trace has only {len(rows)} chunks</div>"
        row: Any = rows.iloc[self.chunk].to_dict()
        seen = self.observation()
        head = f"<b>chunk {self.chunk}</b>: {self.evidence.run} chose level {int(row['level'])}, reward {row['reward']:.3f}"
        head += f", stall {row['rebuffer_s']:.2f} s" if row["rebuffer_s"] > 0 else ""
        if "return_to_go" in row and np.isfinite(row["return_to_go"]):
            head += f"; it was asked for a return-to-go of {row['return_to_go']:.5f}"
        number = "{:.2f}".format
        shown = self.decision().fillna("").to_html(float_format=number, border=0, escape=True)
        left = "" if seen is None else seen.to_html(float_format=number, border=0, escape=True)
        return f"{STYLE}<div>{head}</div><div class='netllm-chunk'><div>{left}</div><div>{shown}</div></div>"

    # --- small things

    @property
    def _row(self) -> int:
        return self.labels.index(self.trace)

    def _simulator(self, rows: Sequence[int]) -> Simulator:
        if self.episodes is None:
            raise ValueError("the traces or the video of the test are not at hand (--data)")
        assert self.evidence.traces is not None
        assert self.evidence.video is not None
        return Simulator(self.evidence.traces, self.evidence.video, self.episodes.rows(rows))

    def _once(self, what: str, made: Any) -> Any:
        """Computed once for each trace."""
        key = (self.trace, what)
        if key not in self._of_trace:
            self._of_trace[key] = made()
        return self._of_trace[key]


class _Excerpt(Policy):
    """A policy over some of the episodes of a test, with the random numbers that it has in the whole of it."""

    def __init__(self, policy: Policy, episodes: Episodes, rows: Sequence[int]) -> None:
        self.policy, self.episodes, self.rows = policy, episodes, np.asarray(rows)
        self.name = policy.name
        self.carries_state, self.acts_after_last = policy.carries_state, policy.acts_after_last

    def reset(self, episodes: Episodes) -> None:
        self.policy.reset(self.episodes)

    def act(self, observation: Observation) -> np.ndarray:
        return self.policy.act(replace(observation, episode=self.rows[observation.episode]))

    def played(self, levels: np.ndarray) -> None:
        self.policy.played(levels)

    def extras(self) -> Mapping[str, np.ndarray]:
        return self.policy.extras()


def recorded_episodes(evidence: Evidence) -> Episodes | None:
    """The run's episodes in its table's order, if playing its levels in them gives its rewards; else None.

    None where traces or video are not at hand, or are not those of the test, or the table is not whole.
    """
    table, traces, video = evidence.table, evidence.traces, evidence.video
    if table is None or traces is None or video is None or not set(table["trace"]) <= set(traces.names):
        return None
    episodes = episodes_of(evidence)
    names = [traces.names[i] for i in episodes.trace_index]
    if names != list(dict.fromkeys(table["trace"])):
        return None
    try:
        levels = decisions.levels_of(table)
        replayed = Simulator(traces, video, episodes).replay(levels).reward.ravel()
    except ValueError:
        return None
    rewards = table["reward"].to_numpy()
    whole = levels.shape == (len(episodes), CHUNKS)
    fits = whole and np.allclose(replayed, rewards, rtol=0, atol=decisions.REPLAY_TOLERANCE)
    return episodes if fits else None


# --- widgets ------------------------------------------------------------------------------------------------------------


def explore(evidence: Evidence, plans: Plans | None = None) -> Any:
    """Widgets around an `Explorer`, for JupyterLab; the last value of a cell shows them."""
    import ipywidgets as w

    explorer = Explorer(evidence, plans)
    wide = {"description_width": "initial"}
    trace = w.Dropdown(
        options=explorer.choices(), value=explorer.trace, description=f"trace ({explorer.ordered_by})", style=wide,
        layout=w.Layout(width="30em"),
    )  # fmt: skip
    chunk = w.IntSlider(1, 1, CHUNKS - 1, description="chunk", layout=w.Layout(width="26em"))
    back, on = (w.Button(icon=icon, layout=w.Layout(width="3em")) for icon in ("step-backward", "step-forward"))
    shown = w.SelectMultiple(
        options=explorer.runs, value=explorer.shown, description="shown", rows=min(6, len(explorer.runs)),
        layout=w.Layout(width="20em"),
    )  # fmt: skip
    image, text, status = w.Image(format="png", layout=w.Layout(max_width="100%")), w.HTML(), w.HTML()

    def redraw() -> None:
        image.value = explorer.png()
        text.value = explorer.html()
        status.value = explorer.replayed()

    def guarded(action: Any) -> Any:
        """An exception in a widget's callback would only reach the log."""

        def called(change: Any) -> None:
            try:
                action(change)
                redraw()
            except (ValueError, OSError, RuntimeError) as error:
                status.value = f"<b>{type(error).__name__}</b>: {error}"

        return called

    switches, button, live = _switches(w, explorer)

    def again(_: Any) -> None:
        explorer.replay(lambda done, total: setattr(status, "value", f"replaying: {done} of {total} chunks"))

    def set_trace(change: Any) -> None:
        explorer.trace = change["new"]
        if live.value:
            again(change)

    def set_chunk(change: Any) -> None:
        explorer.chunk = change["new"]

    def set_shown(change: Any) -> None:
        explorer.shown = tuple(change["new"])

    def set_switch(name: str) -> Any:
        def turned(change: Any) -> None:
            explorer.turn(**{name: change["new"]})
            if live.value:
                again(change)

        return turned

    for name, field in switches.items():
        field.observe(guarded(set_switch(name)), "value")
    button.on_click(guarded(again))
    trace.observe(guarded(set_trace), "value")
    chunk.observe(guarded(set_chunk), "value")
    shown.observe(guarded(set_shown), "value")
    back.on_click(lambda _: setattr(chunk, "value", max(1, chunk.value - 1)))
    on.on_click(lambda _: setattr(chunk, "value", min(CHUNKS - 1, chunk.value + 1)))
    redraw()
    fields = list(switches.values())
    controls = [w.VBox(fields[:2]), w.VBox(fields[2:]), w.VBox([button, live])]
    if not explorer.can_replay:
        controls = [w.HTML("weights, PLM, traces or video are missing: this run can be looked at, not played again")]
    return w.VBox([w.HBox([trace, back, on, chunk]), w.HBox([shown, *controls]), status, image, text])


def _switches(w: Any, explorer: Explorer) -> tuple[dict[str, Any], Any, Any]:
    """Widgets of the switches of the test by field of `EvalConfig`, the button that plays again, and whether changes do."""
    button = w.Button(description="Replay this trace", icon="play", button_style="primary")
    live = w.Checkbox(value=False, description="at every change", indent=False)
    config = explorer.config
    if config is None:
        return {}, button, live
    assert explorer.evidence.subject is not None
    narrow = {"button_width": "6em"}
    fields = {
        "choose": w.ToggleButtons(options=["argmax", "sample"], value=config.choose, description="level", style=narrow),
        "context": w.ToggleButtons(
            options=["clear", "leak"], value=config.context, description="context", style=narrow
        ),
        "target_return_scale": w.BoundedFloatText(
            config.target_return_scale, min=-10, max=10, step=0.1, description="target ×"
        ),
        "w": w.BoundedIntText(
            config.w or explorer.evidence.subject.meta.settings.w, min=1, max=CHUNKS - 1, description="window"
        ),
    }
    fields["target_return_scale"].tooltip = "factor on the training pool's largest return-to-go"
    fields["w"].tooltip = "previous chunks in the context"
    return fields, button, live
