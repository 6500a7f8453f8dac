"""Tiny models whose every part matters: no parameter is zero, one or left at a value that hides a mistake."""

from typing import Any

import torch

from cognexis import CognexisConfig, CognexisForCausalLM


def tiny_config(**overrides: Any) -> CognexisConfig:
    """A configuration of width 32 with gate, linear residual injection and sandwich norms, up to 4 loops."""
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "num_prelude_blocks": 2,
        "num_coda_blocks": 1,
        "trained_max_loops": 4,
        "recurrent_gating": True,
        "input_injection": "residual",
        "injection_scale": 0.5,
        "recurrent_norm": "sandwich",
    }
    return CognexisConfig(**settings | overrides)


def tiny_model(config: CognexisConfig | None = None, seed: int = 0, cls: Any = CognexisForCausalLM) -> Any:
    """A model of class ``cls`` in eval mode whose parameters, norm weights and biases included, are random.

    Matrices have a standard deviation that keeps activations near unit scale; vectors that start at one are drawn
    around one, those that start at zero around zero. The caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(tiny_config() if config is None else config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
                elif name.endswith("weight"):
                    parameter.copy_(1.0 + 0.2 * noise)
                else:  # biases and learned residual scales move away from where they start
                    parameter.add_(0.3 * noise)
    return model.eval()
