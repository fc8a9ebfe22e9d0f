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
# # 03 · What can this experience pool teach?
#
# A behaviour policy plays training traces; what it did becomes the pool that the language model is trained on. A part of the
# training traces, sharing no content with the rest, is set aside for validation: models are chosen on it, never on the test set.

# %% tags=["parameters"]
from pathlib import Path
from typing import Literal

Preset = Literal["sound", "upstream"]

data: Path = ""  # folder with traces/ and videos/
traces: str = ""  # training trace set; empty: the first one of the split "train"
video: str = ""  # empty: the first one
policies: list[Path] = [
    "mpc"
]  # behaviour policies, mixed in equal parts: mpc, bba, genet, random, a policy's folder, …
preset: Preset = "sound"  # "upstream": policies, traces and random numbers as the original's pool generation has them
episodes: int = 200  # per policy; traces are repeated from other starting points as needed (upstream: traces, -1 all)
noise: bool = False  # multiply download times by 0.9 … 1.1
validation_share: float = 0.15  # of the training traces
estimate_steps: int = 200  # training steps of the small network that estimates what a clone would earn; 0: no estimate
seed: int = 1  # of starts, noise and sampling
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import matplotlib.pyplot as plt

from netllm_lib import runs
from netllm_lib.abr import diagnosis, evaluate, plots, pool
from netllm_lib.abr import traces as sets
from netllm_lib.abr.episodes import sound_episodes, upstream_episodes
from netllm_lib.abr.improve import cloning_estimate
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.catalogue import make_policy
from netllm_lib.abr.simulator import Simulator
from netllm_lib.parameters import notebook_run

# %%
this_run = notebook_run(run_dir, "03_experience_pool")
out = this_run.folder
registry = sets.find_registry(data or None)
trace_set = registry.trace_set(traces or registry.default_traces("train"))
clip = registry.video(video or registry.default_video())
train_part, validation_part = sets.split_validation(trace_set, validation_share, seed)
print(train_part, validation_part, clip, sep="\n")
plots.plot_bandwidths([train_part, validation_part])
plt.show()

# %% [markdown]
# ## Play
# Each policy plays the same episodes. With `preset` "upstream" the pool is the original's, transition by transition: all traces
# of the set in its order, with its random stream. The validation traces are then part of it, and `seed` has no effect, as there.
#
# Every thousand episodes go to disk; when the run is interrupted, the next one goes on from there.


# %%
def sound(part, count):
    repeats = -(-count // len(part))
    chosen = sound_episodes(part, seed=seed, repeats=repeats, noise=noise).rows(range(count))
    return [(maker, chosen) for maker in makers]


def original(maker):
    return upstream_episodes(trace_set, trace_num=episodes, draws_actions=maker.draws_actions, pool=True)


# %%
makers = [make_policy(name, clip, registry, preset, pool=True) for name in policies]
upstream = preset == "upstream"
parts = [(maker, original(maker)) for maker in makers] if upstream else sound(train_part, episodes)
whole = trace_set if upstream else train_part
training = pool.generate_mix(parts, whole, clip, path=out / "pool", progress=runs.progress("pool"))
held = sound(validation_part, len(validation_part))
validation = pool.generate_mix(held, validation_part, clip, path=out / "validation_pool")
print(training.describe())

# %%
plots.plot_pool(training)
plt.savefig(out / "pool.png", dpi=120)
plt.show()

# %% [markdown]
# ## How predictable is the behaviour policy?
# Cross-entropy that a model reaches without learning to look: chance, knowing only how often each level occurs, and knowing
# what usually follows the previous level. A trained model must come out below the last one.

# %%
entropy, conditional = diagnosis.behaviour_entropy(training)
print(f"chance {diagnosis.CHANCE:.3f}   H(a) {entropy:.3f}   H(a | previous level) {conditional:.3f}   nats")

# %% [markdown]
# ## What would a clone of it earn?
# A small network copies the pool's actions for half a minute and plays the validation traces, beside the behaviour policies: an
# estimate of what a language model can learn here. If that is too little, a better pool helps more than longer training;
# notebook 07 makes one.

# %%
estimate = {}
if estimate_steps:
    simulator = Simulator(validation_part, clip, sound_episodes(validation_part, seed=seed, repeats=4))
    progress = runs.progress("estimate")
    tables = {"clone": cloning_estimate(training, simulator, estimate_steps, seed=seed, progress=progress)}
    tables |= {Path(name).name: play(make_policy(name, clip, registry), simulator) for name in policies}
    league = evaluate.Test(tables).league()
    estimate = league["reward"].to_dict()
    print(league[["reward", "low", "high", "worst_5%"]].round(3).to_string())

# %%
split = {"traces": trace_set.name, "video": clip.name, "train": train_part.names, "validation": validation_part.names}
runs.write_json(out / "split.json", split)
metrics = {"transitions": len(training), "episodes": len(training.episode_starts), "hash": training.content_hash()}
metrics |= {"mean_reward": float(training.rewards.mean()), "H(a)": entropy, "H(a|previous)": conditional}
metrics["validation_reward"] = estimate
this_run.finish(metrics)
print(f"{training!r}\nsaved to {out / 'pool'}")
# expected: pool, validation_pool, split.json, pool.png
