"""End a process right before its k-th file-system event.

The child of a fork counts what changes the file system (files opened for writing, renames, removals, folders made and
removed, and fsync) and leaves without a word when the count is reached, as a killed process does.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_CRASHED, _RAISED = 77, 78


def crash_before_event(event: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a child that ends before its ``event``-th event; True if it came to its end before that."""
    child = os.fork()
    if child == 0:
        try:
            count_and_crash(event)
            action()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(_RAISED)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, _CRASHED), f"the action failed in the child ({code})"
    return code == 0


def count_and_crash(event: int) -> None:
    """From here on, end this process right before its ``event``-th event, counted from 0."""
    seen = 0

    def count() -> None:
        nonlocal seen
        if seen == event:
            os._exit(_CRASHED)
        seen += 1

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or name in _EVENTS:
            count()

    sys.addaudithook(watch)
    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    os.fsync = counted_fsync  # the one event that Python does not report
