"""Scores and answers of single examples, beside the rows.

``samples.jsonl`` has one line {"row": identity, "scores": [...]} for every row whose metric is a mean: the scores in
the order of the examples, which is equal at every depth, so that differences between depths keep their pairing.
``predictions.jsonl`` has the first answers of every run, to be looked at.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from cognexis.eval_harness.result_files import append_lines
from cognexis.eval_harness.results import ResultRow


def append_samples(path: Path, rows: Sequence[ResultRow], scores: dict[str, list[float]]) -> None:
    """Add the scores of the completed rows that have some, by metric."""
    completed = [row for row in rows if row.status == "completed" and row.metric_name in scores]
    append_lines(path, [{"row": json.dumps(row.identity), "scores": scores[row.metric_name]} for row in completed])
