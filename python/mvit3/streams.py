"""Standard streams that nobody listens to any more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TextIO

BROKEN_PIPE = 141  # the exit status of a command that SIGPIPE ends


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


class _Stderr:
    """Messages are no reason to fail: where they cannot be written, the terminal is gone, which SIGHUP says to a run (it saves and ends,
    or goes on under nohup)."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost = stream, False

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call, *arguments) -> None:
        if self.lost:
            return
        try:
            call(*arguments)
        except OSError:
            self.lost = True
            _to_nowhere(self.stream.fileno())
            signal.raise_signal(getattr(signal, "SIGHUP", signal.SIGTERM))

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@contextmanager
def guarded() -> Iterator[_Stderr]:
    """Inside it a stderr that is closed, or closes, raises no error."""
    for descriptor in (0, 1, 2):  # where one is closed, the next file would take its place, and whatever is printed there
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    stderr = _Stderr(sys.stderr or open(os.devnull, "w"))  # noqa: SIM115 -- open until the process ends
    with redirect_stderr(stderr):
        yield stderr


def stdout_is_lost() -> bool:
    """Whether what was printed cannot be written, as into `| head`; nothing is printed then any more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _to_nowhere(sys.stdout.fileno())
        return True
    return False
