"""Evidence from folders: run folders of the notebooks and of imports, and the runs that they were made from.

There is one way only: a run of the original is imported first, and then read like any other run folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netllm_lib import runs
from netllm_lib.abr import evaluate
from netllm_lib.abr.diagnosis.evidence import Evidence, Recipe, Subject
from netllm_lib.abr.evaluate import Test
from netllm_lib.abr.pool import ExperiencePool, load_pool
from netllm_lib.abr.traces import Registry, find_registry
from netllm_lib.abr.upstream.imports import IMPORT, import_run
from netllm_lib.findings import Attempts
from netllm_lib.returns import pool_returns
from netllm_lib.training_run import RESULT, TrainingRun

if TYPE_CHECKING:
    from netllm_lib.abr.model import PolicyNetwork
    from netllm_lib.checkpoint import CheckpointMeta

MODULES, POOLS, POLICY, TEST_POOL = "modules.safetensors", ("pool", "pool.npz", "states.npy"), "policy", "test_pool"
OURS = (evaluate.SETTING, RESULT, MODULES, IMPORT, runs.MANIFEST, *POOLS, f"{POLICY}/{MODULES}")
"""What shows that a folder is one of ours."""


def load(
    *folders: str | Path,
    pool: str | Path | None = None,
    plm: str | Path | None = None,
    data: str | Path | None = None,
    run: str | None = None,
) -> Evidence:
    """What is known of the run in `folders`.

    Each may be a run folder of a notebook (03, 04, 05), an import, a pool, a checkpoint, or anything of the original's that
    `imports.discover` knows. The first that holds a test is the run, further tests are the same recipe with other seeds, and the
    others add what they have; what is still lacking is looked for in the runs that these were made from. `pool` is the pool that
    the test was given (else the training pool), `plm` the PLM's folder, `data` as in `find_registry`; `run` chooses among several
    runs of the original. A part that is broken is missing, and hides none of the others. Raises FileNotFoundError or ValueError
    naming the folder or file where nothing can be read.
    """
    if not folders:
        raise ValueError("which run? give its folder")
    how = {"pool": pool, "plm": plm, "data": data, "run": run}
    places = [_run_folder(folder, how) for folder in folders]
    attempt = Attempts()
    at = _look(places, find_registry(data), None if plm is None else str(plm), attempt)
    evidence = Evidence(registry=at.registry)
    for what, step in STEPS.items():
        evidence = attempt(what, step, evidence, at) or evidence
    if pool is not None and evidence.test_pool is None:
        evidence = _with_pool(evidence, load_pool(Path(pool)))
    parts = (evidence.test, evidence.training, evidence.pool, evidence.subject)
    if attempt.errors and all(part is None for part in parts) and not evidence.problems:
        error = attempt.errors[0]
        raise error if isinstance(error, ValueError | OSError) else ValueError(f"{places[0]}: {attempt.failed[0]}")
    missing = (*evidence.missing, *attempt.failed, *_missing(evidence, at.imported is not None))
    return replace(evidence, missing=missing)


# --- folders ------------------------------------------------------------------------------------------------------------


def _run_folder(folder: str | Path, how: Mapping[str, Any]) -> Path:
    """The folder itself if it is one of ours, else the one that it is imported into."""
    place = Path(folder).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{place}: no such folder")
    return place if _first([place], *OURS) else import_run(place, **how).folder


def _first(places: Sequence[Path], *names: str) -> Path | None:
    """The first folder that holds one of the names."""
    return next((place for place in places if any((place / name).exists() for name in names)), None)


def _with_parents(places: list[Path], attempt: Attempts) -> Iterator[Path]:
    """The folders, then the runs that they were made from: a test's training, a training's pool."""
    seen: set[Path] = set()
    for place in places:  # which grows meanwhile
        if place.resolve() in seen or not place.exists():
            continue
        seen.add(place.resolve())
        yield place
        parents = attempt("what it was made from", lambda run: run.parents, runs.Run(place)) or {}
        places += [parents[role] for role in ("training", "pool") if role in parents]
        if place.name == POLICY and (place.parent / runs.MANIFEST).is_file():
            places.append(place.parent)


@dataclass(frozen=True)
class _Places:
    """Where the parts of a run are; None where there is none."""

    registry: Registry
    plm: str | None
    tests: list[Path]  # the run's, then those of the same recipe with other seeds
    training: Path | None
    pool: Path | None
    weights: Path | None
    imported: Path | None
    about: Mapping[str, Any]  # what the import says of itself


def _look(places: list[Path], registry: Registry, plm: str | None, attempt: Attempts) -> _Places:
    tests = [place for place in places if (place / evaluate.SETTING).is_file()]
    family = list(_with_parents([place for place in places if place not in tests[1:]], attempt))
    tests[1:] = [
        place for place in tests[1:] if place not in family
    ]  # an import that the test was made from is no seed
    weights, imported = _first(family, f"{POLICY}/{MODULES}", MODULES), _first(family, IMPORT)
    if weights is not None and (weights / POLICY).is_dir():
        weights = weights / POLICY
    about = {} if imported is None else attempt("the import", _about, imported) or {}
    return _Places(registry, plm, tests, _first(family, RESULT), _first(family, *POOLS), weights, imported, about)


def _about(imported: Path) -> dict[str, Any]:
    about = runs.read_json(imported / IMPORT)
    if not isinstance(about, dict) or not isinstance(about.get("settings"), dict):
        raise ValueError(f"{imported / IMPORT}: it does not say what was imported (settings)")
    return about


# --- parts --------------------------------------------------------------------------------------------------------------


def _test(place: Path) -> Test:
    """The test in a run folder. It is about the policy that it names, else about its first."""
    test = Test.read(place)
    if test.subject and test.subject not in test.tables:
        raise ValueError(f"{place / evaluate.SETTING}: it is about {test.subject!r}, which is none of its policies")
    return test if test.subject else replace(test, subject=next(iter(test.tables), ""))


def _with_data(evidence: Evidence, at: _Places) -> Evidence:
    """The traces and the video of the test, where those are at hand."""
    registry = at.registry
    traces, video, clean = (evidence.setting.get(name) for name in ("traces", "video", "clean"))
    return replace(
        evidence,
        traces=registry.trace_set(traces) if traces in registry.trace_folders() else None,
        video=registry.video(video) if video in registry.video_folders() else None,
        clean=None if clean is None else np.array(clean, dtype=bool),
    )


def _with_subject(evidence: Evidence, at: _Places) -> Evidence:
    from netllm_lib.abr.model import load_policy
    from netllm_lib.abr.policies.llm import EvalConfig
    from netllm_lib.abr.upstream.checkpoints import problem_of

    if at.weights is None:
        return evidence
    try:
        network, meta = load_policy(at.weights, at.plm)
    except FileNotFoundError as error:
        return replace(evidence, missing=(f"weights and PLM ({error}): what each switch changes",))
    except (ValueError, OSError) as error:
        return replace(evidence, problems={problem_of(error): str(error)})
    names = {field.name for field in dataclasses.fields(EvalConfig)} & evidence.setting.keys()
    config = EvalConfig(**{name: evidence.setting[name] for name in names}) if evidence.test else None
    return replace(evidence, subject=Subject(network, meta, config))


def _with_recipe(evidence: Evidence, at: _Places) -> Evidence:
    """From the pool, else from what the test says, else from the settings of an import; names that are known here first."""
    pool = {} if evidence.pool is None else {f"train_{name}": value for name, value in evidence.pool.source.items()}
    settings = at.about.get("settings", {})

    def named(key: str, known: Collection[str]) -> str | None:
        names = [source[key] for source in (pool, evidence.setting, settings) if source.get(key)]
        return next((name for name in names if name in known), next(iter(names), None))

    traces = named("train_traces", at.registry.trace_folders())
    video = named("train_video", at.registry.video_folders())
    w = evidence.subject.meta.settings.w if evidence.subject else settings.get("w")
    return replace(evidence, recipe=Recipe(traces, video, w))


def _with_import(evidence: Evidence, at: _Places) -> Evidence:
    """What only an import knows, see `import_run`. Of its test nothing is taken where another one is diagnosed."""
    if at.imported is None or not at.about:
        return evidence
    about, tested = at.about, not at.tests or at.imported == at.tests[0]
    skipped = {None} if tested else {None, "protocol-mismatch"}
    problems = {p["finding"]: p["text"] for p in reversed(about["problems"]) if p["finding"] not in skipped}
    missing = (*evidence.missing, *about["missing"])
    evidence = replace(evidence, problems=problems | dict(evidence.problems), missing=missing)
    if not tested:
        return evidence
    subject, others, given = evidence.subject, {}, None
    if subject is not None:
        folders = [Path(saved["folder"]) for saved in about["weights"][1:] if not saved["problem"]]
        others = {folder.name: _other(folder, subject.meta) for folder in folders if folder.is_dir()}
    if (at.imported / TEST_POOL).is_dir():
        given = load_pool(at.imported / TEST_POOL)
        if subject is not None:
            scale = subject.meta.settings.scale
            subject = replace(subject, test_scale=pool_returns(given, scale.gamma, scale.scale)[1])
    printed = (about["console"] or {}).get("mean_reward")
    return replace(evidence, printed_reward=printed, other_weights=others, test_pool=given, subject=subject)


STEPS: dict[str, Callable[[Evidence, _Places], Evidence]] = {
    "the test": lambda evidence, at: replace(evidence, test=_test(at.tests[0]) if at.tests else None),
    "further tests": lambda evidence, at: replace(evidence, seeds=tuple(map(_test, at.tests[1:]))),
    "the training": lambda evidence, at: (
        replace(evidence, training=TrainingRun.read(at.training)) if at.training else evidence
    ),
    "the pool": lambda evidence, at: replace(evidence, pool=load_pool(at.pool)) if at.pool else evidence,
    "traces and video": _with_data,
    "the weights": _with_subject,
    "the recipe": _with_recipe,
    "the import": _with_import,
}
"""By what they add to the evidence, from what they have so far."""


def _with_pool(evidence: Evidence, pool: ExperiencePool) -> Evidence:
    """The pool as that of the training, or, where the training had another one, as the pool of the test."""
    training, subject = evidence.training, evidence.subject
    trained = subject.meta.settings.pool_hash if subject else training and training.facts.get("pool_hash")
    other = trained and trained != pool.content_hash()
    return replace(evidence, test_pool=pool) if other else replace(evidence, pool=pool)


def _other(folder: Path, meta: CheckpointMeta) -> Callable[[], PolicyNetwork]:
    """What loads another checkpoint of the same run of the original."""
    from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint

    return lambda: load_upstream_checkpoint(folder, meta.plm, meta.settings.scale, meta.settings.w)[0]


def _missing(evidence: Evidence, imported: bool) -> Iterator[str]:
    """What is not there, and what it would add; an import has listed the files of the original itself."""
    if evidence.test is not None and evidence.traces is None:
        yield "the test's traces (--data): baselines on the same traces, paired differences, the optimum"
    ours = {
        "a test (notebook 05): the reward, where it goes, the gap to the baselines": evidence.test,
        "the training (notebook 04): learning rate and loss": evidence.training,
        "the pool (notebook 03): the behaviour policy, labels, rewards and returns": evidence.pool,
        "weights and PLM: what each switch of the test changes": evidence.subject
        or evidence.missing
        or evidence.problems
        or None,
    }
    if not imported:
        yield from (text for text, there in ours.items() if there is None)
