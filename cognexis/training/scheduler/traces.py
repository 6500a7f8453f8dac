"""Depth traces: per token and per loop what a model at fixed depth did, in memory and on disk.

    gain_i       loss_i - loss_{i+1}                 null at the last loop
    best_gain_i  loss_i - min_{j > i} loss_j         null at the last loop

``traces.jsonl`` and ``traces.parquet`` hold one line for each loop of each token that has a target, in the order row,
token, loop, with the columns of :data:`COLUMNS`. ``manifest.json`` says which checkpoint, data, seed and depth they
belong to. What is undefined is null. Letters: R rows, T tokens of the longest row, L loops.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.checkpoints.json_file import write_json
from cognexis.errors import BackendError, InvalidConfigError
from cognexis.training.scheduler.depths import LoopMeasurement, run_depths
from cognexis.training.scheduler.rows import DataRow, make_batch
from cognexis.training.scheduler.targets import improvement

TRACE_VERSION = 1
COLUMNS = {
    "request_id": "the row, as line number of the data file",
    "task": "the row's task, or null",
    "token": "position in the row, from 0",
    "loop": "loops executed, from 1",
    "loss": "-ln p(target), nats",
    "score": "1 where the most likely token is the target, else 0",
    "gain": "loss of this loop less that of the next",
    "best_gain": "loss of this loop less the smallest of all later ones",
    "predicted_gain": "what the value head says after this loop, calibrated; null without a head",
    "hidden_delta": "norm of the change of the state in this loop",
    "relative_delta": "hidden_delta divided by the norm of the state before",
    "state_norm": "norm of the state",
    "h0_norm": "norm of the prelude's output",
    "confidence": "largest probability",
    "margin": "largest less second largest probability",
    "entropy": "of the prediction, nats",
    "prediction_change": "KL divergence from the prediction before this loop, nats; null at loop 1",
}
SIGNALS = tuple(name for name in COLUMNS if name not in list(COLUMNS)[:9])
_LOGITS_PER_BATCH = 2**25


@dataclass(frozen=True)
class DepthTraces:
    """The traces of all rows on the host, in float32.

    Attributes:
        rows: R rows, in the order of the first axis below.
        is_real: ``[R, T]`` bool, False at padding.
        has_target: ``[R, T]`` bool.
        losses: ``[R, T, L]``, 0 where there is no target.
        scores: ``[R, T, L]``.
        signals: ``[R, T, L]`` each, by name.
        values: ``[R, T, L]`` uncalibrated values of the value head; None without a head.
    """

    rows: tuple[DataRow, ...]
    is_real: Tensor
    has_target: Tensor
    losses: Tensor
    scores: Tensor
    signals: dict[str, Tensor]
    values: Tensor | None = None

    @property
    def num_loops(self) -> int:
        return self.losses.shape[-1]

    @property
    def gains(self) -> Tensor:
        """``[R, T, L - 1]``: what the next loop gained."""
        return improvement(-self.losses, "next")

    @property
    def best_gains(self) -> Tensor:
        """``[R, T, L - 1]``: what the best later loop gained."""
        return improvement(-self.losses, "best")

    def select(self, places: Sequence[int]) -> "DepthTraces":
        """The traces of some rows."""
        index = torch.tensor(places)
        return DepthTraces(
            tuple(self.rows[place] for place in places),
            self.is_real[index],
            self.has_target[index],
            self.losses[index],
            self.scores[index],
            {name: signal[index] for name, signal in self.signals.items()},
            None if self.values is None else self.values[index],
        )

    def predictions(self, head: Any) -> Tensor:
        """``values`` under the calibration of ``head``, ``[R, T, L]``; 0 at padding.

        Raises:
            InvalidConfigError: the traces were made without a head.
        """
        if self.values is None:
            raise InvalidConfigError("traces: made with a model that has no value head", path="values")
        if head.calibration is None:
            return self.values
        by_loop = [head.calibration(self.values[..., i], i + 1) for i in range(self.num_loops)]
        return torch.where(self.is_real[..., None], torch.stack(by_loop, dim=-1), 0)


def collect_traces(
    model: Any, rows: Sequence[DataRow], num_loops: int, *, head: Any = None, batch_size: int = 16
) -> DepthTraces:
    """Run ``model`` on ``rows`` at the fixed depth ``num_loops`` and keep what happened.

    Args:
        head: the model's value head, whose uncalibrated values are kept as well.
        batch_size: at most so many rows at a time; fewer where a batch would have too many logits.

    Raises:
        InvalidConfigError: ``num_loops`` is below 2 or above the configuration's ``max_loops``.
    """
    check_depth(model, num_loops)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    longest = max(len(row.input_ids) for row in rows)
    parts: list[dict[str, Tensor]] = []
    for indices in row_groups(order, rows, model.config.vocab_size, batch_size):
        part = _trace_batch(model, [rows[i] for i in indices], num_loops, head)
        parts.append({key: _padded(tensor, longest) for key, tensor in part.items()})
    place = torch.tensor(order).argsort()
    whole = {key: torch.cat([part[key] for part in parts])[place] for key in parts[0]}
    known = {key: whole.pop(key) for key in ("is_real", "has_target", "losses", "scores")}
    return DepthTraces(tuple(rows), **known, values=whole.pop("values", None), signals=whole)


def check_depth(model: Any, num_loops: int) -> None:
    """Raise unless traces of ``num_loops`` loops can be made: 2 at least, and not beyond the configuration."""
    if not 2 <= num_loops <= model.config.max_loops:
        raise InvalidConfigError(
            f"max_loops={num_loops}: must lie between 2 and the configuration's max_loops={model.config.max_loops}",
            path="max_loops",
            value=num_loops,
        )


def row_groups(order: list[int], rows: Sequence[DataRow], vocab_size: int, batch_size: int) -> Iterator[list[int]]:
    """Rows of similar length in batches of bounded size; ``order`` holds their places from short to long."""
    group: list[int] = []
    for index in order:
        length = len(rows[index].input_ids)
        if group and (len(group) == batch_size or (len(group) + 1) * length * vocab_size > _LOGITS_PER_BATCH):
            yield group
            group = []
        group.append(index)
    yield group


def _trace_batch(model: Any, rows: list[DataRow], num_loops: int, head: Any) -> dict[str, Tensor]:
    batch = make_batch(rows, model.config.pad_token_id or 0).to(model.device)
    kept: dict[str, list[Tensor]] = {"losses": [], "scores": []}

    def visit(measured: LoopMeasurement) -> None:
        kept["losses"].append(measured.loss)
        kept["scores"].append(measured.score)
        for name in SIGNALS:
            kept.setdefault(name, []).append(measured.signals[name])
        if head is not None:
            values = head(measured.state, measured.loop, batch.is_real, measured.signals)
            values = values if values.ndim == 2 else values[:, None].expand(batch.is_real.shape)
            kept.setdefault("values", []).append(values)

    run_depths(model, batch, num_loops, visit)
    part = {name: torch.stack(values, dim=-1).float().cpu() for name, values in kept.items()}
    return part | {"is_real": batch.is_real.cpu(), "has_target": (batch.targets >= 0).cpu()}


def _padded(tensor: Tensor, length: int) -> Tensor:
    after = (0, length - tensor.shape[1])
    return nn.functional.pad(tensor, after if tensor.ndim == 2 else (0, 0, *after))


def trace_columns(traces: DepthTraces, head: Any = None) -> dict[str, list[Any]]:
    """The columns of the files; see the module docstring."""
    row, token = traces.has_target.nonzero(as_tuple=True)
    num_loops = traces.num_loops
    open_end = (0, 1)
    values = {
        "loss": traces.losses,
        "score": traces.scores,
        "gain": nn.functional.pad(traces.gains, open_end, value=math.nan),
        "best_gain": nn.functional.pad(traces.best_gains, open_end, value=math.nan),
        **traces.signals,
    }
    if head is not None:
        values["predicted_gain"] = traces.predictions(head)
    chosen = {name: values[name][row, token].flatten().tolist() for name in values}
    lines = len(row) * num_loops
    columns: dict[str, list[Any]] = {
        "request_id": [traces.rows[r].name for r in row.tolist() for _ in range(num_loops)],
        "task": [traces.rows[r].task for r in row.tolist() for _ in range(num_loops)],
        "token": token.repeat_interleave(num_loops).tolist(),
        "loop": list(range(1, num_loops + 1)) * len(row),
        "predicted_gain": [None] * lines,
        **{name: [_number(value) for value in chosen[name]] for name in chosen},
    }
    return {name: columns[name] for name in COLUMNS}


def _number(value: float) -> float | None:
    """``value`` with the digits that float32 has; None for what is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def write_traces(folder: Path, traces: DepthTraces, facts: dict[str, Any], head: Any = None) -> dict[str, Any]:
    """Write both files and the manifest.

    Args:
        facts: what the manifest says beyond depth and counts.

    Returns:
        The manifest.

    Raises:
        BackendError: the package datasets is missing.
        InvalidConfigError: the folder cannot be used.
    """
    try:
        import datasets
    except ImportError as error:
        raise BackendError("writing Parquet needs the package datasets: pip install 'cognexis[train]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfigError(f"out={str(folder)!r}: cannot be used: {error.strerror}", path="out") from error
    columns = trace_columns(traces, head)
    with open(folder / "traces.jsonl", "w", encoding="utf-8") as file:
        for line in zip(*columns.values(), strict=True):
            file.write(json.dumps(dict(zip(columns, line, strict=True)), ensure_ascii=False) + "\n")
    features = {name: _feature(datasets, name) for name in columns}
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(str(folder / "traces.parquet"))
    manifest = {
        "schema_version": TRACE_VERSION,
        **facts,
        "num_loops": traces.num_loops,
        "num_rows": len(traces.rows),
        "num_tokens": int(traces.has_target.sum()),
        "num_lines": len(columns["loop"]),
        "columns": COLUMNS,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def _feature(datasets: Any, name: str) -> Any:
    kinds = {"request_id": "string", "task": "string", "token": "int32", "loop": "int32"}
    return datasets.Value(kinds.get(name, "float32"))
