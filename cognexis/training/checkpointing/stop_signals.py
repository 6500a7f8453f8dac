"""Ending a run from outside without losing work.

The first SIGTERM or SIGINT asks for an end: the step is finished, the state saved, and the run returns. The second one
ends the process at once with 128 + its number; whatever was being saved then is cleared by the next save. Outside the
main thread, where Python delivers no signals, nothing is changed.
"""

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Handlers for the time of a ``with`` block; ``received`` is the first signal, or None."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
