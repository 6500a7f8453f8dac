"""What is special to single tasks: where things stand and how often."""

import pytest
import torch

from cognexis.tasks.assoc_recall_fast import AssocRecall
from cognexis.tasks.delayed_recall import DelayedRecall
from cognexis.tasks.dyck import Dyck, depths
from cognexis.tasks.majority import Majority
from cognexis.tasks.majority_headpad import MajorityHeadPad
from cognexis.tasks.two_needle_xor_fast import TwoNeedleXor


def test_delays_cover_their_range_and_distractors_their_share():
    task = DelayedRecall(2000, delay=50, delay_spread=14, p_distractor=0.2)
    delays = task.length - 1 - (task.ids < 2).long().argmax(1)
    assert delays.unique().tolist() == list(range(50, 65))
    assert (task.ids < 2).sum(1).unique().tolist() == [1]
    assert (task.ids > 2).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert set(task.ids.unique().tolist()) == set(range(7))


def test_cue_is_independent_of_the_noise():
    task = DelayedRecall(4000, delay=20)
    distractors = (task.ids > 2).sum(1).float()
    means = [distractors[task.labels == cue].mean() for cue in (0, 1)]
    assert abs(means[0] - means[1]) < 0.3  # the standard error of the difference is 0.07


def test_votes_have_their_share_and_ties_count_as_zero():
    task = Majority(4000, length=100)
    assert (task.ids > 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    difference = (task.ids == 1).sum(1) - (task.ids == 2).sum(1)
    assert (difference == 0).any() and not task.labels[difference == 0].any()


def test_tail_of_the_padded_majority_is_empty():
    task = MajorityHeadPad(20)
    assert task.length == 1024 and not task.ids[:, -256:].any() and task.ids[:, 700:768].any()


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 50])
def test_ill_formed_words_have_equal_counts_and_go_below_zero(num_pairs):
    task = Dyck({1: 2, 2: 4, 3: 8}.get(num_pairs, 500), num_pairs=num_pairs)
    final = depths(task.ids)
    assert not final[:, -1].any()
    assert torch.equal((final >= 0).all(1).long(), task.labels)


def test_ends_of_a_long_word_hardly_tell():
    task = Dyck(1000, num_pairs=50)
    given_away = (task.ids[:, 0] == 1) | (task.ids[:, -1] == 0)
    assert given_away.float().mean() < 0.04 and not given_away[task.labels == 1].any()


def test_easier_words_are_shorter_and_drawn_by_seeds_of_their_own():
    one, two = Dyck.easier(8000, seed=3)
    assert (one.num_pairs, two.num_pairs) == (10, 20) and len(one) == len(two) == 5000
    assert [part.num_pairs for part in Dyck.easier(40, seed=3, num_pairs=100)] == [20, 40]
    assert [part.num_pairs for part in Dyck.easier(40, seed=3, num_pairs=30)] == [12]
    assert Dyck.easier(40, seed=3, num_pairs=16) == []
    repeated, other = Dyck.easier(40, seed=3)[0], Dyck.easier(40, seed=4)[0]
    assert torch.equal(repeated.ids, Dyck.easier(40, seed=3)[0].ids) and not torch.equal(repeated.ids, other.ids)


def test_needles_stay_in_front_of_the_tail():
    task = TwoNeedleXor(1000)
    assert task.ids.sum(1).unique().tolist() == [2, 3] and not task.ids[:, 192:].any()
    assert task.ids[:, :5].any() and task.ids[:, 187:192].any()


def test_pairs_stand_in_the_head_with_distinct_keys():
    task = AssocRecall(200)
    head, tail = task.ids[:, :256], task.ids[:, 256:]
    assert not tail[:, :-1].any()
    is_key, is_value = (head > 0) & (head < task.first_value), head >= task.first_value
    assert is_key.sum(1).eq(8).all() and torch.equal(is_key[:, :-1], is_value[:, 1:])
    assert all(len(set(row[mask].tolist())) == 8 for row, mask in zip(head, is_key, strict=True))
    assert is_key[:, 0].any() and is_value[:, -1].any()
