"""What a run of a program may use, and how it ended."""

import math
from dataclasses import dataclass, fields
from enum import StrEnum

from cognexis.errors import InvalidConfigError


class SandboxOutcome(StrEnum):
    """How a program ended; only ``PASSED`` counts as solved."""

    PASSED = "passed"
    WRONG_ANSWER = "wrong_answer"
    COMPILE_ERROR = "compile_error"
    RUNTIME_ERROR = "runtime_error"
    TIMEOUT = "timeout"
    SANDBOX_VIOLATION = "sandbox_violation"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"


@dataclass(frozen=True)
class Limits:
    """Bounds of one run; the program and its tests have them each.

    Attributes:
        cpu_seconds: processor time of all threads together, rounded up to whole seconds.
        wall_seconds: time until everything is killed.
        memory_bytes: address space, 64 MiB or more.
        output_bytes: stdout and stderr together.
        message_bytes: one call or one result.
        scratch_bytes: a writable /tmp of this size; 0: no writable place.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 30.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    message_bytes: int = 16 * 2**20
    scratch_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = {"memory_bytes": 64 * 2**20, "scratch_bytes": 0, "output_bytes": 0}.get(field.name, 0.001)
            if isinstance(value, bool) or not math.isfinite(value) or value < least:
                raise InvalidConfigError(f"{field.name}={value!r}: must be a finite number of {least} or more")


@dataclass(frozen=True)
class CodeResult:
    """End of one run.

    Attributes:
        outcome: how it ended.
        detail: one line on the reason; empty if it passed.
        stdout: what the program printed, as far as ``output_bytes`` allow, undecodable bytes replaced.
        stderr: likewise.
        wall_seconds: time from start to end.
        sandbox: "bubblewrap" or "wasi".
    """

    outcome: SandboxOutcome
    detail: str
    stdout: str
    stderr: str
    wall_seconds: float
    sandbox: str

    @property
    def passed(self) -> bool:
        """Whether every test passed."""
        return self.outcome is SandboxOutcome.PASSED
