"""The key/value cache of a looped decoder: one slot per block of the prelude and coda, one per core block and loop.

A slot belongs to a stage, a block and, in the core, a loop; entries of one slot never serve another. Its bytes are

    2 * slots * B * G * S * D * itemsize

for S cached tokens: key and value heads are stored once, never repeated for the query heads. Slots of loops that a
request does not run stay empty. All loops of a request write every token, so one cache belongs to one loop count.
"""

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

from cognexis.errors import CacheError, InvalidConfigError


@dataclass(frozen=True)
class CacheSlot:
    """Whose keys and values a slot holds.

    Attributes:
        stage: "prelude", "recurrent" or "coda".
        block: index of the block within its stage.
        loop: loop number from 1 in the core; None elsewhere and for attention memory.
    """

    stage: Literal["prelude", "recurrent", "coda"]
    block: int
    loop: int | None = None


def slot_table(config: Any, loops: int | None = None) -> list[CacheSlot]:
    """The owner of every slot, in slot order: prelude, coda, attention memory, then loop by loop."""
    slots = [CacheSlot("prelude", i) for i in range(config.num_prelude_blocks)]
    slots += [CacheSlot("coda", i) for i in range(config.num_coda_blocks)]
    if config.input_injection == "attention_memory":
        slots += [CacheSlot("recurrent", i) for i in range(config.num_recurrent_blocks)]
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

    Attributes:
        num_loops: loop count the entries belong to; None while empty.

    Raises:
        InvalidConfigError: an unknown type, or a static cache without a length.
    """

    layers: list[Any]

    def __init__(
        self,
        config: Any,
        cache_type: str = "dynamic",
        max_cache_len: int | None = None,
        offloading: bool = False,
    ) -> None:
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
        super().__init__(layers=[self._new_layer(kind) for kind in config.layer_types], offloading=offloading)
        self.slots = slot_table(config)

    def _new_layer(self, layer_type: str) -> Any:
        window = self._config.sliding_window
        if self.cache_type == "dynamic":
            return (
                DynamicLayer() if layer_type == "full_attention" else DynamicSlidingWindowLayer(sliding_window=window)
            )
        if layer_type == "full_attention":
            return StaticLayer(max_cache_len=self.capacity)
        return StaticSlidingWindowLayer(max_cache_len=self.capacity, sliding_window=window)

    def bind(self, num_loops: int) -> None:
        """Reserve the cache for ``num_loops`` loops, adding slots where it may.

        Raises:
            CacheError: the entries belong to another loop count, the cache was released, or a static cache has too
                few slots.
        """
        if self.is_released:
            raise CacheError("past_key_values: this cache was released; build a new one")
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
        if missing:
            kinds = self._config.stage_layer_types("core")
            self.layers += [
                self._new_layer("full_attention" if self._config.global_tokens else kinds[i % len(kinds)])
                for i in range(len(missing))
            ]
            self.slots = slot_table(self._config, num_loops)
        self.num_loops = num_loops

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, G, T, D]`` keys and values to slot ``layer_idx`` and return all that a query may see.

        Raises:
            CacheError: the slot does not exist, was released, is full, or holds another batch size, number of heads,
                head width, dtype or device.
        """
        if self.is_released:
            raise CacheError("past_key_values: this cache was released; build a new one")
        if layer_idx >= len(self.layers):
            raise CacheError(f"past_key_values: slot {layer_idx} does not exist, the cache has {len(self.layers)}")
        layer = self.layers[layer_idx]
        if layer.is_initialized and layer.keys is not None and layer.keys.numel() > 0:
            self._check_fits(layer, key_states, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_fits(self, layer: Any, new: Tensor, layer_idx: int) -> None:
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
        is_first_full = layer_idx == next((i for i, sliding in enumerate(self.is_sliding) if not sliding), None)
        if self.cache_type == "static" and is_first_full and not torch.compiler.is_compiling():
            length = int(layer.get_seq_length())
            if length + new.shape[2] > self.capacity:
                raise CacheError(
                    f"past_key_values: {length} cached and {new.shape[2]} new tokens exceed the static capacity "
                    f"max_cache_len={self.capacity}"
                )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens (a count that is zero or negative, as in transformers).

        Raises:
            CacheError: a positive count, or more tokens than are cached.
        """
        length = int(self.get_seq_length())
        if tokens_to_remove > 0 or -tokens_to_remove > length:
            raise CacheError(
                f"tokens_to_remove={tokens_to_remove}: must lie between {-length} (all cached tokens) and 0"
            )
        for layer in self.layers:
            if layer.is_initialized:  # slots of loops that were not run hold nothing
                layer.crop(tokens_to_remove)

    def reset(self) -> None:
        """Empty every slot and forget the loop count; the cache can then serve another request."""
        super().reset()
        self.num_loops = None

    def release(self) -> None:
        """Free the memory for good; calling it again does nothing, any other use is an error."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.num_loops = None
        self.is_released = True

    def memory_bytes(self) -> int:
        """Bytes held by all slots."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def bind_cache(cache: Any, config: Any, num_loops: int) -> None:
    """Check that ``cache`` can serve ``num_loops`` loops; a stock transformers cache is checked by its lengths.

    Raises:
        CacheError: the cache was filled with another number of loops, or has too few slots.
    """
    if hasattr(cache, "bind"):
        cache.bind(num_loops)
        return
    layers = getattr(cache, "layers", None)
    if layers is None or torch.compiler.is_compiling() or getattr(cache, "is_compileable", False):
        return
    needed = config.first_loop_slot + num_loops * config.num_recurrent_blocks
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    if needed > len(layers) and not grows:
        raise CacheError(
            f"past_key_values: {type(cache).__name__} has {len(layers)} slots, num_loops={num_loops} needs {needed}; "
            "use CognexisCache or raise kv_slots"
        )
    lengths = {int(cache.get_seq_length(i)) for i in range(config.first_loop_slot, needed)}
    beyond = any(int(cache.get_seq_length(i)) for i in range(needed, len(layers)))
    if len(lengths) > 1 or (beyond and cache.get_seq_length(0)):
        raise CacheError(
            f"past_key_values: the cache was filled with another number of loops than num_loops={num_loops}"
        )
