"""Evidence from folders: runs of the notebooks, checkpoints, imports, and whatever the original left behind.

`load` takes any mix of them. The first folder that holds a test is the run, further tests are the same recipe with other seeds,
and the others add what they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from netllm_lib import runs
from netllm_lib.abr.batches import WindowConfig, make_windows, pool_returns
from netllm_lib.abr.diagnosis.evidence import Evidence, Subject, Training
from netllm_lib.abr.pool import ExperiencePool, load_pool
from netllm_lib.abr.traces import Registry, TraceSet, find_registry, overlapping
from netllm_lib.abr.upstream.imports import IMPORT, import_run
from netllm_lib.training_run import RESULT, TrainingRun

if TYPE_CHECKING:
    from netllm_lib.abr.model import PolicyNetwork

SETTING, METRICS, CHECKPOINT, MODULES, POOL = (
    "setting.json",
    "metrics.json",
    "config.json",
    "modules.safetensors",
    "pool",
)


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
        imported = import_run(foreign[0], pool=pool, plm=plm, data=data, results=results, run=run).folder
        kinds = {imported if place == foreign[0] else place: kind for place, kind in kinds.items()} | {
            imported: "import"
        }
    evidence = Evidence(registry=registry)
    ours = list(kinds)
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
    """import, test, training, pool or checkpoint: of the companion; original: anything else."""
    if (place / IMPORT).is_file():
        return "import"
    if (place / SETTING).is_file():
        return "test"
    if (place / MODULES).is_file() and (place / CHECKPOINT).is_file():
        return "checkpoint"
    if (place / "policy" / CHECKPOINT).is_file() and (place / METRICS).is_file():
        return "training"
    if any((place / name).exists() for name in (POOL, "pool.npz", "states.npy")):
        return "pool"
    return "original"


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
    about = runs.read_json(place / IMPORT)
    if (place / SETTING).is_file():
        evidence = _test(evidence, place, plm)
    mean = about["console"] and about["console"]["mean_reward"]
    problems = tuple((problem["finding"], problem["text"]) for problem in about["problems"] if problem["finding"])
    evidence = replace(
        evidence,
        setting={**evidence.setting, "original": True, "mean_reward": mean},
        problems=(*evidence.problems, *problems),
        missing=(*evidence.missing, *about["missing"]),
    )
    if (place / RESULT).is_file():
        run = TrainingRun.read(place)
        windows = run.facts["rows"] == "windows" and run.history is not None
        names = {field.name for field in dataclasses.fields(Training)} & {
            field.name for field in dataclasses.fields(run)
        }
        training = Training(
            **{name: getattr(run, name) for name in names},
            losses=run.history["loss"].to_numpy() if windows and run.history is not None else None,
            windows=run.samples,
            crossing=run.facts["crossing"],
        )
        evidence = replace(evidence, training=training)
    pool, test_pool = (load_pool(place / name) if (place / name).is_dir() else None for name in ("pool", "test_pool"))
    evidence = replace(evidence, pool=pool, test_pool=test_pool)
    if (place / "policy").is_dir():
        evidence = _tested_as_original(_checkpoint(evidence, place / "policy", plm))
    if evidence.subject is None:
        return evidence
    from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint

    meta = evidence.subject.meta

    def other(folder: Path) -> Callable[[], PolicyNetwork]:
        return lambda: load_upstream_checkpoint(folder, meta.plm, meta.settings.scale, meta.settings.w)[0]

    others = [Path(saved["folder"]) for saved in about["weights"][1:] if saved["problem"] is None]
    evidence = replace(evidence, other_weights={folder.name: other(folder) for folder in others})
    if evidence.test_pool is None:
        return evidence
    trained = meta.settings.scale
    test_scale = pool_returns(evidence.test_pool, trained.gamma, trained.scale)[1]
    assert evidence.subject is not None
    return replace(evidence, subject=replace(evidence.subject, test_scale=test_scale))


def _tested_as_original(evidence: Evidence) -> Evidence:
    from netllm_lib.abr.policies.llm import EvalConfig

    if evidence.subject is None:
        return evidence
    changes = {key: evidence.setting[key] for key in ("w", "target_return_scale") if key in evidence.setting}
    config = EvalConfig.upstream(**changes) if evidence.table is not None else None
    return replace(evidence, subject=replace(evidence.subject, config=config))


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
