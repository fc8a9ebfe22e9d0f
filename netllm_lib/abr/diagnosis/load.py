"""Evidence from folders: runs of the notebooks, checkpoints, imports, and whatever the original left behind.

`load` takes any mix of them. The first folder that holds a test is the run, further tests are the same recipe with other seeds,
and the others add what they have.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from netllm_lib import runs
from netllm_lib.abr import qoe
from netllm_lib.abr.batches import WindowConfig, make_windows, pool_returns
from netllm_lib.abr.diagnosis.evidence import Evidence, Subject, Training
from netllm_lib.abr.pool import ExperiencePool, PoolError, load_pool
from netllm_lib.abr.traces import Registry, TraceSet, find_registry, overlapping
from netllm_lib.abr.upstream import logs

if TYPE_CHECKING:
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.abr.upstream.imports import Found

SETTING, METRICS, CHECKPOINT, MODULES, POOL = (
    "setting.json",
    "metrics.json",
    "config.json",
    "modules.safetensors",
    "pool",
)
DOCUMENTED_ACCUMULATION = 32
UPSTREAM_WARMUP = 2000


def load(
    *folders: str | Path,
    pool: str | Path | None = None,
    plm: str | Path | None = None,
    data: str | Path | None = None,
    results: str | None = None,
    run: str | None = None,
) -> Evidence:
    """What is known of the run in `folders`.

    Each may be a run folder of a notebook (03, 04, 05), a checkpoint, an import, or anything of the original's that
    `importing.discover` knows. `pool` is the pool that the test was given (else the training pool), `plm` the PLM's folder, `data`
    as in `find_registry`; `run` and `results` choose among several runs of the original and several result sets. What a notebook's
    run folder was made from is found through its parameters. Raises FileNotFoundError or ValueError naming the folder or file.
    """
    if not folders:
        raise ValueError("which run? give its folder")
    registry = find_registry(data)
    places = [_existing(folder) for folder in folders]
    kinds = {place: _kind(place) for place in places}
    foreign = [place for place, kind in kinds.items() if kind == "original"]
    if len(foreign) > 1:
        raise ValueError(f"{foreign[1]}: one run of the original at a time, {foreign[0]} is one too")
    if foreign:
        evidence = _original(foreign[0], registry, pool, plm, results, run)
    else:
        evidence = Evidence(registry=registry)
    ours = [place for place, kind in kinds.items() if kind != "original"]
    tests = [place for place in ours if kinds[place] == "test"]
    for place in _beside([place for place in ours if place not in tests[1:]]):
        evidence = _LOADERS[_kind(place)](evidence, place, plm)
    for place in tests[1:]:  # the same recipe again, with another seed
        again = _test(Evidence(registry=registry), place, None)
        evidence = replace(evidence, seeds=(*evidence.seeds, again.tables[again.run]))
    if pool is not None and not foreign:
        evidence = _with_pool(evidence, load_pool(Path(pool)))
    evidence = _trained_as(evidence)
    return replace(evidence, missing=(*evidence.missing, *_missing(evidence)))


def _existing(folder: str | Path) -> Path:
    place = Path(folder).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such folder")
    return place


def _kind(place: Path) -> str:
    """test, training, pool or checkpoint: of the companion; original: anything else."""
    if (place / SETTING).is_file():
        return "test"
    if (place / MODULES).is_file() and (place / CHECKPOINT).is_file():
        return "checkpoint"
    if (
        (place / "policy" / CHECKPOINT).is_file()
        and (place / METRICS).is_file()
        and not (place / "settings.json").is_file()
    ):
        return "training"
    if any((place / name).exists() for name in (POOL, "pool.npz", "states.npy")):
        return "pool"
    return "import" if (place / "settings.json").is_file() and (place / "missing.json").is_file() else "original"


def _beside(places: Sequence[Path]) -> list[Path]:
    """The folders, and those that notebooks took as parameters: a test's policy, a training's pool."""
    found = list(places)
    for place in found:
        config = place / CHECKPOINT
        parameters = runs.read_json(config).get("parameters", {}) if config.is_file() else {}
        if (place / SETTING).is_file():
            parameters = parameters | {
                "policy": runs.read_json(place / SETTING).get("policy") or parameters.get("policy")
            }
        for key in ("policy", "pool_dir", "train_dir"):
            value = parameters.get(key)
            for root in (Path(), runs.PROJECT):
                other = root / str(value)
                if (
                    value
                    and other.is_dir()
                    and _kind(other) != "original"
                    and other.resolve() not in [p.resolve() for p in found]
                ):
                    found.append(other)
                    break
    return found


# --- the companion's folders ---------------------------------------------------------------------------------------------


def _test(evidence: Evidence, place: Path, plm: str | Path | None) -> Evidence:
    setting = runs.read_json(place / SETTING)
    tables = {}
    for name in setting.get("order") or [path.stem for path in sorted((place / "tables").glob("*.parquet"))]:
        path = place / "tables" / f"{name}.parquet"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; the run of notebook 05 is incomplete")
        tables[name] = pd.read_parquet(path)
    if not tables:
        raise FileNotFoundError(f"{place}: no table of chunks in tables/")
    run = "llm" if "llm" in tables else next(iter(tables))
    known = evidence.registry
    assert known is not None
    traces = known.trace_set(setting["traces"]) if setting.get("traces") in known.trace_folders() else None
    video = known.video(setting["video"]) if setting.get("video") in known.video_folders() else None
    return replace(
        evidence,
        tables=tables,
        run=run,
        handicapped=tuple(name for name in tables if name.endswith("(original)")),
        setting={
            "fixed": True,
            **{k: v for k, v in setting.items() if k not in ("clean", "order")},
            **evidence.setting,
        },
        clean=_clean(setting, known, traces, tables[run]),
        traces=traces,
        video=video,
    )


def _clean(
    setting: Mapping[str, Any], registry: Registry, traces: TraceSet | None, table: pd.DataFrame
) -> np.ndarray | None:
    """[traces] which share no content with the training traces: as the test recorded it, else looked up; None if unknown."""
    if setting.get("clean") is not None:
        return np.array(setting["clean"], dtype=bool)
    if traces is None or list(dict.fromkeys(table["trace"])) != traces.names:
        return None
    try:
        return ~overlapping(
            traces, registry.trace_set(str(setting.get("train_traces") or registry.default_traces("train")))
        )
    except (ValueError, OSError):
        return None


def _training(evidence: Evidence, place: Path, plm: str | Path | None) -> Evidence:
    metrics = runs.read_json(place / METRICS)
    histories = sorted(place.glob("training/*/history.parquet"), key=lambda path: path.stat().st_mtime)
    history = pd.read_parquet(histories[-1]) if histories else None
    training = Training(
        losses=None if history is None else history["loss"].to_numpy(),
        clipped=None if history is None else float(history["clipped"].mean()),
        steps=metrics.get("steps"),
        windows=metrics.get("windows"),
        crossing=metrics.get("crossing"),
        lr=metrics.get("lr"),
        lr_peak=metrics.get("lr_peak"),
        warmup_steps=metrics.get("warmup_steps"),
        final_loss=metrics.get("final_loss"),
        held_out_loss=metrics.get("held_out_loss"),
        pool_hash=metrics.get("pool_hash"),
    )
    return _checkpoint(replace(evidence, training=training), place / "policy", plm)


def _checkpoint(evidence: Evidence, place: Path, plm: str | Path | None) -> Evidence:
    from netllm_lib.abr.model import load_policy
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.checkpoint import read_meta

    try:
        network, meta = load_policy(place, None if plm is None else str(plm))
    except (ValueError, OSError) as error:
        evidence = replace(evidence, problems=(*evidence.problems, _problem(error)))
        try:
            return _as_trained(evidence, read_meta(place).train)
        except (ValueError, OSError):
            return evidence
    setting = evidence.setting
    names = {field.name for field in dataclasses.fields(EvalConfig)}
    given = {key: value for key, value in setting.items() if key in names and value is not None}
    # how the original tested is told by `_tested_as_original`
    config = None if setting.get("original") else EvalConfig(**given)
    evidence = replace(
        evidence, subject=Subject(network, meta, config), setting={**setting, "train_w": meta.settings.w}
    )
    return _as_trained(evidence, meta.train)


def _as_trained(evidence: Evidence, config: Mapping[str, Any] | None) -> Evidence:
    """What a checkpoint's TrainConfig tells."""
    if not config:
        return evidence
    known = evidence.training or Training()
    accumulation = int(config.get("accumulation", 1))
    return replace(
        evidence,
        training=replace(
            known,
            clip=known.clip or config.get("clip"),
            lr=known.lr if known.lr is not None else config.get("lr"),
            lr_around=config.get("lr_around"),
            warmup_steps=known.warmup_steps if known.warmup_steps is not None else config.get("warmup_steps"),
            accumulation=known.accumulation or accumulation,
            epochs=known.epochs or config.get("epochs"),
        ),
    )


def _pool(evidence: Evidence, place: Path, plm: str | Path | None) -> Evidence:
    evidence = _with_pool(evidence, load_pool(place))
    split = place / "split.json"
    if split.is_file():
        described = runs.read_json(split)
        setting = {"train_traces": described.get("traces"), "train_video": described.get("video"), **evidence.setting}
        evidence = replace(evidence, setting=setting)
    return evidence


def _with_pool(evidence: Evidence, pool: ExperiencePool) -> Evidence:
    """The pool as that of the training, or, where the training names another one, as the pool of the test."""
    trained = evidence.training.pool_hash if evidence.training else None
    if trained is None and evidence.subject is not None:
        trained = evidence.subject.meta.settings.pool_hash
    if trained and trained != pool.content_hash():
        return replace(evidence, test_pool=pool)
    return replace(evidence, pool=pool)


# --- the original's ------------------------------------------------------------------------------------------------------


def _import(evidence: Evidence, place: Path, plm: str | Path | None) -> Evidence:
    """An import says where it came from: those files are looked at again, or its own where they are gone."""
    described = runs.read_json(place / "settings.json")
    settings = described["settings"]
    tables = {name: pd.read_parquet(place / "tables" / f"{name}.parquet") for name in described["results"]}
    losses = (
        pd.read_parquet(place / "history.parquet")["loss"].to_numpy() if (place / "history.parquet").is_file() else None
    )
    evidence = _upstream_tables(evidence, tables, {n: r["settings"] for n, r in described["results"].items()}, None)
    console = runs.read_json(place / "console.json") if (place / "console.json").is_file() else None
    epochs = [epoch["loss_mean"] for epoch in console["epochs"]] if console else []
    evidence = replace(
        evidence, training=_upstream_training(settings, losses, bool(described.get("losses_truncated")), epochs)
    )
    if (place / "policy").is_dir():
        evidence = _checkpoint(evidence, place / "policy", plm)
        evidence = _tested_as_original(evidence)
    named = described["pool"].get("path")
    if named and Path(named).exists():
        evidence = replace(evidence, pool=load_pool(Path(named)))
    elif evidence.registry is not None:
        evidence = replace(evidence, pool=_remade(settings, evidence.registry))
    return replace(evidence, missing=(*evidence.missing, *runs.read_json(place / "missing.json")))


def _original(
    place: Path,
    registry: Registry,
    pool: str | Path | None,
    plm: str | Path | None,
    results: str | None,
    run: str | None,
) -> Evidence:
    from netllm_lib.abr.upstream import imports as importing

    found = importing.discover(place, run)
    evidence = Evidence(registry=registry)
    sets = {result.name: result for result in found.results}
    tables, problems = {}, []
    for name, result in sets.items():
        known = result.settings.get("test_traces")
        traces: TraceSet | str | None = registry.trace_set(known) if known in registry.trace_folders() else known
        try:
            tables[name if result.baseline is None else f"{result.baseline} (original)"] = logs.read_results(
                result.folder, traces
            )
        except ValueError as error:
            problems.append(("protocol-mismatch", str(error)))
    evidence = _upstream_tables(
        evidence, tables, {name: r.settings for name, r in sets.items()}, results or _separate_test(found, tables)
    )
    losses = logs.train_losses(found.losses) if found.losses is not None else None
    epochs = [e.loss_mean for e in found.console.epochs if e.loss_mean is not None] if found.console else []
    mean = found.console.mean_reward if found.console else None
    settings = {**evidence.setting, "mean_reward": mean, **_pool_setting(found.settings)}
    evidence = replace(evidence, setting=settings, problems=tuple(problems))

    training_pool, given = _pools(found, registry, pool)
    training = _upstream_training(
        found.settings, losses.values if losses else None, bool(losses and losses.truncated), epochs, training_pool
    )
    if found.console is not None and found.console.evaluations and training is not None:
        training = replace(training, selected_on_test=True)
    evidence = replace(evidence, pool=training_pool, test_pool=given, training=training)
    plm_folder, why = importing._find_plm(found, plm)
    evidence = _upstream_weights(evidence, found, plm_folder)
    missing = importing._still_missing(found, importing._Pool(training_pool, None, None, None, None), plm_folder, why)
    return replace(evidence, missing=tuple(missing))


def _upstream_tables(
    evidence: Evidence,
    tables: Mapping[str, pd.DataFrame],
    settings: Mapping[str, Mapping[str, Any]],
    chosen: str | None,
) -> Evidence:
    """The result sets of a run of the original; of several the chosen one is the run."""
    ours = {name: table for name, table in tables.items() if not name.endswith("(original)")}
    if chosen is not None and chosen not in ours:
        raise ValueError(f"no result set {chosen!r}; there are {', '.join(ours) or 'none'}")
    if not ours:
        return replace(evidence, setting=_tested({}))
    run = chosen or next(iter(ours))
    setting = _tested(settings.get(run, {}))
    kept = {run: ours[run]} | {name: t for name, t in tables.items() if name.endswith("(original)")}
    registry = evidence.registry
    assert registry is not None
    traces = registry.trace_set(setting["traces"]) if setting.get("traces") in registry.trace_folders() else None
    video = registry.video(setting["video"]) if setting.get("video") in registry.video_folders() else None
    clean = _clean(setting, registry, traces, kept[run])
    return replace(evidence, tables=kept, run=run, setting=setting, traces=traces, video=video, clean=clean)


def _tested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A result folder's settings in the words of a test; the original always samples, and never clears its context."""
    names = {
        "test_traces": "traces",
        "test_video": "video",
        "test_trace_num": "trace_num",
        "test_fixed": "fixed",
        "test_seed": "seed",
        "w": "w",
        "target_return_scale": "target_return_scale",
    }
    found = {ours: settings[theirs] for theirs, ours in names.items() if settings.get(theirs) is not None}
    return {**found, "choose": "sample", "context": "leak", "original": True}


def _separate_test(found: Found, tables: Mapping[str, pd.DataFrame]) -> str | None:
    """The result set of a test in a process of its own, which can be replayed, where there are several."""
    names = [result.name for result in found.results if result.baseline is None and result.name in tables]
    if len(names) < 2 or found.console is None or found.console.mean_reward is None:
        return names[0] if names else None
    printed = found.console.mean_reward
    alone = [n for n in names if not math.isclose(qoe.summarise(tables[n]).reward, printed, rel_tol=0, abs_tol=1e-9)]
    return (alone or names)[0]


def _pool_setting(settings: Mapping[str, Any]) -> dict[str, Any]:
    names = {"train_traces": "train_traces", "train_video": "train_video", "pool_models": "pool_models", "train_w": "w"}
    return {ours: settings[theirs] for ours, theirs in names.items() if settings.get(theirs) is not None}


def _pools(
    found: Found, registry: Registry, pool: str | Path | None
) -> tuple[ExperiencePool | None, ExperiencePool | None]:
    """(the training pool, the pool that the test was given if it is another one).

    A pool that is given or lies in the folder is the training's, unless the folder's name describes another that can be made
    anew: then that one is the training's.
    """
    from netllm_lib.abr.upstream import imports as importing

    given = load_pool(Path(pool)) if pool is not None else None
    if given is None and found.pools:
        try:
            given = load_pool(found.pools[0])
        except PoolError as error:
            raise ValueError(str(error)) from None
    named = _remade(found.settings, registry)
    if pool is not None and named is None:  # it cannot be made anew, but may lie where the run's folder says
        here = [path for path in found.pools if logs.settings_of(path).get("pool") == found.settings.get("pool", "")]
        named = load_pool(here[0]) if here else None
    if given is None or named is None or given.content_hash() == named.content_hash():
        return given if given is not None else named, None
    if pool is not None or len(importing.logs.settings_of(found.pools[0])) > 0:
        return named, given
    return given, None


def _remade(settings: Mapping[str, Any], registry: Registry) -> ExperiencePool | None:
    from netllm_lib.abr.upstream.imports import remake_pool

    try:
        return remake_pool(settings, registry)
    except (ValueError, OSError, RuntimeError):
        return None


def _upstream_training(
    settings: Mapping[str, Any],
    losses: np.ndarray | None,
    truncated: bool,
    epoch_losses: Sequence[float],
    pool: ExperiencePool | None = None,
) -> Training | None:
    """What names, losses and console tell of a training of the original; None where they tell nothing."""
    if losses is None and not epoch_losses and "lr" not in settings:
        return None
    w, stride = int(settings.get("w") or 20), settings.get("sample_step")
    epochs = settings.get("epochs")
    windows = crossing = None
    if pool is not None:
        cut = make_windows(pool, WindowConfig("upstream", w, stride, float(settings.get("gamma") or 1.0)))
        windows, crossing = len(cut), int(cut.crossing.sum())
    done = len(epoch_losses) or None
    if losses is not None and done and len(losses) % done == 0:
        windows = len(losses) // done  # what was really trained on
    elif losses is not None and windows is None and epochs and len(losses) % epochs == 0:
        windows = len(losses) // epochs
    accumulation = int(settings.get("grad_accum_steps") or DOCUMENTED_ACCUMULATION)
    micro_steps = steps = None
    if losses is not None:
        micro_steps = len(losses)
    elif windows and (done or epochs):
        micro_steps = windows * int(done or epochs or 0)
    if micro_steps is not None:
        whole, rest = divmod(micro_steps, windows) if windows else (0, micro_steps)
        steps = whole * -(-(windows or 0) // accumulation) + -(
            -rest // accumulation
        )  # an epoch's last step may be short
    lr, warmup = settings.get("lr"), settings.get("warmup_steps", UPSTREAM_WARMUP)
    peak = None if lr is None or steps is None else lr * min(1.0, steps / max(1, warmup))
    final = None
    if losses is None and epoch_losses:
        final = float(epoch_losses[-1])
    return Training(
        losses=losses,
        truncated=truncated,
        micro_steps=micro_steps,
        steps=steps,
        accumulation=accumulation,
        accumulation_assumed="grad_accum_steps" not in settings,
        windows=windows,
        crossing=crossing,
        epochs=done or epochs,
        lr=lr,
        lr_peak=peak,
        warmup_steps=warmup,
        final_loss=final,
        clip="micro",
    )


def _upstream_weights(evidence: Evidence, found: Found, plm: Path | None) -> Evidence:
    """The weights that the test used, if PLM and pool are there; else what the adapter file alone shows."""
    from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint
    from netllm_lib.plm import PLMConfig

    best = found.best
    if best is None:
        broken = [w.problem for w in found.weights if w.problem]
        problems = tuple(("wrong-checkpoint", text) for text in broken[:1])
        return replace(evidence, problems=(*evidence.problems, *problems))
    if plm is None or evidence.pool is None:
        return replace(evidence, problems=(*evidence.problems, *_adapter_alone(best.folder)))
    settings = found.settings
    layer, w = settings.get("early_stop", -1), int(settings.get("w", 20))
    gamma, scale = float(settings.get("gamma", 1.0)), float(settings.get("scale", 1000))
    config = PLMConfig.upstream(str(plm.resolve()), layers=None if layer < 0 else layer + 1)
    try:
        network, meta = load_upstream_checkpoint(best.folder, config, pool_returns(evidence.pool, gamma, scale)[1], w)
    except (ValueError, OSError) as error:
        return replace(evidence, problems=(*evidence.problems, _problem(error)))

    def other(place: Path) -> Callable[[], PolicyNetwork]:
        return lambda: load_upstream_checkpoint(place, config, meta.settings.scale, w)[0]

    others = {
        saved.folder.name: other(saved.folder) for saved in found.weights if saved.problem is None and saved is not best
    }
    evidence = replace(evidence, other_weights=others)
    given = evidence.test_pool
    test_scale = pool_returns(given, gamma, scale)[1] if given is not None else None
    evidence = replace(evidence, subject=Subject(network, meta, None, test_scale))
    return _tested_as_original(evidence)


def _tested_as_original(evidence: Evidence) -> Evidence:
    from netllm_lib.abr.policies.llm import EvalConfig

    if evidence.subject is None:
        return evidence
    changes = {key: evidence.setting[key] for key in ("w", "target_return_scale") if key in evidence.setting}
    config = EvalConfig.upstream(**changes) if evidence.table is not None else None
    return replace(evidence, subject=replace(evidence.subject, config=config))


def _adapter_alone(folder: Path) -> list[tuple[str, str]]:
    """What an adapter shows without its PLM: values that are not finite, matrices that are all zero."""
    import torch

    from netllm_lib.abr.upstream.checkpoints import BIN_ADAPTER, read_bin
    from netllm_lib.checkpoint import ADAPTER, read_safetensors

    try:
        files = [folder / name for name in (ADAPTER, BIN_ADAPTER) if (folder / name).is_file()]
        tensors: dict[str, torch.Tensor] = {}
        for path in files[:1]:
            tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
    except (ValueError, OSError) as error:
        return [_problem(error)]
    if bad := [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
        return [("non-finite", f"{folder}: {len(bad)} tensors of the adapter hold NaN or infinity, {bad[0]} first")]
    b = [t for name, t in tensors.items() if "lora_B" in name]
    if b and not any(bool(t.any()) for t in b):
        return [
            ("adapter-not-applied", f"{folder}: LoRA's B matrices are all zero: the adapter adds nothing to the PLM")
        ]
    return []


def _problem(error: Exception) -> tuple[str, str]:
    """The finding that a checkpoint which cannot be loaded makes: its id, and the error with the file's name for its path."""
    path, colon, said = str(error).partition(": ")
    file = Path(path).name if colon else ""
    text = f"{file}: {said}" if colon else path
    if "NaN" in said:
        return "non-finite", text
    # the original loads an adapter whose layers have other names without a word, and one of another shape not at all
    foreign = (
        "LoRA targets" in said or "target modules" in said.lower() or (file.startswith("adapter") and "weights" in said)
    )
    return ("adapter-not-applied" if foreign else "wrong-checkpoint"), text


# --- what is known in the end --------------------------------------------------------------------------------------------


def _trained_as(evidence: Evidence) -> Evidence:
    """Training facts that follow from other inputs: crossing windows, the pool's video."""
    subject, pool, training = evidence.subject, evidence.pool, evidence.training
    if pool is None or training is None or training.crossing is not None or subject is None or not subject.meta.train:
        return evidence
    made = subject.meta.train.get(
        "data", subject.meta.train
    )  # facts of the windows; older checkpoints have them in between
    cut = make_windows(pool, WindowConfig(made.get("windows", "episode"), subject.meta.settings.w, made.get("stride")))
    return replace(evidence, training=replace(training, windows=len(cut), crossing=int(cut.crossing.sum())))


def _missing(evidence: Evidence) -> list[str]:
    """What is not there, and what it would add; the original's inputs are listed by the import."""
    lines = []
    if evidence.setting.get("original"):
        if evidence.table is not None and evidence.traces is None:
            lines.append("the test's traces (--data): baselines on the same traces, paired differences, the optimum")
        return lines
    if evidence.table is None:
        lines.append("a test (notebook 05): the reward, where it goes, the gap to the baselines")
    if evidence.training is None:
        lines.append("the training (notebook 04): learning rate and loss")
    if evidence.pool is None:
        lines.append("the pool (notebook 03): the behaviour policy, labels, rewards and returns")
    if evidence.subject is None:
        lines.append("weights and PLM: what each switch of the test is worth")
    return lines


_LOADERS: dict[str, Callable[[Evidence, Path, str | Path | None], Evidence]] = {
    "test": _test,
    "training": _training,
    "checkpoint": _checkpoint,
    "pool": _pool,
    "import": _import,
}
