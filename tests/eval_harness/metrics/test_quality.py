"""Metrics of quality: values computed by hand, and inputs without a value."""

import math

import pytest
import torch

from cognexis.errors import (
    BackendError,
    InvalidConfigError,
    InvalidTokenIdError,
    NonFiniteError,
    ShapeMismatchError,
)
from cognexis.eval_harness.metrics.language import (
    bits_per_byte,
    negative_log_likelihood,
    perplexity,
    token_losses,
)
from cognexis.eval_harness.metrics.matching import accuracy, exact_match, mean_score, multiple_choice
from cognexis.eval_harness.metrics.mathematics import maths_equal
from cognexis.eval_harness.metrics.names import MetricDirection, MetricName, metric_direction
from cognexis.eval_harness.metrics.pass_at_k import pass_at_k
from cognexis.eval_harness.metrics.rubric import Criterion, rubric_score
from cognexis.eval_harness.metrics.text_overlap import bleu, mean_rouge, rouge

# ---- language ----


def test_likelihood_and_perplexity_of_sure_predictions():
    loss = negative_log_likelihood(torch.tensor([[10.0, 0.0], [0.0, 10.0]]), torch.tensor([0, 1]))
    assert loss == pytest.approx(4.53989e-5, rel=1e-5)
    assert perplexity(loss) == pytest.approx(1.0000454, abs=1e-8)


def test_ignored_targets_do_not_count():
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    expected = [logits[0, 0, 1], logits[0, 2, 2], logits[1, 2, 4]]
    norms = [logits[0, 0], logits[0, 2], logits[1, 2]]
    losses = [float(torch.logsumexp(norm, 0) - value) for norm, value in zip(norms, expected, strict=True)]
    assert token_losses(logits, targets).tolist() == pytest.approx(losses, rel=1e-5)


def test_sum_is_taken_in_float64():
    logits = torch.zeros(100_000, 3, dtype=torch.bfloat16)
    assert negative_log_likelihood(logits, torch.zeros(100_000, dtype=torch.long)) == pytest.approx(
        math.log(3), rel=1e-12
    )


def test_uniform_bytes_cost_eight_bits():
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_losses(torch.zeros(2, 3), torch.tensor([0])), ShapeMismatchError, r"\[1\]: must be \[2\]"),
        (lambda: token_losses(torch.zeros(2, 3), torch.tensor([-100, -100])), InvalidConfigError, "none of 2 counts"),
        (lambda: token_losses(torch.zeros(0, 3), torch.zeros(0)), InvalidConfigError, "none of 0 counts"),
        (lambda: token_losses(torch.zeros(1, 3), torch.tensor([3])), InvalidTokenIdError, "id 3 must be 0 to 2"),
        (lambda: token_losses(torch.full((1, 3), math.nan), torch.tensor([0])), NonFiniteError, "1 of 1 tokens"),
        (lambda: perplexity(math.nan), InvalidConfigError, "nan"),
        (lambda: perplexity(1e4), InvalidConfigError, "0 to 709"),
        (lambda: bits_per_byte(1.0, 0), InvalidConfigError, "num_bytes=0"),
        (lambda: bits_per_byte(-1.0, 1), InvalidConfigError, "total_nats=-1.0"),
    ],
)
def test_likelihood_of_wrong_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- right or wrong ----


def test_multiple_choice_takes_the_highest_score_and_of_equals_the_first():
    scores = [multiple_choice([0.1, 0.9, 0.2], 1), multiple_choice([0.8, 0.7], 1)]
    assert mean_score(scores) == 0.5
    assert multiple_choice([0.5, 0.5], 0) == 1.0 and multiple_choice([0.5, 0.5], 1) == 0.0
    assert multiple_choice([-math.inf, -3.0], 1) == 1.0


def test_exact_match_ignores_white_space_around_only():
    assert exact_match(" 42\n", "42") == 1.0
    assert exact_match("4 2", "42") == 0.0


def test_accuracy_counts_equal_entries():
    assert accuracy(["a", "b", "c", "d"], ["a", "x", "c", "d"]) == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multiple_choice([0.1, 0.2], 2), "answer=2: must be 0 to 1"),
        (lambda: multiple_choice([], 0), "one of 0 choices"),
        (lambda: multiple_choice([0.1, math.nan], 0), r"scores\[1\]=nan"),
        (lambda: accuracy([], []), "none given"),
        (lambda: accuracy([1], [1, 2]), "1 and 2 entries"),
        (lambda: mean_score([1.0, math.inf]), r"scores\[1\]=inf"),
    ],
)
def test_wrong_answers_and_scores_are_named(call, message):
    with pytest.raises(InvalidConfigError, match=message):
        call()


# ---- programs ----


@pytest.mark.parametrize(
    ("counts", "expected"), [((10, 2, 3), 0.5333333), ((5, 0, 3), 0.0), ((4, 2, 3), 1.0), ((7, 3, 1), 3 / 7)]
)
def test_pass_at_k(counts, expected):
    assert pass_at_k(*counts) == pytest.approx(expected, abs=1e-7)


def test_pass_at_k_is_the_share_of_drawn_groups_with_a_pass():
    from itertools import combinations

    outcomes = [1, 1, 0, 0, 0, 0, 1]
    groups = list(combinations(outcomes, 3))
    assert pass_at_k(7, 3, 3) == pytest.approx(sum(any(group) for group in groups) / len(groups))


@pytest.mark.parametrize("counts", [(0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_pass_at_k_of_impossible_counts_is_refused(counts):
    with pytest.raises(InvalidConfigError, match="must be"):
        pass_at_k(*counts)


# ---- text ----


def test_bleu_of_identical_text_is_one():
    score, signature = bleu(["the cat sat on the mat"], [["the cat sat on the mat"]])
    assert score == 1.0 and "tok:13a" in signature
    assert bleu(["the dog sat on the mat"], [["the cat sat on the mat"]])[0] < 0.6


def test_rouge_takes_the_best_reference():
    assert rouge(["a b c d"], [["x", "a b c d e"]]) == [pytest.approx(0.8889, abs=1e-4)]
    assert mean_rouge(["a b", "x"], [["a b"], ["y"]]) == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bleu([], []), "none given"),
        (lambda: bleu(["a"], ["a"]), r"references\[0\]='a': must be a list"),
        (lambda: bleu(["a", "b"], [["a"], ["b", "c"]]), "same number of references"),
        (lambda: rouge(["a"], [["a"], ["b"]]), "1 and 2 entries"),
        (lambda: rouge(["a"], [["a"]], "rougeX"), "rouge1, rouge2"),
    ],
)
def test_texts_without_a_score_are_refused(call, message):
    with pytest.raises(InvalidConfigError, match=message):
        call()


# ---- mathematics ----


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (r"so \frac{1}{2} is left: $\boxed{\frac{1}{2}}$", "0.5", 1.0),
        ("1/2", "$\\frac{1}{2}$", 1.0),
        ("#### 1,234", "1234", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("7", "8", 0.0),
        ("", "8", 0.0),
        ("no idea", "8", 0.0),
    ],
)
def test_answers_are_compared_as_values(prediction, reference, expected):
    pytest.importorskip("math_verify")
    assert maths_equal(prediction, reference) == expected


def test_reference_without_an_answer_is_a_fault_of_the_data():
    pytest.importorskip("math_verify")
    with pytest.raises(InvalidConfigError, match="no mathematical answer"):
        maths_equal("1", "")


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(BackendError, match="pip install math-verify"):
        maths_equal("1", "1")


# ---- judges ----

CRITERIA = (Criterion("correct", "Is it true?", max_grade=4, weight=3), Criterion("short", "Is it short?"))


def test_rubric_weighs_the_grades_of_the_judge():
    score = rubric_score("2+2?", "4", CRITERIA, lambda prompt, answer, criteria: {"correct": 2, "short": len(answer)})
    assert score.score == pytest.approx((3 * 2 / 4 + 1) / 4) and score.grades == {"correct": 2.0, "short": 1.0}


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ({"correct": 1}, r"must be exactly \['correct', 'short'\]"),
        ({"correct": 1, "short": 1, "kind": 1}, "must be exactly"),
        ({"correct": 5, "short": 1}, "correct=5.0: must be 0 to 4"),
        ({"correct": math.nan, "short": 1}, "correct=nan"),
    ],
)
def test_judge_is_held_to_the_rubric(grades, message):
    with pytest.raises(BackendError, match=message):
        rubric_score("p", "a", CRITERIA, lambda *_: grades)


def test_rubric_without_sense_is_refused():
    with pytest.raises(InvalidConfigError, match="different names"):
        rubric_score("p", "a", (), lambda *_: {})
    with pytest.raises(InvalidConfigError, match="x.weight=0"):
        Criterion("x", "", weight=0)


# ---- names ----


def test_names_and_directions_of_metrics():
    names = """perplexity negative_log_likelihood accuracy exact_match pass_at_k latency_ms prefill_latency_ms
    decode_latency_ms_per_token flops peak_memory_bytes loops_mean loops_p50 loops_p90 loops_p99 depth_efficiency_index
    loop_saturation_point overthinking_threshold depth_gain_ratio budget_exhaustion_rate"""
    assert [name.value for name in MetricName] == names.split()
    assert metric_direction(MetricName.PERPLEXITY) is MetricDirection.LOWER_IS_BETTER
    assert metric_direction(MetricName.ACCURACY) is MetricDirection.HIGHER_IS_BETTER
