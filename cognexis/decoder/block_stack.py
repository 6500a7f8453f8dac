"""A stage of distinct blocks, each run once and in order: the prelude and the coda.

Stochastic depth skips block i of n in training with probability ``p * (i + 1) / n``, so early blocks are skipped
least; in evaluation every block runs. Reference: Huang et al. 2016, "Deep Networks with Stochastic Depth", section 3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cognexis.configuration_rules import has_time_state, mask_kind
from cognexis.decoder.block import CognexisBlock
from cognexis.decoder.state_layer import CognexisStateBlock, ForeignBlock, is_attention


class BlockStack(nn.Module):
    """``num_<stage>_blocks`` distinct blocks with their own key/value slots.

    Args:
        config: the model's configuration.
        stage: "prelude" or "coda".
        first_slot: key/value slot of the first block.
    """

    def __init__(self, config: Any, stage: str, first_slot: int) -> None:
        super().__init__()
        spec = config.block_spec(stage)
        self.layer_types = config.stage_layer_types(stage)

        def block(layer_type: str, slot: int) -> nn.Module:
            if is_attention(layer_type):
                window = config.sliding_window if layer_type == "sliding_attention" else None
                return CognexisBlock(config, spec, [slot], sliding_window=window)
            kind = CognexisStateBlock if has_time_state(layer_type) else ForeignBlock
            return kind(config, layer_type, stage, [slot])

        self.blocks = nn.ModuleList(block(kind, first_slot + i) for i, kind in enumerate(self.layer_types))
        skip = getattr(config, f"{stage}_stochastic_depth")
        self.skip_probabilities = [skip * (index + 1) / len(self.blocks) for index in range(len(self.blocks))]

    def forward(
        self, hidden_states: Tensor, masks: dict[str, Any], resets: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Run every block on ``[B, T, H]``.

        Args:
            masks: attention mask of each layer type.
            resets: bool ``[B, T]``, where states over time begin anew; None means nowhere.
        """
        for block, layer_type, skip in zip(self.blocks, self.layer_types, self.skip_probabilities, strict=True):
            if self.training and drawn_skip(skip):
                continue
            hidden_states = block(hidden_states, **block_inputs(layer_type, masks, resets), **kwargs)
        return hidden_states


def block_inputs(layer_type: str, masks: dict[str, Any], resets: Tensor | None) -> dict[str, Any]:
    """What a block of this type takes besides what all take."""
    return {"resets": resets} if has_time_state(layer_type) else {"attention_mask": masks[mask_kind(layer_type)]}


def drawn_skip(probability: float) -> bool:
    """Draw whether to skip, on the host's generator, so that no device is waited for."""
    return probability > 0.0 and torch.rand(()).item() < probability
