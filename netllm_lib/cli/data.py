"""`netllm data`: trace sets and videos."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from netllm_lib.cli.options import DataOption, JsonOption, counting, waiting

app = typer.Typer(
    help="Trace sets and videos: list, fetch, import, export, generate.", no_args_is_help=True, rich_markup_mode=None
)


class TraceFormat(StrEnum):
    """Formats that traces are written in."""

    mahimahi = "mahimahi"
    csv = "csv"
    sabre = "sabre"


class SourceFormat(StrEnum):
    """Formats that traces, and a video (movie), are read from."""

    mahimahi = "mahimahi"
    csv = "csv"
    sabre = "sabre"
    movie = "movie"


SumsOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Sums as of sha256sum, for a fork with other data [NetLLM's].")
]
FolderArgument = Annotated[Path | None, typer.Argument(help="Root folder [data/netllm of the checkout].")]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Replace what is there under that name.")]


def _fetched_to(folder: Path | None) -> Path:
    from netllm_lib.runs import PROJECT

    return PROJECT / "data" / "netllm" if folder is None else folder


def _end(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from netllm_lib.runs import plain

        print(json.dumps(plain(result)))


@app.command("list")
def data_list(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show trace sets, what they share, videos and actors.

    Durations are in seconds, quantiles are those of the traces' mean bandwidths in Mbps. Two traces share content if four
    consecutive distinct bandwidths are the same.
    """
    from netllm_lib.abr.traces import find_registry, overlap_matrix

    registry = find_registry(data)
    table, overlaps = registry.describe(), overlap_matrix(registry.trace_sets())
    shown = table.round({"hours": 2, "min_s": 0, "median_s": 0, "max_s": 0}).round(3)
    print(f"{registry.root}\n\nMean bandwidth of the traces in Mbps:\n{shown.to_string(index=False)}\n")
    print(f"Traces of the row that share content with the column:\n{overlaps.to_string()}\n")
    print(f"videos: {', '.join(registry.video_folders()) or 'none'}")
    print(f"actors: {', '.join(registry.actor_folders()) or 'none'}")
    found = {"root": str(registry.root), "trace_sets": table.to_dict("records"), "overlaps": overlaps.to_dict("index")}
    _end(found | {"videos": list(registry.video_folders()), "actors": list(registry.actor_folders())}, as_json)


@app.command("fetch")
def data_fetch(
    folder: FolderArgument = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="A clone of NetLLM, or its unpacked data; no network.")
    ] = None,
    repository: Annotated[str | None, typer.Option(metavar="URL", help="A mirror or fork.")] = None,
    commit: Annotated[str | None, typer.Option(metavar="HASH", help="Of the fork, all 40 digits.")] = None,
    sums: SumsOption = None,
    replace: Annotated[bool, typer.Option("--replace", help="Fetch files anew that were changed in FOLDER.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring NetLLM's own data, every file checked.

    By git, without the rest of the repository, or from a folder. Goes on where it was interrupted.
    """
    from netllm_lib.abr import fetch

    done = fetch.fetch_data(
        _fetched_to(folder),
        source=source,
        repository=repository or fetch.REPOSITORY,
        commit=commit or fetch.COMMIT,
        sums=fetch.read_sums(sums) if sums is not None else None,
        replace=replace,
        progress=counting("files"),
    )
    total = done.kept + done.brought
    print(f"{done.folder}: all {total} files are there and right; {done.kept} were there, {done.brought} fetched")
    if done.brought:
        print(f"from {done.source}")
    if done.ignored:
        more = f" and {len(done.ignored) - 3} more" if len(done.ignored) > 3 else ""
        print(f"left out {len(done.ignored)} files that the sums do not know: {', '.join(done.ignored[:3])}{more}")
    result = {"folder": done.folder, "files": total, "kept": done.kept, "brought": done.brought}
    _end(result | {"ignored": done.ignored, "source": done.source}, as_json)


@app.command("check")
def data_check(folder: FolderArgument = None, sums: SumsOption = None, as_json: JsonOption = False) -> None:
    """Compare fetched data with the sums.

    Exit code 1 if a file is missing or wrong.
    """
    from netllm_lib.abr import fetch

    found = fetch.check_data(
        _fetched_to(folder), fetch.read_sums(sums) if sums is not None else None, counting("checked files")
    )
    print(found)
    _end({"complete": found.complete, "folder": found.folder, "right": len(found.right)} | {
        "missing": found.missing, "wrong": found.wrong, "extra": found.extra}, as_json)  # fmt: skip
    if not found.complete:
        raise typer.Exit(1)


@app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="A file, or a folder of files that become one trace set.")],
    folder: Annotated[Path, typer.Argument(help="Root folder to write to; name it with --data later.")],
    form: Annotated[SourceFormat, typer.Option("--format", help="movie: a video, sabre's movie JSON.")],
    name: Annotated[str | None, typer.Option(help="Of the trace set or video [the source's].")] = None,
    split: Annotated[str, typer.Option(help="train, test, or any other.")] = "train",
    time_column: Annotated[
        str | None, typer.Option("--time", metavar="COLUMN", help="CSV: the time's column [by its header].")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="CSV: the bandwidth's column [by its header].")
    ] = None,
    unit: Annotated[
        str | None, typer.Option(help="Of bandwidths: Mbps, kbps, bps, MB/s, kB/s or B/s; then it is not questioned.")
    ] = None,
    time_unit: Annotated[str | None, typer.Option(help="Of times: s, ms, us or ns; then it is not questioned.")] = None,
    interval: Annotated[float, typer.Option(metavar="SECONDS", help="mahimahi: packets are counted over this.")] = 1.0,
    replace: ReplaceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn other tools' files into a trace set or video.

    mahimahi packet timestamps, CSV with a header, sabre's JSON. Implausible units are refused; --unit and --time-unit settle it.
    """
    from netllm_lib.abr import convert

    if form is SourceFormat.movie:
        with waiting("reading"):
            video, written = convert.import_movie(source, folder, name, replace)
        print(f"{written}: {video.sizes_bytes.shape[1]} chunks in {len(video.sizes_bytes)} levels")
        _end({"folder": written, "chunks": video.sizes_bytes.shape[1]}, as_json)
        return
    reading = convert.Reading(time_column, bandwidth, unit, time_unit, interval)
    with waiting("converting traces"):
        traces, written = convert.import_traces(
            source, folder, form.value, name=name, split=split, reading=reading, replace=replace
        )
    means = traces.describe()["mean_mbps"]
    print(
        f"{written}: {len(traces)} traces of {means.min():.3f} to {means.max():.3f} Mbps, median {means.median():.3f}"
    )
    _end({"folder": written, "traces": len(traces), "mean_mbps": dict(zip(traces.names, means, strict=True))}, as_json)


@app.command("export")
def data_export(
    trace_set: Annotated[str, typer.Argument(help="Name of a trace set, as `netllm data list` shows it.")],
    folder: Annotated[Path, typer.Argument(help="New folder, one file per trace.")],
    form: Annotated[TraceFormat, typer.Option("--format", help="What to write; docs/data.md describes each.")],
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a trace set for other tools."""
    from netllm_lib.abr import convert
    from netllm_lib.abr.traces import find_registry

    traces = find_registry(data).trace_set(trace_set)
    with waiting("writing traces"):
        written = convert.export_traces(traces, folder, form.value)
    print(f"{written}: {len(traces)} files")
    _end({"folder": written, "traces": len(traces)}, as_json)


@app.command("generate")
def data_generate(
    folder: Annotated[Path, typer.Argument(help="Root folder to write to.")],
    train: Annotated[int, typer.Option(metavar="N", help="How many training traces.")] = 60,
    test: Annotated[int, typer.Option(metavar="N", help="How many test traces.")] = 30,
    seed: Annotated[int, typer.Option(metavar="S", help="Of all random numbers.")] = 7,
    like: Annotated[
        str | None, typer.Option(metavar="TRACE_SET", help="Fit the model to this trace set, print fit and match.")
    ] = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate synthetic traces and a video.

    With the defaults, the bundled sample.

    A trace's log bandwidth is a level, drawn once, plus a regime (good, usual, poor, bad) that changes every 45 s or so,
    plus a first-order autoregression. --like estimates all parameters from a trace set by moments. docs/data.md has the formulas.
    """
    from netllm_lib.abr import synthetic
    from netllm_lib.runs import plain

    if train < 1 or test < 1:
        raise ValueError(f"--train {train} --test {test}: at least one trace of each is needed")
    if like is None:
        with waiting("generating"):
            synthetic.write_sample(folder, train, test, seed)
        print(f"wrote {train} + {test} traces and a video to {folder}")
        _end({"folder": folder, "trace_sets": ["sample-train", "sample-test"]}, as_json)
        return
    from netllm_lib.abr import fit
    from netllm_lib.abr.traces import find_registry

    traces = find_registry(data).trace_set(like)
    with waiting("fitting and generating"):
        model = fit.fit_model(traces)
        made = fit.write_like(traces, model, folder, train, test, seed)
        match = fit.compare({like: traces, **{each.name: each for each in made}}, model.interval_s)
    for name, value in plain(model).items():
        print(f"{name:12}  {value if not isinstance(value, list) else ', '.join(map(str, value))}")
    print(f"\n{match.round(3).to_string()}\n")
    print(f"wrote {train} + {test} traces to {folder}: {', '.join(each.name for each in made)}")
    result = {"folder": folder, "trace_sets": [each.name for each in made], "model": plain(model)}
    _end(result | {"match": match.to_dict()}, as_json)
