"""Experience pools as Minari datasets, and back. Needs the extra `gym`.

A Minari episode of T actions has T + 1 observations: observation t is the state that action t was chosen from, as in a pool, and
the last one follows the last action. A pool does not hold that one, so a state of zeros stands there; it ends a terminated
episode, whose value after the end is zero in any case. Rewards are the pool's, one per chunk, unscaled.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from netllm_lib.abr.pool import ExperiencePool, PoolError, concatenate
from netllm_lib.abr.qoe import LEVELS
from netllm_lib.abr.traces import find_registry
from netllm_lib.arrays import blocks
from netllm_lib.runs import atomic_path, plain

ABOUT = "netllm_pool"
"""Key of the dataset's metadata that holds the pool's content hash and source."""


def export_minari(pool: ExperiencePool, dataset_id: str, *, data: str | None = None, author: str | None = None) -> Path:
    """Write a pool as the Minari dataset `dataset_id` ("name-v0" or "namespace/name-v0"); returns its folder.

    The folder lies under `$MINARI_DATASETS_PATH`, by default `~/.minari/datasets`, and appears only when it is whole. The
    environment is recorded where the data folder (see `find_registry`) has the traces and the video that the pool's source
    names. Raises FileExistsError for an id that is taken, ValueError for one that is malformed, or without Minari.
    """
    _need_minari()
    from gymnasium.spaces import Discrete
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage.datasets_root_dir import get_dataset_path

    namespace, folder = parse_dataset_id(dataset_id)[0], get_dataset_path(dataset_id)
    if folder.exists():
        raise FileExistsError(f"{folder}: this dataset exists; count the version up, or remove it with `minari delete`")
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)
    spec, space = _environment(pool, data)
    about: dict[str, Any] = {
        "dataset_id": dataset_id,
        "minari_version": importlib.metadata.version("minari"),
        "algorithm_name": ", ".join(pool.source.get("policies", ["unknown"])),
        "description": f"{pool!r}; the observation after the last action of an episode is zeros",
        ABOUT: {"hash": pool.content_hash(), "source": plain(pool.source)},
    }
    with atomic_path(folder) as aside:
        aside.mkdir()
        storage = MinariStorage.new(aside / "data", space, Discrete(LEVELS), env_spec=spec)
        storage.update_metadata(about | ({"author": {author}} if author else {}))
        storage.update_episodes(_episodes(pool))
    return folder


def import_minari(dataset_id: str) -> ExperiencePool:
    """The pool in a Minari dataset of bitrate episodes: one that was exported, or one recorded from `AbrEnv`.

    Raises FileNotFoundError if there is none of that id, PoolError if it is of another task, if an episode does not end with
    its last step, or if it is not what was exported.
    """
    _need_minari()
    import minari

    dataset = minari.load_dataset(dataset_id, download=False)
    metadata, seen, acted = dataset.storage.metadata, dataset.observation_space, dataset.action_space
    if seen.shape != (6, 6) or (getattr(acted, "n", None), getattr(acted, "start", None)) != (LEVELS, 0):
        raise PoolError(f"{dataset_id}: observations {seen} and actions {acted} are not those of bitrate episodes")
    parts = []
    for episode in dataset.iterate_episodes():
        ended = episode.terminations | episode.truncations
        if np.flatnonzero(ended).tolist() != [len(ended) - 1]:
            raise PoolError(f"{dataset_id}: episode {episode.id} does not end with its last step")
        states, actions = episode.observations[:-1].astype(np.float32), episode.actions.astype(np.int64)
        parts.append(ExperiencePool(states, actions, episode.rewards.astype(np.float64), ended))
    about = metadata.get(ABOUT, {})
    named = {"minari": dataset_id, "policies": [str(metadata.get("algorithm_name", "unknown"))]}
    pool = concatenate(parts, about.get("source", named))
    if about.get("hash", digest := pool.content_hash()) != digest:
        raise PoolError(f"{dataset_id}: the episodes are not those of the pool that was exported; export it again")
    return pool


def _episodes(pool: ExperiencePool) -> Iterator[Any]:
    from minari.data_collector import EpisodeBuffer

    for number, (first, length) in enumerate(zip(pool.episode_starts, pool.episode_lengths, strict=True)):
        rows = slice(first, first + length)
        states, dones = np.concatenate([pool.states[rows], np.zeros((1, 6, 6), np.float32)]), pool.dones[rows]
        cut = ~dones & (np.arange(length) == length - 1)
        yield EpisodeBuffer(number, None, None, states, pool.actions[rows], pool.rewards[rows], dones, cut)


def _environment(pool: ExperiencePool, data: str | None) -> tuple[Any, Any]:
    """The environment that the pool was played in, if it can be made here, and the space of its observations.

    Of a part cut for validation it is that of the whole trace set.
    """
    from netllm_lib.abr import env

    registry, parts = find_registry(data), pool.source.get("mix", [pool.source])
    named = {(str(part.get("traces")), part.get("video"), part.get("fixed", True)) for part in parts}
    traces, video, fixed = named.pop()
    whole = traces.removesuffix(" (train part)").removesuffix(" (validation part)")
    if not named and whole in registry.trace_folders() and video in registry.video_folders():
        space = env.state_space(registry.trace_set(whole), registry.video(video))
        if all(((states >= space.low) & (states <= space.high)).all() for _, states in blocks(pool.states)):
            made = copy.deepcopy(env.gymnasium.spec(env.ENV_ID))
            made.kwargs = {"traces": whole, "video": video, "noise": not fixed}
            return made, space
    return None, env.gymnasium.spaces.Box(-np.inf, np.inf, (6, 6), np.float32)  # other traces, maybe of the same name


def _need_minari() -> None:
    try:
        import minari  # noqa: F401
    except ImportError:
        raise ValueError("Minari is not installed: pip install 'netllm-companion[gym]'") from None
