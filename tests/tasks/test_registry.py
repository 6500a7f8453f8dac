"""What every task must pass: seeds, distinct samples, splits, and labels that a plain rule confirms."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.tasks.registry import TASKS, get_task
from cognexis.tasks.sequence_task import check_disjoint

SMALL = {
    "delayed_recall": {"delay": 12, "delay_spread": 4},
    "majority": {"length": 20},
    "majority_headpad": {"length": 24, "tail": 6},
    "dyck": {"num_pairs": 10},
    "two_needle_xor_fast": {"length": 40, "tail": 10},
    "assoc_recall_fast": {"length": 32, "tail": 4, "num_pairs": 3, "vocab_size": 24, "num_values": 8},
}


def plain_label(name, row, task):
    """The label by a rule that reads one sequence of plain integers."""
    if name == "delayed_recall":
        (cue,) = [token for token in row if token in (0, 1)]
        return cue
    if name.startswith("majority"):
        return int(row.count(1) > row.count(2))
    if name == "two_needle_xor_fast":
        return row.count(1) % 2
    if name == "dyck":
        text = "".join("()"[token] for token in row)
        while "()" in text:
            text = text.replace("()", "")
        return int(text == "")
    values = {row[t]: row[t + 1] for t in range(len(row) - 1) if 0 < row[t] < task.first_value}
    return values[row[-1]] - task.first_value


every_task = pytest.mark.parametrize("name", TASKS)


@every_task
def test_labels_follow_a_plain_rule(name):
    task = TASKS[name](200, seed=3, **SMALL[name])
    assert [plain_label(name, row, task) for row in task.ids.tolist()] == task.labels.tolist()


@every_task
def test_labels_of_the_default_size_follow_a_plain_rule(name):
    task = TASKS[name](60, seed=4)
    assert [plain_label(name, row, task) for row in task.ids.tolist()] == task.labels.tolist()


@every_task
def test_ids_fit_the_declared_sizes(name):
    task = TASKS[name](100, seed=0, **SMALL[name])
    assert task.ids.shape == (100, task.length) and task.ids.dtype == task.labels.dtype == torch.int64
    assert task.ids.min() >= 0 and task.ids.max() < task.vocab_size
    assert task.labels.min() >= 0 and task.labels.max() < task.num_classes


@every_task
def test_seed_fixes_the_data_and_another_seed_changes_it(name):
    torch.manual_seed(1)
    first = TASKS[name](50, seed=7, **SMALL[name])
    torch.manual_seed(2)
    again, other = TASKS[name](50, seed=7, **SMALL[name]), TASKS[name](50, seed=8, **SMALL[name])
    assert torch.equal(first.ids, again.ids) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.ids, other.ids)


@every_task
def test_global_random_state_is_left_alone(name):
    before = torch.get_rng_state()
    TASKS[name](20, seed=0, **SMALL[name])
    assert torch.equal(torch.get_rng_state(), before)


@every_task
def test_splits_are_80_10_10_and_share_no_sequence(name):
    splits = TASKS[name].splits(250, seed=5, **SMALL[name])
    assert [len(part) for part in splits] == [200, 25, 25]
    rows = [tuple(row) for part in splits for row in part.ids.tolist()]
    assert len(set(rows)) == 250
    whole = TASKS[name](250, seed=5, **SMALL[name])
    assert torch.equal(torch.cat([part.ids for part in splits]), whole.ids)


@every_task
def test_part_by_index_equals_the_slice(name):
    whole = TASKS[name](40, seed=6, **SMALL[name])
    part = TASKS[name](40, seed=6, start_idx=10, end_idx=25, **SMALL[name])
    assert torch.equal(part.ids, whole.ids[10:25]) and len(part) == 15
    ids, label = part[3]
    assert torch.equal(ids, whole.ids[13]) and label == whole.labels[13]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "assoc_recall_fast"])
def test_both_labels_are_about_equally_frequent(name):
    share = TASKS[name](2000, seed=1).labels.float().mean()
    assert 0.42 < share < 0.55  # majority counts ties as 0, about 7 % of the samples


@every_task
def test_difficulty_lists_the_settings(name):
    assert set(SMALL[name]) <= set(TASKS[name].difficulty())
    assert not {"seed", "num_samples", "start_idx"} & set(TASKS[name].difficulty())


def test_shared_sequence_is_reported():
    splits = TASKS["majority"].splits(100, length=20)
    splits.test.ids = splits.train.ids[:3]
    with pytest.raises(InvalidConfigError, match="3 sequences occur more than once"):
        check_disjoint(splits)


def test_too_few_different_sequences_are_an_error():
    with pytest.raises(InvalidConfigError, match=r"num_samples=100: dyck found only \d+ different sequences"):
        TASKS["dyck"](100, num_pairs=2)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("delayed_recall", {"delay": 0}, "delay=0: must be at least 1"),
        ("delayed_recall", {"delay_spread": -1}, "delay_spread=-1"),
        ("delayed_recall", {"num_distractors": 0}, "num_distractors=0"),
        ("delayed_recall", {"p_distractor": 1.5}, "p_distractor=1.5: must be between 0 and 1"),
        ("majority", {"length": 0}, "length=0"),
        ("majority_headpad", {"tail": 1024}, "tail=1024: must be between 0 and length - 1 = 1023"),
        ("dyck", {"num_pairs": 0}, "num_pairs=0"),
        ("two_needle_xor_fast", {"tail": 254}, "tail=254: must leave three positions: at most 253"),
        ("assoc_recall_fast", {"length": 100}, "length=100: must be at least 144"),
        ("assoc_recall_fast", {"vocab_size": 264}, "vocab_size=264: must be at least 265"),
        ("assoc_recall_fast", {"tail": 0}, "tail=0"),
        ("majority", {"num_samples": 0}, "num_samples=0"),
        ("majority", {"seed": -1}, "seed=-1"),
        ("majority", {"end_idx": 9, "num_samples": 5}, "end_idx=9"),
    ],
)
def test_wrong_setting_is_named(name, setting, message):
    with pytest.raises(InvalidConfigError, match=message.replace("[", r"\[")):
        TASKS[name](**setting)


def test_splits_refuse_unknown_settings_and_empty_parts():
    with pytest.raises(InvalidConfigError, match="delays: delayed_recall knows delay, "):
        TASKS["delayed_recall"].splits(100, delays=3)
    with pytest.raises(InvalidConfigError, match="num_samples=9: must be at least 10"):
        TASKS["majority"].splits(9)


def test_unknown_task_lists_the_known_ones():
    assert get_task("dyck") is TASKS["dyck"]
    with pytest.raises(InvalidConfigError, match="task='dick': must be one of delayed_recall, majority"):
        get_task("dick")
