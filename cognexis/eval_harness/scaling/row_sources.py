"""The rows on which a loop-scaling study measures a model.

    language_modeling   text, cut into rows of T + 1 tokens of which each is predicted from those before it
    synthetic           the task windowed_parity on its own ids, with an answer at every position; for a checkpoint
                        that was trained on it and has no tokenizer

Letters: R rows, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.scaling.text_rows import read_text_rows
from cognexis.tasks.windowed_parity import WindowedParity

MEASURED_TYPES = ("language_modeling", "synthetic")
_FIRST_SEED = 2**32  # training has seeds below, so its rows are others where rows are long enough to differ


@dataclass(frozen=True)
class ScalingRows:
    """Rows of one length.

    Attributes:
        ids: ``[R, T + 1]``; with labels ``[R, T]``.
        labels: ``[R, T]``, the answer at each position or -100; None predicts the next token.
        version: what the rows are, for the result rows.
    """

    ids: Tensor
    labels: Tensor | None
    version: str

    @property
    def length(self) -> int:
        """T."""
        return self.ids.shape[1] - (self.labels is None)

    def spread(self, count: int) -> Tensor:
        """At most ``count`` rows of ids at equal distances."""
        return _spread(self.ids, count)


def is_measured(dataset: Any) -> bool:
    """Whether loop scaling has rows of a data set; what it leaves out is measured by ``cognexis eval``."""
    return dataset.type == "language_modeling" or (dataset.type == "synthetic" and dataset.task == WindowedParity.name)


def read_scaling_rows(
    dataset: Any, tokenizer: Any | None, model_config: Any, *, length: int, max_rows: int, seed: int
) -> ScalingRows:
    """The rows of one data set of a run configuration.

    Args:
        tokenizer: of the checkpoint; None where it has none.
        length: T of text.
        max_rows: most rows, at equal distances.

    Raises:
        InvalidConfigError: the data set does not fit the checkpoint, or its file is damaged.
    """
    if dataset.type == "synthetic":
        return _parity_rows(dataset, tokenizer, model_config, max_rows, seed)
    if tokenizer is None:
        raise InvalidConfigError(f"data set {dataset.name!r}: is text, and the checkpoint has no tokenizer")
    rows = read_text_rows(Path(dataset.path), tokenizer, length, model_config.vocab_size)
    return ScalingRows(_spread(rows, max_rows), None, f"text rows of {length} tokens, 1")


def _parity_rows(dataset: Any, tokenizer: Any | None, model_config: Any, max_rows: int, seed: int) -> ScalingRows:
    options = {name: value for name, value in dataset.options.items() if (name, value) != ("form", "ids")}
    num_bits = options.pop("num_bits", options.pop("difficulty", 24))
    count = min(max_rows, options.pop("num_examples", max_rows))
    if options:
        raise InvalidConfigError(f"data set {dataset.name!r}: options {sorted(options)} are unknown to loop scaling")
    if dataset.task != WindowedParity.name or tokenizer is not None:
        raise InvalidConfigError(
            f"data set {dataset.name!r}: loop scaling measures task={WindowedParity.name}, on a checkpoint without a "
            f"tokenizer, not {dataset.task!r} as text; `cognexis eval` does"
        )
    task = WindowedParity(min(count, 2 ** min(num_bits, 30)), num_bits=num_bits, seed=_FIRST_SEED + seed)
    if task.vocab_size != model_config.vocab_size:
        raise InvalidConfigError(
            f"data set {dataset.name!r}: has a vocabulary of {task.vocab_size}, the model one of "
            f"{model_config.vocab_size}"
        )
    return ScalingRows(task.ids, task.labels, f"{task.name} of {num_bits} bits, 1")


def _spread(rows: Tensor, count: int) -> Tensor:
    return rows if len(rows) <= count else rows[torch.arange(count) * len(rows) // count]
