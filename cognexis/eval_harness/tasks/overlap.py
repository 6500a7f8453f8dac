"""Free text that is compared with references by overlap: summaries, descriptions, translations.

    rouge_l   F1 of the longest common subsequence of words, of the reference that fits best, by rouge-score

A line of the file is {"prompt": text, "references": [text, ...]}.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.eval_harness.metrics.text_overlap import rouge
from cognexis.eval_harness.tasks.protocol import HIGHER, Example, Generation, Task
from cognexis.eval_harness.tasks.records import read_records, text_list


class TextOverlap(Task):
    """Prompts with texts to compare the answer with, from a JSONL file."""

    name = "generation"
    metrics = {"rouge_l": HIGHER}

    def __init__(
        self, path: Path, *, max_new_tokens: int = 128, stop: tuple[str, ...] = (), is_chat: bool = False
    ) -> None:
        self.prompt_format = "chat" if is_chat else "none"
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": stop}
        self._examples = [
            Example(
                record["id"],
                Generation(record["prompt"], is_chat=is_chat, **self._settings),
                text_list(record, "references", path),
            )
            for record in read_records(path, {"prompt": str, "references": list}, {})
        ]

    @property
    def decoding(self) -> dict[str, Any]:
        return {"temperature": 0.0, **self._settings}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def score(self, prediction: Sequence[str], example: Example) -> dict[str, float]:
        return {"rouge_l": rouge([prediction[0]], [list(example.reference)])[0]}
