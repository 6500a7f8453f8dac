"""Controlled tasks with a known answer and a difficulty: the families of ``cognexis.tasks``, written as text.

Families with few answers are asked as a choice (metric ``accuracy``, of equal likelihoods the lowest index);
the others are generated and compared (``exact_match``). ``difficulty`` sets the one number that makes a family harder,
and every other setting of the family can be given by its name. ``shots`` solved examples of the training split stand
in front of each question; all questions are of the test split, and the splits share no sequence. ``form: ids`` asks a
model that was trained on the family's own ids: the answer is the class with the largest logit at the last token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cognexis.configuration_rules import nearest_name
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.metrics.matching import exact_match, multiple_choice
from cognexis.eval_harness.tasks.protocol import HIGHER, Choice, ChoiceScores, Example, Generation, Task
from cognexis.tasks.delayed_recall import DelayedRecall
from cognexis.tasks.dyck import Dyck
from cognexis.tasks.majority import Majority
from cognexis.tasks.multi_operand_addition import EQUALS, PLUS, MultiOperandAddition
from cognexis.tasks.p_hop import PHop
from cognexis.tasks.prefix_sums import PrefixSums
from cognexis.tasks.s5_composition import PERMUTATIONS, S5Composition
from cognexis.tasks.sequence_task import SequenceTask
from cognexis.tasks.windowed_parity import WindowedParity

_NO_YES = ("no", "yes")
_DIGITS = tuple("0123456789")
_CUES, _SIGNS = ("A", "B"), tuple("AB.wxyz")
_LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True)
class Family:
    """How a family is written.

    Attributes:
        task: its data set.
        difficulty: the setting that makes it harder.
        question: text with ``{row}`` and, where they matter, settings of the task.
        answers: the text of every label, for a choice; or label -> text, for an answer that is generated.
        words: text of every token; or tokens -> text.
    """

    task: type[SequenceTask]
    difficulty: str
    question: str
    answers: tuple[str, ...] | Callable[[int], str]
    words: tuple[str, ...] | Callable[[list[int]], str]

    def solved(self, data: SequenceTask, index: int) -> tuple[str, int]:
        """Question and label of a sample."""
        ids, labels = data[index]
        tokens = ids.tolist()
        row = self.words(tokens) if callable(self.words) else " ".join(self.words[token] for token in tokens)
        return self.question.format(row=row, **vars(data)), int(labels if labels.ndim == 0 else labels[-1])


def _bits(ids: list[int]) -> str:
    return " ".join(map(str, ids[1:]))


def _sum(ids: list[int]) -> str:
    return "".join({PLUS: " + ", EQUALS: " ="}.get(token, str(token)) for token in ids)


def _permutation(index: int) -> str:
    return "".join(map(str, PERMUTATIONS[index]))


def _permutations(ids: list[int]) -> str:
    return " ".join(map(_permutation, ids))


FAMILIES: dict[str, Family] = {
    "windowed_parity": Family(WindowedParity, "num_bits", "Bits: {row}\nAn odd number of ones:", _NO_YES, _bits),
    "prefix_sums": Family(PrefixSums, "length", "Numbers: {row}\nTheir sum modulo {modulus}:", _DIGITS, _DIGITS),
    "p_hop": Family(PHop, "num_hops", "Letters: {row}\nAfter {num_hops} hops:", _LETTERS, _LETTERS),
    "multi_operand_addition": Family(MultiOperandAddition, "num_operands", "{row}", str, _sum),
    "s5_composition": Family(S5Composition, "length", "{row} =", _permutation, _permutations),
    "delayed_recall": Family(DelayedRecall, "delay", "Signs: {row}\nThe letter:", _CUES, _SIGNS),
    "majority": Family(Majority, "length", "Votes: {row}\nMore a than b:", _NO_YES, (".", "a", "b")),
    "dyck": Family(Dyck, "num_pairs", "Brackets: {row}\nBalanced:", _NO_YES, ("(", ")")),
}


def family_of(name: str) -> Family:
    """The family of that name.

    Raises:
        InvalidConfigError: there is none; names the nearest.
    """
    if name not in FAMILIES:
        reason = f"must be one of {', '.join(FAMILIES)}{nearest_name(name, FAMILIES)}"
        raise InvalidConfigError(f"task={name!r}: {reason}", path="task", value=name, reason=reason)
    return FAMILIES[name]


class Synthetic(Task):
    """Questions of one family, generated from the seed."""

    name = "synthetic"

    def __init__(
        self,
        task: str,
        seed: int,
        vocab_size: int,
        *,
        difficulty: int | None = None,
        num_examples: int = 64,
        shots: int = 0,
        form: str = "text",
        **settings: Any,
    ) -> None:
        self._examples: list[Example] = []
        self._answers: tuple[str, ...] | Callable[[int], str] = ()
        family = family_of(task)
        if difficulty is not None and family.difficulty in settings:
            raise InvalidConfigError(f"options.difficulty: is {family.difficulty} of {task}; give one of the two")
        if difficulty is not None:
            settings[family.difficulty] = difficulty
        if num_examples < 1 or shots < 0:
            raise InvalidConfigError(
                f"options.num_examples={num_examples}, options.shots={shots}: must be at least 1, and 0 or more"
            )
        splits = family.task.splits(10 * max(num_examples, shots), seed=seed, **settings)
        if form == "ids":
            self._ask_in_ids(task, splits.test, num_examples, shots, vocab_size)
            return
        if form != "text":
            raise InvalidConfigError(f"options.form={form!r}: must be text or ids", path="options.form", value=form)
        for name, texts, needed in (
            ("answers", family.answers, splits.test.num_classes),
            ("tokens", family.words, splits.test.vocab_size),
        ):
            if isinstance(texts, tuple) and needed > len(texts):
                raise InvalidConfigError(f"options: {task} has texts for {len(texts)} {name}, not for {needed}")
        self.prompt_format = f"{task}, {shots} shots"
        self._answers = family.answers
        self.metrics = {"exact_match": HIGHER} if callable(family.answers) else {"accuracy": HIGHER}
        solved = [family.solved(splits.train, index) for index in range(shots)]
        before = "".join(f"{question} {self._answer(label)}\n\n" for question, label in solved)
        self._examples += [
            self._example(str(index), before, *family.solved(splits.test, index), splits.test.num_classes)
            for index in range(num_examples)
        ]

    def _ask_in_ids(self, task: str, data: SequenceTask, num_examples: int, shots: int, vocab_size: int) -> None:
        """Sequences as they are; the answer is the class with the largest logit at the last token."""
        if shots or vocab_size < max(data.vocab_size, data.num_classes):
            raise InvalidConfigError(
                f"options.form='ids': takes no shots, and a model of {max(data.vocab_size, data.num_classes)} or more "
                f"ids, got shots={shots} and {vocab_size} ids",
                path="options.form",
            )
        self.prompt_format, self.metrics = f"{task}, ids", {"accuracy": HIGHER}
        self._answers = tuple(map(str, range(data.num_classes)))
        choices = tuple((label,) for label in range(data.num_classes))
        for index in range(num_examples):
            ids, labels = data[index]
            label = int(labels if labels.ndim == 0 else labels[-1])
            self._examples.append(Example(str(index), Choice(tuple(ids.tolist()), choices), label))

    @property
    def decoding(self) -> dict[str, Any]:
        return {"temperature": 0.0} if callable(self._answers) else {}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def score(self, prediction: Any, example: Example) -> dict[str, float]:
        if isinstance(prediction, ChoiceScores):
            return {"accuracy": multiple_choice(prediction.sums, example.reference)}
        return {"exact_match": exact_match(prediction[0], example.reference)}

    def _answer(self, label: int) -> str:
        return self._answers(label) if callable(self._answers) else self._answers[label]

    def _example(self, name: str, before: str, question: str, label: int, num_classes: int) -> Example:
        if not callable(self._answers):
            choices = tuple(f" {self._answer(index)}" for index in range(num_classes))
            return Example(name, Choice(before + question, choices), label)
        answer = self._answer(label)
        return Example(name, Generation(before + question, max_new_tokens=len(answer) + 4, stop=("\n",)), answer)
