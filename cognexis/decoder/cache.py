"""The key/value cache of a looped decoder: one slot per block of the prelude and coda, one per core block and loop.

A slot belongs to a stage, a block and, in the core, a loop; entries of one slot never serve another. Its bytes are

    2 * slots * B * G * S * D * itemsize

for S cached tokens: key and value heads are stored once, never repeated for the query heads. Slots of loops that a
request does not run stay empty. All loops of a request write every token, so one cache belongs to one loop count.

Where tokens may run different numbers of loops, each core block has one slot for all of them: see ``depth_cache``.
The slot of a layer with memory over time holds its state instead, whose size does not grow: see ``time_state``.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from cognexis.decoder.depth_cache import CachePolicy, MixedDepthLayer, ReferenceDepthLayer, build_policy
from cognexis.decoder.time_state import DepthStates, TimeStateLayer, TimeStateSlot
from cognexis.errors import CacheError, InvalidConfigError


@dataclass(frozen=True)
class CacheSlot:
    """Whose keys and values a slot holds.

    Attributes:
        stage: "prelude", "recurrent" or "coda".
        block: index of the block within its stage.
        loop: loop number from 1 in the core; None elsewhere, for attention memory and where one slot holds all loops.
    """

    stage: Literal["prelude", "recurrent", "coda"]
    block: int
    loop: int | None = None


def slot_table(config: Any, loops: int | None = None, is_mixed: bool = False) -> list[CacheSlot]:
    """The owner of every slot, in slot order: prelude, coda, attention memory, then loop by loop, or mixed."""
    slots = [CacheSlot("prelude", i) for i in range(config.num_prelude_blocks)]
    slots += [CacheSlot("coda", i) for i in range(config.num_coda_blocks)]
    if config.input_injection == "attention_memory":
        slots += [CacheSlot("recurrent", i) for i in range(config.num_recurrent_blocks)]
    if is_mixed:
        return slots + [CacheSlot("recurrent", i) for i in range(config.num_recurrent_blocks)]
    for loop in range(1, (config.loop_slots if loops is None else loops) + 1):
        slots += [CacheSlot("recurrent", i, loop) for i in range(config.num_recurrent_blocks)]
    return slots


class CognexisCache(Cache):
    """A transformers ``Cache`` that knows its slots and refuses use that would give wrong results.

    Args:
        config: the configuration of the model that will use it.
        cache_type: "dynamic" grows with the sequence; "static" holds ``max_cache_len`` tokens from the start, as
            compiled decoding needs.
        max_cache_len: tokens per slot of a static cache.
        offloading: keep slots in host memory and fetch them ahead of use (CUDA).
        mixed_depth: prepare for tokens of different loop counts; otherwise the first call decides.
        depth_form: storage of mixed depths: "compact", or "reference", which fills every deeper slot.

    Attributes:
        num_loops: loop count the entries belong to; None while empty and for mixed depths.
        policy: which entries of a token are kept; None unless depths are mixed.

    Raises:
        InvalidConfigError: an unknown type, a static cache without a length, or one for mixed depths.
    """

    layers: list[Any]
    policy: CachePolicy | None

    def __init__(
        self,
        config: Any,
        cache_type: str = "dynamic",
        max_cache_len: int | None = None,
        offloading: bool = False,
        mixed_depth: bool = False,
        depth_form: str = "compact",
    ) -> None:
        if depth_form not in ("compact", "reference"):
            raise InvalidConfigError(f"depth_form={depth_form!r}: must be compact or reference", path="depth_form")
        if cache_type not in ("dynamic", "static"):
            raise InvalidConfigError(f"cache_type={cache_type!r}: must be dynamic or static", path="cache_type")
        if cache_type == "static" and (not isinstance(max_cache_len, int) or max_cache_len < 1):
            raise InvalidConfigError(
                f"max_cache_len={max_cache_len!r}: a static cache needs a length of at least 1",
                path="max_cache_len",
            )
        self._config = config
        self.cache_type = cache_type
        self.capacity = max_cache_len or 0
        self.num_loops: int | None = None
        self.is_released = False
        self.policy = None
        self._depth_form = depth_form
        self._records_past = False
        super().__init__(layers=[self._new_layer(kind) for kind in config.layer_types], offloading=offloading)
        self.slots = slot_table(config)
        if mixed_depth:
            self._lay_out("depth_indexed")

    def _new_layer(self, layer_type: str) -> Any:
        window = self._config.sliding_window
        if layer_type == "linear_attention":
            return TimeStateLayer(self.capacity)
        if self.cache_type == "dynamic":
            return (
                DynamicLayer() if layer_type == "full_attention" else DynamicSlidingWindowLayer(sliding_window=window)
            )
        if layer_type == "full_attention":
            return StaticLayer(max_cache_len=self.capacity)
        return StaticSlidingWindowLayer(max_cache_len=self.capacity, sliding_window=window)

    def activate_past_recording(self) -> None:
        """Keep tokens that leave a window until the next crop, in slots that are added later too."""
        self._records_past = True
        super().activate_past_recording()

    @property
    def depth_layers(self) -> list[Any]:
        """The slot of each core block where depths are mixed."""
        return self.layers[self._config.first_loop_slot :]

    def _lay_out(self, policy: str | None) -> None:
        """Rebuild the slots of an empty cache: by loop (None), or one per core block under ``policy``."""
        if self.cache_type == "static" or self.offloading:
            kind = "static" if self.cache_type == "static" else "offloaded"
            raise InvalidConfigError(f"cache_type={kind!r}: tokens of different loop counts need a dynamic cache")
        config = self._config
        self.layers = [self._new_layer(kind) for kind in config.layer_types]
        self.policy = None
        if policy is not None:
            self.policy = build_policy(policy, config.kv_slots, config.num_recurrent_blocks)
            form = MixedDepthLayer if self._depth_form == "compact" else ReferenceDepthLayer
            self.layers[config.first_loop_slot :] = [
                DepthStates()
                if kind == "linear_attention"
                else form(self.policy, config.sliding_window if kind == "sliding_attention" else None)
                for kind in map(config.slot_kind, config.stage_layer_types("core"))
            ]
        self.slots = slot_table(config, is_mixed=policy is not None)
        if self._records_past:
            self.activate_past_recording()

    def bind_mixed(self, max_loops: int, policy: str) -> None:
        """Reserve the cache for tokens of up to ``max_loops`` loops under ``policy``.

        Raises:
            CacheError: the entries belong to a fixed loop count or another policy, or the cache was released.
            InvalidConfigError: the cache is static or offloaded.
        """
        self._require_live()
        held = None if self.policy is None else self.policy.name
        if held != policy:
            if int(self.get_seq_length()) > 0:
                what = f"keys of {self.num_loops} loops for every token" if held is None else f"{held} entries"
                raise CacheError(
                    f"past_key_values: the cache holds {what}, the call needs {policy} entries for tokens of "
                    "different loop counts; start with CognexisCache(config, mixed_depth=True) or call reset() first"
                )
            self._lay_out(policy)
        if self._config.num_recurrent_blocks > 1 and int(self.get_seq_length()) > 0 and self.num_loops != max_loops:
            raise CacheError(
                f"past_key_values: with several core blocks the cache holds {self.num_loops} loops of every token, "
                f"the call may run max_loops={max_loops}; use the same number"
            )
        self.num_loops = max_loops if self._config.num_recurrent_blocks > 1 else None

    def bind(self, num_loops: int, new_tokens: int) -> None:
        """Reserve the cache for ``num_loops`` loops over ``new_tokens`` tokens, adding slots where it may.

        Raises:
            CacheError: the entries belong to another loop count, the cache was released, or a static cache has too
                few slots or too little room.
        """
        self._require_live()
        if self.policy is not None:
            if int(self.get_seq_length()) > 0:
                raise CacheError(
                    "past_key_values: the cache holds tokens of different loop counts; call reset() first"
                )
            self._lay_out(None)
        if self.num_loops not in (None, num_loops) and int(self.get_seq_length()) > 0:
            raise CacheError(
                f"past_key_values: the cache holds keys of {self.num_loops} loops, the call asks for num_loops="
                f"{num_loops}; use the same number or call reset() first"
            )
        missing = range(len(self.layers), self._config.first_loop_slot + num_loops * self._config.num_recurrent_blocks)
        if missing and self.cache_type == "static":
            raise CacheError(
                f"past_key_values: a static cache of kv_slots={self._config.kv_slots} loops cannot hold num_loops="
                f"{num_loops}; raise kv_slots or use a dynamic cache"
            )
        first_full = next((i for i, layer in enumerate(self.layers) if isinstance(layer, StaticLayer)), None)
        if self.cache_type == "static" and first_full is not None and not torch.compiler.is_compiling():
            self._require_room(self.layers[first_full], new_tokens)
        if missing:
            kinds = [self._config.slot_kind(kind) for kind in self._config.stage_layer_types("core")]
            self.layers += [self._new_layer(kinds[i % len(kinds)]) for i in range(len(missing))]
            self.slots = slot_table(self._config, num_loops)
            if self._records_past:
                self.activate_past_recording()
        self.num_loops = num_loops

    def _require_live(self) -> None:
        if self.is_released:
            raise CacheError("past_key_values: this cache was released; build a new one")

    def _require_room(self, layer: Any, new_tokens: int) -> None:
        length = int(layer.get_seq_length())
        if length + new_tokens > self.capacity:
            raise CacheError(
                f"past_key_values: {length} cached and {new_tokens} new tokens exceed the static capacity "
                f"max_cache_len={self.capacity}"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, T, D]`` keys and values to slot ``layer_idx`` and return all that a query may see.

        Raises:
            CacheError: the slot does not exist, was released, is full, or holds another batch size, number of heads,
                head width, dtype or device.
        """
        self._require_live()
        if layer_idx >= len(self.layers):
            raise CacheError(f"past_key_values: slot {layer_idx} does not exist, the cache has {len(self.layers)}")
        layer = self.layers[layer_idx]
        if layer.is_initialized and layer.keys is not None and layer.keys.numel() > 0:
            _require_same_kind(layer, key_states, layer_idx)
        readable = key_states.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.cache_type == "static" and readable and not layer.is_sliding:
            self._require_room(layer, key_states.shape[2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer.is_sliding and getattr(layer, "record_past", False):
            # Recorded keys outlive the window until a crop; older transformers return them all.
            visible = layer.sliding_window - 1 + key_states.shape[2]
            return keys[:, :, -visible:], values[:, :, -visible:]
        return keys, values

    def advance(self, stack: Any, x: Tensor, layer_idx: int, resets: Tensor | None = None) -> Tensor:
        """Let a layer with memory over time read ``x`` ``[B, T, H]`` behind what slot ``layer_idx`` remembers.

        Args:
            stack: the layer's stack.
            resets: bool ``[B, T]``, where the state begins anew.

        Raises:
            CacheError: the slot does not exist, was released, or holds another batch size, dtype or device.
        """
        self._require_live()
        if layer_idx >= len(self.layers):
            raise CacheError(f"past_key_values: slot {layer_idx} does not exist, the cache has {len(self.layers)}")
        layer = self.layers[layer_idx]
        if layer.is_initialized:
            for name, old, given in (
                ("batch size", layer.num_rows, x.shape[0]),
                ("dtype", layer.dtype, x.dtype),
                ("device", layer.device, x.device),
            ):
                if old != given:
                    raise CacheError(
                        f"past_key_values: slot {layer_idx} holds {name} {old}, the new tokens have {given}"
                    )
        return layer.advance(stack, x, resets)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens in slot ``layer_idx``; where that is the first, which a layer may leave empty, in any used one."""
        return super().get_seq_length(layer_idx or self._used_like(0))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys and offset for ``query_length`` new tokens in slots like ``layer_idx``."""
        return super().get_mask_sizes(query_length, self._used_like(layer_idx))

    def _used_like(self, layer_idx: int) -> int:
        """The first slot from ``layer_idx`` on that holds tokens and has a window, or none, as that slot."""
        kinds = self.is_sliding[layer_idx:]
        used = (i for i, kind in enumerate(kinds, layer_idx) if kind == kinds[0] and self.layers[i].is_initialized)
        return next(used, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens (a count that is zero or negative, as in transformers).

        Raises:
            CacheError: a positive count, more tokens than are cached, a static cache, or a sliding window that has
                already dropped what the crop would bring back. Nothing is changed then.
        """
        self._require_live()
        length = int(self.get_seq_length())
        if tokens_to_remove > 0 or -tokens_to_remove > length:
            raise CacheError(
                f"tokens_to_remove={tokens_to_remove}: must lie between {-length} (all cached tokens) and 0"
            )
        if self.cache_type == "static":
            raise CacheError("past_key_values: a static cache cannot be cropped; use a dynamic one")
        used = [layer for layer in self.layers if layer.is_initialized]  # slots of loops that ran
        for layer in used if tokens_to_remove else ():
            if isinstance(layer, TimeStateSlot):
                layer.require_recorded(-tokens_to_remove)
                continue
            dropped = layer.is_sliding and layer.get_seq_length() >= layer.sliding_window
            if dropped and not getattr(layer, "record_past", False):
                raise CacheError(
                    "past_key_values: a sliding window has dropped its oldest keys; call activate_past_recording() "
                    "before decoding to be able to crop"
                )
        for layer in used:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let row i continue what row ``beam_idx[i]`` holds."""
        self._require_live()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, copies next to each other."""
        self._require_live()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._require_live()
        super().batch_select_indices(indices)

    def reset(self) -> None:
        """Empty every slot and forget the loop count; the cache can then serve another request."""
        self._require_live()
        for layer in self.layers if self.cache_type == "dynamic" else ():
            layer.keys = layer.values = None  # slots that grow are dropped: zeroed ones would still count as tokens
            layer.is_initialized = False
        super().reset()
        self.num_loops = None

    def release(self) -> None:
        """Free the memory for good; calling it again does nothing, any other use is an error."""
        if not self.is_released:
            super().reset()
        for layer in self.layers:
            if isinstance(layer, TimeStateSlot):
                layer.reset()
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.num_loops = None
        self.is_released = True

    @property
    def max_cache_len(self) -> int:
        """Tokens per slot of a static cache, 0 for a dynamic one; other libraries ask for it by this name."""
        return self.capacity

    def memory_bytes(self) -> int:
        """Bytes held by all slots."""
        used = [layer for layer in self.layers if layer.is_initialized]
        tensors = [
            tensor
            for layer in used
            for tensor in (layer.stored_tensors() if isinstance(layer, TimeStateSlot) else (layer.keys, layer.values))
        ]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class PeekKeys:
    """Reads a cache and leaves it as it is: for a look at the coda before the loops are over.

    Args:
        cache: a cache that grows, or None.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """New keys and values ``[B, G, T, D]`` behind those of the slot."""
        layer = None if self.cache is None else self.cache.layers[layer_idx]
        if layer is None or not layer.is_initialized or layer.keys.numel() == 0:
            return key_states, value_states
        visible = layer.get_mask_sizes(0)[0]
        keys, values = layer.keys[:, :, -visible:], layer.values[:, :, -visible:]
        return torch.cat((keys, key_states), dim=2), torch.cat((values, value_states), dim=2)

    def advance(self, stack: Any, x: Tensor, layer_idx: int, resets: Tensor | None = None) -> Tensor:
        """What ``stack`` makes of ``x`` ``[B, T, H]`` behind the state of the slot."""
        layer = TimeStateLayer() if self.cache is None else self.cache.layers[layer_idx]
        return layer.peek(stack, x, resets)


def _require_same_kind(layer: Any, new: Tensor, layer_idx: int) -> None:
    held = layer.keys
    for name, old, given in (
        ("batch size", held.shape[0], new.shape[0]),
        ("number of key/value heads", held.shape[1], new.shape[1]),
        ("head width", held.shape[3], new.shape[3]),
        ("dtype", held.dtype, new.dtype),
        ("device", layer.device, new.device),
    ):
        if old != given:
            raise CacheError(f"past_key_values: slot {layer_idx} holds {name} {old}, the new keys have {given}")


def _layout(config: Any) -> tuple[Any, ...]:
    """What two configurations must share for a cache of one to serve the other."""
    stages = ("prelude", "core", "coda")
    heads = tuple(config.block_spec(stage).num_key_value_heads for stage in stages)
    kinds = tuple(tuple(config.stage_layer_types(stage)) for stage in stages)
    memory = config.input_injection == "attention_memory"
    stacks = json.dumps(config.cortex, sort_keys=True)
    return kinds, heads, config.head_dim, config.sliding_window, config.global_tokens > 0, memory, stacks


def bind_cache(cache: Any, config: Any, num_loops: int, new_tokens: int, policy: str | None = None) -> None:
    """Check that ``cache`` can serve a forward; a stock transformers cache is checked by its lengths.

    Args:
        cache: what the caller passed as ``past_key_values``.
        config: configuration of the model that will write to it.
        num_loops: loops of the forward.
        new_tokens: tokens it will append.
        policy: how entries are kept where tokens may run different loop counts, up to ``num_loops``; None otherwise.

    Raises:
        CacheError: no cache at all, one of another architecture, one filled with another number of loops, or one with
            too few slots or too little room.
    """
    if not isinstance(cache, Cache):
        raise CacheError(f"past_key_values: must be a transformers Cache, got {type(cache).__name__}")
    if isinstance(cache, CognexisCache):
        if cache._config is not config and _layout(cache._config) != _layout(config):
            raise CacheError(
                "past_key_values: the cache was built for a model with other stages, heads or layer types"
            )
        if policy is None:
            cache.bind(num_loops, new_tokens)
        else:
            cache.bind_mixed(num_loops, policy)
        return
    if policy is not None or config.has_time_state:
        what = "states over time" if policy is None else "tokens of different loop counts"
        raise CacheError(f"past_key_values: {what} need a CognexisCache, got {type(cache).__name__}")
    lengths = [cache.get_seq_length(i) for i in range(len(cache.layers))]
    on_device = any(isinstance(n, Tensor) and n.device.type != "cpu" for n in lengths)
    if torch.compiler.is_compiling() or on_device:
        return
    needed = config.first_loop_slot + num_loops * config.num_recurrent_blocks
    if needed > len(lengths) and cache.layer_class_to_replicate is None:
        raise CacheError(
            f"past_key_values: {type(cache).__name__} has {len(lengths)} slots, num_loops={num_loops} needs {needed}; "
            "use CognexisCache or raise kv_slots"
        )
    filled = [i for i, n in enumerate(lengths) if int(n) > 0]
    if filled and filled != list(range(needed)):
        raise CacheError(
            f"past_key_values: the cache was filled with another number of loops than num_loops={num_loops}"
        )
