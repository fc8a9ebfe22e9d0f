"""Memory known before loading, and gradient checkpointing only where memory asks for it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from llm_fixtures import FAMILIES, batch_loss, stir, tiny_network, toy_pool, train_on, write_plm
from netllm_lib import preflight as planning
from netllm_lib.abr.batches import WindowConfig, example_batch, make_windows
from netllm_lib.abr.model import NetworkConfig, PolicyNetwork
from netllm_lib.plm import PLMConfig, load_plm, sketch_plm
from netllm_lib.preflight import Memory, estimate_memory, preflight
from netllm_lib.train import TrainConfig

FLOAT32 = TrainConfig(precision="float32")
WINDOWS = make_windows(toy_pool())


def shape_only(folder: Path, **sizes: Any) -> str:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "vocab_size": 100}
    LlamaConfig(**(shape | sizes), num_attention_heads=4, num_key_value_heads=2).save_pretrained(folder)
    return str(folder)


def memory_of(plm: PLMConfig, windows: int = 8, train: TrainConfig = FLOAT32, checkpointing: bool = False) -> Memory:
    return estimate_memory(PolicyNetwork(sketch_plm(plm)), example_batch(windows), train, checkpointing)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sketch_has_the_sizes_of_the_plm(tmp_path: Path, family: str) -> None:
    config = PLMConfig(str(write_plm(tmp_path / family, family, layers=3)), layers=2, rank=4)
    sketch, plm = sketch_plm(config), load_plm(config)
    assert {name: p.shape for name, p in sketch.named_parameters()} == {n: p.shape for n, p in plm.named_parameters()}
    assert sketch.trainable().keys() == plm.trainable().keys()
    assert (sketch.layers, sketch.hidden_size, sketch.family) == (plm.layers, plm.hidden_size, plm.family)
    assert sketch.device.type == "meta"


def test_a_sketch_needs_no_weights_and_no_memory(tmp_path: Path) -> None:
    """A 70B-shaped PLM."""
    folder = shape_only(tmp_path, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    sketch = sketch_plm(PLMConfig(folder, dtype="bfloat16"))
    assert sum(p.numel() for p in sketch.parameters()) > 6e10
    flight = preflight(PolicyNetwork(sketch), WINDOWS)
    assert flight.seconds is None
    assert any("exceeds" in warning for warning in flight.warnings)


def test_what_is_counted_is_what_there_is(tmp_path: Path) -> None:
    """Weights, gradients and moments against those of a network that has them; whole sizes from the first layers."""
    plm = PLMConfig(shape_only(tmp_path), rank=8, random_weights=True)
    network = PolicyNetwork(load_plm(plm)).train()
    memory, trained = estimate_memory(network, example_batch(8), FLOAT32), list(network.trainable().values())
    assert memory == memory_of(plm)
    assert memory.weights == pytest.approx(sum(p.nbytes for p in network.parameters()), rel=1e-3)
    batch_loss(network, WINDOWS.batch(list(range(8)))).backward()
    assert memory.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = optimizer.state.values()
    assert memory.optimizer == sum(t.nbytes for state in states for t in state.values() if t.ndim)
    cache = network.eval().rehearse(WINDOWS.batch([0]), None)
    assert memory.test_peak - planning.LIBRARIES_BYTES["cpu"][1] > memory.weights + cache.nbytes


def test_kept_for_the_backward_pass(tmp_path: Path) -> None:
    """The traced peak against the tensors that autograd really saves."""
    plm = PLMConfig(shape_only(tmp_path, num_hidden_layers=6), rank=8, random_weights=True)
    network, saved = PolicyNetwork(load_plm(plm)).train(), dict[int, int]()
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = batch_loss(network, WINDOWS.batch(list(range(8))))  # alive, so that no storage is used twice
    kept = sum(saved.values())
    del loss
    assert memory_of(plm).activations == pytest.approx(kept, rel=0.15)
    assert memory_of(plm, checkpointing=True).activations < 0.5 * kept


def test_the_estimate_follows_what_is_asked(tmp_path: Path) -> None:
    folder = shape_only(tmp_path, num_hidden_layers=3)

    def peak(windows: int = 8, **changes: Any) -> Memory:
        return memory_of(PLMConfig(folder, **{"rank": 8, **changes}), windows)

    plain, half, four = peak(), peak(dtype="bfloat16"), peak(dtype="4bit")
    assert peak(16).activations == pytest.approx(2 * plain.activations, rel=0.1)
    frozen = sum(p.nbytes for p in sketch_plm(PLMConfig(folder, rank=0)).parameters())
    assert plain.weights - half.weights == pytest.approx(frozen / 2, rel=0.01)
    assert half.optimizer == plain.optimizer
    assert four.weights < plain.weights - 0.8 * frozen
    assert peak(rank=0).optimizer < plain.optimizer


def test_seven_billion_parameters_on_one_card(tmp_path: Path) -> None:
    """Mistral-7B's shape, rank 128, w 20, bfloat16 weights: at most 20 GiB, known without any of them."""
    LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ).save_pretrained(tmp_path)
    plm, half = PLMConfig(str(tmp_path), dtype="bfloat16", device="cuda"), TrainConfig(precision="bfloat16")
    memory = memory_of(plm, 2, half)
    assert 13e9 < memory.weights < 15e9
    assert memory.peak < 20 * 2**30
    assert memory_of(plm, 8, half, checkpointing=True).train_peak < 17e9


def test_checkpointing_is_on_only_where_memory_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, windows = TrainConfig(epochs=1, batch=4, precision="float32"), make_windows(toy_pool(), WindowConfig(w=8))
    losses = {}
    for name, memory in (("large", 1e12), ("small", 4.9e8)):
        monkeypatch.setattr(planning, "_device_bytes", lambda device, memory=memory: memory)
        network = tiny_network(lora_dropout=0.0)
        losses[name] = train_on(network, windows, config, tmp_path / name).history["loss"].tolist()
        assert network.plm.checkpointing == (name == "small")
    assert losses["small"] == pytest.approx(losses["large"], abs=1e-6)
    for asked in (False, True):
        assert planning.needs_checkpointing(tiny_network(gradient_checkpointing=asked), windows, config) == asked


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(tmp_path: Path, family: str) -> None:
    folder = str(write_plm(tmp_path / family, family))
    gradients = []
    for on in (False, True):
        plm = PLMConfig(folder, rank=4, lora_dropout=0.0, plm_dropout=0.0, gradient_checkpointing=on)
        network = stir(PolicyNetwork(load_plm(plm), NetworkConfig(state_feature_dim=8))).train()
        batch_loss(network, WINDOWS.batch([0, 1])).backward()
        gradients.append({name: p.grad for name, p in network.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_four_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They need a package, weights and a GPU: on a CPU bitsandbytes computes without gradients and says so in a warning only."""
    folder = str(write_plm(tmp_path / "llama", "llama"))
    found: list[object] = [None]
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found[0] if name == "bitsandbytes" else real(name, *rest)
    )
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_plm(PLMConfig(folder, dtype="4bit"))
    found[0] = object()
    for reason, change in (("random weights", {"random_weights": True}), ("rank -1", {"rank": -1})):
        with pytest.raises(ValueError, match=reason):
            load_plm(PLMConfig(folder, dtype="4bit", **change))
    network = tiny_network()
    network.plm.config = PLMConfig(folder, dtype="4bit")
    with pytest.raises(ValueError, match="train on a GPU"):
        train_on(network, WINDOWS, FLOAT32, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured by Linux")
def test_a_measured_peak_is_near_the_prediction(tmp_path: Path) -> None:
    """In a process of its own, as tests/bench/bench_memory.py does for more sizes; in both directions."""
    bench = Path(__file__).resolve().parent / "bench" / "bench_memory.py"
    folder = shape_only(tmp_path / "plm", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    plm: dict[str, Any] = {"source": folder, "random_weights": True, "rank": 16}
    case = f"bench_memory.Case('', {plm!r})"
    program = f"import sys; sys.path.insert(0, {str(bench.parent)!r}); import bench_memory; print(bench_memory.measure({case}))"
    predicted = memory_of(PLMConfig(**plm)).train_peak
    measured = 0.0
    for _ in range(3):  # a system that takes idle pages away makes a peak smaller, never larger
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
        measured = max(measured, float(done.stdout.split()[-1]))
        if predicted == pytest.approx(measured, rel=0.15):
            break
    assert predicted == pytest.approx(measured, rel=0.15)
