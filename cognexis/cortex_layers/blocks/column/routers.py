"""How a column weighs its experts: a prior for the whole run, and a refinement per token.

    prior       z_i = (w_k key_i) . (w_q context) * scale / temperature          [E]
    refinement  p_i = (w_t u) . key_local_i / (sqrt(d_local) * local_temperature)    [B, T, E]
                centred over the experts, and added to z with weight whisper_lambda

scale is 1/sqrt(d_key), or 1/d_key with ``use_sqrt_scale=False``. w_q starts at zero and w_k does not, so the prior
starts uniform and has a gradient; context and keys start at the order of one, which keeps it from vanishing.
``active_experts`` says which experts take part, ``gate_weights`` turns scores into weights; these are differentiable
in the scores of the active experts.

With one active expert its weight is 1 whatever the scores are; the gradient is then that of its probability among all
experts (straight-through). Letters: B batch, T time, D width, E experts.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from cognexis.cortex_layers.config import RouterConfig
from cognexis.cortex_layers.state import accumulator_dtype


def active_experts(scores: Tensor, top_k: int) -> Tensor:
    """Bool ``[..., E]``: exactly ``top_k`` of the highest scores; among equals those of the lowest index."""
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :top_k], True)


def gate_weights(scores: Tensor, active: Tensor | None = None, top_k: int | None = None) -> Tensor:
    """Weights ``[..., E]`` from scores ``[..., E]``: a softmax over the active experts, exactly 0 for all others.

    Args:
        active: bool, broadcastable to ``scores``; None means all.
        top_k: how many are active.
    """
    share = scores.softmax(dim=-1)
    if active is None:
        return share
    if top_k == 1:
        return torch.where(active, 1 + (share - share.detach()), 0.0)
    return scores.masked_fill(~active, -math.inf).softmax(dim=-1)


class BaseRouter(nn.Module, ABC):
    """Weights of the experts, alike for every token."""

    @abstractmethod
    def forward(self, expert_outputs: Tensor | None = None) -> Tensor:
        """The gate ``[E]``, which sums to 1."""

    @abstractmethod
    def global_logits(self, restrict_topk: bool = True) -> Tensor:
        """Scores ``[E]``; with ``restrict_topk`` those outside the best k are -inf."""


class GlobalContextRouter(BaseRouter):
    """A learned context asks the keys of the experts.

    Args:
        d_hidden: width D of the column.
        num_experts: E.
    """

    def __init__(self, d_hidden: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        d_key = config.d_key or d_hidden
        self.top_k = None if config.top_k is None or config.top_k >= num_experts else config.top_k
        self.scale = (1 / math.sqrt(d_key) if config.use_sqrt_scale else 1 / d_key) / config.temperature
        self.context = nn.Parameter(torch.empty(d_hidden).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(num_experts, d_key).uniform_(-1, 1))
        self.w_q = nn.Linear(d_hidden, d_key, bias=False)
        self.w_k = nn.Linear(d_key, d_key, bias=False)
        scale_k = 1 / math.sqrt(d_key) if config.init_scale_wk is None else config.init_scale_wk
        nn.init.uniform_(self.w_q.weight, -config.init_scale_wq, config.init_scale_wq)
        nn.init.uniform_(self.w_k.weight, -scale_k, scale_k)

    def global_logits(self, restrict_topk: bool = True) -> Tensor:
        logits = (self.w_k(self.keys) @ self.w_q(self.context)) * self.scale
        logits = logits.to(accumulator_dtype(logits.dtype))
        if restrict_topk and self.top_k is not None:
            logits = logits.masked_fill(~active_experts(logits, self.top_k), -math.inf)
        return logits

    def forward(self, expert_outputs: Tensor | None = None) -> Tensor:
        scores = self.global_logits(restrict_topk=False)
        if self.top_k is None:
            return gate_weights(scores)
        return gate_weights(scores, active_experts(scores, self.top_k), self.top_k)


class TokenRefiner(nn.Module):
    """Scores of the experts per token.

    Args:
        d_hidden: width D of the column.
        num_experts: E.
    """

    def __init__(self, d_hidden: int, num_experts: int, config: RouterConfig) -> None:
        super().__init__()
        d_local = config.d_key_local or config.d_key or d_hidden
        self.scale = 1 / (math.sqrt(d_local) * config.local_temperature)
        self.center = config.center_refine
        self.w_t = nn.Linear(d_hidden, d_local, bias=False)
        self.keys = nn.Parameter(torch.empty(num_experts, d_local).uniform_(-1e-3, 1e-3))
        nn.init.uniform_(self.w_t.weight, -1e-3, 1e-3)

    def forward(self, u: Tensor) -> Tensor:
        """Scores ``[B, T, E]`` from tokens ``[B, T, D]``, in at least float32."""
        scores = (self.w_t(u) @ self.keys.transpose(0, 1)) * self.scale
        scores = scores.to(accumulator_dtype(scores.dtype))
        return scores - scores.mean(dim=-1, keepdim=True) if self.center else scores
