import pytest
import torch
from torch import nn

from cognexis.kernels.lstm import gru_sequence, lstm_sequence, lstm_sequence_pytorch
from tests.batteries.kernel_parity import LENGTHS, assert_same_results, reset_masks, results


def operation(kind, layers, bias=True):
    """The layer as a function of its own weights, so that their gradients are compared too."""
    net = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](5, 5, layers, bias=bias, batch_first=True).double()
    run = {"lstm": lstm_sequence, "gru": gru_sequence}[kind]

    def call(x, form, resets=None, h=None, c=None, **weights):
        class Wrapper(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net

            def forward(self):
                return run(self.net, x, h, *([] if c is None else [c]), resets, form)

        return torch.func.functional_call(Wrapper(), {f"net.{name}": value for name, value in weights.items()}, ())

    states = {"h": torch.randn(3, layers, 5, dtype=torch.float64)}
    if kind == "lstm":
        states["c"] = torch.randn(3, layers, 5, dtype=torch.float64)
    return call, states | {name: torch.randn_like(value) for name, value in net.named_parameters()}


@pytest.mark.parametrize("length", [0, *LENGTHS])
@pytest.mark.parametrize("kind, layers, bias", [("lstm", 1, True), ("lstm", 2, False), ("gru", 2, True)])
def test_forms_agree(kind, layers, bias, length):
    call, given = operation(kind, layers, bias)
    given = given | {"x": torch.randn(3, length, 5, dtype=torch.float64)}
    for mask in reset_masks(3, length).values() if length else [None]:
        expected = results(call, given | {"resets": mask, "form": "reference"})
        assert_same_results(results(call, given | {"resets": mask, "form": "vectorised"}), expected)


def test_second_set_of_names_gives_the_same():
    net = nn.LSTM(5, 5, batch_first=True)
    x, h, c = torch.randn(2, 7, 5), torch.randn(2, 1, 5), torch.randn(2, 1, 5)
    resets = torch.rand(2, 7) < 0.3
    got = lstm_sequence_pytorch(lstm=net, x_seq=x, h0_bf=h, c0_bf=c, resets=resets.long())
    for one, other in zip(got, lstm_sequence(net, x, h, c, resets), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "name, shape, words",
    [("x_seq", (2, 5), "x of shape"), ("h0_bf", (2, 5), "h of shape"), ("c0_bf", (2, 2, 5), r"\[2, 1, 5\]")],
)
def test_wrong_shapes_are_named(name, shape, words):
    given = {"x_seq": torch.zeros(2, 7, 5), "h0_bf": torch.zeros(2, 1, 5), "c0_bf": torch.zeros(2, 1, 5)}
    with pytest.raises(ValueError, match=words):
        lstm_sequence_pytorch(lstm=nn.LSTM(5, 5, batch_first=True), **given | {name: torch.zeros(shape)})


def test_sixteen_bits_compute_in_float32():
    net = nn.LSTM(5, 5, batch_first=True).bfloat16()
    x, h, c = torch.randn(2, 40, 5).bfloat16(), torch.zeros(2, 1, 5).bfloat16(), torch.zeros(2, 1, 5)
    y, _, last = lstm_sequence(net, x, h, c, form="vectorised")
    exact, _, _ = lstm_sequence(net, x, h, c, form="reference")
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    torch.testing.assert_close(y, exact)
