import pytest
import torch

import cognexis.kernels.mlstm.vectorised as vectorised
from cognexis.kernels.mlstm import (
    mlstm_chunkwise_simple,
    mlstm_recurrent_step_stabilized_simple,
    mlstm_sequence,
)
from tests.batteries.kernel_parity import LENGTHS, assert_same_results, reset_masks, results


def arguments(length, rows=3, heads=2, width=5, dtype=torch.float64):
    def noise(*shape):
        return torch.randn(shape, dtype=dtype)

    return {
        "q": noise(rows, heads, length, width),
        "k": noise(rows, heads, length, width),
        "v": noise(rows, heads, length, width),
        "i": 2 * noise(rows, heads, length),
        "f": 2 * noise(rows, heads, length),
        "c": noise(rows, heads, width, width),
        "n": noise(rows, heads, width),
        "m": noise(rows, heads),
    }


@pytest.mark.parametrize("length, chunk_size", [(0, 8), *((length, 16) for length in LENGTHS), (13, 1), (13, 100)])
def test_forms_agree(length, chunk_size):
    given = arguments(length) | {"chunk_size": chunk_size}
    for mask in reset_masks(3, length).values() if length else [None]:
        expected = results(mlstm_sequence, given | {"resets": mask, "form": "reference"})
        assert_same_results(results(mlstm_sequence, given | {"resets": mask, "form": "vectorised"}), expected)


@pytest.mark.parametrize("form", ["reference", "vectorised"])
@pytest.mark.parametrize("forget, write", [(-40.0, -90.0), (-5.0, -1000.0), (40.0, 60.0), (-1000.0, 1000.0)])
def test_extreme_gates_stay_finite_in_float32(form, forget, write):
    given = arguments(70, dtype=torch.float32)
    given["f"], given["i"] = given["f"] + forget, given["i"] + write
    for mask in reset_masks(3, 70).values():
        fresh = {name: value.clone().requires_grad_() for name, value in given.items()}
        h, state = mlstm_sequence(**fresh, resets=mask, chunk_size=16, form=form)
        grads = torch.autograd.grad(h.sum() + sum(part.sum() for part in state[:2]), list(fresh.values()))
        assert all(tensor.isfinite().all() for tensor in (h, *state, *grads))


def test_chunks_in_float32_come_near_float64():
    given = arguments(200, dtype=torch.float32)
    mask = torch.rand(3, 200) < 0.05
    h, _ = mlstm_sequence(**given, resets=mask, form="vectorised")
    exact, _ = mlstm_sequence(**{k: v.double() for k, v in given.items()}, resets=mask, form="reference")
    # The denominator may come near zero, where the error is that of a division by a small difference.
    assert (h - exact).abs().median() < 1e-6
    assert ((h - exact).abs() / (1 + exact.abs())).max() < 1e-3


def test_second_set_of_names_gives_the_same():
    given = arguments(9)
    mask = torch.rand(3, 9) < 0.3
    expected, last = mlstm_sequence(**given, resets=mask, chunk_size=4)
    call = (given["q"], given["k"], given["v"], given["i"], given["f"])
    state = {"initial_C": given["c"], "initial_n": given["n"], "initial_m": given["m"][..., None, None]}
    h, (c, n, m) = mlstm_chunkwise_simple(
        *call, **state, reset_mask=mask.long(), chunk_size=4, return_last_state=True, backend="any"
    )
    assert torch.equal(h, expected) and torch.equal(c, last[0])
    assert torch.equal(n, last[1][..., None]) and torch.equal(m, last[2][..., None, None])
    assert torch.equal(mlstm_chunkwise_simple(*call, **state, reset_mask=mask, chunk_size=4), h)
    stepped = []
    c, n, m = given["c"], given["n"][..., None], given["m"][..., None, None]
    for t in range(9):
        token = [part[:, :, t : t + 1] for part in call[:3]] + [part[:, :, t, None, None] for part in call[3:]]
        y, (c, n, m) = mlstm_recurrent_step_stabilized_simple(c, n, m, *token, reset_mask=mask[:, t])
        stepped.append(y)
    torch.testing.assert_close(torch.cat(stepped, 2), h)
    torch.testing.assert_close(m[..., 0, 0], last[2])


@pytest.mark.parametrize("length", [64, 65, 100, 127, 129, 200])
def test_chunks_share_the_tokens_evenly(length, monkeypatch):
    sizes = []

    def spy(x, size, *filler):
        sizes.append(size)
        return split(x, size, *filler)

    split = vectorised._chunks
    monkeypatch.setattr(vectorised, "_chunks", spy)
    q = torch.randn(1, 1, length, 4)
    gate = torch.zeros(1, 1, length)
    state = (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4), torch.zeros(1, 1))
    h, _ = vectorised.mlstm_vectorised(q, q, q, gate, gate, state, None, 64, 1e-6)
    count = -(-length // 64)
    assert h.shape == q.shape and set(sizes) == {-(-length // count)}


@pytest.mark.parametrize(
    "name, shape",
    [("k", (3, 2, 4, 5)), ("i", (3, 2, 5, 1)), ("n", (3, 2, 5, 1)), ("resets", (3, 6)), ("q", (3, 2, 5))],
)
def test_wrong_shapes_are_named(name, shape):
    with pytest.raises(ValueError, match=rf"{name} of shape"):
        mlstm_sequence(**arguments(5) | {name: torch.zeros(shape)})
