"""The keys of tokens of different depths: what policies keep and read, and that the pool equals the plain form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cognexis import CognexisCache
from cognexis.decoder.depth_cache import (
    CachePolicy,
    DepthKeys,
    DepthLayer,
    EveryLoop,
    MixedDepthLayer,
    ReferenceDepthLayer,
    build_policy,
)
from cognexis.errors import CacheError, InvalidConfigError
from cognexis.looping.options import CACHE_POLICIES
from tests.batteries.tiny import tiny_config

HEADS, WIDTH = 2, 3
MOST = 9  # deepest token of the policy tests
LOOPS = range(1, 13)  # loops that read, deeper than any token


# -- policies ------------------------------------------------------------------------------------------------------


def slots_after(name: str, slots: int, depth: int) -> dict[int, int]:
    """What a token of ``depth`` loops leaves: the loop whose keys each slot holds, by writing loop after loop.

    ``depth + 1`` stands for the frozen entry. A token without loops (padding, an ended row) shows one entry.
    """
    held: dict[int, int] = {}
    last = depth + 1 if name == "depth_indexed" else max(depth, 1)
    for loop in range(1, last + 1):
        if name == "depth_indexed":
            held[loop] = loop
        elif name == "last_exited":
            held[min(loop, slots)] = loop
        elif name == "modulo_k":
            held[(loop - 1) % slots + 1] = loop
        else:
            held.setdefault(1, loop)
    return held


def slot_read(name: str, slots: int, loop: int) -> int:
    """The slot that ``loop`` reads."""
    if name == "depth_indexed":
        return loop
    return {"last_exited": min(loop, slots), "modulo_k": (loop - 1) % slots + 1, "first_loop": 1}[name]


def kept_loops(policy: CachePolicy, depth: int) -> list[int]:
    loops = torch.arange(1, MOST + 2)
    return loops[policy.keeps(loops, torch.full_like(loops, depth))].tolist()


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_a_policy_keeps_and_reads_what_writing_into_slots_would_leave(name: str, slots: int) -> None:
    policy = build_policy(name, slots)
    assert policy.name == name and policy.is_exact is (name == "depth_indexed")
    for depth in range(MOST + 1):
        held = slots_after(name, slots, depth)
        kept = kept_loops(policy, depth)
        assert kept == sorted(held.values()), f"depth {depth}"
        assert int(policy.count(torch.tensor(depth))) == len(kept)
        for loop in LOOPS:
            slot = slot_read(name, slots, loop)
            slot = slot if slot in held else max(held)  # never written: the deepest that was
            index = int(policy.offset(loop, torch.tensor(depth)))
            assert kept[index] == held[slot], f"depth {depth}, loop {loop}: reads loop {kept[index]}, not {held[slot]}"


def test_a_core_of_several_blocks_keeps_every_loop() -> None:
    policy = build_policy("depth_indexed", 2, num_blocks=2)
    assert isinstance(policy, EveryLoop) and policy.is_exact
    for depth in range(1, MOST + 1):
        kept = kept_loops(policy, depth)
        assert kept == list(range(1, depth + 1)) and int(policy.count(torch.tensor(depth))) == depth
        assert [kept[int(policy.offset(loop, torch.tensor(depth)))] for loop in range(1, depth + 1)] == kept
    assert build_policy("last_exited", 2, num_blocks=2).name == "last_exited"


# -- the pool and the plain form -------------------------------------------------------------------------------------


def layers(window: int | None = None) -> tuple[MixedDepthLayer, ReferenceDepthLayer]:
    return MixedDepthLayer(build_policy("depth_indexed", 4), window), ReferenceDepthLayer(
        build_policy("depth_indexed", 4), window
    )


def random_entries(depths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, T, L + 1, G, D]`` of tokens of these depths; behind the frozen entry it repeats."""
    size = int(depths.max()) + 1
    own = torch.arange(size).expand(*depths.shape, size).minimum(depths[..., None])
    shape = (*depths.shape, size, HEADS, WIDTH)
    index = own[..., None, None].expand(shape)
    keys, values = (torch.randn(shape, generator=generator).gather(2, index) for _ in range(2))
    return keys, values


def assert_same_reads(pool: DepthLayer, plain: DepthLayer) -> None:
    assert pool.get_seq_length() == plain.get_seq_length()
    assert pool.get_mask_sizes(2) == plain.get_mask_sizes(2)
    for loop in LOOPS:
        a, b = (layer.read(loop) for layer in (pool, plain))  # type: ignore[attr-defined]
        assert (a is None) == (b is None)
        for x, y in zip(a or (), b or (), strict=True):
            assert torch.equal(x, y), f"loop {loop}"


def assert_bytes(pool: MixedDepthLayer) -> None:
    """The pool holds the own entries and the frozen one of every token that it knows, and nothing else."""
    assert pool.keys is not None and pool.values is not None
    assert len(pool.keys) == len(pool.values) == int((pool.depth + 1).sum())
    expected = 2 * HEADS * WIDTH * 4 * int((pool.depth + 1).sum())
    assert sum(x.numel() * x.element_size() for x in (pool.keys, pool.values)) == expected


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda layer: None,
    "crop nothing": lambda layer: layer.crop(0),
    "crop one": lambda layer: layer.crop(-1),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_pool_reads_as_the_plain_form(operation: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    pool, plain = layers(window)
    if "crop" in operation:
        pool.activate_past_recording()
    rows = 3
    assert pool.read(1) is None and plain.read(1) is None
    for length in (4, 1, 3, 2):
        depths = torch.randint(0, 6, (rows, length), generator=generator)
        keys, values = random_entries(depths, generator)
        for layer in (pool, plain):
            layer.append(keys, values, depths)
            layer.note_loops(depths)
        assert_same_reads(pool, plain)
        assert_bytes(pool)
        for layer in (pool, plain):
            OPERATIONS[operation](layer)
        if operation == "reset":
            assert pool.keys is None and pool.deepest is None
        else:
            assert_bytes(pool)
            assert pool.deepest is not None and plain.deepest is not None
            assert torch.equal(pool.deepest, plain.deepest)
            rows = pool.first.shape[0]
        assert_same_reads(pool, plain)
    if operation == "repeat":
        assert rows == 3 * 2**4


@pytest.mark.parametrize("window", [2, 5])
def test_tokens_out_of_the_window_leave_the_pool(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pool, _ = layers(window)
    for length in (7, 1, 1):
        depths = torch.randint(0, 6, (2, length), generator=generator)
        pool.append(*random_entries(depths, generator), depths)
        assert pool.first.shape[1] == min(pool.get_seq_length(), window - 1)
        assert_bytes(pool)
    assert pool.get_seq_length() == 9 and pool.get_max_length() == window


def test_a_pool_that_records_the_past_can_bring_it_back() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, plain = layers(3)
    pool.activate_past_recording()
    for length in (3, 4):
        depths = torch.randint(0, 6, (2, length), generator=generator)
        entries = random_entries(depths, generator)
        for layer in (pool, plain):
            layer.append(*entries, depths)
    for layer in (pool, plain):
        layer.crop(-4)
    assert_same_reads(pool, plain)
    assert pool.first.shape[1] == 2  # the rest left the window


def test_chosen_rows_are_read_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, plain = layers()
    depths = torch.randint(0, 6, (4, 3), generator=generator)
    entries = random_entries(depths, generator)
    rows = torch.tensor([3, 1])
    for layer in (pool, plain):
        layer.append(*entries, depths)
        whole, some = layer.read(2), layer.read(2, rows)
        assert whole is not None and some is not None
        assert torch.equal(some[0], whole[0][rows]) and torch.equal(some[1], whole[1][rows])


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_the_pool_of_a_policy_holds_its_count_and_reads_its_loops(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    policy = build_policy(name, 3)
    pool = MixedDepthLayer(policy)
    depths = torch.cat([torch.randint(0, 6, (2, n), generator=generator) for n in (4, 2)], dim=1)
    entries = torch.arange(1, 7).float().view(1, 1, 6, 1, 1).expand(2, 6, 6, HEADS, WIDTH)  # each holds its loop
    for part in (slice(0, 4), slice(4, 6)):
        pool.append(entries[:, part], -entries[:, part], depths[:, part])
    assert pool.keys is not None and len(pool.keys) == int(policy.count(depths).sum())
    for loop in LOOPS:
        pair = pool.read(loop)
        assert pair is not None and torch.equal(pair[0], -pair[1])
        for row in range(2):
            for token, depth in enumerate(depths[row].tolist()):
                held = slots_after(name, 3, depth)
                slot = slot_read(name, 3, loop)
                expected = held[slot if slot in held else max(held)]
                assert pair[0][row, 0, token, 0] == expected


# -- the keys of a call ----------------------------------------------------------------------------------------------


def test_tokens_that_are_left_out_show_their_last_keys() -> None:
    keys = DepthKeys(None, first_slot=3, num_blocks=1, shape=(2, 3))
    first = torch.arange(2 * HEADS * 3 * WIDTH).float().view(2, HEADS, 3, WIDTH)
    assert torch.equal(keys.update(first, -first, 3)[0], first)
    rows, tokens = torch.tensor([1]), torch.tensor([[2, 0]])
    keys.choose(rows, tokens)
    new = torch.full((1, HEADS, 2, WIDTH), 100.0)
    shown = keys.update(new, -new, 4)
    expected = first[1:].clone()
    expected[:, :, [2, 0]] = 100.0
    assert torch.equal(shown[0], expected) and torch.equal(shown[1], -expected)
    keys.choose(None, None)
    keys.freeze(torch.tensor([0]), torch.tensor([[1]]), (new[:, :, :1] * 2, new[:, :, :1] * 2))
    keys.choose(torch.tensor([0]), torch.tensor([[0]]))
    shown = keys.update(new[:, :, :1], new[:, :, :1], 5)
    assert shown[0][0, 0, :, 0].tolist() == [100.0, 200.0, float(first[0, 0, 2, 0])]


def test_with_shared_first_keys_deeper_loops_change_nothing() -> None:
    keys = DepthKeys(None, first_slot=3, num_blocks=1, shape=(1, 2), shares_first_loop=True)
    first = torch.randn(1, HEADS, 2, WIDTH)
    keys.update(first, first, 3)
    assert torch.equal(keys.update(first + 1, first + 1, 4)[0], first)
    keys.freeze(torch.tensor([0]), torch.tensor([[0]]), (first[:, :, :1] + 2, first[:, :, :1] + 2))
    assert torch.equal(keys.update(first + 1, first + 1, 5)[0], first)


# -- the whole cache -------------------------------------------------------------------------------------------------


def test_a_mixed_cache_has_one_slot_per_core_block() -> None:
    config = tiny_config(num_recurrent_blocks=2, experimental_multi_block=True)
    cache = CognexisCache(config, mixed_depth=True)
    assert [(s.stage, s.block, s.loop) for s in cache.slots] == [
        ("prelude", 0, None),
        ("prelude", 1, None),
        ("coda", 0, None),
        ("recurrent", 0, None),
        ("recurrent", 1, None),
    ]
    assert len(cache.layers) == 5 and all(isinstance(layer, MixedDepthLayer) for layer in cache.depth_layers)


@pytest.mark.parametrize("held", CACHE_POLICIES)
def test_an_empty_cache_serves_any_policy(held: str) -> None:
    cache = CognexisCache(tiny_config())
    cache.bind_mixed(4, held)
    assert cache.policy is not None and cache.policy.name == held
    for other in CACHE_POLICIES:
        cache.bind_mixed(4, other)
        assert cache.policy.name == other
    cache.bind(2, 1)
    assert cache.policy is None and cache.num_loops == 2


@pytest.mark.parametrize(
    "settings, word", [({"cache_type": "static", "max_cache_len": 8}, "static"), ({"offloading": True}, "offloaded")]
)
def test_mixed_depths_need_a_cache_that_grows(settings: dict[str, Any], word: str) -> None:
    if word == "offloaded" and not torch.cuda.is_available():
        cache = CognexisCache(tiny_config())
        cache.offloading = True
    else:
        cache = CognexisCache(tiny_config(), **settings)
    with pytest.raises(InvalidConfigError, match=f"{word}.*dynamic cache"):
        cache.bind_mixed(4, "depth_indexed")


def test_an_unknown_storage_form_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="depth_form='pool': must be compact or reference"):
        CognexisCache(tiny_config(), depth_form="pool")


def test_a_released_mixed_cache_holds_nothing_and_serves_nobody() -> None:
    cache = CognexisCache(tiny_config(), mixed_depth=True)
    depths = torch.tensor([[2, 0]])
    for layer in cache.depth_layers:
        layer.append(*random_entries(depths, torch.Generator().manual_seed(0)), depths)
    assert cache.memory_bytes() == 2 * HEADS * WIDTH * 4 * 4
    cache.release()
    cache.release()
    assert cache.memory_bytes() == 0
    with pytest.raises(CacheError, match="released"):
        cache.bind_mixed(4, "depth_indexed")
