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

import math
from collections.abc import Iterable, Iterator
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
from netllm_lib.plm_files import describe_folder, find_plm

FORMAT = 2  # of the run folder; a new number makes new folders
KIND, IMPORT = "import", "import.json"
SUBJECT = "llm"


@dataclass
class _Import:
    """What was read of a run, before it is written."""

    found: Found
    registry: Registry
    chosen: str | None = None  # the result set that is the run's test
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)  # by result set
    losses: logs.Losses | None = None
    pool: ExperiencePool | None = None  # of the training
    pool_origin: str | None = None  # given, found, made anew
    pool_path: Path | None = None
    test_pool: ExperiencePool | None = None  # of the test, if it is another one
    named_hash: str | None = None  # of the pool that the run's folder names, made anew
    plm: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)  # why there is no pool or PLM
    problems: list[dict[str, str | None]] = field(default_factory=list)

    def problem(self, error: Exception | str, finding: str | None = None) -> None:
        self.problems.append({"finding": finding, "text": str(error)})


def import_run(
    folder: str | Path,
    *,
    pool: str | Path | ExperiencePool | None = None,
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
    work = _Import(found, find_registry(data))
    for text in found.problems:
        work.problem(text)
    _read_results(work, results)
    if found.losses is not None:
        try:
            work.losses = logs.train_losses(found.losses)
        except ValueError as error:
            work.problem(error)
    _find_pools(work, pool)
    _find_plm(work, plm)
    config = {"format": FORMAT, "settings": found.settings, "chosen": work.chosen}
    imported = runs.open_run(KIND, found.name, config, _inputs(work), root=root)
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
    name = result.settings.get("test_traces")
    if name is None:
        files = [path.name for path in logs.result_files(result.folder)]
        fitting = [
            known
            for known in registry.trace_folders()
            if all(file.startswith(f"{logs.RESULT_PREFIX}{known}_") for file in files)
        ]
        name = max(fitting, key=len, default=None)
    return registry.trace_set(name) if name in registry.trace_folders() else name


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
    printed = None if work.found.console is None else work.found.console.mean_reward
    alone = []  # made by a process of their own, which can be reproduced
    for name in own:
        mean = qoe.summarise(work.tables[name]).reward
        if printed is None:
            continue
        if math.isclose(mean, printed, rel_tol=0, abs_tol=1e-9):
            leaked = ", in the process that trained: its first decisions saw a leaked context"
            ending = leaked if work.found.console and work.found.console.epochs else ""
            work.found.notes.append(f"{name}: the test in the console log{ending}")
        else:
            alone.append(name)
            said = f"not the {printed:.6f} of the console log, so another test than that one"
            work.found.notes.append(f"{name}: mean {mean:.6f}, {said}")
    work.chosen = asked or next(iter(alone + own), None)


def _find_pools(work: _Import, given: str | Path | ExperiencePool | None) -> None:
    """The training pool and the test's."""
    found, named = work.found, None
    own: ExperiencePool | None = None
    if isinstance(given, ExperiencePool):
        own, work.pool_origin = given, "given"
    elif given is not None:
        own, work.pool_origin, work.pool_path = load_pool(Path(given)), "given", Path(given)
    elif len(found.pools) == 1 or (found.pools and names.settings_of(found.pools[0]).get("pool")):
        try:
            own, work.pool_origin, work.pool_path = load_pool(found.pools[0]), "found", found.pools[0]
        except (ValueError, OSError) as error:
            work.problem(error)
    elif found.pools:
        work.reasons["pool"] = f"{len(found.pools)} pools here, name one with --pool"
    origin, path = "made anew", None
    try:
        named = remake_pool(found.settings, work.registry)
        work.named_hash = named.content_hash()
    except (ValueError, OSError, RuntimeError) as error:
        work.reasons.setdefault("pool", str(error))
        # it cannot be made anew, but may lie where the run's folder says
        if given is not None and (here := [p for p in found.pools if names.settings_of(p).get("pool")]):
            named, origin, path = load_pool(here[0]), "found", here[0]
    work.pool = own
    differs = own is not None and named is not None and own.content_hash() != named.content_hash()
    if own is None or (differs and (given is not None or names.settings_of(work.pool_path or "").get("pool"))):
        work.pool, work.test_pool = named, own
        work.pool_origin, work.pool_path = (origin, path) if named is not None else (None, None)


def _find_plm(work: _Import, asked: str | Path | None) -> None:
    """The PLM's folder. One that was asked for has to be there and complete."""
    if asked is not None:
        place = find_plm(str(asked))
        if not isinstance(place, Path):
            raise FileNotFoundError(f"no PLM {str(asked)!r} on this machine: give its folder")
        if problems := describe_folder(place).problems:
            raise ValueError("; ".join(problems))
        work.plm = place
        return
    candidates, settings = list(work.found.plms), work.found.settings
    if not candidates and "plm_type" in settings:
        try:
            place = find_plm(f"{settings['plm_type']}/{settings['plm_size']}")
            candidates = [place] if isinstance(place, Path) else []
        except FileNotFoundError as error:
            work.reasons["plm"] = str(error)
    if len(candidates) > 1:
        work.reasons["plm"] = f"{len(candidates)} PLMs here, name one with --plm"
    elif candidates:
        problems = describe_folder(candidates[0]).problems
        work.plm = None if problems else candidates[0]
        work.reasons["plm"] = "; ".join(problems)


def _inputs(work: _Import) -> dict[str, str]:
    """What the run is made from, by content."""
    found, inputs = work.found, {}
    for result in found.results:
        inputs[f"results {result.name}"] = _hash_of(logs.result_files(result.folder))
        if isinstance(traces := _trace_set(result, work.registry), TraceSet):
            inputs[f"traces {traces.name}"] = traces.content_hash
    for name, path in (("console log", found.console_file), ("training losses", found.losses)):
        if path is not None:
            inputs[name] = runs.file_hash(path)
    files = [saved.folder / name for saved in found.weights for name in WEIGHT_FILES]
    if there := [file for file in files if file.is_file()]:
        inputs["weights"] = _hash_of(there)
    for name, pool in (("pool", work.pool), ("pool of the test", work.test_pool)):
        if pool is not None:
            inputs[name] = pool.content_hash()
    if work.plm is not None:  # its weights may have tens of gigabytes: their names and sizes
        sizes = {path.name: path.stat().st_size for path in sorted(work.plm.iterdir()) if path.is_file()}
        inputs["plm"] = runs.content_hash([runs.file_hash(work.plm / "config.json"), sizes], 16)
    return inputs


def _hash_of(files: Iterable[Path]) -> str:
    return runs.content_hash([[path.name, runs.file_hash(path)] for path in files], 16)


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
    console = found.console
    about: dict[str, Any] = {
        "folder": found.folder,
        "run": found.run,
        "name": found.name,
        "settings": found.settings,
        "sources": found.sources,
        "contradictions": found.contradictions,
        "notes": [*found.notes, *notes],
        "missing": list(_missing(work)),
        "problems": work.problems,
        "console": console
        and {
            "file": found.console_file,
            "epochs": len(console.epochs),
            "last_loss": [console.epochs[-1].loss_mean, console.epochs[-1].loss_std] if console.epochs else None,
            "mean_reward": console.mean_reward,
            "best_epoch": console.best_epoch,
            "evaluations": sum(epoch.episodes_return is not None for epoch in console.epochs),
            "cut": console.cut,
            "earlier_runs": console.earlier_runs,
        },
        "weights": [
            {"folder": saved.folder, "kind": saved.kind, "epoch": _epoch(saved, found), "problem": saved.problem}
            for saved in sorted(found.weights, key=lambda saved: saved is not found.best)
        ],
        "pool": {
            "origin": work.pool_origin,
            "path": work.pool_path,
            "hash": work.pool and work.pool.content_hash(),
            "named": found.settings.get("pool"),
            "named_hash": work.named_hash,
            "test_hash": work.test_pool and work.test_pool.content_hash(),
        },
        "plm": work.plm,
        "results": {
            result.name: {
                "folder": result.folder,
                "baseline": result.baseline,
                "settings": result.settings,
                "files": len(logs.result_files(result.folder)),
                "mean_reward": qoe.summarise(work.tables[result.name]).reward,
            }
            for result in found.results
            if result.name in work.tables
        },
        "chosen": work.chosen,
    }
    runs.write_json(folder / IMPORT, about)


def _epoch(saved: Any, found: Found) -> int | None:
    """Of the best model, the console log tells it."""
    return found.console.best_epoch if saved.kind == "best_model" and found.console is not None else saved.epoch


def _write_tests(work: _Import, folder: Path) -> None:
    """The chosen result set with the baselines' as the run's test, and every one on its own."""
    from netllm_lib.abr.policies.llm import EvalConfig  # PyTorch

    baselines: dict[str, pd.DataFrame] = {}
    for result in work.found.results:
        if result.baseline is not None and result.name in work.tables:
            name = f"{result.baseline} (original)"
            baselines[name if name not in baselines else f"{name} {result.name}"] = work.tables[result.name]
    tests: dict[str, Test] = {}
    for result in work.found.results:
        if result.baseline is None and result.name in work.tables:
            asked = {key: result.settings[key] for key in ("w", "target_return_scale") if key in result.settings}
            setting = runs.plain(EvalConfig.upstream(**asked)) | _setting(result, work)
            tests[result.name] = Test({SUBJECT: work.tables[result.name]} | baselines, SUBJECT, setting)
    for name, test in tests.items():
        test.save(folder / "results" / name)
    if work.chosen is not None:
        tests[work.chosen].save(folder)
    elif baselines:
        Test(baselines, "", {"original": True}).save(folder)


def _setting(result: ResultSet, work: _Import) -> dict[str, Any]:
    """How the original tested, in the words of `Test.setting`, as far as folder names tell."""
    keys = {
        **{f"test_{key}": key for key in ("traces", "video", "trace_num", "fixed", "seed")},
        **{key: key for key in ("train_traces", "train_video")},
    }
    told = work.found.settings | result.settings
    setting = {ours: told[theirs] for theirs, ours in keys.items() if theirs in told} | {"original": True}
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
    from netllm_lib.abr.batches import pool_returns
    from netllm_lib.abr.upstream.checkpoints import adapter_problem, load_upstream_checkpoint, problem_of
    from netllm_lib.checkpoint import save_checkpoint
    from netllm_lib.plm import PLMConfig

    found, best, settings = work.found, work.found.best, work.found.settings
    if best is None:
        for saved in found.weights[:1]:
            work.problem(f"{saved.folder}: {saved.problem}", "wrong-checkpoint")
        return
    if work.pool is None or work.plm is None:
        if problem := adapter_problem(best.folder):
            work.problem(*problem)
        return
    layer, w, gamma = settings.get("early_stop", -1), settings.get("w", 20), settings.get("gamma", 1.0)
    config = PLMConfig.upstream(str(work.plm.resolve()), layers=None if layer < 0 else layer + 1)
    try:
        _, scale = pool_returns(work.pool, gamma, float(settings.get("scale", 1000)))
        network, meta = load_upstream_checkpoint(best.folder, config, scale, w)
    except (ValueError, OSError) as error:
        work.problem(error, problem_of(error))
        return
    save_checkpoint(folder, network, meta)
    if assumed := [f"{key} {value}" for key, value in (("w", w), ("gamma", gamma)) if key not in settings]:
        said = "the original's default, because nothing tells it"
        found.notes.append(f"policy/: {' and '.join(assumed)}, {said}")
    if best.kind == "checkpoint":
        found.notes.append(f"policy/: the checkpoint of epoch {best.epoch}, because the best model is not there")


def _missing(work: _Import) -> Iterator[str]:
    """What is not there, and what it would add."""
    found, settings = work.found, work.found.settings
    if work.chosen is None:
        yield "result files (artifacts/results/…/result_sim_abr_*): reward by trace, its parts, levels, stalls"
    if found.console is None:
        yield "console log (early_stop_*_console.log): losses by epoch, evaluations, which epoch's model is the best"
    elif not found.console.arguments:
        yield "the terminal's first lines (Namespace(…)): accumulation steps, scale"
    if work.losses is None:
        yield f"{LOSSES} (written when training ends): the loss of every window, so how it moved within an epoch"
    if found.best is None:
        yield "fine-tuned weights (early_stop_*_best_model): whether they took effect, replay, ablation"
    for what, there, name, adds in (
        ("pool", work.pool, settings.get("pool"), "its target return and reward range, its teacher's reward; policy/"),
        ("plm", work.plm, settings.get("plm_type"), "replay and ablation of the test; policy/"),
    ):
        if there is None:
            kind = "training pool" if what == "pool" else "PLM"
            reason = work.reasons.get(what)
            yield f"{kind}{f' {name}' if name else ''}: {adds}" + (f" ({reason})" if reason else "")
    if not settings:
        yield "the original's folder names: hyperparameters"
