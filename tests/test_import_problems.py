"""Imports of runs of the original: the training pool, and files that are broken or do not fit."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Golden
from llm_fixtures import toy_pool
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.pool import ExperiencePool, concatenate, load_pool
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.abr.upstream import names
from netllm_lib.abr.upstream.discover import discover
from netllm_lib.abr.upstream.imports import import_run
from netllm_lib.abr.upstream.pickles import write_pool
from netllm_lib.abr.upstream.remake import remake_pool
from netllm_lib.checkpoint import read_meta
from netllm_lib.runs import read_json
from test_importing import about, problems, replayed
from upstream_tree import PARTS, SETTINGS, Tree, remove, write_tree

# --- the pool -------------------------------------------------------------------------------------------------------


def test_a_pool_is_made_anew_where_the_data_are(tree: Tree, reports: Path, tmp_path: Path) -> None:
    run = import_run(tree.copy(tmp_path / "some", [part for part in PARTS if part != "pool"]).root, data=SAMPLE)
    digest = load_pool(tree.pool).content_hash()
    expected = {"origin": "made anew", "named": tree.settings["pool"], "test_hash": None}
    assert about(run)["pool"] == expected | {"hash": digest}
    assert load_pool(run.folder).content_hash() == digest
    assert (run.folder / "policy" / "config.json").is_file()


def test_another_pool_than_the_one_named(tree: Tree, reports: Path, tmp_path: Path, nowhere: Path) -> None:
    """The training's is the one that the run's folder names; the test was given the other one."""
    pool, short = (toy_pool(length=length).save(tmp_path / str(length)) for length in (47, 30))
    digest = load_pool(pool).content_hash()
    some = tree.copy(tmp_path / "some", [part for part in PARTS if part != "pool"])
    for root, data, origin in ((some.root, SAMPLE, "made anew"), (tree.root, nowhere, "found")):
        run = import_run(root, data=data, pool=pool)
        told = about(run)["pool"]
        assert (told["origin"], told["test_hash"]) == (origin, digest)
        assert told["hash"] == load_pool(tree.pool).content_hash()
        assert load_pool(run.folder / "test_pool").content_hash() == digest
        assert read_meta(run.folder / "policy", PolicyNetwork).settings.pool_hash == told["hash"]
    run = import_run(some.root, data=nowhere, pool=pool)
    assert any("it is not the training pool" in note for note in about(run)["notes"])
    run = import_run(some.root, data=nowhere, pool=short)
    assert ["not the training pool" in text for text in problems(run)] == [True]


def test_pools_in_the_tree(tree: Tree, reports: Path, tmp_path: Path, nowhere: Path) -> None:
    some = tree.copy(tmp_path / "some")
    other = some.pool.parents[2] / "sample-train_sample" / "mpc" / some.pool.parent.name / "exp_pool.pkl"
    write_pool(toy_pool(), other)
    assert discover(some.root).pools == [some.pool]  # the one of the run's name
    remove(some.pool)
    found = discover(some.root)
    assert found.pools == []
    assert any("none of the 1 pools here is sample-train_sample_bba" in note for note in found.notes)
    for name in ("a.pkl", "b.pkl"):
        write_pool(toy_pool(), some.root / name)
    assert len(discover(some.root).pools) == 2
    (some.root / "other.pkl").write_bytes(b"something else")
    assert len(discover(some.root).pools) == 2
    run = import_run(some.root, data=nowhere)
    assert any("2 pools here, name one with --pool" in line for line in about(run)["missing"])


def test_remaking_pools_of_several_policies() -> None:
    def made(*models: str, count: int = -1, fixed: bool = False, **changes: Any) -> ExperiencePool:
        asked = {"pool_models": models, "pool_trace_num": count, "pool_fixed": fixed}
        return remake_pool(SETTINGS | asked | changes, Registry(SAMPLE))

    bba, mpc = made("bba", count=5, fixed=True), made("mpc", count=5, fixed=True)
    together = made("bba", "mpc", count=5, fixed=True)
    assert together.content_hash() == concatenate([bba, mpc]).content_hash()
    assert len(made("bba")) == len(made("bba", count=1000)) == 60 * 47
    assert made("bba").content_hash() == made("bba", count=60, fixed=True).content_hash()
    with pytest.raises(ValueError, match="several policies and a random order"):
        made("bba", "mpc", count=5)
    with pytest.raises(ValueError, match="mine is not a policy of the original"):
        made("mine")
    with pytest.raises(ValueError, match="nothing tells train_traces, train_video"):
        remake_pool({"pool": "artifacts_exp_pools"}, Registry(SAMPLE))
    with pytest.raises(FileNotFoundError, match="trace set 'fcc-train' not found"):
        made("bba", train_traces="fcc-train")


@pytest.mark.golden
def test_pools_of_the_original_are_made_anew(golden: Golden, real_data: Path) -> None:
    registry = Registry(real_data)
    made = remake_pool(names.settings_of("fcc-train_video1_mpc_seed_1_trace_num_100_fixed_False_ss_5"), registry)
    assert made.content_hash() == load_pool(golden("plm", "mpc100_exp_pool.pkl")).content_hash()
    for name, how in read_json(golden("abr", "pools", "summary.json")).items():
        settings = {
            "train_traces": how["traces"], "train_video": how["video"], "pool_models": (how["policy"],),
            "pool_trace_num": how["trace_num"], "pool_fixed": how["fixed"], "pool_seed": how["seed"],
        }  # fmt: skip
        try:
            made = remake_pool(settings, registry)
        except OSError as error:
            pytest.skip(str(error))
        np.testing.assert_array_equal(made.actions, np.load(golden("abr", "pools", f"{name}.npz"))["actions"])


def test_a_pool_that_ends_within_an_episode(tree: Tree, reports: Path, tmp_path: Path, nowhere: Path) -> None:
    some, pool = tree.copy(tmp_path / "some"), load_pool(tree.pool)
    write_pool(dataclasses.replace(pool, dones=pool.dones & (np.arange(len(pool)) < len(pool) - 1)), some.pool)
    run = import_run(some.root, data=nowhere)
    assert about(run)["problems"] == []
    assert (load_pool(run.folder).dones.sum(), len(load_pool(run.folder).episode_starts)) == (5, 6)
    assert (run.folder / "policy").is_dir()


def test_a_whole_gpt2_with_an_early_stop_is_the_original_s_file_both_ways(tmp_path: Path, reports: Path) -> None:
    """It has no positions, and layers that are never reached; the test is that of the weights."""
    tree = write_tree(tmp_path / "NetLLM", plm_type="gpt2", rank=-1, early_stop=0)
    keys = torch.load(tree.best_model / "model.bin", weights_only=True).keys()
    assert "plm.wpe.weight" not in keys
    assert {"plm.wte.weight", "plm.h.0.mlp.c_fc.weight", "plm.h.1.mlp.c_fc.weight"} <= keys
    run = import_run(tree.root, data=SAMPLE)
    assert problems(run) == []
    played, recorded = replayed(run, "results", Registry(SAMPLE))
    np.testing.assert_array_equal(played["level"], recorded["level"])


# --- broken files ---------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(b"<!doctype html><p>503")


class Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("ran",))


def hostile(path: Path) -> None:
    torch.save({"weight": Evil()}, path)


BROKEN: list[tuple[str, str, Callable[[Path], None], str | None]] = [
    ("results", "result_sim_abr_sample-test_*", cut, "protocol-mismatch"),
    ("results", "result_sim_abr_sample-test_*", garbage, "protocol-mismatch"),
    ("losses", "", garbage, None),
    ("console", "", garbage, None),
    ("best_model", "adapter_model.bin", cut, "wrong-checkpoint"),
    ("best_model", "adapter_model.bin", hostile, "wrong-checkpoint"),
    ("best_model", "modules_except_plm.bin", cut, "wrong-checkpoint"),
    ("best_model", "modules_except_plm.bin", hostile, "wrong-checkpoint"),
    ("best_model", "adapter_config.json", cut, "wrong-checkpoint"),
    ("pool", "", cut, None),
]


@pytest.mark.parametrize(("part", "pattern", "how", "finding"), BROKEN)
def test_a_broken_file_is_left_out_and_named(
    tree: Tree, reports: Path, tmp_path: Path, monkeypatch: Any, part: str, pattern: str, how: Any, finding: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    some = tree.copy(tmp_path / "some")
    path = Path(getattr(some, part))
    path = next(path.glob(pattern)) if pattern else path
    how(path)
    run = import_run(some.root, data=SAMPLE)
    (problem,) = about(run)["problems"]
    assert path.name in problem["text"]
    assert "\n" not in problem["text"]
    assert problem["finding"] == finding
    assert (run.folder / "policy").is_dir() == (part != "best_model")  # the pool is made anew
    assert not (tmp_path / "ran").exists()


def test_what_is_asked_for_must_be_there_and_sound(tree: Tree, reports: Path, tmp_path: Path) -> None:
    some = tree.copy(tmp_path / "some")
    (weights,) = some.plm.glob("*.safetensors")
    cut(weights)
    run = import_run(some.root, data=SAMPLE)
    assert any(line.startswith("PLM") and "model.safetensors" in line for line in about(run)["missing"])
    assert not (run.folder / "policy").exists()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        import_run(some.root, data=SAMPLE, plm=some.plm)
    with pytest.raises(FileNotFoundError, match="no PLM"):
        import_run(some.root, data=SAMPLE, plm=str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="no such experience pool"):
        import_run(some.root, data=SAMPLE, pool=tmp_path / "nothing.pkl")
    (some.best_model / "modules_except_plm.bin").unlink()
    found = discover(some.root)
    assert found.best is not None
    assert found.best.epoch == 2
    shutil.rmtree(some.checkpoint)
    assert ["modules_except_plm.bin is missing" in text for text in problems(import_run(some.root))] == [True]


def test_a_plm_that_the_weights_do_not_fit(tree: Tree, reports: Path, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "other", plm_type="gpt2")
    some = tree.copy(tmp_path / "some")  # where the original would load the adapter without a word
    for name in ("adapter_config.json", "adapter_model.bin"):
        shutil.copy(other.best_model / name, some.best_model)
    for run in (import_run(tree.root, data=SAMPLE, plm=other.plm), import_run(some.root, data=SAMPLE)):
        (problem,) = about(run)["problems"]
        assert problem["finding"] == "adapter-not-applied"
        assert "LoRA targets" in problem["text"]
        assert not (run.folder / "policy").exists()
        assert (run.folder / "tables" / "llm.parquet").is_file()


def test_a_run_that_diverged(tree: Tree, reports: Path, tmp_path: Path) -> None:
    """Which an adapter shows also where pool and PLM are not at hand."""
    some = tree.copy(tmp_path / "some")
    path = some.best_model / "adapter_model.bin"
    weights = torch.load(path, weights_only=True)
    torch.save({key: torch.full_like(value, float("nan")) for key, value in weights.items()}, path)
    alone = tree.copy(tmp_path / "alone", ["console", "losses", "results"])
    shutil.copytree(some.best_model, alone.best_model)
    for root in (some.root, alone.root):
        run = import_run(root, data=SAMPLE)
        (problem,) = about(run)["problems"]
        assert problem["finding"] == "non-finite"
        assert "adapter_model.bin" in problem["text"]
        assert not (run.folder / "policy").exists()
    torch.save({key: torch.zeros_like(value) for key, value in weights.items()}, path)
    shutil.copy(path, alone.best_model)
    assert about(import_run(alone.root))["problems"][0]["finding"] == "adapter-not-applied"


def test_folders_without_anything(tmp_path: Path, tree: Tree, reports: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        discover(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match="nothing that the original leaves behind"):
        discover(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nothing that the original leaves behind"):
        discover(import_run(tree.root, data=SAMPLE).folder)  # the companion's own
    with pytest.raises(ValueError, match=r"readme\.txt: no line that the original prints"):
        discover(tmp_path / "empty" / "readme.txt")
