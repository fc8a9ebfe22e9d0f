"""Runs of the original become run folders of the companion: whole ones, parts of them, several at once, broken ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from conftest import GOLDEN, Golden
from netllm_lib import runs
from netllm_lib.abr import qoe
from netllm_lib.abr.episodes import upstream_episodes
from netllm_lib.abr.evaluate import Test
from netllm_lib.abr.model import PolicyNetwork
from netllm_lib.abr.play import play
from netllm_lib.abr.policies.catalogue import load_llm_policy
from netllm_lib.abr.pool import load_pool
from netllm_lib.abr.simulator import Simulator
from netllm_lib.abr.traces import SAMPLE, Registry
from netllm_lib.abr.upstream import logs
from netllm_lib.abr.upstream.discover import discover
from netllm_lib.abr.upstream.imports import import_run
from netllm_lib.checkpoint import read_meta
from netllm_lib.cli import main
from netllm_lib.runs import read_json
from netllm_lib.training_run import TrainingRun
from upstream_tree import (
    PARTS,
    SETTINGS,
    Tree,
    arguments_line,
    console_text,
    model_path,
    remove,
    write_results,
    write_train_losses,
    write_tree,
)  # fmt: skip

RUNS = sorted(path.parent.name for path in GOLDEN.glob("upstream_run/*/run.json")) or ["absent"]
TERMINAL = "the terminal's first lines"
WRITES = {"losses": "history.parquet", "results": "tables/llm.parquet", "pool": "pool/states.npy"}
"""What an import writes for a part of the run."""
SAYS = {
    "console": "console log", "losses": "train_losses.txt", "results": "result files", "pool": "training pool", "plm": "PLM",
    "best_model": "fine-tuned weights",
}  # fmt: skip
"""How a part that is missing is called."""


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def about(run: runs.Run) -> Any:
    return read_json(run.folder / "import.json")


def problems(run: runs.Run) -> list[str]:
    return [problem["text"] for problem in about(run)["problems"]]


def replayed(run: runs.Run, results: str, registry: Registry) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(the imported policy, played as the result set says that the original tested, what the original recorded)."""
    test = Test.read(run.folder / "results" / results)
    setting = test.setting
    traces, video = registry.trace_set(setting["traces"]), registry.video(setting["video"])
    episodes = upstream_episodes(
        traces, trace_num=setting["trace_num"], fixed_order=setting["fixed"], seed=setting["seed"]
    )
    policy = load_llm_policy(run.folder, "upstream", w=setting["w"], target_return_scale=setting["target_return_scale"])
    played, recorded = play(policy, Simulator(traces, video, episodes)), test.tables["llm"]
    return played[recorded.columns.tolist()], recorded


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_a_whole_tree(tree: Tree, reports: Path) -> None:
    run = import_run(tree.root, data=SAMPLE)
    assert run.folder.parent == reports / "runs" / "import"
    assert run.folder.name.startswith("llama_tiny-bba-rank_4-")
    assert run.done
    tests = {"setting.json", "scores.json", "scores.parquet", "tables/llm.parquet"}
    assert files(run.folder) == {
        *("config.json", "manifest.json", "import.json", "training.json", "history.parquet"),
        *tests,
        *(f"results/results/{name}" for name in tests),
        *(f"pool/{name}" for name in ("config.json", "states.npy", "actions.npy", "rewards.npy", "dones.npy")),
        *("policy/config.json", "policy/modules.safetensors", "policy/adapter_config.json"),
        "policy/adapter_model.safetensors",
    }
    test = Test.read(run.folder)
    assert qoe.summarise(test.tables["llm"]).reward == pytest.approx(tree.mean_reward, abs=1e-12)
    assert set(test.tables["llm"]["trace"]) <= set(Registry(SAMPLE).trace_set("sample-test").names)
    assert (test.subject, test.setting["original"], test.setting["context"]) == ("llm", True, "leak")
    assert test.scores().mean("llm").mean == pytest.approx(tree.mean_reward, abs=1e-12)
    training = TrainingRun.read(run.folder)
    assert training.history is not None
    np.testing.assert_array_equal(training.history["loss"], logs.train_losses(tree.losses).values)
    assert (training.epochs, training.samples, training.steps, training.clip) == (3, 56, 6, "micro")
    assert training.selected_on_test
    told = about(run)
    known = {key: value for key, value in SETTINGS.items() if not key.startswith(("test_", "target_"))}
    assert runs.plain(known).items() <= told["settings"].items()
    assert told["settings"]["lora_alpha"] == 32
    assert told["problems"] == []
    assert (told["pool"]["origin"], told["pool"]["test_hash"]) == ("found", None)
    assert told["pool"]["hash"] == load_pool(run.folder).content_hash()
    assert told["weights"][0] == {"folder": str(tree.best_model), "epoch": None, "problem": None}
    assert [line.split(" (")[0] for line in told["missing"]] == [TERMINAL]
    assert (told["console"]["epochs"], told["console"]["best_epoch"]) == (3, 2)
    assert told["results"]["results"]["mean_reward"] == pytest.approx(tree.mean_reward)
    inputs = run.manifest["inputs"]
    assert {"files", "plm", "pool", "traces sample-test"} == inputs.keys()


def test_importing_again_changes_nothing(tree: Tree, reports: Path, tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {name: (run.folder / name).stat().st_mtime_ns for name in files(run.folder)}

    run = import_run(tree.root, data=SAMPLE)
    before, moved = times(), tree.copy(tmp_path / "elsewhere")
    assert import_run(moved.root, data=SAMPLE).folder == run.folder  # the same content
    write_train_losses(moved.losses, [1.0, 2.0])
    assert import_run(moved.root, data=SAMPLE).folder != run.folder
    assert times() == before


def test_an_import_that_was_interrupted_is_done_again(tree: Tree, reports: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("netllm_lib.checkpoint.save_checkpoint", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_run(tree.root, data=SAMPLE)
    (folder,) = (reports / "runs" / "import").iterdir()
    assert not runs.Run(folder).done
    run = import_run(tree.root, data=SAMPLE)
    assert (run.folder, run.done) == (folder, True)


@pytest.mark.parametrize(
    "changes", [{}, {"rank": -1}, {"early_stop": 0}, {"plm_type": "t5-lm", "sample_step": 2}], ids=str
)
def test_a_test_is_reproduced_from_the_import(tmp_path: Path, reports: Path, changes: dict[str, Any]) -> None:
    tree = write_tree(tmp_path / "NetLLM", **changes)
    run = import_run(tree.root, data=SAMPLE)
    assert about(run)["problems"] == []
    played, recorded = replayed(run, "results", Registry(SAMPLE))
    np.testing.assert_array_equal(played["level"], recorded["level"])
    pd.testing.assert_frame_equal(played, recorded, rtol=1e-9)
    meta = read_meta(run.folder / "policy", PolicyNetwork)
    assert (meta.layers, meta.settings.w) == (1 if "early_stop" in changes else 2, 5)
    assert meta.settings.pool_hash == load_pool(tree.pool).content_hash()


# --- parts ----------------------------------------------------------------------------------------------------------

SUBSETS = [
    *[[part] for part in PARTS if part not in ("pool", "plm")],
    *[[other for other in PARTS if other != part] for part in ("best_model", "pool", "plm")],
    ["checkpoint", "pool", "plm"],
]


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
def test_any_part_of_a_tree(tree: Tree, reports: Path, tmp_path: Path, nowhere: Path, parts: list[str]) -> None:
    some = tree.copy(tmp_path / "some", parts)
    run = import_run(some.root, data=nowhere)
    assert run.done
    present, told = files(run.folder), about(run)
    for part, written in WRITES.items():
        expected = part in parts or (written == "history.parquet" and "console" in parts)  # the losses by epoch
        assert (written in present) == expected, part
    assert (told["console"] is not None) == ("console" in parts)
    weights = "best_model" in parts or "checkpoint" in parts
    assert ("policy/config.json" in present) == (weights and {"pool", "plm"} <= set(parts))
    for part, name in SAYS.items():
        there = weights if part == "best_model" else part in parts
        assert any(line.startswith(name) for line in told["missing"]) == (not there), (part, told["missing"])
    assert told["problems"] == []
    if set(parts) & {"console", "losses", "best_model", "checkpoint"}:
        assert told["settings"]["lr"] == 0.0001
        assert TrainingRun.read(run.folder).warmup_steps == 2000
    if parts == ["checkpoint", "pool", "plm"]:
        assert any("checkpoint of epoch 2" in note for note in told["notes"])


def test_a_part_given_by_its_own_place(tree: Tree, reports: Path) -> None:
    """The names of the folders above tell the settings nevertheless."""
    for place in (tree.console, tree.run, tree.best_model, tree.checkpoint, tree.losses):
        found = discover(place)
        assert found.settings["warmup_steps"] == 2000, place
        assert found.name == "llama_tiny-bba-rank_4", place
    found = discover(tree.results)
    assert (found.settings["rank"], found.results[0].name) == (4, "results")
    assert found.results[0].settings["test_trace_num"] == 3
    found = discover(tree.console)
    assert found.console is not None
    assert (found.losses, found.weights, found.results) == (None, [], [])


def test_files_without_any_telling_name(tree: Tree, reports: Path, tmp_path: Path) -> None:
    mail = tmp_path / "from a user"
    shutil.copytree(tree.results, mail / "my results")
    shutil.copytree(tree.best_model, mail / "weights")
    (mail / "what it printed.txt").write_text("They wrote:\n" + tree.console.read_text()[200:])
    shutil.copy(tree.losses, mail)
    os.mkfifo(mail / "pipe.log")  # never opened
    found = discover(mail)
    assert (found.console_file, found.losses) == (mail / "what it printed.txt", mail / "train_losses.txt")
    assert [result.name for result in found.results] == ["my_results"]
    assert found.settings["lr"] == 0.0001  # from the paths that the log prints
    run = import_run(mail, data=SAMPLE, pool=tree.pool, plm=tree.plm)
    assert about(run)["pool"]["test_hash"] is None
    assert (run.folder / "policy" / "config.json").is_file()
    test = Test.read(run.folder)
    assert set(test.tables["llm"]["trace"]) <= set(Registry(SAMPLE).trace_set("sample-test").names)
    assert test.setting["traces"] == "sample-test"  # told by the files' names
    assert "seed" not in test.setting


def test_a_bare_console_log(tree: Tree, reports: Path, tmp_path: Path) -> None:
    log = tmp_path / "nohup.out"
    log.write_bytes("\r\n".join([*tree.console.read_text().splitlines()[5:30], ""]).encode("utf-16"))  # by PowerShell
    run = import_run(log, data=SAMPLE)
    assert {"import.json", "training.json"} <= files(run.folder)
    assert about(run)["settings"]["warmup_steps"] == TrainingRun.read(run.folder).warmup_steps == 2000
    assert any("only a part" in note or "ends after" in note for note in about(run)["notes"])


def test_baselines_come_along(tree: Tree, reports: Path, tmp_path: Path) -> None:
    some = tree.copy(tmp_path / "some", ["results"])
    table = logs.read_results(some.results, "sample-test")
    test = some.results.parents[1]
    for name in ("mpc/seed_1", "udr_1/seed_1", "udr_1/seed_2"):
        write_results(test / name, table, "sample-test", blank_line=True)
    found = discover(some.root)
    assert {(r.name, r.baseline) for r in found.results} == {
        *(("results", None), ("results-mpc", "mpc"), ("results-udr_1", "udr_1"), ("results-udr_1-4", "udr_1"))
    }
    run = import_run(some.root, data=SAMPLE)
    tables = Test.read(run.folder).tables
    assert set(tables) == {"llm", "mpc (original)", "udr_1 (original)", "udr_1 (original) results-udr_1-4"}
    with pytest.raises(FileNotFoundError, match="nothing that the original leaves behind"):
        discover(test / "mpc")


# --- several runs ---------------------------------------------------------------------------------------------------


def second_run(tree: Tree, root: Path, **changes: Any) -> Tree:
    """A copy of the tree with a second training run in it."""
    both = tree.copy(root)
    settings = {**tree.settings, **changes}
    other = both.run.parents[2] / model_path(settings)
    shutil.copytree(both.run, other)
    console = next(other.glob("*console.log"))
    console.write_text(console_text(settings, np.full((3, 10), 1.5)))
    return both


def test_several_runs_are_listed_and_chosen_from(tree: Tree, reports: Path, tmp_path: Path) -> None:
    both = second_run(tree, tmp_path / "both", lr=0.001)
    with pytest.raises(ValueError, match=r"2 runs in it, choose one.*_lr_0\.0001_.*; .*_lr_0\.001_"):
        discover(both.root)
    with pytest.raises(ValueError, match=r"'lr_0\.1' fits 0 of 2 runs in it, .*lr_0\.0001"):
        discover(both.root, "lr_0.1")
    found = discover(both.root, "_lr_0.001_")
    assert found.settings["lr"] == 0.001
    assert discover(both.root, found.run).run == found.run
    assert any("may belong to another run" in note for note in found.notes)  # of the same name
    assert discover(both.run).settings["lr"] == 0.0001
    other = second_run(tree, tmp_path / "other", rank=16)
    assert discover(other.root, "rank_16").results == []
    assert [r.name for r in discover(other.root, "rank_4").results] == ["results"]


def test_several_logs_and_several_results_alone(tree: Tree, reports: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("a.log", "b.log"):
        shutil.copy(tree.console, tmp_path / "logs" / name)
    with pytest.raises(ValueError, match=r"2 runs in it.*a\.log; b\.log"):
        discover(tmp_path / "logs")
    assert discover(tmp_path / "logs", "a.log").console_file == tmp_path / "logs" / "a.log"
    some = tree.copy(tmp_path / "some", ["results"])
    shutil.copytree(some.results, some.results.with_name(some.results.name.replace("rank_4", "rank_64")))
    with pytest.raises(ValueError, match="2 runs in it"):
        discover(some.root)
    assert discover(some.root, "rank_64").settings["rank"] == 64
    assert [r.name for r in discover(some.root, "rank_4").results] == ["results"]


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_that_differ_are_noted(tree: Tree, reports: Path, tmp_path: Path) -> None:
    odd = tree.copy(tmp_path / "odd", ["console", "results", "best_model"])
    path = odd.best_model / "adapter_config.json"
    told = json.loads(path.read_text()) | {"r": 8}
    path.write_text(json.dumps(told))
    line = arguments_line({**tree.settings, "lr": 0.5}, "artifacts/exp_pools/exp_pool.pkl")
    other = arguments_line(tree.settings, tree.pool, adapt=False)
    odd.console.write_text(line + odd.console.read_text() + other)
    run = import_run(odd.root, data=SAMPLE)
    settings, said = about(run)["settings"], about(run)["notes"]
    assert [settings[key] for key in ("rank", "grad_accum_steps", "scale")] == [4, 32, 1000]
    assert "rank: 4, but 8 by the adapter_config.json" in said
    assert "lr: 0.0001, but 0.5 by the console log's arguments" in said
    assert any(line.startswith("pool: sample-train_sample") for line in said)
    assert not any(line.startswith(TERMINAL) for line in about(run)["missing"])


def test_notes_on_what_does_not_fit_together(tree: Tree, reports: Path, tmp_path: Path) -> None:
    odd = tree.copy(tmp_path / "odd")
    remove(logs.result_files(odd.results)[0])
    odd.console.write_text(odd.console.read_text().replace(str(tree.mean_reward), "0.5"))
    notes = "\n".join(about(import_run(odd.root, data=SAMPLE))["notes"])
    assert "2 result files, the name says 3" in notes
    assert "not the 0.500000 of the console log, so another test" in notes
    write_train_losses(odd.losses, logs.train_losses(odd.losses).values[:-3])
    text = odd.console.read_text()
    odd.console.write_text(text[: text.index("Training Iteration #2")])
    notes = "\n".join(about(import_run(odd.root, data=SAMPLE))["notes"])
    assert "ends after epoch 2 of 3" in notes
    assert "it is not the training pool, or training was not finished" in notes


# --- the command ----------------------------------------------------------------------------------------------------


def netllm(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return int(stopped.value.code or 0)


def test_command_line(tree: Tree, reports: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert netllm("import", str(tree.root), "--data", str(SAMPLE), "--json") == 0
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    assert result["mean_reward"] == {"results": pytest.approx(tree.mean_reward)}
    assert result["console_mean_reward"] == pytest.approx(tree.mean_reward)
    assert result["policy"] is True
    assert f"run folder: {result['run']}" in lines
    assert any(f"mean reward {tree.mean_reward:.6f}" in line for line in lines)
    both = second_run(tree, tmp_path / "both", lr=0.001)
    assert netllm("import", str(both.root)) == 2
    assert "2 runs in it, choose one with --run" in capsys.readouterr().err
    words = ["--run", "lr_0.001", "--pool", str(tree.pool), "--plm", str(tree.plm), "--data", str(SAMPLE)]
    assert netllm("import", str(both.root), *words) == 0
    assert "missing:\n  the terminal's first lines" in capsys.readouterr().out


# --- the original ---------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("name", RUNS)
def test_complete_runs_of_the_original(golden: Golden, reports: Path, tmp_path: Path, nowhere: Path, name: str) -> None:
    folder = golden("upstream_run", name)
    described = read_json(folder / "run.json")
    run = import_run(folder, pool=folder / described["pool"], data=nowhere)
    told = about(run)
    assert {name: result["mean_reward"] for name, result in told["results"].items()} == {
        "results": pytest.approx(described["mean"], abs=1e-12),
        "results_test_alone": pytest.approx(described["mean_alone"], abs=1e-12),
    }
    assert told["console"]["mean_reward"] == pytest.approx(described["mean"], abs=1e-12)
    assert (told["settings"]["plm_type"], told["settings"]["seed"]) == (described["plm_type"], described["seed"])
    assert told["problems"] == []
    assert not any("not the training pool" in note or ", but " in note for note in told["notes"])
    meta = read_meta(run.folder / "policy", PolicyNetwork)
    assert meta.settings.pool_hash == load_pool(folder / described["pool"]).content_hash()
    test = Test.read(run.folder)
    assert told["chosen"] == "results_test_alone"  # which can be reproduced
    assert test.scores().mean("llm").mean == pytest.approx(described["mean_alone"], abs=1e-12)
    assert {key: test.setting[key] for key in ("traces", "video", "trace_num", "seed")} == {
        key: described[key] for key in ("traces", "video", "trace_num", "seed")
    }
    assert [line.split(" (")[0] for line in told["missing"]] == [TERMINAL]


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_originals_test_is_reproduced_through_the_import(
    golden: Golden, real_data: Path, reports: Path, name: str
) -> None:
    """The pool made anew or given, the weights converted: the same level on every chunk of every trace, the same mean."""
    folder = golden("upstream_run", name)
    described = read_json(folder / "run.json")
    run = import_run(folder, pool=folder / described["pool"], data=real_data)
    assert about(run)["pool"]["test_hash"] is None
    played, recorded = replayed(run, "results_test_alone", Registry(real_data))
    np.testing.assert_array_equal(played["level"], recorded["level"])
    pd.testing.assert_frame_equal(played, recorded, rtol=1e-9)
    assert qoe.summarise(played).reward == pytest.approx(described["mean_alone"], abs=1e-12)
