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
# # 08 · Which setting of a sweep is best, and which parameter matters?
#
# A *setting* is a point of the sweep without its seed; its seeds are pooled. The intervals come from resampling traces and seeds
# together, and differences are paired by trace: they say how well the same recipe would do with another seed on other traces.
# Without tests, a metric of the runs is compared, with Student's interval over the seeds.

# %% tags=["parameters"]
from pathlib import Path
from typing import Literal

Better = Literal["higher", "lower"]

sweep_dir: Path = ""  # folder of a sweep; empty: the last one that was completed
policy: str = ""  # the one compared between settings; empty: the one that the tests are about
baseline: str = ""  # the policy to compare with; empty: the best of the others
metric: str = (
    ""  # a metric of the runs to compare; empty: the scores of the tests, without tests the first that differs
)
better: Better = "higher"  # which values of that metric are better; scores say it themselves
choose_by: str = "04_finetune.validation_reward"  # a metric that chooses the setting, where every run has it
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import matplotlib.pyplot as plt
import pandas as pd

from netllm_lib import compare as comparing
from netllm_lib import runs
from netllm_lib.abr import plots
from netllm_lib.parameters import notebook_run

# %%
sweep_dir = sweep_dir or str(runs.latest("sweep"))
this_run = notebook_run(run_dir, "08_compare", sweep=sweep_dir)
out = this_run.folder
tables = comparing.load(sweep_dir)
tested = len(tables.results) > 0 and not metric
counts = f"{len(tables.points)} points done, {len(tables.failed)} failed"
print(f"{tables.name}: {counts}; varied: {', '.join(tables.varied)}")
tables.failed.set_index("point")[["setting", "seed", "problem"]] if len(tables.failed) else None

# %%
if tested:
    about, subject = tables.measure, policy or tables.subject
    samples = comparing.figures(tables, subject)
    others = {name: comparing.baseline_figures(tables, name) for name in tables.policies if name != subject}
    better, axis, what = about.better, about.name, f"{about.name} of {subject}"
else:
    subject, axis = "", metric or next(iter(comparing.numeric_metrics(tables.points)))
    what = axis
    samples, others = comparing.metric_figures(tables, axis), {}
print(f"compared: {what}, {better} is better")

# %% [markdown]
# ## Who got how much
# The setting is chosen by the validation traces where every run was validated: choosing by the test and then reporting that test
# flatters the winner. `worst_run` and `best_run` are the means of single seeds.

# %%
ranking = comparing.ranking(samples, better)
samples = {name: samples[name] for name in ranking.index}  # the best first
best, by = comparing.chosen(tables, samples, better, choose_by)
ranking.to_parquet(out / "ranking.parquet")
print(f"chosen: {best}, by {by}" + ("" if by == choose_by else "; its figure is flattered by the choice"))
ranking.round(4)

# %%
comparing.plot_ranking(samples, others, better, best, axis)
plt.savefig(out / "ranking.png", dpi=120)
plt.show()

# %% [markdown]
# ## Against the baseline, and against each other
# A difference whose interval holds zero is none. With many settings some interval excludes zero by chance: one in twenty does.

# %%
if others and not baseline:
    baseline = comparing.ranking(others, better).index[0]
against = comparing.differences(samples, comparing.baseline_figures(tables, baseline)) if baseline else {}
between = comparing.differences({name: samples[name] for name in samples if name != best}, samples[best])
for title, intervals in ((f"minus {baseline}", against), (f"minus {best}", between)):
    if intervals:
        ax = plots.plot_differences(intervals)
        ax.set(title=f"{title} (hollow: no difference shown)", xlabel=f"difference of {axis}, 95 % interval")
        plt.savefig(out / f"differences_{'baseline' if intervals is against else 'settings'}.png", dpi=120)
        plt.show()

# %% [markdown]
# ## The effect of each parameter
# Only combinations of the other parameters that were run with all of its values count, with the seeds that they share: nothing but
# the parameter differs. `difference` is that to the first value.

# %%
effects = {name: comparing.effect(tables, samples, name) for name in tables.varied}
found = {name: table for name, table in effects.items() if len(table)}
for name in effects.keys() - found.keys():
    print(f"{name}: no settings differ in it alone and were run with all its values")
if found:
    comparing.plot_effects(found, what)
    plt.savefig(out / "effects.png", dpi=120)
    plt.show()

# %%
pd.concat({name: table.drop(columns="each").round(4) for name, table in found.items()}) if found else None

# %%
shown = ranking.round(4).astype(object)
if against:
    shown[f"minus {baseline}"] = [str(against.get(name, "")) for name in ranking.index]
words = f"{tables.name}: {what}, 95 % interval\n\n{shown.to_string()}\n\nchosen: {best} (by {by})"
if len(tables.failed):
    words += f"\nfailed and not compared ({len(tables.failed)}): {', '.join(tables.failed['setting'].unique())}"
(out / "summary.txt").write_text(words + "\n")
print(words)

# %%
metrics = {"what": what, "better": better, "points": len(tables.points), "failed": len(tables.failed)}
metrics |= {"best": best, "chosen_by": by, "best_interval": list(comparing.pooled(samples[best]))}
metrics |= {"settings": ranking.to_dict("index"), "baseline": baseline or None}
metrics |= {"minus_baseline": {name: list(one) for name, one in against.items()}}
metrics |= {"minus_best": {name: list(one) for name, one in between.items()}}
metrics |= {"effects": {name: table.to_dict("records") for name, table in found.items()}}
this_run.finish(metrics)
# expected: summary.txt, ranking.parquet, ranking.png
