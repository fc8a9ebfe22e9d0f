"""Commands that run notebooks headless: `netllm run`."""

from __future__ import annotations

from typing import Annotated

import typer

from netllm_lib.cli.options import echo


def run(
    target: Annotated[str, typer.Argument(metavar="NOTEBOOK|PIPELINE.toml", help="A path, 03_experience_pool, or 03.")],
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", metavar="KEY VALUE", help="A notebook's parameter; STEP.KEY for one step only."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is there already.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Limit for each notebook; 0 for none.")
    ] = None,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="Jupyter kernel [the notebook's own].")] = None,
) -> None:
    """Run a notebook, or a pipeline of them, headless; results go to reports/runs/."""
    from netllm_lib import notebooks, pipelines

    given = dict(item.split("=", 1) for item in parameters or [])
    if target.endswith(".toml"):
        if kernel is not None:
            raise ValueError("--kernel is for a single notebook: the notebooks of a pipeline name their own")
        pipelines.run_pipeline(target, given, timeout_s=timeout, force=force, echo=echo)
        return
    limit = notebooks.TIMEOUT_S if timeout is None else timeout
    done = notebooks.run_notebook(target, given, kernel=kernel, timeout_s=limit, force=force, echo=echo)
    echo(pipelines.describe(done))
    echo(f"report: {notebooks.shown(done.report)}")
