"""`netllm pool`: experience pools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from netllm_lib.cli.options import DataOption, JsonOption, print_json

app = typer.Typer(help="Experience pools: show, and to and from Minari.", no_args_is_help=True, rich_markup_mode=None)

Pool = Annotated[
    Path, typer.Argument(metavar="POOL", help="Folder of a pool or a run, or the original's exp_pool.pkl.")
]
DatasetId = Annotated[str, typer.Argument(metavar="DATASET_ID", help="name-v0 or namespace/name-v0.")]
Author = Annotated[str | None, typer.Option(metavar="NAME", help="Recorded in the dataset.")]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")]


@app.command("show")
def pool_show(pool: Pool, as_json: JsonOption = False) -> None:
    """Show what is in a pool."""
    from netllm_lib.abr.pool import load_pool

    found = load_pool(pool)
    print(f"{found.describe()}\nhash                {found.content_hash()}")
    _end(found, as_json, mean_reward=float(found.rewards.mean()), source=found.source)


@app.command("export")
def pool_export(
    pool: Pool, dataset_id: DatasetId, author: Author = None, data: DataOption = None, as_json: JsonOption = False
) -> None:
    """Write a pool as a Minari dataset.

    To $MINARI_DATASETS_PATH or ~/.minari/datasets.
    """
    from netllm_lib.abr.minari import export_minari
    from netllm_lib.abr.pool import load_pool

    found = load_pool(pool)
    folder = export_minari(found, dataset_id, data=data, author=author)
    print(f"wrote {len(found.episode_starts)} episodes to {folder}")
    _end(found, as_json, folder=folder)


@app.command("import")
def pool_import(dataset_id: DatasetId, folder: Folder, as_json: JsonOption = False) -> None:
    """Read a Minari dataset of bitrate episodes into a pool."""
    from netllm_lib.abr.minari import import_minari

    found = import_minari(dataset_id)
    print(f"{found!r}\nsaved to {found.save(folder)}")
    _end(found, as_json, pool=folder)


def _end(found: Any, as_json: bool, **more: Any) -> None:
    about = {"transitions": len(found), "episodes": len(found.episode_starts), "hash": found.content_hash()}
    print_json(as_json, about | more)
