"""Standard streams that nobody listens to any more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO

BROKEN_PIPE = 141  # the exit status of a command that SIGPIPE ends


class _Stream:
    """A stream that remembers that it was lost; what it held is dropped then, so that the interpreter does not try
    again at its end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.lost = stream, False

    def write(self, text: str) -> int:
        try:
            self._try(self.stream.write, text)
        except UnicodeEncodeError:  # a name that the encoding of this stream does not have
            encoding = self.stream.encoding
            self._try(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable, *arguments: str) -> None:
        if self.lost:
            return
        try:
            call(*arguments)
        except OSError as error:
            if not self.lose(error):
                raise

    def lose(self, error: OSError) -> bool:
        """Whether that is all there is to do."""
        self.lost = isinstance(error, BrokenPipeError)
        if self.lost:
            self._to_nowhere()
        return False

    def _to_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class _Messages(_Stream):
    """A message is no reason to fail: where it cannot be written, the terminal is gone, which SIGHUP says to a run (it
    saves and ends, or goes on under nohup)."""

    def lose(self, error: OSError) -> bool:
        self.lost = True
        self._to_nowhere()
        signal.raise_signal(getattr(signal, "SIGHUP", signal.SIGTERM))
        return True


@contextmanager
def guarded() -> Iterator[tuple[_Stream, _Messages]]:
    """Stdout and stderr, which are safe inside: either may be closed, or close, and the command ends quietly."""
    # where one is closed, the next file would take its place, and whatever is printed there
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)

    # closed with the process
    out, err = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    stdout, stderr = _Stream(out), _Messages(err)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            yield stdout, stderr
        finally:
            with suppress(BrokenPipeError):
                stdout.flush()
