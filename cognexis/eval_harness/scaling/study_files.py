"""What a study keeps besides its rows: scores of single examples, and texts continued at every depth.

    samples.jsonl         {"row": identity of a row, "scores": [...]}
    continuations.jsonl   {"row": identity of a row, "prompts": [...], "texts": [...]}

A line that a kill cut off is left out; of repeated lines the last counts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cognexis.checkpoints.json_file import parse_strict_json
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.results import ResultRow
from cognexis.eval_harness.scaling.study import Continuations, Samples

SAMPLES, CONTINUATIONS = "samples.jsonl", "continuations.jsonl"


def row_key(row: ResultRow) -> str:
    """The identity of a row as text."""
    return json.dumps(row.identity)


def read_samples(path: Path, rows: Iterable[ResultRow]) -> Samples:
    """Scores of single examples by identity of the row.

    Raises:
        InvalidConfigError: a complete line is damaged.
    """
    found = {str(line["row"]): [float(score) for score in line["scores"]] for line in _lines(path, ("row", "scores"))}
    return {row.identity: found[row_key(row)] for row in rows if row_key(row) in found}


def read_continuations(path: Path, rows: Iterable[ResultRow]) -> Continuations:
    """Pairs of prompt and continuation by identity of the row.

    Raises:
        InvalidConfigError: a complete line is damaged.
    """
    found = {
        str(line["row"]): [
            (str(prompt), str(text)) for prompt, text in zip(line["prompts"], line["texts"], strict=True)
        ]
        for line in _lines(path, ("row", "prompts", "texts"))
    }
    return {row.identity: found[row_key(row)] for row in rows if row_key(row) in found}


def _lines(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return

    def refuse(reason: str) -> Any:
        raise InvalidConfigError(f"{path}: {reason}")

    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        content = parse_strict_json(line, refuse)
        if not isinstance(content, dict) or any(key not in content for key in keys):
            refuse(f"line {number}: must be an object with {', '.join(keys)}")
        yield content
