"""Requests as token ids.

The beginning-of-text token stands in front of every text; ids that a request brings are taken as they are. A choice is
encoded together with its context and cut behind it, since a tokenizer may join what stands at the seam; where the
context's tokens are not those of the whole, both are encoded on their own.
Choices of one token each behind the same context are scored in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.tasks.protocol import Choice, Example, Generation, Likelihood, Text


@dataclass(frozen=True)
class ScoredIds:
    """A sequence whose tokens from ``start`` on are scored, each given all before it.

    ``candidates``: ids that stand for the last token one after another, where all choices are single tokens.
    """

    ids: tuple[int, ...]
    start: int
    candidates: tuple[int, ...] = ()


@dataclass(frozen=True)
class EncodedExample:
    """An example whose request is ids: the sequences to score, or the prompt to continue."""

    example: Example
    scored: tuple[ScoredIds, ...] = ()
    prompt: tuple[int, ...] = ()


def encode_examples(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[EncodedExample]:
    """Every example as ids.

    Raises:
        InvalidConfigError: there is no example, two have one id, or one is longer than ``max_length`` tokens (with
            its answer), holds nothing to score, or is a chat without a template.
    """
    if not examples:
        raise InvalidConfigError("examples: the task has none")
    names = [example.id for example in examples]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidConfigError(f"example {twice!r}: two examples have this id")
    return [_encoded(example, tokenizer, max_length) for example in examples]


def _encoded(example: Example, tokenizer: Any, max_length: int) -> EncodedExample:
    request = example.request
    if isinstance(request, Generation):
        prompt = _chat(request.prompt, tokenizer, example.id) if request.is_chat else _text(request.prompt, tokenizer)
        _check_length(example.id, len(prompt) + request.max_new_tokens, max_length)
        return EncodedExample(example, prompt=prompt)
    if isinstance(request, Likelihood):
        scored = [ScoredIds(_text(request.text, tokenizer), 1)]
    else:
        scored = _together([_choice(request, choice, tokenizer) for choice in request.choices])
    for sequence in scored:
        _check_length(example.id, len(sequence.ids), max_length)
        if not 1 <= sequence.start < len(sequence.ids):
            raise InvalidConfigError(f"example {example.id!r}: has no token to score")
    return EncodedExample(example, scored=tuple(scored))


def _choice(request: Choice, choice: Text, tokenizer: Any) -> ScoredIds:
    context = _text(request.context, tokenizer)
    if isinstance(choice, str) and isinstance(request.context, str):
        whole = _text(request.context + choice, tokenizer)
        if whole[: len(context)] == context and len(whole) > len(context):
            return ScoredIds(whole, len(context))
    own = _plain(choice, tokenizer) if isinstance(choice, str) else tuple(choice)
    return ScoredIds((*context, *own), len(context))


def _together(choices: list[ScoredIds]) -> list[ScoredIds]:
    """One sequence for all choices where each is one token behind the same context."""
    first = choices[0]
    if any(choice.ids[:-1] != first.ids[:-1] or choice.start != len(choice.ids) - 1 for choice in choices):
        return choices
    return [ScoredIds(first.ids, first.start, tuple(choice.ids[-1] for choice in choices))]


def _text(text: Text, tokenizer: Any) -> tuple[int, ...]:
    if not isinstance(text, str):
        return tuple(text)
    if tokenizer is None:
        raise InvalidConfigError("the task asks in text, and the checkpoint has no tokenizer")
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return (*begin, *_plain(text, tokenizer))


def _plain(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def _chat(text: Text, tokenizer: Any, name: str) -> tuple[int, ...]:
    if not isinstance(text, str):
        raise InvalidConfigError(f"example {name!r}: is_chat needs a prompt that is text")
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidConfigError("options.is_chat: the tokenizer has no chat template", path="options.is_chat")
    messages = [{"role": "user", "content": text}]
    return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def _check_length(name: str, length: int, max_length: int) -> None:
    if length > max_length:
        raise InvalidConfigError(f"example {name!r}: {length} tokens with its answer; the model takes {max_length}")
