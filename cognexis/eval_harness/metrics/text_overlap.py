"""Overlap of generated text with references: BLEU by sacrebleu and ROUGE by rouge-score, as 0 to 1.

BLEU of a corpus is not the mean of its sentences, so it takes all texts at once; ROUGE is a mean over examples, each
with the best F1 of its references. The settings that decide the number are returned with it.
"""

from collections.abc import Sequence

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.matching import mean_score
from cognexis.eval_harness.metrics.optional_package import needed_package

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not predictions:
        raise InvalidConfigError("predictions: none given; a metric needs one or more texts")
    if len(predictions) != len(references):
        raise InvalidConfigError(
            f"predictions and references have {len(predictions)} and {len(references)} entries: must be equal"
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise InvalidConfigError(f"references[{index}]={texts!r}: must be a list of one or more texts")


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """Corpus BLEU, 0 to 1, and sacrebleu's signature of its settings.

    Args:
        predictions: ``[n]`` texts.
        references: ``[n]`` lists of references, all of the same length.

    Raises:
        InvalidConfigError: no texts, or lists that do not match.
        BackendError: sacrebleu is not installed.
    """
    _check(predictions, references)
    if len({len(texts) for texts in references}) > 1:
        raise InvalidConfigError("references: BLEU needs the same number of references for every text")
    metric = needed_package("sacrebleu", "sacrebleu", "BLEU").metrics.BLEU()
    score = metric.corpus_score(list(predictions), [list(column) for column in zip(*references, strict=True)])
    return min(score.score / 100, 1.0), str(metric.get_signature())


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kind: str = "rougeL", use_stemmer: bool = False
) -> list[float]:
    """F1 of every text, ``[n]`` in 0 to 1, against the reference that fits best.

    Args:
        kind: "rouge1", "rouge2", "rougeL" or "rougeLsum".

    Raises:
        InvalidConfigError: no texts, lists that do not match, or an unknown kind.
        BackendError: rouge-score is not installed.
    """
    _check(predictions, references)
    if kind not in ROUGE_KINDS:
        raise InvalidConfigError(f"kind={kind!r}: must be one of {', '.join(ROUGE_KINDS)}")
    scorer = needed_package("rouge_score.rouge_scorer", "rouge-score", "ROUGE").RougeScorer([kind], use_stemmer)
    return [
        max(scorer.score(reference, prediction)[kind].fmeasure for reference in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def mean_rouge(predictions: Sequence[str], references: Sequence[Sequence[str]], kind: str = "rougeL") -> float:
    """Mean of ``rouge`` over the texts."""
    return mean_score(rouge(predictions, references, kind))
