"""What a folder holds of a run of the original: `discover` finds it, tells the run's settings, and says what is missing.

Nothing is converted and no weights or pools are read here; that is `importing`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from netllm_lib import runs
from netllm_lib.abr.upstream import logs
from netllm_lib.plm_files import ALIASES

IDENTITY = ("plm_type", "plm_size", "early_stop", "rank", "w", "gamma")
"""The settings that both the folder of a training run and that of its test tell. Pool, learning rate and the other settings of the
training are not in the name of the test's folder: the original overwrites the results of runs that differ in these."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_FILES = ("adapter_config.json", *ADAPTER_FILES, "modules_except_plm.bin", "model.bin")
LOSSES = "train_losses.txt"
_POOL_MARK = b"plm_special.data.exp_pool"
_MOST_LOG_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class ResultSet:
    """A folder of result files: one test of the run, or of a baseline."""

    name: str  # unique in the run: results, results_test_alone, results-mpc, …
    folder: Path
    settings: dict[str, Any]  # that the folder's name tells
    files: int

    @property
    def baseline(self) -> str | None:
        """The baseline's name; None for the language model's results."""
        return self.settings.get("policy")


@dataclasses.dataclass(frozen=True)
class SavedWeights:
    """A folder of fine-tuned weights."""

    folder: Path
    kind: Literal["best_model", "checkpoint", "other"]
    epoch: int | None  # of a checkpoint
    problem: str | None  # why it cannot be used: which file is missing


@dataclasses.dataclass(frozen=True)
class Found:
    """What a folder holds of one run of the original."""

    folder: Path
    run: str  # the run's place in the folder
    results: tuple[ResultSet, ...]
    console_file: Path | None
    console: logs.Console | None
    losses: Path | None
    weights: tuple[SavedWeights, ...]  # best model first, then checkpoints, the last one first
    pools: tuple[Path, ...]  # that may be the training pool, the likeliest first
    plms: tuple[Path, ...]
    settings: dict[str, Any]  # see `upstream_logs.settings_of`; from the console also batch and evaluation settings
    sources: dict[str, str]  # where each setting was read
    contradictions: tuple[str, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...]  # what is not there, and what it would add

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


def discover(folder: Path, run: str | None = None) -> Found:
    """Look through `folder`: a whole tree of the original, the folder of one run, one of results, or a single log.

    Names above `folder` count too. `run` chooses among several runs by any part of its place that no other has. Raises
    FileNotFoundError if there is no such folder or nothing of the original's in it, and ValueError if it holds several runs,
    listing them, or if a console log has no line of the original's.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    tree = _walk(folder)
    candidates = _candidates(tree)
    if not candidates:
        raise FileNotFoundError(
            f"{folder}: nothing that the original leaves behind (result_sim_abr_*, *console.log, {LOSSES}, adapter folders)"
        )
    chosen = _choose(candidates, run, folder)
    others = [candidate for candidate in candidates if candidate is not chosen]
    console_file = chosen.console or (tree.logs[0] if len(tree.logs) == 1 and not tree.consoles else None)
    console = None if console_file is None else logs.read_console(console_file)
    losses = chosen.losses or (tree.losses[0] if len(tree.losses) == 1 and len(candidates) == 1 else None)

    gathered = _Settings()
    for place in (chosen.place, losses, console_file, *(w.folder for w in chosen.weights)):
        if place is not None:
            gathered.add("folder names", _training_only(logs.settings_of(place)))
    if console is not None:
        _settings_from_console(gathered, console)
    for weights in chosen.weights:
        _settings_from_weights(gathered, weights)
    results, notes = _results_of_run(tree, chosen, others, gathered)
    _check_console_against(notes, console, gathered.values)
    pools = _rank_pools(tree.pools, gathered.values, notes)
    plms = _matching_plms(tree.plms, gathered.values)
    return Found(
        folder=folder,
        run=chosen.name,
        results=tuple(results),
        console_file=console_file,
        console=console,
        losses=losses,
        weights=tuple(chosen.weights),
        pools=tuple(pools),
        plms=tuple(plms),
        settings=gathered.values,
        sources=gathered.sources,
        contradictions=tuple(gathered.contradictions),
        notes=tuple(notes),
        missing=tuple(_missing(results, console, losses, chosen.weights, pools, plms, gathered.values)),
    )


@dataclasses.dataclass
class _Tree:
    """The files of a folder by what they are."""

    root: Path
    consoles: list[Path] = dataclasses.field(default_factory=list)  # early_stop_…_console.log
    logs: list[Path] = dataclasses.field(default_factory=list)  # other logs
    losses: list[Path] = dataclasses.field(default_factory=list)
    weights: list[Path] = dataclasses.field(default_factory=list)  # folders
    results: list[Path] = dataclasses.field(default_factory=list)  # folders
    pools: list[Path] = dataclasses.field(default_factory=list)
    plms: list[Path] = dataclasses.field(default_factory=list)  # folders

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
        _sort_in(tree, Path(place), sorted(files))
    return tree


def _sort_in(tree: _Tree, folder: Path, names: list[str], alone: bool = False) -> None:
    if any(name.startswith(logs.RESULT_PREFIX) for name in names):
        tree.results.append(folder)
    own = "modules.safetensors" in names  # a checkpoint of the companion
    if not own and not alone and set(WEIGHT_FILES) & set(names):
        tree.weights.append(folder)
    elif not own and "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names):
        tree.plms.append(folder)
    for name in names:
        path = folder / name
        if name == LOSSES:
            tree.losses.append(path)
        elif name.endswith("console.log"):
            (tree.consoles if logs.run_of(path) else tree.logs).append(path)
        elif name.endswith(".pkl"):
            with open(path, "rb") as stream:
                if _POOL_MARK in stream.read(200):
                    tree.pools.append(path)
        elif name.startswith(logs.RESULT_PREFIX):
            continue
        elif alone or (path.suffix in (".log", ".out", ".txt") and _is_log(path)):
            tree.logs.append(path)


def _is_log(path: Path) -> bool:
    try:
        if not 0 < path.stat().st_size < _MOST_LOG_BYTES:
            return False
        with open(path, "rb") as stream:
            logs.read_console(stream.read(200_000).decode(errors="replace"))
    except (ValueError, OSError):
        return False
    return True


@dataclasses.dataclass
class _Candidate:
    """A run that the folder holds."""

    name: str
    place: Path | None  # whose name tells the settings
    console: Path | None = None
    losses: Path | None = None
    weights: list[SavedWeights] = dataclasses.field(default_factory=list)
    results: list[Path] | None = None  # of a run of which nothing but results is there


def _candidates(tree: _Tree) -> list[_Candidate]:
    """Training runs; where there is none, groups of results; where there are none either, logs and losses."""
    keyed: dict[tuple[Path, int], _Candidate] = {}
    loose: list[_Candidate] = []

    def of(path: Path) -> _Candidate | None:
        key = logs.run_of(path)
        if key is None:
            return None
        name = f"{tree.place(key[0])}/early_stop_{key[1]}"
        return keyed.setdefault(key, _Candidate(name, key[0] / f"early_stop_{key[1]}_checkpoint"))

    for path in tree.consoles:
        if candidate := of(path):
            candidate.console = path
    for path in tree.losses:
        if candidate := of(path):
            candidate.losses = path
    for path in tree.weights:
        if candidate := of(path):
            candidate.weights.append(_saved(path))
        else:
            loose.append(_Candidate(tree.place(path), path, weights=[_saved(path)]))
    for candidate in keyed.values():
        order = {"best_model": 0, "other": 1, "checkpoint": 2}
        candidate.weights.sort(key=lambda w: (order[w.kind], -(w.epoch or 0), str(w.folder)))
    if keyed or loose:
        return [*keyed.values(), *loose]
    groups: dict[tuple[Any, ...], list[Path]] = {}
    for path in tree.results:
        settings = logs.settings_of(path)
        if "policy" not in settings:
            groups.setdefault(tuple(settings.get(key) for key in IDENTITY), []).append(path)
    if groups:
        return [_Candidate(tree.place(paths[0]), None, results=paths) for paths in groups.values()]
    if tree.results:  # baselines only
        return [_Candidate(tree.place(tree.results[0]), None, results=[])]
    if len(tree.logs) > 1:
        return [_Candidate(tree.place(path), None, console=path) for path in tree.logs]
    if tree.logs or tree.losses:
        return [_Candidate(tree.place((tree.logs or tree.losses)[0]), None)]
    return []


def _choose(candidates: list[_Candidate], run: str | None, folder: Path) -> _Candidate:
    fitting = [c for c in candidates if run is None or run in c.name]
    exact = [c for c in fitting if c.name == run]
    if len(fitting) == 1 or len(exact) == 1:
        return (exact or fitting)[0]
    listed = "; ".join(c.name for c in (fitting or candidates)[:10]) + (
        "; …" if len(fitting or candidates) > 10 else ""
    )
    if not fitting:
        raise ValueError(f"{folder}: no run {run!r} in it, there are: {listed}")
    raise ValueError(f"{folder}: {len(fitting)} runs in it, choose one with --run and a part of its place: {listed}")


def _saved(folder: Path) -> SavedWeights:
    names = {path.name for path in folder.iterdir()}
    problem = None
    if "model.bin" not in names:
        if "adapter_config.json" not in names:
            problem = "adapter_config.json is missing"
        elif not names & set(ADAPTER_FILES):
            problem = "adapter_model.bin is missing"
        elif "modules_except_plm.bin" not in names:
            problem = "modules_except_plm.bin is missing"
    above = [place.name for place in (folder, *folder.parents)]
    if any(re.fullmatch(r"early_stop_-?\d+_best_model", name) for name in above[:1]):
        return SavedWeights(folder, "best_model", None, problem)
    if re.fullmatch(r"early_stop_-?\d+_checkpoint", above[1] if len(above) > 1 else "") and folder.name.isdigit():
        return SavedWeights(folder, "checkpoint", int(folder.name), problem)
    return SavedWeights(folder, "other", None, problem)


# --- settings -----------------------------------------------------------------------------------------------------------


class _Settings:
    """Settings from several sources: the first that tells one is believed, the others may contradict."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.contradictions: list[str] = []

    def add(self, source: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key == "plm_type":
                value = _family(value)
            if key not in self.values:
                self.values[key] = value
                self.sources[key] = source
            elif self.values[key] != value:
                said = f"{key}: {self.values[key]} ({self.sources[key]}), {value} ({source})"
                if said not in self.contradictions:
                    self.contradictions.append(said)

    def add_unless_known(self, source: str, values: Mapping[str, Any]) -> None:
        self.add(source, {key: value for key, value in values.items() if key not in self.values})


def _family(plm_type: str) -> str:
    return ALIASES.get(plm_type, plm_type)


def _training_only(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the settings of a test, which belong to a result set."""
    tests = ("policy", "target_return_scale")
    return {key: v for key, v in settings.items() if not key.startswith("test_") and key not in tests}


_FROM_ARGUMENTS = {
    "sample_step": "sample_step",
    "plm_type": "plm_type",
    "plm_size": "plm_size",
    "rank": "rank",
    "state_feature_dim": "state_feature_dim",
    "w": "w",
    "gamma": "gamma",
    "which_layer": "early_stop",
    "scale": "scale",
}
_FROM_TRAINING_ARGUMENTS = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "warmup_steps": "warmup_steps",
    "num_epochs": "epochs",
    "eval_per_epoch": "eval_per_epoch",
    "save_checkpoint_per_epoch": "save_checkpoint_per_epoch",
    "grad_accum_steps": "grad_accum_steps",
    "seed": "seed",
}


def _settings_from_console(gathered: _Settings, console: logs.Console) -> None:
    for printed in (*console.checkpoints, *console.best_models, *(test.model for test in console.tests)):
        if printed is not None:
            gathered.add("paths in the console log", _training_only(logs.settings_of(printed)))
    for arguments in console.arguments:
        source = "arguments in the console log"
        gathered.add(source, {ours: arguments[key] for key, ours in _FROM_ARGUMENTS.items() if key in arguments})
        pool = arguments.get("exp_pool_path")
        named: dict[str, Any] = {}
        if isinstance(pool, str):
            # the original takes the last three folders of the path, whatever they are
            named = logs.settings_of(pool) or {"pool": "_".join(pool.split("/")[-4:-1])}
        if arguments.get("adapt"):
            training = {ours: arguments[key] for key, ours in _FROM_TRAINING_ARGUMENTS.items() if key in arguments}
            gathered.add(source, training | named)
        elif "pool" in named:
            gathered.add_unless_known(source, {"test_pool": named["pool"]})
    evaluated = [e.epoch for e in console.evaluations if e.epoch is not None]
    saved = [int(path.rpartition("/")[2]) for path in console.checkpoints if path.rpartition("/")[2].isdigit()]
    for key, numbers in (("eval_per_epoch", evaluated), ("save_checkpoint_per_epoch", saved)):
        steps = set(np.diff(numbers).tolist())
        if len(steps) == 1 and min(steps) > 0:
            gathered.add_unless_known("spacing in the console log", {key: steps.pop()})


def _settings_from_weights(gathered: _Settings, weights: SavedWeights) -> None:
    path = weights.folder / "adapter_config.json"
    if not path.is_file():
        gathered.add("model.bin", {"rank": -1})
        return
    values = runs.read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not an adapter config")
    found = {
        ours: values[key]
        for key, ours in (("r", "rank"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout"))
        if key in values
    }
    base = str(values.get("base_model_name_or_path") or "").rstrip("/").split("/")[-2:]  # …/<type>/<size>
    if len(base) == 2 and base[0] in logs.PLM_TYPES:
        found |= {"plm_type": base[0], "plm_size": base[1]}
    gathered.add("adapter_config.json", found)


def _results_of_run(
    tree: _Tree, chosen: _Candidate, others: list[_Candidate], gathered: _Settings
) -> tuple[list[ResultSet], list[str]]:
    """The result sets of the run, named, and remarks; what only they tell is added to the settings."""
    notes: list[str] = []
    mine: list[tuple[str, Path, dict[str, Any]]] = []
    for path in tree.results:
        settings = logs.settings_of(path)
        label = logs.results_label(path)
        if "policy" in settings:
            mine.append((f"{label}-{settings['policy']}", path, settings))
            continue
        if chosen.results is not None and path not in chosen.results:
            continue
        known = gathered.values
        if "plm_type" in settings:
            settings["plm_type"] = _family(settings["plm_type"])
        apart = [key for key in IDENTITY if key in settings and key in known and settings[key] != known[key]]
        if (
            apart == ["w"] and not others
        ):  # the only run there is: the same weights with another window, not another run's
            notes.append(f"{tree.place(path)}: tested with w {settings['w']}, trained with {known['w']}")
        elif apart:
            if not others:
                said = ", ".join(f"{key} {settings[key]} instead of {known[key]}" for key in apart)
                notes.append(f"{tree.place(path)} belongs to another run ({said}) and is left out")
            continue
        if "seed" in known and settings.get("test_seed", known["seed"]) != known["seed"]:
            notes.append(f"{tree.place(path)}: tested with seed {settings['test_seed']}, trained with {known['seed']}")
        elif _fits_another(settings, others):
            notes.append(
                f"{tree.place(path)} may belong to another run: its name tells neither pool nor learning rate, and the original "
                "overwrites results"
            )
        mine.append((label, path, settings))
    for _, path, settings in mine:
        if "policy" not in settings:
            gathered.add_unless_known(
                "names of result folders", {key: settings[key] for key in IDENTITY if key in settings}
            )
            if "test_trace_num" in settings and settings["test_trace_num"] != len(logs.result_files(path)):
                notes.append(
                    f"{tree.place(path)}: {len(logs.result_files(path))} result files, the name says {settings['test_trace_num']}"
                )
    names = _unique([(label, settings) for label, _, settings in mine])
    sets = [
        ResultSet(name, path, settings, len(logs.result_files(path)))
        for name, (_, path, settings) in zip(names, mine, strict=True)
    ]
    return sets, notes


def _fits_another(settings: Mapping[str, Any], others: list[_Candidate]) -> bool:
    for other in others:
        theirs = {} if other.place is None else logs.settings_of(other.place)
        if theirs and all(theirs.get(key, settings.get(key)) == settings.get(key) for key in IDENTITY):
            return True
    return False


def _unique(labelled: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Labels, with those settings added by which sets of the same label differ, or else a number."""
    names = []
    for label, settings in labelled:
        same = [other for name, other in labelled if name == label]
        keys = [k for k in settings if any(other.get(k) != settings[k] for other in same)]
        name = "-".join([label, *(f"{key}_{settings[key]}" for key in keys)])
        names.append(re.sub(r"[^\w.+-]+", "_", name))
    return [
        name if names.count(name) == 1 else f"{name}-{names[:index].count(name) + 1}"
        for index, name in enumerate(names)
    ]


def _check_console_against(notes: list[str], console: logs.Console | None, settings: Mapping[str, Any]) -> None:
    if console is None:
        return
    epochs, last = settings.get("epochs"), console.last_epoch
    if epochs is not None and last is not None and last + 1 < epochs:
        notes.append(f"the console log ends after epoch {last + 1} of {epochs}")
    elif console.cut:
        notes.append("the console log is only a part of one")
    if console.earlier_runs:
        notes.append(f"the console log holds {console.earlier_runs} earlier training runs; only the last one is read")


def _rank_pools(pools: list[Path], settings: Mapping[str, Any], notes: list[str]) -> list[Path]:
    """Pools that may be the run's own; those whose place says that they are another are left out."""
    named = settings.get("pool")
    exact = [path for path in pools if named is not None and logs.settings_of(path).get("pool") == named]
    unnamed = [path for path in pools if "pool" not in logs.settings_of(path)]
    if exact or named is None or not pools:
        return exact or (pools if len(pools) == 1 else unnamed)
    if not unnamed:
        notes.append(f"none of the {len(pools)} pools here is {named}, the one that the run was trained on")
    return unnamed


def _matching_plms(plms: list[Path], settings: Mapping[str, Any]) -> list[Path]:
    """PLM folders `…/<type>/<size>` of the run; any if its type is not known."""
    if "plm_type" not in settings:
        return plms
    return [p for p in plms if p.name == settings.get("plm_size") and _family(p.parent.name) == settings["plm_type"]]


def _missing(
    results: list[ResultSet],
    console: logs.Console | None,
    losses: Path | None,
    weights: list[SavedWeights],
    pools: list[Path],
    plms: list[Path],
    settings: Mapping[str, Any],
) -> list[str]:
    lines = []
    if not any(result.baseline is None for result in results):
        lines.append("result files (artifacts/results/…/result_sim_abr_*): reward by trace, its parts, levels, stalls")
    if console is None:
        lines.append(
            "console log (early_stop_*_console.log): losses by epoch, evaluations, which epoch's model is the best"
        )
    elif not console.arguments:
        lines.append(
            "the terminal's first lines (Namespace(…), Munch(…)): accumulation steps, scale, the pool's reward range and returns"
        )
    if losses is None:
        lines.append(
            f"{LOSSES} (written when training ends): the loss of every window, so how it moved within an epoch"
        )
    usable = [w for w in weights if w.problem is None]
    if not usable:
        broken = "".join(f"; in {w.folder.name} {w.problem}" for w in weights[:1])
        lines.append(
            f"fine-tuned weights (early_stop_*_best_model){broken}: whether they took effect, replay, ablation"
        )
    if not pools:
        name = f" {settings['pool']}" if "pool" in settings else ""
        lines.append(
            f"training pool{name} (exp_pool.pkl): its target return and reward range, what its teacher was worth; policy/"
        )
    if not plms:
        name = f" {settings['plm_type']}/{settings['plm_size']}" if "plm_type" in settings else ""
        lines.append(f"PLM{name} (a Hugging Face folder): replay and ablation of the test; policy/")
    if not settings:
        lines.append("the original's folder names: hyperparameters")
    return lines
