"""The policies that need no language model, by name."""

from __future__ import annotations

import re
from typing import Literal

from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.pensieve import Actor, Pensieve, exported_actor
from netllm_lib.abr.policies.simple import Constant, Random
from netllm_lib.abr.traces import Registry, Video

Preset = Literal["sound", "upstream"]


def classical(
    name: str, video: Video, registry: Registry, preset: Preset = "sound", *, pool: bool = False
) -> Policy | None:
    """The policy `name`: bba, mpc, random, constant-<level>, or an actor of the registry (genet, udr_1, …); None if it is none.

    `preset="upstream"` plays it as the original does (`pool=True`: as its pool generation does).
    """
    actors = registry.actor_folders()
    if name in ("bba", "random"):
        return BBA() if name == "bba" else Random()
    if name == "mpc":
        return RobustMPC(video, MPCConfig.upstream(pool=pool) if preset == "upstream" else None)
    if match := re.fullmatch(r"constant-([0-5])", name):
        return Constant(int(match[1]))
    if name in actors:
        return Pensieve(Actor.load(exported_actor(actors[name])), name)
    return None
