"""Language modelling: how likely is real text?

    negative_log_likelihood   mean nats per predicted token of a row
    perplexity                exp of its mean over all rows
    accuracy                  share of tokens that were the most likely ones

Documents stand one after another and are cut into rows of ``row_length`` + 1 tokens, so a row is an example and every
token but the first is predicted; by default 128 are, or what the model has positions for. Sources are those of
``read_text_rows``.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.language import perplexity
from cognexis.eval_harness.scaling.text_rows import read_text_rows
from cognexis.eval_harness.tasks.protocol import HIGHER, LOWER, Example, Likelihood, Task, TokenScores

_USUAL_LENGTH = 128


class LanguageModeling(Task):
    """Rows of text of one length."""

    name = "language_modeling"
    metrics = {"negative_log_likelihood": LOWER, "perplexity": LOWER, "accuracy": HIGHER}
    derived = {"perplexity": lambda means: perplexity(means["negative_log_likelihood"])}

    def __init__(
        self, path: Path, tokenizer: Any, vocab_size: int, max_length: int, *, row_length: int | None = None
    ) -> None:
        longest = max_length - 1  # a row holds one token more
        if row_length is not None and not 1 <= row_length <= longest:
            raise InvalidConfigError(
                f"options.row_length={row_length}: must be 1 to {longest}", path="options.row_length", value=row_length
            )
        self.row_length = row_length or min(_USUAL_LENGTH, longest)
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
