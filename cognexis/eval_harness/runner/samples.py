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
    """Add the lines of strict JSON that are not there yet, forced to disk; what a kill cut off is removed first."""
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
    known = set(data.split(b"\n")[:-1])
    lines = [json.dumps(content, ensure_ascii=False, allow_nan=False).encode() for content in contents]
    with open(path, "ab") as file:
        file.write(b"".join(line + b"\n" for line in lines if line not in known))
        file.flush()
        os.fsync(file.fileno())


def append_samples(path: Path, rows: Sequence[ResultRow], scores: dict[str, list[float]]) -> None:
    """Add the scores of the completed rows that have some, by metric."""
    completed = [row for row in rows if row.status == "completed" and row.metric_name in scores]
    append_lines(path, [{"row": json.dumps(row.identity), "scores": scores[row.metric_name]} for row in completed])
