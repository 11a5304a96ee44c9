"""A headless Chromium over WebDriver's HTTP, as far as the tests of pages need it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--force-device-scale-factor=1"),
)

WHEN_DRAWN = """
const done = arguments[arguments.length - 1], body = () => { %s };
document.fonts.ready.then(
  () => requestAnimationFrame(() => requestAnimationFrame(() => done(body()))));
"""


def why_not() -> str | None:
    """Why there is no browser, or None."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return (
        f"{' and '.join(missing)} not installed (Debian: chromium, chromium-driver)"
        if missing
        else None
    )


class Page:
    """An open page."""

    def __init__(self, session: str) -> None:
        self._session = session

    def _post(self, command: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._session}/{command}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["value"]

    def _devtools(self, command: str, **params: Any) -> Any:
        return self._post("goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Show a file in a window of that width, as on a telephone below 600 pixels."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._post("url", {"url": path.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a script returns, once fonts are there and what was opened is laid out."""
        return self._post("execute/async", {"script": WHEN_DRAWN % script, "args": []})

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        shot = self._devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A page in a browser of its own, with a profile that is thrown away."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with tempfile.TemporaryDirectory() as profile:
            options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
            body = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            root = f"http://127.0.0.1:{port}/session"
            page = Page(root)
            for _ in range(100):
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5):
                        break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.1)
            opened = Page(f"http://127.0.0.1:{port}")._post("session", body)
            page = Page(f"{root}/{opened['sessionId']}")
            try:
                yield page
            finally:
                request = urllib.request.Request(page._session, method="DELETE")
                urllib.request.urlopen(request, timeout=30).close()
    finally:
        driver.terminate()
        driver.wait(timeout=30)
