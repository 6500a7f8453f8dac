"""What must not change the result of a token: later tokens, padding, neighbours in the batch, caching, packing.

Each check takes a model in eval mode and a loop count, so that every configuration passes the same set. Differences
are judged by :func:`assert_same`, which also looks at the scale of what it compares.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cognexis import CognexisCache

_ALL_SLIDING = {
    "sliding_window": 4,
    "prelude_layer_types": ["sliding_attention", "sliding_attention"],
    "core_layer_types": ["sliding_attention"],
    "coda_layer_types": ["sliding_attention"],
}
_MIXED_SLIDING = {
    "sliding_window": 4,
    "prelude_layer_types": ["full_attention", "sliding_attention"],
    "core_layer_types": ["sliding_attention"],
}

# Overrides of the tiny configuration, by name. Up to three loops each: the third is the first that reads a state
# made by a core that has itself read a looped state.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "linear_injection": {},
    "identity_injection_after_the_block": {"injection_projection": "identity", "injection_site": "post"},
    "no_injection": {"input_injection": "none"},
    "concat_project": {"input_injection": "concat_project"},
    "gate_condition": {"input_injection": "gate_condition"},
    "attention_memory": {"input_injection": "attention_memory"},
    "no_gate": {"recurrent_gating": False},
    "gate_with_loop_embedding": {"gate_loop_embedding": True},
    "no_core_norm": {"recurrent_norm": "none"},
    "closing_norm": {"recurrent_norm": "closing"},
    "learned_residual_scale": {"recurrent_residual_mode": "learned_vector"},
    "sliding_window": _ALL_SLIDING,
    "sliding_core": _MIXED_SLIDING,
    "sliding_core_with_global_tokens": {**_MIXED_SLIDING, "global_tokens": 2},
    "attention_memory_in_a_sliding_core": {**_MIXED_SLIDING, "input_injection": "attention_memory"},
    "no_coda": {"num_coda_blocks": 0},
    "no_prelude": {"num_prelude_blocks": 0},
    "neither_prelude_nor_coda": {"num_prelude_blocks": 0, "num_coda_blocks": 0},
    "one_key_value_head": {"num_key_value_heads": 1},
    "as_many_key_value_heads_as_heads": {"num_key_value_heads": 4},
    "core_of_two_blocks": {
        "num_recurrent_blocks": 2,
        "experimental_multi_block": True,
        "sliding_window": 4,
        "core_layer_types": ["sliding_attention", "full_attention"],
    },
    "random_initial_state": {"recurrent_init": "random"},
    "layernorm_gelu_biases": {
        "norm_type": "layernorm",
        "final_norm": "layernorm",
        "ffn_activation": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
    },
    "untied_head": {"tie_word_embeddings": False, "lm_head_bias": True},
    "stages_of_their_own_shape": {
        "stage_overrides": {
            "core": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40},
            "coda": {"num_key_value_heads": 4, "norm_type": "layernorm", "ffn_activation": "relu"},
        }
    },
    "partial_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5}},
}
MAX_LOOPS = 3


def limit(dtype: torch.dtype, loops: int) -> float:
    """Largest difference between two ways of computing unit-scale values.

    Rounding errors of the loops add up like a random walk, hence the root; in float64 they stay below 1e-12 for
    every loop count here, so nothing but rounding can hide.
    """
    return 1e-12 if dtype == torch.float64 else 2e-5 * math.sqrt(loops)


def assert_same(actual: Tensor, expected: Tensor, loops: int, what: str = "logits") -> None:
    """Require two unit-scale tensors to be equal up to rounding; in float64 the most likely tokens too."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    scale = expected.abs().max().item()
    assert 0.5 < scale < 20.0, f"{what}: a scale of {scale:.3g} makes the tolerance meaningless"
    allowed = limit(expected.dtype, loops) * (scale if expected.dtype == torch.float64 else 1.0)
    error = (actual - expected).abs().max().item()
    assert error <= allowed, f"{what}: differs by {error:.3g}, allowed {allowed:.3g} at {loops} loops"
    if expected.dtype == torch.float64:
        assert torch.equal(actual.argmax(-1), expected.argmax(-1)), f"{what}: another token is the most likely"


def token_ids(model: Any, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids ``[rows, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


def left_padding(lengths: Sequence[int]) -> Tensor:
    """Attention mask ``[rows, longest]`` of rows that end together."""
    longest = max(lengths)
    return torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, loops: int, **kwargs: Any) -> Tensor:
    """Logits ``[B, T, V]`` of one pass without a cache."""
    return model(ids, num_loops=loops, use_cache=False, **kwargs).logits


@torch.no_grad()
def cached_logits(
    model: Any, ids: Tensor, loops: int, cache: Any, chunks: Sequence[int], mask: Tensor | None = None
) -> Tensor:
    """Logits of the tokens that follow those in ``cache``, computed in ``chunks`` of this many tokens."""
    start, pieces = int(cache.get_seq_length()), []
    for size in chunks:
        end = start + size
        seen = None if mask is None else mask[:, :end]
        output = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, num_loops=loops, use_cache=True)
        assert output.past_key_values is cache
        pieces.append(output.logits)
        start = end
    return torch.cat(pieces, dim=1)


CACHES: dict[str, Callable[[Any, int], Any]] = {
    "dynamic": lambda config, length: CognexisCache(config),
    "static": lambda config, length: CognexisCache(config, "static", max_cache_len=length),
    "static_with_room_to_spare": lambda config, length: CognexisCache(config, "static", max_cache_len=length + 5),
    "stock_dynamic": lambda config, length: DynamicCache(config=config),
}


# -- the checks ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_causality(model: Any, loops: int, length: int = 8) -> None:
    """Changing token j leaves every block's and every loop's output before j as it was, to the last bit."""
    ids = token_ids(model, 1, length).expand(length, -1).contiguous()
    changed = ids.clone()
    changed.diagonal().copy_((ids.diagonal() + 1) % model.config.vocab_size)  # row j differs at token j
    before = torch.ones(length, length, dtype=torch.bool).tril(-1)  # [j, i]: i < j

    def outputs(x: Tensor) -> list[Tensor]:
        out = model(x, num_loops=loops, use_cache=False, output_hidden_states=True)
        return [*out.hidden_states, out.logits]

    for index, (a, b) in enumerate(zip(outputs(ids), outputs(changed), strict=True)):
        assert torch.equal(a[before], b[before]), f"output {index} depends on a later token at {loops} loops"
    assert not torch.equal(a[~before], b[~before]), "the change itself must be visible"


@torch.no_grad()
def check_causality_of_cached_chunks(model: Any, loops: int, cache_kind: str, length: int = 8) -> None:
    """As :func:`check_causality` for a chunk of several tokens that follows cached ones."""
    ids = token_ids(model, 1, length).expand(length, -1).contiguous()
    changed = ids.clone()
    changed.diagonal().copy_((ids.diagonal() + 1) % model.config.vocab_size)
    before = torch.ones(length, length, dtype=torch.bool).tril(-1)
    a, b = (
        cached_logits(model, x, loops, CACHES[cache_kind](model.config, length), [3, length - 3])
        for x in (ids, changed)
    )
    assert torch.equal(a[before], b[before]), f"{cache_kind} cache: a later token shows at {loops} loops"


def check_padding(model: Any, loops: int, bitwise: bool = True) -> None:
    """A row gives the same alone, padded on the left and padded on the right; what the padding holds is not read.

    Args:
        bitwise: what the padding holds may not even show in the last bit, as it does where sums over time are
            differences of running ones.
    """
    row, padding = token_ids(model, 1, 7), token_ids(model, 2, 4, seed=1)
    alone = logits_of(model, row, loops)
    mask = left_padding([7, 11])[:1].expand(2, -1)
    left = logits_of(model, torch.cat((padding, row.expand(2, -1)), 1), loops, attention_mask=mask)[:, 4:]
    right = logits_of(model, torch.cat((row.expand(2, -1), padding), 1), loops, attention_mask=mask.flip(1))[:, :7]
    for name, padded in (("left", left), ("right", right)):
        assert_same(padded, alone.expand(2, -1, -1), loops, f"{name}-padded row")
        assert_same(padded[0], padded[1], loops, f"{name} padding")
        assert not bitwise or torch.equal(padded[0], padded[1]), f"{name} padding is read"


def check_batch(model: Any, loops: int) -> None:
    """A row gives the same alone and beside a longer neighbour; permuting rows permutes outputs."""
    row, neighbours = token_ids(model, 1, 6), token_ids(model, 2, 9, seed=1)
    batch = torch.cat((torch.cat((torch.full((1, 3), 2), row), 1), neighbours))
    mask = left_padding([6, 9, 9])
    together = logits_of(model, batch, loops, attention_mask=mask)
    assert_same(together[:1, 3:], logits_of(model, row, loops), loops, "row beside a longer one")
    order = torch.tensor([2, 0, 1])
    permuted = logits_of(model, batch[order], loops, attention_mask=mask[order])
    real = mask[order].bool()
    assert_same(permuted[real], together[order][real], loops, "permuted rows")


def check_decoding(model: Any, loops: int, cache_kind: str) -> None:
    """Token by token through a cache gives the same as one pass, for a batch with left padding.

    The steps reach a sliding window of four, fill it and roll past it.
    """
    ids, mask = token_ids(model, 2, 7), left_padding([7, 5])
    whole = logits_of(model, ids, loops, attention_mask=mask)
    steps = cached_logits(model, ids, loops, CACHES[cache_kind](model.config, 7), [3, 1, 1, 1, 1], mask)
    assert_same(steps[mask.bool()], whole[mask.bool()], loops, f"{cache_kind} cache")


def check_chunks(model: Any, loops: int, cache_kind: str, splits: Sequence[Sequence[int]]) -> None:
    """Feeding a sequence to a cache in chunks gives the same as one pass, wherever it is split."""
    length = sum(splits[0])
    ids = token_ids(model, 1, length)
    whole = logits_of(model, ids, loops)
    for chunks in splits:
        pieces = cached_logits(model, ids, loops, CACHES[cache_kind](model.config, length), chunks)
        assert_same(pieces, whole, loops, f"{cache_kind} cache, chunks of {tuple(chunks)}")


DOCUMENT_LENGTHS = (4, 1, 2, 4)


def packings(lengths: Sequence[int] = DOCUMENT_LENGTHS) -> dict[str, dict[str, Tensor]]:
    """The ways to say where the documents of one row begin."""
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return {
        "document_ids": {"document_ids": numbers},
        "document_ids_in_any_order": {"document_ids": (numbers * 5) % 7},
        "seq_idx": {"seq_idx": numbers.int()},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0).int()},
        "restarting_positions": {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]},
    }


@torch.no_grad()
def check_packing(model: Any, loops: int, names: Sequence[str] = tuple(packings())) -> None:
    """Packed documents give what they give alone, and no cache comes back, with ``use_cache`` left to its default."""
    ids = token_ids(model, 1, sum(DOCUMENT_LENGTHS))
    separate = torch.cat([logits_of(model, x, loops) for x in ids.split(DOCUMENT_LENGTHS, dim=1)], dim=1)
    for name in names:
        output = model(ids, num_loops=loops, **packings()[name])
        assert output.past_key_values is None, f"{name}: packed documents came back with a cache"
        assert_same(output.logits, separate, loops, f"documents packed by {name}")


@torch.no_grad()
def check_documents_are_apart(model: Any, loops: int, packing: dict[str, Tensor], bitwise: bool = True) -> None:
    """Changing one document leaves the others as they were; ``bitwise`` as in :func:`check_padding`."""
    ids = token_ids(model, 1, sum(DOCUMENT_LENGTHS))
    first, end = DOCUMENT_LENGTHS[0], sum(DOCUMENT_LENGTHS[:3])
    changed = ids.clone()
    changed[:, first + 1 : end] = (ids[:, first + 1 : end] + 1) % model.config.vocab_size  # the third document
    a, b = (model(x, num_loops=loops, **packing).logits for x in (ids, changed))
    for name, part in (("earlier", slice(first + 1)), ("later", slice(end, None))):
        assert_same(a[:, part], b[:, part], loops, f"{name} document")
        assert not bitwise or torch.equal(a[:, part], b[:, part]), f"an {name} document is read"
    assert not torch.equal(a[:, first + 1 : end], b[:, first + 1 : end]), "the change itself must be visible"


@torch.no_grad()
def check_backends(model: Any, loops: int) -> None:
    """Eager and sdpa attention agree under left padding, right padding, documents and a cache."""
    ids = token_ids(model, 2, 9)
    left, right = left_padding([9, 6]), left_padding([9, 6]).flip(1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [4, 4, 7, 7, 7, 7, 7, -1, -1]])
    results: dict[str, list[Tensor]] = {}
    before = model.config._attn_implementation
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        results[backend] = [
            logits_of(model, ids, loops, attention_mask=left)[left.bool()],
            logits_of(model, ids, loops, attention_mask=right)[right.bool()],
            logits_of(model, ids, loops, document_ids=documents)[documents >= 0],
            cached_logits(model, ids, loops, CognexisCache(model.config), [5, 1, 3], left)[left.bool()],
        ]
    model.set_attn_implementation(before)
    for name, a, b in zip(
        ("left padding", "right padding", "documents", "cache"), results["eager"], results["sdpa"], strict=True
    ):
        assert_same(b, a, loops, f"sdpa under {name}")
