"""`netllm data`: trace sets and videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from netllm_lib.cli.options import DataOption, JsonOption

app = typer.Typer(help="Trace sets and videos.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def data_list(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show the trace sets, videos and actors that are found."""
    from netllm_lib.abr.traces import find_registry

    registry = find_registry(data)
    table = registry.describe()
    print(f"{registry.root}\n\n{table.round(3).to_string(index=False)}\n")
    print(f"videos: {', '.join(registry.video_folders()) or 'none'}")
    print(f"actors: {', '.join(registry.actor_folders()) or 'none'}")
    if as_json:
        found = {"root": str(registry.root), "trace_sets": table.to_dict("records")}
        print(json.dumps(found | {"videos": list(registry.video_folders()), "actors": list(registry.actor_folders())}))


@app.command("generate")
def data_generate(
    folder: Annotated[Path, typer.Argument(help="Root folder to write to.")],
    train: Annotated[int, typer.Option(help="Training traces.")] = 60,
    test: Annotated[int, typer.Option(help="Test traces.")] = 30,
    seed: int = 7,
) -> None:
    """Generate synthetic traces and a video; with the defaults, the bundled sample."""
    from netllm_lib.abr.synthetic import write_sample

    write_sample(folder, train, test, seed)
    print(f"wrote {train} + {test} traces and a video to {folder}")
