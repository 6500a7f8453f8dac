"""Models whose layers carry a state over time: every cell in every stage, and mixtures."""

from typing import Any

# A pattern or a whole description by name of the cell.
CELLS: dict[str, Any] = {
    "axon": "A",
    "axon_full_rank": {"pattern": "A", "overrides": [{"cell_type": "axon", "use_fullrank_rtu": True}]},
    "lstm": "L",
    "gru": "G",
    "conv": "C",
    "mlstm": {"pattern": "M", "overrides": [{"cell_type": "mlstm", "chunk_size": 4}]},
    "mlstm_axon": "M^",
    "slstm": "S",
    "slstm_axon": "S^",
    "xl": {"pattern": "X", "overrides": [{"cell_type": "xl", "mem_len": 6}]},
    "xl_axon": {"pattern": "X^", "overrides": [{"cell_type": "xl", "mem_len": 6}]},
    "agalite": {"pattern": "Ag", "overrides": [{"cell_type": "agalite", "n_heads": 4}]},
    "column": {"pattern": "AXMS", "overrides": [{"cell_type": "xl", "mem_len": 6}]},
}
STAGES = ("prelude", "core", "coda")


def described(cell: str) -> dict[str, Any]:
    """The field ``cortex`` of a configuration whose layers hold ``cell``."""
    found = CELLS[cell]
    return {"pattern": found} if isinstance(found, str) else found


def overrides(cell: str, stage: str) -> dict[str, Any]:
    """Overrides of the tiny configuration: ``cell`` in the layers of ``stage``, attention elsewhere."""
    count = 2 if stage == "prelude" else 1
    return {f"{stage}_layer_types": ["cortex"] * count, "cortex": described(cell)}


# An XL memory shorter than a text is a window, so those that compare with one pass over more tokens keep it longer.
_EVERYWHERE = {"prelude_layer_types": ["cortex", "cortex"], "core_layer_types": ["cortex"]}
MIXTURES: dict[str, dict[str, Any]] = {
    "no_attention_anywhere": {
        **_EVERYWHERE,
        "coda_layer_types": ["cortex"],
        "cortex": {"pattern": "AMS", "core": {"pattern": ["M^L", "GC"], "post_norm": True}},
    },
    "beside_attention": {
        "prelude_layer_types": ["cortex", "sliding_attention"],
        "core_layer_types": ["cortex"],
        "sliding_window": 4,
        "cortex": {"pattern": "SC"},
    },
    "core_of_attention_and_memory": {
        "num_recurrent_blocks": 2,
        "experimental_multi_block": True,
        "core_layer_types": ["full_attention", "cortex"],
        "cortex": {"pattern": "AL"},
    },
    "core_of_memory_and_attention": {
        "num_recurrent_blocks": 2,
        "experimental_multi_block": True,
        "core_layer_types": ["cortex", "full_attention"],
        "coda_layer_types": ["cortex"],
        "cortex": {"pattern": "M"},
    },
    "injection_after_the_core": {
        "core_layer_types": ["cortex"],
        "injection_site": "post",
        "injection_projection": "identity",
        "cortex": {"pattern": "SA"},
    },
    "no_injection_and_learned_scale": {
        "core_layer_types": ["cortex"],
        "input_injection": "none",
        "recurrent_residual_mode": "learned_vector",
        "cortex": {"pattern": "L"},
    },
    "whole_stack": {
        "core_layer_types": ["cortex"],
        "cortex": {
            "stack": {
                "blocks": [
                    {"block_type": "preup", "cell": {"cell_type": "lstm"}, "proj_factor": 1.5},
                    {"block_type": "postup_gated", "cell": {"cell_type": "slstm"}},
                    {
                        "block_type": "adapter",
                        "bottleneck": 8,
                        "base_block": {"block_type": "postup", "cell": {"cell_type": "gru"}},
                    },
                ]
            }
        },
    },
}
