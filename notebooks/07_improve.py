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
# # 07 · How good can it get?
#
# From a diagnosed run to a better policy. Round by round the policy plays perturbed training traces, hindsight values say what
# every level would have been worth in the states that it visits, and the network learns to predict them. Nothing is chosen on
# the test traces, and no training trace shares content with one.

# %% tags=["parameters"]
from pathlib import Path
from typing import Literal

Tokens = Literal["parts", "step"]
Learn = Literal["values", "best"]

data: Path = ""  # folder with traces/ and videos/
before: Path = ""  # run folder of 04, or a checkpoint: to compare with, and played in the first round; empty: MPC
plm: Path = "tiny-llama"  # trained from random weights; or smollm2, or a Hugging Face folder, which get LoRA
layers: int = 4  # first layers that are kept; 0: all
rank: int = 128  # LoRA rank; tiny-llama is trained as a whole
random_weights: bool = False  # the control for pretraining
tokens: Tokens = "step"  # one token a step; "parts": eight, as the original has them
groups: int = 120  # perturbed traces in a round, each played from `starts` places
starts: int = 8
epochs: list[int] = [8, 5, 4, 4]  # of each round, over all rounds' pools so far
batch: int = 64  # episodes
lr: float = 1e-3
lr_around: float = 1e-3  # the modules around the PLM
learn: Learn = "values"  # or "best": cross-entropy with the best level
synthetic: int = 150  # made traces that are added to the training set
traces: str = ""  # training traces; empty: the first set of the split "train"
test_traces: str = ""  # empty: the first set of the split "test"
video: str = ""  # empty: the first one
pool_episodes: int = 200  # of the pool that the improved policy leaves for notebook 04; 0: none
seed: int = 1
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import shutil

import matplotlib.pyplot as plt
import pandas as pd

from netllm_lib import runs
from netllm_lib.abr import evaluate, plots, pool, qoe
from netllm_lib.abr import traces as sets
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.improve import ImproveConfig, improve, leak_free, roll_pool, small_network
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.catalogue import load_llm_policy
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.simulator import Simulator
from netllm_lib.parameters import notebook_run
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.train import TrainConfig

# %%
this_run = notebook_run(run_dir, "07_improve", training=before)
out = this_run.folder

# %%
registry = sets.find_registry(data or None)
test = registry.trace_set(test_traces or registry.default_traces("test"))
whole = registry.trace_set(traces or registry.default_traces("train"))
clip = registry.video(video or registry.default_video())
split = leak_free(whole, test, synthetic=synthetic, seed=seed)
print(f"{split.dropped} of {len(whole)} training traces share content with {test.name} and are left out")
print(f"training: {len(split.training)} traces, {synthetic} of them made; validation: {len(split.validation)}")
plots.plot_bandwidths([split.training, split.validation, test])
plt.show()

# %%
if plm == "tiny-llama":
    network = small_network(seed)
else:
    shape = PLMConfig(plm, layers=layers or None, rank=rank, random_weights=random_weights, seed=seed)
    network = PolicyNetwork(load_plm(shape), NetworkConfig(tokens=tokens, seed=seed))
parameters = sum(p.numel() for p in network.trainable().values())
print(f"{network.plm.family}, {network.plm.layers} layers, hidden {network.plm.hidden_size}, {parameters:,} trained")

# %% [markdown]
# ## Rounds
# `regret`: what the levels that were played cost against the best ones, per chunk, in hindsight. `score`: mean reward on the
# validation traces. The last round's policy is kept, unless an earlier one played these surely better.

# %%
limits = {"weight_decay": 0.01, "max_grad_norm": 1.0}
training = TrainConfig(batch=batch, lr=lr, lr_around=lr_around, **limits)
config = ImproveConfig(groups=groups, starts=starts, epochs=tuple(epochs), learn=learn, train=training, seed=seed)
held = Simulator(split.validation, clip, sound_episodes(split.validation, seed=seed, repeats=4))
first = load_llm_policy(Path(before), precision="auto") if before else None


# %%
def rivals(video):
    """The policies to compare with."""
    players = {"before": load_llm_policy(Path(before))} if before else {}
    return players | evaluate.baselines(video, registry) | {"mpc (strong)": RobustMPC(video, MPCConfig.strong())}


others = rivals(clip)  # now: what they miss is said before hours of training, not after

# %%
folder = out / "rounds" / runs.content_hash([config, network.plm.identity, split.training.content_hash])
improved = improve(network, split.training, clip, config, folder=folder, first=first, held=held, progress=runs.progress)
with runs.atomic_path(out / "policy") as aside:
    shutil.copytree(improved.policy, aside)
improved.rounds.set_index("round").round(4)

# %% [markdown]
# ## Before and after
# On the test traces, played once.

# %%
players = {"improved": load_llm_policy(out / "policy")} | others
tested = evaluate.test(players, test, clip, subject="improved", train_traces=whole)
clean, scores = tested.setting["clean"], tested.scores()
scores.save(out)
league = tested.league()
league.to_parquet(out / "league.parquet")
league.round(4)

# %%
differences = {f"− {name}": scores.difference("improved", name) for name in others}
plots.plot_differences(differences)
plt.savefig(out / "differences.png", dpi=120, bbox_inches="tight")
plt.show()

# %%
plots.plot_decomposition(tested.tables)
plt.savefig(out / "decomposition.png", dpi=120)
plt.show()

# %% [markdown]
# ## What each round gave
# Mean reward on the validation traces, from the policy that the first round played to the last round.

# %%
start = "before" if before else "mpc"
steps = {start: qoe.summarise(play(first or RobustMPC(clip), held)).reward}
steps |= {f"round {row.round}": row.score for row in improved.rounds.itertuples()}
pd.Series(steps).plot(marker="o", ylabel="mean reward per chunk", figsize=(7, 3.4), grid=True)
plt.savefig(out / "rounds.png", dpi=120, bbox_inches="tight")
plt.show()

# %% [markdown]
# ## Elsewhere
# The same policy on the test traces that share no content with any training trace of the data, with the other videos, and on
# the trace sets that share nothing with what it was trained on.

# %%
places = {
    f"{test.name}, {name}": (test, registry.video(name)) for name in registry.video_folders() if name != clip.name
}
for name in registry.trace_folders():
    other = registry.trace_set(name)
    if name != test.name and not sets.overlapping(other, split.training).any():
        places[f"{name}, {clip.name}"] = (other, clip)


# %%
def compared(scores):
    """Traces, each policy's reward, and what the improved one has more, with its interval."""
    row = {"traces": len(scores.of("improved"))} | {name: scores.mean(name).mean for name in players}
    for name in others:
        gain = scores.difference("improved", name)
        row |= {f"− {name}": gain.mean, f"− {name} low": gain.low, f"− {name} high": gain.high}
    return row


# %%
rows = {f"{test.name}, {clip.name}": compared(scores)}
for place, (trace_set, other_clip) in places.items():
    there = {"improved": players["improved"]} | rivals(other_clip)
    rows[place] = compared(evaluate.test(there, trace_set, other_clip, subject="improved").scores())
if 1 < clean.sum() < len(test):  # as they were played above
    rows[f"{test.name}, no overlap at all"] = compared(tested.part(clean).scores())
elsewhere = pd.DataFrame.from_dict(rows, orient="index")
elsewhere.to_parquet(out / "elsewhere.parquet")
elsewhere[["traces", *players, "− mpc", "− mpc low", "− mpc (strong)", "− mpc (strong) low"]].round(4)

# %% [markdown]
# ## A pool to clone
# For the original's way of training: episodes of the improved policy on perturbed training traces. This run folder is a
# `pool_dir` for notebook 04.

# %%
if pool_episodes:
    teacher = load_llm_policy(out / "policy", precision="auto")
    told = {"path": out / "pool", "progress": runs.progress("pool")}
    rolled = roll_pool(teacher, split.training, clip, pool_episodes, config, **told)
    own = sound_episodes(split.held, seed=seed)
    pool.generate_pool(teacher, split.held, clip, own, path=out / "validation_pool")
    parts = {"train": split.training.names, "validation": split.held.names}
    runs.write_json(out / "split.json", {"traces": whole.name, "video": clip.name, **parts})
    print(rolled.describe())

# %%
card = {"plm": plm, "layers": network.plm.layers, "tokens": tokens, "random_weights": random_weights, "seed": seed}
card |= {"trained_parameters": parameters, "training_traces": split.training.names, "dropped": split.dropped}
card |= {"video": clip.name, "learn": learn, "rounds": improved.rounds.to_dict("records")}
card |= {"test": league.loc["improved"].to_dict(), "elsewhere": rows}
runs.write_json(out / "model_card.json", card)

# %%
policies = league.rename(index={"improved": "llm"}).to_dict("index")
metrics = {"policies": policies, "rounds": improved.rounds.to_dict("records"), "elsewhere": rows}
metrics |= {"differences": {name: list(interval) for name, interval in differences.items()}}
metrics |= {"clean_traces": int(clean.sum()), "parameters": parameters}
this_run.finish(metrics)
print(league[["reward", "low", "high"]].round(4).to_string())
# expected: policy/config.json, scores.json, league.parquet, elsewhere.parquet, model_card.json, differences.png, rounds.png
