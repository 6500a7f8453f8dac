"""From records to documents, in a fixed order of stages:

    parse     which kind of record it is, and whether its fields have the right types
    filter    quality filters see the text
    format    messages are rendered by the chat template
    encode    text becomes token ids; a control string in raw text is a fault, or letters, and never a control token
    end       the end-of-document token is put behind
    pack      the tokens join the stream of their shard (``shard_writer.py``, ``packing.py``)

Texts are encoded several at a time, which is what tokenizers do fast.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cognexis.errors import InvalidConfigError, TokenizerError
from cognexis.tokens.guard import check_text
from cognexis.training.data.chat import LEARNED, encode_chat
from cognexis.training.data.corruption import FaultHandler, RecordCounts, RecordFault
from cognexis.training.data.sources import CONTENT_FIELDS, RawRecord

STAGES = ("parse", "filter", "format", "encode", "end", "pack")
_RECORDS_AT_ONCE = 128

Filter = Callable[[str], str | None]
"""Sees a text; gives the reason to leave it out, or None."""


@dataclass(frozen=True)
class Document:
    """A finished document.

    Attributes:
        tokens: ids, the end-of-document token last.
        is_target: 1 where a token is learned; None means everywhere.
        record: what it was made of.
    """

    tokens: list[int]
    is_target: list[int] | None
    record: RawRecord


@dataclass(frozen=True)
class _LeftOut:
    """A filter's reason."""

    reason: str


@dataclass(frozen=True)
class LengthFilter:
    """Leaves out texts that are shorter or longer than so many characters."""

    min_characters: int = 0
    max_characters: int | None = None

    def __call__(self, text: str) -> str | None:
        """``too_short``, ``too_long`` or None."""
        if len(text) < self.min_characters:
            return "too_short"
        return "too_long" if self.max_characters is not None and len(text) > self.max_characters else None


class DocumentPipeline:
    """Makes documents of records.

    Args:
        tokenizer: a ``CognexisTokenizer``.
        filters: quality filters, asked in this order.
        add_bos: begin raw text with ``<s>``, as a prompt begins.
        learned: what is learned of chats, ``assistant`` or ``all``.
        learn_end: learn the ``<|end|>`` of the assistant.
        trace: receives the name of each stage as it is reached; for looking at one record.

    Raises:
        InvalidConfigError: the tokenizer cannot guard control tokens or has no ``<eod>``.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        filters: Sequence[Filter] = (),
        add_bos: bool = True,
        learned: str = "assistant",
        learn_end: bool = True,
        trace: Callable[[str], None] = lambda stage: None,
    ) -> None:
        if not hasattr(tokenizer, "encode_untrusted"):
            raise InvalidConfigError(
                f"tokenizer: must be a CognexisTokenizer, which guards control tokens, got {type(tokenizer).__name__}",
                path="tokenizer",
            )
        if learned not in LEARNED:
            raise InvalidConfigError(f"learned={learned!r}: must be one of {', '.join(LEARNED)}", path="learned")
        self.eod_token_id = require_token(tokenizer, "<eod>")
        self.tokenizer, self.filters, self.trace = tokenizer, tuple(filters), trace
        self.add_bos, self.learned, self.learn_end = add_bos, learned, learn_end

    def documents(
        self, records: Iterable[RawRecord], faults: FaultHandler, on_control: str = "raise"
    ) -> Iterator[tuple[RawRecord, Document | None]]:
        """Each record with its document, in order; None for one that is left out.

        Args:
            records: of a source.
            faults: what happens to those that cannot be used.
            on_control: ``raise`` makes a fault of raw text that holds a control string, ``text`` takes it for letters.

        Raises:
            InvalidConfigError: a fault under the policy ``fail``.
        """
        counts, group = faults.counts, []
        for record in records:
            group.append(record)
            if len(group) == _RECORDS_AT_ONCE:
                yield from self._group(group, faults, counts, on_control)
                group = []
        yield from self._group(group, faults, counts, on_control)

    def _group(
        self, records: list[RawRecord], faults: FaultHandler, counts: RecordCounts, on_control: str
    ) -> Iterator[tuple[RawRecord, Document | None]]:
        """Counts change only as each record is given, so that they are right wherever the caller stops."""
        prepared = [self._prepare(record, on_control) for record in records]
        began = time.perf_counter()
        encoded = iter(self._encode([item for item in prepared if isinstance(item, str)]))
        counts.tokenise_seconds += time.perf_counter() - began
        for record, item in zip(records, prepared, strict=True):
            made: Document | RecordFault | _LeftOut | None
            counts.read += 1
            if isinstance(item, str):
                made = self._ended(next(encoded), None, record)
            elif isinstance(item, dict):
                began = time.perf_counter()
                made = self._encode_record(item, record)
                counts.tokenise_seconds += time.perf_counter() - began
            else:
                made = item
            if isinstance(made, RecordFault):
                faults.handle(record.place, made)
            elif isinstance(made, _LeftOut):
                counts.filtered[made.reason] += 1
            elif made is None:
                counts.empty += 1
            else:
                counts.loaded += 1
            yield record, made if isinstance(made, Document) else None

    def _prepare(self, record: RawRecord, on_control: str) -> "str | dict[str, Any] | RecordFault | _LeftOut | None":
        """A text to encode, another record to encode, or why there is none; None for an empty record."""
        content = record.content
        if isinstance(content, RecordFault):
            return content
        self.trace("parse")
        try:
            kind = _kind(content)
            if not content[kind]:
                return None
            self.trace("filter")
            if reason := self._filtered(_text_of(content, kind)):
                return _LeftOut(reason)
            if kind != "text":
                return content
            self._check_raw_text(content["text"], on_control)
            return content["text"]
        except RecordFault as fault:
            return fault

    def _filtered(self, text: str | None) -> str | None:
        if text is None:
            return None
        return next((reason for check in self.filters if (reason := check(text)) is not None), None)

    def _check_raw_text(self, text: str, on_control: str) -> None:
        try:
            check_text(text)
        except TokenizerError as error:
            raise RecordFault("not_text", str(error)) from None
        if on_control == "raise" and (token := self.tokenizer.backends.guard.find(text)):
            raise RecordFault("control_token", token)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        self.trace("encode")
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        bos = [self.tokenizer.bos_token_id] if self.add_bos and self.tokenizer.bos_token_id is not None else []
        return [bos + ids for ids in encoded]

    def _encode_record(self, content: dict[str, Any], record: RawRecord) -> Document | RecordFault:
        try:
            if "messages" in content:
                self.trace("format")
                self.trace("encode")
                return self._ended(*encode_chat(self.tokenizer, content, self.learned, self.learn_end), record)
            return self._ended(*self._token_ids(content), record)
        except RecordFault as fault:
            return fault

    def _token_ids(self, content: dict[str, Any]) -> tuple[list[int], list[int] | None]:
        ids: list[Any] = content["input_ids"] if "input_ids" in content else content["token_ids"]
        mask, size = content.get("loss_mask"), len(self.tokenizer)
        for index, token in enumerate(ids):
            if type(token) is not int or not 0 <= token < size:
                raise RecordFault("token_id", f"{str(token)[:40]} at {index}; ids lie in 0 to {size - 1}")
        if mask is None:
            return ids, None
        if not isinstance(mask, list) or len(mask) != len(ids) or any(flag not in (0, 1) for flag in mask):
            raise RecordFault("wrong_type", f"loss_mask must be {len(ids)} times 0 or 1")
        if not any(mask[1:]):
            raise RecordFault("no_target", "loss_mask is 0 everywhere")
        return ids, [int(flag) for flag in mask]

    def _ended(self, tokens: list[int], is_target: list[int] | None, record: RawRecord) -> Document:
        self.trace("end")
        if tokens[-1] != self.eod_token_id:
            tokens = [*tokens, self.eod_token_id]
            is_target = None if is_target is None else [*is_target, 0]
        return Document(tokens, is_target, record)


def require_token(tokenizer: Any, token: str) -> int:
    """The id of a control token; InvalidConfigError if the tokenizer has none."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise InvalidConfigError(f"tokenizer: has no {token} token", path="tokenizer")
    return index


def _kind(content: dict[str, Any]) -> str:
    found = [name for name in CONTENT_FIELDS if name in content]
    if len(found) != 1:
        raise RecordFault("missing_field", f"found {', '.join(found) or 'none'}")
    kind = found[0]
    expected = str if kind == "text" else list
    if not isinstance(content[kind], expected):
        raise RecordFault("wrong_type", f"{kind} must be a {expected.__name__}, got {type(content[kind]).__name__}")
    return kind


def _text_of(content: dict[str, Any], kind: str) -> str | None:
    """What quality filters see; None where there is no text to look at."""
    if kind == "text":
        return content["text"]
    if kind != "messages":
        return None
    said = (message.get("content") for message in content["messages"] if isinstance(message, dict))
    return "\n".join(text for text in said if isinstance(text, str)) or None
