r"""Train a lossless tokenizer with byte fallback: Unigram pieces, byte-pair pieces, or bytes alone.

Text is cut into words (``SPLIT_PATTERN``). Within a word the Unigram model (``sentencepiece``) chooses the pieces
p_1 ... p_n whose joined text is the word and whose sum of log-probabilities is largest; the byte-pair model (``bpe``)
joins neighbouring pieces in the order in which training found them. A character without a piece of its own is spelled
in its UTF-8 bytes; ``byte_reference`` has no pieces at all. What is unusual:

* Nothing is normalised, folded or replaced, so ``decode(encode(text)) == text`` for every valid text:
  runs of spaces, tabs, CRLF, emoji and text that looks like a byte piece ("<0x0A>") included. A space
  belongs to the word after it; a line break takes the indentation of the next line with it.
* Digits are split one by one.
* Ids are laid out by hand: the control tokens 0 to 9, the bytes 10 to 265, then the pieces, most
  probable first. Control tokens and bytes have the score -1e6, and no word that the pattern makes can
  spell one, so the model itself never turns plain text into a control id. (The stock call still
  *recognises* control strings in raw text; ``encode_untrusted`` does not.)
* A word ends after 128 characters at the latest, so that a text of one endless word takes linear time.
* Training is repeatable. The trainer of ``tokenizers`` walks hash tables in random order, which reaches
  the result in three ways: the order of the pieces, the last digits of the scores, and the made-up
  scores of characters that it dropped and had to take back (lowest score + 0.0001 * k in random
  order). We round the scores, give those characters the lowest score, and sort by (score, text). Byte-pair pieces
  keep the order in which they were joined.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cognexis.errors import InvalidConfigError, TokenizerError
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.chatml import CHAT_TEMPLATE
from cognexis.tokens.layout import BYTE_TOKENS, CONTROL_TOKENS, TOKENIZER_TYPES

SPLIT_PATTERN = "|".join(
    (
        r"\s*[\r\n][^\S\r\n]*",  # line breaks, blank lines, and the indentation that follows
        r" ?[\p{L}\p{M}_]{1,128}",  # a word or identifier with the space before it
        r" ?[^\s\p{L}\p{M}\p{N}_]{1,128}",  # operators, punctuation, symbols
        r"[^\S\r\n]+(?!\S)",  # spaces up to the one that belongs to the next word
        r"[^\S\r\n]+",  # a space before a digit
    )
)

_UNREACHABLE_SCORE = -1e6
_SCORE_DIGITS = 4
_TRAINER_SCORE_STEP = 1e-4
_ASCII_ALPHABET = frozenset(map(chr, range(32, 127))) | frozenset("\t\n\r")


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    tokenizer_type: str = "sentencepiece",
    max_piece_length: int = 24,
    character_coverage: float = 0.9995,
    tokenizer_version: str = "1",
    source: Any = None,
) -> CognexisTokenizer:
    """Train a tokenizer with exactly ``vocab_size`` ids on ``texts``.

    Args:
        texts: the training documents. Their order does not matter.
        vocab_size: number of ids, control tokens and bytes included.
        tokenizer_type: ``sentencepiece`` (Unigram) or ``bpe``; for ``byte_reference`` see
            :func:`byte_reference_tokenizer`.
        max_piece_length: longest piece in characters.
        character_coverage: share of the text, in (0, 1], whose characters become pieces. The rarest
            characters beyond it are spelled in bytes; printable ASCII always has pieces.
        tokenizer_version: name of this tokenizer's version for its manifest.
        source: what the texts are, for the manifest; anything that JSON can hold.

    Returns:
        A tokenizer with ``<s>`` in front of every encoded text unless ``add_special_tokens=False``,
        padding on the left, and the chat template ``chatml_v1``.

    Raises:
        InvalidConfigError: an argument is out of range, or ``vocab_size`` has no room for the control
            tokens, the bytes and the alphabet.
        TokenizerError: the texts are empty or too short to fill the vocabulary.
    """
    if tokenizer_type not in _TRAINERS:
        raise InvalidConfigError(
            f"tokenizer_type={tokenizer_type!r}: must be one of {', '.join(_TRAINERS)}",
            path="tokenizer_type",
            value=tokenizer_type,
        )
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
    model = _TRAINERS[tokenizer_type](documents, alphabet, vocab_size - fixed, max_piece_length)
    if model.size != vocab_size - fixed:
        raise TokenizerError(
            f"the texts yield {fixed + model.size} ids and vocab_size is {vocab_size}: "
            f"give more text or a smaller vocab_size"
        )
    return _wrap(model.backend, {"type": tokenizer_type, "tokenizer_version": tokenizer_version, "source": source})


def byte_reference_tokenizer() -> CognexisTokenizer:
    """The tokenizer without pieces: 10 control tokens, then byte b has the id 10 + b; 266 ids."""
    vocabulary = {token: index for index, token in enumerate(CONTROL_TOKENS + BYTE_TOKENS)}
    backend = _finish(Tokenizer(models.BPE(vocabulary, [], byte_fallback=True)))
    return _wrap(backend, {"type": TOKENIZER_TYPES[2], "tokenizer_version": "1"})


@dataclass(frozen=True)
class _TrainedModel:
    """A backend, and the number of its pieces."""

    backend: Tokenizer
    size: int


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


def _train_unigram(documents: list[str], alphabet: list[str], num_pieces: int, max_piece_length: int) -> _TrainedModel:
    """Unigram pieces, most probable first."""
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
    backend.train_from_iterator(_passages(documents, alphabet), trainer)
    pieces = _canonical(json.loads(backend.to_str())["model"]["vocab"])
    fixed = [(token, _UNREACHABLE_SCORE) for token in CONTROL_TOKENS + BYTE_TOKENS]
    unk_id = CONTROL_TOKENS.index("<unk>")
    model = models.Unigram(fixed + pieces, unk_id=unk_id, byte_fallback=True)
    return _TrainedModel(_finish(Tokenizer(model)), len(pieces))


def _train_bpe(documents: list[str], alphabet: list[str], num_pieces: int, max_piece_length: int) -> _TrainedModel:
    """Characters in their order, then the joined pieces in the order in which training found them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces,
        special_tokens=[],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=max_piece_length,
        show_progress=False,
    )
    backend.train_from_iterator(_passages(documents, alphabet), trainer)
    trained = json.loads(backend.to_str())["model"]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    vocabulary = {token: index for index, token in enumerate((*CONTROL_TOKENS, *BYTE_TOKENS, *pieces))}
    merges = [tuple(merge) for merge in trained["merges"]]
    model = models.BPE(vocabulary, merges, byte_fallback=True)
    return _TrainedModel(_finish(Tokenizer(model)), len(pieces))


_TRAINERS = {"sentencepiece": _train_unigram, "bpe": _train_bpe}


def _passages(documents: list[str], alphabet: list[str]) -> Iterator[str]:
    """The text without the characters that will be spelled in bytes."""
    rare_characters = re.compile(f"[^{re.escape(''.join(alphabet))}]+")
    return (part for document in documents for part in rare_characters.split(document) if part)


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


def _finish(backend: Tokenizer) -> Tokenizer:
    """Add to a model what is the same for all: words, byte decoder, ``<s>`` in front."""
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A $B:1",
        special_tokens=[("<s>", CONTROL_TOKENS.index("<s>"))],
    )
    return backend


def _wrap(backend: Tokenizer, record: dict[str, Any]) -> CognexisTokenizer:
    return CognexisTokenizer(
        tokenizer_object=backend,
        training_record=record,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=list(CONTROL_TOKENS[4:]),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
