"""`netllm play`: a policy over a trace set, and its mean reward."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from netllm_lib.cli.options import DataOption, JsonOption, Preset, print_json


def play(
    policy: Annotated[str, typer.Option(help="bba, mpc, genet, udr_1, …, random, constant-2, or a policy's folder.")],
    traces: Annotated[str | None, typer.Option(help="Trace set [the first one of the split test].")] = None,
    video: Annotated[str | None, typer.Option(help="Video [the first one].")] = None,
    preset: Annotated[Preset, typer.Option(help="upstream: policy and protocol as in the original.")] = Preset.sound,
    trace_num: Annotated[
        int | None, typer.Option(metavar="N", help="Traces to play; -1: all [upstream: 100; sound: all].")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of noise and sampling.")] = 100003,
    fixed_order: Annotated[bool, typer.Option("--fixed-order", help="upstream: traces in order, no noise.")] = False,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(metavar="TABLE.parquet", help="Write the table of all chunks.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Play a policy over a trace set and print its mean reward."""
    from netllm_lib import runs
    from netllm_lib.abr import play as playing
    from netllm_lib.abr import qoe
    from netllm_lib.abr.episodes import sound_episodes, upstream_episodes
    from netllm_lib.abr.policies.catalogue import make_policy
    from netllm_lib.abr.simulator import Simulator
    from netllm_lib.abr.traces import find_registry

    registry = find_registry(data)
    trace_set = registry.trace_set(traces or registry.default_traces("test"))
    clip = registry.video(video or registry.default_video())
    player = make_policy(policy, clip, registry, preset.value)
    if preset is Preset.upstream:
        count = min(100, len(trace_set)) if trace_num is None else trace_num
        how: dict[str, Any] = {"fixed_order": fixed_order, "draws_actions": player.draws_actions}
        episodes = upstream_episodes(trace_set, trace_num=count, seed=seed, **how)
    else:
        count = len(trace_set) if trace_num in (None, -1) else trace_num
        if count < 1:
            raise ValueError(f"--trace-num {trace_num}: give a positive number, or -1 for all")
        episodes = sound_episodes(trace_set, seed=seed, repeats=-(-count // len(trace_set))).rows(range(count))
    report = runs.progress("chunks played", sys.stderr)
    table = playing.play(player, Simulator(trace_set, clip, episodes), progress=report)
    quality, mean_all48 = qoe.summarise(table), float(table["reward"].mean())
    if out is not None:
        with runs.atomic_path(out) as aside:
            table.to_parquet(aside)
    print(f"{player.name} on {trace_set.name}, {clip.name}: {len(episodes)} traces, preset {preset.value}, seed {seed}")
    print(f"  mean reward   {quality.reward:.6f}   (all 48 chunks: {mean_all48:.6f})")
    print(f"  bitrate       {quality.bitrate_mbps:.4f} Mbps")
    print(f"  rebuffering   {quality.rebuffer_s:.5f} s per chunk")
    print(f"  smoothness    {quality.smoothness_mbps:.4f} Mbps")
    parts = quality._asdict()
    result = {"mean_reward": parts.pop("reward"), "mean_all48": mean_all48, **parts}
    result |= {"traces": len(episodes), "fixed": episodes.fixed, "seed": seed}
    means = qoe.per_trace(table)["reward"]  # named as the original names its result files
    named = {f"{trace_set.name}_{name}": mean for name, mean in means.items()}
    print_json(as_json, {**result, "per_trace": named})
