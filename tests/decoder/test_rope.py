"""Rotary angles: the numbers, relative positions only, scaled and partial forms, dtypes."""

import copy
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cognexis.decoder.attention import eager_attention_forward
from cognexis.decoder.rope import CognexisRotaryEmbedding, rotate
from tests.batteries.tiny import tiny_config, tiny_model


class Heads:
    """What the attention function reads of its module: one key/value head per query head, not in training."""

    num_key_value_groups = 1
    training = False


def angles(positions: Any, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the tiny configuration at ``positions``."""
    positions = torch.as_tensor(positions)
    rotary = CognexisRotaryEmbedding(tiny_config(**overrides))
    return rotary(torch.zeros(1, dtype=dtype), positions[None] if positions.ndim == 1 else positions)


@pytest.mark.parametrize("rotated, expected", [(True, 5.80556), (False, 5.0)])
def test_attention_over_rotated_keys_gives_the_reference_number(rotated: bool, expected: float) -> None:
    query = torch.tensor([[[[1.0, 0.0]]]])
    keys = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    values = torch.tensor([[[[0.0, 0.0], [10.0, 10.0]]]])
    if rotated:
        two_features = {"hidden_size": 8, "head_dim": 2}
        query = rotate(query, *angles([1], **two_features))
        keys = rotate(keys, *angles([0, 1], **two_features))
    context, _ = eager_attention_forward(Heads(), query, keys, values, None, scaling=2**-0.5)
    # The golden has five decimals.
    torch.testing.assert_close(context.flatten(), torch.full((2,), expected), rtol=0, atol=5e-6)


def test_rotation_multiplies_complex_pairs_of_features_half_a_head_apart() -> None:
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    turned = rotate(x, *angles(range(5), torch.float64))
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(5, 4, dtype=torch.float64), torch.arange(5.0).double()[:, None] * frequencies)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * turn
    # The frequencies themselves are stored in float32.
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), dim=-1), rtol=0, atol=4 * 6e-8 * 5)


def test_angles_and_rotation_equal_those_of_llama() -> None:
    config = tiny_config()
    positions = torch.tensor([[0, 1, 7, 100], [3, 3, 2, 127]])
    query, key = torch.randn(2, 4, 4, 8), torch.randn(2, 2, 4, 8)
    cos, sin = CognexisRotaryEmbedding(config)(query, positions)
    reference = LlamaRotaryEmbedding(config)(query, positions)
    # One rounding of a frequency (2^-24) times the largest position.
    torch.testing.assert_close((cos, sin), reference, rtol=0, atol=127 * 2**-23)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    assert torch.equal(rotate(query, cos, sin), expected[0]) and torch.equal(rotate(key, cos, sin), expected[1])


def test_position_zero_leaves_everything_and_rotation_keeps_lengths() -> None:
    x = torch.randn(1, 2, 3, 8)
    assert torch.equal(rotate(x, *angles([0, 0, 0])), x)
    turned = rotate(x, *angles([5, 60, 127]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)  # float32 rounding


def test_scores_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 6, 8, dtype=torch.float64)

    def scores(shift: int) -> torch.Tensor:
        turn = angles(torch.arange(6) + shift, torch.float64)
        return rotate(query, *turn) @ rotate(key, *turn).transpose(2, 3)

    # Float64 rounding of angles up to about 100.
    torch.testing.assert_close(scores(100), scores(0), rtol=0, atol=1e-12)


def test_shifting_all_positions_changes_no_logit() -> None:
    model = tiny_model().double()
    ids = torch.randint(0, 64, (2, 9))
    positions = torch.arange(9)[None]
    moved = model(ids, position_ids=positions + 77).logits
    torch.testing.assert_close(moved, model(ids, position_ids=positions).logits, rtol=0, atol=1e-11)  # as above


def test_positions_matter_at_all() -> None:
    model = tiny_model()
    ids = torch.randint(0, 64, (1, 6))
    stretched = model(ids, position_ids=2 * torch.arange(6)[None], attention_mask=torch.ones(1, 6)).logits
    assert not torch.allclose(stretched, model(ids).logits, atol=1e-2)


def test_partial_rotation_leaves_the_rest_of_the_head_alone() -> None:
    cos, sin = angles(range(5), rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert cos.shape == (1, 5, 4)
    x = torch.randn(1, 2, 5, 8)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x[..., :4], cos, sin))
    assert not torch.equal(turned[:, :, 1:, :4], x[:, :, 1:, :4])


def test_each_row_has_the_angles_of_its_own_positions() -> None:
    positions = torch.tensor([[0, 1, 2], [9, 4, 11]])
    together = angles(positions)
    for row in range(2):
        assert torch.equal(together[0][row], angles(positions[row])[0][0])


def test_linear_scaling_divides_positions() -> None:
    scaled = angles([0, 2, 10, 54], rope_parameters={"rope_type": "linear", "factor": 2.0})
    for got, wanted in zip(scaled, angles([0, 1, 5, 27]), strict=True):
        assert torch.equal(got, wanted), "halving is exact"


def test_dynamic_scaling_acts_beyond_the_trained_range_and_is_undone_after() -> None:
    rotary = CognexisRotaryEmbedding(tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}))
    like, short, long = torch.zeros(1), torch.arange(100)[None], torch.arange(300)[None]
    plain = angles(range(100))
    assert torch.equal(rotary(like, short)[0], plain[0])
    assert not torch.equal(rotary(like, long)[0][:, :100], plain[0])
    assert torch.equal(rotary(like, short)[0], plain[0]), "a long request leaves no trace"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_form_equals_that_of_transformers(rope: dict[str, Any]) -> None:
    config = tiny_config(rope_parameters=rope)
    positions = torch.arange(50)[None]
    got = CognexisRotaryEmbedding(config)(torch.zeros(1), positions)
    reference = LlamaRotaryEmbedding(copy.deepcopy(config))(torch.zeros(1), positions)
    assert torch.equal(got[0], reference[0]) and torch.equal(got[1], reference[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_frequencies_stay_in_float32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    model = tiny_model()
    before = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype).float()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    model.to(dtype)
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32


def test_bfloat16_angles_are_the_exact_ones_rounded_once() -> None:
    positions = torch.arange(0, 8192, 511)
    exact = angles(positions, max_position_embeddings=8192)
    rounded = angles(positions, torch.bfloat16, max_position_embeddings=8192)
    assert rounded[0].dtype == torch.bfloat16
    assert torch.equal(rounded[0], exact[0].bfloat16()) and torch.equal(rounded[1], exact[1].bfloat16())


def test_angles_carry_no_gradient_and_no_weight_is_stored() -> None:
    rotary = CognexisRotaryEmbedding(tiny_config())
    cos, _ = rotary(torch.zeros(1, requires_grad=True), torch.arange(4)[None])
    assert not cos.requires_grad and rotary.state_dict() == {}
