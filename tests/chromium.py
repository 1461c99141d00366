"""A Chromium without a window, driven over its own protocol on a pair of pipes."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe"


class Chromium:
    """One browser with any number of tabs; use in a `with` block."""

    def __enter__(self) -> "Chromium":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # The protocol speaks JSON, each message ended by a zero byte, on descriptors 3 and 4;
        # copies above them keep one redirection from closing the other's source.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read, write)]
        script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        command = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *command, "about:blank"],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        for end in (read, write, *ends):
            os.close(end)
        self._number, self._rest = 0, b""
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._read, self._write):
            os.close(end)
        self._profile.cleanup()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Ask for something and wait for the answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._read, 1 << 20)
                assert part, "the browser is gone"
                self._rest += part
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def tab(self, url: str, *, width: int = 1280, dark: bool = False) -> "Tab":
        """Open a page in a tab of its own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        found = self.send("Target.attachToTarget", targetId=target, flatten=True)
        tab = Tab(self, found["sessionId"])
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.send("Emulation.setEmulatedMedia", features=[scheme])
        tab.resize(width)
        tab.send("Page.navigate", url=url)
        tab.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return tab


class Tab:
    """One page."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def run(self, script: str) -> Any:
        """Return the value of an expression; a promise is waited for."""
        told = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, condition: str, *, seconds: float = 60) -> float:
        """Wait until an expression is true; return how long it took."""
        started = time.perf_counter()
        while not self.run(condition):
            assert time.perf_counter() - started < seconds, f"never true: {condition}"
            time.sleep(0.03)
        return time.perf_counter() - started

    def click(self, selector: str, *, at: tuple[float, float] | None = None) -> None:
        """Click the middle of an element, or a place in the window, with the mouse."""
        if at is None:
            where = f"document.querySelector({json.dumps(selector)})"
            self.run(f"{where}.scrollIntoView({{block: 'center'}})")
            box = self.run(
                f"(b => [b.x + b.width / 2, b.y + b.height / 2])({where}.getBoundingClientRect())"
            )
            at = (box[0], box[1])
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.send(
                "Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button=button, clickCount=1
            )

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def resize(self, width: int, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def picture(self, path: str | Path, *, whole: bool = True, most: int = 6000) -> Path:
        """Take a picture of the page, or of what is in the window."""
        clip = {}
        if whole:
            width, height = self.run(
                "[document.documentElement.clientWidth, document.documentElement.scrollHeight]"
            )
            clip = {
                "clip": {"x": 0, "y": 0, "width": width, "height": min(height, most), "scale": 1}
            }
        told = self.send("Page.captureScreenshot", captureBeyondViewport=whole, **clip)
        Path(path).write_bytes(base64.b64decode(told["data"]))
        return Path(path)
