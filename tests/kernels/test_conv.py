import pytest
import torch

from cognexis.kernels.conv import causal_conv, causal_conv1d_pytorch
from tests.batteries.kernel_parity import LENGTHS, assert_same_results, reset_masks, results


def arguments(length, groups=6, taps=4):
    return {
        "x": torch.randn(3, length, 6, dtype=torch.float64),
        "window": torch.randn(3, taps, 6, dtype=torch.float64),
        "weight": torch.randn(6, 6 // groups, taps, dtype=torch.float64),
        "bias": torch.randn(6, dtype=torch.float64),
    }


@pytest.mark.parametrize("length", [0, *LENGTHS])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_forms_agree(groups, length):
    given = arguments(length, groups)
    for mask in reset_masks(3, length).values() if length else [None]:
        expected = results(causal_conv, given | {"resets": mask, "form": "reference"})
        assert_same_results(results(causal_conv, given | {"resets": mask, "form": "vectorised"}), expected)


def test_second_set_of_names_gives_the_same():
    given = arguments(7)
    mask = torch.tensor([True, False, True])
    full = torch.zeros(3, 7, dtype=torch.bool)
    full[:, 0] = mask
    y, window = causal_conv1d_pytorch(
        given["window"], given["x"], given["weight"], given["bias"], groups=6, pad=3, resets=mask.float()
    )
    expected = causal_conv(**given, resets=full)
    assert torch.equal(y, expected[0]) and torch.equal(window, expected[1])
    with pytest.raises(ValueError, match="groups=1"):
        causal_conv1d_pytorch(given["window"], given["x"], given["weight"], None, groups=1, pad=3)


@pytest.mark.parametrize(
    "name, shape, words",
    [("x", (3, 6), "three axes"), ("weight", (5, 1, 4), "weight"), ("window", (3, 3, 6), r"\[3, 4, 6\]")],
)
def test_wrong_shapes_are_named(name, shape, words):
    with pytest.raises(ValueError, match=words):
        causal_conv(**arguments(5) | {name: torch.zeros(shape, dtype=torch.float64)})


def test_wrong_resets_are_named():
    with pytest.raises(ValueError, match=r"resets of shape \[3, 4\], expected \[3, 5\]"):
        causal_conv(**arguments(5), resets=torch.zeros(3, 4, dtype=torch.bool))


def test_sixteen_bits_accumulate_in_float32():
    given = {name: value.bfloat16() for name, value in arguments(65).items()}
    exact, _ = causal_conv(**{name: value.double() for name, value in given.items()})
    y, _ = causal_conv(**given)
    assert torch.equal(y, exact.bfloat16())
