"""A generated answer is right or wrong: equal text, or equal mathematical value.

``equality: text`` compares the answer without the white space around it; ``equality: maths`` compares values by the
package math-verify, so that 1/2 and 0.5 are equal. A line of the file is {"question": text, "answer": text}. The
prompt is

    Question: <question>
    Answer:

and with ``is_chat: true`` the question goes through the chat template instead. The answer ends at the first of
``stop``, by default a line break.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.matching import exact_match
from cognexis.eval_harness.metrics.mathematics import maths_equal
from cognexis.eval_harness.tasks.protocol import HIGHER, Example, Generation, Task
from cognexis.eval_harness.tasks.records import read_records

_EQUALITIES = {"text": exact_match, "maths": maths_equal}


class ExactMatch(Task):
    """Questions with one right answer, from a JSONL file."""

    name = "exact_match"
    metrics = {"exact_match": HIGHER}

    def __init__(
        self,
        path: Path,
        *,
        equality: str = "text",
        max_new_tokens: int = 64,
        stop: tuple[str, ...] = ("\n",),
        is_chat: bool = False,
    ) -> None:
        if equality not in _EQUALITIES:
            raise InvalidConfigError(f"options.equality={equality!r}: must be one of {', '.join(_EQUALITIES)}")
        self.equality = equality
        self.prompt_format = "chat" if is_chat else "question-answer"
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop, "is_chat": is_chat}
        self._examples = [
            Example(
                record["id"],
                Generation(
                    record["question"] if is_chat else f"Question: {record['question']}\nAnswer:", **self._settings
                ),
                record["answer"],
            )
            for record in read_records(path, {"question": str, "answer": str}, {})
        ]

    @property
    def decoding(self) -> dict[str, Any]:
        shown = {name: self._settings[name] for name in ("max_new_tokens", "stop")}
        return {"temperature": 0.0, "equality": self.equality, **shown}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def score(self, prediction: Sequence[str], example: Example) -> dict[str, float]:
        return {"exact_match": _EQUALITIES[self.equality](prediction[0], example.reference)}
