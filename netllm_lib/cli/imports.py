"""`netllm import`: a run of the original becomes a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netllm_lib.cli.options import DataOption, JsonOption, print_json, waiting


def import_(
    folder: Annotated[Path, typer.Argument(help="A tree, run folder, result folder or console log of the original.")],
    pool: Annotated[
        Path | None, typer.Option(metavar="POOL", help="Pool of the run [the one in the folder, or made anew].")
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

    Whatever is there of it is taken; what is broken or missing is named.
    """
    from netllm_lib import runs
    from netllm_lib.abr.upstream.imports import IMPORT, import_run

    with waiting("importing"):
        imported = import_run(folder, pool=pool, plm=plm, data=data, run=run)
    about = runs.read_json(imported.folder / IMPORT)
    means = {name: result["mean_reward"] for name, result in about["results"].items()}
    lines = [
        f"{name}: {about['results'][name]['files']} traces, mean reward {mean:.6f}" for name, mean in means.items()
    ]
    printed = (about["console"] or {}).get("mean_reward")
    if about["console"] is not None:
        tested = "" if printed is None else f", mean reward {printed:.6f}"
        lines.append(f"console log: {about['console']['epochs']} epochs{tested}")
    lines += [f"weights: {Path(saved['folder']).name}, {saved['problem'] or 'complete'}" for saved in about["weights"]]
    if about["pool"]["origin"] is not None:
        lines.append(f"pool: {about['pool']['origin']}, {about['pool']['hash']}")
    if has_policy := (imported.folder / "policy").is_dir():
        lines.append(f"policy: netllm play --preset upstream --policy {imported.folder}")
    lists = {key: about[key] for key in ("notes", "missing")}
    lists["problems"] = [problem["text"] for problem in about["problems"]]
    for title, texts in {f"{about['name']}: {about['run']}": lines, **lists}.items():
        if texts or texts is lines:
            print("\n  ".join([title if texts is lines else f"{title}:", *texts]))
    print(f"run folder: {imported.folder}")
    report = {"name": about["name"], "mean_reward": means, "policy": has_policy, **lists, "run": imported.folder}
    print_json(as_json, report | {"console_mean_reward": printed})
