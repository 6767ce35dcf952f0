"""A Python program unrelated to the test and to its other programs, that runs what it is told."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
from scripts import PATIENCE

_LOOP = """
import json
import sys
import traceback

scope = globals()  # where pickles look for what is defined there
answers, sys.stdout = sys.stdout, sys.stderr
# Not sys.stdin: a child that another thread forks closes it, and would wait for its lock.
for line in open(0, "rb", buffering=0):
    kind, code = json.loads(line)
    try:
        value = eval(code, scope) if kind == "ask" else exec(code, scope)
        answer = True, value
    except BaseException:
        answer = False, traceback.format_exc()
    print(json.dumps(answer), file=answers, flush=True)
"""


class ProgramError(Exception):
    """An exception in a program, with its traceback as text."""


def until(true: Callable[[], Any]) -> None:
    """Wait until it is true."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


class Program:
    """Starts with `code`, by the command `under` where there is one. What it prints goes to this process's stderr."""

    def __init__(self, code: str = "", under: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*under, sys.executable, "-c", _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._pending = 0  # answers
        self._read = b""
        self._send("do", code)

    def _send(self, kind: str, code: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, textwrap.dedent(code)]).encode() + b"\n")
        self.process.stdin.flush()
        self._pending += 1

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        while b"\n" not in self._read:
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                if not selector.select(PATIENCE):
                    pytest.fail(f"no answer after {PATIENCE} s")
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            if not more:
                raise ProgramError(f"it has ended: {self.process.wait()}")
            self._read += more
        line, self._read = self._read.split(b"\n", 1)
        return line

    def answer(self) -> Any:
        """Of what was begun last; what was begun before it must have gone well."""
        while True:
            fine, value = json.loads(self._line())
            self._pending -= 1
            if not fine:
                raise ProgramError(value)
            if self._pending == 0:
                return value

    def begin(self, code: str) -> None:
        """Run statements; answer() waits for their end."""
        self._send("do", code)

    def do(self, code: str) -> None:
        self.begin(code)
        self.answer()

    def ask(self, expression: str) -> Any:
        """The value of an expression, as far as JSON can tell."""
        self._send("ask", expression)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
