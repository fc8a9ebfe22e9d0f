"""A pool of a million transitions: generated, loaded, saved again and trained on, within little memory.

MPC, BBA and random levels in equal parts, on the bundled training traces from other starting points. Each figure is from a
process of its own on one thread; memory is what the work adds to what the process held after its imports and a small warm-up.
Writes reports/benchmarks/pool.md.

    python tests/bench/bench_pool.py [TRANSITIONS]
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np
from measured import MB, in_child, measured, publish

from netllm_lib.abr.batches import make_windows
from netllm_lib.abr.episodes import sound_episodes
from netllm_lib.abr.policies.bba import BBA
from netllm_lib.abr.policies.mpc import RobustMPC
from netllm_lib.abr.policies.simple import Random
from netllm_lib.abr.pool import ExperiencePool, generate_mix, load_pool
from netllm_lib.abr.qoe import CHUNKS
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.train import TrainConfig

PHASES = {
    "generate": "generate and save",
    "again": "find it made already",
    "load": "load and check",
    "copy": "load and save again",
    "train": "load, cut windows, 20 training steps of 8 windows",
}


def generate(count: int, path: Path | None) -> ExperiencePool:
    registry = Registry(SAMPLE)
    traces, video = registry.trace_set(registry.default_traces("train")), registry.video(registry.default_video())
    policies = (RobustMPC(video), BBA(), Random())
    share = -(-count // (len(policies) * (CHUNKS - 1)))
    episodes = sound_episodes(traces, repeats=-(-share // len(traces))).rows(range(share))
    return generate_mix([(policy, episodes) for policy in policies], traces, video, path=path)


def child(phase: str, folder: Path, count: int) -> None:
    path = folder / "pool"
    if phase in ("generate", "again"):
        generate(47, None)  # compiles
        with measured() as found:
            pool = generate(count, path)
    elif phase == "train":
        from llm_fixtures import tiny_network, toy_pool, train_on

        network, draws = tiny_network(lora=False), np.random.default_rng(0)
        train_on(network, toy_pool(4), TrainConfig(epochs=1, precision="float32"), folder / "warm-up")
        with measured() as found:
            windows = make_windows(pool := load_pool(path))
            order = tuple(draws.integers(0, len(windows), 160).tolist())
            train_on(network, windows, TrainConfig(epochs=1, precision="float32", order=order), folder / "training")
    else:
        with measured() as found:
            pool = load_pool(path)
            if phase == "copy":
                pool.save(folder / "copy")
    print(json.dumps(found | {"transitions": len(pool), "hash": pool.content_hash()}))


def main(count: int = 1_000_000) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = {phase: in_child(__file__, phase, scratch, count) for phase in PHASES}
        size_mb = sum(path.stat().st_size for path in Path(scratch, "pool").iterdir()) / MB
    if len({row["hash"] for row in found.values()}) != 1:
        raise SystemExit(f"the pools differ: {found}")
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    rows = (
        f"| {PHASES[phase]} | {row['seconds']:.1f} | {row['anonymous_mb']:.0f} | {row['peak_mb']:.0f} |"
        for phase, row in found.items()
    )
    text = f"""# A pool of {found["load"]["transitions"]:,} transitions

MPC, BBA and random levels in equal parts on the bundled training traces; the folder has {size_mb:.0f} MB. Each figure from a
process of its own, one thread, {machine}. Command: `python tests/bench/bench_pool.py`.

Memory is the peak above what the process held after imports and a small warm-up, in MB: first its own (anonymous)
memory, then with pages of mapped files, which the system takes back when there is no room.

| | seconds | own memory | with pages |
|---|---|---|---|
"""
    publish("pool", text + "\n".join(rows))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        child(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(*map(int, sys.argv[1:]))
