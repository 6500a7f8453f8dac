"""Cognexis: a causal language model whose reasoning depth is a run-time number.

    h_0    = prelude(embed(ids) * embedding_scale)          distinct blocks, run once
    h_t    = core(h_{t-1}, h_0)      t = 1 .. num_loops      one shared block, run num_loops times
    logits = head(final_norm(coda(h_L)))                    distinct blocks, run once; the head is tied

The same weights serve every loop count. Positions, masks and rotary angles are computed once and shared by all loops.
What is unusual: ``config.num_hidden_layers`` counts key/value slots (see ``cache``), ``num_loops`` is an argument of
``forward`` and ``generate``, and outputs carry the loops that were run.
Reference: Dehghani et al. 2019, "Universal Transformers"; Geiping et al. 2025, arXiv 2502.05171.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from cognexis.configuration_cognexis import CognexisConfig
from cognexis.decoder.block_stack import BlockStack
from cognexis.decoder.cache import CognexisCache, bind_cache
from cognexis.decoder.generation import LoopedGenerationMixin
from cognexis.decoder.inputs import (
    check_attention_mask,
    check_inputs_embeds,
    check_mask_type,
    check_position_shape,
    check_positions,
    check_token_ids,
    default_positions,
    last_real_token,
    packed_documents,
    readable_keys,
    real_tokens,
    time_resets,
)
from cognexis.decoder.loss import causal_lm_loss
from cognexis.decoder.masks import build_masks, require_maskable_attention, with_memory
from cognexis.decoder.mixed_loops import MixedLoops, check_mixed, compacts, depth_policy, run_mixed
from cognexis.decoder.norm import build_norm
from cognexis.decoder.outputs import CognexisCausalLMOutput, CognexisModelOutput, body_output, kept_positions
from cognexis.decoder.pretrained import CognexisPreTrainedModel, EmbeddingOutput
from cognexis.decoder.recurrent_core import CoreOutput, RecurrentCore
from cognexis.decoder.rope import CognexisRotaryEmbedding
from cognexis.decoder.stability import require_finite_states
from cognexis.decoder.state_layer import compiles_as_one_graph
from cognexis.errors import CacheError, InvalidConfigError, NonFiniteError
from cognexis.looping.options import (
    CALL_KEYWORDS,
    LOOP_MODE_ALIASES,
    LoopOptions,
    calibrated_dependency,
    refuse_misspelt,
    resolve_loop_options,
)
from cognexis.looping.session import LoopSession
from cognexis.looping.value_head import ValueHead


class CognexisModel(CognexisPreTrainedModel):
    """The body: embedding, prelude, looped core, coda and final norm.

    Attributes:
        value_head: predicts what further loops gain; None unless ``config.value_head`` describes one.
        compaction: "exact" leaves stopped tokens out of the computation and waits for the device once per loop,
            "off" computes all of them; "auto" leaves them out on a CPU as far as that pays, and not elsewhere.
    """

    def __init__(self, config: CognexisConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_dropout = EmbeddingOutput(config.embedding_dropout)
        self.rotary_emb = CognexisRotaryEmbedding(config)
        self.prelude = BlockStack(config, "prelude", first_slot=0)
        self.recurrent = RecurrentCore(config)
        self.coda = BlockStack(config, "coda", first_slot=config.num_prelude_blocks)
        self.final_norm = build_norm(config.final_norm, config.hidden_size, config.rms_norm_eps)
        self.value_head = None if config.value_head is None else ValueHead(config.hidden_size, config.value_head)
        self.compaction = "auto"
        self.gradient_checkpointing = False
        self._can_compile_fullgraph = compiles_as_one_graph(self)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | Tensor | None = None,
        document_ids: Tensor | None = None,
        loop_mode: str | None = None,
        min_loops: int | None = None,
        max_loops: int | None = None,
        scheduler: Any = None,
        quality_tier: str | None = None,
        halt_dependency: str | None = None,
        cache_policy: str | None = None,
        allow_extrapolation: bool | None = None,
        return_loop_stats: bool | None = None,
        loop_session: LoopSession | None = None,
        output_head: Any = None,
        **kwargs: Any,
    ) -> CognexisModelOutput:
        """Run the body.

        Args:
            input_ids: ``[B, T]``; exactly one of this and ``inputs_embeds`` ``[B, T, H]``.
            attention_mask: ``[B, past + T]``, zeros at padding (either side); a finished 4-D mask; or a dictionary of
                masks by layer type.
            position_ids: ``[B or 1, T]``; by default real tokens are counted, so padding does not shift positions.
                Positions that restart mark packed documents when there is neither mask nor cache.
            past_key_values: a :class:`CognexisCache` or another transformers cache.
            use_cache: build and return a cache; never for packed documents.
            num_loops: loops to run in fixed mode: an int, an integer tensor without axes, or ``[B]``, one for each
                row; ``config.default_loops`` when None.
            document_ids: ``[B, T]`` packed documents, -1 for padding; ``seq_idx`` and ``cu_seq_lens_q`` are read too.
            loop_mode: "fixed"; "adaptive_sequence": a scheduler stops rows; "adaptive_token": it stops tokens.
            min_loops: lower bound of this call.
            max_loops: upper bound of this call.
            scheduler: a name, a dictionary or a ``LoopScheduler``; by default that of ``scheduler.json`` or rules.
            quality_tier: "fast", "balanced" or "thorough": bounds and thresholds within those of the call.
            halt_dependency: whose agreement a stop needs: "token" (default for one token), "prefix" (else) or "row".
            cache_policy: "depth_indexed" (exact), or the approximate "last_exited", "modulo_k" and "first_loop".
            allow_extrapolation: permit more loops than ``config.max_loops``.
            return_loop_stats: fill ``halt_reasons`` and ``loop_diagnostics``.
            loop_session: what ``generate`` knows about the request: ended rows and budgets.
            output_head: maps normed states to logits, for schedulers that look at predictions.
            kwargs: handed down to the attention implementation.

        Raises:
            InvalidConfigError: loop arguments or positions out of range, or a misspelt loop argument.
            ShapeMismatchError, InvalidTokenIdError: inputs of the wrong shape, dtype or range.
            CacheError: the cache does not fit the call.
            NonFiniteError: in training, NaN or infinity in a loop.
        """
        if not torch.compiler.is_compiling():
            refuse_misspelt(kwargs)
        given = {"loop_mode": loop_mode, "num_loops": num_loops, "min_loops": min_loops, "max_loops": max_loops}
        given |= {"scheduler": scheduler, "quality_tier": quality_tier, "halt_dependency": halt_dependency}
        given |= {"cache_policy": cache_policy, "allow_extrapolation": allow_extrapolation}
        options = self.loop_options(given)
        require_maskable_attention(self.config)
        hidden_states = self.embed(input_ids, inputs_embeds)
        batch_size, length = hidden_states.shape[:2]
        check_mask_type(attention_mask)
        check_position_shape(position_ids, batch_size, length)
        documents = packed_documents(batch_size, length, document_ids, position_ids, attention_mask, kwargs)
        if documents is not None:
            if past_key_values is not None and int(past_key_values.get_seq_length()) > 0:
                raise CacheError(
                    "past_key_values: packed documents cannot continue a cache; pass past_key_values=None"
                )
            past_key_values, use_cache = None, False
        if use_cache and past_key_values is None:
            past_key_values = CognexisCache(self.config)
        policy = depth_policy(options, past_key_values, loop_session)
        if policy is not None:
            check_mixed(self, options, batch_size, length)
        if past_key_values is not None:
            bind_cache(past_key_values, self.config, options.num_loops, length, policy)
        if "cache" not in kwargs:  # a paged engine brings masks of its own
            keys = readable_keys(past_key_values, length)
            check_attention_mask(attention_mask, batch_size, self.config.num_attention_heads, length, keys)
        if position_ids is None:
            restarts = documents if self.config.document_boundary_attention else None
            position_ids = default_positions(attention_mask, restarts, past_key_values, length, hidden_states.device)
        if self.config.has_attention:
            check_positions(self.config, position_ids)
        masks = build_masks(
            self.config,
            hidden_states,
            attention_mask,
            past_key_values,
            position_ids,
            documents if self.config.document_boundary_attention else None,
            materialise=policy is not None and length > 1 and compacts(self, hidden_states.device),
        )
        shared = {
            "position_embeddings": self.rotary_emb(hidden_states, position_ids=position_ids),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            **kwargs,
        }
        if self.config.has_time_state:
            parted = documents if self.config.document_boundary_attention else None
            shared["resets"] = time_resets(attention_mask, parted, hidden_states)
        run = self.decode_step if length == 1 and past_key_values is not None else self.prefill
        loops = None
        if policy is not None:
            is_real = real_tokens(attention_mask, documents, hidden_states)
            fitting = (
                None
                if loop_session is None
                else loop_session.loops_that_fit(
                    self.config, past_key_values, batch_size, length, hidden_states.element_size()
                )
            )
            loops = MixedLoops(options, is_real, loop_session, output_head, fitting)
        hidden_states, core = run(hidden_states, options, masks, bool(return_loop_stats), loops, **shared)
        if self.training:
            require_finite_states(core.is_finite)
        return body_output(self, hidden_states, past_key_values, options, core, bool(return_loop_stats))

    def loop_options(self, given: dict[str, Any]) -> LoopOptions:
        """What a call with these loop arguments may run, the rest being taken from the checkpoint.

        Args:
            given: values by the names in ``CALL_KEYWORDS``; others are not read.

        Raises:
            InvalidConfigError: see :func:`resolve_loop_options`.
        """
        known = {name: given[name] for name in CALL_KEYWORDS if given.get(name) is not None}
        return resolve_loop_options(
            self.config,
            **known,
            default_scheduler=self.scheduler_record.get("scheduler"),
            default_dependency=calibrated_dependency(self.scheduler_record),
            overthinking_threshold=self.scheduler_record.get("overthinking_threshold"),
        )

    def prefill(
        self,
        hidden_states: Tensor,
        options: LoopOptions,
        masks: dict[str, Any],
        record: bool = False,
        loops: MixedLoops | None = None,
        **shared: Any,
    ) -> tuple[Tensor, CoreOutput]:
        """Run all stages on embeddings ``[B, T, H]``: a prompt, a chunk of one, or a training batch.

        Args:
            loops: where tokens may run different numbers of loops.

        Returns:
            The normed state ``[B, T, H]`` that the head consumes, and what the core left behind.
        """
        h0 = self.prelude(hidden_states, masks=masks, **shared)
        core_masks = with_memory(masks, self.config)
        if loops is None:
            core = self.recurrent(h0, options.num_loops, masks=core_masks, record=record, **shared)
        else:
            core = run_mixed(self, h0, loops, masks, core_masks, record, shared)
        return self.final_norm(self.coda(core.hidden_states, masks=masks, **shared)), core

    def decode_step(
        self,
        hidden_states: Tensor,
        options: LoopOptions,
        masks: dict[str, Any],
        record: bool = False,
        loops: MixedLoops | None = None,
        **shared: Any,
    ) -> tuple[Tensor, CoreOutput]:
        """As :meth:`prefill`, on one new token per row, ``[B, 1, H]``; earlier tokens are read from the cache."""
        return self.prefill(hidden_states, options, masks, record, loops, **shared)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Any) -> Tensor:
        """Scaled embeddings ``[B, T, H]`` of ids ``[B, T]``, or of embeddings that are given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidConfigError("specify exactly one of input_ids and inputs_embeds", path="input_ids")
        if inputs_embeds is not None:
            check_inputs_embeds(inputs_embeds, self.config.hidden_size)
        elif input_ids is not None:
            check_token_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids.long())
        scale = self.config.embedding_scale
        return self.embedding_dropout(inputs_embeds if scale == 1.0 else inputs_embeds * scale)


class CognexisForCausalLM(CognexisPreTrainedModel, LoopedGenerationMixin):  # type: ignore[misc]
    """The language model: the body with a head tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CognexisConfig) -> None:
        super().__init__(config)
        self.model = CognexisModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.loss_function = causal_lm_loss
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.post_init()
        if self.generation_config is not None:  # keep loop defaults when the generation config is saved and loaded
            self.generation_config._from_model_config = False

    def read_out(self, hidden_states: Tensor) -> Tensor:
        """Logits ``[..., V]`` of normed states; a method, because hooks that move modules look into arguments."""
        return self.lm_head(hidden_states)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | Tensor | None = None,
        document_ids: Tensor | None = None,
        loss_mask: Tensor | None = None,
        loop_mode: str | None = None,
        min_loops: int | None = None,
        max_loops: int | None = None,
        scheduler: Any = None,
        quality_tier: str | None = None,
        halt_dependency: str | None = None,
        cache_policy: str | None = None,
        allow_extrapolation: bool | None = None,
        return_loop_stats: bool | None = None,
        loop_session: LoopSession | None = None,
        **kwargs: Any,
    ) -> CognexisCausalLMOutput:
        """Logits, and the next-token loss when ``labels`` are given; see :meth:`CognexisModel.forward`.

        Args:
            labels: ``[B, T]`` token ids, -100 where no loss is wanted; they are shifted here.
            loss_mask: ``[B, T]`` weights of the labels, 0 or more.
            logits_to_keep: number of last positions (0 for all), or the positions to keep: ``[P]``, ``[B, P]`` or a
                boolean ``[B, T]``.

        Raises:
            InvalidConfigError: labels are given and later tokens would decide how deep earlier ones run.
        """
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if has_labels and (
            LOOP_MODE_ALIASES.get(loop_mode or "", loop_mode) == "adaptive_sequence" or halt_dependency == "row"
        ):
            raise InvalidConfigError(
                "labels: where a row stops as a whole, later tokens decide about earlier ones, so its loss is no "
                "likelihood; use loop_mode='adaptive_token' with halt_dependency='prefix', or a fixed number of loops",
                path="loop_mode",
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            document_ids=document_ids,
            loop_mode=loop_mode,
            min_loops=min_loops,
            max_loops=max_loops,
            scheduler=scheduler,
            quality_tier=quality_tier,
            halt_dependency=halt_dependency,
            cache_policy=cache_policy,
            allow_extrapolation=allow_extrapolation,
            return_loop_stats=return_loop_stats,
            loop_session=loop_session,
            output_head=self.read_out,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if has_labels:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, loss_mask=loss_mask, **kwargs
            )
            is_readable = self.training and not torch.compiler.is_compiling() and not loss.is_meta
            if is_readable and not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"loss: {loss.item()} after {int(outputs.loop_counts.max())} loops")
        return CognexisCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            loop_counts=outputs.loop_counts,
            effective_depth=outputs.effective_depth,
            loop_states=outputs.loop_states,
            halt_codes=outputs.halt_codes,
            halt_reasons=outputs.halt_reasons,
            loop_diagnostics=outputs.loop_diagnostics,
        )


class CognexisForSequenceClassification(CognexisPreTrainedModel):
    """One label per sequence, read at the last real token."""

    def __init__(self, config: CognexisConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = CognexisModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits ``[B, num_labels]``; the loss when ``labels`` ``[B]`` (or ``[B, num_labels]``) are given.

        Raises:
            InvalidConfigError: several rows, no mask and no ``pad_token_id`` to find the last token by.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            num_loops=num_loops,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        last = self._last_real_token(input_ids, attention_mask, logits)
        pooled = logits[torch.arange(logits.shape[0], device=logits.device), last]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_real_token(self, input_ids: Tensor | None, attention_mask: Any, logits: Tensor) -> Tensor | int:
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            real = attention_mask != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif logits.shape[0] == 1 or input_ids is None:
            return -1
        else:
            raise InvalidConfigError(
                "attention_mask or config.pad_token_id is needed to find the last token of each row",
                path="pad_token_id",
            )
        return last_real_token(real).to(logits.device)


class CognexisForTokenClassification(CognexisPreTrainedModel):
    """One label per token."""

    def __init__(self, config: CognexisConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        self.model = CognexisModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_loops: int | Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Logits ``[B, T, num_labels]``; the loss when ``labels`` ``[B, T]`` are given (-100 is left out)."""
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = self.model(*given, num_loops=num_loops, return_dict=True, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class CognexisForQuestionAnswering(CognexisPreTrainedModel):
    """Start and end of an answer span."""

    def __init__(self, config: CognexisConfig) -> None:
        super().__init__(config)
        self.model = CognexisModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_loops: int | Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Logits ``[B, T]`` of the start and of the end; the loss when both positions ``[B]`` are given."""
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = self.model(*given, num_loops=num_loops, return_dict=True, **kwargs)
        start, end = (x.contiguous() for x in self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "CognexisForCausalLM",
    "CognexisForQuestionAnswering",
    "CognexisForSequenceClassification",
    "CognexisForTokenClassification",
    "CognexisModel",
    "CognexisPreTrainedModel",
]
