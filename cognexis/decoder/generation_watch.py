"""Guards inside transformers' decoding loops: usable logits, and rows that end for lack of budget."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from cognexis.errors import NonFiniteError, ShapeMismatchError
from cognexis.looping.options import LoopOptions
from cognexis.looping.session import LoopSession


class FiniteLogits(LogitsProcessor):
    """Stops a generation whose logits are unusable, instead of emitting token 0.

    It stands before and after the caller's processors. In host memory a fault is raised at once; elsewhere a flag is
    kept on the device and read at the end, so that no token waits for it.
    """

    def __init__(self, before: "FiniteLogits | None" = None) -> None:
        self.before = before
        self.shape: tuple[int, ...] = ()
        self.is_finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.shape = tuple(scores.shape)
        if self.before is not None and self.shape != self.before.shape:
            raise ShapeMismatchError(
                f"logits_processor: scores must keep the shape {self.before.shape}, got {self.shape}",
                expected=self.before.shape,
                actual=self.shape,
            )
        is_broken = torch.isnan(scores).any() | torch.isposinf(scores).any()
        hides_all = torch.isneginf(scores).all(dim=-1).any()
        is_finite = ~(is_broken | hides_all)
        self.is_finite = is_finite if self.is_finite is None else self.is_finite & is_finite
        if scores.device.type == "cpu":
            self.require()
        return scores

    def require(self) -> None:
        """Raise if any step so far had unusable logits.

        Raises:
            NonFiniteError: NaN, infinity, or a row in which every token is ruled out.
        """
        if self.is_finite is not None and not bool(self.is_finite):
            raise NonFiniteError(
                "logits: NaN, infinity or no possible token while generating; the weights, the loop count or a logits "
                "processor is at fault"
            )


class _Remembered(StoppingCriteria):
    """A criterion with its last answer, for those that must be asked once per token: callers count in theirs."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion
        self.answer: Any = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.answer = self.criterion(input_ids, scores, **kwargs)
        return self.answer


class RequestWatch(StoppingCriteria):
    """Tells the session which rows have ended, and ends rows whose next token does not fit the budget.

    Attributes:
        others: the criteria that end rows; set when generation starts.
        is_beam: rows are beams, of which none ends before all do.
    """

    def __init__(self, session: LoopSession, options: LoopOptions, config: Any) -> None:
        self.session, self.options, self.config = session, options, config
        self.others: list[Any] = []
        self.is_beam = False

    def watch(self, criteria: list[Any], generation_config: Any) -> None:
        """Come last among ``criteria``, and remember what the others answer."""
        own = (EosTokenCriteria, MaxLengthCriteria)
        self.others = [x if isinstance(x, own) else _Remembered(x) for x in criteria if x is not self]
        criteria[:] = [*self.others, self]
        if generation_config._pad_token_tensor is not None:
            self.eos_token_id = None  # transformers pads ended rows only where some criterion has this attribute
        beams = generation_config.num_beams or 1
        self.is_beam = beams > 1
        if self.is_beam:
            self.session.share_among_beams(beams, generation_config.num_return_sequences or 1)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for criterion in () if self.is_beam else self.others:
            is_known = isinstance(criterion, _Remembered)
            answer = criterion.answer if is_known else criterion(input_ids, scores, **kwargs)
            done = done | torch.as_tensor(answer, device=done.device)
        session = self.session
        if not self.is_beam:
            done = done if session.finished is None else done | session.finished.to(done.device)
        if (is_spent := session.is_spent(self.config, self.options.min_loops, input_ids.shape[1])) is not None:
            is_spent = is_spent.any()[None] if self.is_beam else is_spent
            is_spent = is_spent.to(done.device)
            session.note_spent(is_spent if self.is_beam else is_spent & ~done)
            done = done | is_spent
        if not self.is_beam:
            session.finished = done
        return done
