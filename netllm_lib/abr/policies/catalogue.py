"""Policies by name, as the command line and the notebooks ask for them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any, Literal

from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.pensieve import Pensieve, load_actor
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.traces import Registry, Video

Preset = Literal["sound", "upstream"]


def make_policy(name: str, video: Video, registry: Registry, preset: Preset = "sound", *, pool: bool = False) -> Policy:
    """The policy `name`: bba, mpc, random, constant-<level>, an actor of the registry (genet, udr_1, …), a folder that holds a
    fine-tuned policy, or FILE.py:CLASS, a policy class of yours that is made without arguments (the file is run).

    `preset="upstream"` plays it as the original does (`pool=True`: as its pool generation does). Raises ValueError, with the
    known names, for anything else.
    """
    actors = registry.actor_folders()
    if name == "bba":
        return BBA()
    if name == "random":
        return Random()
    if name == "mpc":
        return RobustMPC(video, MPCConfig.upstream(pool=pool) if preset == "upstream" else None)
    if match := re.fullmatch(r"constant-([0-5])", name):
        return Constant(int(match[1]))
    if name in actors:
        return Pensieve(load_actor(actors[name]), name)
    if match := re.fullmatch(r"(.+\.py):(\w+)", name):
        made = runpy.run_path(match[1]).get(match[2])
        if not isinstance(made, type) or not issubclass(made, Policy):
            raise ValueError(f"{match[1]}: it has no class {match[2]} that is a netllm_lib.abr.policies.base.Policy")
        return made()
    if Path(name).is_dir():
        return load_llm_policy(Path(name), preset)
    known = ", ".join(["bba", "mpc", "random", "constant-0..5", *actors])
    raise ValueError(f"unknown policy {name!r}; known: {known}, the folder of a fine-tuned policy, or FILE.py:CLASS")


def load_llm_policy(folder: Path, preset: Preset = "sound", **changes: Any) -> Policy:
    """A fine-tuned policy from its checkpoint, or from a run folder that holds one in `policy/`.

    `changes` are fields of `EvalConfig`.
    """
    from netllm_lib.abr.model import load_policy  # PyTorch, which the other policies do without
    from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy

    inner = folder / "policy"
    network, meta = load_policy(inner if inner.is_dir() else folder)
    config = EvalConfig.upstream(**changes) if preset == "upstream" else EvalConfig(**changes)
    return LLMPolicy(network, meta, config, folder=folder)
