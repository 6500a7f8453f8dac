"""The vectorised RTU against the time loop, and the boundary term against the gradient of the whole sequence."""

import pytest
import torch

from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.kernels.rtu import TRACE_NAMES, rtu_stream, rtu_stream_diag_pytorch, rtu_stream_full_pytorch, zero_traces

FULL = pytest.mark.parametrize("is_full", [False, True], ids=["diagonal", "full"])
B, D, H = 3, 4, 5


def parameters(is_full, dtype=torch.float64):
    shape = (D, H) if is_full else (H,)
    values = torch.randn(H) - 1, torch.randn(H), torch.randn(shape), torch.randn(shape)
    return [value.to(dtype).requires_grad_() for value in values]


def start(is_full, is_attached=False):
    shape = (B, D, H) if is_full else (B, H)
    state = [torch.randn(B, H, dtype=torch.float64).requires_grad_(is_attached) for _ in range(2)]
    traces = [torch.randn(B, H, dtype=torch.float64) for _ in range(4)]
    return state, (*traces, *(torch.randn(shape, dtype=torch.float64) for _ in range(4)))


def masks(T):
    some = torch.zeros(B, T, dtype=torch.bool)
    some[0, :1] = some[1, T // 2 : T // 2 + 1] = some[2, -1:] = True
    return {"none": None, "some": some, "dense": torch.rand(B, T) < 0.4, "first": torch.tensor([True, False, True])}


def results(form, x, weights, state, traces, resets, activation="tanh"):
    y, last, after = rtu_stream(
        x, *weights, state=tuple(state), traces=traces, resets=resets, activation=activation, form=form
    )
    inputs = [value for value in (x, *weights, *state) if value.requires_grad]
    loss = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + (last[0] * last[1]).sum()
    grads = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else []
    return [y, *last, *(after or ()), *(grad if grad is not None else torch.zeros(()) for grad in grads)]


@FULL
@pytest.mark.parametrize("is_attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("T", [0, 1, 2, 17, 63, 64, 65])
def test_both_forms_agree_in_output_state_traces_and_gradients(T, is_attached, is_full):
    weights = parameters(is_full)
    state, traces = start(is_full, is_attached)
    x = torch.randn(B, T, D if is_full else H, dtype=torch.float64, requires_grad=True)
    for name, resets in masks(T).items():
        for given in (traces, None):
            expected = results("reference", x, weights, state, given, resets)
            actual = results("vectorised", x, weights, state, given, resets)
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@FULL
@pytest.mark.parametrize("form", ["reference", "vectorised"])
def test_cut_sequence_with_traces_has_the_gradient_of_the_whole_one(form, is_full):
    T = 12
    weights = parameters(is_full)
    x = torch.randn(B, T, D if is_full else H, dtype=torch.float64)
    target = torch.randn(B, T, 2 * H, dtype=torch.float64)
    resets = torch.rand(B, T) < 0.2
    fresh = [torch.zeros(B, H, dtype=torch.float64)] * 2

    def gradient(cuts):
        state, traces, loss = tuple(fresh), zero_traces(fresh[0], weights[2]), 0.0
        for low, high in zip([0, *cuts], [*cuts, T], strict=True):
            y, state, traces = rtu_stream(
                *(x[:, low:high], *weights),
                state=tuple(part.detach() for part in state),
                traces=traces,
                resets=resets[:, low:high],
                activation="silu",
                form=form,
            )
            loss = loss + (y * target[:, low:high]).sum()
        return torch.autograd.grad(loss, weights)

    whole = gradient([])
    for cuts in ([6], [1], [11], [3, 4, 9]):
        torch.testing.assert_close(gradient(cuts), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_gradient_of_the_scan_can_be_differentiated_again():
    weights = parameters(False)
    state, _ = start(False, True)
    x = torch.randn(2, 5, H, dtype=torch.float64, requires_grad=True)
    state = [value[:2].detach().requires_grad_() for value in state]
    resets = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 1]], dtype=torch.bool)

    def run(x, c1, c2, *weights):
        return rtu_stream(x, *weights, state=(c1, c2), resets=resets, form="vectorised")[0]

    assert torch.autograd.gradcheck(run, (x, *state, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *state, *weights))


@pytest.mark.parametrize("form", ["reference", "vectorised"])
def test_extreme_poles_stay_finite(form):
    nu_log = torch.tensor([-1000.0, -40.0, -17.0, 0.0, 5.0, 1000.0], requires_grad=True)
    weights = [nu_log, *(torch.randn(6).requires_grad_() for _ in range(3))]
    state = tuple(torch.randn(2, 6) for _ in range(2))
    x = torch.randn(2, 20, 6, requires_grad=True)
    traces = zero_traces(state[0], weights[2])
    for _ in range(2):
        y, state, traces = rtu_stream(x, *weights, state=state, traces=traces, form=form)
        state = tuple(part.detach() for part in state)
        assert all(value.isfinite().all() for value in (y, *state, *traces))
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.square().sum(), (x, *weights)))


def test_sixteen_bit_input_keeps_its_dtype_and_a_float32_state():
    weights = parameters(False, torch.bfloat16)
    state = tuple(torch.zeros(B, H, dtype=torch.bfloat16) for _ in range(2))
    y, last, traces = rtu_stream(
        torch.randn(B, 9, H).bfloat16(), *weights, state=state, traces=zero_traces(state[0], weights[2])
    )
    assert y.dtype == torch.bfloat16
    assert {value.dtype for value in (*last, *traces)} == {torch.float32}


@FULL
def test_named_functions_start_with_traces_of_zero(is_full):
    weights = parameters(is_full)
    state, _ = start(is_full)
    x = torch.randn(B, 7, D if is_full else H, dtype=torch.float64)
    names = ("Wc1", "Wc2") if is_full else ("w1", "w2")
    function = rtu_stream_full_pytorch if is_full else rtu_stream_diag_pytorch
    y, last, traces = function(
        x_btd=x,
        nu_log=weights[0],
        theta_log=weights[1],
        **dict(zip(names, weights[2:], strict=True)),
        activation_name="SiLU",
        hc1_init_bh=state[0],
        hc2_init_bh=state[1],
        resets_bt=torch.tensor([0, 1, 0]),
    )
    expected = rtu_stream(
        *(x, *weights),
        state=tuple(state),
        traces=zero_traces(state[0], weights[2]),
        resets=torch.tensor([0, 1, 0]),
        activation="silu",
        form="reference",
    )
    assert y.shape == (B, 7, 2 * H) and len(traces) == len(TRACE_NAMES)
    for one, other in zip((y, *last, *traces), (expected[0], *expected[1], *expected[2]), strict=True):
        torch.testing.assert_close(one, other)


def test_arguments_are_not_changed():
    weights = parameters(False)
    state, traces = start(False)
    x = torch.randn(B, 6, H, dtype=torch.float64)
    before = [value.detach().clone() for value in (x, *weights, *state, *traces)]
    rtu_stream(x, *weights, state=tuple(state), traces=traces, resets=torch.rand(B, 6) < 0.5)
    for value, copy in zip((x, *weights, *state, *traces), before, strict=True):
        assert torch.equal(value, copy)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(B, 2, H + 1)}, ShapeMismatchError, "width 6, expected 5"),
        ({"x": torch.zeros(B, H)}, ShapeMismatchError, "expected \\[B, T, D\\]"),
        ({"resets": torch.zeros(B, 9)}, ShapeMismatchError, "resets of shape"),
        ({"activation": "gelu"}, InvalidConfigError, "must be one of identity"),
        ({"state": (torch.zeros(B, H), torch.zeros(B, 1))}, ShapeMismatchError, "c2 of shape"),
    ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
    weights = parameters(False, torch.float32)
    arguments = {"x": torch.zeros(B, 2, H), "state": (torch.zeros(B, H), torch.zeros(B, H))} | change
    with pytest.raises(error, match=message):
        rtu_stream(arguments.pop("x"), *weights, **arguments)
