"""What a folder holds of a run of the original: `discover` finds it, tells the run's settings, and says what is missing.

Nothing is converted and no weights or pools are read here; that is `imports`.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from netllm_lib import runs
from netllm_lib.abr.upstream import logs, names
from netllm_lib.plm_files import ALIASES

IDENTITY = ("plm_type", "plm_size", "early_stop", "rank", "w", "gamma")
"""The settings that both the folder of a training run and that of its test tell. Pool, learning rate and the other settings of the
training are not in the name of the test's folder: the original overwrites the results of runs that differ in these."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_FILES = ("adapter_config.json", *ADAPTER_FILES, "modules_except_plm.bin", "model.bin")
LOSSES = "train_losses.txt"
_POOL_MARK = b"plm_special.data.exp_pool"


@dataclass(frozen=True)
class ResultSet:
    """A folder of result files: one test of the run, or of a baseline."""

    name: str  # unique in the run: results, results_test_alone, results-mpc, …
    folder: Path
    settings: dict[str, Any]  # that the folder's name tells

    @property
    def baseline(self) -> str | None:
        """The baseline's name; None for the language model's results."""
        return self.settings.get("policy")


@dataclass(frozen=True)
class SavedWeights:
    """A folder of fine-tuned weights."""

    folder: Path
    kind: Literal["best_model", "checkpoint", "other"]
    epoch: int | None  # of a checkpoint
    problem: str | None  # why it cannot be used: which file is missing


@dataclass
class Found:
    """What a folder holds of one run of the original."""

    folder: Path
    run: str  # the run's place in the folder
    console_file: Path | None = None
    console: logs.Console | None = None
    losses: Path | None = None
    results: list[ResultSet] = field(default_factory=list)
    weights: list[SavedWeights] = field(default_factory=list)  # best model first, then checkpoints, the last one first
    pools: list[Path] = field(default_factory=list)  # that may be the training pool, the likeliest first
    plms: list[Path] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # see `names.settings_of`; the console log tells more
    sources: dict[str, str] = field(default_factory=dict)  # where each setting was read
    contradictions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # files that are broken and left out

    @property
    def name(self) -> str:
        """A short name for the run."""
        s = self.settings
        parts = [f"{s['plm_type']}_{s['plm_size']}"] if "plm_type" in s else []
        parts += ["_".join(s["pool_models"])] if "pool_models" in s else []
        parts += [f"rank_{s['rank']}"] if "rank" in s else []
        place = self.folder.stem if self.folder.is_file() else self.folder.name
        return re.sub(r"[^\w.+-]+", "_", "-".join(parts) or place).strip("._") or "run"

    @property
    def best(self) -> SavedWeights | None:
        """The weights that a test would use."""
        return next((weights for weights in self.weights if weights.problem is None), None)

    def tell(self, source: str, values: Mapping[str, Any]) -> None:
        """Take settings from a source: the first one that tells a setting is believed, later ones may contradict it."""
        for key, value in values.items():
            value = ALIASES.get(value, value) if key == "plm_type" else value
            if key not in self.settings:
                self.settings[key], self.sources[key] = value, source
            elif self.settings[key] != value:
                said = f"{key}: {self.settings[key]} ({self.sources[key]}), {value} ({source})"
                if said not in self.contradictions:
                    self.contradictions.append(said)

    def fill(self, source: str, values: Mapping[str, Any]) -> None:
        """Take what nothing before has told."""
        self.tell(source, {key: value for key, value in values.items() if key not in self.settings})


def discover(folder: Path, run: str | None = None) -> Found:
    """Look through `folder`: a whole tree of the original, the folder of one run, one of results, or a single log.

    Names above `folder` count too. `run` chooses among several runs by any part of its place that no other has. Raises
    FileNotFoundError if there is no such folder or nothing of the original's in it, and ValueError if it holds several runs,
    listing them, or if a log that was given by name has no line of the original's.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    tree = _walk(folder)
    runs_here = _runs_in(tree)
    if not runs_here:
        said = f"nothing that the original leaves behind (result_sim_abr_*, *console.log, {LOSSES}, adapter folders)"
        raise FileNotFoundError(f"{folder}: {said}")
    chosen = _choose(runs_here, run, folder)
    others = [other for other in runs_here if other is not chosen]
    found = Found(folder, chosen.name)
    found.weights = chosen.weights
    found.console_file = chosen.console or (tree.logs[0] if len(tree.logs) == 1 and not tree.consoles else None)
    found.losses = chosen.losses or (tree.losses[0] if len(tree.losses) == 1 and not others else None)
    if found.console_file is not None:
        try:
            found.console = logs.read_console(found.console_file)
        except ValueError as error:
            if folder.is_file():
                raise
            found.problems.append(str(error))
    for place in (chosen.place, found.losses, found.console_file, *(saved.folder for saved in found.weights)):
        if place is not None:
            found.tell("folder names", _of_training(names.settings_of(place)))
    if found.console is not None:
        _settings_from_console(found, found.console)
    for saved in found.weights:
        _settings_from_weights(found, saved)
    _take_results(found, tree, chosen, others)
    _rank_pools(found, tree.pools)
    kind, size = found.settings.get("plm_type"), found.settings.get("plm_size")
    found.plms = [
        plm
        for plm in tree.plms
        if kind is None or (ALIASES.get(plm.parent.name, plm.parent.name), plm.name) == (kind, size)
    ]
    return found


# --- the files ----------------------------------------------------------------------------------------------------------


@dataclass
class _Tree:
    """The files of a folder by what they are."""

    root: Path
    consoles: list[Path] = field(default_factory=list)  # early_stop_…_console.log
    logs: list[Path] = field(default_factory=list)  # other logs
    losses: list[Path] = field(default_factory=list)
    weights: list[Path] = field(default_factory=list)  # folders
    results: list[Path] = field(default_factory=list)  # folders
    pools: list[Path] = field(default_factory=list)
    plms: list[Path] = field(default_factory=list)  # folders

    def place(self, path: Path) -> str:
        """`path` as seen from the root."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else path.name


def _walk(folder: Path) -> _Tree:
    if folder.is_file():
        tree = _Tree(folder.parent)
        _sort_in(tree, folder.parent, [folder.name], alone=True)
        return tree
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder or file")
    tree = _Tree(folder)
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        _sort_in(tree, Path(place), sorted(name for name in files if Path(place, name).is_file()))  # no pipes
    return tree


def _sort_in(tree: _Tree, folder: Path, files: list[str], alone: bool = False) -> None:
    if any(name.startswith(logs.RESULT_PREFIX) for name in files):
        tree.results.append(folder)
    own = "modules.safetensors" in files  # a checkpoint of the companion
    if not own and not alone and set(WEIGHT_FILES) & set(files):
        tree.weights.append(folder)
    elif not own and "config.json" in files and any(name.endswith((".safetensors", ".bin")) for name in files):
        tree.plms.append(folder)
    for name in files:
        path = folder / name
        if name == LOSSES:
            tree.losses.append(path)
        elif name.endswith("console.log"):
            (tree.consoles if names.run_of(path) else tree.logs).append(path)
        elif name.endswith(".pkl"):
            if _POOL_MARK in _head(path, 200):
                tree.pools.append(path)
        elif not name.startswith(logs.RESULT_PREFIX) and (
            alone or (path.suffix in (".log", ".out", ".txt") and _is_log(path))
        ):
            tree.logs.append(path)


def _head(path: Path, most: int) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(most)


def _is_log(path: Path) -> bool:
    try:
        logs.read_console(logs.decoded(_head(path, 200_000)))
    except (ValueError, OSError):
        return False
    return True


# --- the runs -----------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A run that the folder holds."""

    name: str
    place: Path | None = None  # whose name tells the settings
    console: Path | None = None
    losses: Path | None = None
    weights: list[SavedWeights] = field(default_factory=list)
    results: list[Path] | None = None  # of a run of which nothing but results is there


def _runs_in(tree: _Tree) -> list[_Run]:
    """Training runs; where there is none, groups of results; where there are none either, logs and losses."""
    trained: dict[tuple[Path, int], _Run] = {}
    loose: list[_Run] = []

    def of(path: Path) -> _Run | None:
        if (key := names.run_of(path)) is None:
            return None
        place, early_stop = key
        run = _Run(f"{tree.place(place)}/early_stop_{early_stop}", place / f"early_stop_{early_stop}_checkpoint")
        return trained.setdefault(key, run)

    for path in tree.consoles:
        if run := of(path):
            run.console = path
    for path in tree.losses:
        if run := of(path):
            run.losses = path
    for path in tree.weights:
        if run := of(path):
            run.weights.append(_saved(path))
        else:
            loose.append(_Run(tree.place(path), path, weights=[_saved(path)]))
    order = ("best_model", "other", "checkpoint")
    for run in trained.values():
        run.weights.sort(key=lambda saved: (order.index(saved.kind), -(saved.epoch or 0), str(saved.folder)))
    if trained or loose:
        return [*trained.values(), *loose]
    groups: dict[tuple[Any, ...], list[Path]] = {}
    for path in tree.results:
        settings = names.settings_of(path)
        if "policy" not in settings:
            groups.setdefault(tuple(settings.get(key) for key in IDENTITY), []).append(path)
    if groups:
        return [_Run(tree.place(paths[0]), results=paths) for paths in groups.values()]
    if tree.results:  # of baselines only
        return [_Run(tree.place(tree.results[0]), results=[])]
    if len(tree.logs) > 1:
        return [_Run(tree.place(path), console=path) for path in tree.logs]
    return [_Run(tree.place(path)) for path in (tree.logs or tree.losses)[:1]]


def _choose(runs_here: list[_Run], part: str | None, folder: Path) -> _Run:
    fitting = [run for run in runs_here if part is None or part in run.name]
    exact = [run for run in fitting if run.name == part]
    if len(exact or fitting) == 1:
        return (exact or fitting)[0]
    listed = [run.name for run in fitting or runs_here]
    shown = "; ".join(listed[:10]) + ("; …" if len(listed) > 10 else "")
    if not fitting:
        raise ValueError(f"{folder}: no run {part!r} in it, there are: {shown}")
    raise ValueError(f"{folder}: {len(fitting)} runs in it, choose one with --run and a part of its place: {shown}")


def _saved(folder: Path) -> SavedWeights:
    there = {path.name for path in folder.iterdir()}
    problem = None
    if "model.bin" not in there:
        if not there & set(ADAPTER_FILES):
            problem = "adapter_model.bin is missing"
        for name in ("modules_except_plm.bin", "adapter_config.json"):
            problem = problem if name in there else f"{name} is missing"
    if re.fullmatch(r"early_stop_-?\d+_best_model", folder.name):
        return SavedWeights(folder, "best_model", None, problem)
    if re.fullmatch(r"early_stop_-?\d+_checkpoint", folder.parent.name) and re.fullmatch(r"\d{1,9}", folder.name):
        return SavedWeights(folder, "checkpoint", int(folder.name), problem)
    return SavedWeights(folder, "other", None, problem)


# --- settings -----------------------------------------------------------------------------------------------------------

_FROM_ARGUMENTS = {
    **{
        name: name
        for name in ("sample_step", "plm_type", "plm_size", "rank", "state_feature_dim", "w", "gamma", "scale")
    },
    "which_layer": "early_stop",
}
_FROM_TRAINING_ARGUMENTS = {
    **{name: name for name in ("lr", "weight_decay", "warmup_steps", "grad_accum_steps", "seed", "eval_per_epoch")},
    "num_epochs": "epochs",
}


def _of_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the settings of a test, which belong to a result set."""
    tests = ("policy", "target_return_scale")
    return {key: v for key, v in settings.items() if not key.startswith("test_") and key not in tests}


def _renamed(values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {ours: values[theirs] for theirs, ours in keys.items() if theirs in values}


def _settings_from_console(found: Found, console: logs.Console) -> None:
    for printed in (*console.checkpoints, *console.best_models, *filter(None, [console.model])):
        found.tell("paths in the console log", _of_training(names.settings_of(printed)))
    for arguments in console.arguments:
        source = "arguments in the console log"
        found.tell(source, _renamed(arguments, _FROM_ARGUMENTS))
        pool = arguments.get("exp_pool_path")
        named: dict[str, Any] = {}
        if isinstance(pool, str):  # the original takes the last three folders of the path, whatever they are
            named = names.settings_of(pool) or {"pool": "_".join(pool.split("/")[-4:-1])}
        if arguments.get("adapt"):
            found.tell(source, _renamed(arguments, _FROM_TRAINING_ARGUMENTS) | named)
        elif "pool" in named:
            found.fill(source, {"test_pool": named["pool"]})
    evaluated = [line.epoch for line in console.epochs if line.episodes_return is not None]
    apart = {later - earlier for earlier, later in itertools.pairwise(evaluated)}
    if len(apart) == 1:
        found.fill("spacing in the console log", {"eval_per_epoch": apart.pop()})
    epochs = found.settings.get("epochs")
    if epochs is not None and console.last_epoch is not None and console.last_epoch + 1 < epochs:
        found.notes.append(f"the console log ends after epoch {console.last_epoch + 1} of {epochs}")
    elif console.cut:
        found.notes.append("the console log is only a part of one")
    if console.earlier_runs:
        found.notes.append(
            f"the console log holds {console.earlier_runs} earlier training runs; only the last one is read"
        )


def _settings_from_weights(found: Found, saved: SavedWeights) -> None:
    path = saved.folder / "adapter_config.json"
    if not path.is_file():
        found.tell("model.bin", {"rank": -1})
        return
    try:
        values = runs.read_json(path)
    except ValueError:
        return  # whoever loads the weights says so
    if isinstance(values, dict):
        keys = {"r": "rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        base = str(values.get("base_model_name_or_path") or "").rstrip("/").split("/")[-2:]  # …/<type>/<size>
        plm = {"plm_type": base[0], "plm_size": base[1]} if len(base) == 2 and base[0] in names.PLM_TYPES else {}
        found.tell("adapter_config.json", _renamed(values, keys) | plm)


# --- results and pools --------------------------------------------------------------------------------------------------


def _take_results(found: Found, tree: _Tree, chosen: _Run, others: list[_Run]) -> None:
    """The result sets of the run, named, with remarks; what only they tell is added to the settings."""
    mine: list[tuple[str, Path, dict[str, Any]]] = []
    trained = dict(found.settings)
    for path in tree.results:
        settings, label, place = names.settings_of(path), names.results_label(path), tree.place(path)
        if "policy" in settings:
            mine.append((f"{label}-{settings['policy']}", path, settings))
            continue
        if chosen.results is not None and path not in chosen.results:
            continue
        if "plm_type" in settings:
            settings["plm_type"] = ALIASES.get(settings["plm_type"], settings["plm_type"])
        apart = [key for key in IDENTITY if key in settings and settings[key] != trained.get(key, settings[key])]
        if apart and (apart != ["w"] or others):
            if not others:
                said = ", ".join(f"{key} {settings[key]} instead of {trained[key]}" for key in apart)
                found.notes.append(f"{place} belongs to another run ({said}) and is left out")
            continue
        if apart:  # the only run there is: the same weights with another window
            found.notes.append(f"{place}: tested with w {settings['w']}, trained with {trained['w']}")
        if "seed" in trained and settings.get("test_seed", trained["seed"]) != trained["seed"]:
            found.notes.append(f"{place}: tested with seed {settings['test_seed']}, trained with {trained['seed']}")
        elif any(_fits(settings, other) for other in others):
            said = "its name tells neither pool nor learning rate, and the original overwrites results"
            found.notes.append(f"{place} may belong to another run: {said}")
        mine.append((label, path, settings))
        found.fill("names of result folders", {key: settings[key] for key in IDENTITY if key in settings})
        files, named = len(logs.result_files(path)), settings.get("test_trace_num")
        if named not in (None, files):
            found.notes.append(f"{place}: {files} result files, the name says {named}")
    found.results = [
        ResultSet(name, path, settings)
        for name, (_, path, settings) in zip(_unique([(label, s) for label, _, s in mine]), mine, strict=True)
    ]


def _fits(settings: Mapping[str, Any], other: _Run) -> bool:
    """Whether results of these settings could be those of the other run, too."""
    theirs = {} if other.place is None else names.settings_of(other.place)
    return bool(theirs) and all(theirs.get(key, settings.get(key)) == settings.get(key) for key in IDENTITY)


def _unique(labelled: list[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Labels, with those settings added by which sets of the same label differ, or else a number."""
    taken: set[str] = set()
    for label, settings in labelled:
        same = [other for name, other in labelled if name == label]
        apart = [key for key in settings if any(other.get(key) != settings[key] for other in same)]
        name = re.sub(r"[^\w.+-]+", "_", "-".join([label, *(f"{key}_{settings[key]}" for key in apart)]))
        name = name if name not in taken else f"{name}-{len(taken)}"
        taken.add(name)
        yield name


def _rank_pools(found: Found, pools: list[Path]) -> None:
    """Pools that may be the run's own; those whose place says that they are another are left out."""
    named = found.settings.get("pool")
    exact = [path for path in pools if named is not None and names.settings_of(path).get("pool") == named]
    unnamed = [path for path in pools if "pool" not in names.settings_of(path)]
    found.pools = exact or (pools if len(pools) == 1 and named is None else unnamed)
    if pools and not found.pools and named is not None:
        found.notes.append(f"none of the {len(pools)} pools here is {named}, the one that the run was trained on")
