# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: NetLLM (TensorFlow)
#     language: python
#     name: netllm-tf
# ---

# %% [markdown]
# # 02 · Are Genet and UDR the ones that the original plays?
#
# Their weights are TensorFlow 1 checkpoints. This notebook runs in the TensorFlow environment, exports each actor once to
# `.safetensors`, and holds its NumPy port against TensorFlow on states that the actor itself visits. Everything else in the
# companion runs without TensorFlow.

# %% tags=["parameters"]
from pathlib import Path

data: Path = ""  # folder with traces/, videos/ and all_models/
episodes: int = 20  # traces played to collect states
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import numpy as np
import pandas as pd

from netllm_lib import envcheck
from netllm_lib.abr.checks import tf_checks
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import rollout
from netllm_lib.abr.policies import pensieve, tensorflow_actor
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import find_registry
from netllm_lib.parameters import notebook_run

# %%
this_run = notebook_run(run_dir, "02_environment_tf")
out = this_run.folder
checks = tf_checks(data or None)
print(envcheck.as_text(checks))
envcheck.require(checks)

# %%
registry = find_registry(data or None)
folders = registry.actor_folders()
if not folders:
    print(f"No actor checkpoints under {registry.root}: Genet and UDR are left out, everything else goes on.")
actors = {name: pensieve.load_actor(folder) for name, folder in folders.items()}

# %% [markdown]
# ## Port against TensorFlow
# Largest difference of the three action probabilities, and the share of decisions that would differ under one random stream.

# %%
traces, video = registry.trace_set(registry.default_traces("test")), registry.video(registry.default_video())
chosen = sound_episodes(traces).rows(range(min(episodes, len(traces))))
draws = chosen.action_draws[:, :-1].ravel()
rows = {}

# %%
for name, folder in folders.items():
    played = rollout(pensieve.Pensieve(actors[name]), Simulator(traces, video, chosen))
    states = played.states[:, :-1].reshape(-1, 6, 6)
    reference = tensorflow_actor.probabilities(pensieve.latest_checkpoint(folder), states)
    ported = actors[name].probabilities(states)
    differ = pensieve.sampled_action(ported, draws) != pensieve.sampled_action(reference, draws)
    rows[name] = (len(states), float(np.abs(ported - reference).max()), float(differ.mean()))
comparison = pd.DataFrame.from_dict(rows, orient="index", columns=["states", "max_difference", "decisions_differ"])
comparison

# %%
this_run.finish({"actors": comparison.to_dict("index"), "data": registry.root.name})
print(comparison.to_string() if len(comparison) else "no actors")
assert (comparison["max_difference"] < 1e-5).all(), "a port deviates from TensorFlow"
