"""The shared core, applied once per loop.

With h_0 the prelude output and R the one shared block, loop t (from 1) computes

    x       = inject(h_{t-1}, h_0)                              (injection at the "pre" site)
    u       = R(x)                                              (then inject(u, h_0) at the "post" site)
    g       = sigmoid(W_g norm(h_{t-1}) + b_g [+ W_0 h_0] [+ e_t])
    h_t     = close(g * u + (1 - g) * h_{t-1})                  (h_t = close(u) without a gate)

``close`` is one shared norm, or the identity. ``inject`` is one of

    none              x = h
    residual          x = h + beta * P(h_0)                     P linear or the identity
    concat_project    x = W [h; h_0]                            starts as [I | beta I]
    gate_condition    x = h, and the gate also sees h_0
    attention_memory  x = h, and attention also reads keys and values made from h_0

Every parameter is shared by all loops, so autograd sums the loops' gradients. The optional loop embedding e_t is the
usual sinusoid of t through a learned map, so it exists for every t. ``recurrent_init="random"`` starts from unit
normal noise instead of h_0: fresh noise in training, a fixed function of the position in evaluation, so that cached
decoding, batching and repetition cannot change the result. With ``backprop_loops=k`` only the last k loops carry
gradients. Letters: B batch, T tokens, H hidden width, L loops.
Reference: Dehghani et al. 2019, "Universal Transformers"; Geiping et al. 2025, "Scaling up Test-Time Compute with
Latent Reasoning" (injection, random start, truncated backpropagation).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from cognexis.configuration_rules import has_time_state
from cognexis.decoder.block import TransformerBlock
from cognexis.decoder.block_stack import block_inputs, drawn_skip
from cognexis.decoder.norm import build_norm, compute_dtype
from cognexis.decoder.stability import all_finite
from cognexis.decoder.state_layer import ForeignBlock, StateLayer, is_attention
from cognexis.errors import InvalidConfigError
from cognexis.looping.driver import LoopTrace
from cognexis.looping.token_mask import HaltState


@dataclass
class CoreOutput(ModelOutput):
    """What the loops leave behind; of a kind whose tensors FSDP finds, since the core is a sharding unit.

    Attributes:
        hidden_states: ``[B, T, H]``, the state after the last loop.
        states: retained states in loop order, each ``[B, T, H]``; empty under ``final_only``.
        is_finite: ``[L + 1]`` flags on the device, entry 0 for the input; None outside training and recording.
        gate_mean: ``[L]`` mean gate of each loop, NaN for a skipped one; None without a gate or without recording.
        norms: ``[L + 1]`` mean state norm, entry 0 for the input; None without recording.
        halt: loops and halt reason of every token, where they may differ; None otherwise.
        trace: what happened by loop; None without recording and where all tokens run the same loops.
        computed_tokens: token positions computed, all loops together, where they may differ.
        num_probes: times that coda and head were run to measure, where they may be; None otherwise.
    """

    hidden_states: Tensor | Any = None
    states: tuple[Tensor, ...] | Any = None
    is_finite: Tensor | None = None
    gate_mean: Tensor | None = None
    norms: Tensor | None = None
    halt: HaltState | None = None
    trace: LoopTrace | None = None
    computed_tokens: int | None = None
    num_probes: int | None = None


class LoopState(nn.Module):
    """Passes the state after each loop through; the place for hooks that observe the recurrence and its gate."""

    def forward(self, state: Tensor, gate: Tensor | None = None) -> Tensor:
        return state


class CoreGate(nn.Module):
    """The update gate g of the recurrence, computed in at least float32, strictly inside (0, 1)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden_size, spec = config.hidden_size, config.block_spec("core")
        self.norm = build_norm(spec.norm_type, hidden_size, spec.rms_norm_eps)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=True)
        self.proj.initial_bias = float(config.gate_init_bias)  # type: ignore[assignment]
        self.condition_proj = None
        if config.input_injection == "gate_condition":
            self.condition_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.loop_proj = nn.Linear(hidden_size, hidden_size, bias=False) if config.gate_loop_embedding else None

    def forward(self, state: Tensor, h0: Tensor, loop_index: int) -> Tensor:
        """Gate ``[B, T, H]`` for the loop ``loop_index`` (from 0)."""
        logit = self.proj(self.norm(state))
        if self.condition_proj is not None:
            logit = logit + self.condition_proj(h0)
        if self.loop_proj is not None:
            logit = logit + self.loop_proj(loop_embedding(loop_index + 1, state))
        gate = torch.sigmoid(logit.to(compute_dtype(logit.dtype)))
        edge = torch.finfo(gate.dtype).eps
        return gate.clamp(edge, 1.0 - edge)


class RecurrentCore(nn.Module):
    """The shared block(s) with gate, injection and closing norm.

    Attributes:
        gradient_checkpointing: set by transformers; recomputes the core in the backward pass.
        checkpoint_every_loops: loops that form one recomputed segment; only the states between segments are kept.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]
    _compiled_once: Callable[..., Any] | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_every_loops = 1
        spec, hidden_size = config.block_spec("core"), config.hidden_size
        self.layer_types = config.stage_layer_types("core")
        has_memory = config.input_injection == "attention_memory"
        first_memory_slot = config.num_prelude_blocks + config.num_coda_blocks
        residual: dict[str, Any] = {
            "residual_mode": config.recurrent_residual_mode,
            "residual_scale": config.residual_scale,
        }

        def block(index: int, layer_type: str) -> nn.Module:
            slots = [self._slot(index, loop) for loop in range(config.kv_slots)]
            if has_time_state(layer_type):
                return StateLayer(config, layer_type, "core", slots, **residual)
            if not is_attention(layer_type):
                return ForeignBlock(config, layer_type, "core", slots)
            return TransformerBlock(
                config,
                spec,
                slots,
                sliding_window=config.sliding_window if layer_type == "sliding_attention" else None,
                memory_slot=first_memory_slot + index if has_memory else None,
                sandwich=config.recurrent_norm == "sandwich",
                **residual,
            )

        self.blocks = nn.ModuleList(block(index, kind) for index, kind in enumerate(self.layer_types))
        self.gate = CoreGate(config) if config.recurrent_gating else None
        self.injection_proj: Any = None
        if config.input_injection == "residual" and config.injection_projection == "linear":
            self.injection_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        elif config.input_injection == "concat_project":
            self.injection_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
            self.injection_proj.initial_identity_scale = float(config.injection_scale)
        self.memory_norm = build_norm(spec.norm_type, hidden_size, spec.rms_norm_eps) if has_memory else None
        closes = config.recurrent_norm in ("closing", "sandwich")
        self.closing_norm = build_norm(spec.norm_type, hidden_size, spec.rms_norm_eps) if closes else None
        self.loop_state = LoopState()

    def _slot(self, block_index: int, loop_index: int) -> int:
        return int(self.config.first_loop_slot + loop_index * len(self.layer_types) + block_index)

    @property
    def state_layer(self) -> StateLayer | None:
        """The only block, where that carries a state over time."""
        block = self.blocks[0]
        return block if isinstance(block, StateLayer) and len(self.blocks) == 1 else None

    def add_sites(self, num_loops: int) -> None:
        """Make sure that loops 1..``num_loops`` have a slot in every block; new ones hold no parameters."""
        for index, block in enumerate(self.blocks):
            if isinstance(block, StateLayer):
                for loop in range(len(block.slots), num_loops):
                    block.add_slot(self._slot(index, loop))
            elif isinstance(block, TransformerBlock):
                for loop in range(len(block.attention.sites), num_loops):
                    block.attention.add_site(self.config, self.config.block_spec("core"), self._slot(index, loop))

    def inject(self, state: Tensor, h0: Tensor) -> Tensor:
        """Bring h_0 back into ``state``; both ``[B, T, H]``."""
        if self.config.input_injection == "residual":
            source = h0 if self.injection_proj is None else self.injection_proj(h0)
            return state + self.config.injection_scale * source
        if self.config.input_injection == "concat_project":
            return self.injection_proj(torch.cat((state, h0), dim=-1))
        return state

    def loop(self, state: Tensor, h0: Tensor, *inputs: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """One application of the core, with the arguments of ``_once``; returns the new state and the gate."""
        if self.training and drawn_skip(self.config.recurrent_stochastic_depth):
            return state, None
        is_compiled = self.training and self._compiled_once is not None
        once: Any = self._compiled_once if is_compiled else self._once
        return once(state, h0, *inputs, **kwargs)

    def compile_loop(self, **options: Any) -> None:
        """Compile one application of the core, for training; the graphs serve every loop of every loop count.

        Copies and pickles of this module are not compiled.
        """
        self._compiled_once = torch.compile(self._once, **options)

    def __getstate__(self) -> Any:
        return {**super().__getstate__(), "_compiled_once": None}  # it is bound to this very object

    def _once(
        self,
        state: Tensor,
        h0: Tensor,
        loop_index: int,
        masks: dict[str, Any],
        memories: list[Any],
        resets: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        update = self.entered(state, h0)
        for block, layer_type, memory in zip(self.blocks, self.layer_types, memories, strict=True):
            own = block_inputs(layer_type, masks, resets) | ({} if memory is None else {"memory": memory})
            update = block(update, loop_index=loop_index, **own, **kwargs)
        update = self.inject(update, h0) if self.config.injection_site == "post" else update
        gate = None
        if self.gate is not None:
            gate = self.gate(state, h0, loop_index)
            mixed = gate * update.to(gate.dtype) + (1.0 - gate) * state.to(gate.dtype)
            update = mixed.to(state.dtype)
        return (update if self.closing_norm is None else self.closing_norm(update)), gate

    def _segment(
        self, state: Tensor, h0: Tensor, *memory: Tensor, loops: range, record: bool, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """Run ``loops``; returns their states, then the gate means.

        Tensors come in and go out flat, as checkpointing wants them; ``memory`` is a key and a value for each block.
        """
        pairs: list[Any] = list(zip(memory[::2], memory[1::2], strict=True)) or [None] * len(self.blocks)
        kwargs["memories"] = pairs
        states, gates = [], []
        for loop_index in loops:
            state, gate = self.loop(state, h0, loop_index, **kwargs)
            state = self.loop_state(state, gate)
            states.append(state)
            if record and self.gate is not None:  # a loop that stochastic depth skipped has no gate
                skipped = state.new_full((), float("nan"), dtype=torch.float32)
                gates.append(skipped if gate is None else gate.detach().float().mean())
        return (*states, *gates)

    def forward(
        self,
        h0: Tensor,
        num_loops: int,
        masks: dict[str, Any],
        position_embeddings: tuple[Tensor, Tensor],
        position_ids: Tensor,
        past_key_values: Any = None,
        record: bool = False,
        **kwargs: Any,
    ) -> CoreOutput:
        """Run ``num_loops`` loops from h_0 ``[B, T, H]``.

        Args:
            h0: prelude output.
            num_loops: loops to run, at least 1.
            masks: attention mask of each layer type.
            position_embeddings: cosines and sines shared by all loops.
            position_ids: ``[B or 1, T]``, used by the random start.
            past_key_values: cache with a slot per block and loop, or None.
            record: also return norms and gate means by loop.
            kwargs: handed down to the attention interface.
        """
        self.add_sites(num_loops)
        kwargs |= {"masks": masks, "position_embeddings": position_embeddings, "position_ids": position_ids}
        kwargs["past_key_values"] = past_key_values
        memories = self.memories(h0, position_embeddings, None if self._is_checkpointing else past_key_values)
        memory = [tensor for pair in memories if pair is not None for tensor in pair]
        state = self.initial_state(h0, position_ids)
        watch = (self.training or record) and not torch.compiler.is_compiling()
        is_finite, norms, gates = [], [], []

        def observe(observed: Tensor) -> None:
            if watch:
                is_finite.append(all_finite(observed.detach()))
            if record:
                norms.append(observed.detach().float().norm(dim=-1).mean())

        observe(state)
        kept: list[Tensor] = []
        wanted = self._wanted_states(num_loops)
        for loops in self._segments(num_loops):
            run = self._runner(loops, num_loops)
            outputs = run(state, h0, *memory, loops=loops, record=record, **kwargs)
            states = outputs[: len(loops)]
            state = states[-1]
            gates += outputs[len(loops) :]
            for loop_index, loop_state in zip(loops, states, strict=True):
                observe(loop_state)
                if loop_index + 1 in wanted:
                    kept.append(loop_state)
        return CoreOutput(
            hidden_states=state,
            states=tuple(kept),
            is_finite=torch.stack(is_finite) if watch else None,
            gate_mean=torch.stack(gates) if gates else None,
            norms=torch.stack(norms) if record else None,
        )

    def memories(self, h0: Tensor, position_embeddings: Any, past_key_values: Any) -> list[Any]:
        """Key and value of the attention memory of each block; None for each without one."""
        if self.memory_norm is None:
            return [None] * len(self.blocks)
        source = self.memory_norm(h0)
        blocks: Any = self.blocks
        return [b.attention.project_memory(source, position_embeddings, past_key_values) for b in blocks]

    def frozen_keys(
        self, state: Tensor, h0: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, G, T, D]`` that a core of one block makes of ``state`` ``[B, T, H]`` in any loop."""
        block: Any = self.blocks[0]
        return block.attention.project_keys(block.attention_norm(self.entered(state, h0)), position_embeddings)

    def entered(self, state: Tensor, h0: Tensor) -> Tensor:
        """What the first block reads ``[B, T, H]`` of ``state`` ``[B, T, H]`` in any loop."""
        return self.inject(state, h0) if self.config.injection_site == "pre" else state

    def initial_state(self, h0: Tensor, position_ids: Tensor) -> Tensor:
        """The state ``[B, T, H]`` before the first loop."""
        if self.config.recurrent_init == "h0":
            return h0
        if self.training:
            return torch.randn_like(h0)
        return position_noise(position_ids, h0.shape[-1]).to(h0.dtype).expand_as(h0)

    def _wanted_states(self, num_loops: int) -> set[int]:
        retention = self.config.state_retention
        if retention == "final_only":
            return set()
        if retention != "selected":
            return set(range(1, num_loops + 1))
        if beyond := [s for s in self.config.selected_states if s > num_loops]:
            raise InvalidConfigError(
                f"selected_states={self.config.selected_states}: loops {beyond} do not run with num_loops={num_loops}",
                path="selected_states",
                value=self.config.selected_states,
            )
        return set(self.config.selected_states)

    def _segments(self, num_loops: int) -> list[range]:
        """Loops in runs that are recomputed together; a run never mixes loops with and without gradient."""
        k = self.checkpoint_every_loops if self._is_checkpointing else num_loops
        k = 1 if self.config.state_retention == "checkpointed" else k
        first = self._first_gradient_loop(num_loops)
        starts = sorted({*range(0, first, max(first, 1)), *range(first, num_loops, max(k, 1))})
        return [range(a, b) for a, b in zip(starts, [*starts[1:], num_loops], strict=True)]

    def _first_gradient_loop(self, num_loops: int) -> int:
        k = self.config.backprop_loops
        return max(0, num_loops - k) if k is not None and self.training and torch.is_grad_enabled() else 0

    @property
    def _is_checkpointing(self) -> bool:
        return self.gradient_checkpointing and self.training

    def _runner(self, loops: range, num_loops: int) -> Callable[..., Any]:
        """How to run a segment: without gradient, recomputed in the backward pass, or plainly."""
        if loops.start < self._first_gradient_loop(num_loops):
            return self._without_gradient
        if self._is_checkpointing:
            return lambda *tensors, **kw: self._gradient_checkpointing_func(
                partial(self._segment, **kw | {"past_key_values": None}), *tensors
            )
        if self.config.state_retention == "checkpointed" and self.training:
            return lambda *tensors, **kw: checkpoint(partial(self._segment, **kw), *tensors, use_reentrant=False)
        return self._segment

    def _without_gradient(self, *tensors: Tensor, **kwargs: Any) -> Any:
        with torch.no_grad():
            result = self._segment(*tensors, **kwargs)
        # Autocast keeps casts made without gradient; reusing them would cut the shared weights off the graph.
        torch.clear_autocast_cache()
        return result


def loop_embedding(loop: int, like: Tensor) -> Tensor:
    """Sinusoid ``[H]`` of the loop number, in the dtype and on the device of ``like`` ``[..., H]``."""
    half = (like.shape[-1] + 1) // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=like.device, dtype=torch.float32) / half)
    angles = loop * rates
    return torch.cat((angles.sin(), angles.cos()))[: like.shape[-1]].to(like.dtype)


def position_noise(position_ids: Tensor, width: int) -> Tensor:
    """Unit normal noise ``[B, T, width]`` that depends on position and feature only, in float32.

    Each (position, feature) is mixed into 32 bits by integer arithmetic, equal on every device, and two such numbers
    give a normal one by the Box-Muller transform. Reference: Wellons 2018, "hash-prospector" (the 32-bit mixer).
    """
    features = torch.arange(width, device=position_ids.device, dtype=torch.int64)
    counter = position_ids[..., None].to(torch.int64) * width + features

    def uniform(salt: int) -> Tensor:
        x = (counter * 2 + salt) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        x = x ^ (x >> 16)
        return ((x >> 8).to(torch.float32) + 0.5) / 2**24

    return (-2.0 * uniform(0).log()).sqrt() * (2.0 * math.pi * uniform(1)).cos()
