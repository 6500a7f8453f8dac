"""Code generation: a program is right if it passes unit tests in a sandbox.

    pass_at_k   chance that one of ``k`` programs passes, estimated from ``num_samples`` programs

A line of the file is {"prompt": text, "tests": text}. The program is the prompt and what the model adds to it, up to
the first of ``stop``. The tests are Python with assertions; names that they do not define come from the program. A
program is never run without a sandbox; where none works, the evaluation ends before anything is measured.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.pass_at_k import pass_at_k
from cognexis.eval_harness.sandbox.choice import open_sandbox
from cognexis.eval_harness.sandbox.outcome import Limits
from cognexis.eval_harness.tasks.protocol import HIGHER, Example, Generation, Task
from cognexis.eval_harness.tasks.records import read_records

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@")


class CodeGeneration(Task):
    """Programs with unit tests, from a JSONL file."""

    name = "code"
    prompt_format = "none"
    metrics = {"pass_at_k": HIGHER}

    def __init__(
        self,
        path: Path,
        sandbox: str,
        *,
        k: int = 1,
        num_samples: int = 1,
        temperature: float = 0.0,
        max_new_tokens: int = 256,
        stop: tuple[str, ...] = STOPS,
        cpu_seconds: float = 5.0,
        memory_bytes: int = 512 * 2**20,
    ) -> None:
        if not 1 <= k <= num_samples:
            raise InvalidConfigError(
                f"options.k={k}: must be 1 to num_samples={num_samples}", path="options.k", value=k
            )
        self.k = k
        self.limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=3 * cpu_seconds, memory_bytes=memory_bytes)
        self._sandbox = open_sandbox(sandbox)
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_samples": num_samples, "stop": stop}
        self._settings |= {"temperature": float(temperature)}
        self._examples = [
            Example(record["id"], Generation(record["prompt"], **self._settings), record["tests"])
            for record in read_records(path, {"prompt": str, "tests": str}, {"entry_point": str})
        ]

    @property
    def decoding(self) -> dict[str, Any]:
        return {"k": self.k, "sandbox": self._sandbox.name, **self._settings}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def score(self, prediction: Sequence[str], example: Example) -> dict[str, float]:
        assert isinstance(example.request, Generation)
        programs = [f"{example.request.prompt}{text}" for text in prediction]
        passed = sum(self._sandbox.run_tests(text, example.reference, self.limits).passed for text in programs)
        return {"pass_at_k": pass_at_k(len(programs), passed, self.k)}
