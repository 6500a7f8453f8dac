"""The vectorised gated linear attention against the loop over time."""

import pytest
import torch

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.kernels.agalite import AgaliteInputs, AgaliteState, agalite_scan
from cognexis.kernels.agalite.inputs import angles_of

B, N, D, E = 3, 2, 3, 2


def arguments(T, R):
    def tensor(*shape):
        return torch.randn(shape, dtype=torch.float64)

    inputs = [tensor(B, T, N, D) for _ in range(5)] + [tensor(B, T, N, E) for _ in range(3)]
    state = [tensor(B, R, N, D * E), tensor(B, R, N, D), tensor(B, N, D * E).abs()]
    for value in (*inputs, *state):
        value.requires_grad_()
    return AgaliteInputs(*inputs), AgaliteState(*state), torch.tensor([1, 4, 9])


def masks(T):
    some = torch.zeros(B, T, dtype=torch.bool)
    some[0, :1] = some[1, T // 2 : T // 2 + 1] = some[2, -1:] = True
    return {"none": None, "some": some, "dense": torch.rand(B, T) < 0.4}


@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("T", [0, 1, 2, 64, 65])
def test_both_forms_agree_in_output_state_and_gradients(T, R):
    for resets in masks(T).values():
        inputs, state, tick = arguments(T, R)
        found = []
        for form in ("reference", "vectorised"):
            y, after, ticks = agalite_scan(inputs, state, tick, resets=resets, eps=0.1, form=form)
            leaves = [*inputs, *state]
            weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            loss = (y * weight).sum() + sum(part.square().sum() for part in after) + sum(v.sum() for v in leaves)
            found.append([y, *after, ticks, *torch.autograd.grad(loss, leaves)])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", ["reference", "vectorised"])
def test_token_after_a_reset_has_the_angle_of_a_first_token(form):
    inputs, state, _ = arguments(6, 4)
    resets = torch.zeros(B, 6, dtype=torch.bool)
    resets[:, 2] = True
    y, _, tick = agalite_scan(inputs, state, torch.tensor([5, 6, 7]), resets=resets, form=form)
    fresh = AgaliteState(*(torch.zeros_like(value) for value in state))
    later = AgaliteInputs(*(value[:, 2:] for value in inputs))
    expected, _, last = agalite_scan(later, fresh, torch.ones(B, dtype=torch.long), form=form)
    torch.testing.assert_close(y[:, 2:], expected)
    assert torch.equal(tick, last) and tick.tolist() == [5] * B


@pytest.mark.parametrize("R", [1, 2, 4])
def test_late_tokens_have_exact_angles(R):
    """The cosine of 2^50 pi is that of a rounding error."""
    ticks = torch.arange(8)
    period = {1: 2, 2: 2, 4: 6}[R]
    omegas = torch.linspace(-torch.pi, torch.pi, R, dtype=torch.float64)
    expected = (ticks[:, None] * omegas).cos().float()
    torch.testing.assert_close(angles_of(ticks + period * 2**50, R, torch.float32), expected)


def test_what_does_not_fit_is_an_error():
    inputs, state, tick = arguments(2, 2)
    with pytest.raises(ShapeMismatchError, match="tick of shape"):
        agalite_scan(inputs, state, tick[:1])
    with pytest.raises(InvalidConfigError, match="eps=0: must be positive"):
        agalite_scan(inputs, state, tick, eps=0)
