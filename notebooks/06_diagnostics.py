# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: NetLLM (PyTorch)
#     language: python
#     name: netllm-llm
# ---

# %% [markdown]
# # 06 · Where does the reward go, and what to fix first?
#
# For a test of notebook 05, or whatever a run of the original left behind. The more of its inputs are at hand, the more can be
# told: the test alone shows where the reward goes, training and pool why, weights and PLM prove it by playing again.

# %% tags=["parameters"]
from pathlib import Path

data: Path = ""  # folder with traces/ and videos/
test_dir: Path = ""  # run folder of notebook 05, or a tree of the original's; empty: the last run of 05
train_dir: Path = ""  # run folder of notebook 04; empty: the one that the test names
pool_dir: Path = ""  # run folder of notebook 03, or a pool; empty: the one that the training names
seeds: list[Path] = []  # further tests of the same recipe, with other training seeds
plm: Path = ""  # where the PLM is; empty: where the training found it
budget_s: float = 30.0  # for playing the test again, one switch at a time; 0: not
retrain_s: float = 0.0  # for training the PLM anew by the sound defaults; 0: not
baseline: str = ""  # the policy to compare with; empty: the one that the run is judged by
trace: str = ""  # of the timeline; empty: the one with the largest regret
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import matplotlib.pyplot as plt
from IPython.display import display

from netllm_lib import runs
from netllm_lib.abr import diagnosis, evaluate, plots, qoe
from netllm_lib.abr.diagnosis import decisions, explorer, figures
from netllm_lib.abr.diagnosis import replay as ablation
from netllm_lib.abr.diagnosis.load import load
from netllm_lib.abr.diagnosis.timeline import timeline
from netllm_lib.abr.optimum import best_plans, regret
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Replay
from netllm_lib.parameters import notebook_run

# %%
test_dir = test_dir or str(runs.latest("05_test"))
this_run = notebook_run(run_dir, "06_diagnostics", test=test_dir, training=train_dir, pool=pool_dir)
out = this_run.folder

# %%
folders = [test_dir, *seeds, train_dir, pool_dir]
loaded = load(*filter(None, folders), plm=plm or None, data=data or None)
if loaded.table is None:
    raise ValueError(f"{folders[0]}: there is no test in it; `netllm diagnose` reads logs alone")
loaded = diagnosis.with_baselines(loaded)
tables, run, subject = loaded.tables, loaded.table, loaded.run
reference = baseline or loaded.reference
print(f"{subject} on {loaded.setting.get('traces')}, {loaded.setting.get('video')}, compared with {reference}")


# %%
def keep(axes, name):
    """Save a figure in the run folder and show it."""
    axes.figure.savefig(out / f"{name}.png", dpi=120)
    plt.show()


# %% [markdown]
# ## Who got how much
# Mean reward per chunk with its 95 % interval, bootstrapped over traces; the middle half of the traces (iqm), the worst 5 %,
# and the mean on traces that share no content with the training traces.

# %%
tested = evaluate.Test(tables, subject, {"clean": loaded.clean})
tested.scores().save(out)
league = tested.league()
league.to_parquet(out / "league.parquet")
league.round(4)

# %% [markdown]
# ## Findings, most important first
# A *cause* explains a gap, a *suspect* may contribute, a *note* is worth knowing. Each says what to change, and, where it was
# measured, what that brings; an effect whose interval holds zero is noise. `findings.json` has the numbers that were judged.

# %%
found = diagnosis.diagnose(loaded, budget_s, retrain_s, print)
found.save(out)
print(found)

# %%
elsewhere = ("waterfall", "differences", "losses")  # these have a section below
for name, axes in figures.gallery(found, loaded, elsewhere):
    keep(axes, f"finding-{name}")

# %% [markdown]
# ## What each switch is worth
# The run's own weights, played again with one switch of the test turned to what is sound, and with all of them; with
# `retrain_s`, also the same PLM trained by the sound defaults. All variants play the same traces with the same random numbers.

# %%
if found.waterfall is None:
    print("nothing to show: no switch of the test is off, or it cannot be played again here (see what is not there)")
else:
    found.waterfall.to_parquet(out / "waterfall.parquet")
    others = {} if reference is None else {reference: qoe.summarise(tables[reference]).reward}
    keep(figures.waterfall(found.waterfall, others), "waterfall")

# %% [markdown]
# ## Where the reward goes

# %%
keep(plots.plot_decomposition(tables), "decomposition")
if reference is not None:
    keep(plots.plot_differences(figures.differences(loaded)), "differences")

# %% [markdown]
# Which part of the reward is lost, on slow or on fast traces, early or late in the video?

# %%
groups = {"chunk": None} | ({"regime": loaded.traces} if loaded.traces else {})
for by, traces in groups.items() if reference is not None else []:
    ours, theirs = (decisions.breakdown(table, traces) for table in (run, tables[reference]))
    keep(figures.parts(ours, theirs, (subject, reference)), f"parts_by_{by}")

# %%
gaps = None if reference is None else decisions.trace_gaps(run, tables[reference])
if gaps is not None:
    keep(figures.concentration(-gaps["reward"]), "concentration")
    display(gaps.head(8).round(3))

# %% [markdown]
# ## Regret to the optimum
# The best plan for each trace when its whole future is known: nobody can play it, but it says how much reward a trace holds.

# %%
simulator = ablation.recorded(loaded)  # None: traces or video are not at hand, or not those of the test
plans = missing = None
if simulator is None:
    print("no regret: traces and video of the test are not at hand, or its table does not follow from them")
else:
    plans = best_plans(loaded.traces, loaded.video, simulator.episodes)
    missing = regret(run, plans)
    missing.to_frame("regret").to_parquet(out / "regret.parquet")
    keep(figures.concentration(missing, "regret"), "regret")

# %% [markdown]
# ## Decisions
# In the very states that the run visited: what would MPC have done, and what is best, given the future?

# %%
if simulator is not None:
    levels = decisions.levels_of(run)
    instead = {"mpc": decisions.shadow(run, RobustMPC(loaded.video), simulator)}
    instead["the optimum"] = decisions.optimum(run, simulator).levels
    for other, chosen in instead.items():
        keep(figures.confusion(decisions.confusion(levels, chosen), (subject, other)), f"confusion_{other.split()[-1]}")

# %% [markdown]
# The decision of each trace that cost most: it is swapped for the best one, the policy goes on from there (or, where it cannot be
# played quickly, the recorded levels do), and the episode is simulated again.

# %%
quick = budget_s > 0 and ablation.can_replay(loaded) and loaded.subject.config.context_window == "cached"
if simulator is not None:
    policy = ablation.policy_of(loaded.subject) if quick else None
    costly = decisions.costliest(run, simulator, instead["the optimum"], policy, gap=missing, confirm=2)
    costly.to_parquet(out / "costliest.parquet")
    if len(costly):
        keep(figures.costliest(costly, "regret"), "costliest")

# %% [markdown]
# ## What was learnt, from what

# %%
known = loaded.training
if known is not None and known.losses is not None:
    keep(figures.losses(known, figures.reference_losses(loaded)), "losses")
if loaded.pool is not None:
    keep(plots.plot_pool(loaded.pool)[0], "pool")
    keep(figures.shift(loaded.pool, run), "shift")

# %% [markdown]
# ## One trace
# Bandwidth with the levels chosen; the buffer, a cross is a stall; what the policy thought of the six levels; the return that
# it was asked for.

# %%
worst = missing if missing is not None else -gaps["reward"] if gaps is not None else -qoe.per_trace(run)["reward"]
shown = {name: tables[name] for name in dict.fromkeys([subject, reference or subject])}
if plans is not None:
    shown["oracle"] = play(Replay(plans.levels, "oracle"), simulator)
label = trace or worst.idxmax()
bandwidth = dict(zip(loaded.traces.names, loaded.traces.traces, strict=True)).get(label) if loaded.traces else None
keep(timeline(shown, label, bandwidth, figure=plt.figure(figsize=(10, 9.7), layout="constrained"))[0], "timeline")

# %% [markdown]
# ## Explore
# For a person: choose a trace (sorted by regret) and what is shown, step through its chunks and see what the policy saw; turn a
# switch and play the trace again. (Headless, the figure above stands for it.)

# %%
if not runs.headless():
    display(explorer.explore(loaded))

# %%
where = (
    f"{loaded.setting.get('traces')}, {loaded.setting.get('video')}: mean reward per chunk, 95 % interval over traces"
)
parts = [where, league.to_string(float_format="{:.4f}".format), found.text(top=3)]
(out / "summary.txt").write_text("\n\n".join(parts) + "\n")

# %%
metrics = {"findings": [finding.id for finding in found.findings], "baseline": reference}
metrics |= {"run": subject, "interval": league.loc[subject, ["low", "high"]].tolist()}
metrics |= {"reward": league["reward"].to_dict(), "gap": found.gap, "over_seeds": found.over_seeds}
metrics |= {"regret": None if missing is None else float(missing.mean())}
metrics |= {"differences": {name: list(interval) for name, interval in figures.differences(loaded).items()}}
this_run.finish(metrics)
# expected: findings.json, summary.txt, league.parquet, decomposition.png, timeline.png
