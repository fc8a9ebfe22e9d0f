"""`netllm sweep`: a notebook or pipeline at many points of its parameters.

Exit codes: 0 done; 1 a point failed, or the comparison did; 2 the request was wrong.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from netllm_lib.cli.options import JsonOption, echo, print_json, waiting

SHOWN = 3  # failed points in an error message


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="Which points to run; see docs/sweeps.md.")],
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes on this machine [one a GPU, else by cores].")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, run nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a notebook or pipeline at many points, and compare them.

    Start it again to go on where it was.
    """
    from netllm_lib import clusters, compare, notebooks, runs, sweeps
    from netllm_lib.pipelines import shown
    from netllm_lib.reports import update_index
    from netllm_lib.sweep_file import read_sweep

    asked = read_sweep(file)
    with waiting("looking for finished runs"):
        finished = sweeps.finished_runs(asked)
    echo(sweeps.plan(asked, finished))
    if dry_run:
        counts = {"points": len(asked.points), "runs": len(asked.steps), "finished": len(finished)}
        return print_json(as_json, {"name": asked.name, **counts})
    work = sweeps.work(asked)
    with runs.lock(runs.run_folder(*work)):
        run = runs.open_run(*work)
        shutil.copyfile(file, run.folder / "sweep.toml")
        try:
            with clusters.connect(asked.cluster, workers, len(asked.steps) - len(finished)) as client:
                rows = sweeps.rows(asked, sweeps.run_sweep(asked, client, echo))
        except KeyboardInterrupt:
            run.note(status="interrupted")
            raise
        points = sweeps.points_table(rows)
        for name, table in ((compare.POINTS, points), (compare.RESULTS, compare.collect(points))):
            with runs.atomic_path(run.folder / name) as aside:
                table.to_parquet(aside)
        failed = [row for row in rows if row["state"] == "failed"]
        if not failed and not run.done:
            run.finish({"points": len(points), "runs": len(asked.steps)})
    answer = {"name": asked.name, "folder": run.folder, "comparison": None, "points": rows}
    echo(f"tables: {shown(run.folder)}")
    if len(failed) < len(rows):
        settings = {"sweep_dir": str(run.folder)}
        folder = notebooks.run_notebook("08_compare", settings, group=asked.name, echo=lambda _: None).folder
        echo(f"\n{(folder / 'summary.txt').read_text().rstrip()}\n\nreport: {shown(folder / notebooks.REPORT)}")
        answer["comparison"] = folder
    update_index()
    print_json(as_json, answer)
    if failed:
        labels = {point.number: point.label for point in asked.points}
        said = [f"{row['point']} ({labels[row['point']]}): {row['problem']}" for row in failed[:SHOWN]]
        said += [f"{len(failed) - SHOWN} more in {compare.POINTS}"] * (len(failed) > SHOWN)
        raise notebooks.NotebookError(f"{file}: {len(failed)} of {len(rows)} points failed: {'; '.join(said)}")
    return None
