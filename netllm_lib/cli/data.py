"""`netllm data`: trace sets and videos."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from netllm_lib.abr import FETCHED
from netllm_lib.cli.options import DataOption, JsonOption, print_json, waiting

if TYPE_CHECKING:
    from netllm_lib.abr.traces import Trace

HELP = "Trace sets and videos: list, fetch, import, generate."
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)
FolderArgument = Annotated[Path, typer.Argument(help="Root folder [data/netllm of the checkout].", show_default=False)]


@app.command("list")
def data_list(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show trace sets, what they share (four consecutive distinct bandwidths that are the same), videos and actors."""
    from netllm_lib.abr.traces import find_registry, overlap_matrix

    registry = find_registry(data)
    sets = registry.trace_sets()
    table, overlaps = registry.describe(sets), overlap_matrix(sets)
    shown = table.round({"hours": 2, "min_s": 0, "median_s": 0, "max_s": 0}).round(3)
    print(f"{registry.root}\n\nMean bandwidth of the traces in Mbps:\n{shown.to_string(index=False)}\n")
    print(f"Traces of the row that share content with the column:\n{overlaps.to_string()}\n")
    others = {"videos": list(registry.video_folders()), "actors": list(registry.actor_folders())}
    print("\n".join(f"{kind}: {', '.join(names) or 'none'}" for kind, names in others.items()))
    found = {"root": registry.root, "trace_sets": table.to_dict("records"), "overlaps": overlaps.to_dict("index")}
    print_json(as_json, found | others)


@app.command("fetch")
def data_fetch(
    folder: FolderArgument = FETCHED,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="A clone of NetLLM, or its unpacked data; no network.")
    ] = None,
    repository: Annotated[str | None, typer.Option(metavar="URL", help="A mirror.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Fetch files anew that were changed in FOLDER.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring NetLLM's own data, every file checked: by git, without the rest of the repository, or from a folder."""
    from netllm_lib.abr import fetch

    with waiting("fetching"):
        brought = fetch.fetch_data(folder, source=source, repository=repository or fetch.REPOSITORY, replace=replace)
        found = fetch.check_data(folder)
    count = len(found["right"])
    print(f"{folder}: all {count} files are there and right; {brought} of them are new")
    if found["foreign"]:
        print(f"{len(found['foreign'])} other files lie among them: {fetch.few(found['foreign'])}")
    print_json(as_json, {"folder": folder, "files": count, "brought": brought, "foreign": found["foreign"]})


@app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="A file, or a folder of files that become one trace set.")],
    folder: Annotated[Path, typer.Argument(help="Root folder to write to; name it with --data later.")],
    form: Annotated[Literal["mahimahi", "csv", "sabre"], typer.Option("--format", help="What the files are.")],
    name: Annotated[str | None, typer.Option(help="Of the trace set [the source's].")] = None,
    split: Annotated[str, typer.Option(help="train, test, or any other.")] = "train",
    time: Annotated[str, typer.Option(metavar="COLUMN", help="CSV: the column of times.")] = "time_s",
    bandwidth: Annotated[str, typer.Option(metavar="COLUMN", help="CSV: the column of bandwidths.")] = "mbps",
    unit: Annotated[str, typer.Option(help="CSV, required: Mbps, kbps, bps, MB/s, kB/s or B/s.")] = "",
    time_unit: Annotated[str, typer.Option(help="CSV: of times, s, ms, us or ns.")] = "s",
    as_json: JsonOption = False,
) -> None:
    """Turn other tools' files into a trace set: mahimahi packet timestamps, CSV with a header, sabre's JSON."""
    from netllm_lib.abr import convert

    read: dict[str, Callable[[Path], Trace]] = {
        "csv": partial(convert.read_csv, unit=unit, bandwidth=bandwidth, time=time, time_unit=time_unit),
        "mahimahi": convert.read_mahimahi,
        "sabre": convert.read_sabre,
    }
    with waiting("converting traces"):
        traces, written = convert.import_traces(source, folder, read[form], name=name, split=split)
    means = traces.describe()["mean_mbps"]
    print(f"{written}: {len(traces)} traces, mean bandwidths from {means.min():.3f} to {means.max():.3f} Mbps")
    print_json(
        as_json, {"folder": written, "traces": len(traces), "mean_mbps": dict(zip(traces.names, means, strict=True))}
    )


@app.command("generate")
def data_generate(
    folder: Annotated[Path, typer.Argument(help="Root folder to write to.")],
    train: Annotated[int, typer.Option(metavar="N", min=1, help="How many training traces.")] = 60,
    test: Annotated[int, typer.Option(metavar="N", min=1, help="How many test traces.")] = 30,
    seed: Annotated[int, typer.Option(metavar="S", help="Of all random numbers.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Generate synthetic traces and a video; with the defaults, the bundled sample. docs/data.md has the formulas."""
    from netllm_lib.abr import synthetic

    with waiting("generating"):
        synthetic.write_sample(folder, train, test, seed)
    print(f"wrote {train} + {test} traces and a video to {folder}")
    print_json(as_json, {"folder": folder, "trace_sets": ["sample-train", "sample-test"]})
