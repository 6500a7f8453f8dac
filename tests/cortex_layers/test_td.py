"""The component for agents: rollout, training, memory."""

import copy
import io

import pytest
import torch
from pydantic import ValidationError
from tensordict import TensorDict

from cognexis.cortex_layers.config import (
    ColumnBlockConfig,
    CortexStackConfig,
    GRUCellConfig,
    LSTMCellConfig,
    PassThroughBlockConfig,
    PostUpBlockConfig,
)
from cognexis.cortex_layers.stacks.build import build_cortex
from cognexis.cortex_layers.td import CortexTD, CortexTDConfig
from tests.batteries.cell_properties import leaves, randomised
from tests.batteries.leaky_cell import LeakyCellConfig

WIDTH, ROWS, LENGTH = 6, 3, 5
STACK = CortexStackConfig(
    d_hidden=WIDTH,
    blocks=[
        PassThroughBlockConfig(cell=LSTMCellConfig()),
        ColumnBlockConfig(
            experts=[PassThroughBlockConfig(cell=LeakyCellConfig()), PostUpBlockConfig(cell=GRUCellConfig())]
        ),
    ],
)


def component(**settings):
    settings = {"in_key": "x", "out_key": "y", "d_hidden": WIDTH, "stack_cfg": STACK} | settings
    return randomised(CortexTD(CortexTDConfig(**settings)))


def batch(x, length, **values):
    rows = x.shape[0] // length
    count = {"bptt": torch.tensor([length]), "batch": torch.tensor([rows])}
    return TensorDict({"x": x, **values, **count})


def roll(td, x, **per_step):
    """Roll out ``[B, T, D]`` step by step; the values of ``per_step`` are ``[B, T]``."""
    outputs = []
    for t in range(x.shape[1]):
        values = {key: value[:, t] for key, value in per_step.items()}
        outputs.append(td(batch(x[:, t], 1, **values))["y"])
    return torch.stack(outputs, 1)


@pytest.fixture
def x():
    return torch.randn(ROWS, LENGTH, WIDTH)


def test_rollout_continues_the_state_of_each_environment(x):
    td = component()
    expected, _ = td.stack(x)
    ids = torch.tensor([7, 3, 11])[:, None].expand(ROWS, LENGTH)
    torch.testing.assert_close(roll(td, x, training_env_ids=ids), expected)


def test_environments_may_come_in_any_order_and_number(x):
    td = component()
    expected, _ = td.stack(x)
    ids = torch.tensor([7, 3, 11])
    for t, order in enumerate([[0, 1, 2], [2, 0, 1], [1], [0, 2], [2, 1, 0]]):
        rows = torch.tensor(order)
        seen = [row for row in order if t < 2 or row == 1 or t == 3]
        y = td(batch(x[rows, t], 1, training_env_ids=ids[rows][:, None]))["y"]
        if t < 2:
            torch.testing.assert_close(y, expected[rows, t])
        elif t == 2:
            torch.testing.assert_close(y, expected[[1], 2])
        elif t == 3:  # environments 0 and 2 did not see the third token
            skipped, _ = td.stack(torch.cat([x[:, :2], x[:, 3:4]], 1))
            torch.testing.assert_close(y, skipped[[0, 2], 2])
        assert seen or t


def test_missing_environment_ids_are_counted_and_written(x):
    td = component()
    out = td(batch(x[:, 0], 1))
    assert out["training_env_ids"].tolist() == [[0], [1], [2]]
    torch.testing.assert_close(out["y"], td.stack(x[:, 0])[0])


@pytest.mark.parametrize("key", ["dones", "truncateds"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_training_sees_the_resets_that_the_rollout_saw(key, dtype, x):
    """A done in the middle of a segment, or a truncation, resets in both branches."""
    td = component()
    resets = torch.zeros(ROWS, LENGTH, dtype=dtype)
    resets[0, 2] = resets[2, 0] = resets[2, 4] = 1
    rolled = roll(td, x, **{key: resets})
    expected, _ = td.stack(x, resets=resets)
    torch.testing.assert_close(rolled, expected)
    rows = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH).reshape(-1)
    trained = td(batch(x.flatten(0, 1), LENGTH, row_id=rows, **{key: resets}))["y"]
    torch.testing.assert_close(trained.view(ROWS, LENGTH, -1), rolled)
    assert not torch.allclose(trained.view(ROWS, LENGTH, -1), td.stack(x)[0])


@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 1), (ROWS, LENGTH), (ROWS * LENGTH,)])
def test_masks_come_in_several_shapes(shape, x):
    td = component(pass_state_during_training=False)
    mask = torch.zeros(shape)
    mask.view(ROWS, -1)[1, 0] = 1
    y = td(batch(x.flatten(0, 1), LENGTH, dones=mask, truncateds=mask.bool()))["y"]
    torch.testing.assert_close(y.view(ROWS, LENGTH, -1), td.stack(x)[0])
    first = td(batch(x[:, 0], 1, training_env_ids=torch.arange(ROWS)))["y"]
    again = td(batch(x[:, 0], 1, training_env_ids=torch.arange(ROWS)[:, None], dones=torch.ones(ROWS, 1)))["y"]
    torch.testing.assert_close(again, first)


def test_training_starts_from_the_state_before_the_segment(x):
    td = component()
    more = torch.cat([x, torch.randn(ROWS, LENGTH, WIDTH)], 1)
    t_in_row = torch.arange(2 * LENGTH).remainder(LENGTH).expand(ROWS, -1)
    row_id = (torch.arange(2 * LENGTH) // LENGTH) * ROWS + torch.arange(ROWS)[:, None]
    rolled = roll(td, more, row_id=row_id, t_in_row=t_in_row)
    second = batch(more[:, LENGTH:].flatten(0, 1), LENGTH, row_id=row_id[:, LENGTH:].reshape(-1))
    trained = td(second)["y"].view(ROWS, LENGTH, -1)
    torch.testing.assert_close(trained, rolled[:, LENGTH:])
    assert trained.requires_grad
    unknown = td(batch(x.flatten(0, 1), LENGTH, row_id=torch.full((ROWS * LENGTH,), 99)))["y"]
    torch.testing.assert_close(unknown.view(ROWS, LENGTH, -1), td.stack(x)[0])


def test_training_without_row_ids(x):
    with pytest.raises(KeyError, match="row_id"):
        component()(batch(x.flatten(0, 1), LENGTH))
    td = component(pass_state_during_training=False)
    y = td(batch(x.flatten(0, 1), LENGTH))["y"]
    torch.testing.assert_close(y.view(ROWS, LENGTH, -1), td.stack(x)[0])


def test_training_leaves_the_rollout_alone(x):
    td = component(pass_state_during_training=False)
    expected, _ = td.stack(x)
    roll(td, x[:, :3])
    td(batch(torch.randn(ROWS * LENGTH, WIDTH), LENGTH))
    torch.testing.assert_close(roll(td, x[:, 3:]), expected[:, 3:])


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_restored_memory_continues_bit_for_bit(dtype, x):
    td = component(dtype=dtype)
    ids = torch.tensor([5, 9, 2])[:, None]
    for t in range(3):
        row_id = torch.arange(ROWS)
        td(batch(x[:, t], 1, training_env_ids=ids, row_id=row_id, t_in_row=torch.full((ROWS,), t)))
    buffer = io.BytesIO()
    torch.save(td.get_memory(), buffer)
    buffer.seek(0)
    twin = component(dtype=dtype)
    twin.load_state_dict(td.state_dict())
    twin.set_memory(torch.load(buffer))
    for order in ([0, 1, 2], [2, 1], [0, 1, 2]):
        one, other = (each(batch(x[order, 3], 1, training_env_ids=ids[order]))["y"] for each in (td, twin))
        assert torch.equal(one, other)
    rows = torch.arange(ROWS)[:, None].expand(ROWS, LENGTH).reshape(-1)
    assert torch.equal(*(each(batch(x.flatten(0, 1), LENGTH, row_id=rows))["y"] for each in (td, twin)))


def test_memory_is_a_copy(x):
    td = component()
    roll(td, x[:, :2])
    memory = td.get_memory()
    before = copy.deepcopy(memory)
    roll(td, x[:, 2:])
    td.get_memory()
    for name in ("rollout_store", "row_store"):
        pairs = zip(memory[name]["leaves"], before[name]["leaves"], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_leaves_keep_their_dtypes_and_empty_slots_are_fresh(x):
    td = component(dtype="bf16")
    td(batch(x[:, 0], 1, training_env_ids=torch.tensor([4, 5, 6])))
    memory = td.get_memory()["rollout_store"]
    fresh = td.stack.init_state(1, dtype=torch.bfloat16)
    assert [leaf.dtype for leaf in memory["leaves"]] == [fresh[tuple(path)].dtype for path in memory["paths"]]
    assert {leaf.dtype for leaf in memory["leaves"]} == {torch.bfloat16, torch.float32, torch.int64}
    unknown = td._rollout_store.get([77, 4])
    for path, leaf in leaves(fresh).items():
        assert torch.equal(unknown[path][:1], leaf)
    count = next(value for path, value in leaves(unknown).items() if path[-1] == "count")
    assert count.tolist() == [1, 2]


def test_stored_dtype_may_differ_from_the_computed_one(x):
    td = component(store_dtype="bf16", compute_dtype="fp32")
    td(batch(x[:, 0], 1))
    dtypes = {leaf.dtype for leaf in td.get_memory()["rollout_store"]["leaves"]}
    assert dtypes == {torch.bfloat16, torch.int64}
    assert next(td.stack.parameters()).dtype == torch.float32


def test_many_environments_make_the_store_grow():
    td = component()
    for start in range(0, 40, 4):
        td(batch(torch.randn(4, WIDTH), 1, training_env_ids=torch.arange(start, start + 4)))
    memory = td.get_memory()["rollout_store"]
    assert memory["ids"] == list(range(40)) and all(leaf.shape[0] == 40 for leaf in memory["leaves"])


def test_memory_of_another_stack_is_refused(x):
    td, other = component(), component(stack_cfg=STACK.model_copy(update={"blocks": STACK.blocks[:1]}))
    roll(td, x[:, :1])
    roll(other, x[:, :1])
    before = td.get_memory()
    with pytest.raises(ValueError, match="does not fit this stack"):
        td.set_memory(other.get_memory())
    assert td.get_memory()["rollout_store"]["ids"] == before["rollout_store"]["ids"]


def test_head_projects_where_the_width_differs(x):
    td = component(out_features=4, output_nonlinearity="tanh")
    y = td(batch(x[:, 0], 1))["y"]
    torch.testing.assert_close(y, td.head[0](td.stack(x[:, 0])[0]).tanh())
    assert y.shape == (ROWS, 4)
    assert isinstance(component(out_features=WIDTH).head, torch.nn.Identity)


def test_output_has_the_dtype_of_the_input(x):
    td = component(dtype="bfloat16", out_features=2)
    assert next(td.stack.parameters()).dtype == torch.bfloat16
    assert td(batch(x[:, 0], 1))["y"].dtype == torch.float32


def test_built_stack_is_taken_as_it_is():
    stack = build_cortex(STACK)
    config = CortexTDConfig(stack=stack, in_key="x", out_key="y", d_hidden=WIDTH, store_dtype="fp32")
    assert config.make_component().stack is stack and config.stack_cfg == STACK


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stack_cfg": None}, "stack_cfg"),
        ({"dtype": "bf16", "store_dtype": "fp16"}, "contradicts"),
        ({"dtype": "int3"}, "int3"),
        ({"output_nonlinearity": "sin"}, "sin"),
        ({"inkey": "x"}, "inkey"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        component(**settings)


def test_shapes_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match="d_hidden=7"):
        component(d_hidden=7)
    td = component()
    wrong = batch(x[:, 0], 1)
    wrong["batch"] = torch.tensor([2])
    with pytest.raises(ValueError, match="bptt=1 and batch=2"):
        td(wrong)
    wrong["bptt"] = torch.tensor([0])
    with pytest.raises(ValueError, match="bptt=0"):
        td(wrong)
    with pytest.raises(ValueError, match="dones: shape"):
        td(batch(x[:, 0], 1, dones=torch.zeros(2)))
    with pytest.raises(ValueError, match="must differ"):
        td(batch(x[:, 0], 1, training_env_ids=torch.tensor([1, 1, 2])))


def test_experience_has_its_keys_and_reset_memory_does_nothing(x):
    td = component()
    spec = td.get_agent_experience_spec()
    assert set(spec) == {"training_env_ids", "row_id", "t_in_row", "dones", "truncateds"}
    assert spec["training_env_ids"].shape == (1,) and spec["row_id"].dtype == torch.long
    assert spec["dones"].dtype == torch.float32
    expected, _ = td.stack(x)
    roll(td, x[:, :2])
    td.reset_memory()
    torch.testing.assert_close(roll(td, x[:, 2:]), expected[:, 2:])
