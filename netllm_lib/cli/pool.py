"""`netllm pool`: experience pools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netllm_lib.cli.options import JsonOption, print_json

app = typer.Typer(help="Experience pools: show.", no_args_is_help=True, rich_markup_mode=None)

Pool = Annotated[
    Path, typer.Argument(metavar="POOL", help="Folder of a pool or a run, or the original's exp_pool.pkl.")
]


@app.command("show")
def pool_show(pool: Pool, as_json: JsonOption = False) -> None:
    """Show what is in a pool."""
    from netllm_lib.abr.pool import load_pool

    found = load_pool(pool)
    print(f"{found.describe()}\nhash                {found.content_hash()}")
    about = {"transitions": len(found), "episodes": len(found.episode_starts), "hash": found.content_hash()}
    print_json(as_json, about | {"mean_reward": float(found.rewards.mean()), "source": found.source})


@app.callback()
def _group() -> None:
    """A group of commands, though there is one only."""
