"""From the end of a process to an outcome."""

import json
import signal
import time
from typing import Any

from cognexis.eval_harness.sandbox.outcome import CodeResult, SandboxOutcome
from cognexis.eval_harness.sandbox.program_side import VIOLATION_EXIT


def same_output(printed: bytes, expected: str) -> bool:
    """Whether both texts have the same lines, white space at the ends of lines and of the text left out."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(printed.decode("utf-8", "replace")) == lines(expected)


def end_of_program(code: int, detail: str) -> tuple[SandboxOutcome, str]:
    """The outcome of a program that ended by itself: its own status, or 128 + the number of a signal."""
    if code == VIOLATION_EXIT:
        return SandboxOutcome.SANDBOX_VIOLATION, detail
    if code in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return SandboxOutcome.TIMEOUT, "out of processor time"
    if code == 128 + signal.SIGXFSZ:
        return SandboxOutcome.OUTPUT_LIMIT, "a file became too large"
    if code == 128 + signal.SIGSYS:
        return SandboxOutcome.SANDBOX_VIOLATION, "a system call of another architecture"
    if code > 128:
        number = code - 128
        name = signal.Signals(number).name if number in [*signal.Signals] else str(number)
        return SandboxOutcome.RUNTIME_ERROR, f"ended by {name}"
    return SandboxOutcome.RUNTIME_ERROR, f"ended with status {code}: {detail}"


def answer_of(message: bytes) -> dict[str, Any]:
    """A message of a process as a dictionary; one with an empty outcome where there is none."""
    nothing = {"outcome": "", "detail": ""}
    try:
        found = json.loads(message) if message else nothing
    except ValueError:
        return nothing
    return found if isinstance(found, dict) else nothing


def result_of(
    outcome: SandboxOutcome, detail: str, stdout: bytes, stderr: bytes, started: float, sandbox: str
) -> CodeResult:
    """The result of a run that began at ``started``; a violation is described by the watch's own words."""
    printed, errors = (text.decode("utf-8", "replace") for text in (stdout, stderr))
    if outcome is SandboxOutcome.SANDBOX_VIOLATION and "sandbox: " in errors:
        detail = errors[errors.rindex("sandbox: ") :].strip()
    return CodeResult(outcome, detail[:500], printed, errors, time.monotonic() - started, sandbox)
