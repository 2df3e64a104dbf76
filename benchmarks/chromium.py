"""Owns a headless Chromium, spoken to through its pipe: pages, scripts, pictures, errors.

Needs no driver and no package: DevTools' protocol over two file descriptors, messages ended by NUL.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str | None:
    """The browser's program, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser with one page; a resource: use it in a `with`.

    errors: what the console was told as an error, exceptions that nothing caught, and violations of
    the page's Content-Security-Policy.
    """

    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        program = find()
        if program is None:
            raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed")
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="chromium_")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [
            *(program, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "--mute-audio"),
            *("--disable-background-networking", f"--user-data-dir={self._profile}"),
        ]
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, None
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        self.dark(dark)

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._session = None
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        _write(self._write, message)
        while True:
            answer = self._receive(30)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise RuntimeError(f"the browser said nothing for {seconds:.0f} s")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError("the browser has ended")
            self._buffer += data
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str([one.get("value") for one in params["args"]]))

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        """The viewport in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def dark(self, on: bool) -> None:
        """Whether the page is told that dark colours are wished."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, page: Path | str, until: str = "true", seconds: float = 30) -> float:
        """Opens a file (or URL), waits for its load event and the expression `until`; seconds."""
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self._loaded = False
        start = time.monotonic()
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._receive(seconds)
        self.wait(until, seconds)
        return time.monotonic() - start

    def wait(self, until: str, seconds: float = 10) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(until):
            if time.monotonic() > end:
                raise RuntimeError(f"{until}: not true within {seconds:.0f} s; {self.errors}")
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']['text']}")
        return answer["result"].get("value")

    def key(self, name: str, code: int) -> None:
        """A key pressed and let go, such as ("Tab", 9) or ("Enter", 13)."""
        text = {"text": "\r"} if name == "Enter" else {}
        about = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, file: Path, whole: bool = False, of: str | None = None) -> None:
        """A PNG of the viewport, the whole page, or the first element of a selector."""
        clip: dict[str, Any] = {}
        if of is not None:
            box = self.evaluate(
                f"(r => [r.x + scrollX, r.y + scrollY, r.width, r.height])"
                f"(document.querySelector({json.dumps(of)}).getBoundingClientRect())"
            )
            area = dict(zip(("x", "y", "width", "height"), box, strict=True))
            clip = {"clip": area | {"scale": 1}}
        made = self.call(
            "Page.captureScreenshot", captureBeyondViewport=whole or of is not None, **clip
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(made["data"]))


def _write(pipe: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\0"
    while data:
        data = data[os.write(pipe, data) :]
