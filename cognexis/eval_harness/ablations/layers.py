"""Transformer blocks that lack a part, as registered layer types, so that a configuration can name them.

    no_attention      y = x + a * post(feed_forward(norm(x)))
    no_feed_forward   y = x + a * post(attention(norm(x)))
    no_norm           x = x + a * attention(x),   y = x + a * feed_forward(x)

``a`` and ``post`` are those of ``cognexis.decoder.block``. Importing this module registers the types; a folder that
such a model is saved to loads where this module has been imported.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.decoder.block import TransformerBlock
from cognexis.decoder.state_layer import register_layer_type

NO_ATTENTION, NO_FEED_FORWARD, NO_NORM = "ablated_no_attention", "ablated_no_feed_forward", "ablated_no_norm"


class _Nothing(nn.Module):
    """A branch that adds nothing."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


def block_without_attention(config: Any, stage: str, slots: Sequence[int]) -> TransformerBlock:
    """A block that is its feed-forward half."""
    return _with(_block(config, stage, slots), *_ATTENTION, attention=_Nothing(), attention_residual_scale=1.0)


def block_without_feed_forward(config: Any, stage: str, slots: Sequence[int]) -> TransformerBlock:
    """A block that is its attention half."""
    block = _block(config, stage, slots)
    return _with(block, *_FEED_FORWARD, feed_forward=_Nothing(), feed_forward_residual_scale=1.0)


def block_without_norm(config: Any, stage: str, slots: Sequence[int]) -> TransformerBlock:
    """A block without its norms."""
    return _with(_block(config, stage, slots), *_ATTENTION, *_FEED_FORWARD)


_ATTENTION = ("attention_norm", "post_attention_norm")
_FEED_FORWARD = ("feed_forward_norm", "post_feed_forward_norm")


def _with(block: TransformerBlock, *norms: str, **parts: Any) -> TransformerBlock:
    """The block without ``norms`` and with other ``parts``."""
    for name, part in {**{norm: nn.Identity() for norm in norms}, **parts}.items():
        if name.endswith("residual_scale"):
            block._parameters.pop(name, None)  # a learned scale of a branch that is gone
        setattr(block, name, part)
    return block


def _block(config: Any, stage: str, slots: Sequence[int]) -> TransformerBlock:
    """The whole block of a stage."""
    core: dict[str, Any] = {
        "sandwich": config.recurrent_norm == "sandwich",
        "residual_mode": config.recurrent_residual_mode,
        "residual_scale": config.residual_scale,
    }
    return TransformerBlock(config, config.block_spec(stage), slots, **(core if stage == "core" else {}))


register_layer_type(NO_ATTENTION, block_without_attention, has_state=False)
register_layer_type(NO_FEED_FORWARD, block_without_feed_forward, has_state=False)
register_layer_type(NO_NORM, block_without_norm, has_state=False)
