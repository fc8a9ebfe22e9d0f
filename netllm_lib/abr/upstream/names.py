"""The names that the original gives its folders, which hold the settings of a run.

data/ft_plms/<type>_<size>/<pool>_ss_<step>/rank_…_seed_…/early_stop_<k>_{console.log, best_model/, checkpoint/<epoch>/}
artifacts/results/<traces>_<video>/trace_num_<n>_fixed_<bool>/<type>_<size>/early_stop_<k>_rank_…_seed_…/result_sim_abr_…
artifacts/exp_pools/<traces>_<video>/<policies>/seed_<s>_trace_num_<n>_fixed_<bool>/exp_pool.pkl
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from netllm_lib.plm_files import ALIASES, FAMILIES

POLICIES = ("genet", "udr_1", "udr_2", "udr_3", "udr_real", "mpc", "bba")
"""The original's baselines, which are also its behaviour policies."""
PLM_TYPES = (*dict.fromkeys([*FAMILIES.values(), *ALIASES, "llava"]),)

TRAINING = (
    "rank_{rank}_w_{w}_gamma_{gamma}_sfd_{state_feature_dim}_lr_{lr}_wd_{weight_decay}_warm_{warmup_steps}"
    "_epochs_{epochs}_seed_{seed}"
)
TEST = (
    "rank_{rank}_w_{w}_gamma_{gamma}_tgt_scale_{target_return_scale}_seed_{test_seed}"  # after early_stop_{early_stop}_
)
TEST_SET = "trace_num_{test_trace_num}_fixed_{test_fixed}"
BASELINE = "seed_{test_seed}"
POOL = "seed_{pool_seed}_trace_num_{pool_trace_num}_fixed_{pool_fixed}"

_REALS = frozenset({"gamma", "lr", "weight_decay", "target_return_scale", "scale", "lora_dropout"})
_WORDS = frozenset(
    ["pool", "policy", "plm_type", "plm_size", "train_traces", "train_video", "test_traces", "test_video"]
)
_COUNTS = ("w", "epochs", "sample_step", "state_feature_dim", "grad_accum_steps")
_LEAST = dict.fromkeys(_COUNTS, 1.0) | {"rank": -1, "warmup_steps": 0, "scale": 1e-9}
_LONGEST = 255  # characters of a name, in most file systems
_INTEGER = r"-?\d{1,15}"
_REAL = r"-?(?:\d{1,15}(?:\.\d{0,20})?(?:e[-+]?\d{1,3})?|inf|nan)"


def _pattern(template: str) -> str:
    """A regular expression with a group for each setting of a name."""

    def group(setting: re.Match[str]) -> str:
        key = setting[1]
        return f"(?P<{key}>{_REAL if key in _REALS else 'True|False' if key.endswith('fixed') else _INTEGER})"

    return re.sub(r"\{(\w+)\}", group, template)


_MODEL = "|".join(POLICIES)
_TRAINING, _TEST_SET, _BASELINE, _POOL_LEAF = (
    re.compile(_pattern(template)) for template in (TRAINING, TEST_SET, BASELINE, POOL)
)
_TEST = re.compile(f"(?:{_pattern('early_stop_{early_stop}_')})?{_pattern(TEST)}")
_SAVED = re.compile(_pattern("early_stop_{early_stop}_") + r"(?:best_model|checkpoint|console\.log)")
_POOL_HEAD = re.compile(
    rf"(?P<set>.+?_[^_]+)_(?P<models>(?:{_MODEL})(?:_(?:{_MODEL}))*)|(?P<other_set>[^_]+_[^_]+)_(?P<other>.+)"
)
_POOL_AND_STEP = re.compile(rf"(?P<pool>.+)_ss_(?P<sample_step>None|{_INTEGER})")
_PLM = re.compile(rf"(?P<plm_type>{'|'.join(map(re.escape, PLM_TYPES))})_(?P<plm_size>.+)")


def settings_of(path: Path | str) -> dict[str, Any]:
    """The settings that the folder names of a path tell, at whatever level; empty if none of them is one of the original's.

    The keys are those of the templates above, with `pool` (its name), `train_traces`, `train_video`, `pool_models`, `sample_step`,
    `test_traces`, `test_video`, `plm_type`, `plm_size`, and a baseline's `policy`. `early_stop` is the original's `--which-layer`.
    Names of trace sets may hold underscores, names of videos may not.
    """
    parts = ["", *(part if len(part) <= _LONGEST else "" for part in str(path).replace("\\", "/").split("/")), "", ""]
    found: dict[str, Any] = {}
    for index in range(1, len(parts) - 2):
        above, before, part = parts[index - 2] if index > 1 else "", parts[index - 1], parts[index]
        if match := _TRAINING.fullmatch(part) or _SAVED.fullmatch(part):
            found |= _values(match)
        elif match := _TEST.fullmatch(part):
            found |= _values(match) | _plm_of(before, certain=bool(_TEST_SET.fullmatch(above)))
        elif match := _POOL_AND_STEP.fullmatch(part):
            step = None if match["sample_step"] == "None" else int(match["sample_step"])
            found |= _pool_of(match["pool"]) | {"sample_step": step} | _plm_of(before, certain=above == "ft_plms")
        elif _POOL_LEAF.fullmatch(part) and index > 2:
            found |= _pool_of(f"{above}_{before}_{part}")
        elif match := _TEST_SET.fullmatch(part):
            found |= _values(match) | _pair(before, "test_traces", "test_video")
            if seed := _BASELINE.fullmatch(parts[index + 2]):
                found |= {"policy": parts[index + 1]} | _values(seed)
    return {key: value for key, value in found.items() if possible(key, value)}


def possible(key: str, value: Any) -> bool:
    """Whether a setting can have this value: names, logs and configs may be damaged, and tell what no run can have."""
    if key in _WORDS:
        return type(value) is str and len(value) <= _LONGEST
    if key == "pool_models" or key.endswith("_fixed") or (key == "sample_step" and value is None):
        return True
    kinds = (int, float) if key in _REALS else (int,)
    return type(value) in kinds and _LEAST.get(key, -1e9) <= value <= 1e9


def run_of(path: Path) -> tuple[Path, int] | None:
    """The training run that a file or folder belongs to: its folder `rank_…_seed_…` and the early stop; None if there is none.

    Several early stops share a folder, so both are needed to tell runs apart.
    """
    matches = ((place.parent, _SAVED.fullmatch(place.name)) for place in (path, *path.parents))
    return next(((folder, int(match["early_stop"])) for folder, match in matches if match), None)


def results_label(folder: Path) -> str:
    """A name for a folder of result files: that of the folder in which its test's settings begin, as a rule `results`."""
    for index, part in enumerate(folder.parts):
        if _TEST_SET.fullmatch(part) and index > 1:
            return folder.parts[index - 2]
    return "results" if _TEST.fullmatch(folder.name) else folder.name


def _values(match: re.Match[str]) -> dict[str, Any]:
    return {
        key: float(value) if key in _REALS else value == "True" if value in ("True", "False") else int(value)
        for key, value in match.groupdict().items()
        if value is not None
    }


def _pair(name: str, first: str, second: str) -> dict[str, str]:
    """`<traces>_<video>`, split at the last underscore."""
    one, _, other = name.rpartition("_")
    return {first: one, second: other} if one and other else {}


def family(plm_type: Any) -> Any:
    """One name for each family of PLMs: the original calls some by two."""
    return ALIASES.get(str(plm_type), plm_type)


def _plm_of(name: str, certain: bool) -> dict[str, str]:
    """`<type>_<size>`; of an unknown type only where the place in the path leaves no doubt."""
    match = _PLM.fullmatch(name)
    found = match.groupdict() if match else _pair(name, "plm_type", "plm_size") if certain else {}
    return found | ({"plm_type": family(found["plm_type"])} if found else {})


def _pool_of(name: str) -> dict[str, Any]:
    head, _, tail = name.rpartition("_seed_")
    match, numbers = _POOL_HEAD.fullmatch(head), _POOL_LEAF.fullmatch(f"seed_{tail}")
    if match is None or numbers is None:
        return {"pool": name}
    models = tuple(re.findall(_MODEL, match["models"])) if match["models"] else (match["other"],)
    traces = _pair(match["set"] or match["other_set"], "train_traces", "train_video")
    return {"pool": name, **traces, "pool_models": models, **_values(numbers)}
