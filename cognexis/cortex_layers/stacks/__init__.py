"""Stacks: blocks in sequence, and what builds them."""

from cognexis.cortex_layers.stacks.auto import build_cortex_auto_config, build_cortex_auto_stack
from cognexis.cortex_layers.stacks.base import CortexStack
from cognexis.cortex_layers.stacks.hf import (
    build_hf_stack,
    build_hf_stack_config,
    build_llama_stack_config_from_model,
    build_llama_stack_from_model,
)

__all__ = [
    "CortexStack",
    "build_cortex_auto_config",
    "build_cortex_auto_stack",
    "build_hf_stack",
    "build_hf_stack_config",
    "build_llama_stack_config_from_model",
    "build_llama_stack_from_model",
]
