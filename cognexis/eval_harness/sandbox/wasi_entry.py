"""Inside WebAssembly: where a guest begins. Its one way out is a function of the host that takes and returns bytes.

The words of the command are the side ("tests", "module" or "script") and the most bytes of a message. A frame of the
tests begins with "h" for the host or "p" for the program. The host bounds memory, time and output from outside.
"""

import json

from cognexis.eval_harness.sandbox.program_side import run_script, serve, watch
from cognexis.eval_harness.sandbox.tests_side import verdict_of
from cognexis.eval_harness.sandbox.wire import Channel, Disconnected, TooLarge

_ORDER_LIMIT = 2**31


class DoorChannel(Channel):
    """Messages through the host's function: what was sent goes out with the next wish to receive."""

    def __init__(self, prefix: bytes, limit: int) -> None:
        self.prefix, self.limit = prefix, limit
        self.waiting = b""

    def send_bytes(self, data: bytes) -> None:
        self.flush()
        self.waiting = data

    def receive_bytes(self) -> bytes:
        reply = self.flush(ask=True)
        if not reply:
            raise Disconnected("the other side ended")
        if len(reply) > self.limit:
            raise TooLarge(f"a message of {len(reply)} bytes; at most {self.limit}")
        return reply

    def flush(self, ask: bool = False) -> bytes:
        """Hand over what waits; with ``ask`` also when nothing does."""
        import _host  # type: ignore[import-not-found]

        data, self.waiting = self.waiting, b""
        return bytes(_host.call(self.prefix + data)) if data or ask else b""


def begin(side: str, message_bytes: str) -> int:
    """Run one side; the exit status."""
    if side == "tests":
        host = DoorChannel(b"h", _ORDER_LIMIT)
        verdict = verdict_of(json.loads(host.receive_bytes()), DoorChannel(b"p", int(message_bytes)))
        host.send(verdict)
        host.flush()
        return 0
    channel = DoorChannel(b"", _ORDER_LIMIT if side == "script" else int(message_bytes))
    try:
        if side == "script":
            source = channel.receive()["source"]
            watch(None)
            return run_script(source, channel)
        watch(None)
        serve(channel)
    finally:
        channel.flush()
    return 0
