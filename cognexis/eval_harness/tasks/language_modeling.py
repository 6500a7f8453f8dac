"""Language modelling: how likely is real text?

    negative_log_likelihood   mean nats per predicted token of a row
    perplexity                exp of its mean over all rows
    accuracy                  share of tokens that were the most likely ones

Documents stand one after another and are cut into rows of ``row_length`` + 1 tokens, so a row is an example and every
token but the first is predicted. Sources are those of ``read_text_rows``.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.eval_harness.metrics.language import perplexity
from cognexis.eval_harness.scaling.text_rows import read_text_rows
from cognexis.eval_harness.tasks.protocol import HIGHER, LOWER, Example, Likelihood, Task, TokenScores


class LanguageModeling(Task):
    """Rows of text of one length."""

    name = "language_modeling"
    metrics = {"negative_log_likelihood": LOWER, "perplexity": LOWER, "accuracy": HIGHER}
    derived = {"perplexity": lambda means: perplexity(means["negative_log_likelihood"])}

    def __init__(self, path: Path, tokenizer: Any, vocab_size: int, max_length: int, *, row_length: int = 128) -> None:
        self.row_length = min(row_length, max_length - 1)
        rows = read_text_rows(path, tokenizer, self.row_length, vocab_size)
        self._examples = [Example(str(n), Likelihood(tuple(row))) for n, row in enumerate(rows.tolist())]
        self.prompt_format = f"rows of {self.row_length} tokens"

    def examples(self) -> Sequence[Example]:
        return self._examples

    def score(self, prediction: TokenScores, example: Example) -> dict[str, float]:
        count = len(prediction.nats)
        return {
            "negative_log_likelihood": math.fsum(prediction.nats) / count,
            "accuracy": sum(prediction.is_best) / count,
        }
