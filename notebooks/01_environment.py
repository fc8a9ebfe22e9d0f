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
# # 01 · Is this machine ready?
#
# Every line below is a check with what to do about it. A *fail* stops a headless run here, before hours of training are lost.

# %% tags=["parameters"]
from pathlib import Path

data: Path = ""  # folder with traces/ and videos/; empty: $NETLLM_DATA, data/netllm, or the bundled sample
plm: Path = "smollm2"  # the language model: smollm2, or a Hugging Face folder
layers: int = 4  # how many of its first layers are kept; 0: all
load: bool = True  # load its weights too, not only look at its files
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import pandas as pd

from netllm_lib import envcheck
from netllm_lib.abr.checks import llm_checks
from netllm_lib.abr.traces import find_registry
from netllm_lib.parameters import notebook_run

this_run = notebook_run(run_dir, "01_environment")
out = this_run.folder
checks = llm_checks(data or None, plm, layers or None, load)
pd.set_option("display.max_colwidth", None)  # what to do is a long line
pd.DataFrame(checks)

# %% [markdown]
# ## The data that was found
# Quantiles are over traces, of their mean bandwidth in Mbps.

# %%
registry = find_registry(data or None)
print(registry.root)
registry.describe().round(3)

# %%
bad = envcheck.failed(checks)
metrics = {"checks": {c.name: c.status for c in checks}, "failed": [c.name for c in bad], "data": registry.root.name}
this_run.finish(metrics)
print("\n".join(f"[{c.status}] {c.name}: {c.found}" for c in checks))
envcheck.require(checks)
