"""What the core costs: floating-point operations of its matrix products, and bytes of its cached keys.

For one token in one loop, with P the matrix parameters of the core (injection, gate and blocks), N query heads, D head
width and S keys in sight,

    flops = 2 P + 4 N D S                       per block: a product with the keys and one with the values

A multiplication and an addition count as two operations; norms, activations and rotations are left out. Letters: G
key/value heads.
"""

from typing import Any


def core_flops_per_token(config: Any, num_keys: int) -> int:
    """Matrix FLOPs of one token in one loop with ``num_keys`` keys in sight."""
    spec, width = config.block_spec("core"), config.hidden_size
    heads, kv_heads, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    projections = width * head_dim * (2 * heads + 2 * kv_heads)
    matrices = 3 if spec.ffn_activation in ("swiglu", "geglu") else 2
    block = projections + matrices * width * spec.intermediate_size
    extra = 0
    if config.input_injection == "concat_project":
        extra += 2 * width * width
    elif config.input_injection == "residual" and config.injection_projection == "linear":
        extra += width * width
    if config.recurrent_gating:
        extra += width * width * (1 + (config.input_injection == "gate_condition"))
    attention = 0
    for layer_type in config.stage_layer_types("core"):
        in_sight = num_keys if layer_type == "full_attention" else min(num_keys, config.sliding_window)
        in_sight *= 2 if config.input_injection == "attention_memory" else 1
        attention += 4 * heads * head_dim * in_sight
    return 2 * (block * config.num_recurrent_blocks + extra) + attention


def token_bytes(config: Any, loops: int, itemsize: int) -> int:
    """Bytes of keys and values that one token of ``loops`` loops leaves in an exact cache of mixed depths."""

    def entry(stage: str) -> int:
        spec = config.block_spec(stage)
        return 2 * spec.num_key_value_heads * spec.head_dim * itemsize

    fixed = config.num_prelude_blocks * entry("prelude") + config.num_coda_blocks * entry("coda")
    if config.input_injection == "attention_memory":
        fixed += config.num_recurrent_blocks * entry("core")
    return fixed + config.num_recurrent_blocks * (loops + 1) * entry("core")
