"""A run of the original, in whatever state it is in, as a run folder of the companion.

`discover` looks through a folder and says what is there; `import_run` checks and converts it:

    reports/runs/import/<name>-<hash>/
        import.json                        what was found: see `import_run`
        setting.json, tables/, scores.*    the test, as `Test.save` writes it; the run is called "llm" in it
        results/<result set>/              every test of the run, in the same form
        training.json, history.parquet     the training, as `TrainingRun.save` writes it
        pool/                              the training pool
        test_pool/                         the pool that the test was given, if it is another one
        policy/                            the fine-tuned policy as a checkpoint of the companion

Each of them is there if the run had what it takes. Nothing in foreign files is executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from netllm_lib import runs
from netllm_lib.abr import qoe
from netllm_lib.abr.evaluate import Test
from netllm_lib.abr.pool import ExperiencePool, load_pool
from netllm_lib.abr.traces import Registry, TraceSet, find_registry, overlapping
from netllm_lib.abr.upstream import logs, names
from netllm_lib.abr.upstream.discover import LOSSES, WEIGHT_FILES, Found, ResultSet, discover
from netllm_lib.abr.upstream.remake import remake_pool
from netllm_lib.abr.upstream.training import training_run
from netllm_lib.plm_files import find_plm, problems_in

FORMAT = 3  # of the run folder; a new number makes new folders
IMPORT = "import.json"
SUBJECT = "llm"


@dataclass
class _Import:
    """What was read of a run, before it is written."""

    found: Found
    registry: Registry
    problems: list[dict[str, str | None]]  # finding, text
    chosen: str | None = None  # the result set that is the run's test
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)  # by result set
    losses: logs.Losses | None = None
    pool: ExperiencePool | None = None  # of the training
    origin: str | None = None  # of that pool: found, made anew, given
    test_pool: ExperiencePool | None = None  # of the test, if it is another one
    plm: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # why there is no pool or PLM

    def problem(self, error: Exception | str, finding: str | None = None) -> None:
        self.problems.append({"finding": finding, "text": str(error)})


def import_run(
    folder: str | Path,
    *,
    pool: str | Path | None = None,
    plm: str | Path | None = None,
    data: str | Path | None = None,
    root: Path | None = None,
    run: str | None = None,
) -> runs.Run:
    """Turn what `discover(folder, run)` finds into a run folder, below `root` or `reports/`. The same content leads to the same
    folder, which is then returned as it is.

    The training's pool is the one that the run's folder names, found below `folder` or made anew; else `pool`, which is the test's.
    `plm` is the PLM (else the one in the folder or in `downloaded_plms`), `data` as in `find_registry`.

    A file in the folder that is broken, or does not fit the others, is left out and named in import.json, which holds

        folder, run, name, plm
        settings             of the training; notes and missing are lists of text
        problems             [{finding, text}]; finding: the id of the diagnosis that the problem amounts to, or null
        console              {file, epochs, mean_reward, best_epoch, cut, earlier_runs}, or null
        weights              [{folder, epoch, problem}], first the one that policy/ is made of
        pool                 {origin, hash, named, test_hash}
        results              {name: {folder, baseline, settings, files, mean_reward}}; chosen: the name of the run's test

    Raises FileNotFoundError or ValueError, naming the file, for a `folder` with nothing in it or with several runs, and for a
    pool or PLM that was asked for and is not there or is broken.
    """
    found = discover(Path(folder), run)
    work = _Import(found, find_registry(data), [{"finding": None, "text": text} for text in found.problems])
    _read_results(work)
    try:
        work.losses = None if found.losses is None else logs.train_losses(found.losses)
    except ValueError as error:
        work.problem(error)
    _find_pools(work, None if pool is None else load_pool(Path(pool)))
    _find_plm(work, plm)
    config = {"format": FORMAT, "settings": found.settings, "chosen": work.chosen}
    config["results"] = {result.name: result.settings for result in found.results}
    inputs = _inputs(work)
    imported = runs.Run(runs.run_folder("import", found.name, config, inputs, root))
    if not imported.done:
        with runs.lock(imported.folder):
            if not imported.done:  # another process may have finished it before the lock was ours
                imported = runs.open_run("import", found.name, config, inputs, root)
                _write(work, imported.folder)
                imported.finish()
    return imported


# --- what is read -------------------------------------------------------------------------------------------------------


def _trace_set(result: ResultSet, registry: Registry) -> TraceSet | str | None:
    """The trace set that was tested, if it is here, else its name, else None. If the folder's name does not tell it, the files'
    names do: they begin with it."""
    known, name = registry.trace_folders(), result.settings.get("test_traces")
    if name is None:
        files = [path.name.removeprefix(logs.RESULT_PREFIX) for path in logs.result_files(result.folder)]
        fitting = [name for name in known if all(file.startswith(f"{name}_") for file in files)]
        name = max(fitting, key=len, default=None)
    return registry.trace_set(name) if name in known else name


def _read_results(work: _Import) -> None:
    """The tables of all result sets, and which of them is the run's test: if possible one by a process of its own, which can be
    reproduced."""
    console, ours = work.found.console, []
    for result in work.found.results:
        traces = _trace_set(result, work.registry)
        try:
            table = logs.read_results(result.folder, traces)
        except ValueError as error:
            work.problem(error, "protocol-mismatch")
            continue
        work.tables[result.name] = table
        if isinstance(traces, TraceSet) and (unknown := sorted(set(table["trace"]) - set(traces.names))):
            said = f"{len(unknown)} traces are not in {traces.name} here, {unknown[0]} first"
            work.found.notes.append(f"{result.name}: {said}")
        if result.baseline is not None:
            continue
        printed, mean = None if console is None else console.mean_reward, qoe.summarise(table).reward
        in_console = printed is not None and abs(mean - printed) < 1e-9
        ours.append((in_console, result.name))
        if console is not None and printed is not None:
            said = f"mean {mean:.6f}, not the {printed:.6f} of the console log, so another test than that one"
            if in_console:
                leaked = ", in the process that trained: its first decisions saw a leaked context"
                said = "the test in the console log" + (leaked if console.epochs else "")
            work.found.notes.append(f"{result.name}: {said}")
    work.chosen = next((name for _, name in sorted(ours, key=lambda one: one[0])), None)


def _find_pools(work: _Import, given: ExperiencePool | None) -> None:
    """The training's pool and the test's."""
    pools = work.found.pools
    exact = [path for path in pools if "pool" in names.settings_of(path)]
    if exact or (given is None and len(pools) == 1):
        try:
            work.pool, work.origin = load_pool((exact or pools)[0]), "found"
        except (ValueError, OSError) as error:
            work.problem(error)
    elif given is None and pools:
        work.reasons["pool"] = f"{len(pools)} pools here, name one with --pool"
    if work.pool is None:
        try:
            work.pool, work.origin = remake_pool(work.found.settings, work.registry), "made anew"
        except (ValueError, OSError, RuntimeError) as error:
            work.reasons.setdefault("pool", str(error))
    if work.pool is None and given is not None:
        work.pool, work.origin = given, "given"
    elif work.pool is not None and given is not None and given.content_hash() != work.pool.content_hash():
        work.test_pool = given


def _find_plm(work: _Import, asked: str | Path | None) -> None:
    """The PLM's folder. One that was asked for has to be there and complete."""
    plms, settings = work.found.plms, work.found.settings
    if len(plms) > 1 and asked is None:
        work.reasons["plm"] = f"{len(plms)} PLMs here, name one with --plm"
    elif asked or plms or "plm_type" in settings:
        name = str(asked or next(iter(plms), "") or f"{settings['plm_type']}/{settings['plm_size']}")
        try:
            place = find_plm(name)
            if not isinstance(place, Path):
                raise FileNotFoundError(f"no PLM {name!r} on this machine: give its folder")
            if problems := problems_in(place):
                raise ValueError("; ".join(problems))
            work.plm = place
        except (ValueError, OSError) as error:
            if asked is not None:
                raise
            work.reasons["plm"] = str(error)


def _inputs(work: _Import) -> dict[str, str]:
    """What the run is made from, by content."""
    found = work.found
    files = [file for result in found.results for file in logs.result_files(result.folder)]
    files += [path for path in (found.console_file, found.losses) if path is not None]
    files += [saved.folder / name for saved in found.weights for name in WEIGHT_FILES]
    hashes = [[path.name, runs.file_hash(path)] for path in files if path.is_file()]
    inputs = {"files": runs.content_hash(hashes, 16)}
    for result in found.results:
        if isinstance(traces := _trace_set(result, work.registry), TraceSet):
            inputs[f"traces {traces.name}"] = traces.content_hash
    for name, pool in (("pool", work.pool), ("pool of the test", work.test_pool)):
        if pool is not None:
            inputs[name] = pool.content_hash()
    if work.plm is not None:  # its weights may have tens of gigabytes: their names and sizes
        sizes = {path.name: path.stat().st_size for path in sorted(work.plm.iterdir()) if path.is_file()}
        inputs["plm"] = runs.content_hash([runs.file_hash(work.plm / "config.json"), sizes], 16)
    return inputs


# --- what is written ----------------------------------------------------------------------------------------------------


def _write(work: _Import, folder: Path) -> None:
    found, console = work.found, work.found.console
    _write_tests(work, folder)
    for name, pool in (("pool", work.pool), ("test_pool", work.test_pool)):
        if pool is not None:
            pool.save(folder / name)
    _write_policy(work, folder / "policy")
    if (training := training_run(found, work.losses, work.pool)) is not None:
        training.save(folder)
    about: dict[str, Any] = {
        **{name: getattr(found, name) for name in ("folder", "run", "name", "settings", "notes")},
        "missing": list(_missing(work)),
        "problems": work.problems,
        "console": console
        and {
            **{name: getattr(console, name) for name in ("mean_reward", "best_epoch", "cut", "earlier_runs")},
            "file": found.console_file,
            "epochs": len(console.epochs),
        },
        "weights": sorted(found.weights, key=lambda saved: saved is not found.best),
        "pool": {
            "origin": work.origin,
            "hash": work.pool and work.pool.content_hash(),
            "named": found.settings.get("pool"),
            "test_hash": work.test_pool and work.test_pool.content_hash(),
        },
        "plm": work.plm,
        "results": {
            result.name: {
                **runs.plain(result),
                "files": work.tables[result.name]["trace"].nunique(),
                "mean_reward": qoe.summarise(work.tables[result.name]).reward,
            }
            for result in found.results
            if result.name in work.tables
        },
        "chosen": work.chosen,
    }
    runs.write_json(folder / IMPORT, about)


def _write_tests(work: _Import, folder: Path) -> None:
    """Every result set on its own, with the baselines', and the chosen one also as the run's test."""
    from netllm_lib.abr.policies.llm import EvalConfig  # PyTorch

    readable = [result for result in work.found.results if result.name in work.tables]
    baselines: dict[str, pd.DataFrame] = {}
    for result in readable:
        if result.baseline is not None:
            name = f"{result.baseline} (original)"
            baselines[name if name not in baselines else f"{name} {result.name}"] = work.tables[result.name]
    for result in readable:
        if result.baseline is None:
            asked = {key: result.settings[key] for key in ("w", "target_return_scale") if key in result.settings}
            setting = runs.plain(EvalConfig.upstream(**asked)) | _setting(result, work)
            test = Test({SUBJECT: work.tables[result.name]} | baselines, SUBJECT, setting)
            test.save(folder / "results" / result.name)
            if result.name == work.chosen:
                test.save(folder)


def _setting(result: ResultSet, work: _Import) -> dict[str, Any]:
    """How the original tested, in the words of `Test.setting`, as far as folder names tell."""
    keys = {f"test_{key}": key for key in ("traces", "video", "trace_num", "fixed", "seed")}
    keys |= {key: key for key in ("train_traces", "train_video")}
    known = work.found.settings | result.settings
    setting = {ours: known[theirs] for theirs, ours in keys.items() if theirs in known} | {"original": True}
    traces = _trace_set(result, work.registry)
    if isinstance(traces, TraceSet):
        setting |= {"traces": traces.name, "traces_hash": traces.content_hash}
        train, played = setting.get("train_traces"), list(dict.fromkeys(work.tables[result.name]["trace"]))
        if train in work.registry.trace_folders() and set(played) <= set(traces.names):
            shared = dict(zip(traces.names, overlapping(traces, work.registry.trace_set(train)), strict=True))
            setting["clean"] = [not shared[name] for name in played]
    if setting.get("video") in work.registry.video_folders():
        setting["video_hash"] = work.registry.video(setting["video"]).content_hash
    return setting


def _write_policy(work: _Import, folder: Path) -> None:
    """Convert the best weights, or say what is wrong with them."""
    from netllm_lib.abr.upstream.checkpoints import adapter_problem, load_upstream_checkpoint, problem_of
    from netllm_lib.checkpoint import save_checkpoint
    from netllm_lib.plm import PLMConfig
    from netllm_lib.returns import pool_returns

    found, best, settings = work.found, work.found.best, work.found.settings
    if best is None:
        for saved in found.weights[:1]:
            work.problem(f"{saved.folder}: {saved.problem}", "wrong-checkpoint")
        return
    if work.pool is None or work.plm is None:
        if problem := adapter_problem(best.folder):
            work.problem(*problem)
        return
    layer, defaults = settings.get("early_stop", -1), {"w": 20, "gamma": 1.0}
    w, gamma = (settings.get(key, default) for key, default in defaults.items())
    config = PLMConfig.upstream(str(work.plm.resolve()), layers=None if layer < 0 else layer + 1)
    try:
        _, scale = pool_returns(work.pool, gamma, float(settings.get("scale", 1000)))
        network, meta = load_upstream_checkpoint(best.folder, config, scale, w)
    except (ValueError, OSError) as error:
        work.problem(error, problem_of(error))
        return
    save_checkpoint(folder, network, meta)
    if assumed := [f"{key} {value}" for key, value in defaults.items() if key not in settings]:
        found.notes.append(f"policy/: {' and '.join(assumed)}, the original's default, because nothing tells it")
    if best.epoch is not None:
        found.notes.append(f"policy/: the checkpoint of epoch {best.epoch}, because the best model is not there")


def _missing(work: _Import) -> Iterator[str]:
    """What is not there, and what it would add."""
    found, settings, console = work.found, work.found.settings, work.found.console
    pool, plm = (f" {settings[key]}" if key in settings else "" for key in ("pool", "plm_type"))
    no_pool, no_plm = (f" ({work.reasons[key]})" if key in work.reasons else "" for key in ("pool", "plm"))
    wanted = {
        "result files (artifacts/results/…/result_sim_abr_*): reward by trace, its parts, levels, stalls": work.chosen,
        "console log (early_stop_*_console.log): losses by epoch, evaluations, which epoch's model is the best": console,
        "the terminal's first lines (Namespace(…)): accumulation steps, scale": console is None or console.arguments,
        f"{LOSSES} (written when training ends): the loss of every window, so how it moved within an epoch": work.losses,
        "fine-tuned weights (early_stop_*_best_model): whether they took effect, replay, ablation": found.best,
        "the original's folder names: hyperparameters": settings,
        f"training pool{pool}: its target return and reward range, its teacher's reward; policy/{no_pool}": work.pool,
        f"PLM{plm}: replay and ablation of the test; policy/{no_plm}": work.plm,
    }
    yield from (line for line, there in wanted.items() if not there)
