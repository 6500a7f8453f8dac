"""The same data as objects of the ``datasets`` library, for a plain ``Trainer`` and for looking at them.

    iterable_documents   any input -> documents, read as a stream
    iterable_rows        token shards -> packed rows, in the order of the shards or of a RowOrder
    row_dataset          token shards -> packed rows by number, made when they are asked for

A ``Trainer`` also takes ``TokenData.rows`` as it is. ``row_dataset`` needs ``remove_unused_columns=False`` there.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from cognexis.training.data.blocks import JoinedRows
from cognexis.training.data.corruption import FaultHandler, RecordCounts
from cognexis.training.data.inputs import DataInput, WeightedSource, open_inputs
from cognexis.training.data.opening import TokenData
from cognexis.training.data.order import RowOrder
from cognexis.training.data.pipeline import DocumentPipeline

_ROWS_AT_ONCE = 256


def iterable_documents(
    inputs: Sequence[DataInput], tokenizer: Any, *, policy: str = "fail", **settings: Any
) -> IterableDataset:
    """Documents of any inputs as ``input_ids`` and ``loss_mask``, the end-of-document token included.

    Args:
        inputs: what is read; each file is a shard of the dataset.
        tokenizer: a ``CognexisTokenizer``.
        policy: what a broken record does.
        settings: of :class:`DocumentPipeline`.
    """
    pipeline = DocumentPipeline(tokenizer, **settings)
    FaultHandler(policy, RecordCounts())
    sources = open_inputs(inputs)
    arguments = {"sources": sources, "pipeline": [pipeline], "policy": policy}
    return IterableDataset.from_generator(_documents, gen_kwargs=arguments)


def iterable_rows(data: TokenData, order: RowOrder | None = None) -> IterableDataset:
    """Packed rows once through; with an order its first epoch."""
    return IterableDataset.from_generator(_rows, gen_kwargs={"rows": data.rows, "order": order})


def row_dataset(data: TokenData) -> Dataset:
    """Packed rows by number; what is stored is the number only."""
    rows = Dataset.from_dict({"row": range(len(data.rows))})
    rows.set_transform(_RowsByNumber(data.rows))
    return rows


class _RowsByNumber:
    """Turns row numbers into rows."""

    def __init__(self, rows: JoinedRows) -> None:
        self.rows = rows

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [self.rows[index] for index in batch["row"]]
        return {name: [row[name] for row in found] for name in found[0]}


def _documents(
    sources: list[WeightedSource], pipeline: list[DocumentPipeline], policy: str
) -> Iterator[dict[str, list[int]]]:
    handler = FaultHandler(policy, RecordCounts())
    for weighted in sources:
        for _, document in pipeline[0].documents(weighted.source.read(), handler, weighted.on_control):
            if document is not None:
                mask = document.is_target if document.is_target is not None else [1] * len(document.tokens)
                yield {"input_ids": document.tokens, "loss_mask": mask}


def _rows(rows: JoinedRows, order: RowOrder | None) -> Iterator[dict[str, list[int]]]:
    order = order or RowOrder(len(rows), shuffle=False)
    for start in range(0, order.rows_per_epoch, _ROWS_AT_ONCE):
        for index in order.rows(start, min(order.rows_per_epoch, start + _ROWS_AT_ONCE)).tolist():
            yield {name: value.tolist() for name, value in rows[index].items()}
