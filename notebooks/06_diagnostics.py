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

# %% tags=["parameters"]
data: str = ""  # folder with traces/ and videos/
test_dir: str = ""  # run folder of notebook 05; empty: its last run
train_dir: str = ""  # run folder of notebook 04; empty: findings about training are left out
pool_dir: str = ""  # run folder of notebook 03; empty: findings about the pool are left out
baseline: str = ""  # the policy to compare with, traces sorted by the gap to it; empty: the best other one
trace: str = ""  # of the timeline; empty: the one with the largest gap
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
from pathlib import Path

import matplotlib.pyplot as plt

from netllm_lib import runs
from netllm_lib.abr import diagnose, plots, qoe, report
from netllm_lib.abr import traces as sets

# %%
out = runs.output_folder(run_dir, "06_diagnostics")
loaded = report.load_run(
    Path(test_dir or runs.latest("05_test")), train_dir and Path(train_dir), pool_dir and Path(pool_dir)
)
tables, subject = loaded.tables, loaded.run
trace_set = sets.find_registry(data or None).trace_set(loaded.setting["traces"])
others = {name: qoe.summarise(table).reward for name, table in tables.items() if name != subject}
baseline = baseline or max(others, key=others.get)
league = report.league(tables)
league.round(4)

# %% [markdown]
# ## Findings, most important first

# %%
findings = diagnose.diagnose(loaded)
print("\n".join(f"{number}. {finding}" for number, finding in enumerate(findings, 1)) or "nothing found")

# %% [markdown]
# ## Is the difference real?
# Bootstrap over traces, paired: the same traces under both policies. An interval that holds zero shows no difference.

# %%
differences = {
    f"{subject} − {name}": diagnose.paired(tables[subject], table) for name, table in tables.items() if name != subject
}
plots.plot_differences(differences)
plt.savefig(out / "differences.png", dpi=120)
plt.show()

# %% [markdown]
# ## Reward by its parts

# %%
plots.plot_decomposition(tables)
plt.savefig(out / "decomposition.png", dpi=120)
plt.show()

# %% [markdown]
# ## The worst traces
# All in reward per chunk: positive means that the run is better than the baseline in that part.

# %%
gaps = report.trace_gaps(tables[subject], tables[baseline])
plots.plot_trace_gaps(tables[subject], tables[baseline], (subject, baseline))
plt.savefig(out / "trace_gaps.png", dpi=120)
plt.show()
gaps.head(10).round(3)

# %% [markdown]
# ## One trace
# Bandwidth, the levels chosen, the buffer; a cross is a stall.

# %%
by_name = dict(zip(trace_set.names, trace_set.traces, strict=True))
shown = {name: tables[name] for name in report.timeline_policies(tables, subject, baseline)}
plots.plot_timeline(shown, by_name[trace or gaps.index[0]])
plt.savefig(out / "timeline.png", dpi=120)
plt.show()

# %% [markdown]
# For a person: choose another trace, sorted by the gap. (Headless, the figure above stands for it.)

# %%
if not runs.headless():
    from ipywidgets import Dropdown, interact

    choices = Dropdown(
        options=[(f"{gap:+.3f}  {name}", name) for name, gap in gaps["reward"].items()], description="trace"
    )
    interact(lambda name: (plots.plot_timeline(shown, by_name[name]), plt.show())[1], name=choices)

# %%
runs.write_json(out / "findings.json", findings)
(out / "summary.txt").write_text(report.summary(league, findings, loaded.setting) + "\n")
metrics = {"findings": [finding.id for finding in findings], "baseline": baseline}
metrics |= {"reward": {name: float(value) for name, value in league["reward"].items()}}
metrics |= {"differences": {name: list(interval) for name, interval in differences.items()}}
runs.write_json(out / "metrics.json", metrics)
# expected: findings.json, summary.txt, differences.png, timeline.png
