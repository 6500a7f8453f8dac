"""A thread that works ahead by a bounded number of items."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

from cognexis.errors import InvalidConfigError

T = TypeVar("T")
_POLL_SECONDS = 0.1


def prefetch(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield the items of ``source`` while a thread fetches the next ones.

    At most ``depth`` finished items wait, one more is being made; a slow consumer slows the thread down. An error of
    the source is raised where its item would have come. Closing the generator ends the thread.

    Args:
        source: is iterated in the thread.
        depth: items that may wait, 1 or more.

    Raises:
        InvalidConfigError: ``depth`` is out of range.
    """
    if type(depth) is not int or depth < 1:
        raise InvalidConfigError(f"depth={depth!r}: must be a whole number of 1 or more", path="depth", value=depth)
    return _prefetched(source, depth)


def _prefetched(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    waiting: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, item: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put((kind, item), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in source:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="cognexis-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = waiting.get()
            if kind == "error":
                raise item  # type: ignore[misc]
            if kind == "end":
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):  # room for an item that is about to be put
                waiting.get_nowait()
            thread.join(_POLL_SECONDS / 10)
