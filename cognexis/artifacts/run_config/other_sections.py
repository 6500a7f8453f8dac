"""The sections ``run``, ``tokenizer``, ``evaluation``, ``safety`` and ``logging``."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cognexis.artifacts.run_config.inference_section import LoopMode
from cognexis.artifacts.run_config.section import Count, Loops, NotNegative, Section, Text, as_listed, spelled
from cognexis.errors import ConfigFault, InvalidConfigError

Checksum = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
HELD_OUT_TEXT = "quickstart-held-out"
"""A data set's path that stands for the part of the standard library that the quickstart does not train on."""
FILE_TYPES = ("language_modeling", "multiple_choice", "exact_match", "generation", "code", "safety")
GENERATED_TYPES = ("recall", "synthetic")
_OPTION_TYPES = (bool, int, float, str)


def _option(value: Any) -> Any:
    parts = list(value) if isinstance(value, (list, tuple)) else [value]
    numbers = [part for part in parts if isinstance(part, float)]
    if not all(isinstance(part, _OPTION_TYPES) for part in parts) or not all(map(math.isfinite, numbers)):
        raise ValueError("must be a finite number, text, true or false, or a list of these")
    return tuple(parts) if isinstance(value, (list, tuple)) else value


_Option = Annotated[Any, BeforeValidator(_option)]
_Switch = Annotated[Literal["enabled", "disabled"], spelled({True: "enabled", False: "disabled"})]


class RunSection(Section):
    """What names a run and makes it repeatable."""

    name: Name = "run"
    """name of the run, and of its folder below `runs`"""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1234
    """initial weights, order of the data, loop counts, sampling"""
    research_mode: bool = False
    """permits the oracle scheduler and switched-off filters; never for a service"""


class TokenizerSection(Section):
    """The tokenizer that the data, the model and the service share."""

    type: Annotated[Literal["sentencepiece", "bpe", "byte_reference"], spelled({"unigram": "sentencepiece"})] = (
        "sentencepiece"
    )
    """family of the algorithm; sentencepiece stands for Unigram"""
    path: Text | None = None
    """tokenizer file or folder; null: that of the package, where the data were made with it"""
    manifest_path: Text | None = None
    """manifest with the checksum"""
    vocab_size: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """number of ids; null: `model.vocab_size`"""
    bos_token: Text | None = "<s>"
    """start of a text; null: none"""
    eos_token: Text | None = "</s>"
    """end of a text; null: none"""
    pad_token: Text | None = "<pad>"
    """fills rows of a batch; null: none"""
    eod_token: Text | None = "<eod>"
    """end of a document in packed data; null: none"""
    unk_token: Text | None = "<unk>"
    """stands for what cannot be encoded; null: none"""
    allow_byte_fallback: bool = True
    """characters without a piece become bytes"""
    add_bos_default: bool = True
    """prompts start with `bos_token`"""
    add_eos_default: bool = False
    """texts end with `eos_token`"""
    chat_template: Literal["chatml_v1"] | None = "chatml_v1"
    """how messages become text; null: no chat"""
    checksum: Checksum | None = None
    """SHA-256 of the tokenizer file"""


class DatasetSettings(Section):
    """One data set of an evaluation: a file, or examples that are generated."""

    name: Name
    """name in the results"""
    type: Literal[
        "language_modeling",
        "multiple_choice",
        "exact_match",
        "generation",
        "code",
        "safety",
        "recall",
        "synthetic",
        "custom",
    ]
    """kind of task"""
    path: Text | None = None
    """file or folder; null for the kinds that generate their examples"""
    task: Name | None = None
    """synthetic: the family; custom: the name given to `register_task`"""
    split: Text = "test"
    """part of the data set"""
    max_examples: Count | None = None
    """at most so many examples, at equal distances; null: all"""
    options: dict[Name, _Option] = {}
    """settings of the task"""

    @model_validator(mode="after")
    def _says_where_examples_come_from(self) -> "DatasetSettings":
        if self.path is None and self.type in FILE_TYPES:
            raise _fault("path", None, f"is required by type {self.type}")
        if self.path is not None and self.type in GENERATED_TYPES:
            raise _fault("path", self.path, f"must be null: type {self.type} generates its examples")
        if self.task is None and self.type in ("synthetic", "custom"):
            raise _fault("task", None, f"is required by type {self.type}")
        if self.task is not None and self.type not in ("synthetic", "custom"):
            raise _fault("task", self.task, f"must be null with type {self.type}")
        return self


def _fault(path: str, value: str | None, reason: str) -> InvalidConfigError:
    fault = ConfigFault(path, value, reason)
    return InvalidConfigError(fault, faults=[fault])


class EvaluationSection(Section):
    """What is measured, at which depths."""

    loop_counts: Annotated[tuple[Loops, ...], as_listed, Field(min_length=1)] | None = None
    """depths of the fixed runs; null: 1, 2, 4, ... and `model.trained_max_loops`"""
    adaptive_modes: Annotated[tuple[LoopMode, ...], as_listed] = ("fixed",)
    """loop modes to compare"""
    datasets: Annotated[tuple[DatasetSettings, ...], as_listed] = ()
    """data sets, see below"""
    metrics: Annotated[tuple[Name, ...], as_listed] = (
        *("perplexity", "accuracy", "latency_ms", "flops"),
        *("depth_efficiency_index", "loop_saturation_point", "overthinking_threshold"),
    )
    """metrics of cost that get rows of their own beside those of quality, and metrics of depth in the summary"""
    saturation_definition: Literal["threshold", "max_dei", "baseline_argmax"] = "max_dei"
    """which loop saturation point is meant"""
    saturation_threshold: NotNegative = 0.0
    """depth efficiency below which another loop does not pay"""
    tolerance: NotNegative = 0.0
    """loss of quality that does not count as overthinking"""
    batch_size: Count = 8
    """rows per forward pass"""
    output_path: Text | None = None
    """folder of the results; null: `runs/<run.name>/evaluation`"""


class SafetySection(Section):
    """What protects users and operators. Everything is on; `run.research_mode` permits to switch it off."""

    policy_mode: Literal["enforce", "audit_only"] = "enforce"
    """audit_only records what enforce would refuse"""
    input_filter: _Switch = "enabled"
    """rules on prompts"""
    output_filter: _Switch = "enabled"
    """rules on generated text"""
    code_sandbox: Literal["auto", "bubblewrap", "wasi", "disabled"] = "auto"
    """where generated code may run; disabled: it is never run"""
    max_prompt_tokens: Count = 8192
    """longest prompt of a user"""
    max_user_loops: Loops | None = None
    """loops that a user may ask for; null: `inference.max_loops`"""
    block_special_token_injection: bool = True
    """control tokens in user text are refused"""
    pii_logging: Literal["redacted", "dropped", "verbatim"] = "redacted"
    """personal data in logs"""


class LoggingSection(Section):
    """What is recorded."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """least severity"""
    format: Literal["json", "text"] = "json"
    """one JSON object or one sentence per line"""
    log_loop_stats: bool = True
    """loop counts and halt reasons"""
    log_hidden_norms: Literal["none", "summary"] = "summary"
    """norms of the state by loop"""
    metrics_endpoint: Annotated[str, Field(pattern=r"^[^\s/]{1,253}:[0-9]{1,5}$")] | None = None
    """host:port of the Prometheus page; null: none"""
