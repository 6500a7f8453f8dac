"""One measured value with everything that it depends on: the row of a result file.

A row is strict: unknown keys, wrong types, NaN and infinity are refused, and what was not measured is None. Two rows
of one ``identity`` are the same measurement. ``loop_count`` is the depth of a fixed run and the bound of an adaptive
one, whose mean depth stands in its diagnostics. Times are milliseconds; ``flops_mean`` are matrix operations in
``compute_unit``.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cognexis.errors import ConfigFault, InvalidConfigError


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_Name = Annotated[str, Field(min_length=1)]
_Count = Annotated[int, Field(ge=0)]
_Amount = Annotated[float, Field(ge=0)]
_Numbers = Annotated[tuple[float | None, ...], BeforeValidator(_as_tuple)]
_Model = TypeVar("_Model", bound=BaseModel)
_STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class SchedulerDiagnostics(BaseModel):
    """How deep the requests of a row went, and why they stopped."""

    model_config = _STRICT

    average_loops_used: Annotated[float, Field(ge=0)]
    """mean loops per request"""
    loop_count_histogram: Annotated[tuple[_Count, ...], BeforeValidator(_as_tuple)]
    """requests by loop count, from 0 loops"""
    halt_reasons: dict[str, _Count] = {}
    """requests by halt reason"""
    scheduler_overhead_ms_mean: _Amount | None = None
    """time of deciding, per request"""
    budget_violation_count: _Count = 0
    """requests that went beyond their budget"""


class FlopsByStage(BaseModel):
    """Mean operations per request by stage."""

    model_config = _STRICT

    prelude: _Amount
    recurrent: _Amount
    coda: _Amount
    head: _Amount


class ResultRow(BaseModel):
    """One metric of one model on one data set at one depth."""

    model_config = _STRICT

    checkpoint: _Name
    """folder or identifier of the model"""
    tokenizer_checksum: _Name
    """"sha256:" and 64 hexadecimal digits"""
    dataset: _Name
    split: _Name
    task_version: _Name
    """raised when the scores of a task change"""
    prompt_format: _Name
    """name of the template, or "none" """
    decoding: dict[str, Any]
    """settings of sampling; empty where nothing is generated"""
    loop_mode: Literal["fixed", "adaptive_sequence", "adaptive_token"]
    loop_count: Annotated[int, Field(ge=1)]
    metric_name: _Name
    metric_value: float | None
    """None where the metric is undefined or the run failed"""
    metric_direction: Literal["higher_is_better", "lower_is_better"]
    num_examples: _Count
    standard_error: _Amount | None = None
    seed: int
    hardware: _Name
    dtype: _Name
    batch_size: Annotated[int, Field(ge=1)] | None = None
    versions: dict[str, str] = {}
    """package to version, and "commit" """
    compute_unit: _Name = "flops_per_token"
    flops_mean: _Amount | None = None
    """matrix operations in ``compute_unit``"""
    elementwise_flops_mean: _Amount | None = None
    stage_flops: FlopsByStage | None = None
    latency_ms_mean: _Amount | None = None
    latency_ms_p50: _Amount | None = None
    latency_ms_p90: _Amount | None = None
    latency_ms_p99: _Amount | None = None
    prefill_latency_ms_mean: _Amount | None = None
    decode_latency_ms_per_token_mean: _Amount | None = None
    tokens_per_second: _Amount | None = None
    peak_memory_bytes: _Count | None = None
    cache_memory_bytes: _Count | None = None
    scheduler_diagnostics: SchedulerDiagnostics | None = None
    hidden_norms: _Numbers | None = None
    """mean norm of the state by loop, entry 0 before the first; None where it is not finite"""
    hidden_deltas: _Numbers | None = None
    """mean relative change of the state by loop"""
    prediction_entropy: _Amount | None = None
    """mean entropy of the predictions, in nats"""
    attention_entropies: _Numbers | None = None
    """mean entropy of the core's attention by loop, in nats"""
    loop_gain: _Amount | None = None
    """largest factor by which the last loop stretches a small change of the state"""
    repetition_rate: _Amount | None = None
    """share of the four-token sequences of greedy continuations that occurred before"""
    non_finite_count: _Count | None = None
    """examples with a state, logit or loss that is not finite"""
    trained_max_loops: Annotated[int, Field(ge=1)] | None = None
    """most loops of the training"""
    extrapolated: bool = False
    """more loops than the model was trained with"""
    nonstandard_features: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    status: Literal["completed", "failed"] = "completed"
    detail: str = ""
    """why it failed"""

    @model_validator(mode="after")
    def _a_failed_row_says_why(self) -> "ResultRow":
        if self.status == "failed" and (self.metric_value is not None or not self.detail):
            raise ValueError("status='failed': needs a detail, and metric_value=None")
        return self

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes the measurement: equal for two rows that measure the same."""
        decoding = tuple(sorted((key, repr(value)) for key, value in self.decoding.items()))
        where = (self.checkpoint, self.tokenizer_checksum, self.dataset, self.split, self.task_version)
        how = (self.prompt_format, decoding, self.loop_mode, self.loop_count, self.dtype, self.seed)
        return (*where, *how, self.metric_name)

    @property
    def curve(self) -> tuple[Any, ...]:
        """The identity without the depth: equal for the rows that make one curve over depth."""
        return (*self.identity[:8], *self.identity[9:])


def result_row(content: dict[str, Any]) -> ResultRow:
    """A row of the fields in ``content``.

    Raises:
        InvalidConfigError: lists every field that is missing, unknown, of the wrong type or out of range.
    """
    return checked(ResultRow, content, "result row")


def checked(kind: type[_Model], content: Any, name: str) -> _Model:
    """``content`` as an object of ``kind``.

    Raises:
        InvalidConfigError: lists every field that is missing, unknown, of the wrong type or out of range.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = [
            ConfigFault(".".join(map(str, found["loc"])), found["input"], found["msg"]) for found in error.errors()
        ]
        raise InvalidConfigError(f"{name}: " + "; ".join(faults), faults=faults) from error
