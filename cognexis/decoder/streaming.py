"""Structured streaming: one event per new token.

transformers' streamers receive token ids and nothing else. :class:`StepEventStreamer` follows the same protocol
(``put``, ``end``) and turns each token into a :class:`StepEvent` with the loops behind it. An event is handed on when
the next token arrives or the generation ends, because only then is it known whether it was the last. Text is held
back until it is complete UTF-8, so a character never appears in halves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from cognexis.decoder.generation_stats import StopSettings, stop_reason
from cognexis.errors import InvalidConfigError
from cognexis.looping.schedulers.base import reason_name
from cognexis.looping.trace import LoopRecorder

_INCOMPLETE = "\ufffd"  # what decoding gives for the first bytes of a character


@dataclass(frozen=True)
class StepEvent:
    """What one generation step produced.

    Attributes:
        token_id: the new token; None on the event of a failure.
        text_delta: text that became complete with it; empty without a tokenizer.
        loop_count: loops behind the token; 0 on the event of a failure.
        effective_depth: blocks behind the token; 0 on the event of a failure.
        halt_reason: why its loops stopped.
        safety_issue: always None here; serving fills it.
        stop_reason: on the last event, why generation ended, "error" after a failure; None before.
        error: on the event of a failure the ``code`` of the error, "internal" if it is none of ours; None elsewhere.
    """

    token_id: int | None
    text_delta: str
    loop_count: int
    effective_depth: int
    halt_reason: str
    safety_issue: str | None
    stop_reason: str | None
    error: str | None = None


class StepEventStreamer(BaseStreamer):
    """Collects or hands on one event per token of a single sequence.

    Args:
        tokenizer: gives ``text_delta``; None leaves it empty.
        on_event: called with each event; without it, iterate over the streamer (from another thread) or read
            ``events`` afterwards.

    Raises:
        InvalidConfigError: several sequences are generated at once.
    """

    def __init__(self, tokenizer: Any = None, on_event: Callable[[StepEvent], None] | None = None) -> None:
        self.tokenizer = tokenizer
        self.on_event = on_event
        self.events: list[StepEvent] = []
        self._queue: SimpleQueue[StepEvent | None] = SimpleQueue()
        self._recorder: LoopRecorder | None = None
        self._tokens: list[int] = []
        self._emitted = 0

    def watch(self, recorder: LoopRecorder, config: Any, stops: StopSettings) -> None:
        """Connect to a generation about to start; called by ``generate``."""
        self._recorder, self._config, self._stops = recorder, config, stops
        self._prompt_length: int | None = None
        self._tokens, self._emitted, self._text = [], 0, ""

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call) or new tokens of one sequence."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise InvalidConfigError("streamer: events describe one sequence, the batch has more", path="streamer")
        if self._prompt_length is None:
            self._prompt_length = value.shape[-1]
            return
        self._emit_known()  # everything before the new tokens is known not to be the last
        self._tokens += value.flatten().tolist()

    def end(self) -> None:
        """Hand on the last event with the reason why generation stopped."""
        if self._recorder is not None and self._prompt_length is not None and self._tokens:
            length, limit = self._prompt_length + len(self._tokens), self._recorder.max_length
            is_full = limit is not None and length >= limit
            stops = self._stops
            reason = stop_reason(self._tokens, stops, is_full, stops.is_spent(0))
            while self._emitted < len(self._tokens):
                self._emit(reason if self._emitted == len(self._tokens) - 1 else None)
        self._queue.put(None)

    def fail(self, error: Exception) -> None:
        """Hand on what is complete, then the event of the failure; called by ``generate`` before it raises."""
        try:
            if self._recorder is not None:
                self._emit_known()
            self._hand_on(StepEvent(None, "", 0, 0, "error", None, "error", getattr(error, "code", "internal")))
        finally:
            self._queue.put(None)

    def _emit_known(self) -> None:
        """Hand on the events whose loops are recorded; of tokens decoded together the record comes afterwards."""
        assert self._recorder is not None
        while self._emitted < min(len(self._tokens), len(self._recorder.steps)):
            self._emit(None)

    def _emit(self, reason: str | None) -> None:
        assert self._recorder is not None
        loops, codes = int(self._recorder.steps[self._emitted][0]), self._recorder.reasons[self._emitted]
        event = StepEvent(
            token_id=self._tokens[self._emitted],
            text_delta=self._next_text(is_last=reason is not None),
            loop_count=loops,
            effective_depth=self._config.effective_depth(loops),
            halt_reason="max_loops" if codes is None else str(reason_name(int(codes[0]))),
            safety_issue=None,
            stop_reason=reason,
        )
        self._emitted += 1
        self._hand_on(event)

    def _hand_on(self, event: StepEvent) -> None:
        self.events.append(event)
        self._queue.put(event)
        if self.on_event is not None:
            self.on_event(event)

    def _next_text(self, is_last: bool) -> str:
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode(self._tokens[: self._emitted + 1], skip_special_tokens=True)
        if not is_last:
            while text.endswith(_INCOMPLETE):
                text = text[:-1]
        delta = text[len(self._text) :]
        self._text = text if len(text) > len(self._text) else self._text
        return delta

    def __iter__(self) -> Iterator[StepEvent]:
        while (event := self._queue.get()) is not None:
            yield event
