"""The decoder layers of a Hugging Face Llama model as a stack.

Each layer becomes a PassThrough block without residual (the layer has its own). Embedding, final norm and language
model head stay outside: apply the model's own. The stack shares its weights with the model.

transformers is imported when a model is loaded by name, not before.
"""

from typing import Any

import torch
from torch import nn

from cognexis.cortex_layers.config import BlockConfig, CortexStackConfig, HFLlamaLayerConfig, PassThroughBlockConfig


def build_llama_stack_config_from_model(
    model: Any,
    *,
    mem_len: int = 0,
    compile_blocks: bool = False,
    inplace_cache: bool = False,
    detach_memory: bool = True,
) -> CortexStackConfig:
    """A stack of the layers of ``model``, a Llama model with or without its head.

    Args:
        mem_len: how many past tokens every layer keeps; 0: none.
        inplace_cache, detach_memory: see ``HFLlamaLayerCell``.

    Raises:
        NotImplementedError: the model is of another type.
    """
    _check_type(model.config)
    inner = getattr(model, "model", model)
    config = inner.config
    blocks: list[BlockConfig] = [
        PassThroughBlockConfig(
            cell=HFLlamaLayerConfig(
                hidden_size=config.hidden_size,
                mem_len=mem_len,
                inplace_cache=inplace_cache,
                detach_memory=detach_memory,
                hf_layer=layer,
                hf_submodel=inner,
                hf_config=config,
            ),
            residual=False,
        )
        for layer in inner.layers
    ]
    return CortexStackConfig(
        blocks=blocks, d_hidden=config.hidden_size, post_norm=False, compile_blocks=compile_blocks
    )


def build_llama_stack_from_model(model: Any, **options: Any) -> nn.Module:
    """The stack of ``build_llama_stack_config_from_model``, which has the options, in the mode of ``model``."""
    return _build(build_llama_stack_config_from_model(model, **options)).train(model.training)


def build_hf_stack_config(
    model_name: str,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    num_layers: int | None = None,
    mem_len: int = 0,
    compile_blocks: bool = False,
) -> CortexStackConfig:
    """A stack of the layers of a saved model, in eval mode.

    Args:
        model_name: folder, or name on the Hub.
        dtype: wins over ``torch_dtype``, its older name.
        num_layers: how many of the first layers; None: all.
        mem_len: see ``build_llama_stack_config_from_model``.

    Raises:
        NotImplementedError: the model is no Llama model.
        ValueError: ``num_layers`` is not positive or more than there are.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_name, trust_remote_code=trust_remote_code)
    _check_type(config)
    if num_layers is not None and not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers={num_layers}: must be from 1 to {config.num_hidden_layers}")
    wanted = {"dtype": torch_dtype if dtype is None else dtype, "attn_implementation": attn_implementation}
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_name,
        trust_remote_code=trust_remote_code,
        **{key: value for key, value in wanted.items() if value is not None},
    )
    model.eval()
    if device is not None:
        model.to(device)
    if num_layers is not None:
        model.model.layers = model.model.layers[:num_layers]
    return build_llama_stack_config_from_model(model, mem_len=mem_len, compile_blocks=compile_blocks)


def build_hf_stack(model_name: str, **options: Any) -> nn.Module:
    """The stack of ``build_hf_stack_config``, which has the options, in eval mode."""
    return _build(build_hf_stack_config(model_name, **options)).eval()


def _check_type(config: Any) -> None:
    if config.model_type != "llama":
        raise NotImplementedError(f"model_type={config.model_type!r}: only Llama models can become a stack")


def _build(config: CortexStackConfig) -> nn.Module:
    from cognexis.cortex_layers.factory import build_cortex  # here, because it imports this package's stacks

    return build_cortex(config)


__all__ = [
    "build_hf_stack",
    "build_hf_stack_config",
    "build_llama_stack_config_from_model",
    "build_llama_stack_from_model",
]
