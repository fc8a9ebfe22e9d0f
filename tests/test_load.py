"""Evidence from folders: trees of the original in any state, run folders of the companion, and the command that reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from netllm_lib import runs
from netllm_lib.abr.diagnosis import diagnose
from netllm_lib.abr.diagnosis.load import load
from netllm_lib.abr.policies.llm import EvalConfig
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.abr.upstream.imports import IMPORT, import_run
from netllm_lib.checkpoint import save_checkpoint
from netllm_lib.cli import main
from netllm_lib.parameters import notebook_run
from netllm_lib.training_run import TrainingRun
from run_fixtures import SmallRun, prepare_run, write_test
from upstream_tree import Tree, write_tree

REGISTRY = Registry(SAMPLE)


@pytest.fixture(autouse=True)
def reports(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path_factory.getbasetemp() / "reports"))


# --- the original's ------------------------------------------------------------------------------------------------------


def test_a_whole_tree_is_imported_once_and_read(tree: Tree) -> None:
    evidence = load(tree.root, data=SAMPLE)
    assert evidence.table is not None
    assert evidence.pool is not None
    assert evidence.subject is not None
    assert evidence.subject.config == EvalConfig.upstream(w=5, target_return_scale=1.0)
    assert evidence.training is not None
    assert (evidence.training.lr, evidence.training.warmup_steps) == (1e-4, 2000)
    assert evidence.training.accumulation_assumed
    assert evidence.recipe.w == 5
    assert evidence.recipe.traces == "sample-train"
    assert evidence.printed_reward == pytest.approx(tree.mean_reward)
    imported = import_run(tree.root, data=SAMPLE)
    again = load(imported.folder, data=SAMPLE)
    assert again.subject is not None
    assert again.subject.config == evidence.subject.config
    assert [f.plain() for f in diagnose(again).findings] == [f.plain() for f in diagnose(evidence).findings]


@pytest.mark.parametrize(
    ("parts", "there"),
    [
        (["results"], {"test"}),
        (["losses"], {"training", "pool"}),
        (["console"], {"training", "pool"}),
        (["best_model"], {"training", "pool"}),
        (["best_model", "plm"], {"training", "pool", "subject"}),
        (["results", "losses", "pool"], {"test", "training", "pool"}),
    ],
)
def test_any_part_of_a_tree(tree: Tree, tmp_path: Path, parts: list[str], there: set[str]) -> None:
    evidence = load(tree.copy(tmp_path / "part", parts).root, data=SAMPLE)
    assert {name for name in ("test", "training", "pool", "subject") if getattr(evidence, name) is not None} == there
    assert evidence.missing
    assert diagnose(evidence).missing == evidence.missing


def test_an_adapter_that_does_not_fit_is_a_finding(tree: Tree, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "other", rank=2, plm_type="gpt2")
    mixed = tree.copy(tmp_path / "mixed")
    for file in mixed.best_model.iterdir():
        file.unlink()
    for file in other.best_model.iterdir():
        (mixed.best_model / file.name).write_bytes(file.read_bytes())
    evidence = load(mixed.root, data=SAMPLE)
    assert evidence.subject is None
    first = diagnose(evidence).first
    assert first is not None
    assert first.id == "adapter-not-applied"


def test_the_command_says_it_in_json(tree: Tree, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", str(tree.root), "--data", str(SAMPLE), "--budget", "0", "--json"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    result = json.loads(text.strip().splitlines()[-1])
    first = result["findings"][0]
    assert first.keys() == {"id", "severity", "title", "evidence", "rule", "fix", "effect"}
    assert f"1. [{first['severity']}] {first['id']}: {first['title']}" in text
    order = [finding["severity"] for finding in result["findings"]]
    assert order == sorted(order, key=["cause", "suspect", "note"].index)


@pytest.mark.parametrize(
    ("words", "message"), [(["nowhere"], "no such folder"), ([str(SAMPLE)], "nothing that the original")]
)
def test_a_wrong_request_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["diagnose", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


# --- the companion's -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """03, 04 and 05 as the notebooks leave them, of an untrained network whose training says that it is one."""
    run = prepare_run(tmp_path_factory.mktemp("small"), epochs=0)
    known = TrainingRun(steps=90, warmup_steps=9, lr=1e-3, lr_peak=1e-3, final_loss=1.7, clip="micro", accumulation=4)
    known.save(run.folder("04_finetune"))
    return run


def test_a_test_leads_to_its_training_and_pool(small: SmallRun) -> None:
    evidence = load(small.folder("05_test"), data=small.data)
    assert evidence.run == "llm"
    assert evidence.reference == "mpc"
    assert evidence.training is not None
    assert evidence.training.steps == 90
    assert evidence.pool is not None
    assert evidence.subject is not None
    assert evidence.subject.config == EvalConfig()
    assert evidence.recipe.traces == "sample-train"
    assert evidence.clean is not None
    assert evidence.clean.shape == (6,)
    assert evidence.missing == ()
    first = diagnose(evidence).first
    assert first is not None
    assert first.id == "undertrained"


def test_each_folder_alone_and_further_seeds(small: SmallRun) -> None:
    alone = {name: load(small.folder(name), data=small.data) for name in ("03_experience_pool", "04_finetune")}
    assert alone["03_experience_pool"].pool is not None
    assert alone["03_experience_pool"].training is None
    assert alone["04_finetune"].training is not None
    assert alone["04_finetune"].pool is not None, "the training names its pool"
    checkpoint = load(small.folder("04_finetune") / "policy", data=small.data)
    assert checkpoint.subject is not None
    assert checkpoint.subject.config is None, "nothing says how it was tested"
    both = load(small.folder("05_test"), write_test(small, "again", choose="sample"), data=small.data)
    assert len(both.seeds) == 1
    assert not np.array_equal(both.seeds[0].tables["llm"]["level"], both.tables["llm"]["level"])
    over = diagnose(both).over_seeds
    assert over is not None
    assert both.gap is not None
    assert over.mean != both.gap.mean


def test_the_test_that_is_given_is_diagnosed(tree: Tree, small: SmallRun) -> None:
    """A test of an imported policy is about that test, not about the imported one."""
    imported = import_run(tree.root, data=SAMPLE).folder
    run = notebook_run(str(small.folder("05_test", "of-import")), "05_test", training=imported)
    for name in ("tables", "setting.json", "scores.json", "scores.parquet"):
        (run.folder / name).symlink_to(small.folder("05_test") / name)
    evidence = load(run.folder, data=small.data)
    assert evidence.table is not None
    assert len(evidence.table["trace"].unique()) == 6
    assert evidence.training is not None
    assert evidence.training.warmup_steps == 2000, "of the imported training"
    assert evidence.printed_reward is None
    both = load(run.folder, imported, data=small.data)
    assert both.seeds == (), "the training that it was made from is no further seed"
    about = runs.read_json(imported / IMPORT)
    about["problems"] = [{"finding": "protocol-mismatch", "text": "the imported test is broken"}]
    copied = shutil.copytree(imported, small.folder("import", "with-problems"))
    runs.write_json(copied / IMPORT, about)
    run.note(parents={"training": copied})
    assert load(run.folder, data=small.data).problems == {}
    assert "protocol-mismatch" in load(copied, data=SAMPLE).problems


@pytest.mark.parametrize(
    ("folder", "file", "lost"),
    [
        ("05_test", "setting.json", "the test"),
        ("05_test", "tables/bba.parquet", "the test"),
        ("04_finetune", "training.json", "the training"),
        ("04_finetune", "policy/config.json", "wrong-checkpoint"),
        ("03_experience_pool", "pool/config.json", "the pool"),
    ],
)
def test_a_broken_part_hides_no_other(tmp_path: Path, small: SmallRun, folder: str, file: str, lost: str) -> None:
    run = SmallRun(small.data, tmp_path, small.name)
    shutil.copytree(small.reports, tmp_path, dirs_exist_ok=True)
    (run.folder(folder) / file).write_text("{")
    evidence = load(run.folder("05_test"), data=small.data)
    parts = (evidence.test, evidence.training, evidence.pool, evidence.subject)
    assert sum(part is None for part in parts) == 1
    diagnosis = diagnose(evidence)
    assert lost in str(diagnosis)
    assert diagnosis.findings


def test_broken_folders_are_refused_by_name(tmp_path: Path, small: SmallRun) -> None:
    runs.write_json(tmp_path / "setting.json", {"traces": "sample-test", "video": "sample", "order": ["llm"]})
    with pytest.raises(FileNotFoundError, match=r"llm\.parquet"):
        load(tmp_path, data=SAMPLE)
    with pytest.raises(ValueError, match="which run"):
        load(data=SAMPLE)


def test_weights_that_cannot_be_used(tmp_path: Path, small: SmallRun) -> None:
    """A PLM that is not here is missing, broken weights are a finding."""
    subject = load(small.folder("04_finetune"), data=small.data).subject
    assert subject is not None
    subject.network.action_head.bias.data[0] = float("nan")
    save_checkpoint(tmp_path / "nan", subject.network, subject.meta)
    evidence = load(tmp_path / "nan", data=small.data)
    first = diagnose(evidence).first
    assert first is not None
    assert first.id == "non-finite"
    away = load(small.folder("04_finetune"), plm="llama/nosuch", data=small.data)
    assert away.subject is None
    assert not away.problems
    assert any("nosuch" in line for line in away.missing)
