"""What every cell, block, column and stack must hold, whatever it computes: the rules of states and resets.

A test wraps its module in :class:`Unit` and passes it to each function of :data:`PROPERTIES`:

    @pytest.mark.parametrize("holds", PROPERTIES, ids=lambda check: check.__name__)
    def test_cell_keeps_the_shared_rules(holds):
        holds(Unit(randomised(LSTMCell(LSTMCellConfig(hidden_size=6)))))

Exactness is judged in float64, where two right ways of computing the same agree to about 1e-12 and a wrong one does
not. Parameters should be random: at their initial values many recurrent matrices are zero and hide faults.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor, nn

ROWS = 3
LENGTH = 13
# One row is reset at its first token, once in the middle and twice running; one never; one at the last token.
RESETS = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
RESETS[0, [0, 5, 6]] = True
RESETS[2, LENGTH - 1] = True


@dataclass(frozen=True)
class Unit:
    """A module under test.

    Args:
        module: cell, block, column or stack, in eval mode and deterministic.
        width: H of the input; read from the module when None.
        streamed_gradients: whether gradients flow through a carried state, so that a cut does not change them.
        coarse: allowed error in bfloat16 and under autocast, as a part of the output's largest value.
    """

    module: nn.Module
    width: int | None = None
    streamed_gradients: bool = True
    coarse: float = 0.08

    @property
    def hidden(self) -> int:
        found: Any = self.width or getattr(self.module, "hidden_size", None) or getattr(self.module, "d_hidden", None)
        return int(found or self.module.cfg.d_hidden)

    def exact(self) -> Any:
        return copy.deepcopy(self.module).double().eval()

    def tokens(self, length: int = LENGTH, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(rows, length, self.hidden, generator=generator, dtype=torch.float64).to(dtype)


def randomised(module: Any, scale: float = 0.3) -> Any:
    """The module with noise on every parameter, in eval mode."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return module.eval()


def run(module: Any, x: Tensor, resets: Tensor | None = None, cuts: Any = (), state: Any = None) -> tuple[Tensor, Any]:
    """Run a sequence in pieces that end at ``cuts``."""
    outputs = []
    borders = [0, *cuts, x.shape[1]]
    for start, end in pairwise(borders):
        y, state = module(x[:, start:end], state, resets=None if resets is None else resets[:, start:end])
        outputs.append(y)
    return torch.cat(outputs, 1), state


def run_steps(module: Any, x: Tensor, resets: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
    """Run a sequence token by token."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = module(x[:, t], state, resets=None if resets is None else resets[:, t])
        assert y.dim() == 2
        outputs.append(y)
    return torch.stack(outputs, 1), state


def as_path(key: Any) -> tuple[str, ...]:
    """A key of a state as a path, whether it is nested or not."""
    return key if isinstance(key, tuple) else (key,)


def leaves(state: TensorDict) -> dict[Any, Tensor]:
    """The tensors of a state by their path."""
    return {key: state[key] for key in sorted(state.keys(True, True), key=str)}


def tree(state: TensorDict) -> dict[Any, Any]:
    """Paths, shapes and dtypes of a state."""
    return {key: (tuple(value.shape), value.dtype) for key, value in leaves(state).items()}


def assert_near(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Equal up to a part of the largest expected value (at least of one)."""
    assert got.shape == expected.shape, f"{what}: {list(got.shape)} instead of {list(expected.shape)}"
    if not expected.numel():
        return
    limit = tolerance * max(1.0, expected.detach().abs().max().item())
    error = (got.detach() - expected.detach()).abs().max().item()
    assert error <= limit, f"{what}: error {error:.3g}, limit {limit:.3g}"


def assert_same_state(got: TensorDict, expected: TensorDict, tolerance: float = 1e-9) -> None:
    """Same paths, shapes, dtypes, and values up to ``tolerance``."""
    assert tree(got) == tree(expected)
    others = leaves(expected)
    for key, value in leaves(got).items():
        assert_near(value.double(), others[key].double(), f"state {key}", tolerance)


def gradients(module: Any, x: Tensor, way: Callable[[Any, Tensor], tuple[Tensor, Any]]) -> dict[str, Tensor]:
    """Gradients of x and of every parameter, for a loss that reads every output."""
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y, _ = way(module, x)
    generator = torch.Generator().manual_seed(3)
    (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
    named = {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.clone() for name, value in named.items() if value is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal gradients; where one side has none, the other may be zero."""
    for name in got.keys() | expected.keys():
        one, other = got.get(name), expected.get(name)
        if one is None or other is None:
            given = one if other is None else other
            assert given is not None and not given.any(), f"gradient of {name} exists on one side only"
        else:
            assert_near(one, other, f"gradient of {name}")


# -- the properties ------------------------------------------------------------------------------------------------


def steps_equal_one_sequence(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    for resets in (None, RESETS):
        y, state = run(module, x, resets)
        stepped, last = run_steps(module, x, resets)
        assert_near(stepped, y, "output")
        assert_same_state(last, state)


def a_sequence_of_one_token_is_a_step(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, state = run(module, x[:, :4])
    resets = torch.tensor([True, False, True])
    y, last = module(x[:, 4], state, resets=resets)
    for form in (resets, resets[:, None]):
        kept, other = module(x[:, 4:5], state, resets=form)
        assert_near(kept, y[:, None], "output")
        assert_same_state(other, last)
        assert_near(module(x[:, 4], state, resets=form)[0], y, "output of a step")


def a_cut_changes_nothing(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    for resets in (None, RESETS):
        y, state = run(module, x, resets)
        for cuts in ((1,), (5,), (6,), (LENGTH - 1,), (2, 3, 9)):
            pieces, last = run(module, x, resets, cuts)
            assert_near(pieces, y, f"output, cut at {cuts}")
            assert_same_state(last, state)


def a_reset_is_a_fresh_start(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    for at in (0, 1, 7, LENGTH - 1):
        resets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        resets[1, at] = True
        _, used = run(module, x.flip(1))
        y, state = run(module, x, resets, state=used)
        fresh, last = run(module, x[:, at:])
        assert_near(y[1, at:], fresh[1], f"output after a reset at {at}")
        kept, _ = run(module, x, state=used)
        assert_near(y[0], kept[0], "output of a row without resets")
        for key, value in leaves(state).items():
            assert_near(value[1].double(), leaves(last)[key][1].double(), f"state {key} after a reset at {at}")


def reset_state_makes_rows_fresh(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, state = run(module, x)
    fresh = module.init_state(ROWS, device="cpu", dtype=torch.float64)
    assert_same_state(module.reset_state(state, torch.ones(ROWS)), fresh, 0)
    mask = torch.tensor([False, True, False])
    for form in (mask, mask.long(), mask.double()):
        partly = leaves(module.reset_state(state, form))
        for key, value in leaves(state).items():
            expected = torch.where(mask.view(-1, *(1,) * (value.dim() - 1)), leaves(fresh)[key], value)
            assert torch.equal(partly[key], expected), key


def reset_state_equals_a_reset(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, state = run(module, x)
    mask = torch.tensor([False, True, False])
    by_mask, _ = module(x[:, 0], state, resets=mask)
    by_state, _ = module(x[:, 0], module.reset_state(state, mask))
    assert_near(by_mask, by_state, "output")


def no_resets_are_resets_of_zero(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, used = run(module, x.flip(1))
    y, state = run(module, x, state=used)
    for zeros in (torch.zeros(ROWS, LENGTH), torch.zeros(ROWS, dtype=torch.long)):
        other, last = module(x, used, resets=zeros)
        assert_near(other, y, "output")
        assert_same_state(last, state)


def every_form_of_resets_counts(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, used = run(module, x.flip(1))
    y, _ = module(x, used, resets=RESETS)
    for form in (RESETS.long(), RESETS.float(), RESETS.to(torch.uint8)):
        assert_near(module(x, used, resets=form)[0], y, f"output with resets of {form.dtype}")
    first = torch.tensor([True, False, True])
    full = torch.zeros(ROWS, LENGTH)
    full[:, 0] = first
    assert_near(module(x, used, resets=first)[0], module(x, used, resets=full)[0], "output with resets [B]")


def arguments_stay_as_they_are(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, used = run(module, x.flip(1))
    kept = {key: (value.clone(), value._version) for key, value in leaves(used).items()}
    before, paths = x.clone(), tree(used)
    first, _ = module(x, used, resets=RESETS)
    again, _ = module(x, used, resets=RESETS)
    module(x[:, 0], used, resets=RESETS[:, 0])
    module.reset_state(used, torch.ones(ROWS))
    assert torch.equal(first, again) and torch.equal(x, before) and tree(used) == paths
    for key, value in leaves(used).items():
        assert torch.equal(value, kept[key][0]) and value._version == kept[key][1], key


def rows_do_not_mix(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    other = x.clone()
    other[1] += 1
    y, state = run(module, x, RESETS)
    changed, last = run(module, other, RESETS)
    for row in (0, 2):
        assert_near(changed[row], y[row], "output of another row")
        for key, value in leaves(last).items():
            assert_near(value[row].double(), leaves(state)[key][row].double(), f"state {key} of another row")
    assert (changed[1] - y[1]).abs().max() > 1e-6


def the_future_does_not_leak(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    later = x.clone()
    later[:, 8:] += 1
    assert_near(run(module, later)[0][:, :8], run(module, x)[0][:, :8], "output before the change")


def gradients_agree(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    for resets in (None, RESETS):
        whole = gradients(module, x, lambda m, v, r=resets: run(m, v, r))
        assert whole["x"].isfinite().all()
        if unit.streamed_gradients:
            assert_same_gradients(gradients(module, x, lambda m, v, r=resets: run_steps(m, v, r)), whole)
            assert_same_gradients(gradients(module, x, lambda m, v, r=resets: run(m, v, r, (3, 9))), whole)
    resets = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    resets[:, 7] = True

    def second_part(m: Any, v: Tensor) -> tuple[Tensor, Any]:
        y, state = run(m, v, resets)
        return torch.cat([y[:, :7] * 0, y[:, 7:]], 1), state

    def alone(m: Any, v: Tensor) -> tuple[Tensor, Any]:
        y, state = run(m, v[:, 7:])
        return torch.cat([torch.zeros_like(v[:, :7, :1]).expand(-1, -1, y.shape[-1]), y], 1), state

    assert_same_gradients(gradients(module, x, second_part), gradients(module, x, alone))


def gradients_are_finite_differences(unit: Unit) -> None:
    """Of x, every parameter and the carried state, in the outputs and the new state; integers and traces stay."""
    module, x = unit.exact(), unit.tokens(4, 2).requires_grad_()
    _, used = run(module, unit.tokens(3, 2).flip(1))
    held = {key: value.detach().clone().requires_grad_() for key, value in leaves(used).items() if _varies(key, value)}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    resets = torch.tensor([[False, False, True, False], [True, False, False, False]])

    def outputs(mask: Tensor | None, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        state = used.clone()
        for key, value in zip(held, values, strict=False):
            state[key] = value
        y, after = module(x, state, resets=mask)
        return y, *(value for value in leaves(after).values() if value.requires_grad)

    for mask in (None, resets):
        # A random direction per input: an error in any entry shows, and the cost does not grow with the width.
        assert torch.autograd.gradcheck(
            partial(outputs, mask), (x, *held.values(), *parameters), fast_mode=True, atol=1e-6, rtol=1e-4
        )


def _varies(key: Any, value: Tensor) -> bool:
    return value.is_floating_point() and not as_path(key)[-1].startswith("E_")


def the_state_keeps_its_tree(unit: Unit) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module = copy.deepcopy(unit.module).to(dtype).eval()
        x = unit.tokens(dtype=dtype)
        expected = module.init_state(ROWS, device="cpu", dtype=dtype)
        assert expected.batch_size == torch.Size([ROWS])
        for state in (None, TensorDict({}, batch_size=[ROWS]), expected):
            for resets in (None, RESETS):
                y, last = module(x, state, resets=resets)
                assert tree(last) == tree(expected) and last.batch_size == torch.Size([ROWS])
                assert y.dtype == dtype and y.isfinite().all()
            y, last = module(x[:, 0], state, resets=RESETS[:, 0])
            assert tree(last) == tree(expected) and y.dtype == dtype
        assert tree(module.reset_state(expected, torch.ones(ROWS))) == tree(expected)


def a_fresh_state_equals_none(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    y, state = module(x, None)
    for start in (module.init_state(ROWS, device="cpu", dtype=torch.float64), TensorDict({}, batch_size=[ROWS])):
        other, last = module(x, start)
        assert_near(other, y, "output")
        assert_same_state(last, state)


def no_token_changes_nothing(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, state = run(module, x)
    for resets in (None, torch.zeros(ROWS, 0)):
        y, last = module(x[:, :0], state, resets=resets)
        assert y.shape == (ROWS, 0, run(module, x)[0].shape[-1])
        assert_same_state(last, state, 0)
    y, last = module(x[:, :0], None)
    assert y.shape[:2] == (ROWS, 0)
    assert_same_state(last, module.init_state(ROWS, device="cpu", dtype=torch.float64), 0)


def a_copy_is_the_same_module(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    twin = copy.deepcopy(module)
    y, state = run(module, x, RESETS)
    other, last = run(twin, x, RESETS)
    assert torch.equal(y, other)
    assert_same_state(last, state, 0)
    again, _ = run(twin, x, state=state)
    assert_near(again, run(module, x, state=state)[0], "output of the copy on the original's state")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.5)
    assert torch.equal(run(module, x, RESETS)[0], y), "the original follows its copy"


def a_saved_module_comes_back(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    with tempfile.TemporaryDirectory() as folder:
        save_file(module.state_dict(), Path(folder) / "module.safetensors")
        twin.load_state_dict(load_file(Path(folder) / "module.safetensors"))
    assert torch.equal(run(twin, x, RESETS)[0], run(module, x, RESETS)[0])


def a_saved_state_comes_back(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    _, state = run(module, x[:, :6], RESETS[:, :6])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_file({"/".join(as_path(key)): value.contiguous() for key, value in leaves(state).items()}, path)
        loaded = TensorDict({}, batch_size=[ROWS])
        for name, value in load_file(path).items():
            loaded[tuple(name.split("/"))] = value
    assert_same_state(loaded, state, 0)
    y, last = run(module, x[:, 6:], state=loaded)
    expected, other = run(module, x[:, 6:], state=state)
    assert torch.equal(y, expected)
    assert_same_state(last, other, 0)


def sixteen_bits_come_near(unit: Unit) -> None:
    """The error of bfloat16 (8 bits: 0.4 % per operation) adds up over tokens; see ``Unit.coarse``."""
    module = copy.deepcopy(unit.module).bfloat16().eval()
    x = unit.tokens(dtype=torch.bfloat16).requires_grad_()
    expected, _ = run(copy.deepcopy(module).double(), x.double(), RESETS)
    y, _ = run(module, x, RESETS)
    assert_near(y.double() / expected.abs().max(), expected / expected.abs().max(), "output", unit.coarse)
    y.float().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def autocast_comes_near(unit: Unit) -> None:
    module = copy.deepcopy(unit.module).float().eval()
    x = unit.tokens(dtype=torch.float32)
    expected, state = run(module, x, RESETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = run(module, x, RESETS, cuts=(4,))
        stepped, _ = run_steps(module, x, RESETS)
    assert tree(last) == tree(state)
    for name, value in {"output": y, "output of steps": stepped}.items():
        assert_near(value.float() / expected.abs().max(), expected / expected.abs().max(), name, unit.coarse)


def wrong_shapes_are_refused(unit: Unit) -> None:
    module, x = unit.exact(), unit.tokens()
    for wrong in (x[..., :-1], x[0, 0], x[None]):
        with pytest.raises(ValueError, match=r"shape|input"):
            module(wrong, None)
    for wrong in (torch.zeros(ROWS, LENGTH + 2), torch.zeros(ROWS + 1), torch.zeros(ROWS, LENGTH, 1)):
        with pytest.raises(ValueError, match="resets"):
            module(x, None, resets=wrong)
    for wrong in (torch.zeros(ROWS + 1), torch.zeros(ROWS, 2)):
        with pytest.raises(ValueError, match="resets"):
            module(x[:, 0], None, resets=wrong)
    with pytest.raises(ValueError, match="mask"):
        module.reset_state(module.init_state(ROWS, device="cpu", dtype=torch.float64), torch.ones(ROWS + 1))


PROPERTIES: tuple[Callable[[Unit], None], ...] = (
    steps_equal_one_sequence,
    a_sequence_of_one_token_is_a_step,
    a_cut_changes_nothing,
    a_reset_is_a_fresh_start,
    reset_state_makes_rows_fresh,
    reset_state_equals_a_reset,
    no_resets_are_resets_of_zero,
    every_form_of_resets_counts,
    arguments_stay_as_they_are,
    rows_do_not_mix,
    the_future_does_not_leak,
    gradients_agree,
    gradients_are_finite_differences,
    the_state_keeps_its_tree,
    a_fresh_state_equals_none,
    no_token_changes_nothing,
    a_copy_is_the_same_module,
    a_saved_module_comes_back,
    a_saved_state_comes_back,
    sixteen_bits_come_near,
    autocast_comes_near,
    wrong_shapes_are_refused,
)

# For stacks and wide columns, whose many parameters make finite differences slow.
PROPERTIES_OF_MANY = tuple(
    pytest.param(holds, marks=pytest.mark.slow) if holds is gradients_are_finite_differences else holds
    for holds in PROPERTIES
)
