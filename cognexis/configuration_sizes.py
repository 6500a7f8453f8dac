"""The named sizes of models: those that were published as a plan, and those that a small machine can train."""

from typing import Any

PUBLISHED_SIZES = {  # name: hidden, heads, prelude, coda, loops, FFN width for the label, FFN width of the slim form
    "cognexis-8b": (4096, 32, 8, 8, 12, 33_792, 11_008),
    "cognexis-64b": (8192, 64, 10, 10, 16, 116_224, 22_016),
    "cognexis-256b": (12_288, 96, 12, 12, 20, 266_496, 33_024),
    "cognexis-1.28t": (16_384, 128, 16, 16, 24, 774_656, 44_032),
}
_SETTLING = {  # measured: additive injection at full strength and a closing norm let the state settle
    "recurrent_gating": False,
    "recurrent_residual_mode": "fixed",
    "recurrent_residual_scale": 1.0,
    "input_injection": "residual",
    "injection_scale": 1.0,
    "injection_projection": "identity",
    "recurrent_norm": "sandwich",
}
TRAINABLE_SIZES: dict[str, dict[str, Any]] = {
    "cognexis-tiny": {
        **_SETTLING,
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 384,
        "max_position_embeddings": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_prelude_blocks": 1,
        "num_coda_blocks": 1,
        "trained_max_loops": 8,
        "default_loops": 4,
    },
    "cognexis-mini": {
        **_SETTLING,
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "max_position_embeddings": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_prelude_blocks": 2,
        "num_coda_blocks": 2,
        "trained_max_loops": 16,
        "default_loops": 8,
    },
}
_TINY = TRAINABLE_SIZES["cognexis-tiny"]
TRAINABLE_SIZES |= {
    "cognexis-cortex-tiny": {
        **_TINY,
        "core_layer_types": ["cortex"],
        "cortex": {"pattern": "AXMS"},
        "recurrent_norm": "closing",
    },
    "cognexis-xlstm-tiny": {
        **_TINY,
        "prelude_layer_types": ["cortex"],
        "core_layer_types": ["cortex"],
        "coda_layer_types": ["cortex"],
        "cortex": {"pattern": "M"},
        "recurrent_norm": "closing",
    },
    "cognexis-axon-tiny": {
        **_TINY,
        "core_layer_types": ["cortex"],
        "cortex": {"pattern": "A"},
        "recurrent_norm": "closing",
    },
}
VARIANTS = (
    *TRAINABLE_SIZES,
    *PUBLISHED_SIZES,
    *(f"{name}-slim" for name in PUBLISHED_SIZES),
)
