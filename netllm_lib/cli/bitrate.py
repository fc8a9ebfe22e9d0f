"""Commands on bitrate policies and their runs: `netllm play`, `import`, `diagnose`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from netllm_lib.cli.options import DataOption, JsonOption, Preset, counting, waiting


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
        episodes = upstream_episodes(
            trace_set,
            trace_num=min(100, len(trace_set)) if trace_num is None else trace_num,
            fixed_order=fixed_order,
            seed=seed,
            draws_actions=player.draws_actions,
        )
    else:
        count = len(trace_set) if trace_num in (None, -1) else trace_num
        if count < 1:
            raise ValueError(f"--trace-num {trace_num}: give a positive number, or -1 for all")
        episodes = sound_episodes(trace_set, seed=seed, repeats=-(-count // len(trace_set))).rows(range(count))
    table = playing.play(
        player,
        Simulator(trace_set, clip, episodes),
        progress=runs.progress(policy) if sys.stderr.isatty() else counting("chunks played"),
    )
    quality = qoe.summarise(table)
    if out is not None:
        with runs.atomic_path(out) as aside:
            table.to_parquet(aside)
    print(f"{player.name} on {trace_set.name}, {clip.name}: {len(episodes)} traces, preset {preset.value}, seed {seed}")
    print(f"  mean reward   {quality.reward:.6f}   (all 48 chunks: {table['reward'].mean():.6f})")
    print(f"  bitrate       {quality.bitrate_mbps:.4f} Mbps")
    print(f"  rebuffering   {quality.rebuffer_s:.5f} s per chunk")
    print(f"  smoothness    {quality.smoothness_mbps:.4f} Mbps")
    if as_json:
        result = {
            "mean_reward": quality.reward,
            "mean_all48": float(table["reward"].mean()),
            "traces": len(episodes),
            "fixed": episodes.fixed,
            "seed": seed,
            "bitrate_mbps": quality.bitrate_mbps,
            "rebuffer_s": quality.rebuffer_s,
            "smoothness_mbps": quality.smoothness_mbps,
            # named as the original names its result files
            "per_trace": {f"{trace_set.name}_{name}": mean for name, mean in qoe.per_trace(table)["reward"].items()},
        }
        print(json.dumps(result))


def import_(
    folder: Annotated[Path, typer.Argument(help="A tree, run folder, result folder or console log of the original.")],
    pool: Annotated[
        Path | None, typer.Option(metavar="POOL", help="Training pool [the one in the folder, or made anew].")
    ] = None,
    plm: Annotated[
        str | None, typer.Option(metavar="DIR", help="The PLM [the one in the folder or in downloaded_plms].")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="PART", help="Which run, by a part of its place, if there are several.")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a run of the original into a run folder.

    Whatever is there of it is taken; what is missing is named, with what it would add.
    """
    from netllm_lib import runs
    from netllm_lib.abr.upstream import imports as importing

    with waiting("importing"):
        found = importing.discover(folder, run)
        imported = importing.convert(found, pool=pool, plm=plm, data=data)
    told = runs.read_json(imported.folder / "settings.json")
    missing = runs.read_json(imported.folder / "missing.json")
    has_policy = (imported.folder / "policy").is_dir()
    print(f"{found.name}: {found.run}")
    for name, result in told["results"].items():
        print(f"  {name}: {result['files']} traces, mean reward {result['mean_reward']:.6f}")
    console = found.console
    if console is not None:
        printed = "" if console.mean_reward is None else f", mean reward {console.mean_reward:.6f}"
        print(f"  console log: {len(console.epochs)} epochs{printed}")
        last = console.epochs[-1] if console.epochs else None
        if last is not None and last.loss_mean is not None and last.loss_std is not None:
            print(f"  last epoch: loss {last.loss_mean:.3f} ± {last.loss_std:.3f}")
    if found.losses is not None:
        print(f"  {found.losses.name}: in history.parquet")
    for weights in found.weights:
        epoch = "" if weights.epoch is None else f" of epoch {weights.epoch}"
        print(f"  weights: {weights.kind}{epoch}" + (f", unusable: {weights.problem}" if weights.problem else ""))
    if told["pool"]["origin"] is not None:
        differs = {None: "", True: "; NOT the one that the run's folder names", False: ""}[told["pool"]["pool_differs"]]
        print(f"  pool: {told['pool']['origin']}, {told['pool']['hash']}{differs}")
    if has_policy:
        print(f"  policy: netllm play --preset upstream --policy {imported.folder}")
    for title, lines in (("contradictions", told["contradictions"]), ("notes", told["notes"]), ("missing", missing)):
        if lines:
            print(f"{title}:")
            print("\n".join(f"  {line}" for line in lines))
    print(f"run folder: {imported.folder}")
    if as_json:
        means = {name: result["mean_reward"] for name, result in told["results"].items()}
        report = {"name": found.name, "mean_reward": means, "console_mean_reward": console and console.mean_reward}
        report |= {"policy": has_policy, "missing": missing, "contradictions": told["contradictions"]}
        report |= {"notes": told["notes"], "pool_differs": told["pool"]["pool_differs"], "run": str(imported.folder)}
        print(json.dumps(report))


def diagnose(
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER...", help="Run folders of notebooks 03, 04, 05, or anything that the original left behind."
        ),
    ],
    pool: Annotated[
        str | None, typer.Option(metavar="POOL", help="The pool that the test was given [the training's].")
    ] = None,
    plm: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the PLM [where the run found it].")] = None,
    results: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which result folder, if there are several.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="PART", help="Which run, by a part of its place, if there are several.")
    ] = None,
    budget: Annotated[
        float, typer.Option(metavar="SECONDS", help="For replaying the test, one switch at a time; 0: not.")
    ] = 90.0,
    retrain: Annotated[
        float, typer.Option(metavar="SECONDS", help="For training the PLM anew by the sound defaults; 0: not.")
    ] = 0.0,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why a run's reward is poor: the first thing to fix first."""
    # threads that wait by spinning make PyTorch many times slower beside a busy process; it reads this when it is loaded
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from netllm_lib.abr import diagnosis
    from netllm_lib.abr.diagnosis import load as sources

    with waiting("diagnosing"):
        evidence = sources.load(*folders, pool=pool, plm=plm, data=data, results=results, run=run)
        progress = (lambda line: print(line, file=sys.stderr, flush=True)) if sys.stderr.isatty() else None
        found = diagnosis.diagnose(evidence, budget, retrain, progress)
    print(found)
    if found.waterfall is not None:
        print(f"\n{found.waterfall.round(3).to_string(index=False)}")
    if as_json:
        print(json.dumps(found.plain()))
