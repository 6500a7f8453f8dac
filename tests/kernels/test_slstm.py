import pytest
import torch

from cognexis.kernels.slstm import slstm_sequence, slstm_sequence_pytorch
from tests.batteries.kernel_parity import LENGTHS, assert_same_results, reset_masks, results


def arguments(length, rows=3, heads=2, width=5, fresh=False, dtype=torch.float64):
    state = torch.randn(4, rows, heads, width, dtype=dtype)
    state[2] = state[2].abs() + 0.1
    state[2, 0] = 0  # one row is fresh as far as the maximum goes, but holds something
    return {
        "wx": 2 * torch.randn(rows, length, 4, heads, width, dtype=dtype),
        "r": torch.randn(4, heads, width, width, dtype=dtype),
        "b": torch.randn(4, heads, width, dtype=dtype),
        "state": torch.zeros_like(state) if fresh else state,
    }


@pytest.mark.parametrize("length", [0, *LENGTHS])
@pytest.mark.parametrize("fresh", [False, True])
def test_forms_agree(length, fresh):
    given = arguments(length, fresh=fresh)
    for mask in reset_masks(3, length).values() if length else [None]:
        expected = results(slstm_sequence, given | {"resets": mask, "form": "reference"})
        assert_same_results(results(slstm_sequence, given | {"resets": mask, "form": "vectorised"}), expected)


def test_gradients_of_y_alone_agree():
    given = arguments(9)
    mask = torch.rand(3, 9) < 0.3

    def only_y(**arguments):
        return slstm_sequence(**arguments, resets=mask)[0]

    def only_others(**arguments):
        return slstm_sequence(**arguments, resets=mask)[1]

    for operation in (only_y, only_others):
        expected = results(operation, given | {"form": "reference"})
        assert_same_results(results(operation, given | {"form": "vectorised"}), expected)


@pytest.mark.parametrize("gate", range(4))
def test_recurrent_input_reaches_its_own_gate_and_head(gate):
    given = arguments(2, rows=1, fresh=True)
    r = torch.zeros_like(given["r"])
    r[gate, 1, 3, 2] = 1.0  # head 1: output 2 of the last token to channel 3 of this gate
    y, _ = slstm_sequence(**given | {"r": r})
    without, _ = slstm_sequence(**given | {"r": torch.zeros_like(r)})
    shifted = given["wx"].clone()
    shifted[0, 1, gate, 1, 3] += without[0, 0, 1, 2]
    expected, _ = slstm_sequence(**given | {"wx": shifted, "r": torch.zeros_like(r)})
    torch.testing.assert_close(y, expected)
    assert not torch.equal(y, without)


@pytest.mark.parametrize("form", ["reference", "vectorised"])
@pytest.mark.parametrize("shift", [-1000.0, 1000.0])
def test_extreme_gates_stay_finite_in_float32(form, shift):
    given = arguments(40, dtype=torch.float32)
    for gates in ([0], [1], [0, 1], [3]):
        fresh = {name: value.clone() for name, value in given.items()}
        fresh["wx"][:, :, gates] += shift
        fresh = {name: value.requires_grad_() for name, value in fresh.items()}
        y, others = slstm_sequence(**fresh, resets=torch.rand(3, 40) < 0.1, form=form)
        grads = torch.autograd.grad(y.sum() + others[:2].sum(), list(fresh.values()))
        assert all(tensor.isfinite().all() for tensor in (y, others, *grads))


def test_second_set_of_names_gives_the_same():
    given = arguments(7)
    mask = torch.tensor([True, False, True])
    full = torch.zeros(3, 7, dtype=torch.bool)
    full[:, 0] = mask
    y, others = slstm_sequence(**given, resets=full)
    states, last = slstm_sequence_pytorch(
        Wx=given["wx"], R=given["r"], b=given["b"], initial_states=given["state"], resets=mask.float()
    )
    assert states.shape == (7, 4, 3, 2, 5)
    assert torch.equal(states[:, 0].transpose(0, 1), y) and torch.equal(states[:, 1:].transpose(0, 1), others)
    assert torch.equal(last, states[-1])


@pytest.mark.parametrize(
    "name, shape", [("wx", (3, 5, 4, 5)), ("r", (4, 2, 5, 4)), ("b", (2, 4, 5)), ("state", (3, 4, 2, 5))]
)
def test_wrong_shapes_are_named(name, shape):
    with pytest.raises(ValueError, match=rf"{name} of shape"):
        slstm_sequence(**arguments(5) | {name: torch.zeros(shape)})
