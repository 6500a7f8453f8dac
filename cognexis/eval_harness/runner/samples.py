"""Scores and answers of single examples, beside the rows.

``samples.jsonl`` has one line {"row": identity, "scores": [...]} for every row whose metric is a mean: the scores in
the order of the examples, which is equal at every depth, so that differences between depths keep their pairing.
``predictions.jsonl`` has the first answers of every run, to be looked at.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cognexis.eval_harness.results import ResultRow


def append_lines(path: Path, contents: Sequence[Any]) -> None:
    """Add lines of strict JSON, forced to disk; a line that a kill cut off is removed first."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    with open(path, "ab") as file:
        for content in contents:
            file.write(json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def append_samples(path: Path, rows: Sequence[ResultRow], scores: dict[str, list[float]]) -> None:
    """Add the scores of the completed rows that have some, by metric."""
    completed = [row for row in rows if row.status == "completed" and row.metric_name in scores]
    append_lines(path, [{"row": json.dumps(row.identity), "scores": scores[row.metric_name]} for row in completed])
