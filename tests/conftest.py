"""Fixtures shared by all tests: the original's golden outputs and its real data, both optional."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BESIDE = Path(__file__).resolve().parents[2] / "shared"
"""Where the original's data and golden outputs lie unless $NETLLM_DATA and $NETLLM_GOLDEN say otherwise."""

GOLDEN = Path(os.environ.get("NETLLM_GOLDEN") or BESIDE / "golden")
REAL_DATA = Path(os.environ.get("NETLLM_DATA") or BESIDE / "netllm" / "abr")

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

if REAL_DATA.is_dir():  # commands that tests start find the data where the tests do
    os.environ["NETLLM_DATA"] = str(REAL_DATA)


def _require(path: Path, variable: str, what: str) -> Path:
    if not path.exists():
        reason = f"{what} not found at {path}: comparison with the original NOT run (set ${variable})"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)
    return path


Golden = Callable[..., Path]


@pytest.fixture(scope="session")
def golden() -> Golden:
    """`golden("plm", "gpt2")`: a file or folder of the original's golden outputs; where just that one is absent, the test that
    needs it skips loudly."""
    return lambda *parts: _require(GOLDEN.joinpath(*parts), "NETLLM_GOLDEN", "golden outputs")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The original's `data/` folder; skips loudly when it is absent."""
    return _require(REAL_DATA, "NETLLM_DATA", "the original's data")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte; skips where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this process may not mount a file system: a full disk is only simulated, in another test")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of the headless browser; skips loudly where it, or playwright, is missing."""
    program = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        reason = "NOT tried in a browser: it needs chromium (apt-get install chromium) and playwright (make env)"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)
    with sync_playwright() as driver:
        # without a sandbox, which needs rights that containers seldom have; it only ever sees our own server
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1500, "height": 1100})
        browser.close()


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A whole run of the original (`upstream_tree.Tree`) on the bundled sample; tests change copies of it."""
    from upstream_tree import write_tree  # PyTorch

    return write_tree(tmp_path_factory.mktemp("upstream") / "NetLLM")


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for reports; no PLM, data or report folder of the machine is seen by accident."""
    monkeypatch.setenv("NETLLM_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("NETLLM_PLMS", str(tmp_path / "no_plms"))
    monkeypatch.delenv("NETLLM_DATA", raising=False)
    return tmp_path / "reports"


@pytest.fixture
def nowhere(tmp_path: Path) -> Path:
    """A data folder in which nothing is, so that no pool can be made anew."""
    (tmp_path / "data" / "traces").mkdir(parents=True)
    return tmp_path / "data"


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"{what}: {folder}" + ("" if folder.is_dir() else " (ABSENT: comparisons with the original will be skipped)")
        for what, folder in (("golden outputs", GOLDEN), ("real data", REAL_DATA))
    ]
