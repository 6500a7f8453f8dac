"""Rules between the sections of a run configuration, and what each command needs.

Each check is a function from the configuration to its faults; a check whose sections are missing finds none.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cognexis.configuration_rules import nearest_name
from cognexis.errors import ConfigFault, InvalidConfigError

if TYPE_CHECKING:
    from cognexis.artifacts.run_config.run_config import RunConfig

# The sections that a command needs, besides those of a checkpoint that it is given.
NEEDED_SECTIONS: dict[str, tuple[str, ...]] = {
    "train": ("tokenizer", "model", "training"),
    "eval": ("evaluation",),
    "eval loop-scaling": ("evaluation",),
    "serve": ("inference", "safety"),
    "generate": ("inference",),
    "tokenize": ("tokenizer",),
    "inspect-checkpoint": (),
    "checkpoint": ("tokenizer", "model"),
}
_VALUE_HEAD_SCHEDULERS = ("value_head", "hybrid", "act")


def consistency_faults(
    config: "RunConfig", command: str | None = None, world_size: int | None = None
) -> list[ConfigFault]:
    """Every fault between sections, for ``command`` (None: whatever it may be used for)."""
    faults = [*_missing_sections(config, command), *_tokenizer(config), *_safety(config), *_evaluation(config)]
    faults += [*_loops(config), *_scheduler(config)]
    plans_training = command == "train" or (command is None and config.training is not None)
    if not plans_training:  # a training run may describe the service that its result will get
        faults += _runnable(config)
    if config.training is not None:
        faults += [*_optimization(config), *_batch(config, world_size), *_data(config)]
        faults += [*_curriculum(config), *_losses(config)]
    return faults


def needed_sections(command: str) -> tuple[str, ...]:
    """The sections that ``command`` needs.

    Raises:
        InvalidConfigError: there is no such command.
    """
    if command not in NEEDED_SECTIONS:
        known = ", ".join(NEEDED_SECTIONS)
        reason = f"unknown command{nearest_name(str(command), NEEDED_SECTIONS)}; known: {known}"
        raise InvalidConfigError(f"command={command!r}: {reason}", path="command", value=command, reason=reason)
    return NEEDED_SECTIONS[command]


def _missing_sections(config: "RunConfig", command: str | None) -> Iterator[ConfigFault]:
    for name in needed_sections(command) if command is not None else ():
        if name not in config.model_fields_set:
            yield ConfigFault(name, reason=f"the section is missing; {command} needs it")


def _tokenizer(config: "RunConfig") -> Iterator[ConfigFault]:
    tokenizer, model = config.tokenizer, config.model
    if tokenizer is None:
        return
    names = ("bos_token", "eos_token", "pad_token", "eod_token", "unk_token")
    seen: dict[str, str] = {}
    for name in names:
        token = getattr(tokenizer, name)
        if token is not None and token in seen:
            yield ConfigFault(f"tokenizer.{name}", token, f"is {seen[token]} too; special tokens must differ")
        elif token is not None:
            seen[token] = name
    if model is not None and tokenizer.vocab_size not in (None, model.vocab_size):
        reason = f"must equal model.vocab_size={model.vocab_size}"
        yield ConfigFault("tokenizer.vocab_size", tokenizer.vocab_size, reason)
    known = model.tokenizer_checksum if model is not None else None
    if known is not None and tokenizer.checksum not in (None, known):
        yield ConfigFault("tokenizer.checksum", tokenizer.checksum, f"must equal model.tokenizer_checksum={known!r}")


def _safety(config: "RunConfig") -> Iterator[ConfigFault]:
    safety = config.safety
    off = {"policy_mode": "audit_only", "input_filter": "disabled", "output_filter": "disabled"}
    off |= {"block_special_token_injection": False, "pii_logging": "verbatim"}  # type: ignore[dict-item]
    for name, value in off.items():
        if getattr(safety, name) == value and not config.run.research_mode:
            yield ConfigFault(f"safety.{name}", value, "needs run.research_mode: true")
    model = config.model
    if model is not None and safety.max_user_loops is not None and safety.max_user_loops > model.max_loops:
        reason = f"must lie in 1..model.max_loops={model.max_loops}"
        yield ConfigFault("safety.max_user_loops", safety.max_user_loops, reason)


def _evaluation(config: "RunConfig") -> Iterator[ConfigFault]:
    if config.evaluation is None:
        return
    names = [dataset.name for dataset in config.evaluation.datasets]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield ConfigFault(f"evaluation.datasets[{index}].name", name, "another data set has this name")


def _loops(config: "RunConfig") -> Iterator[ConfigFault]:
    inference, model = config.inference, config.model
    highest = inference.max_loops
    if model is not None and not inference.research_override:
        for name in ("max_loops", "min_loops", "num_loops"):
            value = getattr(inference, name)
            if value is not None and value > model.max_loops:
                reason = f"must not exceed model.max_loops={model.max_loops} without inference.research_override"
                yield ConfigFault(f"inference.{name}", value, reason)
    if model is not None and inference.min_loops < model.min_loops:
        given = "min_loops" in inference.model_fields_set
        if given and not inference.research_override:
            reason = f"must be at least model.min_loops={model.min_loops} without inference.research_override"
            yield ConfigFault("inference.min_loops", inference.min_loops, reason)
    if highest is not None and inference.min_loops > highest:
        yield ConfigFault("inference.min_loops", inference.min_loops, f"must not exceed inference.max_loops={highest}")
    loops = inference.num_loops
    if loops is not None and not inference.min_loops <= loops <= (highest or loops):
        bounds = f"inference.min_loops={inference.min_loops} and inference.max_loops={highest}"
        yield ConfigFault("inference.num_loops", loops, f"must lie between {bounds}")
    longest = inference.max_sequence_length
    if model is not None and longest is not None and longest > model.max_position_embeddings:
        reason = f"must not exceed model.max_position_embeddings={model.max_position_embeddings}"
        yield ConfigFault("inference.max_sequence_length", longest, reason)
    vocabulary = model.vocab_size if model is not None else None
    for index, token in enumerate(inference.sampling.stop_tokens):
        if vocabulary is not None and token >= vocabulary:
            yield ConfigFault(f"inference.sampling.stop_tokens[{index}]", token, f"must be below {vocabulary}")
    if vocabulary is not None and inference.sampling.top_k > vocabulary:
        reason = f"must not exceed model.vocab_size={vocabulary}"
        yield ConfigFault("inference.sampling.top_k", inference.sampling.top_k, reason)


def _scheduler(config: "RunConfig") -> Iterator[ConfigFault]:
    inference, scheduler = config.inference, config.inference.scheduler
    if scheduler.type == "oracle" and not config.run.research_mode:
        reason = "reads the true losses, which only an analysis has; needs run.research_mode: true"
        yield ConfigFault("inference.scheduler.type", "oracle", reason)
    if inference.loop_mode != "fixed" and scheduler.type == "fixed":
        reason = f"inference.loop_mode={inference.loop_mode!r} needs a scheduler that can halt"
        yield ConfigFault("inference.scheduler.type", "fixed", reason)
    gain, large = scheduler.high_conf_gain_threshold, scheduler.large_delta
    if large is not None and large <= scheduler.min_delta:
        reason = f"must be above inference.scheduler.min_delta={scheduler.min_delta}"
        yield ConfigFault("inference.scheduler.large_delta", large, reason)
    if gain is not None and scheduler.type not in _VALUE_HEAD_SCHEDULERS:
        reason = f"is not used by inference.scheduler.type={scheduler.type!r}"
        yield ConfigFault("inference.scheduler.high_conf_gain_threshold", gain, reason)


def _runnable(config: "RunConfig") -> Iterator[ConfigFault]:
    """What must hold before text can be generated."""
    inference = config.inference
    kind = inference.scheduler.type
    if kind in _VALUE_HEAD_SCHEDULERS and config.model is not None and config.model.value_head is None:
        yield ConfigFault("inference.scheduler.type", kind, "needs a value head, and model.value_head is null")
    if inference.cache.type == "paged" and inference.loop_mode != "fixed":
        reason = f"runs fixed loops only, and inference.loop_mode is {inference.loop_mode!r}"
        yield ConfigFault("inference.cache.type", "paged", reason)


def _optimization(config: Any) -> Iterator[ConfigFault]:
    rule, place = config.training.optimization, "training.optimization"
    if rule.min_learning_rate > rule.learning_rate:
        reason = f"must not exceed {place}.learning_rate={rule.learning_rate}"
        yield ConfigFault(f"{place}.min_learning_rate", rule.min_learning_rate, reason)
    if rule.warmup_steps > rule.total_steps:
        reason = f"must not exceed {place}.total_steps={rule.total_steps}"
        yield ConfigFault(f"{place}.warmup_steps", rule.warmup_steps, reason)


def _batch(config: Any, world_size: int | None) -> Iterator[ConfigFault]:
    batch, length = config.training.batch, config.training.data.sequence_length
    own = batch.micro_batch_size * batch.gradient_accumulation_steps * length
    product = f"{batch.micro_batch_size} * {batch.gradient_accumulation_steps} * {length}"
    given, place = batch.global_batch_tokens, "training.batch.global_batch_tokens"
    if world_size is not None and (isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1):
        yield ConfigFault("world_size", world_size, "must be a whole number of at least 1")
    elif given is not None and world_size is not None and given != own * world_size:
        reason = "must equal micro_batch_size * gradient_accumulation_steps * sequence_length * world_size = "
        yield ConfigFault(place, given, f"{reason}{product} * {world_size} = {own * world_size}")
    elif given is not None and given % own:
        reason = "must be a multiple of micro_batch_size * gradient_accumulation_steps * sequence_length = "
        yield ConfigFault(place, given, f"{reason}{product} = {own}")


def _data(config: Any) -> Iterator[ConfigFault]:
    data, model = config.training.data, config.model
    if model is None:
        return
    needed = data.sequence_length + (1 if data.packing else 0)
    if model.max_position_embeddings < needed:
        reason = f"needs model.max_position_embeddings of at least {needed}, which is {model.max_position_embeddings}"
        yield ConfigFault("training.data.sequence_length", data.sequence_length, reason)
    if data.document_boundary_attention and not model.document_boundary_attention:
        reason = "model.document_boundary_attention is false"
        yield ConfigFault("training.data.document_boundary_attention", True, reason)
    has_boundaries = data.document_boundary_attention
    if has_boundaries is None:
        has_boundaries = model.document_boundary_attention
    if data.position_reset == "reset" and not has_boundaries:
        reason = "positions that restart tell attention of documents, and document_boundary_attention is false"
        yield ConfigFault("training.data.position_reset", "reset", reason)
    ids: dict[int, str] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model, name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token in ids:
                yield ConfigFault(f"model.{name}", value, f"is {ids[token]} too; training needs distinct special ids")
            elif token is not None:
                ids[token] = name


def _curriculum(config: Any) -> Iterator[ConfigFault]:
    """1 <= min <= initial <= target <= trained maximum, so that a legal depth can always be drawn."""
    rule, model, place = config.training.loop_curriculum, config.model, "training.loop_curriculum"
    trained = model.trained_max_loops if model is not None else None
    low = rule.min_loops or (model.min_loops if model is not None else 1)
    if model is not None and rule.min_loops is not None and rule.min_loops < model.min_loops:
        yield ConfigFault(f"{place}.min_loops", rule.min_loops, f"must be at least model.min_loops={model.min_loops}")
    target = rule.target_max_loops or trained
    if target is not None and target < low:
        yield ConfigFault(f"{place}.target_max_loops", target, f"must be at least min_loops={low}")
    if trained is not None and rule.target_max_loops is not None and rule.target_max_loops > trained:
        reason = f"must not exceed model.trained_max_loops={trained}"
        yield ConfigFault(f"{place}.target_max_loops", rule.target_max_loops, reason)
    initial = rule.initial_max_loops
    if initial is not None and initial < low:
        yield ConfigFault(f"{place}.initial_max_loops", initial, f"must be at least min_loops={low}")
    if initial is not None and target is not None and initial > target:
        yield ConfigFault(f"{place}.initial_max_loops", initial, f"must not exceed target_max_loops={target}")
    if rule.cap is not None and rule.cap < low:
        yield ConfigFault(f"{place}.cap", rule.cap, f"must be at least min_loops={low}")
    steps = sorted((int(step), loops) for step, loops in rule.milestones.items())
    if bool(steps) != (rule.ramp == "milestone"):
        yield ConfigFault(f"{place}.milestones", dict(rule.milestones), "goes with ramp: milestone and only with it")
    counts = [loops for _, loops in steps]
    if counts != sorted(counts) or len({step for step, _ in steps}) < len(steps):
        yield ConfigFault(f"{place}.milestones", dict(rule.milestones), "steps and loop counts must ascend")
    if counts and (counts[0] < low or (target is not None and counts[-1] > target)):
        reason = f"loop counts must lie between min_loops={low} and target_max_loops={target}"
        yield ConfigFault(f"{place}.milestones", dict(rule.milestones), reason)


def _losses(config: Any) -> Iterator[ConfigFault]:
    losses, model, place = config.training.losses, config.model, "training.losses"
    depths, weights = losses.multi_depth.depths, losses.multi_depth.weights
    if len(depths) != len(weights):
        yield ConfigFault(
            f"{place}.multi_depth.weights", weights, f"needs one weight for each of {len(depths)} depths"
        )
    elif depths and not any(weights):
        yield ConfigFault(f"{place}.multi_depth.weights", weights, "must not all be 0")
    if len(set(depths)) < len(depths):
        yield ConfigFault(f"{place}.multi_depth.depths", depths, "must differ")
    if model is not None and depths and max(depths) > model.trained_max_loops:
        reason = f"must not exceed model.trained_max_loops={model.trained_max_loops}"
        yield ConfigFault(f"{place}.multi_depth.depths", depths, reason)
    for name in ("lambda_value", "lambda_continue"):
        if model is not None and getattr(losses, name) and model.value_head is None:
            yield ConfigFault(f"{place}.{name}", getattr(losses, name), "needs a value head; model.value_head is null")
