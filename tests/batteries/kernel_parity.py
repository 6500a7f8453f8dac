"""Two forms of an operation give the same outputs, states and gradients.

An operation is called with a dictionary of tensors; what requires a gradient is every floating tensor among them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

LENGTHS = (1, 2, 63, 64, 65)


def reset_masks(rows: int, length: int) -> dict[str, Tensor | None]:
    """Resets at the places where forms differ: none, first, middle and last (one row each), everywhere, scattered.

    Odd lengths in between get two of them only, since a reference takes its time.
    """
    scattered = torch.rand(rows, length, generator=torch.Generator().manual_seed(4)) < 0.2
    if length not in (1, 2, max(LENGTHS)):
        return {"none": None, "scattered": scattered}
    places = torch.zeros(rows, length, dtype=torch.bool)
    for row, where in enumerate((0, length // 2, length - 1)):
        places[row % rows, where] = True
    return {"none": None, "places": places, "dense": torch.ones_like(places), "scattered": scattered}


def results(operation: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """All outputs of an operation, and the gradients of all its floating arguments."""
    fresh = {
        name: value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    found: dict[str, Tensor] = {}

    def flatten(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        else:
            for i, part in enumerate(value):
                flatten(part, f"{name}[{i}]")

    flatten(operation(**fresh), "output")
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum() for value in found.values()
    )
    wanted = {name: value for name, value in fresh.items() if isinstance(value, Tensor) and value.requires_grad}
    if isinstance(loss, Tensor) and loss.requires_grad:
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for (name, value), grad in zip(wanted.items(), grads, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(value) if grad is None else grad
    for name, value in arguments.items():
        assert not isinstance(value, Tensor) or torch.equal(value, fresh[name]), f"{name} was changed"
    return {name: value.detach() for name, value in found.items()}


def assert_same_results(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-9) -> None:
    """Equal tensors up to a part of the largest expected value (at least of one)."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        assert value.isfinite().all() and got[name].isfinite().all(), f"{name} is not finite"
        if value.numel():
            error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1)
            assert error <= tolerance, f"{name}: error {error:.3g}, limit {tolerance:.3g}"
