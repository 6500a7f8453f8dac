"""Ids to text: whole sequences, and one token at a time for a single request.

The UTF-8 bytes of the tokens are joined and decoded; a part that is no UTF-8 becomes U+FFFD, one for each maximal
invalid part. That rule looks at nothing that comes later, so a stream never takes back what it has given.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from cognexis.errors import InvalidConfigError, InvalidTokenIdError, TokenizerError
from cognexis.tokens.layout import BYTE_VALUES


@dataclass(frozen=True)
class DecodeRules:
    """Which ids give no text.

    Attributes:
        hidden: ids that are left out.
        end: the id that ends the text, or None.
        size: number of ids in the vocabulary.
    """

    hidden: frozenset[int]
    end: int | None
    size: int

    def check(self, token_id: Any) -> int:
        """Return the id.

        Raises:
            InvalidTokenIdError: it is no integer or not in the vocabulary.
        """
        if type(token_id) is not int:
            number = getattr(token_id, "__index__", None)
            if number is None or "bool" in type(token_id).__name__:
                raise InvalidTokenIdError(f"token ids must be integers, got {token_id!r}")
            token_id = number()
        if not 0 <= token_id < self.size:
            raise InvalidTokenIdError(
                f"token id {token_id} is outside the vocabulary [0, {self.size})", token_id=token_id
            )
        return token_id

    def kept(self, ids: Sequence[int]) -> list[int]:
        """The ids that give text."""
        ids = list(ids)
        if self.end is not None and self.end in ids:
            ids = ids[: ids.index(self.end)]
        return [token_id for token_id in ids if token_id not in self.hidden] if self.hidden else ids


def make_rules(
    tokenizer: Any, skip_special_tokens: bool, stop_at_eos: bool, skip_padding: bool, show_special: bool | None
) -> DecodeRules:
    """The rules of one call of ``decode`` or of one stream.

    Raises:
        InvalidConfigError: ``show_special=True`` together with ``skip_special_tokens=True``.
    """
    if show_special and skip_special_tokens:
        raise InvalidConfigError("show_special=True contradicts skip_special_tokens=True", path="show_special")
    hides = skip_special_tokens if show_special is None else not show_special
    hidden = set(tokenizer.all_special_ids) if hides else set()
    if skip_padding and tokenizer.pad_token_id is not None:
        hidden.add(tokenizer.pad_token_id)
    return DecodeRules(frozenset(hidden), tokenizer.eos_token_id if stop_at_eos else None, len(tokenizer))


def bytes_of_tokens(backend: Tokenizer) -> tuple[bytes, ...] | None:
    """The UTF-8 bytes of every id; None if the backend's decoder does more than joining pieces and bytes."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    kinds = [part["type"] for part in decoder.get("decoders", [decoder]) if part]
    if kinds not in (["ByteFallback", "Fuse"], ["ByteFallback"]):
        return None
    table = [b""] * backend.get_vocab_size(with_added_tokens=True)
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index >= len(table):
            return None
        table[index] = bytes([BYTE_VALUES[token]]) if token in BYTE_VALUES else token.encode()
    return tuple(table)


class TokenStreamDecoder:
    """Text of one request, token by token; what all calls gave is what ``decode`` gives for all ids.

    Args:
        tokenizer: a :class:`CognexisTokenizer`.
        skip_special_tokens: leave control tokens out, as in ``decode``.
        stop_at_eos: ignore everything after the end-of-text token, and that token.
        skip_padding: leave padding out.
        show_special: overrides ``skip_special_tokens``.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_special_tokens: bool = False,
        *,
        stop_at_eos: bool = False,
        skip_padding: bool = True,
        show_special: bool | None = None,
    ) -> None:
        self._rules = make_rules(tokenizer, skip_special_tokens, stop_at_eos, skip_padding, show_special)
        table = tokenizer.backends.token_bytes
        if table is None:
            raise TokenizerError("streaming needs a tokenizer with the lossless decoder of cognexis")
        self._table: tuple[bytes, ...] = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_finished = False

    @property
    def is_finished(self) -> bool:
        """Whether the end-of-text token came, or ``finish`` was called."""
        return self._is_finished

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this id; often empty.

        Raises:
            InvalidTokenIdError: the id is not in the vocabulary.
        """
        token_id = self._rules.check(token_id)
        if self._is_finished:
            return ""
        if token_id == self._rules.end:
            self._is_finished = True
            return ""
        return "" if token_id in self._rules.hidden else self._utf8.decode(self._table[token_id])

    def finish(self) -> str:
        """What is left: U+FFFD for an incomplete character, otherwise nothing. Later ids give nothing."""
        self._is_finished = True
        return self._utf8.decode(b"", final=True)
