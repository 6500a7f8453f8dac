"""The ``inference`` section: lengths, loops, budgets, scheduler, sampling, cache.

The names are those of the keywords of ``generate()`` wherever there is one.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from cognexis.artifacts.run_config.section import (
    DTYPE_ALIASES,
    LOOP_MODE_ALIASES,
    Count,
    CountOrZero,
    Loops,
    NotNegative,
    Positive,
    Section,
    Share,
    Text,
    as_listed,
    spelled,
)

LoopMode = Annotated[Literal["fixed", "adaptive_sequence", "adaptive_token"], spelled(LOOP_MODE_ALIASES)]
Dtype = Annotated[Literal["bf16", "fp16", "fp32", "fp64"], spelled(DTYPE_ALIASES)]

SCHEDULER_NAMES = {"gain_threshold": "predicted_gain_threshold"}
"""Field of a scheduler -> setting of another name."""
_SOFT = ("patience", "delay", "hysteresis")
SCHEDULER_FIELDS: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "rule_based": ("min_delta", "delta_kind", "confidence_threshold", "entropy_threshold", "kl_threshold", *_SOFT),
    "value_head": (
        *("gain_threshold", "loop_cost", "output_kind", "risk_weight", "latency_weight", "loop_thresholds", *_SOFT),
    ),
    "hybrid": (
        *("min_delta", "delta_kind", "large_delta", "confidence_threshold", "gain_threshold"),
        *("high_conf_gain_threshold", "loop_cost", "gain_fallthrough", *_SOFT),
    ),
    "act": ("halting_threshold", "gain_threshold", "ponder_cost", "uncertainty_limit", "risk_weight", *_SOFT),
    "oracle": (),
}
"""Fields of each scheduler that a run configuration sets."""


class BudgetSettings(Section):
    """Hard limits of one request; null: no limit."""

    max_recurrent_flops: Count | None = None
    """floating-point operations of the core"""
    max_wall_time_ms: Count | None = None
    """milliseconds from the start of the request"""
    max_total_loops: Count | None = None
    """applications of the core over all tokens"""
    max_loops_per_token: Loops | None = None
    """applications of the core for one token"""
    max_cache_memory_bytes: Count | None = None
    """bytes of keys and values"""


class SchedulerSettings(Section):
    """Who decides when the loops of a token end, in the adaptive modes; null: the scheduler's own default."""

    type: Literal["fixed", "rule_based", "value_head", "hybrid", "act", "oracle"] = "fixed"
    """the scheduler; oracle is for analysis with `run.research_mode`"""
    min_delta: NotNegative = 0.03
    """halt below this change of the state"""
    delta_kind: Literal["relative", "absolute"] = "relative"
    """relative: the change is divided by the norm of the state"""
    large_delta: Positive | None = None
    """continue above this change whatever else is seen; null: no such rule"""
    confidence_threshold: Share | None = None
    """halt above this probability of the most likely token; null: 0.95 for hybrid, no such rule for rule_based"""
    entropy_threshold: NotNegative | None = None
    """halt below this entropy in nats; null: no such rule"""
    kl_threshold: NotNegative | None = None
    """halt below this KL divergence of successive predictions in nats; null: no such rule"""
    predicted_gain_threshold: NotNegative | None = None
    """halt below this predicted gain per cost, a scheduler's `gain_threshold`; null: 5e-4, or a probability of 0.5"""
    loop_thresholds: Annotated[tuple[NotNegative, ...], Field(min_length=1), as_listed] | None = None
    """value_head: a gain threshold for each loop, the last one beyond; null: `predicted_gain_threshold` for all"""
    high_conf_gain_threshold: NotNegative | None = None
    """gain below which a confident token halts; null: as `predicted_gain_threshold`"""
    loop_cost: Positive = 1.0
    """cost of one loop in the unit of the gain"""
    gain_fallthrough: bool = False
    """hybrid: compare gain per cost also when no other rule decides"""
    output_kind: Literal["predicted_gain", "continue_logit", "risk_adjusted_gain", "uncertainty"] | None = None
    """output of the value head that counts; null: predicted_gain"""
    risk_weight: NotNegative | None = None
    """gain that one unit of uncertainty costs; null: 0"""
    latency_weight: NotNegative | None = None
    """gain that one unit of `loop_cost` costs; null: 0"""
    halting_threshold: Share | None = None
    """act: halt from this probability on; null: 0.5"""
    ponder_cost: NotNegative | None = None
    """act: gain that every loop must bring more than the one before; null: 0.01"""
    uncertainty_limit: NotNegative | None = None
    """act: halt from this uncertainty on; null: 0.95"""
    patience: Count | None = None
    """loops running for which a rule must hold; null: 1"""
    delay: CountOrZero | None = None
    """loops after which a decision is acted on; null: 0"""
    hysteresis: NotNegative | None = None
    """share by which a threshold is looser for a comparison that held in the loop before; null: 0"""

    def spec(self) -> dict[str, Any]:
        """The scheduler as ``generate(scheduler=...)`` takes it: its type, and its own fields as far as given."""
        names = SCHEDULER_FIELDS[self.type]
        given = {name: getattr(self, SCHEDULER_NAMES.get(name, name)) for name in names}
        return {"type": self.type} | {name: value for name, value in given.items() if value is not None}


class SamplingSettings(Section):
    """How the next token is chosen and when a text ends."""

    temperature: NotNegative = 0.7
    """0: the most likely token"""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """share of probability kept; 1: everything"""
    top_k: CountOrZero = 0
    """number of tokens kept; 0: all"""
    repetition_penalty: Positive = 1.0
    """above 1 makes tokens that have occurred less likely"""
    stop_tokens: Annotated[tuple[CountOrZero, ...], as_listed] = ()
    """ids that end the text besides eos"""
    stop_strings: Annotated[tuple[Text, ...], as_listed] = ()
    """strings that end the text"""


class CacheSettings(Section):
    """Where keys and values are kept."""

    type: Literal["dynamic", "static", "paged"] = "dynamic"
    """paged: continuous batching, with fixed loops only"""
    dtype: Dtype | None = None
    """format of keys and values; null: `model.dtype`"""
    max_batch_size: Count = 16
    """requests that run together"""


class InferenceSection(Section):
    """How text is generated. Defaults are conservative: a fixed loop count, no adaptive halting."""

    max_sequence_length: Count | None = None
    """prompt and new tokens together; null: `model.max_position_embeddings`"""
    max_new_tokens: Count = 512
    """new tokens of a request"""
    loop_mode: LoopMode = "fixed"
    """who decides the number of loops"""
    num_loops: Loops | None = None
    """loops in fixed mode; null: `model.default_loops`, moved inside the bounds"""
    min_loops: Loops = 1
    """lower bound"""
    max_loops: Loops | None = None
    """upper bound; null: `model.max_loops`"""
    research_override: bool = False
    """permits loops beyond what the model was trained for"""
    quality_tier: Literal["fast", "balanced", "thorough"] | None = None
    """preset of bounds and thresholds"""
    halt_dependency: Literal["token", "prefix", "row"] | None = None
    """what a token's halting may look at; null: as the mode needs"""
    cache_policy: Literal["depth_indexed", "last_exited", "modulo_k", "first_loop"] = "depth_indexed"
    """which loop's keys and values are kept; only depth_indexed is exact"""
    compute_budget: BudgetSettings = BudgetSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    sampling: SamplingSettings = SamplingSettings()
    cache: CacheSettings = CacheSettings()
