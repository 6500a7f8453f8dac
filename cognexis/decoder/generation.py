"""What generation adds for a looped model: loop keywords, the slotted cache, checks at the entry, loop statistics.

Loop keywords (``loop_mode``, ``num_loops``, ...) are read in this order: the call, ``generation_config``,
``scheduler.json``, the model's configuration. Everything a request can get wrong is checked before the first forward.
The decoding loops themselves are transformers' own. Budgets are hard: a token is begun only if its smallest number of
loops fits, and a request that runs out of time in the middle of one returns what it has.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from cognexis.configuration_rules import nearest_name
from cognexis.decoder.cache import CognexisCache
from cognexis.decoder.generation_stats import StopSettings, with_loop_stats
from cognexis.decoder.generation_watch import FiniteLogits, RequestWatch
from cognexis.decoder.masks import build_masks
from cognexis.decoder.request_checks import check_generation_values, check_lengths, check_prompt, check_prompts
from cognexis.decoder.speculative import SpeculativeDecoding
from cognexis.errors import BudgetExceededError, InvalidConfigError
from cognexis.looping.budget import BudgetLimits, RequestBudget
from cognexis.looping.cost import core_flops_per_token
from cognexis.looping.options import (
    CALL_KEYWORDS,
    LOOP_KEYWORDS,
    REQUEST_ALIASES,
    REQUEST_KEYWORDS,
    LoopOptions,
    budget_limits,
    loop_bound,
)
from cognexis.looping.session import LoopSession
from cognexis.looping.trace import LoopRecorder
from cognexis.tokens.match import check_tokenizer_match

_REFUSED_MODES = {
    GenerationMode.CONTRASTIVE_SEARCH: "it branches the cache for every candidate, which is untested with loop slots",
    GenerationMode.GROUP_BEAM_SEARCH: "its code is no longer part of transformers",
    GenerationMode.CONSTRAINED_BEAM_SEARCH: "its code is no longer part of transformers",
    GenerationMode.DOLA_GENERATION: "it contrasts logits of early layers, which a shared core does not have",
}


# transformers annotates ``self`` of these methods with a private class; Any keeps the overrides readable.
_GenerationMixin: Any = GenerationMixin


class LoopedGenerationMixin(_GenerationMixin):
    """``GenerationMixin`` for a model with a loop count."""

    config: Any
    generation_config: Any
    forward: Any
    base_model: Any
    _previous_max_cache_length: int

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As transformers' ``generate``, with the loop keywords and, with ``return_loop_stats``, loop statistics.

        Args:
            inputs: ``[B, T]`` prompt ids (also as ``input_ids``), left-padded in batches.
            generation_config: overrides of the model's own; loop keywords may stand in it.
            kwargs: transformers' arguments and

                * ``loop_mode, num_loops, min_loops, max_loops`` (or ``loop_budget``), ``scheduler, quality_tier,
                  halt_dependency, cache_policy, allow_extrapolation``: as for ``forward``.
                * ``max_total_loops`` (or ``total_loop_budget``), ``max_loops_per_token, max_recurrent_flops``: limits
                  of each row; ``max_wall_time_ms, max_cache_memory_bytes``: limits of the request. A row that cannot
                  run the smallest number of loops for another token ends with "budget_exhausted".
                * ``speculative_draft_loops, speculative_tokens``: draft so many tokens with few loops and verify them
                  together at ``num_loops``, which must be fixed; the result is that of plain generation.
                * ``return_loop_stats``: return loop statistics.

        Returns:
            ``[B, T + N]`` ids, or an output object with ``return_dict_in_generate`` or ``return_loop_stats``.

        Raises:
            InvalidConfigError: an unknown keyword (with the nearest name), a value out of range, a mode that cannot
                work, a prompt that leaves no position to write to.
            ShapeMismatchError, InvalidTokenIdError: a prompt or mask of the wrong shape, dtype or range.
            NonFiniteError: the logits are NaN or infinite.
            BudgetExceededError: a budget does not suffice for a single token.
            ArtifactMismatchError: ``tokenizer`` or the streamer's is not the one that the configuration names.
            BackendError: the scheduler failed.

        A streamer ends before an error is raised; ours hands on an event that names it.
        """
        try:
            return self._generate_looped(inputs, generation_config, kwargs)
        except Exception as error:
            _end_stream(kwargs.get("streamer"), error)
            raise

    def _generate_looped(self, inputs: Any, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        _use_names_of_aliases(kwargs)
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        check_prompt(self.config, prompt, kwargs)
        check_generation_values(self.config, kwargs)
        stats = self._setting("return_loop_stats", generation_config, kwargs)
        kwargs.pop("return_loop_stats", None)
        streamer = kwargs.get("streamer")
        tokenizer = kwargs.get("tokenizer") or getattr(streamer, "tokenizer", None)
        if tokenizer is not None and self.config.tokenizer_checksum is not None:
            check_tokenizer_match(self.config, tokenizer)
        options, limits = self._request(generation_config, kwargs)
        session = None
        if options.mixes_depths or limits.is_limiting:
            budget = RequestBudget(limits) if limits.is_limiting else None
            session = LoopSession(budget=budget, keeps_record=bool(stats))
            self._check_session(session, options, generation_config, kwargs, prompt)
            kwargs["loop_session"] = session
            if options.is_adaptive:
                kwargs["scheduler"] = options.scheduler  # one instance for all passes
                kwargs["halt_dependency"] = options.halt_dependency
        if limits.max_loops_per_token is not None:
            kwargs["max_loops"] = options.requested_loops if options.is_adaptive else options.max_loops
        speculation = self._speculation(options, limits, generation_config, kwargs)
        is_watched = streamer is not None and hasattr(streamer, "watch")
        recorder = LoopRecorder() if stats or is_watched or session is not None else None
        stops = self._stop_settings(generation_config, kwargs, session)
        if is_watched:
            streamer.watch(recorder, self.config, stops)  # type: ignore[union-attr]
        if stats and generation_config is not None:  # transformers wants one or the other, not both
            generation_config = copy.deepcopy(generation_config)
            generation_config.return_dict_in_generate = True
        elif stats:
            kwargs["return_dict_in_generate"] = True
        if recorder is not None:
            kwargs["loop_recorder"] = recorder
        if session is not None:
            watch = RequestWatch(session, options, self.config)
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), watch]
        result = self._generate(inputs, generation_config, kwargs)
        given = 0 if prompt is None else prompt.shape[1]
        if not stats:
            return result
        assert recorder is not None
        result = with_loop_stats(result, recorder, self.config, stops, options, given, session)
        if speculation is not None:
            result.loop_diagnostics["speculation"] = speculation.facts()
        return result

    def _speculation(
        self, options: LoopOptions, limits: BudgetLimits, generation_config: Any, kwargs: dict[str, Any]
    ) -> SpeculativeDecoding | None:
        """The decoding loop that drafts with few loops, put into ``kwargs`` when it is asked for."""
        names = ("speculative_draft_loops", "speculative_tokens")
        draft_loops, num_tokens = (self._setting(name, generation_config, kwargs) for name in names)
        for name in names:
            kwargs.pop(name, None)
        if draft_loops is None and num_tokens is None:
            return None
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate"):
            if kwargs.get(name) is not None:
                raise InvalidConfigError(f"{name}: does not go with speculative_draft_loops", path=name)
        if limits.is_limiting:
            raise InvalidConfigError("speculative_draft_loops: does not go with budgets; limit max_new_tokens instead")
        speculation = SpeculativeDecoding.of_request(self, options, draft_loops, num_tokens)
        kwargs["custom_generate"] = speculation
        return speculation

    def _setting(self, name: str, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        """What a request says: the call, else the generation config that it brings, else the model's; or None."""
        value = kwargs.get(name)
        return _first_set(name, generation_config, self.generation_config) if value is None else value

    def _request(self, generation_config: Any, kwargs: dict[str, Any]) -> tuple[LoopOptions, BudgetLimits]:
        """Loops and limits of a request."""
        settings = {name: self._setting(name, generation_config, kwargs) for name in REQUEST_KEYWORDS}
        limits = budget_limits(settings)
        if limits.max_loops_per_token is not None:
            settings["max_loops"] = loop_bound(self.config, settings, limits.max_loops_per_token)
        return self.base_model.loop_options(settings), limits

    def _check_session(
        self, session: LoopSession, options: LoopOptions, generation_config: Any, kwargs: dict[str, Any], prompt: Any
    ) -> None:
        """Refuse what cannot work where rows may run different numbers of loops, and budgets too small to begin."""
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if self._setting(name, generation_config, kwargs) is not None:
                raise InvalidConfigError(
                    f"{name}: assisted decoding needs one fixed number of loops; leave out adaptive modes, loops by "
                    "row, cache policies and budgets",
                    path=name,
                )
        if callable(kwargs.get("custom_generate")):
            raise InvalidConfigError("custom_generate: a decoding loop of your own takes fixed loops only")
        if session.budget is not None and prompt is not None:
            rows, length = prompt.shape[:2]
            flops = core_flops_per_token(self.config, length, length) * length
            session.budget.begin_pass(rows, prompt.device, flops, None)
            itemsize = next(self.parameters()).element_size()
            cache = CognexisCache(self.config, mixed_depth=True)
            fitting = session.loops_that_fit(self.config, cache, rows, length, itemsize)
            fits = bool(session.budget.affords(options.min_loops, flops).all())
            if not fits or (fitting is not None and fitting < options.min_loops):
                raise BudgetExceededError(
                    f"the budget does not suffice for a single token: a prompt of {length} tokens needs at least "
                    f"min_loops={options.min_loops} loops"
                )

    def _stop_settings(
        self, generation_config: Any, kwargs: dict[str, Any], session: LoopSession | None
    ) -> StopSettings:
        setting = partial(self._setting, generation_config=generation_config, kwargs=kwargs)
        pad = _as_ids(setting("pad_token_id"))
        eos_ids, has_criteria = _as_ids(setting("eos_token_id")), bool(kwargs.get("stopping_criteria"))
        pad_token_id = pad[0] if pad else None
        is_spent = (lambda row: False) if session is None else session.was_spent
        return StopSettings(
            eos_ids, bool(setting("stop_strings")), setting("max_time"), has_criteria, pad_token_id, is_spent
        )

    def _generate(self, inputs: Any, generation_config: Any, kwargs: dict[str, Any]) -> Any:
        """Run transformers' generate with a finiteness check among the logits processors."""
        before = FiniteLogits()
        after = FiniteLogits(before)
        custom = kwargs.get("custom_generate")
        if not callable(custom) or isinstance(custom, SpeculativeDecoding):
            kwargs = kwargs | {"logits_processor": [before, *(kwargs.get("logits_processor") or []), after]}
        cap = self.config.loop_cap
        session: LoopSession | None = kwargs.get("loop_session")
        try:
            result = super().generate(inputs, generation_config=generation_config, **kwargs)
        except BudgetExceededError:
            if session is not None:
                session.abandon_pass(kwargs.get("loop_recorder"))
            if session is None or session.sequences is None:
                raise
            if (streamer := kwargs.get("streamer")) is not None:
                streamer.end()
            wants_dict = kwargs.get("return_dict_in_generate") or getattr(
                generation_config or self.generation_config, "return_dict_in_generate", False
            )
            sequences: Any = session.sequences[session.kept_rows]
            result = GenerateDecoderOnlyOutput(sequences=sequences) if wants_dict else sequences
        finally:  # early-exit drafting lowers the cap and does not restore it when it is interrupted
            self.config.__dict__.pop("_loop_cap", None)
            if cap is not None:
                self.config.__dict__["_loop_cap"] = cap
        before.require()
        after.require()
        return result

    @contextmanager
    def _default_loops(self, num_loops: int) -> Iterator[None]:
        """Let the configuration's default be ``num_loops`` for a while; for engines that take no keywords."""
        before = self.config.default_loops, self.config.max_loops
        self.config.default_loops, self.config.max_loops = num_loops, max(num_loops, self.config.max_loops)
        try:
            yield
        finally:
            self.config.default_loops, self.config.max_loops = before

    def generate_batch(self, inputs: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        """Continuous batching at a fixed loop count.

        Args:
            inputs: list of prompts, each a list of ids.
            generation_config: as in transformers.
            kwargs: transformers' arguments and the loop keywords; the count holds for the whole batch, because the
                engine mixes tokens of several requests in one row.

        Raises:
            InvalidConfigError: the model has attention memory, global tokens or head counts that differ by stage;
                loop statistics are asked for, which the engine cannot return.
        """
        if kwargs.get("return_loop_stats"):
            raise InvalidConfigError("return_loop_stats: generate_batch returns no loop statistics; use generate")
        overrides = (self.config.stage_overrides or {}).values()
        if self.config.input_injection == "attention_memory" or self.config.global_tokens:
            raise InvalidConfigError(
                "generate_batch: attention memory and global tokens need a cache slot of their own"
            )
        if self.config.has_time_state:
            raise InvalidConfigError("generate_batch: the paged cache holds keys and values, no states over time")
        if any("num_key_value_heads" in o or "num_attention_heads" in o for o in overrides):
            raise InvalidConfigError("generate_batch: the paged cache needs equal head counts in all stages")
        _use_names_of_aliases(kwargs)
        options, limits = self._request(generation_config, kwargs)
        if options.mixes_depths or limits.is_limiting:
            raise InvalidConfigError(
                "generate_batch: the paged cache holds one fixed number of loops; leave out an adaptive loop_mode, "
                "loops by row, cache policies and budgets, or use generate",
                path="loop_mode",
            )
        if options.num_loops > self.config.kv_slots:
            raise InvalidConfigError(
                f"num_loops={options.num_loops}: the paged cache has kv_slots={self.config.kv_slots} loops",
                path="num_loops",
                value=options.num_loops,
            )
        check_prompts(self.config, inputs, generation_config or self.generation_config, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k not in LOOP_KEYWORDS}
        self._refuse_unknown(kwargs, inspect.signature(super().generate_batch).parameters)
        with self._default_loops(options.num_loops):
            return super().generate_batch(inputs, generation_config, **kwargs)

    def _prepare_generation_config(
        self, generation_config: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        explicit = {name: kwargs.pop(name) for name in LOOP_KEYWORDS if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        for name in CALL_KEYWORDS:
            value = explicit.get(name)
            value = getattr(generation_config, name, None) if value is None else value
            if value is not None:  # transformers would repeat a tensor for every beam, also one without axes
                model_kwargs[name] = value.item() if _is_scalar(value) else value
        self.base_model.loop_options(model_kwargs)
        check_generation_values(self.config, generation_config.to_dict(), resolved=True)
        if generation_config.temperature == 0:  # no randomness left: the most likely token
            generation_config.do_sample, generation_config.temperature = False, 1.0
        early_exit = generation_config.assistant_early_exit
        is_slot = isinstance(early_exit, int) and not isinstance(early_exit, bool)
        exits = is_slot and self.config.first_loop_slot < early_exit <= self.config.num_hidden_layers
        if early_exit is not None and not exits:
            first = self.config.first_loop_slot + self.config.num_recurrent_blocks
            raise InvalidConfigError(
                f"assistant_early_exit={early_exit!r}: must be a number of slots from {first} (one loop) to "
                f"{self.config.num_hidden_layers}",
                path="assistant_early_exit",
                value=early_exit,
            )
        return generation_config, model_kwargs

    def _get_deprecated_gen_repo(
        self, generation_mode: Any, trust_remote_code: bool, custom_generate: Any = None
    ) -> Any:
        if custom_generate is None and generation_mode in _REFUSED_MODES:
            raise InvalidConfigError(
                f"generation mode {generation_mode.value}: {_REFUSED_MODES[generation_mode]} (the mode lives in a "
                "repository of its own; pass custom_generate= to run it all the same)"
            )
        return super()._get_deprecated_gen_repo(generation_mode, trust_remote_code, custom_generate)

    @staticmethod
    def _refuse_unknown(kwargs: dict[str, Any], parameters: Any) -> None:
        """Raise for a keyword that neither an engine nor a generation config knows."""
        known = {*parameters, *GenerationConfig().to_dict(), *LOOP_KEYWORDS} - {"kwargs"}
        for name in kwargs:
            if name not in known:
                raise InvalidConfigError(f"unknown argument {name!r}{nearest_name(name, known)}", path=name)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = {
            *inspect.signature(self.forward).parameters,
            *inspect.signature(self.prepare_inputs_for_generation).parameters,
            *inspect.signature(super().generate).parameters,
            *GenerationConfig().to_dict(),
            *LOOP_KEYWORDS,
        } - {"kwargs"}
        try:
            super()._validate_model_kwargs(model_kwargs)
        except ValueError as error:
            unknown = [k for k, v in model_kwargs.items() if v is not None and k not in known]
            if not unknown:
                raise
            named = ", ".join(f"{k!r}{nearest_name(k, known)}" for k in unknown)
            raise InvalidConfigError(f"generate() got unknown arguments: {named}", path=unknown[0]) from error

    def _validate_generation_mode(self, generation_mode: Any, generation_config: Any, mode_kwargs: Any) -> None:
        if getattr(generation_config, "use_mtp", None):
            raise InvalidConfigError(
                "use_mtp: the model has no multi-token prediction head", path="use_mtp", value=True
            )
        assistant = mode_kwargs.get("assistant_model")
        if assistant is not None and "assistant_tokenizer" not in mode_kwargs:
            vocab_size = assistant.config.get_text_config().vocab_size
            if vocab_size != self.config.vocab_size:
                raise InvalidConfigError(
                    f"assistant_model: its vocab_size={vocab_size} differs from {self.config.vocab_size}; pass "
                    "tokenizer= and assistant_tokenizer= to translate",
                    path="assistant_model",
                )
        super()._validate_generation_mode(generation_mode, generation_config, mode_kwargs)

    def _extract_generation_mode_kwargs(self, custom_generate: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, which gives callables neither the streamer nor the tokenizer; ours wants both."""
        is_ours = isinstance(custom_generate, SpeculativeDecoding)
        return super()._extract_generation_mode_kwargs(None if is_ours else custom_generate, *args, **kwargs)

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        for criterion in criteria:
            if isinstance(criterion, RequestWatch):
                criterion.watch(criteria, generation_config)
        return criteria

    def _validate_generated_length(self, generation_config: Any, input_ids_length: int, *args: Any) -> None:
        check_lengths(self.config, generation_config, input_ids_length)
        super()._validate_generated_length(generation_config, input_ids_length, *args)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if (recorder := model_kwargs.get("loop_recorder")) is not None:
            recorder.max_length = generation_config.max_length
        kind = generation_config.cache_implementation
        ours = kind in (None, "dynamic", "offloaded") or kind in ALL_STATIC_CACHE_IMPLEMENTATIONS
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False or not ours:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        offloading = kind is not None and "offloaded" in kind
        if offloading and self.device.type not in ("cuda", "xpu"):
            raise InvalidConfigError(
                f"cache_implementation={kind!r}: offloading needs a GPU, the model is on {self.device.type}",
                path="cache_implementation",
                value=kind,
            )
        if kind in ALL_STATIC_CACHE_IMPLEMENTATIONS:
            # keep the longest length seen, so that a compiled forward is not compiled again for a shorter request
            asked = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            self._previous_max_cache_length = max(asked, getattr(self, "_previous_max_cache_length", -1))
            cache: Cache = CognexisCache(
                self.config, "static", max_cache_len=self._previous_max_cache_length, offloading=offloading
            )
        else:
            cache = CognexisCache(self.config, offloading=offloading)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        loop_recorder: LoopRecorder | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers (which looks for ``inputs_embeds`` by name); ``loop_recorder`` stays out of forward."""
        if loop_recorder is not None:
            loops = self.base_model.loop_options(kwargs)
            loop_recorder.begin_pass((input_ids if inputs_embeds is None else inputs_embeds).shape[0], loops.num_loops)
        if (session := kwargs.get("loop_session")) is not None:
            session.begin_pass(input_ids, kwargs.get("past_key_values"))
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        recorder = model_kwargs.get("loop_recorder")
        if recorder is not None:
            recorder.append(outputs.loop_counts, outputs.halt_codes, kwargs.get("num_new_tokens", 1))
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """A draft model runs at its own loop count, so it does not get the loop keywords of this one."""
        assistant = kwargs.get("assistant_model")
        if assistant is not None:
            dropped = (*LOOP_KEYWORDS, "loop_recorder")
            kwargs["model_kwargs"] = {k: v for k, v in kwargs["model_kwargs"].items() if k not in dropped}
        return super()._get_candidate_generator(*args, **kwargs)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """As in transformers, but not for models that would fall into many small graphs."""
        return self._can_compile_fullgraph and super()._valid_auto_compile_criteria(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(**kwargs: Any) -> dict[str, Any]:
        """Masks by layer type for compiled decoding."""
        return build_masks(**kwargs)


def _use_names_of_aliases(kwargs: dict[str, Any]) -> None:
    """Give aliased arguments their own names.

    Raises:
        InvalidConfigError: an argument is given under both names.
    """
    for alias, name in REQUEST_ALIASES.items():
        if (value := kwargs.pop(alias, None)) is None:
            continue
        if kwargs.get(name) is not None:
            raise InvalidConfigError(f"{alias}={value!r}: is {name}, which is given too", path=alias, value=value)
        kwargs[name] = value


def _end_stream(streamer: Any, error: Exception) -> None:
    """Let those who read ``streamer`` know that nothing more comes; the error counts, not a fault of the streamer."""
    if streamer is not None:
        with suppress(Exception):
            streamer.fail(error) if hasattr(streamer, "fail") else streamer.end()


def _first_set(name: str, *configs: Any) -> Any:
    """The first value of attribute ``name`` that is not None."""
    for config in configs:
        if (value := getattr(config, name, None)) is not None:
            return value
    return None


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return (
        [int(i) for i in value] if isinstance(value, (list, tuple, Tensor)) and not _is_scalar(value) else [int(value)]
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0
