"""A real headless browser, driven over the WebDriver protocol (plain HTTP and JSON)."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
MISSING = None if DRIVER and BROWSER else "no chromium with chromedriver on this machine"

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this machine


class Browser:
    """One session; file pages only."""

    def __init__(self, address: str, profile: Path) -> None:
        self._address = address
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--hide-scrollbars", f"--user-data-dir={profile}"]
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": BROWSER, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._session = "/session"
        found = self._call("", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{found['sessionId']}"
        self._call("/url", {"url": "about:blank"})
        self.requests()  # those of the browser's own first page

    def _call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + self._session + path, data, headers, method=method)
        with _DIRECT.open(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, page: Path, width: int, height: int = 844, dark: bool = False) -> None:
        """Shows a file in a viewport of this size."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._command("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._command("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("/url", {"url": page.resolve().as_uri()})

    def _command(self, name: str, parameters: dict[str, Any]) -> Any:
        return self._call("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str) -> Any:
        """The value that the body of a function returns in the page."""
        return self._call("/execute/sync", {"script": script, "args": []})

    def requests(self) -> list[str]:
        """Addresses requested since the last call."""
        events = [json.loads(e["message"])["message"] for e in self._call("/se/log", {"type": "performance"})]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def messages(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        size = self._command("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        picture = self._command("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        file.write_bytes(base64.b64decode(picture["data"]))

    def close(self) -> None:
        """Ends the session and its browser."""
        self._call("", method="DELETE")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in ``folder``; a page may be opened any number of times."""
    assert DRIVER is not None
    environment = os.environ | {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    driver = subprocess.Popen(
        [DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        session = Browser(f"http://127.0.0.1:{port}", folder / "profile")
        try:
            yield session
        finally:
            session.close()
    finally:
        driver.terminate()
        driver.wait(30)
        assert driver.stdout is not None
        driver.stdout.close()
