"""`netllm import`: a run of the original becomes a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from netllm_lib.cli.options import DataOption, JsonOption, waiting


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
