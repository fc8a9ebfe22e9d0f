"""Loading PLMs: families, early stop, LoRA, caches, and folders that are not what they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm_fixtures import FAMILIES, write_plm
from netllm_lib import plm_files
from netllm_lib.plm import PLMConfig, check_plm, describe_folder, find_plm, load_plm


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("downloaded_plms")
    for family in FAMILIES:
        write_plm(root / family / "tiny", family)
    return root


@pytest.fixture
def llama(zoo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo / "llama" / "tiny", tmp_path / "llama"))


def tokens(width: int, count: int = 40) -> torch.Tensor:
    return torch.randn(3, count, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_hidden_states_and_stops_early(zoo: Path, family: str) -> None:
    whole = load_plm(PLMConfig(str(zoo / family / "tiny"), rank=4))
    first = load_plm(PLMConfig(str(zoo / family / "tiny"), rank=4, layers=1))
    assert (whole.family, whole.layers, first.layers, whole.hidden_size) == (family, 2, 1, 64)
    x = tokens(64)
    with torch.inference_mode():
        assert whole(x).shape == x.shape
        assert not torch.allclose(whole(x), first(x), atol=1e-3)
    upstream = load_plm(PLMConfig.upstream(str(zoo / family / "tiny"), rank=4, layers=1))
    assert upstream.layers == (1 if family in ("llama", "gpt2") else 2)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
def test_cache_and_fused_attention_change_nothing(zoo: Path, family: str) -> None:
    fast = load_plm(PLMConfig(str(zoo / family / "tiny"), rank=0))
    eager = load_plm(PLMConfig(str(zoo / family / "tiny"), rank=0, attention="eager"))
    x, cache = tokens(64, 160), fast.new_cache(160)
    with torch.inference_mode():
        whole = fast(x)
        pieces = torch.cat([fast(part, cache=cache) for part in x.split([7, 8, 65, 8, 8, 64], dim=1)], dim=1)
        torch.testing.assert_close(eager(x), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    assert cache.tokens == 160
    with pytest.raises(ValueError, match="holds 160 tokens"), torch.inference_mode():
        fast(x[:, :1], cache=cache)


def test_limited_cache_attends_to_the_latest_tokens_only(zoo: Path) -> None:
    """With one layer a limited cache equals a fresh run over the tokens that it still sees."""
    plm = load_plm(PLMConfig(str(zoo / "llama" / "tiny"), layers=1, rank=0))
    x, cache = tokens(64, 48), plm.new_cache(48, attend_tokens=16)
    with torch.inference_mode():
        pieces = torch.cat([plm(part, cache=cache) for part in x.split(8, dim=1)], dim=1)
        torch.testing.assert_close(pieces[:, -1], plm(x[:, -16:])[:, -1], atol=1e-5, rtol=0)
        assert not torch.allclose(pieces[:, -1], plm(x)[:, -1], atol=1e-3)


def test_causal_or_not(zoo: Path) -> None:
    for family in FAMILIES:
        plm = load_plm(PLMConfig(str(zoo / family / "tiny"), rank=0))
        x = tokens(64)
        y = x.clone()
        y[:, -1] += 1
        with torch.inference_mode():
            unchanged = torch.allclose(plm(x)[:, :-1], plm(y)[:, :-1], atol=1e-5)
        assert unchanged is plm.causal is (family != "t5-lm")
    with pytest.raises(ValueError, match="not causal"):
        plm.new_cache(8)


def test_gpt2_gets_no_positions(zoo: Path) -> None:
    """Its two halves are the same input, so without positions a token that sees only itself looks the same anywhere."""
    plm = load_plm(PLMConfig(str(zoo / "gpt2" / "tiny"), rank=0))
    x = tokens(64, 1).expand(3, 300, 64)  # longer than its 128 positions, too
    with torch.inference_mode():
        hidden = plm(x)
    torch.testing.assert_close(hidden[:, 0], hidden[:, -1], atol=1e-5, rtol=0)


def test_padding_does_not_change_t5(zoo: Path) -> None:
    plm = load_plm(PLMConfig(str(zoo / "t5-lm" / "tiny"), rank=0))
    x, mask = tokens(64), torch.arange(40).expand(3, 40) < 24
    with torch.inference_mode():
        torch.testing.assert_close(plm(x, token_mask=mask)[:, :24], plm(x[:, :24]), atol=1e-5, rtol=0)


def test_what_is_trained() -> None:
    lora = load_plm(PLMConfig("tiny-llama", rank=8))
    assert all("lora_" in name for name in lora.trainable())
    assert {name.split(".")[-4] for name in lora.trainable()} == {"q_proj", "v_proj"}
    assert not load_plm(PLMConfig("tiny-llama", rank=0)).trainable()
    whole = load_plm(PLMConfig("tiny-llama", rank=-1))
    assert any("mlp" in name for name in whole.trainable())
    assert not any("embed_tokens" in name for name in whole.trainable())
    with pytest.raises(ValueError, match="rank -2"):
        load_plm(PLMConfig("tiny-llama", rank=-2))
    with pytest.raises(ValueError, match=r"nothing.*self_attn|nothing.*q_proj"):
        load_plm(PLMConfig("tiny-llama", target_modules=("nothing",)))


def test_merged_weights_are_equal_and_leave_no_trace(zoo: Path) -> None:
    plm = load_plm(PLMConfig(str(zoo / "llama" / "tiny"), rank=4))
    x = tokens(64)
    with torch.no_grad():
        for name, parameter in plm.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = {name: p.clone() for name, p in plm.named_parameters()}
    with torch.inference_mode():
        apart = plm(x)
        with plm.using(plm.inference_weights()):
            torch.testing.assert_close(plm(x), apart, atol=1e-5, rtol=0)
            assert not torch.equal(plm(x), apart)
        with plm.using(plm.inference_weights(torch.bfloat16)):
            half = plm(x)
        assert 1e-4 < float((half - apart).abs().max()) < 0.5
        assert torch.equal(plm(x), apart)
    assert all(torch.equal(p, before[name]) for name, p in plm.named_parameters())


def test_identity_knows_weights_and_shape_but_not_dtype_or_rank(zoo: Path, tmp_path: Path) -> None:
    folder = str(zoo / "llama" / "tiny")
    identity = load_plm(PLMConfig(folder, rank=4)).identity
    for rank in (0, 8, -1):
        assert load_plm(PLMConfig(folder, rank=rank, dtype="bfloat16")).identity == identity
    random = load_plm(PLMConfig(folder, random_weights=True, seed=1)).identity
    assert random != identity
    assert load_plm(PLMConfig(folder, random_weights=True, seed=1)).identity == random
    assert load_plm(PLMConfig(folder, random_weights=True, seed=2)).identity != random


def test_loading_leaves_the_random_stream_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_plm(PLMConfig("tiny-llama"))
    assert torch.equal(torch.rand(1), expected)


def test_dropout_of_the_plm_can_be_set(zoo: Path) -> None:
    folder = str(zoo / "gpt2" / "tiny")
    x = tokens(64)
    noisy = load_plm(PLMConfig(folder, rank=0)).train()
    still = load_plm(PLMConfig(folder, rank=0, plm_dropout=0.0)).train()
    with torch.no_grad():
        assert not torch.equal(noisy(x), noisy(x))
        assert torch.equal(still(x), still(x))


# --- finding --------------------------------------------------------------------------------------------------------


def test_names_of_the_original_are_found(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_PLMS", str(zoo))
    for name in ("llama/tiny", "llama tiny", "llama2/tiny", "llama2 tiny"):
        assert find_plm(name) == zoo / "llama" / "tiny"
    assert find_plm("t5-lm/tiny") == find_plm("t5 tiny") == zoo / "t5-lm" / "tiny"
    with pytest.raises(FileNotFoundError, match=r"mistral/base.*looked in"):
        find_plm("mistral/base")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_plm("/nowhere/at/all")
    assert find_plm("someone/some-model") == "someone/some-model"


def test_layers_out_of_range(zoo: Path) -> None:
    for layers in (0, 3):
        with pytest.raises(ValueError, match="has layers 1 to 2"):
            load_plm(PLMConfig(str(zoo / "llama" / "tiny"), layers=layers))


# --- broken folders -------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n"


def break_folder(folder: Path, how: str) -> tuple[str, str]:
    """Damage a folder; returns the file that the message must name and a word it must contain."""
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    if how == "no config":
        (folder / "config.json").unlink()
        return "config.json", "missing"
    if how == "config is a page":
        (folder / "config.json").write_text("<!DOCTYPE html><html>Access to this model is restricted</html>")
        return "config.json", "HTML"
    if how == "config is not JSON":
        (folder / "config.json").write_text("{")
        return "config.json", "JSON"
    if how == "config of something else":
        (folder / "config.json").write_text("{}")
        return "config.json", "model_type"
    if how == "no weights":
        weights.unlink()
        return folder.name, "no weights"
    if how == "LFS pointer":
        weights.write_bytes(LFS)
        return "model.safetensors", "git lfs pull"
    if how == "weights are a page":
        weights.write_bytes(b"  <html><body>Log in</body></html>")
        return "model.safetensors", "HTML"
    if how == "empty":
        weights.write_bytes(b"")
        return "model.safetensors", "empty"
    if how == "cut":
        weights.write_bytes(data[:-100])
        return "model.safetensors", "cut download"
    if how == "huge header":
        weights.write_bytes((10 * 2**30).to_bytes(8, "little") + data[8:])
        return "model.safetensors", "header"
    if how == "text":
        weights.unlink()
        (folder / "pytorch_model.bin").write_text("hello there")
        return "pytorch_model.bin", "not a PyTorch file"
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    [
        "no config", "config is a page", "config is not JSON", "config of something else", "no weights", "LFS pointer",
        "weights are a page", "empty", "cut", "huge header", "text",
    ],
)  # fmt: skip
def test_broken_folder_is_refused_by_name(llama: Path, how: str) -> None:
    assert check_plm(str(llama)) == []
    file, word = break_folder(llama, how)
    problems = " ".join(check_plm(str(llama)))
    assert file in problems
    assert word in problems
    with pytest.raises(ValueError, match=word):
        load_plm(PLMConfig(str(llama)))


def test_missing_and_pointer_shards(tmp_path: Path) -> None:
    folder = write_plm(tmp_path / "plm", "llama", shard_size="100kB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert check_plm(str(folder)) == []
    shards[0].write_bytes(LFS)
    shards[1].unlink()
    problems = describe_folder(folder).problems
    assert len(problems) == 2
    assert any(shards[0].name in p and "git lfs" in p for p in problems)
    assert any(shards[1].name in p and "missing" in p for p in problems)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="index"):
        load_plm(PLMConfig(str(folder)))


def test_weights_that_do_not_belong_to_the_config(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights are missing"):
        load_plm(PLMConfig(str(llama)))
    load_plm(PLMConfig(str(llama), layers=2))  # the missing layer is not asked for


def test_code_in_a_folder_is_never_run(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="cannot read"):
        load_plm(PLMConfig(str(llama)))
    assert not (tmp_path / "ran").exists()


def test_describe_folder(zoo: Path) -> None:
    report = describe_folder(zoo / "opt" / "tiny")
    assert (report.model_type, report.layers, report.hidden_size, report.problems) == ("opt", 2, 64, ())
    assert report.weight_bytes > 100_000


# --- SmolLM2 --------------------------------------------------------------------------------------------------------


def test_smollm2_from_its_cache() -> None:
    if plm_files.smollm2_gguf() is None and not (plm_files.smollm2_cache() / "config.json").is_file():
        pytest.skip(plm_files.SMOLLM2_MISSING)
    plm = load_plm(PLMConfig("smollm2", layers=1, rank=0))
    assert (plm.family, plm.hidden_size, plm.layers) == ("llama", 576, 1)
    norms = dict(plm.model.named_parameters())["norm.weight"]
    assert float(norms.std()) > 0.01  # trained weights, not ones
    random = load_plm(PLMConfig("smollm2", layers=1, rank=0, random_weights=True))
    assert random.identity != plm.identity
    assert [p.shape for p in random.parameters()] == [p.shape for p in plm.parameters()]


def test_smollm2_is_unpacked_once_by_whoever_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may finish while this one is at it; a damaged copy is made again."""
    made: list[Path] = []

    def unpack(gguf: Path, folder: Path) -> None:
        made.append(folder)
        write_plm(folder, "llama")
        if len(made) == 1:
            write_plm(plm_files.smollm2_cache(), "llama")

    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(plm_files, "smollm2_gguf", lambda: tmp_path / "some.gguf")
    monkeypatch.setattr(plm_files, "_unpack", unpack)
    folder = find_plm("smollm2")
    assert isinstance(folder, Path)
    assert find_plm("smollm2") == folder
    assert len(made) == 1
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert check_plm("smollm2") == []  # the package is there to make it anew
    assert find_plm("smollm2") == folder
    assert len(made) == 2
    assert not describe_folder(folder).problems
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_smollm2_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(plm_files, "smollm2_gguf", lambda: None)
    assert check_plm("smollm2") == [plm_files.SMOLLM2_MISSING]
    with pytest.raises(FileNotFoundError, match="pip install"):
        find_plm("smollm2")
