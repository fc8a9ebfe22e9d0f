"""The complete runs of the original: the true cause comes first, from whatever subset of its files is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Golden
from netllm_lib.abr.diagnosis import diagnose
from netllm_lib.abr.diagnosis.load import load
from netllm_lib.abr.diagnosis.replay import AS_RUN, RETRAINED

pytestmark = pytest.mark.golden

LOG, LOSSES = "*console.log", "train_losses.txt"


@pytest.fixture(autouse=True)
def reports_elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports do not go to the project's own reports."""
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path_factory.mktemp("reports")))


@pytest.fixture
def failed(golden: Golden, real_data: Path) -> Path:
    return golden("upstream_run", "mistral_genet100")


@pytest.fixture
def sound(golden: Golden, real_data: Path) -> Path:
    return golden("upstream_run", "llama_mpc100")


def training_folder(run: Path) -> Path:
    return next(run.glob("ft_plm/*/*"))


def test_the_failed_run(failed: Path, real_data: Path) -> None:
    evidence = load(failed, data=real_data)
    assert evidence.subject is not None
    assert evidence.pool is not None, "the pool is made anew from its name"
    diagnosis = diagnose(evidence)
    assert diagnosis.first is not None
    assert (diagnosis.first.id, diagnosis.first.severity) == ("warmup-too-long", "cause")
    assert diagnosis.first.evidence["steps"] == 640
    assert diagnosis.first.evidence["peak_share"] == pytest.approx(0.32)
    assert diagnosis.gap is not None
    assert diagnosis.gap.high < -5
    assert {"undertrained", "selected-on-test", "test-leakage", "flat-returns"} <= {f.id for f in diagnosis.findings}


def test_the_sound_run_has_no_cause(sound: Path, golden: Golden, real_data: Path) -> None:
    evidence = load(sound, pool=golden("plm", "mpc100_exp_pool.pkl"), data=real_data)
    assert evidence.test_pool is None, "the pool that is given is the one that its name describes"
    assert diagnose(evidence).causes == ()


def _logs(run: Path, to: Path) -> None:
    folder = to / training_folder(run).relative_to(run)
    shutil.copytree(
        training_folder(run), folder, ignore=lambda _, names: [n for n in names if n.endswith(("model", "21", "79"))]
    )


def _mailed_log(run: Path, to: Path) -> None:
    shutil.copy(next(training_folder(run).glob(LOG)), to / "console.log")


def _results(run: Path, to: Path) -> None:
    shutil.copytree(next(run.glob("results/*/*/*/*")), to / "my results")


@pytest.mark.parametrize(
    ("subset", "first"), [(_logs, "warmup-too-long"), (_mailed_log, "warmup-too-long"), (_results, None)]
)
def test_any_subset_of_the_failed_run(
    failed: Path, real_data: Path, tmp_path: Path, subset: Callable[[Path, Path], None], first: str | None
) -> None:
    subset(failed, tmp_path)
    diagnosis = diagnose(load(tmp_path, data=real_data))
    assert diagnosis.missing
    assert diagnosis.first is not None
    if first:
        assert diagnosis.first.id == first
    else:  # numbers without names: only how it shows
        assert "gap" in {f.id for f in diagnosis.findings} or diagnosis.score is not None


@pytest.mark.slow
def test_what_a_sound_training_is_worth(failed: Path, real_data: Path) -> None:
    diagnosis = diagnose(load(failed, data=real_data), budget_s=60, retrain_s=40)
    assert diagnosis.first is not None
    assert diagnosis.first.id == "warmup-too-long"
    assert diagnosis.first.effect is not None
    assert diagnosis.first.effect.low > 3
    rows = diagnosis.waterfall.set_index("switch")
    assert rows.loc[RETRAINED, "reward"] > rows.loc[AS_RUN, "reward"] + 5
