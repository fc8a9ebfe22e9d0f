"""Evidence from folders: trees of the original in any state, run folders of the companion, and the command that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llm_fixtures import tiny_network
from netllm_lib import runs
from netllm_lib.abr.batches import WindowConfig, make_windows, pool_returns
from netllm_lib.abr.diagnosis import diagnose
from netllm_lib.abr.diagnosis import load as sources
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.catalogue import make_policy
from netllm_lib.abr.policies.llm import EvalConfig, LLMPolicy
from netllm_lib.abr.pool import generate_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.abr.upstream.imports import import_run
from netllm_lib.checkpoint import describe, save_checkpoint
from netllm_lib.cli import main
from netllm_lib.train import TrainConfig
from upstream_tree import Tree, write_tree

REGISTRY = Registry(SAMPLE)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return write_tree(tmp_path_factory.mktemp("original") / "tree")


# --- the original's ------------------------------------------------------------------------------------------------------


def test_a_whole_tree(tree: Tree) -> None:
    evidence = sources.load(tree.root, data=SAMPLE)
    assert evidence.table is not None
    assert evidence.pool is not None
    assert evidence.subject is not None
    assert evidence.subject.config == EvalConfig.upstream(w=5, target_return_scale=1.0)
    assert evidence.training is not None
    assert (evidence.training.lr, evidence.training.warmup_steps) == (1e-4, 2000)
    assert evidence.training.accumulation_assumed
    assert evidence.setting["choose"] == "sample"
    assert evidence.setting["train_w"] == 5


@pytest.mark.parametrize(
    ("parts", "there"),
    [
        (["results"], {"table"}),
        (["losses"], {"training", "pool"}),
        (["console"], {"training", "pool"}),
        (["best_model"], {"training", "pool"}),
        (["best_model", "plm"], {"training", "pool", "subject"}),
        (["results", "losses", "pool"], {"table", "training", "pool"}),
    ],
)
def test_any_part_of_a_tree(tree: Tree, tmp_path: Path, parts: list[str], there: set[str]) -> None:
    evidence = sources.load(tree.copy(tmp_path / "part", parts).root, data=SAMPLE)
    found = {name for name in ("table", "training", "pool", "subject") if getattr(evidence, name) is not None}
    assert found == there
    assert evidence.missing
    assert diagnose(evidence).missing == evidence.missing


def test_the_pool_that_a_test_was_given(tree: Tree, tmp_path: Path) -> None:
    traces, video = REGISTRY.trace_set("sample-train"), REGISTRY.video("sample")
    other = generate_pool(
        make_policy("mpc", video, REGISTRY), traces, video, upstream_episodes(traces, trace_num=8, pool=True)
    )
    other.save(tmp_path / "other")
    evidence = sources.load(tree.root, pool=tmp_path / "other", data=SAMPLE)
    assert evidence.test_pool is not None
    assert evidence.pool is not None
    assert evidence.test_pool.content_hash() == other.content_hash() != evidence.pool.content_hash()
    assert evidence.subject is not None
    assert evidence.subject.test_scale == pool_returns(other)[1]
    assert "wrong-pool" in {finding.id for finding in diagnose(evidence).findings}


def test_an_import_of_it_says_the_same(tree: Tree, tmp_path: Path) -> None:
    imported = import_run(tree.root, data=SAMPLE, root=tmp_path).folder
    evidence, direct = sources.load(imported, data=SAMPLE), sources.load(tree.root, data=SAMPLE)
    assert evidence.subject is not None
    assert direct.subject is not None
    assert evidence.subject.config == direct.subject.config
    assert evidence.pool is not None
    ids = [[f.id for f in diagnose(e).findings if f.severity == "cause"] for e in (evidence, direct)]
    assert ids[0] == ids[1]


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
def run_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """03/, 04/ and 05/ as the notebooks leave them, of an untrained network; 05 knows 04, which knows 03."""
    root = tmp_path_factory.mktemp("runs")
    train, test, video = REGISTRY.trace_set("sample-train"), REGISTRY.trace_set("sample-test"), REGISTRY.video("sample")
    pool = generate_pool(
        make_policy("bba", video, REGISTRY), train, video, upstream_episodes(train, trace_num=-1, pool=True)
    )
    pool.save(root / "03" / "pool")
    runs.write_json(root / "03" / "split.json", {"traces": "sample-train", "video": "sample", "validation": []})

    network = tiny_network()
    windows = make_windows(pool, WindowConfig.upstream())
    train = {**runs.plain(TrainConfig(clip="micro", accumulation=4)), "data": windows.facts}
    meta = describe(network, windows.settings, train)
    save_checkpoint(root / "04" / "policy", network, meta)
    metrics = {
        "steps": 90,
        "warmup_steps": 9,
        "lr": 1e-3,
        "lr_peak": 1e-3,
        "final_loss": 1.7,
        "pool_hash": pool.content_hash(),
    }
    runs.write_json(root / "04" / "metrics.json", metrics)
    runs.write_json(root / "04" / "config.json", {"parameters": {"pool_dir": str(root / "03")}})

    episodes = upstream_episodes(test, trace_num=-1, clock="episode")
    for place, seed in (("05", 1), ("05-again", 2)):
        policy = LLMPolicy(network, meta, EvalConfig(choose="sample"))
        tables = {"llm": policy, "mpc (original)": make_policy("mpc", video, REGISTRY, "upstream")}
        (root / place / "tables").mkdir(parents=True)
        for name, player in tables.items():
            drawn = upstream_episodes(test, trace_num=-1, seed=seed, clock="episode") if name == "llm" else episodes
            play(player, Simulator(test, video, drawn)).to_parquet(root / place / "tables" / f"{name}.parquet")
        setting = {"traces": "sample-test", "video": "sample", "order": list(tables), "seed": seed, "choose": "sample"}
        runs.write_json(root / place / "setting.json", setting)
        runs.write_json(root / place / "config.json", {"parameters": {"policy": str(root / "04")}})
    return root


def test_a_test_leads_to_its_training_and_pool(run_folders: Path) -> None:
    evidence = sources.load(run_folders / "05", data=SAMPLE)
    assert evidence.run == "llm"
    assert evidence.reference == "mpc (original)"
    assert evidence.training is not None
    assert evidence.training.steps == 90
    assert evidence.training.clip == "micro"
    assert evidence.training.crossing, "windows of the original cross episodes"
    assert evidence.pool is not None
    assert evidence.subject is not None
    assert evidence.subject.config == EvalConfig(choose="sample")
    assert evidence.setting["train_traces"] == "sample-train"
    assert evidence.clean is not None
    assert evidence.clean.shape == (30,)
    assert evidence.missing == ()
    first = diagnose(evidence).first
    assert first is not None
    assert first.id == "undertrained"


def test_each_folder_alone_and_further_seeds(run_folders: Path) -> None:
    assert sources.load(run_folders / "03", data=SAMPLE).pool is not None
    alone = sources.load(run_folders / "04" / "policy", data=SAMPLE)
    assert alone.subject is not None
    assert alone.training is not None
    assert alone.training.accumulation == 4
    both = sources.load(run_folders / "05", run_folders / "05-again", data=SAMPLE)
    assert len(both.seeds) == 1
    assert not np.array_equal(both.seeds[0]["level"], both.tables["llm"]["level"])
    over = diagnose(both).over_seeds
    assert over is not None
    assert both.gap is not None
    assert over.mean != both.gap.mean


def test_broken_folders_are_refused_by_name(run_folders: Path, tmp_path: Path) -> None:
    runs.write_json(tmp_path / "setting.json", {"traces": "sample-test", "video": "sample", "order": ["llm"]})
    with pytest.raises(FileNotFoundError, match=r"llm\.parquet"):
        sources.load(tmp_path, data=SAMPLE)
    with pytest.raises(ValueError, match="which run"):
        sources.load(data=SAMPLE)


def test_an_adapter_that_does_not_fit_is_a_finding(tree: Tree, tmp_path: Path) -> None:
    other = write_tree(tmp_path / "other", rank=2, plm_type="gpt2")
    mixed = tree.copy(tmp_path / "mixed")
    wrong, right = (next(t.root.rglob("early_stop_-1_best_model")) for t in (other, mixed))
    for file in right.iterdir():
        file.unlink()
    for file in wrong.iterdir():
        (right / file.name).write_bytes(file.read_bytes())
    evidence = sources.load(mixed.root, data=SAMPLE)
    assert evidence.subject is None
    first = diagnose(evidence).first
    assert first is not None
    assert first.id == "adapter-not-applied"
