"""Foreign and hand-written text, mutated: every reader reads it or raises its one error, which names the file."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from netllm_lib.abr import convert
from netllm_lib.abr.qoe import CHUNKS, LEVELS
from netllm_lib.abr.traces import read_trace, read_video
from netllm_lib.abr.upstream import checkpoints, logs
from netllm_lib.abr.upstream.discover import Found, discover
from netllm_lib.abr.upstream.training import training_run
from test_fuzz import attempt, watched
from test_upstream_logs import LOSSES, NAMED
from upstream_tree import arguments_line, console_text, model_path, pool_path

CONSOLE = arguments_line(NAMED, f"artifacts/exp_pools/{pool_path(NAMED)}") + console_text(NAMED, LOSSES[:2, :20], -1.25)
BUFFER_S = "\t".join(["4.0", "300", "4.5", "0.0", "150000", "900.0", "0.0", "0.3"])
ODD = [
    b"nan", b"inf", b"-inf", b"1e400", b"9" * 400, b"-", b"\n", b"\r", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"{",
    b"]", b"[" * 2000, b"1_0", b"\t", b",", b";", b"True", b"None", b"0x10", b"\x1b[2J", "中文".encode("gbk"), "１２".encode(),
    "\u2028".encode(), b"0", b" ", b"-1", b"w_0_", b"_ss_", b"Namespace(w=0, rank='x', lr=[], adapt=1)\n", b"=0,", b"1e-320",
]  # fmt: skip
ENCODINGS = ["utf-16", "utf-16-le", "utf-8-sig", "gbk"]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to four random changes, now and then in another encoding."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) + 1), rng.choice([0, 1, 1, 3, 20, 10**6])
        match rng.randrange(4):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:  # a piece of it a second time
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randrange(200)]
            case _:
                changed[at : at + min(length, 20)] = rng.choice(ODD)
    if rng.random() < 0.1:
        return changed.decode(errors="replace").encode(rng.choice(ENCODINGS), errors="replace")
    return bytes(changed)


def whole_run(path: Path) -> tuple[Found, Any]:
    """What is known of a training by its console log."""
    found = discover(path)
    return found, training_run(found, None, None)


LOG = Path(model_path(NAMED), "early_stop_-1_console.log")
READERS: dict[str, tuple[Path, str, Callable[[Path], Any]]] = {
    "trace": (Path("trace"), "".join(f"{i / 2:.3f} {1 + i % 3:.4f}\n" for i in range(12)), read_trace),
    "video": (Path("v_sizes", "video_size_2"), "150000\n" * CHUNKS, lambda path: read_video(path.parent)),
    "mahimahi": (Path("m"), "".join(f"{40 * i}\n" for i in range(90)), convert.read_mahimahi),
    "csv": (
        Path("c.csv"),
        "time_s,mbps,note\n" + "".join(f"{i},{1 + i % 3},x\n" for i in range(12)),
        partial(convert.read_csv, unit="Mbps"),
    ),
    "sabre": (
        Path("s.json"),
        str([{"duration_ms": 500, "bandwidth_kbps": 900}] * 3).replace("'", '"'),
        convert.read_sabre,
    ),
    "result file": (Path("result_sim_abr_t"), f"{BUFFER_S}\n" * CHUNKS, logs.read_result_file),
    "losses": (Path("train_losses.txt"), "".join(f"{value:.6f}\n" for value in LOSSES[0, :40]), logs.train_losses),
    "console log": (Path("nohup.out"), CONSOLE, logs.read_console),
    "console log in its place": (LOG, CONSOLE, whole_run),
    "adapter config": (
        Path("adapter_config.json"),
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}',
        checkpoints.read_lora,
    ),
}


def written(kind: str, folder: Path) -> tuple[Path, str, Callable[[Path], Any]]:
    """(a sound file, its text, its reader)."""
    place, text, read = READERS[kind]
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    for level in range(LEVELS if kind == "video" else 0):
        (folder / place).with_name(f"video_size_{level}").write_text(text)
    (folder / place).write_text(text)
    return folder / place, text, read


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", READERS)
def test_mutated_text_is_read_or_refused_by_file(tmp_path: Path, kind: str, count: int) -> None:
    path, text, read = written(kind, tmp_path)
    rng, refused = random.Random(f"{kind} {count}"), 0
    read(path)
    for _ in range(count):
        path.write_bytes(data := mutate(rng, text.encode()))
        started = time.process_time()
        with watched("compile"):  # into a tree of syntax, which is not executed
            found, message = attempt(lambda: read(path))
        assert time.process_time() - started < 5, data
        if found is None:
            refused += 1
            assert message.startswith(str(path)), message
            assert message.isprintable(), message
    assert 0.02 * count < refused < count
    print(f"{kind}: {count} inputs, {refused} refused")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-16-be"])
def test_text_of_windows(tmp_path: Path, kind: str, encoding: str) -> None:
    """UTF-16 with its mark, as PowerShell's `>` writes it, is read; without it nobody can tell, and it is refused."""
    path, text, read = written(kind, tmp_path)
    path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    found, message = attempt(lambda: read(path))
    assert (found is None) == (encoding == "utf-16-be" and kind not in ("sabre", "adapter config")), message


@pytest.mark.parametrize("kind", READERS)
def test_pipes_and_devices_are_refused(tmp_path: Path, kind: str) -> None:
    path, _, read = written(kind, tmp_path)
    path.unlink()
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir):
        make()
        with pytest.raises((ValueError, OSError), match=path.name):
            read(path)
        path.rmdir() if path.is_dir() else path.unlink()
