"""What a pass costs: floating-point operations of its matrix products, and bytes of its cached keys.

For one row of S tokens that see K keys (K = S where nothing is cached), with H width, N query heads, G key/value
heads, D head width, F feed-forward width, V vocabulary and L loops,

    block = S (4 H D (N + G) + m H F) + 4 S K N D      m = 6 with a gated activation, else 4
    core  = blocks + S (injection + gate)              injection 2 H H as a linear map, 4 H H on both states, else 0
                                                       gate 2 H H per matrix; of the loop embedding once per loop
    head  = 2 S H V
    total = prelude + L core + coda + head

A multiplication and an addition are two operations. Masked pairs of positions count, as eager attention computes them;
a sliding window counts its keys only. With ``attention_memory`` a core block also attends to the keys of the prelude's
output, which are projected once per pass. Norms, activations and rotations are left out. A Cortex layer costs what
``cognexis.cortex_layers.matmul_cost`` says; what registered layers cost is not known here and counts as nothing.
"""

from dataclasses import dataclass
from typing import Any

from cognexis.configuration_rules import has_time_state

_ATTENTION = ("full_attention", "sliding_attention")
_GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class StageFlops:
    """Operations by stage."""

    prelude: int
    recurrent: int
    coda: int
    head: int

    @property
    def total(self) -> int:
        """All stages together."""
        return self.prelude + self.recurrent + self.coda + self.head

    def __add__(self, other: "StageFlops") -> "StageFlops":
        return StageFlops(
            self.prelude + other.prelude,
            self.recurrent + other.recurrent,
            self.coda + other.coda,
            self.head + other.head,
        )


def dense_block_flops(
    num_tokens: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    *,
    gated: bool,
    num_keys: int | None = None,
) -> int:
    """Matrix FLOPs of a transformer block; ``num_keys`` is what each token sees, None: ``num_tokens``."""
    keys = num_tokens if num_keys is None else num_keys
    projections = num_tokens * hidden_size * head_dim * (4 * heads + 4 * kv_heads)
    scores = 4 * heads * num_tokens * keys * head_dim
    return projections + scores + (6 if gated else 4) * num_tokens * hidden_size * intermediate_size


def head_flops(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Matrix FLOPs of the language-model head."""
    return 2 * num_tokens * hidden_size * vocab_size


def pass_flops(config: Any, num_tokens: int, num_loops: int, num_keys: int, head_tokens: int) -> StageFlops:
    """Matrix FLOPs of one row in one forward pass.

    Args:
        config: a ``CognexisConfig``.
        num_tokens: tokens that are computed.
        num_loops: loops of the core.
        num_keys: keys in sight of each token.
        head_tokens: tokens whose logits are computed.
    """
    memory = 0
    if config.input_injection == "attention_memory":
        spec = config.block_spec("core")
        blocks = sum(kind in _ATTENTION for kind in config.stage_layer_types("core"))
        memory = 4 * num_tokens * config.hidden_size * spec.num_key_value_heads * spec.head_dim * blocks
    return StageFlops(
        prelude=_stage_flops(config, "prelude", num_tokens, num_keys),
        recurrent=num_loops * _core_flops(config, num_tokens, num_keys) + memory,
        coda=_stage_flops(config, "coda", num_tokens, num_keys),
        head=head_flops(head_tokens, config.hidden_size, config.vocab_size),
    )


def core_flops_per_token(config: Any, num_keys: int, num_tokens: int = 1) -> int:
    """Matrix FLOPs of one token in one loop, rounded up, with ``num_keys`` keys in sight.

    The loop embedding of the gate is counted for each token, so that no budget is passed.

    Args:
        num_tokens: tokens of the call, over which a Cortex layer spreads what it does with its memories.
    """
    return -(-_core_flops(config, num_tokens, num_keys, num_embeddings=num_tokens) // num_tokens)


def _core_flops(config: Any, num_tokens: int, num_keys: int, *, num_embeddings: int = 1) -> int:
    """Of one row in one loop, the loop embedding of the gate projected ``num_embeddings`` times."""
    square = 2 * config.hidden_size**2
    per_token = 0
    if config.input_injection == "concat_project":
        per_token += 2 * square
    elif config.input_injection == "residual" and config.injection_projection == "linear":
        per_token += square
    embeddings = 0
    if config.recurrent_gating:
        per_token += square * (1 + (config.input_injection == "gate_condition"))
        embeddings = square * num_embeddings * config.gate_loop_embedding
    return _stage_flops(config, "core", num_tokens, num_keys) + num_tokens * per_token + embeddings


def _stage_flops(config: Any, stage: str, num_tokens: int, num_keys: int) -> int:
    """Of the blocks of a stage, once each, over one row."""
    spec, total = config.block_spec(stage), 0
    has_memory = stage == "core" and config.input_injection == "attention_memory"
    for kind in config.stage_layer_types(stage):
        if kind in _ATTENTION:
            in_sight = num_keys if kind == "full_attention" else min(num_keys, config.sliding_window)
            total += dense_block_flops(
                num_tokens,
                config.hidden_size,
                spec.num_attention_heads,
                spec.num_key_value_heads,
                spec.head_dim,
                spec.intermediate_size,
                gated=spec.ffn_activation in _GATED,
                num_keys=in_sight * (1 + has_memory),
            )
        elif kind == "cortex":
            from cognexis.cortex_layers.layer_settings import layer_flops

            total += layer_flops(config.cortex, stage, config.hidden_size, num_tokens)
    return total


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
    """Bytes of the states over time that one loop of the core keeps for one row; of Cortex layers only."""
    num_layers = sum(kind == "cortex" for kind in config.stage_layer_types("core"))
    if not num_layers:
        return 0
    from cognexis.cortex_layers.layer_settings import layer_state_size

    return num_layers * itemsize * layer_state_size(config.cortex, "core", config.hidden_size)
