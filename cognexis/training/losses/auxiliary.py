"""Loss terms on a watched run.

    multi-depth  sum_i w_i CE(head(normed(h_i)), targets)                       over the chosen loops i
    value        mean Huber loss of the value head after loops 1 .. L - 1 against measured gains
    continue     mean binary cross-entropy of [gain > threshold], for heads with a continue logit
    consistency  mean ||h_early - h_L||^2 / ||h_L||^2 over real positions, h_L without gradient
    balance      mean over columns of E sum_e p_e^2 - 1, p = softmax of the router's prior over E experts

The gain of loop i is what the loss of a position still falls by after it, measured in the same forward pass. The
value head reads states without gradient, so it does not bend the trunk. Letters: B rows, T tokens, L loops, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.errors import InvalidConfigError
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
from cognexis.training.losses.watched_run import WatchedRun
from cognexis.training.scheduler.losses import consistency_loss, continue_loss, head_values, huber_value_loss
from cognexis.training.scheduler.targets import DepthMeasures, TargetOptions, gain_targets


def listed_depth(drawn: int, depths: Any) -> int:
    """The loops to run where only ``depths`` carry losses: the largest of them up to ``drawn``, else the smallest."""
    return max((depth for depth in depths if depth <= drawn), default=min(depths))


def multi_depth_loss(run: WatchedRun, weights: dict[int, float], cross_entropy: Callable[[Tensor], Tensor]) -> Tensor:
    """The weighted losses of the loops in ``weights`` that the run reached.

    Args:
        weights: loop -> weight of 0 or more.
        cross_entropy: the loss of a normed state ``[B, T, H]``.

    Raises:
        InvalidConfigError: no listed loop was reached, or a weight is negative.
    """
    if min(weights.values(), default=0.0) < 0:
        raise InvalidConfigError(f"multi_depth={weights}: weights must be 0 or more", path="multi_depth")
    reached = {loop: weight for loop, weight in sorted(weights.items()) if loop <= run.num_loops and weight > 0}
    if not reached:
        raise InvalidConfigError(
            f"multi_depth={weights}: none of these depths is reached in {run.num_loops} loops", path="multi_depth"
        )
    return sum((weight * cross_entropy(run.normed(loop)) for loop, weight in reached.items()), run.final.new_zeros(()))


def value_head_losses(
    run: WatchedRun,
    targets: Tensor,
    is_target: Tensor,
    is_real: Tensor,
    *,
    horizon: str = "best",
    gain_threshold: float = 0.0,
    huber_delta: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """The value loss and the continue loss; a head of the other output kind gets 0 for the one it does not serve.

    Args:
        targets: ``[B, T]`` ids, read where ``is_target``.
        is_target: ``[B, T]`` bool, the positions whose gains count.
        is_real: ``[B, T]`` bool, False at padding.
        horizon: "best" or "next", see ``scheduler.targets``.

    Raises:
        InvalidConfigError: the model has no value head.
    """
    head = run.model.model.value_head
    if head is None:
        raise InvalidConfigError("lambda_value: the model has no value head; set config.value_head", path="value_head")
    zero = run.final.new_zeros((), dtype=torch.float32)
    if run.num_loops < 2:  # nothing further to gain, and every parameter still takes part
        return zero + sum(parameter.float().sum() * 0.0 for parameter in head.parameters()), zero
    losses, signals = _measured(run, targets)
    gains = gain_targets("loss_delta", DepthMeasures(losses=losses), TargetOptions(horizon=horizon))
    values = head_values(head, run.states[:-1], is_real, signals[:-1])
    mask = is_target[..., None].expand_as(gains)
    if head.kind == "sequence":
        count = is_target.sum(dim=1, keepdim=True)
        gains = torch.where(mask, gains, 0).sum(dim=1) / count.clamp(min=1)
        mask = (count > 0).expand_as(gains)
    if head.output_kind == "continue_logit":
        return zero, continue_loss(values, gains, gain_threshold, mask)
    return huber_value_loss(values, gains, huber_delta, mask), zero


@torch.no_grad()
def _measured(run: WatchedRun, targets: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Losses ``[B, T, L]`` and the signals after each loop."""
    losses, signals = [], []
    previous_state, previous_log_probs = run.h0, None
    for loop, state in enumerate(run.states, start=1):
        log_probs = log_probabilities(run.model.lm_head(run.normed(loop)))
        losses.append(-log_probs.gather(-1, targets[..., None]).squeeze(-1))
        signals.append(
            {
                "hidden_delta": hidden_delta(state, previous_state),
                "relative_delta": relative_delta(state, previous_state),
                "state_norm": state_norm(state),
                "h0_norm": state_norm(run.h0),
                "confidence": confidence(log_probs),
                "margin": margin(log_probs),
                "entropy": entropy(log_probs),
                "prediction_change": prediction_change(previous_log_probs, log_probs),
            }
        )
        previous_state, previous_log_probs = state, log_probs
    return torch.stack(losses, dim=-1), signals


def early_consistency(run: WatchedRun, early_loop: int, is_real: Tensor) -> Tensor:
    """How far the state after ``early_loop`` lies from the last one; 0 where that is the last."""
    return consistency_loss(run.states[min(early_loop, run.num_loops) - 1], run.states[-1], is_real)


def router_balance(model: nn.Module) -> Tensor:
    """How unevenly the routers of all Cortex columns prefer their experts; 0 when evenly.

    Raises:
        InvalidConfigError: the model has no column with a router.
    """
    from cognexis.cortex_layers.blocks.column import BaseRouter

    terms = []
    for module in model.modules():
        if isinstance(module, BaseRouter):
            shares = torch.softmax(module.global_logits(restrict_topk=False), dim=-1)
            terms.append(shares.numel() * shares.square().sum() - 1.0)
    if not terms:
        raise InvalidConfigError(
            "router_balance_weight: the model has no Cortex column with a router", path="router_balance_weight"
        )
    return torch.stack(terms).mean()
