"""A run of the original, in whatever state it is in, as a run folder of the companion.

`upstream_runs.discover` looks through a folder and says what is there and what is missing; `import_run` checks and converts it:

    reports/runs/import/<name>-<hash>/
        tables/<result set>.parquet   the result files, as `play`'s table
        history.parquet               micro_step, loss: the loss of every training window
        console.json                  what the console log tells, see `upstream_logs.Console`
        settings.json                 settings with where each was read, contradictions, notes, the pool's identity
        missing.json                  what was not there, and what it would add
        policy/                       the fine-tuned policy as a checkpoint of the companion

Each of them is there if the run had what it takes. Nothing in foreign files is executed, and a broken file is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from netllm_lib import runs
from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import UPSTREAM_ENVIRONMENT_SEED, Episodes, upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.base import Policy
from netllm_lib.abr.policies.catalogue import load_llm_policy, make_policy
from netllm_lib.abr.policies.pensieve import Pensieve
from netllm_lib.abr.pool import ExperiencePool, concatenate, generate_pool, load_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import CHUNKS, Registry, TraceSet, find_registry
from netllm_lib.abr.upstream import logs
from netllm_lib.abr.upstream.discover import LOSSES, WEIGHT_FILES, Found, ResultSet, SavedWeights, discover
from netllm_lib.plm_files import describe_folder, find_plm

if TYPE_CHECKING:
    from netllm_lib.abr.policies.llm import EvalConfig

FORMAT = 1  # of the run folder; a new number makes new folders

KIND = "import"


# --- the pool -----------------------------------------------------------------------------------------------------------

POOL_SETTINGS = ("train_traces", "train_video", "pool_models", "pool_trace_num", "pool_fixed")


def remake_pool(settings: Mapping[str, Any], registry: Registry) -> ExperiencePool:
    """The pool that the original's generation makes for these settings (see `upstream_logs.settings_of`), bit for bit.

    Raises ValueError if the settings do not tell how it was made or the original cannot have made it, FileNotFoundError if traces,
    video or actor are not in the registry, and OSError if an actor would have to be read without TensorFlow.
    """
    lacking = [key for key in POOL_SETTINGS if key not in settings]
    if lacking:
        raise ValueError(f"the pool cannot be made anew: nothing tells {', '.join(lacking)}")
    models = settings["pool_models"]
    if unknown := [model for model in models if model not in logs.POLICIES]:
        raise ValueError(f"the pool cannot be made anew: {', '.join(unknown)} is not a policy of the original")
    traces, video = registry.trace_set(settings["train_traces"]), registry.video(settings["train_video"])
    asked = settings["pool_trace_num"]
    fixed = bool(settings["pool_fixed"]) or asked == -1
    if len(models) > 1 and not fixed:
        raise ValueError(
            "the pool cannot be made anew: with several policies and a random order the original gives traces the start points "
            "of others, or fails"
        )
    parts: list[ExperiencePool] = []
    first_actor: Policy | None = None
    for model in models:
        player = make_policy(model, video, registry, "upstream", pool=True)
        if isinstance(player, Pensieve):
            first_actor = player = first_actor or player  # the original goes on with the first actor's weights
        episodes = upstream_episodes(
            traces,
            trace_num=asked if asked == -1 else min(asked, len(traces)),
            fixed_order=fixed,
            seed=settings.get("pool_seed", 0),  # of no effect in pool generation
            draws_actions=player.draws_actions,
            pool=True,
        )
        if parts and player.draws_actions and traces.start_ptrs is None:
            episodes = dataclasses.replace(episodes, action_draws=_draws_without_pointers(len(episodes)))
        parts.append(generate_pool(player, traces, video, episodes))
    return concatenate(parts)


def _draws_without_pointers(episodes: int) -> np.ndarray:
    """Action draws of a second environment: it finds the start pointers drawn already, so the stream begins with the actions."""
    stream = np.random.RandomState(UPSTREAM_ENVIRONMENT_SEED)
    return np.array([[stream.randint(1, 1000) for _ in range(CHUNKS)] for _ in range(episodes)])


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The training pool, and how far it is the one that the run's folder names."""

    pool: ExperiencePool | None
    origin: Literal["given", "found", "made anew"] | None
    path: Path | None
    named_hash: str | None  # of the pool that the folder's name describes, made anew
    reason: str | None  # why there is none, or why it could not be compared

    @property
    def differs(self) -> bool | None:
        """Whether it is another pool than the run's folder names; None if that cannot be told."""
        if self.pool is None or self.named_hash is None:
            return None
        return self.pool.content_hash() != self.named_hash

    def describe(self, name: str | None) -> dict[str, Any]:
        """For settings.json; `name` is the pool's in the run's folder."""
        return {
            "origin": self.origin,
            "path": self.path,
            "hash": None if self.pool is None else self.pool.content_hash(),
            "named": name,
            "named_hash": self.named_hash,
            "pool_differs": self.differs,
        }


def _find_pool(found: Found, pool: Path | ExperiencePool | None, registry: Registry) -> _Pool:
    given: ExperiencePool | None = None
    origin: Literal["given", "found", "made anew"] | None = None
    path: Path | None = None
    if isinstance(pool, ExperiencePool):
        given, origin = pool, "given"
    elif pool is not None:
        given, origin, path = load_pool(Path(pool)), "given", Path(pool)
    elif len(found.pools) == 1 or (found.pools and logs.settings_of(found.pools[0]).get("pool")):
        given, origin, path = load_pool(found.pools[0]), "found", found.pools[0]
    try:
        named = remake_pool(found.settings, registry)
    except (ValueError, OSError) as error:
        return _Pool(given, origin, path, None, str(error))
    if given is None:
        return _Pool(named, "made anew", None, named.content_hash(), None)
    return _Pool(given, origin, path, named.content_hash(), None)


# --- the test -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AsTested:
    """How the original tested: what `play` needs to do it again."""

    traces: str
    video: str
    trace_num: int
    fixed: bool
    seed: int
    w: int
    target_return_scale: float

    def eval_config(self) -> EvalConfig:
        """The settings of a separate test (`--test`). One in the process that trained begins with a leaked context, which no file
        holds, so its first decisions cannot be reproduced."""
        from netllm_lib.abr.policies.llm import EvalConfig

        return EvalConfig.upstream(w=self.w, target_return_scale=self.target_return_scale)

    def episodes(self, traces: TraceSet) -> Episodes:
        """The episodes of the test, with its random numbers."""
        return upstream_episodes(traces, trace_num=self.trace_num, fixed_order=self.fixed, seed=self.seed)


def as_tested(settings: Mapping[str, Any]) -> AsTested:
    """The test that a result folder's settings describe. Raises ValueError naming what they do not tell."""
    names = {"traces": "test_traces", "video": "test_video", "trace_num": "test_trace_num", "fixed": "test_fixed",
             "seed": "test_seed", "w": "w", "target_return_scale": "target_return_scale"}  # fmt: skip
    if lacking := [key for key in names.values() if key not in settings]:
        raise ValueError(
            f"the names of the result folder do not tell {', '.join(lacking)}: how it was tested is not known"
        )
    return AsTested(**{field: settings[key] for field, key in names.items()})


def replay(
    run: runs.Run | Path, results: str, registry: Registry, progress: Callable[[int, int], None] | None = None
) -> pd.DataFrame:
    """Play the imported policy as the result set `results` was made: the table of chunks, which should equal the imported one.

    Raises FileNotFoundError if the run has no policy or no such result set.
    """
    folder = run.folder if isinstance(run, runs.Run) else Path(run)
    if not (folder / "policy").is_dir():
        raise FileNotFoundError(f"{folder / 'policy'}: the import had no weights, pool or PLM; see missing.json")
    described = runs.read_json(folder / "settings.json")["results"]
    if results not in described:
        raise FileNotFoundError(f"{folder}: no result set {results!r} (there: {', '.join(described) or 'none'})")
    test = as_tested(described[results]["settings"])
    config = test.eval_config()
    traces = registry.trace_set(test.traces)
    policy = load_llm_policy(folder, "upstream", w=config.w, target_return_scale=config.target_return_scale)
    return play(policy, Simulator(traces, registry.video(test.video), test.episodes(traces)), progress=progress)


# --- the import ---------------------------------------------------------------------------------------------------------


def import_run(
    folder: Path,
    *,
    pool: Path | ExperiencePool | None = None,
    plm: str | Path | None = None,
    data: str | Path | None = None,
    root: Path | None = None,
    run: str | None = None,
) -> runs.Run:
    """Turn what `discover(folder, run)` finds into a run folder of the companion, below `root` or `reports/`.

    `pool` is the training pool (else the one in the folder, else it is made anew if folder names tell how and the data are at
    hand), `plm` the PLM (else the one in the folder or in `downloaded_plms`), `data` as in `find_registry`. The same content leads
    to the same folder, which is then returned as it is. Weights that are not finite, or do not fit the PLM and pool that lie
    beside them, are reported in settings.json and leave out policy/. Raises ValueError or FileNotFoundError naming the file for
    anything broken, and for a pool or PLM that was given and does not fit.
    """
    return convert(discover(folder, run), pool=pool, plm=plm, data=data, root=root)


def convert(
    found: Found,
    *,
    pool: Path | ExperiencePool | None = None,
    plm: str | Path | None = None,
    data: str | Path | None = None,
    root: Path | None = None,
) -> runs.Run:
    """`import_run` for what was found already."""
    registry = find_registry(data)
    training_pool = _find_pool(found, pool, registry)
    plm_folder, plm_reason = _find_plm(found, plm)
    trace_sets = {result.name: _trace_set(result, registry) for result in found.results}
    tables = {result.name: logs.read_results(result.folder, trace_sets[result.name]) for result in found.results}
    losses = None if found.losses is None else logs.train_losses(found.losses)
    config = {"format": FORMAT, "settings": _finite(runs.plain(found.settings))}
    inputs = _inputs(found, training_pool, plm_folder, trace_sets)
    run = runs.open_run(KIND, found.name, config, inputs, root=root)
    if not run.done:
        with runs.lock(run.folder):
            if not run.done:  # another process may have finished it before the lock was ours
                exact = plm is not None or pool is not None
                _fill(run, found, tables, losses, trace_sets, training_pool, plm_folder, plm_reason, exact)
    return run


def _fill(
    run: runs.Run,
    found: Found,
    tables: Mapping[str, pd.DataFrame],
    losses: logs.Losses | None,
    trace_sets: Mapping[str, TraceSet | str | None],
    training_pool: _Pool,
    plm_folder: Path | None,
    plm_reason: str | None,
    asked: bool,
) -> None:
    """Write everything that an import holds. `asked`: the pool or PLM was named by the caller and so has to fit the weights."""
    means = {name: qoe.summarise(table).reward for name, table in tables.items()}
    notes = list(found.notes) + _note_unknown_traces(tables, trace_sets) + _note_means(means, found)
    if losses is not None:
        notes += _note_losses(losses, found, training_pool.pool)
    problem = None
    if found.best is not None and training_pool.pool is not None and plm_folder is not None:
        try:
            notes += _write_policy(run.folder / "policy", found.best, found.settings, training_pool.pool, plm_folder)
        except ValueError as error:
            # that weights diverged or do not fit what lies beside them is a finding about the run; a damaged file is not, nor
            # a pool or PLM that was asked for and is the wrong one
            if "NaN or infinity" not in str(error) and (asked or "damaged" in str(error)):
                raise
            problem = str(error)
    for name, table in tables.items():
        with runs.atomic_path(run.folder / "tables" / f"{name}.parquet") as aside:
            table.to_parquet(aside)
    if losses is not None:
        history = pd.DataFrame({"micro_step": np.arange(len(losses.values)), "loss": losses.values})
        with runs.atomic_path(run.folder / "history.parquet") as aside:
            history.to_parquet(aside)
    if found.console is not None:
        runs.write_json(run.folder / "console.json", _finite(runs.plain(found.console)))
    missing = _still_missing(found, training_pool, plm_folder, plm_reason)
    if problem is not None:
        missing.append(f"policy/, because the weights cannot be used: {problem}")
    runs.write_json(run.folder / "missing.json", missing)
    told = {
        "settings": found.settings,
        "sources": found.sources,
        "contradictions": found.contradictions,
        "notes": notes,
        "pool": training_pool.describe(found.settings.get("pool")),
        "plm": plm_folder,
        "weights": _describe_weights(found),
        "policy_problem": problem,  # why the weights are of no use although PLM and pool are there
        "console_file": found.console_file,
        "losses_file": found.losses,
        "losses_truncated": None if losses is None else losses.truncated,
        "results": {
            result.name: {
                "folder": result.folder,
                "baseline": result.baseline,
                "settings": result.settings,
                "files": result.files,
                "mean_reward": means[result.name],
            }
            for result in found.results
        },
    }
    runs.write_json(run.folder / "settings.json", _finite(runs.plain(told)))
    has_policy = (run.folder / "policy").is_dir()
    run.finish({"mean_reward": means, "pool_differs": training_pool.differs, "policy": has_policy})


def _inputs(
    found: Found, pool: _Pool, plm: Path | None, trace_sets: Mapping[str, TraceSet | str | None]
) -> dict[str, str]:
    """What the run is made from, by content."""
    inputs = {f"results {result.name}": _hash_of(logs.result_files(result.folder)) for result in found.results}
    for traces in trace_sets.values():
        if isinstance(traces, TraceSet):
            inputs[f"traces {traces.name}"] = traces.content_hash
    for name, path in (("console log", found.console_file), ("training losses", found.losses)):
        if path is not None:
            inputs[name] = runs.file_hash(path)
    if found.best is not None:
        files = [found.best.folder / name for name in WEIGHT_FILES]
        inputs["weights"] = _hash_of(file for file in files if file.is_file())
    if pool.pool is not None:
        inputs["pool"] = pool.pool.content_hash()
    if pool.named_hash is not None:
        inputs["pool that the folder names"] = pool.named_hash
    if plm is not None:
        inputs["plm"] = _plm_hash(plm)
    return inputs


def _describe_weights(found: Found) -> dict[str, Any] | None:
    """Which weights policy/ is made from; the console log tells the epoch of the best model."""
    if found.best is None:
        return None
    epoch = found.best.epoch
    if found.best.kind == "best_model" and found.console is not None:
        epoch = found.console.best_epoch
    return {"folder": found.best.folder, "kind": found.best.kind, "epoch": epoch}


def _find_plm(found: Found, plm: str | Path | None) -> tuple[Path | None, str | None]:
    """(the PLM's folder, None), or (None, why there is none). One that was asked for has to be there and complete."""
    if plm is not None:
        place = find_plm(str(plm))
        if not isinstance(place, Path):
            raise FileNotFoundError(f"no PLM {str(plm)!r} on this machine: give its folder")
        if problems := describe_folder(place).problems:
            raise ValueError("; ".join(problems))
        return place, None
    candidates = list(found.plms)
    if not candidates and "plm_type" in found.settings:
        try:
            place = find_plm(f"{found.settings['plm_type']}/{found.settings['plm_size']}")
        except FileNotFoundError as error:
            return None, str(error)
        candidates = [place] if isinstance(place, Path) else []
    if len(candidates) != 1:
        return None, f"{len(candidates)} PLMs here, name one with --plm" if candidates else None
    problems = describe_folder(candidates[0]).problems
    return (None, "; ".join(problems)) if problems else (candidates[0], None)


def _trace_set(result: ResultSet, registry: Registry) -> TraceSet | str | None:
    """The trace set that was tested, if it is here, else its name, else None. If the folder's name does not tell it, the files'
    names do: they begin with it."""
    name = result.settings.get("test_traces")
    if name is None:
        files = [path.name for path in logs.result_files(result.folder)]
        for known in registry.trace_folders():
            if all(file.startswith(f"{logs.RESULT_PREFIX}{known}_") for file in files):
                name = known
    return registry.trace_set(name) if name in registry.trace_folders() else name


def _hash_of(files: Iterable[Path]) -> str:
    return runs.content_hash([[path.name, runs.file_hash(path)] for path in files], 16)


def _plm_hash(folder: Path) -> str:
    """Of a PLM by its config and the names and sizes of its files: its weights may have tens of gigabytes."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return runs.content_hash([runs.file_hash(folder / "config.json"), sizes], 16)


def _write_policy(
    folder: Path, best: SavedWeights, settings: Mapping[str, Any], pool: ExperiencePool, plm: Path
) -> list[str]:
    """Convert the weights; returns remarks on what had to be assumed."""
    from netllm_lib.abr.batches import pool_returns
    from netllm_lib.abr.upstream.checkpoints import load_upstream_checkpoint
    from netllm_lib.checkpoint import save_checkpoint
    from netllm_lib.plm import PLMConfig

    notes = []
    layer = settings.get("early_stop", -1)
    w, gamma, scale = settings.get("w", 20), settings.get("gamma", 1.0), settings.get("scale", 1000)
    assumed = [f"{key} {value}" for key, value in (("w", w), ("gamma", gamma)) if key not in settings]
    if assumed:
        notes.append(f"policy/: {' and '.join(assumed)}, the original's default, because nothing tells it")
    if best.kind == "checkpoint":
        notes.append(f"policy/: the checkpoint of epoch {best.epoch}, because the best model is not there")
    _, returns = pool_returns(pool, gamma, float(scale))
    config = PLMConfig.upstream(str(plm.resolve()), layers=None if layer < 0 else layer + 1)
    network, meta = load_upstream_checkpoint(best.folder, config, returns, w)
    save_checkpoint(folder, network, meta)
    return notes


# --- remarks ------------------------------------------------------------------------------------------------------------


def _note_unknown_traces(
    tables: Mapping[str, pd.DataFrame], trace_sets: Mapping[str, TraceSet | str | None]
) -> list[str]:
    notes = []
    for name, table in tables.items():
        traces = trace_sets[name]
        if isinstance(traces, TraceSet) and (unknown := sorted(set(table["trace"]) - set(traces.names))):
            notes.append(f"{name}: {len(unknown)} traces are not in {traces.name} here, {unknown[0]} first")
    return notes


def _note_losses(losses: logs.Losses, found: Found, pool: ExperiencePool | None) -> list[str]:
    """Whether the losses are those of this log and this pool."""
    count, settings, notes = len(losses.values), found.settings, []
    epochs = settings.get("epochs")
    if losses.truncated:
        notes.append(f"{LOSSES}: the last line is cut and left out")
    if not np.isfinite(losses.values).all():
        first = int(np.flatnonzero(~np.isfinite(losses.values))[0])
        notes.append(f"{LOSSES}: not finite from micro-step {first} on")
    if losses.truncated or not epochs:
        return notes
    if found.console is not None and count % epochs == 0:
        means = losses.values.reshape(epochs, -1).mean(axis=1)
        for line in found.console.epochs:
            if line.epoch is None or line.loss_mean is None or line.epoch >= epochs:
                continue
            if abs(means[line.epoch] - line.loss_mean) > 1e-5:
                mean = f"{means[line.epoch]:.6f} in epoch {line.epoch}"
                notes.append(f"{LOSSES}: mean {mean}, the console log says {line.loss_mean:.6f}: they are of two runs")
                break
    if pool is not None and {"w", "sample_step"} <= settings.keys():
        w, step = settings["w"], settings["sample_step"]
        windows = len(range(0, len(pool) - w + 1, min(step or w, w)))
        if count != windows * epochs:
            notes.append(
                f"{LOSSES}: {count} losses; the pool has {windows} windows, which makes {windows * epochs} in {epochs} epochs: "
                "it is not the training pool, or training was not finished"
            )
    return notes


def _note_means(means: Mapping[str, float], found: Found) -> list[str]:
    """Which result set is the one whose mean the console log ends with."""
    console = found.console
    if console is None or console.mean_reward is None:
        return []
    notes, printed = [], console.mean_reward
    for result in found.results:
        mean = means[result.name]
        if result.baseline is not None:
            continue
        if math.isclose(mean, printed, rel_tol=0, abs_tol=1e-9):
            leaked = ", in the process that trained: its first decisions saw a leaked context" if console.epochs else ""
            notes.append(f"{result.name}: the test in the console log{leaked}")
        else:
            other = f"not the {printed:.6f} of the console log, so another test than that one"
            notes.append(f"{result.name}: mean {mean:.6f}, {other}")
    return notes


def _still_missing(found: Found, pool: _Pool, plm: Path | None, plm_reason: str | None) -> list[str]:
    """`found.missing` less what was given or made anew, with the reasons why that failed."""
    lines = []
    for line in found.missing:
        if line.startswith("training pool"):
            if pool.pool is None:
                lines.append(line + (f" ({pool.reason})" if pool.reason else ""))
        elif line.startswith("PLM"):
            if plm is None:
                lines.append(line + (f" ({plm_reason})" if plm_reason else ""))
        else:
            lines.append(line)
    if found.pools and pool.pool is None:
        lines.append(
            f"training pool: {len(found.pools)} pools here, name one with --pool: target return, reward range; policy/"
        )
    if found.plms and plm is None:
        lines.append(f"PLM: {plm_reason}; replay and ablation of the test; policy/")
    return lines


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
