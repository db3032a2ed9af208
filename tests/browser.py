"""Chromium on a page, over its own debugging pipe: no driver and no library needed.

with Browser() as browser:
    tab = browser.open(path, width=390, dark=True)
    tab.evaluate("document.title")
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Chromium reads what it is asked from 3 and answers to 4.
_HAND_OVER = """
import os, sys
down, up, path, *flags = sys.argv[1:]
down, up = os.dup(int(down)), os.dup(int(up))
while min(down, up) < 5:
    down, up = os.dup(down), os.dup(up)
os.dup2(down, 3)
os.dup2(up, 4)
os.execv(path, [path, *flags])
"""


def find() -> str | None:
    """Path of a Chromium, $USERIP_FAST_CHROMIUM first."""
    names = (os.environ.get("USERIP_FAST_CHROMIUM"), *_NAMES)
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Browser:
    def __enter__(self) -> Browser:
        path = find()
        assert path is not None
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        down, self.to = os.pipe()
        self.back, up = os.pipe()
        flags = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu",
                 "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage",
                 "--disable-background-networking", "--disable-component-update",
                 f"--user-data-dir={self.folder.name}")  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _HAND_OVER, str(down), str(up), path, *flags],
            pass_fds=(down, up),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down)
        os.close(up)
        self.buffer, self.number, self.events = b"", 0, []
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.to)
        os.close(self.back)
        self.folder.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """The answer; events that come before it are kept."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params}
        if session:
            asked["sessionId"] = session
        os.write(self.to, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self.number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]
            self.events.append(told)

    def wait(self, method: str, session: str) -> None:
        """Until an event has come."""
        while not any(e.get("method") == method and e.get("sessionId") == session
                      for e in self.events):  # fmt: skip
            self.events.append(self._next())

    def _next(self) -> Mapping[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.back, 1 << 20)
            if not part:
                raise OSError("Chromium ended")
            self.buffer += part
        one, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(one)

    def open(
        self, path: str | os.PathLike[str], width: int = 1280, height: int = 900, dark: bool = False
    ) -> Tab:
        """A page of a file, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable", session)
        self.call("Emulation.setDeviceMetricsOverride", session, width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        self.call("Page.navigate", session, url=Path(path).resolve().as_uri())
        self.wait("Page.loadEventFired", session)
        return Tab(self, session)


class Tab:
    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        told = self.browser.call(
            "Runtime.evaluate", self.session, expression=expression, returnByValue=True
        )
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def complaints(self) -> list[str]:
        """What the console was told: errors, warnings and exceptions."""
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif method == "Log.entryAdded":
                found.append(str(params["entry"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(str(params["args"]))
        return found

    def picture(self, height: int | None = None) -> bytes:
        """PNG of the page, or of its first `height` pixels."""
        size = self.browser.call("Page.getLayoutMetrics", self.session)["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "scale": 1,
                "height": min(size["height"], height or size["height"])}  # fmt: skip
        told = self.browser.call("Page.captureScreenshot", self.session, format="png", clip=clip,
                                 captureBeyondViewport=True)  # fmt: skip
        return base64.b64decode(told["data"])

    def pdf(self) -> bytes:
        told = self.browser.call("Page.printToPDF", self.session, printBackground=True)
        return base64.b64decode(told["data"])
