"""`netllm play`: a policy over a trace set, and its mean reward."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from netllm_lib.cli.options import DataOption, JsonOption, print_json

TABLES = (".parquet", ".csv")


def play(
    policy: Annotated[str, typer.Option(help="bba, mpc, genet, udr_1, …, random, constant-2, or a policy's folder.")],
    traces: Annotated[str | None, typer.Option(help="Trace set [the first one of the split test].")] = None,
    video: Annotated[str | None, typer.Option(help="Video [the first one].")] = None,
    preset: Annotated[
        Literal["sound", "upstream"], typer.Option(help="upstream: policy and protocol as in the original.")
    ] = "sound",
    trace_num: Annotated[
        int | None,
        typer.Option(metavar="N", help="Traces to play, the first ones; -1: all [upstream: 100; sound: all]."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Of noise and sampling [the original's].")] = None,
    fixed_order: Annotated[bool, typer.Option("--fixed-order", help="upstream: traces in order, no noise.")] = False,
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(metavar="TABLE", help="Write all chunks, as .parquet or .csv.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Play a policy over a trace set and print its mean reward. Sound, this is the test of notebook 05."""
    file = re.sub(r"\.py:\w+$", ".py", policy)
    if (Path(file).name != file or file.endswith(".py")) and not Path(file).exists():
        raise FileNotFoundError(f"--policy {policy}: {file} is not there")
    if out is not None and out.suffix not in TABLES:
        raise ValueError(f"--out {out}: give a name that ends in {' or '.join(TABLES)}")

    from netllm_lib import runs, stats
    from netllm_lib.abr import play as playing
    from netllm_lib.abr import qoe
    from netllm_lib.abr.episodes import SEED, upstream_episodes
    from netllm_lib.abr.policies.catalogue import make_policy
    from netllm_lib.abr.simulator import Simulator
    from netllm_lib.abr.traces import find_registry

    registry = find_registry(data)
    trace_set = registry.trace_set(traces or registry.default_traces("test"))
    clip = registry.video(video or registry.default_video())
    player = make_policy(policy, clip, registry, preset)
    seed, upstream = SEED if seed is None else seed, preset == "upstream"
    episodes = upstream_episodes(
        trace_set,
        trace_num=(min(100, len(trace_set)) if upstream else -1) if trace_num is None else trace_num,
        fixed_order=fixed_order or not upstream,
        seed=seed,
        draws_actions=player.draws_actions,
        clock="running" if upstream else "episode",
    )
    report = runs.progress("chunks played", sys.stderr)
    table = playing.play(player, Simulator(trace_set, clip, episodes), progress=report)
    if out is not None:
        with runs.atomic_path(out) as aside:
            table.to_csv(aside, index=False) if out.suffix == ".csv" else table.to_parquet(aside)
    quality, mean_all48, means = qoe.summarise(table), float(table["reward"].mean()), qoe.per_trace(table)["reward"]
    between = stats.bootstrap(means.to_numpy())
    print(f"{player.name} on {trace_set.name}, {clip.name}: {len(episodes)} traces, preset {preset}, seed {seed}")
    print(f"  mean reward   {quality.reward:.6f}   from {between.low:.4f} to {between.high:.4f} (95 %, over traces)")
    print(f"                {mean_all48:.6f}   with the first chunk of each trace, which no policy chooses")
    print(f"  bitrate       {quality.bitrate_mbps:.4f} Mbps")
    print(f"  rebuffering   {quality.rebuffer_s:.5f} s per chunk")
    print(f"  smoothness    {quality.smoothness_mbps:.4f} Mbps")
    parts = quality._asdict()
    result = {
        "mean_reward": parts.pop("reward"),
        "low": between.low,
        "high": between.high,
        "mean_all48": mean_all48,
        **parts,
    }
    result |= {"traces": len(episodes), "fixed": episodes.fixed, "seed": seed}
    named = {f"{trace_set.name}_{name}": mean for name, mean in means.items()}  # as the original names its result files
    print_json(as_json, {**result, "per_trace": named})
