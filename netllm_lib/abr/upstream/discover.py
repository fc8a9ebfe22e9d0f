"""What a folder holds of a run of the original: `discover` finds it, and tells the run's settings.

Nothing is converted and no weights or pools are read here; that is `imports`.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netllm_lib import runs
from netllm_lib.abr.upstream import logs, names
from netllm_lib.plm_files import ALIASES

IDENTITY = ("plm_type", "plm_size", "early_stop", "rank", "w", "gamma")
"""The settings that both the folder of a training run and that of its test tell. Pool, learning rate and the other settings of the
training are not in the name of the test's folder: the original overwrites the results of runs that differ in these."""
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_FILES = ("adapter_config.json", *ADAPTERS, "modules_except_plm.bin", "model.bin")
LOSSES = "train_losses.txt"
_POOL_MARK = b"plm_special.data.exp_pool"
# what the original's arguments and adapter configs call our settings
_ARGUMENTS = {
    key: key for key in ("sample_step", "plm_type", "plm_size", "rank", "state_feature_dim", "w", "gamma", "scale")
}
_ARGUMENTS |= {"which_layer": "early_stop"}
_TRAINING_ARGUMENTS = {key: key for key in ("lr", "weight_decay", "warmup_steps", "grad_accum_steps", "seed")}
_TRAINING_ARGUMENTS |= {"num_epochs": "epochs"}
_ADAPTER_CONFIG = {"r": "rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}


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
    kind: str  # best_model, checkpoint, other
    epoch: int | None
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
        return _file_name("-".join(parts) or self.folder.stem).strip("._") or "run"

    @property
    def best(self) -> SavedWeights | None:
        """The weights that a test would use."""
        return next((weights for weights in self.weights if weights.problem is None), None)

    def tell(self, source: str, values: Mapping[str, Any]) -> None:
        """Take settings of a training from a source: the first one that tells a setting is believed, later ones may contradict."""
        for key, value in values.items():
            if key in ("policy", "target_return_scale") or key.startswith("test_"):  # of a test, so of a result set
                continue
            value = _family(value) if key == "plm_type" else value
            if self.settings.setdefault(key, value) == value:
                self.sources.setdefault(key, source)
                continue
            said = f"{key}: {self.settings[key]} ({self.sources[key]}), {value} ({source})"
            self.contradictions += [said] if said not in self.contradictions else []


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
        said = f"nothing that the original leaves behind (result_sim_abr_*, *console.log, {LOSSES}, adapter folders)"
        raise FileNotFoundError(f"{folder}: {said}")
    name = _choose(list(there), run, folder)
    mine, alone = there[name], len(there) == 1
    found = Found(folder, name)
    found.weights = sorted(map(_saved, mine["weights"]), key=lambda saved: (saved.kind, -(saved.epoch or 0)))
    for kind, loose in (("console", tree["log"]), ("losses", tree["losses"])):  # files without a telling place
        if not mine[kind] and len(loose) == 1 and (alone or kind == "console"):
            mine[kind] = loose
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
        _settings_from_weights(found, saved)
    own = mine["results"] or tree["results"]
    _take_results(found, [p for p in tree["results"] if p in own or "policy" in names.settings_of(p)], alone)
    named, pools = found.settings.get("pool"), {path: names.settings_of(path).get("pool") for path in tree["pool"]}
    found.pools = [path for path, pool in pools.items() if named is not None and pool == named]
    found.pools = found.pools or [path for path, pool in pools.items() if named is None or pool is None]
    if pools and not found.pools:
        found.notes.append(f"none of the {len(pools)} pools here is {named}, the one that the run was trained on")
    plm = [found.settings.get(key) for key in ("plm_type", "plm_size")]
    found.plms = [path for path in tree["plm"] if plm[0] is None or [_family(path.parent.name), path.name] == plm]
    return found


def _walk(folder: Path) -> defaultdict[str, list[Path]]:
    """The paths of a folder by what they are: console, log, losses, pool are files, and weights, results, plm folders."""
    tree: defaultdict[str, list[Path]] = defaultdict(list)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder or file")
    alone = folder.is_file()
    for place, subfolders, files in [(str(folder.parent), [], [folder.name])] if alone else os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [path for path in map(Path(place).joinpath, sorted(files)) if path.is_file()]
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
    if path.name.startswith(logs.RESULT_PREFIX):
        return None
    if path.name == LOSSES:
        return "losses"
    if path.name.endswith("console.log"):
        return "console" if names.run_of(path) else "log"
    if path.suffix == ".pkl":
        with open(path, "rb") as stream:
            return "pool" if _POOL_MARK in stream.read(200) else None
    return "log" if alone or (path.suffix in (".log", ".out", ".txt") and logs.is_console(path)) else None


def _runs_in(tree: defaultdict[str, list[Path]], folder: Path) -> dict[str, defaultdict[str, list[Path]]]:
    """Training runs; where there is none, groups of results; where there are none either, logs and losses. By place, what is
    surely of each."""
    found: dict[str, defaultdict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))

    def place(path: Path) -> str:
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name

    for kind in ("console", "losses", "weights"):
        for path in tree[kind]:
            if (key := names.run_of(path)) is not None:
                found[f"{place(key[0])}/early_stop_{key[1]}"][kind].append(path)
            elif kind == "weights":
                found[place(path)][kind].append(path)
    if found:
        return found
    groups: dict[tuple[Any, ...], str] = {}
    for path in tree["results"]:
        settings = names.settings_of(path)
        if "policy" not in settings:
            found[groups.setdefault(tuple(settings.get(key) for key in IDENTITY), place(path))]["results"].append(path)
    if not found and len(tree["log"]) > 1:
        return {place(path): defaultdict(list, console=[path]) for path in tree["log"]}
    rest = tree["results"] or tree["log"] or tree["losses"]
    return found or {place(path): defaultdict(list) for path in rest[:1]}


def _choose(there: list[str], part: str | None, folder: Path) -> str:
    fitting = [name for name in there if part is None or part in name]
    if len(fitting) == 1 or part in fitting:
        return fitting[0] if len(fitting) == 1 else str(part)
    shown = "; ".join((fitting or there)[:10]) + ("; …" if len(fitting or there) > 10 else "")
    if not fitting:
        raise ValueError(f"{folder}: no run {part!r} in it, there are: {shown}")
    raise ValueError(f"{folder}: {len(fitting)} runs in it, choose one with --run and a part of its place: {shown}")


def _saved(folder: Path) -> SavedWeights:
    there = {path.name for path in folder.iterdir()}
    needed = [name for name in ("adapter_config.json", "modules_except_plm.bin") if name not in there]
    needed += [] if there & set(ADAPTERS) else ["adapter_model.bin"]
    problem = f"{needed[0]} is missing" if needed and "model.bin" not in there else None
    if re.fullmatch(r"early_stop_-?\d+_best_model", folder.name):
        return SavedWeights(folder, "best_model", None, problem)
    if re.fullmatch(r"early_stop_-?\d+_checkpoint", folder.parent.name) and re.fullmatch(r"\d{1,9}", folder.name):
        return SavedWeights(folder, "checkpoint", int(folder.name), problem)
    return SavedWeights(folder, "other", None, problem)


# --- settings and results -----------------------------------------------------------------------------------------------


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)


def _family(plm_type: Any) -> Any:
    return ALIASES.get(plm_type, plm_type)


def _some(values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {ours: values[theirs] for theirs, ours in keys.items() if theirs in values}


def _settings_from_console(found: Found, console: logs.Console) -> None:
    for printed in (*console.folders, console.model or ""):
        found.tell("paths in the console log", names.settings_of(printed))
    for arguments in console.arguments:
        source, pool = "arguments in the console log", arguments.get("exp_pool_path")
        found.tell(source, _some(arguments, _ARGUMENTS))
        if arguments.get("adapt"):
            found.tell(source, _some(arguments, _TRAINING_ARGUMENTS))
            if isinstance(pool, str):  # the original takes the last three folders of the path, whatever they are
                found.tell(source, names.settings_of(pool) or {"pool": "_".join(pool.split("/")[-4:-1])})
    epochs = found.settings.get("epochs")
    if epochs is not None and console.epochs and len(console.epochs) < epochs:
        found.notes.append(f"the console log ends after epoch {console.epochs[-1].epoch + 1} of {epochs}")
    elif console.cut:
        found.notes.append("the console log is only a part of one")
    if (earlier := console.earlier_runs) > 0:
        found.notes.append(f"the console log holds {earlier} earlier training runs; only the last one is read")


def _settings_from_weights(found: Found, saved: SavedWeights) -> None:
    path = saved.folder / "adapter_config.json"
    if not path.is_file():
        return found.tell("model.bin", {"rank": -1})
    try:
        values = runs.read_json(path)
    except ValueError:
        return None  # whoever loads the weights says so
    if isinstance(values, dict):
        base = str(values.get("base_model_name_or_path") or "").rstrip("/").split("/")[-2:]  # …/<type>/<size>
        plm = {"plm_type": base[0], "plm_size": base[1]} if len(base) == 2 and base[0] in names.PLM_TYPES else {}
        found.tell(path.name, _some(values, _ADAPTER_CONFIG) | plm)
    return None


def _take_results(found: Found, folders: list[Path], alone: bool) -> None:
    """The result sets of the run, named, with remarks; what only they tell is added to the settings."""
    trained = dict(found.settings)
    for path in folders:
        settings, label = names.settings_of(path), names.results_label(path)
        if "plm_type" in settings:
            settings["plm_type"] = _family(settings["plm_type"])
        if (baseline := settings.get("policy")) is None:
            apart = [key for key in IDENTITY if key in settings and settings[key] != trained.get(key, settings[key])]
            if apart and (apart != ["w"] or not alone):
                said = ", ".join(f"{key} {settings[key]} instead of {trained[key]}" for key in apart)
                found.notes.append(f"{label} belongs to another run ({said}) and is left out")
                continue
            for setting, key in (("w", "w"), ("seed", "test_seed")):
                if key in settings and settings[key] != trained.get(setting, settings[key]):
                    said = f"tested with {setting} {settings[key]}, trained with {trained[setting]}"
                    found.notes.append(f"{label}: {said}")
            if not alone:
                said = "its folder's name tells neither pool nor learning rate, and the original overwrites results"
                found.notes.append(f"{label} may belong to another run: {said}")
            unknown = {key: settings[key] for key in IDENTITY if key in settings and key not in trained}
            found.tell("names of result folders", unknown)
            files, named = len(logs.result_files(path)), settings.get("test_trace_num")
            if named not in (None, files):
                found.notes.append(f"{label}: {files} result files, the name says {named}")
        name = _file_name(label if baseline is None else f"{label}-{baseline}")
        same = [other for other in found.results if re.fullmatch(re.escape(name) + r"(-\d+)?", other.name)]
        found.results.append(ResultSet(f"{name}-{len(same) + 1}" if same else name, path, settings, baseline))
