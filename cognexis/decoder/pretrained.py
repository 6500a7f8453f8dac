"""What all Cognexis models share: capabilities, initialisation, checkpointing by loops, the form as a stack.

transformers asks a model class for the first three; see ``PreTrainedModel``.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils.output_capturing import OutputRecorder

from cognexis.checkpoints.model_files import CheckpointFiles
from cognexis.configuration_cognexis import CognexisConfig
from cognexis.configuration_rules import STAGES, has_time_state
from cognexis.decoder.attention import AttentionSite
from cognexis.decoder.block import CognexisBlock, TransformerBlock
from cognexis.decoder.recurrent_core import LoopState, RecurrentCore
from cognexis.decoder.state_layer import CognexisStateBlock, ForeignBlock, StateLayer
from cognexis.errors import InvalidConfigError


class EmbeddingOutput(nn.Dropout):
    """Dropout on the embeddings; its output is the first of the recorded hidden states."""


class CognexisPreTrainedModel(CheckpointFiles, PreTrainedModel):  # type: ignore[misc]
    """What all Cognexis models share: capabilities, initialisation and activation checkpointing by loops."""

    config: CognexisConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CognexisBlock", "CognexisStateBlock", "RecurrentCore"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(EmbeddingOutput, capture_initial_hidden_state=False),
            OutputRecorder(CognexisBlock, capture_initial_hidden_state=False),
            OutputRecorder(CognexisStateBlock, capture_initial_hidden_state=False),
            OutputRecorder(ForeignBlock, capture_initial_hidden_state=False),
            OutputRecorder(LoopState, capture_initial_hidden_state=False),
        ],
        "attentions": OutputRecorder(AttentionSite, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if (own := getattr(module, "own_start", None)) is not None:
            start, prefix = own
            start.draw(module, prefix)
            return
        super()._init_weights(module)
        if isinstance(module, TransformerBlock | StateLayer):
            for learned in module.parameters(recurse=False):
                init.constant_(learned, module.residual_scale_init)
        elif isinstance(module, nn.Linear):
            # A module without parameters of its own is never handed to this method, so its layers carry their start.
            if (bias := getattr(module, "initial_bias", None)) is not None:
                init.constant_(module.bias, bias)
            if (scale := getattr(module, "initial_identity_scale", None)) is not None:
                eye = torch.eye(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
                init.copy_(module.weight, torch.cat((eye, scale * eye), dim=1))

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """As in transformers; among the checkpointing options, ``every_k_loops`` makes k loops one segment.

        Raises:
            InvalidConfigError: ``every_k_loops`` is not a positive integer.
        """
        options = {"use_reentrant": False, **getattr(gradient_checkpointing_func, "keywords", {})}
        every = options.pop("every_k_loops", 1)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise InvalidConfigError(
                f"every_k_loops={every!r}: must be an integer of at least 1", path="every_k_loops"
            )
        function = partial(getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func), **options)
        if every_n_layers == 1:  # older transformers do not know the argument
            super()._set_gradient_checkpointing(enable, function)
        else:
            super()._set_gradient_checkpointing(enable, function, every_n_layers)
        for module in self.modules():
            if isinstance(module, RecurrentCore):
                module.checkpoint_every_loops = every

    def as_cortex_stack(self, num_loops: int | None = None) -> Any:
        """The layers as a ``CortexStack`` that shares these weights: vectors in, vectors out, state in a TensorDict.

        Args:
            num_loops: loops of every call; ``config.default_loops`` when None.

        Returns:
            A stack of width ``hidden_size``; ``y, state = stack(x, state, resets=mask)``.

        Raises:
            InvalidConfigError: a layer has no state over time, or the core starts from noise by position.
        """
        kinds = {kind for stage in STAGES for kind in self.config.stage_layer_types(stage)}
        if others := sorted(kind for kind in kinds if not has_time_state(kind)):
            raise InvalidConfigError(
                f"as_cortex_stack: layers of type {', '.join(others)} have no state of fixed size; all layers must be "
                "Cortex layers",
                path="core_layer_types",
            )
        if self.config.recurrent_init != "h0":
            raise InvalidConfigError(
                "as_cortex_stack: recurrent_init='random' needs positions, which a stream of vectors does not have",
                path="recurrent_init",
                value=self.config.recurrent_init,
            )
        from cognexis.cortex_layers.stacks.language_model import LanguageModelStack

        body: Any = self.base_model
        return LanguageModelStack(body, body.loop_options({"num_loops": num_loops}).num_loops)
