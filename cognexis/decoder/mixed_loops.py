"""A forward whose tokens may run different numbers of loops: what it needs, what it refuses, and how it is run.

The driver of ``looping`` decides, an :class:`AdaptiveRun` computes, and the cache takes the keys at the end. Letters:
B rows, T tokens, H hidden width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cognexis.configuration_rules import has_time_state
from cognexis.decoder.adaptive_run import AdaptiveRun
from cognexis.decoder.cache import PeekKeys
from cognexis.decoder.inputs import last_real_token
from cognexis.decoder.recurrent_core import CoreOutput
from cognexis.decoder.state_layer import is_attention
from cognexis.errors import InvalidConfigError, NonFiniteError, ShapeMismatchError
from cognexis.looping.cost import core_flops_per_token
from cognexis.looping.driver import LoopBounds, LoopTrace, run_loops
from cognexis.looping.options import LoopOptions
from cognexis.looping.schedulers.base import SchedulerContext, reason_code, reason_name
from cognexis.looping.schedulers.guard import scheduler_fault
from cognexis.looping.session import LoopSession


@dataclass(frozen=True)
class MixedLoops:
    """What a call needs to know where tokens may run different numbers of loops.

    Attributes:
        options: bounds, scheduler and policies.
        is_real: bool ``[B, T]``, False at padding.
        session: the request, or None outside ``generate``.
        output_head: maps normed states to logits; None for a body on its own.
        fitting_loops: most loops whose keys the request's limit of cache bytes has room for; None without a limit.
    """

    options: LoopOptions
    is_real: Tensor
    session: LoopSession | None
    output_head: Any
    fitting_loops: int | None = None


def depth_policy(options: LoopOptions, cache: Any, session: LoopSession | None) -> str | None:
    """How keys are kept where tokens may run different numbers of loops; None where all run the same number."""
    if options.mixes_depths or session is not None:
        return options.cache_policy
    is_mixed = getattr(cache, "policy", None) is not None and int(cache.get_seq_length()) > 0
    return options.cache_policy if is_mixed else None


def check_mixed(body: Any, options: LoopOptions, batch_size: int, length: int) -> None:
    """Refuse what cannot work in a call of ``batch_size`` rows and ``length`` tokens.

    Raises:
        ShapeMismatchError: loops by row for another number of rows.
        InvalidConfigError: training where rows stop as a whole or with recomputed activations, or a scheduler that
            reads a value head where there is none.
    """
    if options.row_loops is not None and tuple(options.row_loops.shape) != (batch_size,):
        raise ShapeMismatchError(
            f"num_loops: a tensor with one number for each row must have shape {(batch_size,)}, got "
            f"{tuple(options.row_loops.shape)}",
            expected=(batch_size,),
            actual=tuple(options.row_loops.shape),
        )
    if body.training and options.is_adaptive and options.dependency(length) == "row":
        raise InvalidConfigError(
            "halt_dependency='row': later tokens would decide about earlier ones in training; use prefix",
            path="halt_dependency",
        )
    if body.training and body.recurrent.gradient_checkpointing:
        raise InvalidConfigError(
            "loop_mode: tokens of different loop counts are not recomputed in the backward pass; turn gradient "
            "checkpointing off",
            path="loop_mode",
        )
    if body.training and (body.config.backprop_loops is not None or body.config.state_retention == "checkpointed"):
        raise InvalidConfigError(
            "loop_mode: tokens of different loop counts carry gradients through all of them; set backprop_loops=None "
            "and a state_retention other than checkpointed",
            path="backprop_loops",
        )
    core_kinds = body.config.stage_layer_types("core")
    if foreign := [kind for kind in core_kinds if not (is_attention(kind) or has_time_state(kind))]:
        raise InvalidConfigError(
            f"loop_mode: the core has layers of type {foreign[0]!r}, whose keys at frozen states are not known; use a "
            "fixed number of loops",
            path="loop_mode",
        )
    if options.cache_policy != "depth_indexed" and any(map(has_time_state, core_kinds)):
        raise InvalidConfigError(
            f"cache_policy={options.cache_policy!r}: states over time have the exact form only; use depth_indexed",
            path="cache_policy",
            value=options.cache_policy,
        )
    if options.scheduler is not None and "predicted_gain" in options.scheduler.signals and body.value_head is None:
        raise InvalidConfigError(
            f"scheduler={options.scheduler.name!r}: the model has no value head; fit one with `cognexis scheduler "
            "fit`, or use rule_based",
            path="scheduler",
            value=options.scheduler.name,
        )


def compacts(body: Any, device: torch.device) -> bool:
    """Whether stopped tokens are left out of the computation."""
    return body.compaction == "exact" or (body.compaction == "auto" and device.type == "cpu")


def _form(body: Any, device: torch.device) -> str:
    """How stopped tokens are left out; see :class:`AdaptiveRun`."""
    return ("exact" if body.compaction == "exact" else "grouped") if compacts(body, device) else "off"


def run_mixed(
    body: Any,
    h0: Tensor,
    loops: MixedLoops,
    masks: dict[str, Any],
    core_masks: dict[str, Any],
    record: bool,
    shared: dict[str, Any],
) -> CoreOutput:
    """Run the core of ``body`` from ``h0`` ``[B, T, H]``, and hand the keys to the cache.

    Args:
        body: a ``CognexisModel``.
        masks: attention masks by layer type; ``core_masks`` those of the core.
        record: also note what happened by loop.
        shared: ``position_embeddings``, ``position_ids``, ``past_key_values`` and what goes down to attention.

    Raises:
        NonFiniteError: in training, a state that is not finite.
        BudgetExceededError: time or budget ends below the smallest number of loops.
    """
    options, session, cache = loops.options, loops.session, shared["past_key_values"]
    body.recurrent.add_sites(options.num_loops)
    takes_part = loops.is_real
    if session is not None and session.finished is not None:
        takes_part = takes_part & ~session.finished[:, None].to(h0.device)
    run = AdaptiveRun(
        body.recurrent,
        h0,
        core_masks,
        shared,
        loops.is_real,
        cache=cache,
        compaction=_form(body, h0.device),
        reduces_rows=options.loop_mode == "adaptive_sequence",
        probe=_probe_of(body, masks, shared, loops),
        value_head=body.value_head,
    )
    budget = None
    if session is not None and session.budget is not None:
        past = 0 if cache is None else int(cache.depth_layers[0].get_seq_length())
        flops = core_flops_per_token(body.config, past + h0.shape[1], h0.shape[1])
        budget = session.budget.begin_pass(h0.shape[0], h0.device, flops, loops.fitting_loops)
    if options.scheduler is not None and (session is None or session.is_first_pass):
        options.scheduler.keeps_record = record if session is None else session.keeps_record
        name = "forward" if session is None else session.request_id
        context = SchedulerContext(name, options.min_loops, options.num_loops, quality_tier=options.quality_tier)
        with scheduler_fault(options.scheduler, "begin_request"):
            options.scheduler.begin_request(context)
    is_prompt = session is not None and session.is_reading_prompt
    dependency = options.dependency(h0.shape[1], is_prompt)
    trace = LoopTrace() if record else None
    limits = None if options.row_loops is None else options.row_loops.to(h0.device)[:, None]
    state = run_loops(
        run,
        takes_part,
        LoopBounds(min(options.min_loops, options.num_loops), options.num_loops, limits),
        options.scheduler,
        dependency=dependency,
        settled_after=_depth_of_cached(cache) if dependency == "prefix" else None,
        budget=budget,
        is_risky=None if session is None else session.is_risky,
        quality_tier=options.quality_tier,
        trace=trace,
    )
    if body.training and bool((failed := state.reasons == reason_code("error")).any()):
        raise NonFiniteError(f"hidden_states: NaN or infinity after loop {int(state.loops[failed].min())}")
    run.finish(state.loops)
    return CoreOutput(
        hidden_states=run.state,
        states=run.retained(),
        is_finite=None,
        gate_mean=None,
        norms=None,
        halt=state,
        trace=trace,
        computed_tokens=run.computed_tokens,
        num_probes=run.num_probes,
    )


def _depth_of_cached(cache: Any) -> Tensor | None:
    """Loops ``[B, 1]`` after which all cached tokens show their final keys; None where they do from the start."""
    if cache is None or not cache.policy.is_exact:
        return None
    deepest = cache.depth_layers[0].deepest
    return None if deepest is None else deepest[:, None]


def _probe_of(body: Any, masks: dict[str, Any], shared: dict[str, Any], loops: MixedLoops) -> Any:
    """Coda, norm and head on an intermediate state ``[B, T, H]``, without writing to the cache."""
    peek = shared | {"past_key_values": PeekKeys(shared["past_key_values"])}

    def probe(state: Tensor, last_only: bool) -> Tensor:
        normed = body.final_norm(body.coda(state, masks=masks, **peek))
        if last_only:
            normed = normed.take_along_dim(last_real_token(loops.is_real)[:, None, None], dim=1)
        if loops.output_head is not None:
            return loops.output_head(normed)
        if not body.config.tie_word_embeddings:
            raise InvalidConfigError("scheduler: it looks at predictions, and the body alone has no head")
        return nn.functional.linear(normed, body.embed_tokens.weight)

    return probe


def named_reasons(codes: Any) -> Any:
    """Halt reasons in words, from nested lists of codes."""
    return [named_reasons(code) if isinstance(code, list) else reason_name(code) for code in codes]
