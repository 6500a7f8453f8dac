"""Tasks beside the table of tasks: labels by a plain rule, seeds, splits, and where they stop."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.tasks.multi_operand_addition import MultiOperandAddition
from cognexis.tasks.p_hop import PHop, hop
from cognexis.tasks.prefix_sums import PrefixSums
from cognexis.tasks.s5_composition import PERMUTATIONS, S5Composition, compose

TASKS = {task.name: task for task in (PrefixSums, PHop, MultiOperandAddition, S5Composition)}
every_task = pytest.mark.parametrize("name", TASKS)


def plain_label(name, row, task):
    if name == "prefix_sums":
        return sum(row) % task.modulus
    if name == "multi_operand_addition":
        text = "".join({10: "+", 11: ""}.get(token, str(token)) for token in row)
        return sum(int(operand) for operand in text.split("+"))
    if name == "s5_composition":
        things = [1, 2, 3, 4, 5]
        for index in row:  # the thing now called x is called p(x) next
            things = [PERMUTATIONS[index][thing - 1] for thing in things]
        return PERMUTATIONS.index(tuple(things))
    place = len(row) - 1
    for _ in range(task.num_hops):
        place = max(j for j in range(1, place + 1) if row[j - 1] == row[place])
    return row[place]


@every_task
def test_labels_follow_a_plain_rule(name):
    task = TASKS[name](150, seed=5)
    assert [plain_label(name, row, task) for row in task.ids.tolist()] == task.labels.tolist()
    assert task.ids.shape == (150, task.length) and int(task.ids.max()) < task.vocab_size
    assert int(task.labels.min()) >= 0 and int(task.labels.max()) < task.num_classes


@every_task
def test_seed_fixes_the_data_and_splits_share_nothing(name):
    first, again, other = (TASKS[name](60, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    parts = TASKS[name].splits(60, seed=3)
    rows = [tuple(row) for part in parts for row in part.ids.tolist()]
    assert len(set(rows)) == len(rows) == 60


@every_task
def test_every_answer_is_about_equally_frequent_where_that_is_promised(name):
    task = TASKS[name](4000, seed=1)
    if name in ("prefix_sums", "p_hop"):
        shares = torch.bincount(task.labels, minlength=task.num_classes) / 4000
        assert shares.min() > 0.7 / task.num_classes and shares.max() < 1.3 / task.num_classes
    else:
        assert task.labels.unique().numel() > 100


def test_composition_is_the_group_of_s5():
    swap, cycle = PERMUTATIONS.index((2, 1, 3, 4, 5)), PERMUTATIONS.index((2, 3, 4, 5, 1))
    ids = torch.tensor([[swap, swap, 0, 0, 0], [cycle] * 5, [0, 0, 0, 0, 0]])
    assert compose(ids).tolist() == [0, 0, 0]
    both = compose(torch.tensor([[swap, cycle], [cycle, swap]]))
    assert both[0] != both[1]  # S5 does not commute
    assert PERMUTATIONS[both[0]] == (3, 2, 4, 5, 1)  # 1 -> 2 -> 3


def test_hops_by_hand():
    ids = torch.tensor([[0, 1, 2, 0, 3, 1, 0]])  # behind the latest earlier 0 stands 3, which never occurred before
    assert hop(ids, 1).tolist() == [4] and hop(ids, 2).tolist() == [0] and hop(ids, 3).tolist() == [0]
    assert not (PHop(50, seed=1).ids.diff(dim=1) == 0).any()


def test_carries_reach_the_whole_sum():
    task = MultiOperandAddition(500, num_operands=4, num_digits=2)
    assert task.num_classes == 397 and int(task.labels.max()) > 300
    assert task.ids[:, 2].unique().tolist() == [10] and task.ids[:, -1].unique().tolist() == [11]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixSums(10, length=0), "length=0: must be at least 1"),
        (lambda: PrefixSums(10, modulus=1), "modulus=1: must be at least 2"),
        (lambda: PrefixSums(10, length=1, modulus=3), "found only 3 different sequences"),
        (lambda: PHop(10, num_symbols=2), "num_symbols=2: must be at least 3"),
        (lambda: PHop(10, num_hops=20, length=41, num_symbols=40), "num_hops=20: too few sequences"),
        (lambda: MultiOperandAddition(10, num_digits=16), "num_digits=16: must be 1 to 15"),
        (lambda: S5Composition(10, length=0), "length=0: must be at least 1"),
    ],
)
def test_difficulty_out_of_range_is_an_error(make, message):
    with pytest.raises(InvalidConfigError, match=message):
        make()
