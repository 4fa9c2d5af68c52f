"""Signals that end a run in good order."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopSignals:
    """Inside it SIGTERM and SIGINT set `asked`, for the run to end after its step; a second SIGINT interrupts at once."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.asked, self._before = False, {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> StopSignals:
        try:
            self._before = {number: signal.signal(number, self._handle) for number in self.NUMBERS}
        except ValueError:  # not in the main thread
            self._before = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
