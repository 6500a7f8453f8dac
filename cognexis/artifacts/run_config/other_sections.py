"""The sections ``run``, ``tokenizer``, ``evaluation``, ``safety`` and ``logging``."""

from typing import Annotated, Literal

from pydantic import Field

from cognexis.artifacts.run_config.inference_section import LoopMode
from cognexis.artifacts.run_config.section import Count, Loops, NotNegative, Section, Text, as_listed, spelled

Checksum = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]
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
    """tokenizer file or folder"""
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
    """One data set of an evaluation."""

    name: Name
    """name in the results"""
    type: Literal["language_modeling", "exact_match", "multiple_choice", "generation", "code", "safety"]
    """kind of task"""
    path: Text
    """file or folder"""
    split: Text = "test"
    """part of the data set"""


class EvaluationSection(Section):
    """What is measured, at which depths."""

    loop_counts: Annotated[tuple[Loops, ...], as_listed, Field(min_length=1)] | None = None
    """depths of the fixed runs; null: 1, 2, 4, ... and `model.trained_max_loops`"""
    adaptive_modes: Annotated[tuple[LoopMode, ...], as_listed] = ("fixed",)
    """loop modes to compare"""
    datasets: Annotated[tuple[DatasetSettings, ...], as_listed] = ()
    """data sets, each with name, type, path and split"""
    metrics: Annotated[tuple[Name, ...], as_listed] = (
        *("perplexity", "accuracy", "latency_ms", "flops"),
        *("depth_efficiency_index", "loop_saturation_point", "overthinking_threshold"),
    )
    """names of metrics"""
    saturation_definition: Literal["threshold", "max_dei", "baseline_argmax"] = "threshold"
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
