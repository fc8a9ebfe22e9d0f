"""`netllm diagnose`: why a run's reward is poor."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from netllm_lib.cli.options import DataOption, JsonOption, print_json, waiting


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
    from netllm_lib.abr import diagnosis
    from netllm_lib.abr.diagnosis.load import load

    with waiting("diagnosing"):
        evidence = load(*folders, pool=pool, plm=plm, data=data, run=run)
        progress = (lambda line: print(line, file=sys.stderr, flush=True)) if sys.stderr.isatty() else None
        found = diagnosis.diagnose(evidence, budget, retrain, progress)
    print(found)
    if found.waterfall is not None:
        print(f"\n{found.waterfall.round(3).to_string(index=False)}")
    print_json(as_json, found.plain())
