"""Windowed parity: rows, labels, seeds, and the loops that a position needs."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.tasks.windowed_parity import BOS, IGNORED_LABEL, WindowedParity, draw_rows, fewest_loops


def test_labels_are_the_parity_of_each_prefix():
    task = WindowedParity(100, num_bits=9, seed=1)
    for row, labels in zip(task.ids.tolist(), task.labels.tolist(), strict=True):
        assert row[0] == BOS and labels[0] == IGNORED_LABEL
        assert labels[1:] == [row[1 : t + 1].count(1) % 2 for t in range(1, 10)]


def test_hand_computed_row():
    ids, labels = draw_rows(64, 3, torch.Generator().manual_seed(0))
    row = ids.tolist().index([BOS, 1, 1, 0])
    assert labels[row].tolist() == [IGNORED_LABEL, 1, 0, 0]


def test_bits_and_answers_are_balanced():
    ids, labels = draw_rows(4000, 16, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (4000, 17) and ids.dtype == labels.dtype == torch.int64
    assert set(ids[:, 1:].unique().tolist()) == set(labels[:, 1:].unique().tolist()) == {0, 1}
    shares = torch.cat([ids[:, 1:].float().mean(0), labels[:, 1:].float().mean(0)])
    assert (shares - 0.5).abs().max() < 0.04  # the standard error of a share is 0.008


def test_seed_fixes_the_rows_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (WindowedParity(50, num_bits=20, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first.ids, again.ids) and torch.equal(first.labels, again.labels)
    assert not {tuple(row) for row in first.ids.tolist()} & {tuple(row) for row in other.ids.tolist()}
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_share_no_row_and_know_their_difficulty():
    splits = WindowedParity.splits(100, seed=5, num_bits=7)
    rows = [tuple(row) for part in splits for row in part.ids.tolist()]
    assert [len(part) for part in splits] == [80, 10, 10] and len(set(rows)) == 100
    assert splits.test.labels.shape == (10, 8)
    assert WindowedParity.difficulty() == {"num_bits": 24}


@pytest.mark.parametrize(
    "position, loops",
    [(1, 1), (2, 1), (22, 1), (23, 2), (29, 2), (30, 3), (256, 35)],  # prelude, one loop and coda reach 21 tokens
)
def test_fewest_loops_by_hand(position, loops):
    assert fewest_loops(position, 8) == loops


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: WindowedParity(10, num_bits=0), "num_bits=0: must be at least 1"),
        (lambda: WindowedParity(9, num_bits=3), "num_samples=9: windowed_parity found only 8 different"),
        (lambda: fewest_loops(0, 8), "position=0: must be at least 1"),
        (lambda: fewest_loops(1, 1), "window=1: must be at least 2"),
        (lambda: fewest_loops(1, 8, -1), "num_other_blocks=-1: must not be negative"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(InvalidConfigError, match=message):
        call()
