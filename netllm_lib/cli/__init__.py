"""The command line, `netllm`. Commands are thin: they read arguments, call the library, and print.

Exit codes: 0 done; 1 the work failed (a notebook's cell, a check); 2 the request was wrong (unknown name, missing
file); 3 a gate of `netllm run` failed. An error is one line with what to do; `--debug` shows where it came from. Heavy
imports happen inside the commands, so that `netllm --help` is quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import netllm_lib
from netllm_lib.cli import data, pool
from netllm_lib.cli.diagnose import diagnose
from netllm_lib.cli.imports import import_
from netllm_lib.cli.options import DataOption, JsonOption, print_json, waiting
from netllm_lib.cli.play import play
from netllm_lib.cli.run import run
from netllm_lib.cli.sweep import sweep
from netllm_lib.text import printable_output

INTERRUPTED = 130

app = typer.Typer(
    name="netllm",
    help="Reproduce NetLLM's bitrate adaptation, and explain its gap to the baselines.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def version(asked: bool) -> None:
    """Print the version and end, if asked."""
    if asked:
        print(f"netllm {netllm_lib.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Reproduce NetLLM's bitrate adaptation, and explain its gap to the baselines."""


@app.command()
def check(
    data: DataOption = None,
    plm: Annotated[
        str, typer.Option(metavar="SOURCE", help="smollm2, a Hugging Face folder, or <type>/<size>.")
    ] = "smollm2",
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="How many of its layers would be trained [all].")
    ] = None,
    load: Annotated[bool, typer.Option("--load", help="Load the weights too, not only look at the files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: packages, device, PLM, data, disk, kernels."""
    from netllm_lib import envcheck
    from netllm_lib.abr import checks

    with waiting("checking"):
        found = checks.llm_checks(data, plm, layers, load)
    print(envcheck.as_text(found))
    print_json(as_json, found)
    if bad := envcheck.failed(found):
        print(f"\n{len(bad)} of {len(found)} checks failed", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def reports(as_json: JsonOption = False) -> None:
    """List all runs, the last one first, and write reports/index.html."""
    from netllm_lib.reports import list_runs, write_index

    rows = list_runs()
    for row in rows:
        score = "" if row["score"] is None else f"{row['policy']} {row['score']:.4f}"
        finished, finding = (row["finished"] or "")[:16], row["first finding"] or ""
        print("  ".join([finished, f"{row['state']:8}", f"{row['kind']}/{row['run']}", score, finding]).rstrip())
    print(f"{len(rows)} runs: {write_index()}")
    print_json(as_json, rows)


for command in (run, sweep, play, import_, diagnose):
    app.command(command.__name__.strip("_"))(command)
app.add_typer(data.app, name="data")
app.add_typer(pool.app, name="pool")


def join_parameters(arguments: Sequence[str]) -> list[str]:
    """`-p key value`, papermill's habit, as the `-p key=value` that the option parser understands."""
    joined, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        joined.append(word)
        if word in ("-p", "--parameter"):
            if len(rest) < 2:
                raise ValueError(f"{word} takes two words: {word} KEY VALUE")
            if "=" in rest[0]:
                raise ValueError(f"{word} {rest[0]}: write {word} {rest[0].replace('=', ' ', 1)}")
            joined.append(f"{rest.pop(0)}={rest.pop(0)}")
    return joined


@printable_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `netllm`; ends with SystemExit."""
    from netllm_lib.envcheck import CheckFailed
    from netllm_lib.notebooks import NotebookError
    from netllm_lib.runs import SPIN

    os.environ.setdefault("GOMP_SPINCOUNT", SPIN)  # PyTorch reads it when it is loaded
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # anywhere on the line: it is typed when something has gone wrong already
    try:
        app(args=join_parameters([word for word in words if word != "--debug"]), prog_name="netllm")
    except (SystemExit, KeyboardInterrupt) as end:
        if isinstance(end, KeyboardInterrupt) or end.code == INTERRUPTED:
            print("netllm: interrupted; the same command goes on from what is finished", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)  # threads and workers of libraries would take seconds to end
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
            print("\n".join(getattr(error, "traceback", ())), file=sys.stderr)
        wrong_request = isinstance(error, ValueError | OSError)
        known = wrong_request or isinstance(error, NotebookError | CheckFailed)
        kind = "error" if known else f"unexpected {type(error).__name__}"
        print(f"netllm: {kind}: {error}" + ("" if known or debug else " (--debug shows where)"), file=sys.stderr)
        raise SystemExit(2 if wrong_request else 1) from None
