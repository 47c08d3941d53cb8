"""A headless Chromium, driven through its debugging pipe with nothing but the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
PATIENCE = 60.0
"""Seconds to wait for an answer; a busy machine starts a browser slowly."""


def executable() -> str | None:
    """Where a Chromium is, if there is one."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class Tab:
    """One page, and everything that went wrong on it.

    Attributes:
        complaints: exceptions, console errors and warnings, security violations, failed requests.
        requests: addresses asked for.
    """

    def __init__(self, send: int, receive: int) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._send, self._receive = send, receive
        self._buffer = b''
        self._count = 0
        self._session: str | None = None
        self._loaded = False
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its answer."""
        self._count += 1
        message: dict[str, Any] = {'id': self._count, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._send, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._next()
            if answer.get('id') == self._count:
                assert 'error' not in answer, answer
                result: dict[str, Any] = answer['result']
                return result

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size, as a phone does where it is narrow."""
        phone = width < 600
        self.call(
            'Emulation.setDeviceMetricsOverride',
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.call('Emulation.setEmulatedMedia', features=[scheme])
        self._loaded = False
        self.call('Page.navigate', url=path.resolve().as_uri())
        while not self._loaded:
            self._next()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in result, result['exceptionDetails']
        return result['result'].get('value')

    def press(self, key: str, code: int) -> None:
        """Press and release a key, such as ('ArrowRight', 39)."""
        for kind in ('rawKeyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at one place of the window and release it at another."""
        for kind, (x, y) in (('mousePressed', start), ('mouseMoved', end), ('mouseReleased', end)):
            self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', buttons=1, clickCount=1)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the window, or of the whole page."""
        data = self.call('Page.captureScreenshot', captureBeyondViewport=whole)['data']
        if whole:
            size = self.call('Page.getLayoutMetrics')['cssContentSize']
            clip = {**size, 'scale': 1}
            data = self.call('Page.captureScreenshot', captureBeyondViewport=True, clip=clip)['data']
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b'\0' not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, end - time.monotonic()))
            assert ready, 'the browser does not answer'
            block = os.read(self._receive, 1 << 20)
            assert block, 'the browser ended'
            self._buffer += block
        text, _, self._buffer = self._buffer.partition(b'\0')
        message: dict[str, Any] = json.loads(text)
        self._note(message.get('method', ''), message.get('params', {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == 'Page.loadEventFired':
            self._loaded = True
        elif method == 'Runtime.exceptionThrown':
            self.complaints.append(str(params['exceptionDetails']))
        elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
            self.complaints.append(str(params['args']))
        elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
            self.complaints.append(params['entry']['text'])
        elif method == 'Network.loadingFailed':
            self.complaints.append(params['errorText'])
        elif method == 'Network.requestWillBeSent':
            self.requests.append(params['request']['url'])


@contextmanager
def browser(profile: Path) -> Iterator[Tab]:
    """A browser with one empty tab; `profile` is a folder of its own."""
    program = executable()
    assert program is not None
    (command_out, command_in), (answer_out, answer_in) = os.pipe(), os.pipe()

    def connect() -> None:
        # Chromium reads commands from descriptor 3 and answers on descriptor 4.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (command_out, answer_in)]
        for end, number in zip(ends, (3, 4), strict=True):
            os.dup2(end, number)

    arguments = [
        '--headless=new', '--remote-debugging-pipe', '--no-sandbox', '--disable-gpu', '--no-first-run',
        '--disable-dev-shm-usage', f'--user-data-dir={profile}',
    ]  # fmt: skip
    silent: dict[str, Any] = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
    process = subprocess.Popen([program, *arguments], preexec_fn=connect, pass_fds=(3, 4), **silent)
    os.close(command_out)
    os.close(answer_in)
    try:
        yield Tab(command_in, answer_out)
    finally:
        os.close(command_in)  # the browser ends when nobody can command it any more
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answer_out)
