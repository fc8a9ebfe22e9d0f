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
# # 04 · Does the language model learn the behaviour policy?
#
# The first layers of a pretrained language model (PLM) are fine-tuned with LoRA on the pool. Before anything starts, the preflight
# says how many optimizer steps there will be, what learning rate they really reach, and what it will cost.

# %% tags=["parameters"]
from pathlib import Path
from typing import Literal

Tokens = Literal["parts", "step"]
Tracker = Literal["", "mlflow"]

data: Path = ""  # folder with traces/ and videos/, for validation
pool_dir: Path = ""  # run folder of notebook 03; empty: its last run
plm: Path = "smollm2"  # smollm2, or a Hugging Face folder, <type>/<size>, or a hub name
layers: int = 4  # first layers that are kept (early stop); 0: all
random_weights: bool = False  # the same shape with random weights: the control for pretraining
rank: int = 128  # LoRA rank; 0: frozen, -1: the whole PLM
tokens: Tokens = "parts"  # eight tokens a step, as the original has them; "step": one, an eighth of the work
w: int = 20  # steps in a training window
epochs: int = 8
batch: int = 8  # windows in a batch
lr: float = 1e-3  # LoRA
lr_around: float = 1e-2  # the modules around the PLM
advantage: float = 0.0  # above 0: clone what went better than usual most; temperature of the weights, try 0.5
validate_epochs: int = 2  # epochs between two plays of the validation traces
seed: int = 1
device: str = "auto"  # cpu, cuda, auto
track: Tracker = ""  # "mlflow": training curves go there too, beside TensorBoard's in training/
run_dir: str = ""  # where results go; filled in by `netllm run`

# %%
import shutil

import matplotlib.pyplot as plt

from netllm_lib import checkpoint, runs, train
from netllm_lib.abr import batches, diagnosis, model, plots, pool, qoe
from netllm_lib.abr import traces as sets
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.simulator import Simulator
from netllm_lib.parameters import notebook_run
from netllm_lib.plm import PLMConfig, load_plm

# %%
pool_dir = pool_dir or str(runs.latest("03_experience_pool"))
this_run = notebook_run(run_dir, "04_finetune", pool=pool_dir)
out = this_run.folder

# %%
experience = pool.load_pool(Path(pool_dir) / "pool")
windows = batches.make_windows(experience, batches.WindowConfig(w=w), advantage=advantage or None)
rates = {"lr": lr, "lr_around": lr_around}
config = train.TrainConfig(epochs=epochs, batch=batch, seed=seed, validate_epochs=validate_epochs, **rates)
plm_config = PLMConfig(plm, layers=layers or None, random_weights=random_weights, rank=rank, seed=seed, device=device)
longest = int(experience.episode_lengths.max())
around = model.NetworkConfig(max_timestep=longest - 1, tokens=tokens, seed=seed)
network = model.PolicyNetwork(load_plm(plm_config), around)
print(f"{network.plm.family}, {network.plm.layers} layers, hidden {network.plm.hidden_size}, on {network.device}")

# %% [markdown]
# ## Preflight

# %%
flight = train.preflight(network, windows, config)
print(flight)

# %% [markdown]
# ## Train
# The model is chosen by its reward on the validation traces, played with argmax and a context cleared per trace.

# %%
split = runs.read_json(Path(pool_dir) / "split.json")
registry = sets.find_registry(data or None)
everything = registry.trace_set(split["traces"])
if not split["validation"]:
    raise ValueError(f"{pool_dir}/split.json names no validation traces: make the pool with validation_share above 0")
held = everything.subset([everything.names.index(name) for name in split["validation"]], "validation")
simulator = Simulator(held, registry.video(split["video"]), sound_episodes(held, seed=seed))

# %%
meta = checkpoint.describe(network, windows.settings)


def validate(network: model.PolicyNetwork) -> float:
    return qoe.summarise(play(LLMPolicy(network, meta, EvalConfig(precision="auto")), simulator)).reward


# %%
# a folder of its own for each setting, so that changing a parameter by hand starts anew and an interrupted run goes on
folder = out / "training" / runs.content_hash([config, plm_config, around, windows.key])
unseen = pool.load_pool(Path(pool_dir) / "validation_pool")
held_out = batches.make_windows(unseen, windows.config, like=windows.scale)
options = {"validate": validate, "held_out": held_out, "progress": runs.progress("training"), "track": track}
result = train.train(network, windows, config, folder=folder, settings=windows.settings, **options)
result.evaluations

# %%
entropy, conditional = diagnosis.behaviour_entropy(experience)
references = {"chance": diagnosis.CHANCE, "H(a)": entropy, "H(a | previous level)": conditional}
plots.plot_training(result.history, references)
plt.savefig(out / "training.png", dpi=120)
plt.show()

# %% [markdown]
# ## Held-out loss, and the checkpoint
# The checkpoint holds everything that a test needs: adapter, modules, sizes, reward range, target return, the PLM's identity.

# %%
print(f"held-out cross-entropy {result.held_out_loss:.3f} nats on {held_out.labels()} actions")
with runs.atomic_path(out / "policy") as aside:
    shutil.copytree(result.best, aside)
result.save(out)

# %%
metrics = {"steps": result.steps, "warmup_steps": result.warmup_steps, "lr": result.lr, "lr_peak": result.lr_peak}
metrics |= {"windows": result.samples, "crossing": result.facts["crossing"]}
metrics |= {"final_loss": result.final_loss, "seconds": result.seconds}
metrics |= {"held_out_loss": result.held_out_loss, "validation_reward": result.best_score}
metrics |= {"plm": plm, "layers": network.plm.layers, "random_weights": random_weights, "tokens": tokens}
metrics["pool_hash"] = experience.content_hash()
this_run.finish(metrics)
# expected: policy/config.json, policy/modules.safetensors, training.png
