"""What an ablation is before it runs, what one run gave, and what an experiment says over its seeds.

    metric_delta  = mean over seeds of (variant - baseline), sign turned where lower is better: above 0 is better
    compute_delta = mean over seeds of (variant - baseline), in FLOPs per token

Everything is strict: unknown keys, wrong types, NaN and infinity are refused.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class AblationStatus(StrEnum):
    """State of a run or an experiment."""

    PLANNED = "planned"
    COMPLETED = "completed"
    FAILED = "failed"
    UNSTABLE = "unstable"


class Method(StrEnum):
    """How a variant came to be."""

    RETRAINED = "retrained"
    SWITCHED = "switched"


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _member(kind: type[StrEnum]) -> BeforeValidator:
    return BeforeValidator(lambda value: kind(value) if isinstance(value, str) and value in list(kind) else value)


def _no_repetition(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("an entry stands twice")
    return values


STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
_Name = Annotated[str, Field(min_length=1, pattern=r"\S")]
_Count = Annotated[int, Field(ge=0)]
_Amount = Annotated[float, Field(ge=0)]
Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1),
    AfterValidator(_no_repetition),
]
_Numbers = Annotated[tuple[float | None, ...], BeforeValidator(_as_tuple)]
Status = Annotated[AblationStatus, _member(AblationStatus)]


class StopCriteria(BaseModel):
    """When a run counts as unstable."""

    model_config = STRICT

    max_skipped_steps: _Count = 0
    """optimizer steps with NaN or infinity that are still accepted"""
    diverged_above: _Amount | None = None
    """held-out nats per token above which a run has diverged; null: one nat more than equal probabilities, ln V + 1"""


class ExperimentRecord(BaseModel):
    """One changed factor, written down before anything runs."""

    model_config = STRICT

    name: _Name
    baseline: _Name
    """name of the run configuration that everything else is taken from"""
    changed_factor: _Name
    hypothesis: _Name
    overrides: dict[str, Any]
    """the changed settings, as a run configuration"""
    method: Annotated[Method, _member(Method)]
    budget: _Name
    """optimizer steps of a run, or the checkpoint that is used"""
    suite: Annotated[tuple[_Name, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """names of the data sets"""
    seeds: Seeds
    hardware: _Name
    stop_criteria: StopCriteria = StopCriteria()
    note: str = ""
    """what else the overrides change"""


class DepthPoint(BaseModel):
    """One depth of one run: means over the rows of all data sets."""

    model_config = STRICT

    loops: Annotated[int, Field(ge=1)]
    negative_log_likelihood: float | None
    """nats per token; None where it is not finite"""
    standard_error: _Amount | None = None
    accuracy: _Amount | None
    flops_per_token: _Amount
    latency_ms_mean: _Amount | None = None
    """of a forward pass over a batch"""
    state_norms: _Numbers = ()
    """mean norm of the state by loop, entry 0 before the first"""
    extrapolated: bool = False


class UsePoint(BaseModel):
    """A model under one setting of its loops; losses in nats per token, None where not finite."""

    model_config = STRICT

    loop_mode: _Name
    negative_log_likelihood: float | None = None
    """of all tokens; None also where only last tokens have a likelihood"""
    accuracy: _Amount | None = None
    last_negative_log_likelihood: float | None = None
    """of the last token of each row, which every loop mode can predict"""
    last_accuracy: _Amount | None = None
    mean_loops: _Amount
    flops_per_token: _Amount
    latency_ms_mean: _Amount | None = None

    def value(self, metric: str, *, last: bool = False) -> float | None:
        """The metric of all tokens, or of last tokens where asked for or where there is nothing else."""
        name = f"last_{metric}" if last or self.loop_mode == "adaptive_sequence" else metric
        found: float | None = getattr(self, name)
        return found


class AblationRun(BaseModel):
    """One experiment with one seed."""

    model_config = STRICT

    experiment: _Name
    seed: _Count
    status: Status
    detail: str = ""
    """why it is not completed"""
    method: Annotated[Method, _member(Method)]
    config_checksum: _Name
    """SHA-256 of the resolved configuration without its folders"""
    metric_name: Literal["negative_log_likelihood", "accuracy"]
    compared: UsePoint | None = None
    """what the experiment is compared by: fixed loops where it was trained, its loop settings where it was switched"""
    in_use: UsePoint | None = None
    """under the loop settings of the inference section; of the baseline and of switched variants"""
    parameter_count: _Count
    """stored numbers, the core counted once and a tied embedding once"""
    non_finite_count: _Count = 0
    """optimizer steps and depths with NaN or infinity"""
    training_steps: _Count | None = None
    training_loss: float | None = None
    depths: Annotated[tuple[DepthPoint, ...], BeforeValidator(_as_tuple)] = ()

    @model_validator(mode="after")
    def _a_run_says_why(self) -> "AblationRun":
        if self.status == AblationStatus.COMPLETED and self.metric_value is None:
            raise ValueError("status='completed': needs a value of the metric")
        if self.status in (AblationStatus.FAILED, AblationStatus.UNSTABLE) and not self.detail:
            raise ValueError(f"status={self.status.value!r}: needs a detail")
        return self

    @property
    def metric_value(self) -> float | None:
        """The metric that the experiment is compared by."""
        return None if self.compared is None else self.compared.value(self.metric_name)

    @property
    def mean_loops(self) -> float | None:
        """Loops per token behind that value."""
        return None if self.compared is None else self.compared.mean_loops

    @property
    def flops_per_token(self) -> float | None:
        """Compute behind that value."""
        return None if self.compared is None else self.compared.flops_per_token


class AblationResult(BaseModel):
    """What an experiment says."""

    model_config = STRICT

    name: _Name
    plan: ExperimentRecord
    status: Status
    metric_delta: float | None = None
    """above 0: better than the baseline"""
    metric_delta_error: _Amount | None = None
    """standard error over seeds; None below two"""
    metric_delta_by_seed: dict[str, float] = {}
    compute_delta: float | None = None
    """FLOPs per token more than the baseline"""
    non_finite_count: _Count = 0
    parameter_count: _Count | None = None
    notes: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
