"""JupyterLab on the loopback interface and a headless browser, for tests of what a person sees."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = {  # no questions, no downloads; every cell is in the page, not only those in view
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
START_S = 60


def chromium() -> str:
    """Path of the browser; skips loudly where it, or playwright, is missing."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    reason = "" if found else f"no browser ({', '.join(CHROMIUM)}): apt-get install chromium"
    try:
        import playwright  # noqa: F401
    except ImportError:
        reason = "playwright is not installed: make env"
    if reason:
        reason = f"JupyterLab NOT tried in a browser: {reason}"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason)
    assert found is not None
    return found


@contextmanager
def page(width: int = 1500, height: int = 1100) -> Iterator[Any]:
    """A page of the headless browser."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # without a sandbox, which needs rights that containers seldom have; it only ever sees our own server
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


@contextmanager
def jupyterlab(root: Path, home: Path, **variables: str) -> Iterator[tuple[str, str]]:
    """(address, token) of a JupyterLab that serves `root`, with settings of its own below `home`; it ends with the block.

    `variables` are environment variables of the server, and so of its kernels.
    """
    for name, value in QUIET.items():
        place = home / "settings" / f"{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(value))
    own = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    environment = {f"JUPYTER_{name}": str(home / folder) for name, folder in own.items()}
    environment |= {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces"),
    }
    token, port = secrets.token_hex(16), _free_port()
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with open(home / "jupyterlab.log", "wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **environment, **variables}, stdout=log, stderr=log)
        try:
            _wait(server, f"{address}/api/status?token={token}", home / "jupyterlab.log")
            yield address, token
        finally:
            _end(server, f"{address}/api/shutdown?token={token}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: subprocess.Popen[bytes], status: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(status, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start; its log ends with\n{log.read_text()[-2000:]}")


def _end(server: subprocess.Popen[bytes], shutdown: str) -> None:
    """Ask the server to end itself and its kernels; then, and only then, end the process."""
    try:
        urllib.request.urlopen(urllib.request.Request(shutdown, method="POST"), timeout=5).close()
    except (urllib.error.URLError, OSError):
        server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
