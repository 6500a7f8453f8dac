"""The value head of the checkpoint in ``hub_assets``: it loads, decides by its name alone, and beats simpler rules."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cognexis import CognexisForCausalLM
from cognexis.training.scheduler.assessment import compare_predictors, measured_gains, predicted_gains
from cognexis.training.scheduler.rows import DataRow
from cognexis.training.scheduler.traces import collect_traces
from cognexis.training.windowed_parity import held_out

CHECKPOINT = Path(__file__).parents[3] / "hub_assets" / "windowed_parity"
SEED = 17


@pytest.fixture(scope="module")
def model() -> Any:
    return CognexisForCausalLM.from_pretrained(CHECKPOINT, verify="strict").eval()


@torch.no_grad()
def accuracy_and_loops(model: Any, num_bits: int, **settings: Any) -> tuple[float, float]:
    ids, labels = held_out(16, num_bits, SEED)
    outputs = model(ids, **settings)
    is_right = (outputs.logits.argmax(-1) == labels)[:, 1:]
    return is_right.double().mean().item(), outputs.loop_counts.double().mean().item()


@pytest.mark.parametrize("num_bits", [24, 64])
def test_its_name_alone_saves_loops_without_an_error(model: Any, num_bits: int) -> None:
    rows = {"loop_mode": "adaptive_sequence"}
    accuracy, loops = accuracy_and_loops(model, num_bits, scheduler="value_head", **rows)
    assert accuracy == 1.0
    _, by_rule = accuracy_and_loops(model, num_bits, scheduler={"type": "rule_based", "min_delta": 0.5}, **rows)
    assert loops < 0.9 * by_rule, (loops, by_rule)
    shallow, _ = accuracy_and_loops(model, num_bits, num_loops=round(loops))
    assert shallow < accuracy, "the mean of its loops does not suffice for every row"


def test_single_tokens_halt_with_their_row_unless_asked_otherwise(model: Any) -> None:
    assert model.model.loop_options({"loop_mode": "adaptive_token"}).halt_dependency == "row"
    by_row = accuracy_and_loops(model, 24, loop_mode="adaptive_sequence")
    assert accuracy_and_loops(model, 24, loop_mode="adaptive_token")[0] == by_row[0] == 1.0


def test_it_predicts_gains_better_than_a_constant_and_the_change_of_the_state(model: Any) -> None:
    ids, labels = held_out(12, 40, SEED)
    pairs = zip(ids.tolist(), labels.tolist(), strict=True)
    rows = [DataRow(f"row-{i}", tuple(row), tuple(targets)) for i, (row, targets) in enumerate(pairs)]
    head = model.model.value_head
    traces = collect_traces(model, rows, 20, head=head)
    gains = measured_gains(traces, head, 1e-3)
    table = compare_predictors(traces, predicted_gains(traces, head), gains, 1e-3)
    assert table["value_head"]["mae"] < 0.5 * min(table[name]["mae"] for name in ("constant", "relative_delta"))
    assert table["value_head"]["rank_correlation"] > table["relative_delta"]["rank_correlation"] + 0.1
