"""Column: blocks side by side ("experts"), mixed by a router.

    u       = boundary_norm(x)
    y_i     = expert_i(u),  delta_i = y_i - u
    delta~  = e_mixer(delta)                                attention over the experts
    m       = sum_i a_i delta~_i + (u - x)                  a: router and refinement
    out     = x + alpha_main * m + alpha_col * head(m)

alpha_main starts at ``alpha_init`` and the last layer of the head at zero: the column starts near the identity, and
everything in it gets a gradient. With one expert the column is that expert on x itself; it has no other parameters.

Top-k: exactly k experts have a weight. With ``restrict_to_topk`` they are the k of the prior, otherwise the k of prior
and refinement, per token. All experts run and all their states advance, whichever have a weight, so a state never
depends on the route. An inactive expert gets no gradient and is not seen by the mixer.

The state is ``{"expert_<class of the block>_<i>": state of expert i}``. Letters: B batch, T time, D width, E experts.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.blocks.base import BaseBlock, child_state, parent_state
from cognexis.cortex_layers.blocks.column.mixer import ExpertMixer
from cognexis.cortex_layers.blocks.column.routers import (
    GlobalContextRouter,
    TokenRefiner,
    active_experts,
    gate_weights,
)
from cognexis.cortex_layers.blocks.compiled import BlockCaller
from cognexis.cortex_layers.blocks.registry import build_block_at_width, register_block
from cognexis.cortex_layers.cells.base import MemoryCell
from cognexis.cortex_layers.config import ColumnBlockConfig
from cognexis.cortex_layers.state import check_input, fresh_state, normalise_resets
from cognexis.cortex_layers.types import MaybeState, ResetMask


@register_block(ColumnBlockConfig)
class ColumnBlock(BaseBlock):
    """Experts at width D behind one router.

    Args:
        cell: must be None; each expert has its own.
    """

    def __init__(self, config: ColumnBlockConfig, d_hidden: int, cell: MemoryCell | None = None) -> None:
        super().__init__(d_hidden)
        if cell is not None:
            raise ValueError("ColumnBlock: takes no cell; each expert has its own")
        self.experts: Any = nn.ModuleList(build_block_at_width(expert, d_hidden) for expert in config.experts)
        self.expert_keys = [f"expert_{type(expert).__name__}_{i}" for i, expert in enumerate(self.experts)]
        self.caller = BlockCaller()
        num_experts, router = len(self.experts), config.router
        if num_experts == 1:
            self.router = self.refiner = self.e_mixer = self.head = self.boundary_norm = None
            self.alpha_main = self.alpha_col = None
            return
        self.top_k = None if router.top_k is None or router.top_k >= num_experts else router.top_k
        self.restrict_to_topk = router.restrict_to_topk
        self.whisper_lambda = router.whisper_lambda
        self.router = GlobalContextRouter(d_hidden, num_experts, router)
        self.refiner = TokenRefiner(d_hidden, num_experts, router) if router.whisper_lambda > 0 else None
        self.e_mixer = ExpertMixer(d_hidden, num_experts, router.d_key or d_hidden)
        self.head = nn.Sequential(nn.Linear(d_hidden, 2 * d_hidden), nn.GELU(), nn.Linear(2 * d_hidden, d_hidden))
        for parameter in self.head[2].parameters():
            nn.init.zeros_(parameter)
        self.boundary_norm = nn.RMSNorm(d_hidden)
        self.alpha_main = nn.Parameter(torch.tensor(float(config.alpha_init)))
        self.alpha_col = nn.Parameter(torch.tensor(1.0))

    @property
    def cell(self) -> MemoryCell | None:  # type: ignore[override]
        """None; each expert has its own."""
        return None

    def forward(self, x: Tensor, state: MaybeState, *, resets: ResetMask | None = None) -> tuple[Tensor, MaybeState]:
        is_step = check_input(x, self.d_hidden, "ColumnBlock")
        resets = normalise_resets(resets, x, "ColumnBlock")
        if self.boundary_norm is None:
            outputs, next_state = self._run_experts(x, state, resets)
            return outputs[0], next_state
        u = self.boundary_norm(x)
        outputs, next_state = self._run_experts(u, state, resets)
        deltas = torch.stack(outputs, dim=-2) - u.unsqueeze(-2)  # [B, T, E, D]; a step has no T
        if is_step:
            return self._mix(x.unsqueeze(1), u.unsqueeze(1), deltas.unsqueeze(1)).squeeze(1), next_state
        return self._mix(x, u, deltas), next_state

    def _run_experts(self, x: Tensor, state: MaybeState, resets: Tensor | None) -> tuple[list[Tensor], TensorDict]:
        outputs: list[Tensor] = []
        states: dict[str, MaybeState] = {}
        for key, expert in zip(self.expert_keys, self.experts, strict=True):
            y, states[key] = self.caller(expert, x, child_state(state, key), resets)
            outputs.append(y)
        return outputs, parent_state(states, x.shape[0])

    def _mix(self, x: Tensor, u: Tensor, deltas: Tensor) -> Tensor:
        assert self.e_mixer is not None and self.head is not None
        assert self.alpha_main is not None and self.alpha_col is not None
        weights, active = self.route(u)
        if active is not None:  # also where an inactive expert is not finite
            deltas = torch.where(active.unsqueeze(-1), deltas, torch.zeros((), dtype=deltas.dtype, device=x.device))
        mixed = self.e_mixer(u, deltas, active)
        m = torch.einsum("...e,...ed->...d", weights.to(mixed.dtype).expand(mixed.shape[:-1]), mixed) + (u - x)
        return x + self.alpha_main.to(x.dtype) * m + self.alpha_col.to(x.dtype) * self.head(m)

    def route(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights and activity of the experts for tokens u ``[B, T, D]``.

        Returns:
            The weights ``[B, T, E]`` (``[E]`` without refinement), and bool of the same shape or ``[E]``: who takes
            part; None if all do.
        """
        assert self.router is not None
        prior = self.router.global_logits(restrict_topk=False)  # [E]
        scores = prior if self.refiner is None else prior + self.whisper_lambda * self.refiner(u)
        if self.top_k is None:
            return gate_weights(scores), None
        active = active_experts(prior if self.restrict_to_topk else scores, self.top_k)
        return gate_weights(scores, active, self.top_k), active

    def init_state(
        self, batch: int, *, device: torch.device | str, dtype: torch.dtype, traces: bool = True
    ) -> TensorDict:
        pairs = zip(self.expert_keys, self.experts, strict=True)
        return parent_state(
            {key: fresh_state(expert, batch, device=device, dtype=dtype, traces=traces) for key, expert in pairs},
            batch,
        )

    def reset_state(self, state: MaybeState, mask: Tensor) -> MaybeState:
        if state is None:
            return None
        pairs = zip(self.expert_keys, self.experts, strict=True)
        return parent_state(
            {key: expert.reset_state(child_state(state, key), mask) for key, expert in pairs}, state.batch_size[0]
        )
