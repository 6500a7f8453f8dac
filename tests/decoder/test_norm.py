"""Norms against their formulas, and the dtypes they compute in."""

import pytest
import torch

from cognexis.decoder.norm import (
    CognexisLayerNorm,
    CognexisRMSNorm,
    build_norm,
    compute_dtype,
)

GOLDEN = 1e-6  # the goldens are given with six decimals


@pytest.mark.parametrize(
    "row, expected", [([1.0, 2.0, 3.0], [0.462910, 0.925819, 1.388729]), ([3.0, 4.0], [0.848528, 1.131370])]
)
def test_rms_norm_gives_the_reference_numbers(row: list[float], expected: list[float]) -> None:
    norm = CognexisRMSNorm(len(row), eps=1e-5)
    torch.testing.assert_close(norm(torch.tensor(row)), torch.tensor(expected), rtol=0, atol=GOLDEN)


def test_layer_norm_gives_the_reference_numbers() -> None:
    norm = CognexisLayerNorm(3, eps=1e-5)
    expected = torch.tensor([-1.224736, 0.0, 1.224736])
    torch.testing.assert_close(norm(torch.tensor([1.0, 2.0, 3.0])), expected, rtol=0, atol=GOLDEN)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize(
    "ours, theirs",
    [(CognexisRMSNorm, torch.nn.RMSNorm), (CognexisLayerNorm, torch.nn.LayerNorm)],
    ids=["rms", "layer"],
)
def test_norm_with_random_parameters_equals_that_of_torch(ours: type, theirs: type, eps: float) -> None:
    norm, reference = ours(7, eps).double(), theirs(7, eps).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    reference.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    # Two orders of float64 operations: a few units in the last place.
    torch.testing.assert_close(norm(x), reference(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_float64_is_never_rounded_to_float32(norm_type: str) -> None:
    norm = build_norm(norm_type, 4, 1e-5).double()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    centred = x - x.mean(-1, keepdim=True) if norm_type == "layernorm" else x
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    # A detour through float32 would be off by about 1e-8.
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(norm, (x,))


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_has_the_dtype_of_the_input(norm_type: str, dtype: torch.dtype) -> None:
    norm = build_norm(norm_type, 4, 1e-5).to(dtype)
    assert norm(torch.randn(2, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype, step", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
def test_half_precision_does_not_overflow_in_the_squares(norm_type: str, dtype: torch.dtype, step: float) -> None:
    x = torch.tensor([6e4, -3e4, 1e4, 300.0]).to(dtype)  # 6e4 squared lies beyond float16
    norm = build_norm(norm_type, 4, 1e-5)
    exact = norm(x.float())
    # Rounding once to the input dtype: one step of it, relative.
    torch.testing.assert_close(norm.to(dtype)(x).float(), exact, rtol=step, atol=0)


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
def test_zero_row_gives_zeros_and_finite_gradients(norm_type: str) -> None:
    x = torch.zeros(1, 4, requires_grad=True)
    y = build_norm(norm_type, 4, 1e-5)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 4)) and x.grad.isfinite().all()


def test_none_is_the_identity_without_parameters() -> None:
    x = torch.randn(2, 4)
    norm = build_norm("none", 4, 1e-5)
    assert norm(x) is x and list(norm.parameters()) == []


def test_compute_dtype_is_the_larger_of_input_and_float32() -> None:
    wanted = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    assert {dtype: compute_dtype(dtype) for dtype in wanted} == wanted
