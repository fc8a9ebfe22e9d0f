"""What a folder holds of a run of the original: `discover` finds it, and tells the run's settings.

Nothing is converted and no weights or pools are read here; that is `imports`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netllm_lib import runs
from netllm_lib.abr.upstream import logs, names

IDENTITY = ("plm_type", "plm_size", "early_stop", "rank", "gamma")
"""The settings that both the folder of a training run and that of its test tell, and that a test cannot choose. Pool, learning rate
and others are not in the name of the test's folder: the original overwrites the results of runs that differ in these."""
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_FILES = ("adapter_config.json", *ADAPTERS, "modules_except_plm.bin", "model.bin")
LOSSES = "train_losses.txt"
MOST_NOTES = 50
_POOL_MARK = b"plm_special.data.exp_pool"
# what the original's arguments and adapter configs call our settings
_ARGUMENTS = {
    "which_layer": "early_stop", "num_epochs": "epochs", "sample_step": "sample_step", "plm_type": "plm_type",
    "plm_size": "plm_size", "rank": "rank", "state_feature_dim": "state_feature_dim", "w": "w", "gamma": "gamma",
    "scale": "scale", "lr": "lr", "weight_decay": "weight_decay", "warmup_steps": "warmup_steps", "seed": "seed",
    "grad_accum_steps": "grad_accum_steps",
}  # fmt: skip
_OF_TRAINING = {"num_epochs", "lr", "weight_decay", "warmup_steps", "seed", "grad_accum_steps"}
_ADAPTER_CONFIG = {"r": "rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}

Paths = defaultdict[str, list[Path]]
"""Paths by what they are: console, losses and pool are files, and weights, results and plm folders. A "loose" log or file of losses
lies where no folder tells its run."""


@dataclass(frozen=True)
class ResultSet:
    """A folder of result files: one test of the run, or of a baseline."""

    name: str  # unique in the run: results, results_test_alone, results-mpc, …
    folder: Path
    settings: dict[str, Any]  # that the folder's name tells
    baseline: str | None  # its name; None for the language model's results


@dataclass(frozen=True)
class SavedWeights:
    """A folder of fine-tuned weights."""

    folder: Path
    epoch: int | None  # of a checkpoint; None for the best model, and where nothing tells it
    problem: str | None  # why it cannot be used: which file is missing


@dataclass
class Found:
    """What a folder holds of one run of the original."""

    folder: Path
    run: str  # the run's place in the folder
    console_file: Path | None = None
    console: logs.Console | None = None
    losses: Path | None = None
    weights: list[SavedWeights] = field(default_factory=list)  # the best ones first
    results: list[ResultSet] = field(default_factory=list)
    pools: list[Path] = field(default_factory=list)  # that may be the training pool
    plms: list[Path] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # see `names.settings_of`; the console log tells more
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # files that are broken and left out

    @property
    def name(self) -> str:
        """A short name for the run."""
        s = self.settings
        parts = [f"{s['plm_type']}_{s['plm_size']}"] if "plm_type" in s else []
        parts += ["_".join(s["pool_models"])] if "pool_models" in s else []
        parts += [f"rank_{s['rank']}"] if "rank" in s else []
        return _file_name("-".join(parts) or self.folder.stem).strip("._")[:100] or "run"

    @property
    def best(self) -> SavedWeights | None:
        """The weights that a test would use."""
        return next((weights for weights in self.weights if weights.problem is None), None)

    def tell(self, source: str, values: Mapping[str, Any]) -> None:
        """Take settings of a training from a source: the first one that tells a setting is believed."""
        for key, value in values.items():
            if key in ("policy", "target_return_scale") or key.startswith("test_"):  # of a test, so of a result set
                continue
            if self.settings.setdefault(key, value) != value:
                said = f"{key}: {self.settings[key]}, but {value} by the {source}"
                if len(self.notes) < MOST_NOTES and said not in self.notes:
                    self.notes.append(said)


def discover(folder: Path, run: str | None = None) -> Found:
    """Look through `folder`: a whole tree of the original, the folder of one run, one of results, or a single log.

    Names above `folder` count too. `run` chooses among several runs by any part of its place that no other has. Raises
    FileNotFoundError if there is no such folder or nothing of the original's in it, and ValueError if it holds several runs,
    listing them, or if a log that was given by name has no line of the original's.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    tree = _walk(folder)
    there = _runs_in(tree, folder)
    if not there:
        said = f"nothing that the original leaves behind of a run (result_sim_abr_*, *console.log, {LOSSES}, adapter folders)"
        raise FileNotFoundError(f"{folder}: {said}")
    name = _choose(list(there), run, folder)
    mine, alone = there[name], len(there) == 1
    for kind in ("console", "losses"):  # files without a telling place
        if alone and not mine[kind] and len(tree[f"loose {kind}"]) == 1:
            mine[kind] = tree[f"loose {kind}"]
    found = Found(folder, name)
    found.weights = sorted(
        map(_saved, mine["weights"]), key=lambda saved: (saved.epoch is not None, -(saved.epoch or 0))
    )
    found.losses, found.console_file = (next(iter(mine[kind]), None) for kind in ("losses", "console"))
    for path in (*mine["weights"], *mine["losses"], *mine["console"]):
        found.tell("folder names", names.settings_of(path))
    if found.console_file is not None:
        try:
            found.console = logs.read_console(found.console_file)
            _settings_from_console(found, found.console)
        except ValueError as error:
            if folder.is_file():
                raise
            found.problems.append(str(error))
    for saved in found.weights:
        _settings_from_weights(found, saved.folder)
    for path in tree["results"]:
        if not mine["results"] or path in mine["results"] or "policy" in names.settings_of(path):
            _take_results(found, path, alone)
    named, pools = found.settings.get("pool"), {path: names.settings_of(path).get("pool") for path in tree["pool"]}
    found.pools = [path for path, pool in pools.items() if named is not None and pool == named]
    found.pools = found.pools or [path for path, pool in pools.items() if named is None or pool is None]
    if pools and not found.pools:
        found.notes.append(f"none of the {len(pools)} pools here is {named}, the one that the run was trained on")
    plm = [found.settings.get(key) for key in ("plm_type", "plm_size")]
    found.plms = [path for path in tree["plm"] if plm[0] is None or [names.family(path.parent.name), path.name] == plm]
    return found


# --- files --------------------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> Paths:
    """What there is below a folder, or the single file that it is. Only what is a file is looked at: no pipe, no device."""
    tree: Paths = defaultdict(list)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder or file")
    alone = not folder.is_dir()
    for place, subfolders, files in [(str(folder.parent), [], [folder.name])] if alone else os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [path for path in (Path(place, name) for name in sorted(files)) if path.is_file()]
        there = {path.name for path in paths}
        if any(name.startswith(logs.RESULT_PREFIX) for name in there):
            tree["results"].append(Path(place))
        if not alone and "modules.safetensors" not in there:  # which a checkpoint of the companion has
            if there & set(WEIGHT_FILES):
                tree["weights"].append(Path(place))
            elif "config.json" in there and any(path.suffix in (".safetensors", ".bin") for path in paths):
                tree["plm"].append(Path(place))
        for path in paths:
            if (kind := _kind_of(path, alone)) is not None:
                tree[kind].append(path)
    return tree


def _kind_of(path: Path, alone: bool) -> str | None:
    loose = "" if names.run_of(path) else "loose "
    if path.name.startswith(logs.RESULT_PREFIX):
        return None
    if path.name == LOSSES:
        return f"{loose}losses"
    if path.name.endswith("console.log") or alone:
        return f"{loose}console"
    if path.suffix == ".pkl":
        with open(path, "rb") as stream:
            return "pool" if _POOL_MARK in stream.read(200) else None
    return "loose console" if path.suffix in (".log", ".out", ".txt") and logs.is_console(path) else None


def _runs_in(tree: Paths, folder: Path) -> dict[str, Paths]:
    """What is surely of each run, by its place: of a training, else, where there is none, a folder of results, a log or losses."""
    tested = [path for path in tree["results"] if "policy" not in names.settings_of(path)]
    lone = {"results": tested, "console": tree["loose console"], "losses": tree["loose losses"]}
    parts = [(kind, path) for kind in ("console", "losses", "weights") for path in tree[kind]]
    parts = parts or next(([(kind, path) for path in paths] for kind, paths in lone.items() if paths), [])
    found: dict[str, Paths] = defaultdict(lambda: defaultdict(list))
    for kind, path in parts:
        run, stop = names.run_of(path) or (path, None)
        place = str(run.relative_to(folder)) if run.is_relative_to(folder) else run.name
        found[place if stop is None else f"{place}/early_stop_{stop}"][kind].append(path)
    return found


def _choose(there: list[str], part: str | None, folder: Path) -> str:
    fitting = [part] if part in there else [name for name in there if part is None or part in name]
    if len(fitting) != 1:
        count = len(there) if part is None else f"{part!r} fits {len(fitting)} of {len(there)}"
        shown = "; ".join((fitting or there)[:10])
        raise ValueError(f"{folder}: {count} runs in it, choose one with --run and a part of its place: {shown}")
    return fitting[0]


def _saved(folder: Path) -> SavedWeights:
    there = {path.name for path in folder.iterdir()}
    needed = [name for name in ("adapter_config.json", "modules_except_plm.bin") if name not in there]
    needed += [] if there & set(ADAPTERS) else ["adapter_model.bin"]
    problem = f"{needed[0]} is missing" if needed and "model.bin" not in there else None
    of_epoch = re.fullmatch(r".*/early_stop_-?\d+_checkpoint/(\d{1,9})", folder.as_posix())
    return SavedWeights(folder, int(of_epoch[1]) if of_epoch else None, problem)


# --- settings and results -----------------------------------------------------------------------------------------------


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)


def _some(values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    told = {ours: values[theirs] for theirs, ours in keys.items() if theirs in values}
    return {key: value for key, value in told.items() if names.possible(key, value)}


def _settings_from_console(found: Found, console: logs.Console) -> None:
    for printed in (*console.folders, console.model or ""):
        found.tell("console log's paths", names.settings_of(printed))
    source = "console log's arguments"
    for arguments in console.arguments:
        trains, pool = bool(arguments.get("adapt")), arguments.get("exp_pool_path")
        known = {name: value for name, value in arguments.items() if trains or name not in _OF_TRAINING}
        told = _some(known, _ARGUMENTS)
        found.tell(source, told | ({"plm_type": names.family(told["plm_type"])} if "plm_type" in told else {}))
        if trains and isinstance(pool, str):  # the original takes the last three folders of the path, whatever they are
            found.tell(
                source, names.settings_of(pool) or _some({"pool": "_".join(pool.split("/")[-4:-1])}, {"pool": "pool"})
            )
    epochs = found.settings.get("epochs")
    if epochs is not None and console.epochs and len(console.epochs) < epochs:
        found.notes.append(f"the console log ends after epoch {console.epochs[-1].epoch + 1} of {epochs}")
    elif console.cut:
        found.notes.append("the console log is only a part of one")
    if console.earlier_runs:
        found.notes.append(
            f"the console log holds {console.earlier_runs} earlier training runs; only the last one is read"
        )


def _settings_from_weights(found: Found, folder: Path) -> None:
    path = folder / "adapter_config.json"
    values: Any = None
    with contextlib.suppress(ValueError, OSError):  # whoever loads the weights says so
        values = runs.read_json(path)
    if isinstance(values, dict):
        found.tell(path.name, _some(values, _ADAPTER_CONFIG))


def _take_results(found: Found, folder: Path, alone: bool) -> None:
    """A result set of the run, named, with remarks; what only it tells is added to the settings."""
    settings, label = names.settings_of(folder), names.results_label(folder)
    baseline = settings.get("policy")
    if baseline is None:
        apart = [key for key in IDENTITY if key in settings and settings[key] != found.settings.get(key, settings[key])]
        if apart:
            said = ", ".join(f"{key} {settings[key]} instead of {found.settings[key]}" for key in apart)
            found.notes.append(f"{label} belongs to another run ({said}) and is left out")
            return
        if (w := settings.get("w")) != (trained := found.settings.get("w", w)):
            found.notes.append(f"{label}: tested with w {w}, trained with w {trained}")
        if not alone:
            said = "its folder's name tells neither pool nor learning rate, and the original overwrites results"
            found.notes.append(f"{label} may belong to another run: {said}")
        unknown = {key: settings[key] for key in (*IDENTITY, "w") if key in settings and key not in found.settings}
        found.tell("names of result folders", unknown)
        files, named = len(logs.result_files(folder)), settings.get("test_trace_num")
        if named not in (None, files):
            found.notes.append(f"{label}: {files} result files, the name says {named}")
    name = _file_name(label if baseline is None else f"{label}-{baseline}")
    if name in {other.name for other in found.results}:
        name = f"{name}-{len(found.results) + 1}"
    found.results.append(ResultSet(name, folder, settings, baseline))
