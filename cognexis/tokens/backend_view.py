"""What one call sees in place of the backend, so that no call ever changes what other threads use.

transformers sets truncation, padding and the treatment of special tokens on the shared backend before each call;
two threads with different settings then get each other's. A :class:`BackendView` takes those settings, encodes with
backends that stay as they are, and shortens and pads the results itself.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Encoding, Tokenizer, processors

from cognexis.errors import InvalidConfigError, TokenizerError
from cognexis.tokens.guard import ControlGuard, check_text
from cognexis.tokens.truncation import apply_policy, join_segments, truncate_pair

Control = tuple[str, int]  # a control token and its id


@dataclass(frozen=True)
class Backends:
    """A tokenizer's backends and what follows from them; rebuilt when tokens are added."""

    control: Tokenizer  # recognises control strings
    plain: Tokenizer  # takes every text for text
    guard: ControlGuard
    adds_bos: bool  # whether a standalone text gets these without being asked for
    adds_eos: bool
    token_bytes: tuple[bytes, ...] | None  # UTF-8 of each id; None where the decoder is not the lossless one


@dataclass(frozen=True)
class EncodeRequest:
    """The settings of one call that transformers does not know."""

    add_bos: bool | None = None
    add_eos: bool | None = None
    allow_special: bool = True
    truncation_policy: str | None = None
    segments: Sequence[Sequence[tuple[int, int, bool]]] | None = None
    """Per text its parts as (start, end, is_control): only these control tokens are recognised."""
    ids_only: bool = False
    """Whether offsets may be left out, which takes half the time."""


class BackendView:
    """One call's own settings over shared backends; has the methods that ``_encode_plus`` of transformers uses."""

    def __init__(
        self,
        backends: Backends,
        request: EncodeRequest,
        bos: Control | None,
        eos: Control | None,
        max_length: int | None = None,
        marker: str | None = None,
    ) -> None:
        self._backends = backends
        self._request = request
        self._bos = bos
        self._eos = eos
        self._max_length = max_length
        self._marker = marker
        self.truncation: dict[str, Any] | None = None
        self.padding: dict[str, Any] | None = None
        self.encode_special_tokens = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backends.control, name)

    def enable_truncation(self, **settings: Any) -> None:
        self.truncation = settings

    def no_truncation(self) -> None:
        self.truncation = None

    def enable_padding(self, **settings: Any) -> None:
        self.padding = settings

    def no_padding(self) -> None:
        self.padding = None

    def encode_batch(
        self, inputs: Sequence[Any], add_special_tokens: bool = True, is_pretokenized: bool = False
    ) -> list[Encoding]:
        """Encode texts or pairs of texts under the settings of this call."""
        pairs = [_as_pair(item, is_pretokenized) for item in inputs]
        try:
            if not self._request.allow_special:
                self._refuse_control_strings(pairs)
            encodings = self._encode(inputs, pairs, add_special_tokens, is_pretokenized)
        except (TypeError, UnicodeError):
            for text in _texts(pairs):
                check_text(text)
            raise
        if self._request.truncation_policy:
            encodings = [self._shorten(encoding, pair) for encoding, pair in zip(encodings, pairs, strict=True)]
        self._pad(encodings)
        return encodings

    def _encode(
        self, inputs: Sequence[Any], pairs: list[tuple[Any, Any]], add_special_tokens: bool, is_pretokenized: bool
    ) -> list[Encoding]:
        plain = self.encode_special_tokens
        backend = self._backends.plain if plain else self._backends.control
        if self._request.segments is not None:
            firsts = self._encode_segments([first for first, _ in pairs])
            return [self._process(first, None, False, False) for first in firsts]
        bos, eos = self._wanted(add_special_tokens)
        standard = (self._backends.adds_bos, self._backends.adds_eos)
        is_uniform = (bos, eos) in (standard, (False, False)) and self.truncation is None
        if is_uniform and (plain or not any(map(self._has_ends, pairs)) or not (bos or eos)):
            special = (bos, eos) == standard and (add_special_tokens or bos or eos)
            return self._run(backend, list(inputs), add_special_tokens=special, is_pretokenized=is_pretokenized)
        texts = [text for pair in pairs for text in pair if text is not None]
        parts = iter(self._run(backend, texts, add_special_tokens=False, is_pretokenized=is_pretokenized))
        encodings = []
        for pair in pairs:
            first = next(parts)
            second = next(parts) if pair[1] is not None else None
            has_bos, has_eos = (False, False) if plain else self._ends(pair)
            encodings.append(self._process(first, second, bos and not has_bos, eos and not has_eos))
        return encodings

    def _run(self, backend: Tokenizer, texts: list[Any], **settings: Any) -> list[Encoding]:
        encode = backend.encode_batch_fast if self._request.ids_only else backend.encode_batch
        return encode(texts, **settings)

    def _wanted(self, add_special_tokens: bool) -> tuple[bool, bool]:
        """Whether the call wants the beginning-of-text and the end-of-text token."""
        request, backends = self._request, self._backends
        bos = add_special_tokens and backends.adds_bos if request.add_bos is None else request.add_bos
        eos = add_special_tokens and backends.adds_eos if request.add_eos is None else request.add_eos
        for wanted, token, name in ((bos, self._bos, "add_bos"), (eos, self._eos, "add_eos")):
            if wanted and token is None:
                raise InvalidConfigError(f"{name}=True: the tokenizer has no such token", path=name, value=True)
        return bool(bos), bool(eos)

    def _ends(self, pair: tuple[Any, Any]) -> tuple[bool, bool]:
        """Whether the text itself begins or ends with the token that would be added."""
        first = pair[0] if isinstance(pair[0], str) else "".join(pair[0][:1])
        last = pair[0] if pair[1] is None else pair[1]
        last = last if isinstance(last, str) else "".join(last[-1:])
        begins = self._bos is not None and first.startswith(self._bos[0])
        return begins, self._eos is not None and last.endswith(self._eos[0])

    def _has_ends(self, pair: tuple[Any, Any]) -> bool:
        return any(self._ends(pair))

    def _process(self, first: Encoding, second: Encoding | None, bos: bool, eos: bool) -> Encoding:
        """Truncate as transformers was asked to, then add the special tokens."""
        if self.truncation is not None:
            room = max(0, self.truncation["max_length"] - bos - eos)
            settings = {name: self.truncation[name] for name in ("strategy", "stride", "direction")}
            truncate_pair(first, second, room, **settings)
        processor = _template(self._bos if bos else None, self._eos if eos else None)
        return processor.process(first, second, True)

    def _encode_segments(self, texts: list[str]) -> list[Encoding]:
        """Encode texts of which only the listed parts are control tokens; everything else is text."""
        assert self._request.segments is not None
        parts = list(zip(texts, self._request.segments, strict=True))
        words = [text[start:end] for text, spans in parts for start, end, is_control in spans if not is_control]
        plain = iter(self._run(self._backends.plain, words, add_special_tokens=False))
        known: dict[str, Encoding] = {}
        encodings = []
        for text, spans in parts:
            pieces = []
            for start, end, is_control in spans:
                word = text[start:end]
                if is_control and word not in known:
                    known[word] = self._backends.control.encode(word, add_special_tokens=False)
                pieces.append(known[word] if is_control else next(plain))
            encodings.append(join_segments(pieces))
        return encodings

    def _shorten(self, encoding: Encoding, pair: tuple[Any, Any]) -> Encoding:
        if pair[1] is not None:
            raise InvalidConfigError(
                "truncation_policy is for single texts; use truncation='longest_first' for pairs",
                path="truncation_policy",
                value=self._request.truncation_policy,
            )
        assert self._max_length is not None and self._request.truncation_policy is not None
        marker = None
        if self._marker and self._request.truncation_policy == "middle":
            marker = self._backends.control.encode(self._marker, add_special_tokens=False)
        return apply_policy(encoding, self._max_length, self._request.truncation_policy, marker)

    def _pad(self, encodings: list[Encoding]) -> None:
        if self.padding is None or not encodings:
            return
        length = self.padding["length"] or max(map(len, encodings))
        if multiple := self.padding["pad_to_multiple_of"]:
            length += -length % multiple
        names = ("direction", "pad_id", "pad_type_id", "pad_token")
        for encoding in encodings:
            encoding.pad(length, **{name: self.padding[name] for name in names})

    def _refuse_control_strings(self, pairs: list[tuple[Any, Any]]) -> None:
        for text in _texts(pairs):
            if isinstance(text, str):
                self._backends.guard.refuse(text, "allow_special=True accepts it, encode_untrusted takes it for text")


def build_backends(backend: Tokenizer, **facts: Any) -> Backends:
    """Make the second backend, and check that it never turns text into a control id.

    Args:
        backend: recognises control strings.
        facts: the remaining fields of :class:`Backends` that the tokenizer knows itself.

    Raises:
        TokenizerError: a control token is also an ordinary piece of the vocabulary.
    """
    plain = copy.deepcopy(backend)
    plain.encode_special_tokens = True
    plain.no_padding()
    plain.no_truncation()
    control = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    for token, index in control.items():
        if index in plain.encode(token, add_special_tokens=False).ids:
            raise TokenizerError(
                f"the control token {token!r} is also an ordinary piece of the vocabulary, so text would turn "
                "into it; choose a string that the pieces cannot spell"
            )
    return Backends(control=backend, plain=plain, guard=ControlGuard(control), **facts)


@lru_cache(maxsize=64)
def _template(bos: Control | None, eos: Control | None) -> processors.TemplateProcessing:
    start = f"{bos[0]} " if bos else ""
    last = f" {eos[0]}" if eos else ""
    return processors.TemplateProcessing(
        single=f"{start}$A{last}",
        pair=f"{start}$A $B:1{last and last + ':1'}",
        special_tokens=[token for token in (bos, eos) if token],
    )


def _as_pair(item: Any, is_pretokenized: bool) -> tuple[Any, Any]:
    inner = (list, tuple) if is_pretokenized else (str,)
    if isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], inner):
        return item[0], item[1]
    return item, None


def _texts(pairs: list[tuple[Any, Any]]) -> list[Any]:
    parts = [part for pair in pairs for part in pair if part is not None]
    return [word for part in parts for word in ([part] if isinstance(part, str) else part or [])]
