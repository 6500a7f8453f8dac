"""A generation that fails: its streamer ends with one event that names the error, and the error is a clear one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from cognexis import CognexisCache, StepEvent, StepEventStreamer
from cognexis.errors import (
    BackendError,
    BudgetExceededError,
    CacheError,
    InvalidConfigError,
    InvalidTokenIdError,
    NonFiniteError,
)
from cognexis.looping.schedulers.rule_based import RuleBasedScheduler
from tests.batteries.invariance import token_ids
from tests.batteries.tiny import tiny_config, tiny_model

LAST = {"token_id": None, "text_delta": "", "loop_count": 0, "effective_depth": 0, "halt_reason": "error"}


class Failing(RuleBasedScheduler):
    """Fails in one of its methods; in ``observe`` in the pass number ``at``."""

    def __init__(self, method: str, at: int = 1) -> None:
        super().__init__()
        self.method, self.at, self.passes = method, at, 0

    def begin_request(self, context: Any) -> None:
        super().begin_request(context)
        if self.method == "begin_request":
            raise KeyError("lost")

    def observe(self, observation: Any) -> Any:
        self.passes += observation.loops == 1
        if self.method == "observe" and self.passes == self.at and observation.loops == 2:
            raise ZeroDivisionError("no gain")
        return super().observe(observation)

    def finish(self) -> dict[str, Any]:
        if self.method == "finish":
            raise AssertionError("not yet")
        return super().finish()


class Spoiling(LogitsProcessor):
    """Spoils the logits of the second token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.fill_(torch.nan) if input_ids.shape[1] > 4 else scores


class Plain(BaseStreamer):
    ended = 0

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(tiny_config(max_loops=4, trained_max_loops=4, max_position_embeddings=16))


def run(model: Any, streamer: Any, ids: Tensor | None = None, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    return model.generate(token_ids(model, 1, 4) if ids is None else ids, streamer=streamer, **settings | kwargs)


def adaptive(method: str, at: int = 1) -> dict[str, Any]:
    return {"loop_mode": "adaptive_token", "scheduler": Failing(method, at), "min_loops": 3, "return_loop_stats": True}


def released(model: Any) -> CognexisCache:
    cache = CognexisCache(model.config)
    cache.release()
    return cache


FAULTS: dict[str, tuple[Any, type[Exception], str, int]] = {  # request, error, its code, tokens before it
    "scheduler": (lambda model: adaptive("observe", at=3), BackendError, "backend", 2),
    "scheduler at once": (lambda model: adaptive("begin_request"), BackendError, "backend", 0),
    "overlong prompt": (lambda model: {"ids": token_ids(model, 1, 16)}, InvalidConfigError, "invalid_config", 0),
    "bad ids": (lambda model: {"ids": torch.tensor([[10**6]])}, InvalidTokenIdError, "invalid_token_id", 0),
    "cache": (lambda model: {"past_key_values": released(model)}, CacheError, "cache", 0),
    "logits": (lambda model: {"logits_processor": [Spoiling()]}, NonFiniteError, "non_finite", 1),
    "budget": (lambda model: {"max_recurrent_flops": 1}, BudgetExceededError, "budget_exceeded", 0),
    "typing mistake": (lambda model: {"loop_modes": "fixed"}, InvalidConfigError, "invalid_config", 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_is_the_last_event(model: Any, name: str) -> None:
    request, error, code, tokens = FAULTS[name]
    streamer, plain = StepEventStreamer(), Plain()
    with pytest.raises(error):
        run(model, streamer, **request(model))
    events = list(streamer)  # ends
    assert events == streamer.events
    assert events[-1] == StepEvent(**LAST, safety_issue=None, stop_reason="error", error=code)
    assert [event.stop_reason for event in events[:-1]] == [None] * tokens
    assert all(event.token_id is not None and event.error is None for event in events[:-1])
    with pytest.raises(error):
        run(model, plain, **request(model))
    assert plain.ended == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("begin_request", r"scheduler='rule_based': begin_request\(\) failed with KeyError: 'lost'"),
        ("observe", r"scheduler='rule_based': observe\(\) failed after loop 2 with ZeroDivisionError: no gain"),
        ("finish", r"scheduler='rule_based': finish\(\) failed with AssertionError: not yet"),
    ],
)
def test_error_of_a_scheduler_names_it_and_keeps_the_cause(model: Any, method: str, message: str) -> None:
    with pytest.raises(BackendError, match=message) as caught:
        run(model, None, **adaptive(method))
    assert isinstance(caught.value.__cause__, (KeyError, ZeroDivisionError, AssertionError))
    assert run(model, None, **adaptive("none")).sequences.shape == (1, 7), "the model is as it was"


def test_fault_of_a_callback_reaches_the_caller_and_readers_do_not_wait(model: Any) -> None:
    def fail(event: StepEvent) -> None:
        raise RuntimeError("full")

    streamer = StepEventStreamer(on_event=fail)
    with pytest.raises(RuntimeError, match="full"):
        run(model, streamer)
    assert [event.error for event in streamer] == [None, "internal"]
