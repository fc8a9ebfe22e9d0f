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

import dataclasses
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

FORMAT = 2  # of the run folder; a new number makes new folders
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
    origin: tuple[str, Path | None] | None = None  # of that pool: given, found or made anew, and its path
    test_pool: ExperiencePool | None = None  # of the test, if it is another one
    named_hash: str | None = None  # of the pool that the run's folder names, made anew
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
    results: str | None = None,
) -> runs.Run:
    """Turn what `discover(folder, run)` finds into a run folder, below `root` or `reports/`. The same content leads to the same
    folder, which is then returned as it is.

    `pool` is the pool that the run was given (else the one in the folder, else it is made anew if folder names tell how and the
    data are at hand). If the run's folder names another pool that can be made anew, that one is the training's, and `pool` the
    test's. `plm` is the PLM (else the one in the folder or in `downloaded_plms`), `data` as in `find_registry`, and `results` the
    result set that is the run's test (else one that can be reproduced).

    A file in the folder that is broken, or does not fit the others, is left out and named in import.json, which holds

        folder, run, name, plm
        settings, sources    of each setting, where it was read; contradictions, notes and missing are lists of text
        problems             [{finding, text}]; finding: the id of the diagnosis that the problem amounts to, or null
        console              {file, epochs, last_loss, mean_reward, best_epoch, evaluations, cut, earlier_runs}, or null
        weights              [{folder, kind, epoch, problem}], first the one that policy/ is made of
        pool                 {origin, path, hash, named, named_hash, test_hash}
        results              {name: {folder, baseline, settings, files, mean_reward}}; chosen: the name of the run's test

    Raises FileNotFoundError or ValueError, naming the file, for a `folder` with nothing in it or with several runs, and for a
    pool, PLM or result set that was asked for and is not there or is broken.
    """
    found = discover(Path(folder), run)
    work = _Import(found, find_registry(data), [{"finding": None, "text": text} for text in found.problems])
    _read_results(work, results)
    try:
        work.losses = None if found.losses is None else logs.train_losses(found.losses)
    except ValueError as error:
        work.problem(error)
    _find_pools(work, pool)
    _find_plm(work, plm)
    config = {"format": FORMAT, "settings": found.settings, "chosen": work.chosen}
    config["results"] = {result.name: result.settings for result in found.results}
    imported = runs.open_run("import", found.name, config, _inputs(work), root=root)
    if not imported.done:
        with runs.lock(imported.folder):
            if not imported.done:  # another process may have finished it before the lock was ours
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


def _read_results(work: _Import, asked: str | None) -> None:
    """The tables of all result sets, and which of them is the run's test."""
    for result in work.found.results:
        traces = _trace_set(result, work.registry)
        try:
            table = work.tables[result.name] = logs.read_results(result.folder, traces)
        except ValueError as error:
            work.problem(error, "protocol-mismatch")
            continue
        if isinstance(traces, TraceSet) and (unknown := sorted(set(table["trace"]) - set(traces.names))):
            said = f"{len(unknown)} traces are not in {traces.name} here, {unknown[0]} first"
            work.found.notes.append(f"{result.name}: {said}")
    own = [result.name for result in work.found.results if result.baseline is None and result.name in work.tables]
    if asked is not None and asked not in own:
        raise ValueError(f"{work.found.folder}: no result set {asked!r} in it; there are {', '.join(own) or 'none'}")
    console, alone = work.found.console or logs.Console(), []  # alone: by a process of its own, which can be reproduced
    for name in own if console.mean_reward is not None else ():
        printed = console.mean_reward or 0.0
        mean = qoe.summarise(work.tables[name]).reward
        if abs(mean - printed) < 1e-9:
            said = "the test in the console log"
            said += ", in the process that trained: its first decisions saw a leaked context" if console.epochs else ""
        else:
            alone.append(name)
            said = f"mean {mean:.6f}, not the {printed:.6f} of the console log, so another test than that one"
        work.found.notes.append(f"{name}: {said}")
    work.chosen = asked or next(iter(alone + own), None)


def _find_pools(work: _Import, given: str | Path | None) -> None:
    """The training pool and the test's: `given`, or the one in the folder, is both unless the run's folder names another one."""
    found, named, there = work.found, None, next(iter(work.found.pools), None)
    exact = there is not None and "pool" in names.settings_of(there)
    if given is not None:
        work.pool, work.origin = load_pool(Path(given)), ("given", Path(given))
    elif there is not None and (exact or len(found.pools) == 1):
        try:
            work.pool, work.origin = load_pool(there), ("found", there)
        except (ValueError, OSError) as error:
            work.problem(error)
    elif found.pools:
        work.reasons["pool"] = f"{len(found.pools)} pools here, name one with --pool"
    origin: tuple[str, Path | None] = ("made anew", None)
    try:
        named = remake_pool(found.settings, work.registry)
        work.named_hash = named.content_hash()
    except (ValueError, OSError, RuntimeError) as error:
        work.reasons.setdefault("pool", str(error))
        if given is not None and there is not None and exact:  # it cannot be made anew, but lies where the folder says
            named, origin = load_pool(there), ("found", there)
    if named is None or (work.pool is not None and work.pool.content_hash() == named.content_hash()):
        return
    if work.pool is None or given is not None or exact:
        work.test_pool, work.pool, work.origin = work.pool, named, origin


def _find_plm(work: _Import, asked: str | Path | None) -> None:
    """The PLM's folder. One that was asked for has to be there and complete."""
    plms, settings = work.found.plms, work.found.settings
    if len(plms) > 1 and asked is None:
        work.reasons["plm"] = f"{len(plms)} PLMs here, name one with --plm"
        return
    if not (asked or plms or "plm_type" in settings):
        return
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
    found = work.found
    _write_tests(work, folder)
    for name, pool in (("pool", work.pool), ("test_pool", work.test_pool)):
        if pool is not None:
            pool.save(folder / name)
    _write_policy(work, folder / "policy")
    training, notes = training_run(found, work.losses, work.pool)
    if training is not None:
        training.save(folder)
    console, best = found.console, found.best
    weights = [
        dataclasses.replace(saved, epoch=console.best_epoch) if console and saved.kind == "best_model" else saved
        for saved in sorted(found.weights, key=lambda saved: saved is not best)
    ]
    about: dict[str, Any] = {
        **{name: getattr(found, name) for name in ("folder", "run", "name", "settings", "sources", "contradictions")},
        "notes": [*found.notes, *notes],
        "missing": list(_missing(work)),
        "problems": work.problems,
        "console": None if console is None else _printed(console, found.console_file),
        "weights": weights,
        "pool": {
            **dict(zip(("origin", "path"), work.origin or (None, None), strict=True)),
            "hash": work.pool and work.pool.content_hash(),
            "named": found.settings.get("pool"),
            "named_hash": work.named_hash,
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


def _printed(console: logs.Console, file: Path | None) -> dict[str, Any]:
    last = console.epochs[-1:]
    return {
        "file": file,
        "epochs": len(console.epochs),
        "last_loss": [last[0].loss_mean, last[0].loss_std] if last else None,
        "evaluations": sum(epoch.episodes_return is not None for epoch in console.epochs),
        **{name: getattr(console, name) for name in ("mean_reward", "best_epoch", "cut", "earlier_runs")},
    }


def _write_tests(work: _Import, folder: Path) -> None:
    """Every result set on its own, and the chosen one with the baselines' as the run's test."""
    from netllm_lib.abr.policies.llm import EvalConfig  # PyTorch

    baselines: dict[str, pd.DataFrame] = {}
    readable = [result for result in work.found.results if result.name in work.tables]
    for result in readable:
        if result.baseline is not None:
            name = f"{result.baseline} (original)"
            baselines[name if name not in baselines else f"{name} {result.name}"] = work.tables[result.name]
    for result in readable:
        if result.baseline is None:
            asked = {key: result.settings[key] for key in ("w", "target_return_scale") if key in result.settings}
            setting = runs.plain(EvalConfig.upstream(**asked)) | _setting(result, work)
            test = Test({SUBJECT: work.tables[result.name]} | baselines, SUBJECT, setting)
            for place in (folder / "results" / result.name, *([folder] if result.name == work.chosen else [])):
                test.save(place)
    if work.chosen is None and baselines:
        Test(baselines, "", {"original": True}).save(folder)


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
    if best.kind == "checkpoint":
        found.notes.append(f"policy/: the checkpoint of epoch {best.epoch}, because the best model is not there")


def _missing(work: _Import) -> Iterator[str]:
    """What is not there, and what it would add."""
    found, settings, console = work.found, work.found.settings, work.found.console
    wanted = {
        "result files (artifacts/results/…/result_sim_abr_*): reward by trace, its parts, levels, stalls": work.chosen,
        "console log (early_stop_*_console.log): losses by epoch, evaluations, which epoch's model is the best": console,
        "the terminal's first lines (Namespace(…)): accumulation steps, scale": console is None or console.arguments,
        f"{LOSSES} (written when training ends): the loss of every window, so how it moved within an epoch": work.losses,
        "fine-tuned weights (early_stop_*_best_model): whether they took effect, replay, ablation": found.best,
        "the original's folder names: hyperparameters": settings,
    }
    yield from (line for line, there in wanted.items() if not there)
    said = {name: f" ({reason})" for name, reason in work.reasons.items()}
    if work.pool is None:
        pool = "training pool" + (f" {settings['pool']}" if "pool" in settings else "")
        yield f"{pool}: its target return and reward range, its teacher's reward; policy/{said.get('pool', '')}"
    if work.plm is None:
        plm = "PLM" + (f" {settings['plm_type']}" if "plm_type" in settings else "")
        yield f"{plm}: replay and ablation of the test; policy/{said.get('plm', '')}"
