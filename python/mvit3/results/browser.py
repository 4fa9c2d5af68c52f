"""Headless Chromium over its debugging pipe, for pictures of a page and for the tests of what it shows."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import Failure

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# No window, nothing sent anywhere, no first-run pages.
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
SECONDS = 60  # for an answer


def chromium() -> str | None:
    """Where Chromium, or a browser made from it, is."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a running Chromium. Commands are those of its debugging protocol: JSON with a zero byte at the end,
    read by it from file 3 and answered on file 4."""

    def __init__(self, path: str, folder: str) -> None:
        import fcntl  # which not every system has; the page itself needs none of this

        there, self._write = os.pipe()
        self._read, back = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (there, back)]  # clear of 3 and 4

        def connect() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
        self._process = subprocess.Popen(
            [path, *FLAGS, *root, f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=connect,
            close_fds=False,  # those of Python close by themselves
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (there, back, *ends):
            os.close(end)
        self._rest, self._count, self._session, self.messages = b"", 0, "", []
        targets = self.command("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def command(self, name: str, **parameters: Any) -> dict[str, Any]:
        """Its result; what else comes meanwhile is kept in `messages`."""
        self._count += 1
        asked = {"id": self._count, "method": name, "params": parameters}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self.messages.append(answer)
        if "error" in answer:
            raise Failure(f"Chromium: {name}: {answer['error']['message']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise Failure(f"Chromium did not answer within {SECONDS} seconds")
            read = os.read(self._read, 1 << 20)
            if not read:
                raise Failure("Chromium has ended")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def show(self, page: Path, width: int, height: int, dark: bool) -> None:
        """Loads a file, as a screen of this size shows it."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.messages.clear()
        self.command("Page.navigate", url=page.resolve().as_uri())
        while not any(message.get("method") == "Page.loadEventFired" for message in self.messages):
            self.messages.append(self._next())

    def value(self, script: str) -> Any:
        """What an expression in JavaScript is, as JSON."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise Failure(f"Chromium: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def picture(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.command("Page.captureScreenshot", format="png", optimizeForSpeed=False)["data"])

    def close(self) -> None:
        with contextlib.suppress(Failure, OSError):
            self.command("Browser.close")
        os.close(self._write)
        os.close(self._read)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Failure where there is no Chromium."""
    path = chromium()
    if path is None:
        raise Failure(
            f"pictures need Chromium, and none of {', '.join(NAMES)} is there (Debian: apt-get install chromium)"
        )
    with tempfile.TemporaryDirectory(prefix="mvit3-", ignore_cleanup_errors=True) as folder:
        running = Browser(path, folder)
        try:
            yield running
        finally:
            running.close()
