"""What a task is: examples that make a request each, and a rule that scores the answer.

    for example in task.examples():
        prediction = answer of the model to example.request
        metrics = task.score(prediction, example)

A request is of one of three kinds, and the kind decides what the prediction is:

    Likelihood   text whose tokens are predicted, each from those before it      TokenScores
    Choice       a context and its possible continuations                        ChoiceScores
    Generation   a prompt that is continued                                      list of texts, one per sample

Texts are encoded without control tokens, so "<eod>" in an example is letters; the beginning-of-text token stands in
front of every one. Ids are taken as they are. A metric of a data set is the mean of its scores over the examples that
have one; what is no mean, such as perplexity, is named in ``derived``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cognexis.errors import InvalidConfigError

Text = str | tuple[int, ...]
"""A text, or the token ids of one."""


@dataclass(frozen=True)
class Likelihood:
    """How likely is this text?"""

    text: Text


@dataclass(frozen=True)
class Choice:
    """Which of these continuations is the most likely?"""

    context: Text
    choices: tuple[Text, ...]


@dataclass(frozen=True)
class Generation:
    """Continue this prompt.

    Attributes:
        prompt: the text; with ``is_chat`` the message of a user.
        max_new_tokens: at most so many.
        num_samples: how many answers.
        temperature: of the sampling; 0 takes the most likely token.
        stop: the answer ends before the first of these; what was generated behind it is dropped.
        is_chat: the prompt goes through the tokenizer's chat template.

    Raises:
        InvalidConfigError: a number is out of range, or several samples would be equal.
    """

    prompt: Text
    max_new_tokens: int = 64
    num_samples: int = 1
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    is_chat: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_samples"):
            if (value := getattr(self, name)) < 1:
                raise InvalidConfigError(f"{name}={value}: must be 1 or more", path=name, value=value)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InvalidConfigError(f"temperature={self.temperature}: must be 0 or more", path="temperature")
        if self.num_samples > 1 and self.temperature == 0:
            raise InvalidConfigError(
                f"temperature=0: must be above 0 with num_samples={self.num_samples}, or all are equal",
                path="temperature",
                value=self.temperature,
            )
        if not all(isinstance(stop, str) and stop for stop in self.stop):
            raise InvalidConfigError(f"stop={self.stop!r}: must be texts", path="stop", value=self.stop)


Request = Likelihood | Choice | Generation


@dataclass(frozen=True)
class TokenScores:
    """How well each token of a text but its first was predicted.

    Attributes:
        nats: minus the log-likelihood of each.
        is_best: whether it was the most likely one.
    """

    nats: tuple[float, ...]
    is_best: tuple[bool, ...]


@dataclass(frozen=True)
class ChoiceScores:
    """Log-likelihood of every choice.

    Attributes:
        sums: nats of a choice, 0 or less, given the context.
        lengths: tokens of a choice.
    """

    sums: tuple[float, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        id: names it in the data set.
        request: what the model is asked.
        reference: what the answer is compared with; the task knows its form.
        facts: further properties, such as a difficulty.
    """

    id: str
    request: Request
    reference: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A task of an evaluation; subclass it and hand the class to ``register_task``.

    Attributes:
        name: the kind of task.
        version: raised when the same answers get other scores.
        prompt_format: name of the template of its prompts.
        metrics: names of the metrics, each with the direction that is better.
        derived: metric -> function of the means of all others, for what is no mean.
        decoding: what the answers depend on besides the model, such as temperature; goes into every row.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    prompt_format: str = "none"
    metrics: Mapping[str, str] = {}
    derived: Mapping[str, Callable[[Mapping[str, float]], float]] = {}

    @property
    def decoding(self) -> dict[str, Any]:
        """Settings of sampling; empty where nothing is generated."""
        return {}

    @abstractmethod
    def examples(self) -> Sequence[Example]:
        """Every example, in an order that does not change."""

    @abstractmethod
    def score(self, prediction: Any, example: Example) -> dict[str, float]:
        """Metrics of one answer, each finite; a metric that does not concern the example is left out."""


HIGHER, LOWER = "higher_is_better", "lower_is_better"


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """At most ``count`` items at equal distances; None: all."""
    if count is None or len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def clip_at(text: str, stops: Iterable[str]) -> str:
    """The text before the first stop."""
    ends = [text.find(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
