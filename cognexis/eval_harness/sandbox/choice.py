"""Which sandbox runs generated programs: bubblewrap, then WebAssembly (wasi), then none.

    sandbox = open_sandbox("auto")
    result = sandbox.run_tests("def add(a, b): return a + b", "assert add(1, 2) == 3", Limits())

A program is never run without a sandbox.
"""

from typing import Protocol

from cognexis.errors import BackendError, InvalidConfigError, SafetyError
from cognexis.eval_harness.sandbox.bubblewrap_runs import BubblewrapSandbox
from cognexis.eval_harness.sandbox.outcome import CodeResult, Limits
from cognexis.eval_harness.sandbox.wasi import WasiSandbox


class Sandbox(Protocol):
    """Runs Python programs that nobody vouches for."""

    @property
    def name(self) -> str:
        """The name in results."""

    def fault(self) -> str | None:
        """Why it does not work here, with instructions; None if it does."""

    def run_tests(self, source: str, tests: str, limits: Limits) -> CodeResult:
        """Run a program against tests that call it.

        Args:
            source: Python of the program; it runs as a module, not as ``__main__``.
            tests: Python with assertions; names that it does not define come from the program. What passes between
                the two are plain values, and objects of the program whose methods can be called.

        Raises:
            InvalidConfigError: the tests are no Python, never use the program, or pass what cannot travel.
        """

    def run_script(self, source: str, stdin: str, expected_stdout: str | None, limits: Limits) -> CodeResult:
        """Run a program as ``__main__`` and compare what it prints.

        Args:
            expected_stdout: compared line by line without white space at the ends; None: nothing is compared.
        """


def sandboxes() -> dict[str, Sandbox]:
    """Every sandbox by the name of the setting ``safety.code_sandbox``, the preferred first."""
    return {"bubblewrap": BubblewrapSandbox(), "wasi": WasiSandbox()}


def open_sandbox(name: str = "auto") -> Sandbox:
    """The sandbox of that name; "auto": the first that works here.

    Raises:
        InvalidConfigError: an unknown name.
        SafetyError: "disabled".
        BackendError: it does not work here; the message says what to install.
    """
    known = sandboxes()
    if name == "disabled":
        raise SafetyError("code_sandbox='disabled': generated programs are not run")
    if name not in ("auto", *known):
        raise InvalidConfigError(f"code_sandbox={name!r}: must be one of auto, {', '.join(known)}, disabled")
    faults = []
    for candidate in known.values() if name == "auto" else [known[name]]:
        if (fault := candidate.fault()) is None:
            return candidate
        faults.append(f"{candidate.name}: {fault}")
    raise BackendError(f"generated programs cannot be run safely here. {' '.join(faults)}")
