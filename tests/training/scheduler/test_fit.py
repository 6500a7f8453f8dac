"""Fitting: the head learns what it can know, the trunk stays as it is, and the run repeats."""

from dataclasses import replace

import pytest
import torch

from cognexis.errors import InvalidConfigError, NonFiniteError
from cognexis.training.scheduler.calibration import mean_absolute_error, rank_correlation
from cognexis.training.scheduler.fit import FitSettings, fit_value_head
from cognexis.training.scheduler.rows import DataRow
from cognexis.training.scheduler.traces import collect_traces
from tests.batteries.tiny import tiny_config, tiny_model

L = 4
SETTINGS = FitSettings(
    head={"kind": "token", "bottleneck_size": 32, "features": ["relative_delta"]},
    num_loops=L,
    steps=20,
    rows_per_step=48,
    updates_per_batch=16,
    eval_every=10,
)
SHORT = replace(SETTINGS, steps=2, rows_per_step=4, updates_per_batch=2, eval_every=1)


def small_model():
    return tiny_model(tiny_config(vocab_size=12, num_prelude_blocks=1))


@pytest.fixture(scope="module")
def rows():
    """Rows whose labels are what the model answers at full depth, so that its loss falls with depth."""
    ids = torch.randint(0, 12, (560, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = small_model()(ids, num_loops=L).logits.argmax(-1)
    pairs = zip(ids.tolist(), labels.tolist(), strict=True)
    return [DataRow(f"line-{i}", tuple(a), tuple(b)) for i, (a, b) in enumerate(pairs)]


def test_fitted_head_beats_a_constant_on_rows_that_it_has_not_seen(rows):
    model = small_model()
    trunk = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fit_value_head(model, rows[:400], rows[400:432], SETTINGS)
    assert result.validation_loss < 0.9 * result.constant_loss and result.steps == 20
    head = model.model.value_head
    traces = collect_traces(model, rows[440:], L, head=head)
    gains = traces.best_gains[traces.has_target].flatten()
    predictions = traces.predictions(head)[..., :-1][traces.has_target].flatten()
    constant = gains.median().expand_as(gains)
    assert mean_absolute_error(predictions, gains) < 0.95 * mean_absolute_error(constant, gains)
    correlation = rank_correlation(predictions, gains)
    assert correlation is not None and correlation > 0.35
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in trunk.items())
    assert set(after) - set(trunk) == {name for name in after if "value_head" in name}
    assert model.config.value_head["kind"] == "token" and not model.training


@pytest.mark.parametrize(
    "changes",
    [
        {"head": {"kind": "sequence", "bottleneck_size": 8, "features": ["entropy"]}},
        {"head": {"kind": "token", "bottleneck_size": 8, "output_kind": "continue_logit", "max_loops_embedded": L}},
        {"target": "compute_normalized", "horizon": "next"},
        {"target": "accuracy_delta"},
    ],
    ids=["sequence", "continue_logit", "compute_normalized", "accuracy"],
)
def test_every_form_learns_something_and_repeats_with_its_seed(rows, changes):
    settings = replace(SHORT, **changes)
    found = [fit_value_head(model := small_model(), rows[:8], rows[400:404], settings) for _ in range(2)]
    assert found[0].history == found[1].history and found[0].history[0]["training_loss"] > 0
    other = fit_value_head(small_model(), rows[:8], rows[400:404], replace(settings, seed=1))
    assert other.history != found[0].history
    assert all(parameter.isfinite().all() for parameter in model.model.value_head.parameters())


def test_positions_without_a_target_teach_nothing_or_that_there_is_nothing_to_gain(rows):
    marked = [DataRow(row.name, row.input_ids, (-100, *row.targets[1:])) for row in rows[:64]]
    moved = [DataRow(row.name, (0, *row.input_ids[1:]), row.targets) for row in marked]
    found = {}
    for way in ("ignore", "zero"):
        settings = replace(SETTINGS, steps=6, rows_per_step=32, eval_every=6, unlabelled=way)
        fit_value_head(model := small_model(), moved, moved[:4], settings)
        values = collect_traces(model, moved[:8], L, head=model.model.value_head).values
        found[way] = values[:, 0, :-1].abs().mean().item()
    assert found["zero"] < 0.5 * found["ignore"], found


def test_training_ends_without_improvement_and_keeps_the_best_weights(rows):
    settings = replace(SHORT, steps=40, learning_rate=30.0, patience=2)  # the first step already overshoots
    result = fit_value_head(small_model(), rows[:8], rows[400:404], settings)
    losses = [entry["validation_loss"] for entry in result.history]
    assert result.steps < 40 and result.steps == result.best_step + 2
    assert result.validation_loss == min(losses) == losses[result.best_step - 1]


def test_half_precision_model_gets_a_head_of_its_own_dtype(rows):
    model = small_model().bfloat16()
    fit_value_head(model, rows[:8], rows[400:404], SHORT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_broken_trunk_is_reported_and_not_fitted(rows):
    model = small_model()
    with torch.no_grad():
        model.model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="value head: loss nan in training"):
        fit_value_head(model, rows[:8], rows[400:404], SHORT)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps=0: must be an integer of at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0: must be finite and positive"),
        ({"target": "loss"}, "target='loss': must be one of loss_delta"),
        ({"horizon": "last"}, "horizon='last'"),
        ({"unlabelled": "none"}, "unlabelled='none': must be ignore or zero"),
        ({"seed": -1}, r"seed=-1: must be in \[0, 2\*\*32\)"),
        ({"head": {"kind": "token", "output_kind": "uncertainty"}}, "output_kind='uncertainty': is fitted for"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(InvalidConfigError, match=message):
        FitSettings(**changes)


def test_depth_and_rows_are_checked_before_anything_is_attached(rows):
    model = small_model()
    with pytest.raises(InvalidConfigError, match="max_loops=5: must lie between 2 and"):
        fit_value_head(model, rows[:4], rows[4:8], replace(SHORT, num_loops=5))
    with pytest.raises(InvalidConfigError, match="validation_rows=0: there must be at least one row"):
        fit_value_head(model, rows[:4], [], SHORT)
    assert model.config.value_head is None
