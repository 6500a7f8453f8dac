"""One program against its tests, or as a script, in bubblewrap.

Of tests the verdict comes from the tests' own process. Where that process cannot tell, since the program is gone, the
way in which the program ended decides: beyond its processor time, by the watch for violations, by a signal, or by
leaving early, which is an error whatever its status. Of a script the host compares what was printed.
"""

import json
import math
import os
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.sandbox.bubblewrap import Bubblewrap
from cognexis.eval_harness.sandbox.ends import answer_of, end_of_program, result_of, same_output
from cognexis.eval_harness.sandbox.outcome import CodeResult, Limits, SandboxOutcome
from cognexis.eval_harness.sandbox.supervision import Watched, end_all, watch_until_end


class _Descriptors:
    """Open file descriptors; closing one twice does nothing."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def __enter__(self) -> "_Descriptors":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._open)

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def file(self, data: bytes) -> int:
        """A file in memory, at its beginning."""
        fd = os.memfd_create("cognexis")
        self._open.add(fd)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def message(self, content: dict[str, Any]) -> int:
        """A file with one message of the channel."""
        data = json.dumps(content).encode()
        return self.file(len(data).to_bytes(8, "big") + data)

    def close(self, *fds: int) -> None:
        for fd in fds:
            if fd in self._open:
                self._open.discard(fd)
                os.close(fd)


class BubblewrapSandbox:
    """Runs programs in bubblewrap; see ``cognexis.eval_harness.sandbox.choice.Sandbox``."""

    name = "bubblewrap"

    def __init__(self, executable: str | None = None) -> None:
        self.bubblewrap = Bubblewrap(executable)

    def fault(self) -> str | None:
        """Why it does not work here; None if it does."""
        return self.bubblewrap.fault()

    def run_tests(self, source: str, tests: str, limits: Limits) -> CodeResult:
        """Run a program against tests that call it."""
        started = time.monotonic()
        deadline = started + limits.wall_seconds
        processes: list[subprocess.Popen[bytes]] = []
        with _Descriptors() as descriptors:
            verdict, call, reply, out, err = (descriptors.pipe() for _ in range(5))
            order = descriptors.message({"source": source, "tests": tests})
            try:
                fds = [order, verdict[1], reply[0], call[1]]
                processes.append(self.bubblewrap.start(_words("tests", fds, limits, scratch_bytes=0), pass_fds=fds))
                fds = [call[0], reply[1]]
                processes.append(
                    self.bubblewrap.start(
                        _words("module", fds, limits, limits.scratch_bytes),
                        pass_fds=fds,
                        scratch_bytes=limits.scratch_bytes,
                        stdout=out[1],
                        stderr=err[1],
                    )
                )
                descriptors.close(order, verdict[1], *call, *reply, out[1], err[1])
                watched = Watched({out[0]: bytearray(), err[0]: bytearray()}, {verdict[0]: bytearray()})
                reason = watch_until_end(processes, watched, deadline, limits.output_bytes, ends=0)
                answer = _first_message(watched.messages[verdict[0]])
                if reason is None and answer["outcome"] == "lost":
                    reason = watch_until_end(processes, watched, deadline, limits.output_bytes, ends=1)
            finally:
                end_all(processes)
        judge, program = (process.returncode for process in processes)
        if reason is not None:
            outcome, detail = _limit(reason, limits)
        elif answer["outcome"] == "unsupported":
            raise InvalidConfigError(f"tests: {answer['detail']}")
        elif answer["outcome"] == "lost":
            outcome, detail = end_of_program(program, answer["detail"])
        elif answer["outcome"]:
            outcome, detail = SandboxOutcome(answer["outcome"]), answer["detail"]
        else:
            outcome, detail = end_of_program(judge, "the tests did not end")
        printed, errors = map(bytes, watched.output.values())
        return result_of(outcome, detail, printed, errors, started, self.name)

    def run_script(self, source: str, stdin: str, expected_stdout: str | None, limits: Limits) -> CodeResult:
        """Run a program that reads stdin and prints."""
        started = time.monotonic()
        processes: list[subprocess.Popen[bytes]] = []
        with _Descriptors() as descriptors:
            status, out, err = (descriptors.pipe() for _ in range(3))
            order = descriptors.message({"source": source})
            given = descriptors.file(stdin.encode())
            try:
                fds = [order, status[1]]
                processes.append(
                    self.bubblewrap.start(
                        _words("script", fds, limits, limits.scratch_bytes),
                        pass_fds=fds,
                        scratch_bytes=limits.scratch_bytes,
                        stdin=given,
                        stdout=out[1],
                        stderr=err[1],
                    )
                )
                descriptors.close(order, given, status[1], out[1], err[1])
                watched = Watched({out[0]: bytearray(), err[0]: bytearray()}, {status[0]: bytearray()})
                deadline = started + limits.wall_seconds
                reason = watch_until_end(processes, watched, deadline, limits.output_bytes, ends=0)
            finally:
                end_all(processes)
        code = processes[0].returncode
        said = _first_message(watched.messages[status[0]])
        if reason is not None:
            outcome, detail = _limit(reason, limits)
        elif "compile_error" in said:
            outcome, detail = SandboxOutcome.COMPILE_ERROR, str(said["compile_error"])
        elif said.get("raised") == "MemoryError":
            outcome, detail = SandboxOutcome.MEMORY_LIMIT, "out of memory"
        elif code != 0:
            outcome, detail = end_of_program(code, _last_line(watched.output[err[0]]))
        elif expected_stdout is not None and not same_output(bytes(watched.output[out[0]]), expected_stdout):
            outcome, detail = SandboxOutcome.WRONG_ANSWER, "the output is not the expected one"
        else:
            outcome, detail = SandboxOutcome.PASSED, ""
        printed, errors = map(bytes, watched.output.values())
        return result_of(outcome, detail, printed, errors, started, self.name)


def _words(side: str, fds: Sequence[int], limits: Limits, scratch_bytes: int) -> list[str]:
    seconds = math.ceil(limits.cpu_seconds)
    return [side, *map(str, [*fds, seconds, limits.memory_bytes, scratch_bytes, limits.message_bytes])]


def _limit(reason: str, limits: Limits) -> tuple[SandboxOutcome, str]:
    if reason == "timeout":
        return SandboxOutcome.TIMEOUT, f"no end after {limits.wall_seconds:g} seconds"
    return SandboxOutcome.OUTPUT_LIMIT, f"more than {limits.output_bytes} bytes of output"


def _first_message(data: bytearray) -> dict[str, Any]:
    length = int.from_bytes(data[:8], "big")
    return answer_of(bytes(data[8 : 8 + length]))


def _last_line(text: bytearray) -> str:
    lines: Sequence[str] = bytes(text).decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
