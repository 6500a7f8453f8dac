"""Recall from a long context: a sentence with a number is hidden in text, and asked for at the end.

    exact_match                    share of numbers that were named
    exact_match_<length>_<depth>   of one cell: prompts of ``length`` tokens, the sentence at ``depth`` percent

Everything is generated from the seed. The text around is made of sentences about other things with other numbers, as
many as fit into the length; the sentence stands between two of them, as near to its depth as possible.
"""

import random
from collections.abc import Sequence
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.tasks.protocol import HIGHER, Example, Generation, Task, clip_at

_CITIES = (
    *("Aarhus", "Bergen", "Cork", "Dresden", "Evora", "Ghent", "Haarlem", "Izmir", "Jena", "Kaunas", "Lund", "Metz"),
    *("Nantes", "Oulu", "Porto", "Riga", "Split", "Tartu", "Utrecht", "Varna", "Wroclaw", "York", "Zadar"),
)
_FILLER = "The road to {city} is {number} miles long. "
_NEEDLE = "The secret number of {city} is {number}. "
_QUESTION = "What is the secret number of {city}? The secret number of {city} is"


class Recall(Task):
    """Needles by length of the prompt and by depth."""

    name = "recall"
    prompt_format = "needle"

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        seed: int,
        *,
        lengths: tuple[int, ...] = (128, 256),
        depths: tuple[int, ...] = (0, 50, 100),
        num_per_cell: int = 4,
        max_new_tokens: int = 8,
    ) -> None:
        for name, values, low, high in (
            ("lengths", lengths, 64, max_length - max_new_tokens),
            ("depths", depths, 0, 100),
            ("num_per_cell", (num_per_cell,), 1, 10**6),
        ):
            for value in values:
                if type(value) is not int or not low <= value <= high:
                    raise InvalidConfigError(
                        f"options.{name}={value!r}: must be a whole number of {low} to {high}",
                        path=f"options.{name}",
                        value=value,
                    )
        self._max_new_tokens = max_new_tokens
        cells = [(length, depth) for length in lengths for depth in depths]
        names = [f"exact_match_{length}_{depth}" for length, depth in cells]
        self.metrics = {"exact_match": HIGHER, **dict.fromkeys(names, HIGHER)}
        self._examples = []
        for length, depth in cells:
            for index in range(num_per_cell):
                rng = random.Random(f"{seed}/{length}/{depth}/{index}")
                prompt, number = _prompt(tokenizer, length, depth, rng)
                request = Generation(prompt, max_new_tokens=max_new_tokens, stop=(".", "\n"))
                facts = {"length": length, "depth": depth}
                self._examples.append(Example(f"{length}/{depth}/{index}", request, number, facts))

    @property
    def decoding(self) -> dict[str, Any]:
        return {"temperature": 0.0, "max_new_tokens": self._max_new_tokens}

    def examples(self) -> Sequence[Example]:
        return self._examples

    def score(self, prediction: Sequence[str], example: Example) -> dict[str, float]:
        is_right = float(clip_at(prediction[0], (".", "\n")).strip() == example.reference)
        cell = f"exact_match_{example.facts['length']}_{example.facts['depth']}"
        return {"exact_match": is_right, cell: is_right}


def _prompt(tokenizer: Any, length: int, depth: int, rng: random.Random) -> tuple[str, str]:
    """A prompt of at most ``length`` tokens, one of them the beginning-of-text token, and the number asked for."""
    city, *others = rng.sample(_CITIES, len(_CITIES))
    number = str(rng.randrange(1000, 10_000))
    needle, question = _NEEDLE.format(city=city, number=number), _QUESTION.format(city=city)
    sentences: list[str] = []
    room = length - 1 - _count(tokenizer, needle + question)
    while True:
        sentence = _FILLER.format(city=rng.choice(others), number=rng.randrange(1000, 10_000))
        room -= _count(tokenizer, sentence)
        if room < 0:
            break
        sentences.append(sentence)
    place = round(depth / 100 * len(sentences))
    return "".join([*sentences[:place], needle, *sentences[place:], question]), number


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
