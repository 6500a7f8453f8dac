"""The value head: its formula, its masks, its calibration and its settings."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.configuration_rules import VALUE_FEATURES, VALUE_OUTPUT_KINDS
from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.looping.value_calibration import build_calibration
from cognexis.looping.value_head import ValueHead, attach_value_head, scaled_feature
from tests.batteries.tiny import tiny_config, tiny_model

H = 16
MASK = torch.tensor([[True, True, True, False], [False, True, True, True], [False] * 4])
ISOTONIC = {"method": "isotonic", "x": [-0.5, 0.0, 0.25, 1.0], "y": [-0.1, 0.1, 0.1, 0.9]}
LINEAR = {"method": "linear", "scale": 0.5, "offset": 0.25}


def head(**settings) -> ValueHead:
    made = ValueHead(H, {"kind": "token", "bottleneck_size": 8} | settings)
    with torch.no_grad():
        for parameter in made.parameters():  # no value is left at one or zero, where it would hide a mistake
            parameter.copy_(torch.randn(parameter.shape) * 0.5 + 0.1)
    return made


def inputs(rows: int = 3, length: int = 4, dtype: torch.dtype = torch.float32):
    hidden_states = torch.randn(rows, length, H, dtype=dtype)
    return hidden_states, {name: torch.rand(rows, length) for name in VALUE_FEATURES}


def by_hand(made: ValueHead, x, loop_index: int, features) -> torch.Tensor:
    """The formula of the module, for a normed and perhaps pooled ``x``."""
    z = x @ made.input_proj.weight.T + made.input_proj.bias
    if made.loop_embedding is not None:
        z = z + made.loop_embedding.weight[loop_index - 1]
    if made.feature_proj is not None:
        z = z + features @ made.feature_proj.weight.T
    return ((z * torch.sigmoid(z)) @ made.output_proj.weight.T + made.output_proj.bias).squeeze(-1)


def normed(made: ValueHead, h):
    return h / (h.pow(2).mean(-1, keepdim=True) + made.norm.eps).sqrt() * made.norm.weight


def stacked(made: ValueHead, signals):
    return torch.stack([scaled_feature(name, signals[name]) for name in made.feature_names], dim=-1)


def test_token_form_is_the_formula_and_one_number_per_position():
    made = head(max_loops_embedded=3, features=["entropy", "confidence"])
    h, signals = inputs()
    got = made(h, 2, features=signals)
    assert got.shape == (3, 4) and got.dtype == torch.float32
    torch.testing.assert_close(got, by_hand(made, normed(made, h), 2, stacked(made, signals)))


def test_sequence_form_is_the_formula_over_the_mean_of_real_positions():
    made = head(kind="sequence", max_loops_embedded=3, features=["relative_delta", "h0_norm"])
    h, signals = inputs()
    got = made(h, 3, MASK, signals)
    x, f = normed(made, h), stacked(made, signals)
    pooled = [torch.stack([part[row][MASK[row]].mean(0) for row in (0, 1)]) for part in (x, f)]
    assert got.shape == (3,)
    torch.testing.assert_close(got[:2], by_hand(made, pooled[0], 3, pooled[1]))
    assert got[2] == 0.0
    everywhere = made.predict(h, 3, MASK, signals)
    assert everywhere.shape == (3, 4) and torch.equal(everywhere, got[:, None] * MASK)


def test_position_depends_on_itself_in_the_token_form_and_on_its_row_in_the_sequence_form():
    h, _ = inputs()
    other = h.clone()
    other[0, 1] += 1.0
    token, sequence = head(), head(kind="sequence")
    changed = token(h, 1) != token(other, 1)
    assert changed[0, 1] and changed.sum() == 1
    assert (sequence(h, 1) != sequence(other, 1)).tolist() == [True, False, False]


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("output_kind", VALUE_OUTPUT_KINDS)
@pytest.mark.parametrize("calibration", [None, LINEAR, ISOTONIC], ids=["plain", "linear", "isotonic"])
def test_padding_gets_exactly_zero_with_every_combination_of_features(kind, output_kind, calibration):
    h, signals = inputs()
    for count in range(len(VALUE_FEATURES) + 1):
        for names in itertools.islice(itertools.combinations(VALUE_FEATURES, count), 2):
            made = head(kind=kind, output_kind=output_kind, features=list(names), max_loops_embedded=2)
            made.set_calibration(calibration)
            got = made.predict(h, 1, MASK, signals)
            assert (got[~MASK] == 0).all() and (got[MASK] != 0).all()


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_what_stands_at_padding_reaches_neither_values_nor_gradients(kind):
    made = head(kind=kind, features=["entropy"])
    h, signals = inputs()
    dirty = torch.where(MASK[..., None], h, torch.nan)
    dirty_signals = {"entropy": torch.where(MASK, signals["entropy"], torch.nan)}
    assert torch.equal(made(dirty, 1, MASK, dirty_signals), made(h, 1, MASK, signals))
    made(dirty, 1, MASK, dirty_signals).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


@pytest.mark.parametrize("policy", ["clamp", "error"])
def test_loop_beyond_the_table_is_clamped_or_refused_as_the_policy_says(policy):
    made = head(max_loops_embedded=3, loop_index_policy=policy)
    h, _ = inputs()
    values = [made(h, loop) for loop in (1, 2, 3)]
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    if policy == "clamp":
        assert torch.equal(made(h, 4), values[2]) and torch.equal(made(h, 400), values[2])
    else:
        with pytest.raises(InvalidConfigError, match="loop_index=4: must be 1 to max_loops_embedded=3"):
            made(h, 4)
    with pytest.raises(InvalidConfigError, match="loop_index=0: must be 1"):
        made(h, 0)


def test_without_a_table_the_loop_number_is_not_seen():
    made = head()
    h, _ = inputs()
    assert made.loop_embedding is None and torch.equal(made(h, 1), made(h, 7))


def test_features_settle_at_zero_and_never_become_infinite():
    delta = torch.tensor([0.0, 1e-6, 1e-3, 1.0, float("inf")])
    torch.testing.assert_close(scaled_feature("prediction_change", delta), torch.tensor([0.0, 0.0, 0.5, 1.0, 2.0]))
    confidence = torch.tensor([1.0, 0.999, 0.0])
    expected = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(scaled_feature("confidence", confidence), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled_feature("margin", confidence), scaled_feature("confidence", confidence))


def test_missing_feature_and_wrong_shapes_are_named():
    made = head(features=["entropy", "margin"])
    h, signals = inputs()
    with pytest.raises(InvalidConfigError, match="reads entropy, margin, and margin is missing"):
        made(h, 1, features={"entropy": signals["entropy"]})
    with pytest.raises(ShapeMismatchError, match=r"features\['entropy'\]: shape must be \(3, 4\), got \(3, 1\)"):
        made(h, 1, features=signals | {"entropy": torch.rand(3, 1)})
    with pytest.raises(ShapeMismatchError, match=r"hidden_states: shape must be \('B', 'T', 16\), got \(3, 16\)"):
        made(h[:, 0], 1, features=signals)
    for mask in (MASK[:2], MASK.long()):
        with pytest.raises(ShapeMismatchError, match=r"mask \(torch.*wanted torch.bool\)"):
            made(h, 1, mask, signals)


def test_uncertainty_is_never_negative_and_gains_may_be():
    h, _ = inputs(rows=64)
    torch.manual_seed(3)
    plain = head()
    torch.manual_seed(3)
    uncertainty = head(output_kind="uncertainty")
    assert (plain(h, 1) < 0).any()
    torch.testing.assert_close(uncertainty(h, 1), nn.functional.softplus(plain(h, 1)))


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_head_holds_less_than_a_percent_of_a_block(kind):
    with torch.device("meta"):
        config = CognexisConfig(hidden_size=1024, num_attention_heads=16, num_prelude_blocks=0, num_coda_blocks=0)
        block = CognexisForCausalLM(config).model.recurrent.blocks[0]
        made = ValueHead(1024, {"kind": kind, "max_loops_embedded": 64, "features": list(VALUE_FEATURES)})
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (made, block)]
    assert sizes[0] < 0.01 * sizes[1]


def test_half_precision_head_answers_in_float32_close_to_the_full_one():
    made = head(max_loops_embedded=2, features=["entropy"])
    h, signals = inputs()
    full = made(h.bfloat16().float(), 1, MASK, signals)
    narrow = copy.deepcopy(made).bfloat16()
    with torch.no_grad():
        for parameter, rounded in zip(made.parameters(), narrow.parameters(), strict=True):
            parameter.copy_(rounded)
    got = narrow(h.bfloat16(), 1, MASK, signals)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, made(h.bfloat16().float(), 1, MASK, signals))  # all arithmetic is in float32
    assert not torch.equal(got, full)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(narrow(h.bfloat16(), 1, MASK, signals), got)


# -- calibration --------------------------------------------------------------------------------------------------


def test_maps_are_their_formulas():
    x = torch.tensor([-1.0, -0.5, -0.25, 0.1, 0.625, 1.0, 2.0])
    expected = torch.tensor([-0.1, -0.1, 0.0, 0.1, 0.5, 0.9, 0.9])
    torch.testing.assert_close(build_calibration(ISOTONIC)(x, 1), expected)
    torch.testing.assert_close(build_calibration(LINEAR)(x, 1), 0.5 * x + 0.25)
    torch.testing.assert_close(build_calibration({"method": "temperature", "temperature": 4})(x, 1), x / 4)
    one_point = build_calibration({"method": "isotonic", "x": [0.0], "y": [0.3]})
    assert one_point(x, 1).tolist() == [pytest.approx(0.3)] * 7
    loopwise = build_calibration({"method": "by_loop", "maps": [LINEAR, ISOTONIC]})
    torch.testing.assert_close(loopwise(x, 1), 0.5 * x + 0.25)
    torch.testing.assert_close(loopwise(x, 2), expected)
    assert torch.equal(loopwise(x, 9), loopwise(x, 2))


def test_no_map_reverses_an_order():
    x = torch.randn(2000).sort().values
    knots = torch.randn(50).sort().values.tolist(), torch.randn(50).sort().values.tolist()
    for settings in (
        {"method": "isotonic", "x": knots[0], "y": knots[1]},
        LINEAR,
        {"method": "temperature", "temperature": 0.3},
    ):
        steps = build_calibration(settings)(x, 1).diff()
        assert (steps >= -1e-6).all() and (steps > 0).any()  # one rounding of float32


def test_points_that_meet_in_float32_stay_finite():
    near = build_calibration({"method": "isotonic", "x": [1.0, 1.0 + 1e-12, 2.0], "y": [0.0, 0.5, 1.0]})
    got = near(torch.tensor([0.0, 1.0, 1.5, 3.0]), 1)
    assert got.isfinite().all() and (got.diff() >= 0).all()


def test_prediction_is_calibrated_and_training_output_is_not():
    made = head()
    h, _ = inputs()
    raw = made(h, 1)
    made.set_calibration(LINEAR)
    torch.testing.assert_close(made.predict(h, 1), 0.5 * raw + 0.25)
    assert torch.equal(made(h, 1), raw) and not made.predict(h, 1).requires_grad
    made.set_calibration(None)
    assert torch.equal(made.predict(h, 1), raw)


def test_calibrated_head_can_be_copied_and_pickled():
    made = head()
    h, _ = inputs()
    made.set_calibration(ISOTONIC)
    expected = made.predict(h, 1)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.predict(h, 1), expected)
    assert not any("calibration" in key for key in made.state_dict())


@pytest.mark.parametrize(
    "settings, message",
    [
        ("isotonic", "calibration='isotonic': must be an object"),
        ({}, "calibration.method=None: must be one of temperature, linear, isotonic, by_loop"),
        ({"method": "isotonc"}, "did you mean 'isotonic'"),
        ({"method": "linear", "scale": 1.0}, "calibration.offset: method 'linear' needs it"),
        (LINEAR | {"ofset": 1.0}, r"calibration.ofset: unknown key \(did you mean 'offset'\?\)"),
        (LINEAR | {"scale": 0.0}, "calibration.scale=0.0: must be finite and positive"),
        (LINEAR | {"offset": float("nan")}, "calibration.offset=nan: must be finite"),
        ({"method": "temperature", "temperature": -1}, "calibration.temperature=-1: must be finite and positive"),
        (ISOTONIC | {"x": []}, "must be a list of 1 to 4096 numbers"),
        (ISOTONIC | {"y": [0.0, 0.1, 0.2]}, "must have as many entries as x, 4, not 3"),
        (ISOTONIC | {"x": [0.0, 0.0, 1.0, 2.0]}, "calibration.x=.*must rise strictly"),
        (ISOTONIC | {"y": [0.0, 0.2, 0.1, 2.0]}, "calibration.y=.*must never fall"),
        (ISOTONIC | {"y": [0.0, "1", 2.0, 3.0]}, "must hold finite numbers"),
        ({"method": "by_loop", "maps": []}, "calibration.maps=.*one map or more"),
        ({"method": "by_loop", "maps": [LINEAR, {"method": "linear", "scale": 1}]}, r"calibration.maps\[1\].offset"),
    ],
)
def test_bad_calibration_names_what_is_wrong(settings, message):
    with pytest.raises(InvalidConfigError, match=message):
        head().set_calibration(settings)


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "value_head.kind=None: must be one of token, sequence"),
        ({"kind": "tokens"}, r"value_head.kind='tokens': .*did you mean 'token'"),
        ({"kind": "token", "bottleneck": 64}, r"value_head.bottleneck: unknown key .*'bottleneck_size'"),
        (
            {"kind": "token", "bottleneck_size": 3},
            "bottleneck_size=3: must be an integer between 4 and 512",
        ),
        ({"kind": "token", "bottleneck_size": 513}, "value_head.bottleneck_size=513"),
        ({"kind": "token", "bottleneck_size": True}, "value_head.bottleneck_size=True"),
        ({"kind": "token", "max_loops_embedded": -1}, "value_head.max_loops_embedded=-1: must be an integer between"),
        ({"kind": "token", "loop_index_policy": "wrap"}, "value_head.loop_index_policy='wrap': must be one of clamp"),
        ({"kind": "token", "output_kind": "gain"}, "value_head.output_kind='gain': must be one of predicted_gain"),
        ({"kind": "token", "features": "entropy"}, "value_head.features='entropy': must be a list"),
        ({"kind": "token", "features": ["entropi"]}, r"value_head.features='entropi': .*did you mean 'entropy'"),
        ({"kind": "token", "features": ["margin", "margin"]}, "value_head.features='margin': stands twice"),
    ],
)
def test_bad_settings_are_refused_by_head_and_configuration(settings, message):
    with pytest.raises(InvalidConfigError, match=message):
        ValueHead(H, settings)
    with pytest.raises(InvalidConfigError, match=message):
        tiny_config(value_head=settings)


def test_configuration_keeps_the_settings_through_its_dictionary():
    settings = {"kind": "sequence", "bottleneck_size": 8, "features": ["entropy"]}
    config = tiny_config(value_head=settings)
    assert CognexisConfig.from_dict(config.to_dict()).value_head == settings
    assert tiny_config().value_head is None


def test_attached_head_belongs_to_the_model_and_its_configuration():
    model = tiny_model().to(torch.float64)
    made = attach_value_head(model, {"kind": "token", "bottleneck_size": 8})
    assert model.model.value_head is made and model.config.value_head["output_kind"] == "predicted_gain"
    assert "model.value_head.output_proj.weight" in model.state_dict()
    assert made.input_proj.weight.dtype == torch.float64
    state = torch.randn(1, 3, model.config.hidden_size, dtype=torch.float64)
    assert made.predict(state, loop_index=1).dtype == torch.float32
    again = attach_value_head(model.model, {"kind": "sequence"})
    assert model.model.value_head is again
