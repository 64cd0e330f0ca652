"""A headless Chromium, driven through chromedriver's own protocol (W3C WebDriver): JSON over HTTP."""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromedriver") and shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1280,900",
]  # fmt: skip
ENTER = "\ue007"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol names elements


class Browser:
    """One window.

    Args:
        profile: Folder for Chromium's files, new.
    """

    def __init__(self, profile: Path):
        self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout is not None
        line = next(line for line in self._driver.stdout if "started successfully on port" in line)
        self._base = f"http://127.0.0.1:{line.split()[-1].rstrip('.')}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options,
                                  "goog:loggingPrefs": {"browser": "ALL"}}}  # fmt: skip
        self._base += f"/{self._ask('POST', '', {'capabilities': wanted})['sessionId']}"

    def close(self) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()

    def _ask(self, method: str, path: str, body: dict | None = None):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self._base}{path}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments):
        """What JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def type(self, selector: str, keys: str) -> None:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]
        self._ask("POST", f"/element/{found}/value", {"text": keys})

    def wait(self, script: str, seconds: float = 20):
        """What JavaScript returns, once that is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}\n{self.run('return document.body.innerText')}"
            time.sleep(0.05)
        return value

    def messages(self) -> list[str]:
        """What was written to the console, errors and refusals among it."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def dark(self, on: bool = True) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self._ask("POST", "/goog/cdp/execute", command)

    def resize(self, width: int, height: int) -> None:
        self._ask("POST", "/window/rect", {"width": width, "height": height})

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))
