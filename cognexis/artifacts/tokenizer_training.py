r"""Train a lossless Unigram tokenizer with byte fallback.

Text is cut into words (``SPLIT_PATTERN``), and within a word the Unigram model chooses the pieces
p_1 ... p_n whose joined text is the word and whose sum of log-probabilities is largest. A character
without a piece of its own is spelled in its UTF-8 bytes. What is unusual:

* Nothing is normalised, folded or replaced, so ``decode(encode(text)) == text`` for every valid text:
  runs of spaces, tabs, CRLF, emoji and text that looks like a byte piece ("<0x0A>") included. A space
  belongs to the word after it; a line break takes the indentation of the next line with it.
* Digits are split one by one.
* Ids are laid out by hand: the control tokens 0 to 9, the bytes 10 to 265, then the pieces, most
  probable first. Control tokens and bytes have the score -1e6, and no word that the pattern makes can
  spell one, so the model itself never turns plain text into a control id. (The stock call still
  *recognises* control strings in raw text; pass ``split_special_tokens=True`` for untrusted text.)
* Training is repeatable. The trainer of ``tokenizers`` walks hash tables in random order, which reaches
  the result in three ways: the order of the pieces, the last digits of the scores, and the made-up
  scores of characters that it dropped and had to take back (lowest score + 0.0001 * k in random
  order). We round the scores, give those characters the lowest score, and sort by (score, text).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cognexis.errors import InvalidConfigError, TokenizerError

CONTROL_TOKENS: tuple[str, ...] = (
    "<s>",
    "</s>",
    "<pad>",
    "<unk>",
    "<eod>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
)
"""The control tokens; the position is the id."""

BYTE_TOKENS: tuple[str, ...] = tuple(f"<0x{byte:02X}>" for byte in range(256))

SPLIT_PATTERN = "|".join(
    (
        r"\s*[\r\n][^\S\r\n]*",  # line breaks, blank lines, and the indentation that follows
        r" ?[\p{L}\p{M}_]+",  # a word or identifier with the space before it
        r" ?[^\s\p{L}\p{M}\p{N}_]+",  # operators, punctuation, symbols
        r"[^\S\r\n]+(?!\S)",  # spaces up to the one that belongs to the next word
        r"[^\S\r\n]+",  # a space before a digit
    )
)

CHAT_TEMPLATE = """\
{%- if not messages -%}
    {{- raise_exception("a chat needs at least one message") -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message["role"] not in ["system", "user", "assistant", "tool"] -%}
        {{- raise_exception("unknown role: " ~ message["role"]) -}}
    {%- endif -%}
    {{- "<|" ~ message["role"] ~ "|>\\n" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}
            {{- message["content"] ~ "<|end|>" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message["content"] ~ "<|end|>" -}}
    {%- endif -%}
    {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>\\n" -}}
{%- endif -%}
"""
"""The template ``chatml_v1``: role marker, newline, content, ``<|end|>``, newline for each message.

The assistant's content and its ``<|end|>`` are marked as generated, so
``apply_chat_template(..., return_assistant_tokens_mask=True)`` gives the training mask.
"""

_UNREACHABLE_SCORE = -1e6
_SCORE_DIGITS = 4
_TRAINER_SCORE_STEP = 1e-4
_ASCII_ALPHABET = frozenset(map(chr, range(32, 127))) | frozenset("\t\n\r")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_piece_length: int = 24,
    character_coverage: float = 0.9995,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer with exactly ``vocab_size`` ids on ``texts``.

    Args:
        texts: the training documents. Their order does not matter.
        vocab_size: number of ids, control tokens and bytes included.
        max_piece_length: longest piece in characters.
        character_coverage: share of the text, in (0, 1], whose characters become pieces. The rarest
            characters beyond it are spelled in bytes; printable ASCII always has pieces.

    Returns:
        A tokenizer with ``<s>`` in front of every encoded text unless ``add_special_tokens=False``,
        padding on the left, and ``CHAT_TEMPLATE``.

    Raises:
        InvalidConfigError: an argument is out of range, or ``vocab_size`` has no room for the control
            tokens, the bytes and the alphabet.
        TokenizerError: the texts are empty or too short to fill the vocabulary.
    """
    if max_piece_length < 1:
        raise InvalidConfigError(f"max_piece_length must be at least 1, got {max_piece_length}")
    if not 0 < character_coverage <= 1:
        raise InvalidConfigError(f"character_coverage must be in (0, 1], got {character_coverage}")
    documents = [text for text in texts if text]
    if not documents:
        raise TokenizerError("there is no text to train a tokenizer on")

    alphabet = _choose_alphabet(documents, character_coverage)
    fixed = len(CONTROL_TOKENS) + len(BYTE_TOKENS)
    if vocab_size < fixed + len(alphabet):
        raise InvalidConfigError(
            f"vocab_size must be at least {fixed + len(alphabet)} ({len(CONTROL_TOKENS)} control tokens, "
            f"{len(BYTE_TOKENS)} bytes, {len(alphabet)} characters), got {vocab_size}"
        )
    pieces = _train_pieces(documents, alphabet, vocab_size - fixed, max_piece_length)
    if len(pieces) != vocab_size - fixed:
        raise TokenizerError(
            f"the texts yield {fixed + len(pieces)} ids and vocab_size is {vocab_size}: "
            f"give more text or a smaller vocab_size"
        )
    return _wrap(_assemble(pieces))


def _choose_alphabet(documents: list[str], coverage: float) -> list[str]:
    """Printable ASCII, and the most frequent characters until ``coverage`` of the text is reached."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document)
    counts.pop("\0", None)  # the trainer uses it as its own separator
    missing = counts.total() * (1 - coverage)
    chosen = set(_ASCII_ALPHABET)
    for character, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        missing -= count
        if missing < 0:
            chosen.add(character)
    return sorted(chosen)


def _train_pieces(
    documents: list[str], alphabet: list[str], num_pieces: int, max_piece_length: int
) -> list[tuple[str, float]]:
    """Run the trainer on the text without rare characters; pieces in their final order."""
    rare_characters = re.compile(f"[^{re.escape(''.join(alphabet))}]+")
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.UnigramTrainer(
        vocab_size=num_pieces,
        special_tokens=[],
        unk_token=None,
        initial_alphabet=alphabet,
        max_piece_length=max_piece_length,
        show_progress=False,
    )
    passages = (part for document in documents for part in rare_characters.split(document) if part)
    backend.train_from_iterator(passages, trainer)
    return _canonical(json.loads(backend.to_str())["model"]["vocab"])


def _canonical(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Remove what differs between two runs of the trainer (see the module docstring)."""
    lowest = min(score for _, score in pieces)
    num_characters = sum(len(piece) == 1 for piece, _ in pieces)
    highest_made_up = lowest + _TRAINER_SCORE_STEP * num_characters
    scored = {
        piece: round(lowest if len(piece) == 1 and score <= highest_made_up else score, _SCORE_DIGITS)
        for piece, score in pieces
    }
    return sorted(scored.items(), key=lambda item: (-item[1], item[0]))


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )


def _assemble(pieces: list[tuple[str, float]]) -> Tokenizer:
    """Build the backend: vocabulary with fixed ids, words, byte decoder, ``<s>`` in front."""
    fixed = [(token, _UNREACHABLE_SCORE) for token in CONTROL_TOKENS + BYTE_TOKENS]
    unk_id = CONTROL_TOKENS.index("<unk>")
    backend = Tokenizer(models.Unigram(fixed + pieces, unk_id=unk_id, byte_fallback=True))
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B:1",
        special_tokens=[("<s>", CONTROL_TOKENS.index("<s>"))],
    )
    return backend


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=list(CONTROL_TOKENS[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
