"""What the core costs: floating-point operations of its matrix products, and bytes of its cached keys.

For one token in one loop, with P the matrix parameters of the core (injection, gate and blocks), N query heads, D head
width and S keys in sight,

    flops = 2 P + 4 N D S                       per block: a product with the keys and one with the values

A multiplication and an addition count as two operations; norms, activations and rotations are left out. The loop
embedding of the gate is projected once per loop and counts for each token, so that no budget is passed. A Cortex layer
counts with its matrices and has a state of fixed size instead of keys; what registered layers cost is not known here
and counts as nothing. Letters: G key/value heads.
"""

from typing import Any

from cognexis.configuration_rules import has_time_state


def core_flops_per_token(config: Any, num_keys: int) -> int:
    """Matrix FLOPs of one token in one loop with ``num_keys`` keys in sight."""
    spec, width = config.block_spec("core"), config.hidden_size
    heads, kv_heads, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    projections = width * head_dim * (2 * heads + 2 * kv_heads)
    matrices = 3 if spec.ffn_activation in ("swiglu", "geglu") else 2
    block = projections + matrices * width * spec.intermediate_size
    extra, attention = 0, 0
    if config.input_injection == "concat_project":
        extra += 2 * width * width
    elif config.input_injection == "residual" and config.injection_projection == "linear":
        extra += width * width
    if config.recurrent_gating:
        matrices_of_gate = 1 + (config.input_injection == "gate_condition") + config.gate_loop_embedding
        extra += width * width * matrices_of_gate
    for layer_type in config.stage_layer_types("core"):
        if layer_type not in ("full_attention", "sliding_attention"):
            extra += _cortex_cost(config, "core", layer_type)[0]
            continue
        extra += block
        in_sight = num_keys if layer_type == "full_attention" else min(num_keys, config.sliding_window)
        in_sight *= 2 if config.input_injection == "attention_memory" else 1
        attention += 4 * heads * head_dim * in_sight
    return 2 * extra + attention


def token_bytes(config: Any, loops: int, itemsize: int) -> int:
    """Bytes that a token of ``loops`` loops leaves in an exact cache of mixed depths: keys, values, frozen states."""

    def entries(stage: str) -> int:
        spec = config.block_spec(stage)
        blocks = sum(not has_time_state(kind) for kind in config.stage_layer_types(stage))
        return 2 * blocks * spec.num_key_value_heads * spec.head_dim * itemsize

    fixed = entries("prelude") + entries("coda")
    fixed += entries("core") * (config.input_injection == "attention_memory")
    frozen = sum(map(has_time_state, config.stage_layer_types("core"))) * config.hidden_size * itemsize
    return fixed + (loops + 1) * entries("core") + frozen


def loop_state_bytes(config: Any, itemsize: int) -> int:
    """Bytes of the states over time that one loop of the core keeps for one row."""
    return itemsize * sum(_cortex_cost(config, "core", kind)[1] for kind in config.stage_layer_types("core"))


def _cortex_cost(config: Any, stage: str, layer_type: str) -> tuple[int, int]:
    """Matrix parameters of a Cortex layer and numbers in its state of one row; zeros for other layers."""
    if layer_type != "cortex":
        return 0, 0
    from cognexis.cortex_layers.layer_settings import layer_cost

    return layer_cost(config.cortex, stage, config.hidden_size)
