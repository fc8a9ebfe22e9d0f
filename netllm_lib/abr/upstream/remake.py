"""An experience pool of the original made anew from what its folder's name tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from netllm_lib.abr.episodes import UPSTREAM_ENVIRONMENT_SEED, upstream_episodes
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import MPCConfig, RobustMPC
from netllm_lib.abr.policies.pensieve import Pensieve, load_actor
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.traces import Registry
from netllm_lib.abr.upstream.names import POLICIES

POOL_SETTINGS = ("train_traces", "train_video", "pool_models", "pool_trace_num", "pool_fixed")


def remake_pool(settings: Mapping[str, Any], registry: Registry) -> ExperiencePool:
    """The pool that the original's generation makes for these settings (see `names.settings_of`), bit for bit.

    Raises ValueError if the settings do not tell how it was made or the original cannot have made it, FileNotFoundError if traces,
    video or actor are not in the registry, and OSError if an actor would have to be read without TensorFlow.
    """
    lacking = [key for key in POOL_SETTINGS if key not in settings]
    models, asked = settings.get("pool_models", ()), settings.get("pool_trace_num", -1)
    unknown, fixed = [model for model in models if model not in POLICIES], settings.get("pool_fixed") or asked == -1
    for problem, said in (
        (lacking, f"nothing tells {', '.join(lacking)}"),
        (unknown, f"{', '.join(unknown)} is not a policy of the original"),
        (len(models) > 1 and not fixed, "several policies and a random order share start points, or fail"),
    ):
        if problem:
            raise ValueError(f"the pool cannot be made anew: {said}")
    traces, video = registry.trace_set(settings["train_traces"]), registry.video(settings["train_video"])
    parts: list[ExperiencePool] = []
    players: dict[str, Policy] = {"bba": BBA(), "mpc": RobustMPC(video, MPCConfig.upstream(pool=True))}
    actors, first = registry.actor_folders(), next((model for model in models if model not in players), "")
    if first:  # the original plays all actors with the first one's weights
        if first not in actors:
            raise FileNotFoundError(f"{registry.root}: the actor {first} is not there; the pool cannot be made anew")
        players |= dict.fromkeys(models, Pensieve(load_actor(actors[first]), first)) | players
    for player in (players[model] for model in models):
        episodes = upstream_episodes(
            traces,
            trace_num=asked if asked == -1 else min(asked, len(traces)),
            fixed_order=bool(fixed),
            seed=settings.get("pool_seed", 0),  # of no effect in pool generation
            draws_actions=player.draws_actions,
            pool=True,
        )
        if parts and player.draws_actions and traces.start_ptrs is None:
            # a second environment finds the start pointers drawn already, so its stream begins with the actions
            stream = np.random.RandomState(UPSTREAM_ENVIRONMENT_SEED)
            draws = [[stream.randint(1, 1000) for _ in range(CHUNKS)] for _ in range(len(episodes))]
            episodes = dataclasses.replace(episodes, action_draws=np.array(draws))
        parts.append(generate_pool(player, traces, video, episodes))
    return concatenate(parts)
