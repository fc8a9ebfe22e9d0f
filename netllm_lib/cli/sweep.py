"""Sweeps over parameters: `netllm sweep`.

Exit codes: 0 done; 1 a point failed, or the comparison did; 2 the request was wrong.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netllm_lib.cli.options import JsonOption, echo, waiting

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from netllm_lib.sweep_file import Sweep


SHOWN = 3  # failed points in an error message


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="Which points to run; see docs/sweeps.md.")],
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes on this machine [one a GPU, else by cores].")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="An existing dask cluster on this checkout.")
    ] = None,
    slurm: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE,…", help="Jobs of SLURM: partition, cores, memory, walltime, jobs.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Limit for each notebook; 0 for none [the file's].")
    ] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Serve dask's dashboard at port 8787.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a notebook or pipeline at many points, and compare them.

    Start it again to go on where it was.
    """
    from netllm_lib import compare as comparing
    from netllm_lib import notebooks, runs, sweeps
    from netllm_lib.reports import write_index
    from netllm_lib.sweep_file import read_sweep

    asked = read_sweep(file)
    with waiting("looking for finished runs"):
        finished = sweeps.finished_runs(asked)
    echo(sweeps.plan(asked, finished))
    cluster = _cluster(asked, len(asked.steps) - len(finished), workers, scheduler, slurm, dashboard)
    if dry_run:
        if as_json:
            plan = {
                "name": asked.name,
                "points": len(asked.points),
                "runs": len(asked.steps),
                "finished": len(finished),
            }
            print(json.dumps(plan))
        return
    run = sweeps.open_folder(asked)
    with runs.lock(run.folder):
        with cluster as client:
            results = sweeps.run_sweep(asked, client, timeout_s=timeout, echo=echo)
        points = sweeps.points_table(results)
        sweeps.write_table(run.folder, sweeps.POINTS, points)
        sweeps.write_table(run.folder, comparing.RESULTS, comparing.collect(points))
        failed = [result for result in results if result.state == "failed"]
        if not failed and not run.done:
            run.finish({"points": len(points), "runs": len(asked.steps)})
    compared = None
    if len(failed) < len(results):
        compared = notebooks.run_notebook(
            "08_compare", {"sweep_dir": str(run.folder)}, name=asked.name, echo=lambda _: None
        )
        echo("\n" + (compared.folder / "summary.txt").read_text().rstrip() + "\n")
    write_index()
    echo(f"tables: {notebooks.shown(run.folder)}")
    if compared:
        echo(f"report: {notebooks.shown(compared.report)}")
    if as_json:
        answer: dict[str, Any] = {"name": asked.name, "folder": run.folder, "comparison": compared and compared.folder}
        answer["points"] = [
            {
                "point": result.point.number,
                "parameters": result.point.parameters,
                "seed": result.point.seed,
                "state": result.state,
                "problem": result.problem or None,
                "runs": {name: one.folder for name, one in result.runs.items()},
            }
            for result in results
        ]
        print(json.dumps(runs.plain(answer), allow_nan=False), flush=True)
    if failed:
        said = [f"{one.point.number} ({sweeps.label(asked, one.point)}): {one.problem}" for one in failed[:SHOWN]]
        said += [f"{len(failed) - SHOWN} more in points.parquet"] * (len(failed) > SHOWN)
        raise notebooks.NotebookError(f"{file}: {len(failed)} of {len(results)} points failed: {'; '.join(said)}")


def _cluster(
    asked: Sweep, steps: int, workers: int | None, scheduler: str | None, slurm: str | None, dashboard: bool
) -> AbstractContextManager[Any]:
    """What the options and the file's `[cluster]` ask for, checked; it starts when it is entered."""
    from netllm_lib import clusters

    clusters.import_distributed()
    given = {"--workers": workers, "--scheduler": scheduler, "--slurm": slurm}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} ask for different clusters; give one of them")
    table = clusters.read_slurm(asked.cluster, slurm, f"{asked.path}, [cluster]") if asked.cluster or slurm else None
    if scheduler is not None:
        if dashboard:
            raise ValueError("--dashboard is that of the existing scheduler; look there")
        return clusters.connect(address=scheduler)
    if table is not None and workers is None:
        return clusters.connect(lambda: clusters.slurm_cluster(table, dashboard))
    environments = clusters.local_workers(workers, steps, clusters.visible_gpus(), *clusters.machine())
    return clusters.connect(lambda: clusters.local_cluster(environments, dashboard))
