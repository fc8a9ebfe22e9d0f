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
# # 05 · How good is the fine-tuned policy, beside the baselines?
#
# The test traces are played once, by the original's protocol: every trace in order from its fixed starting point, no noise, the
# first chunk of each not counted. The same loop plays every policy. Baselines come in two forms: *(original)*, as NetLLM
# plays and publishes them, and sound, without the mistakes that hold them back.

# %% tags=["parameters"]
from pathlib import Path
from typing import Literal

Choose = Literal["argmax", "sample"]
Window = Literal["cached", "rolling"]
Precision = Literal["float32", "bfloat16", "auto"]

data: Path = ""  # folder with traces/ and videos/
policy: Path = ""  # run of notebook 04, or a checkpoint; empty: the last run by hand, headless only baselines
traces: str = ""  # test trace set; empty: the first one of the split "test"
train_traces: str = ""  # to find test traces that share content with training; empty: the first one of "train"
video: str = ""  # empty: the first one
choose: Choose = "argmax"  # or draw from the probabilities
context_window: Window = (
    "cached"  # each token computed once; "rolling" recomputes the last w steps as the original does
)
precision: Precision = "float32"  # of the PLM's weights while testing; bfloat16 is faster and moves a few decisions
seed: int = 100003  # of everything that is sampled
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import contextlib

import matplotlib.pyplot as plt

from netllm_lib import runs
from netllm_lib.abr import evaluate, plots
from netllm_lib.abr import traces as sets
from netllm_lib.abr.policies.catalogue import load_llm_policy
from netllm_lib.parameters import notebook_run

# %%
if not policy and not runs.headless():
    with contextlib.suppress(FileNotFoundError):  # without one, only the baselines are tested
        policy = str(runs.latest("04_finetune"))
this_run = notebook_run(run_dir, "05_test", training=policy)
out = this_run.folder
registry = sets.find_registry(data or None)
trace_set = registry.trace_set(traces or registry.default_traces("test"))
clip = registry.video(video or registry.default_video())
training_set = registry.trace_set(train_traces or registry.default_traces("train"))

# %%
players = evaluate.baselines(clip, registry)
if policy:
    players = {
        "llm": load_llm_policy(Path(policy), choose=choose, context_window=context_window, precision=precision)
    } | players
print(trace_set, clip, f"policies: {', '.join(players)}", sep="\n")

# %% [markdown]
# ## Play

# %%
about = {"subject": "llm" if policy else "", "seed": seed, "train_traces": training_set}
test = evaluate.test(players, trace_set, clip, **about, progress=runs.progress)
if policy:
    print(f"llm: context window {context_window}, {choose}, {test.seconds['llm']:.1f} s for {len(trace_set)} traces")

# %%
league = test.league()
league.drop(columns="reward_clean").round(4)

# %%
plots.plot_decomposition(test.tables)
plt.savefig(out / "decomposition.png", dpi=120)
plt.show()

# %% [markdown]
# ## On traces that the training never saw
# A test trace that shares four consecutive distinct bandwidths with a training trace is the same recording.

# %%
clean = test.setting["clean"]
print(f"{clean.sum()} of {len(clean)} test traces share no content with {training_set.name}")
league[["reward", "reward_clean"]].round(4)

# %%
test.save(out)
metrics = {"policies": league.to_dict("index"), "clean_traces": int(clean.sum())}
metrics["clean_mean"] = league["reward_clean"].to_dict()
this_run.finish(metrics)
print(league[["reward", "low", "high", "seconds"]].round(4).to_string())
# expected: setting.json, scores.json, decomposition.png
