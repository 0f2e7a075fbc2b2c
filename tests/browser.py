"""A headless Chromium, driven through its debugging pipe: opens a page, runs scripts in it."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def chromium() -> str:
    """The browser's path; the test is skipped where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium here")


class Page:
    """One open page."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._waiting, self._number, self._session = b"", 0, ""

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._waiting:
                chunk = os.read(self._back, 1 << 20)
                assert chunk, "the browser has ended"
                self._waiting += chunk
            text, _, self._waiting = self._waiting.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, script: str) -> Any:
        """The value of a script in the page; an exception in it fails the test."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path: Path, downloads: Path) -> None:
        """Opens a file, and lets it save into `downloads`."""
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        target = self.call("Target.createTarget", url=path.as_uri())["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.wait_for(f"document.readyState == 'complete' && location.href == {path.as_uri()!r}")

    def wait_for(self, script: str) -> None:
        """Runs a script until its value is true."""
        until = time.monotonic() + 60
        while not self.run(script):
            assert time.monotonic() < until, f"never true: {script}"
            time.sleep(0.05)

    def type_into(self, selector: str, text: str) -> None:
        """Puts the caret into a field and types, as a person does."""
        self.run(f"document.querySelector({selector!r}).focus()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element, by mouse."""
        spot = self.run(
            f"(() => {{ const e = document.querySelector({selector!r});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind, x=spot[0], y=spot[1], button="left", clickCount=1,
            )  # fmt: skip


@contextmanager
def open_page(path: Path, downloads: Path, profile: Path) -> Iterator[Page]:
    """The page in a browser of its own, which ends with the block."""
    to_read, to_write = os.pipe()
    back_read, back_write = os.pipe()

    def place_pipes() -> None:
        """The browser reads from 3 and writes to 4."""
        one, other = os.dup(to_read), os.dup(back_write)
        os.dup2(one, 3)
        os.dup2(other, 4)

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    flags += ["--window-size=1440,1200", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [chromium(), *flags],
        close_fds=False,
        preexec_fn=place_pipes,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(back_write)
    try:
        page = Page(to_write, back_read)
        page.open(path, downloads)
        yield page
    finally:
        process.terminate()
        process.wait(timeout=30)
        os.close(to_write)
        os.close(back_read)
