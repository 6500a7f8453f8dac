"""Measure a model after every loop in one run.

The prelude and the loops run once; after each loop the coda, the final norm and the head of the language model are
applied to the state, as if the run ended there. Only the current and the previous state and prediction are kept.

    loss_i    = -ln p_i(target)           in nats, p_i the prediction after loop i
    score_i   = 1 where argmax p_i is the target, else 0
    signals   see ``cognexis.looping.signals``; h0_norm is the norm of the prelude's output

Letters: B rows, T tokens, H hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cognexis.decoder.recurrent_core import position_noise
from cognexis.looping.signals import (
    confidence,
    entropy,
    hidden_delta,
    log_probabilities,
    margin,
    prediction_change,
    relative_delta,
    state_norm,
)
from cognexis.training.loop_states import loops_watched
from cognexis.training.scheduler.rows import RowBatch


@dataclass(frozen=True)
class LoopMeasurement:
    """What one loop left.

    Attributes:
        loop: loops executed, from 1.
        state: ``[B, T, H]``.
        loss: ``[B, T]``, 0 where there is no target.
        score: ``[B, T]``, 0.0 or 1.0.
        signals: ``[B, T]`` each, by name.
    """

    loop: int
    state: Tensor
    loss: Tensor
    score: Tensor
    signals: dict[str, Tensor]


@torch.no_grad()
def run_depths(model: Any, batch: RowBatch, num_loops: int, visit: Callable[[LoopMeasurement], None]) -> None:
    """Run ``model`` on ``batch`` with ``num_loops`` loops and call ``visit`` after each loop, in order.

    Args:
        model: a causal language model; it runs in evaluation mode and is left in the mode that it was in.
        batch: on the device of the model.

    Raises:
        InvalidConfigError: ``num_loops`` is more than the configuration allows.
    """
    runner = _DepthRunner(model.config, batch, visit)
    mask = None if bool(batch.is_real.all()) else batch.is_real.long()
    was_training = model.training
    model.eval()
    try:
        with loops_watched(model, runner.measure, runner.begin):
            model.model(
                input_ids=batch.input_ids, attention_mask=mask, num_loops=num_loops, loop_mode="fixed", use_cache=False
            )
    finally:
        model.train(was_training)


class _DepthRunner:
    """What one run remembers from loop to loop."""

    def __init__(self, config: Any, batch: RowBatch, visit: Callable[[LoopMeasurement], None]) -> None:
        self.config = config
        self.visit = visit
        self.has_target = batch.targets >= 0
        self.targets = batch.targets.clamp(min=0)
        self.loop = 0
        self.previous_state: Tensor
        self.previous_log_probs: Tensor | None = None
        self.h0_norm: Tensor

    def begin(self, h0: Tensor, arguments: dict[str, Any]) -> None:
        self.previous_state = h0
        self.h0_norm = state_norm(h0)
        if self.config.recurrent_init == "random":
            noise = position_noise(arguments["position_ids"], h0.shape[-1])
            self.previous_state = noise.to(h0.dtype).expand_as(h0)

    def measure(self, state: Tensor, logits: Callable[[], Tensor]) -> None:
        self.loop += 1
        log_probs = log_probabilities(logits())
        losses = -log_probs.gather(-1, self.targets[..., None]).squeeze(-1)
        signals = {
            "hidden_delta": hidden_delta(state, self.previous_state),
            "relative_delta": relative_delta(state, self.previous_state),
            "state_norm": state_norm(state),
            "h0_norm": self.h0_norm,
            "confidence": confidence(log_probs),
            "margin": margin(log_probs),
            "entropy": entropy(log_probs),
            "prediction_change": prediction_change(self.previous_log_probs, log_probs),
        }
        self.previous_state, self.previous_log_probs = state, log_probs
        self.visit(
            LoopMeasurement(
                loop=self.loop,
                state=state,
                loss=torch.where(self.has_target, losses, 0),
                score=((log_probs.argmax(-1) == self.targets) & self.has_target).float(),
                signals=signals,
            )
        )
