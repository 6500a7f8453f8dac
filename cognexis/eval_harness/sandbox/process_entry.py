"""Inside bubblewrap: where a process begins, with its limits, before it sees the program.

The words of the command are the side ("tests", "module" or "script"), the file descriptors, and the limits.
"""

import os
import resource

from cognexis.eval_harness.sandbox.program_side import run_script, serve, watch
from cognexis.eval_harness.sandbox.tests_side import verdict_of
from cognexis.eval_harness.sandbox.wire import Channel, Disconnected, TooLarge

_ORDER_LIMIT = 2**31


class PipeChannel(Channel):
    """Messages over two file descriptors, each after its length in eight bytes."""

    def __init__(self, read_fd: int, write_fd: int, limit: int) -> None:
        self.read_fd, self.write_fd, self.limit = read_fd, write_fd, limit

    def send_bytes(self, data: bytes) -> None:
        data = len(data).to_bytes(8, "big") + data
        while data:
            try:
                data = data[os.write(self.write_fd, data) :]
            except OSError as error:
                raise Disconnected(str(error)) from None

    def receive_bytes(self) -> bytes:
        length = int.from_bytes(self._exactly(8), "big")
        if length > self.limit:
            raise TooLarge(f"a message of {length} bytes; at most {self.limit}")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self.read_fd, min(count, 1 << 20))
            if not part:
                raise Disconnected("the other side closed the channel")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def set_limits(cpu_seconds: int, memory_bytes: int, scratch_bytes: int) -> None:
    """Bound this process; the bounds cannot be raised again."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    wanted = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: scratch_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in wanted.items():
        resource.setrlimit(kind, (bound, bound))


def begin(side: str, *words: str) -> int:
    """Run one side; the exit status. "probe" only shows that a process can be started."""
    if side == "probe":
        return 0
    *fds, cpu_seconds, memory_bytes, scratch_bytes, message_bytes = map(int, words)
    set_limits(cpu_seconds, memory_bytes, scratch_bytes)
    if side == "tests":
        order_fd, verdict_fd, read_fd, write_fd = fds
        host = PipeChannel(order_fd, verdict_fd, _ORDER_LIMIT)
        host.send(verdict_of(host.receive(), PipeChannel(read_fd, write_fd, message_bytes)))
        return 0
    scratch = "/tmp" if scratch_bytes else None
    read_fd, write_fd = fds
    if side == "script":
        channel = PipeChannel(read_fd, write_fd, _ORDER_LIMIT)
        source = channel.receive()["source"]
        watch(scratch)
        return run_script(source, channel)
    watch(scratch)
    serve(PipeChannel(read_fd, write_fd, message_bytes))
    return 0
