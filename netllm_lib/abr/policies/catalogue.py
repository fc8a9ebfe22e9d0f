"""Policies by name, as the command line and the notebooks ask for them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any, Literal

from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.pensieve import Actor, Pensieve, exported_actor
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.abr.traces import Registry, Video

Preset = Literal["sound", "upstream"]


def make_policy(name: str, video: Video, registry: Registry, preset: Preset = "sound", *, pool: bool = False) -> Policy:
    """The policy `name`: bba, mpc, random, constant-<level>, an actor of the registry (genet, udr_1, …), a folder that holds a
    fine-tuned policy, or FILE.py:CLASS, a policy class that is made without arguments.

    `preset="upstream"` plays it as the original does (`pool=True`: as its pool generation does). Raises ValueError, with the
    known names, for anything else.
    """
    upstream = preset == "upstream"
    if name == "bba":
        return BBA()
    if name == "mpc":
        return RobustMPC(video, MPCConfig.upstream(pool=pool) if upstream else MPCConfig())
    if name == "random":
        return Random()
    if match := re.fullmatch(r"constant-(\d)", name):
        return Constant(int(match[1]))
    if name in registry.actor_folders():
        return Pensieve(Actor.load(exported_actor(registry.actor_folders()[name])), name)
    if match := re.fullmatch(r"(.+\.py):(\w+)", name):
        return _own_policy(Path(match[1]), match[2])
    if Path(name).is_dir():
        return load_llm_policy(Path(name), preset)
    known = ["bba", "mpc", "random", f"constant-0..{LEVELS - 1}", *registry.actor_folders()]
    raise ValueError(
        f"unknown policy {name!r}; known: {', '.join(known)}, the folder of a fine-tuned policy, or FILE.py:CLASS"
    )


def _own_policy(path: Path, name: str) -> Policy:
    """A policy of the user's own: runs the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    made = runpy.run_path(str(path)).get(name)
    if not isinstance(made, type) or not issubclass(made, Policy):
        raise ValueError(f"{path}: it has no class {name} that is a netllm_lib.abr.policies.base.Policy")
    return made()


def load_llm_policy(folder: Path, preset: Preset = "sound", **changes: Any) -> Policy:
    """A fine-tuned policy from its checkpoint, or from a run folder that holds one in `policy/`.

    `changes` are fields of `EvalConfig`.
    """
    from netllm_lib.abr.model import load_policy
    from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy

    inner = folder / "policy"
    network, meta = load_policy(inner if inner.is_dir() else folder)
    config = EvalConfig.upstream(**changes) if preset == "upstream" else EvalConfig(**changes)
    return LLMPolicy(network, meta, config, folder=folder)


def baselines(video: Video, registry: Registry) -> dict[str, Policy]:
    """The baselines of a test: MPC, BBA, and Genet where there is a checkpoint.

    "(original)" marks those that the original handicaps; without that mark a policy is in its sound form. BBA has one form.
    """
    players: dict[str, Policy] = {"mpc": RobustMPC(video), "bba": BBA()}
    players["mpc (original)"] = RobustMPC(video, MPCConfig.upstream())
    if "genet" in registry.actor_folders():
        players["genet"] = make_policy("genet", video, registry)
    return players
