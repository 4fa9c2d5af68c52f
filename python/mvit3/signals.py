"""Signals that end a run in good order."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType

INTERRUPTED = 130  # the exit status after Ctrl-C


class StopSignals:
    """Inside it SIGTERM, SIGINT and SIGHUP set `asked`, for the run to end after its step; a second SIGINT interrupts
    at once. nohup's wish that SIGHUP be ignored is kept. `number`: the first of the signals that came."""

    NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.number, self._before = 0, {}

    @property
    def asked(self) -> bool:
        return self.number != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and number == signal.SIGINT:
            # Not by print: the signal may have come in the middle of one.
            with suppress(OSError, ValueError, AttributeError):
                os.write(sys.stderr.fileno(), b"\nstopping after this step (Ctrl-C again: at once)\n")
        self.number = self.number or number

    def __enter__(self) -> StopSignals:
        for number in self.NUMBERS:
            if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                continue
            with suppress(ValueError):  # not in the main thread
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
