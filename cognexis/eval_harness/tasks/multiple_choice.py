"""Multiple choice by likelihood: the continuation that the model finds most likely is its answer.

    accuracy             argmax of the summed log-likelihood of a choice
    accuracy_normalized  argmax of the same divided by the bytes of the choice's text

Of equal scores the lowest index is chosen. A sum favours short choices; bytes, unlike tokens, do not depend on the
tokenizer. A line of the file is {"question": text, "choices": [text, ...], "answer": index from 0}. The prompt is

    Question: <question>
    Answer: <choice>
"""

from collections.abc import Sequence
from pathlib import Path

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.matching import multiple_choice
from cognexis.eval_harness.tasks.protocol import HIGHER, Choice, ChoiceScores, Example, Task
from cognexis.eval_harness.tasks.records import read_records, text_list


class MultipleChoice(Task):
    """Questions with a list of answers, from a JSONL file."""

    name = "multiple_choice"
    prompt_format = "question-answer"
    metrics = {"accuracy": HIGHER, "accuracy_normalized": HIGHER}

    def __init__(self, path: Path) -> None:
        self._examples = []
        for record in read_records(path, {"question": str, "choices": list, "answer": int}, {}):
            choices = text_list(record, "choices", path, least=2)
            if not 0 <= record["answer"] < len(choices):
                raise InvalidConfigError(
                    f"{path}: example {record['id']!r}: answer={record['answer']}: must be 0 to {len(choices) - 1}"
                )
            request = Choice(f"Question: {record['question']}\nAnswer:", tuple(f" {text}" for text in choices))
            self._examples.append(Example(record["id"], request, record["answer"]))

    def examples(self) -> Sequence[Example]:
        return self._examples

    def score(self, prediction: ChoiceScores, example: Example) -> dict[str, float]:
        return choice_metrics(prediction, example)


def choice_metrics(prediction: ChoiceScores, example: Example) -> dict[str, float]:
    """``accuracy`` and ``accuracy_normalized`` of a choice whose reference is the right index."""
    assert isinstance(example.request, Choice)
    sizes = [
        len(choice.encode()) if isinstance(choice, str) else length
        for choice, length in zip(example.request.choices, prediction.lengths, strict=True)
    ]
    normalized = [total / size for total, size in zip(prediction.sums, sizes, strict=True)]
    return {
        "accuracy": multiple_choice(prediction.sums, example.reference),
        "accuracy_normalized": multiple_choice(normalized, example.reference),
    }
