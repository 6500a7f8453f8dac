"""The layers of a looped language model as a stack: vectors in, vectors out, memory in a TensorDict.

    h_0 = prelude(x),   h_i = core(h_{i-1}, h_0) for i = 1..L,   y = norm(coda(h_L))

Every layer has a state over time, and in the core every loop has its own, so the state is ``{"slot_<s>": state}`` with
one slot per layer of prelude and coda and one per core layer and loop. The weights are those of the model. Letters: B
batch, T time, D width, L loops.
"""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from cognexis.cortex_layers.blocks.base import child_state, parent_state
from cognexis.cortex_layers.stacks.base import CortexStack
from cognexis.cortex_layers.state import check_input, fresh_state, normalise_resets
from cognexis.cortex_layers.types import MaybeState, ResetMask


class _SlotStates:
    """Stands where a cache would: takes each slot's state from one TensorDict and puts the next into another."""

    def __init__(self, state: TensorDict) -> None:
        self.before = state
        self.after: dict[str, MaybeState] = {str(key): state[key] for key in state.keys()}  # noqa: SIM118 (no mapping)

    def advance(self, stack: Any, x: Tensor, layer_idx: int, resets: Tensor | None = None) -> Tensor:
        """Let a layer read ``[B, T, D]`` behind what its slot remembers."""
        key = _key(layer_idx)
        y, self.after[key] = stack(x, self.before[key], resets=resets)
        return y


class LanguageModelStack(CortexStack):
    """Prelude, looped core, coda and final norm of a model without attention.

    Args:
        body: the model's body.
        num_loops: loops of every call, at least 1.
    """

    def __init__(self, body: Any, num_loops: int) -> None:
        nn.Module.__init__(self)
        self.config = None  # type: ignore[assignment]
        self.d_hidden = body.config.hidden_size
        self.num_loops = num_loops
        body.recurrent.add_sites(num_loops)
        self.prelude, self.recurrent = body.prelude, body.recurrent
        self.coda, self.norm = body.coda, body.final_norm

    def _layers(self) -> dict[str, Any]:
        """The stack of every slot, in the order of the computation."""
        core = [(block, block.slots[loop]) for loop in range(self.num_loops) for block in self.recurrent.blocks]
        ends = [[(block, block.slots[0]) for block in stage.blocks] for stage in (self.prelude, self.coda)]
        return {_key(slot): block.stack for block, slot in [*ends[0], *core, *ends[1]]}

    def forward(
        self, x: Tensor, state: MaybeState = None, *, resets: ResetMask | None = None
    ) -> tuple[Tensor, TensorDict]:
        """Consume ``[B, D]`` or ``[B, T, D]``; return output of the same form and the new state.

        Raises:
            ValueError: a shape does not fit, or activations are to be recomputed, which would lose the states.
        """
        is_step = check_input(x, self.d_hidden, "LanguageModelStack")
        mask = normalise_resets(resets, x, "LanguageModelStack")
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError("LanguageModelStack: switch gradient checkpointing off; it would lose the states")
        if is_step:
            x, mask = x.unsqueeze(1), None if mask is None else mask.unsqueeze(1)
        if state is None:
            state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if state.batch_size[:1] != x.shape[:1]:
            raise ValueError(
                f"LanguageModelStack: state of batch size {list(state.batch_size)}, expected [{x.shape[0]}] as in the "
                "input"
            )
        slots = _SlotStates(state)
        around: dict[str, Any] = {"masks": {}, "resets": mask, "past_key_values": slots}
        h0 = self.prelude(x, **around)
        core = self.recurrent(h0, self.num_loops, position_embeddings=None, position_ids=None, **around)
        y = self.norm(self.coda(core.hidden_states, **around))
        return y[:, 0] if is_step else y, parent_state(slots.after, x.shape[0])

    def init_state(
        self,
        batch: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        traces: bool = True,
    ) -> TensorDict:
        """A fresh state for ``batch`` rows, complete from the start."""
        return parent_state(
            {
                key: fresh_state(stack, batch, device=device, dtype=dtype, traces=traces)
                for key, stack in self._layers().items()
            },
            batch,
        )

    def reset_state(self, state: MaybeState, mask: Tensor) -> MaybeState:
        """A state whose rows of ``mask`` ``[B]`` are fresh; the argument stays as it is."""
        if state is None:
            return None
        parts = {key: stack.reset_state(child_state(state, key), mask) for key, stack in self._layers().items()}
        return parent_state(parts, state.batch_size[0])


def _key(slot: int) -> str:
    return f"slot_{slot}"
