"""The model card: README.md of a saved model, with the metadata that the Hub reads.

Every save writes one, from what the model itself knows (sizes, loops, training record) and from ``model.card_facts``,
which its owner sets: licence, languages, data, results. Nothing is invented: what nobody said is left out. A README
that somebody else wrote is never touched; ours is recognised by its first comment line.

The metadata is checked here, without the Hub: required keys, a known task, well-formed licence and language codes,
results with a number, a data set and the loop count they were measured at.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from cognexis.checkpoints.card_facts import CardFacts, DepthScore
from cognexis.checkpoints.json_file import write_bytes
from cognexis.errors import InvalidConfigError

CARD_FILE = "README.md"
_MARK = "<!-- Written by cognexis at every save. Remove this line to keep your own text. -->"
_TASKS = {
    "CognexisForCausalLM": "text-generation",
    "CognexisForSequenceClassification": "text-classification",
    "CognexisForTokenClassification": "token-classification",
    "CognexisForQuestionAnswering": "question-answering",
    "CognexisModel": "feature-extraction",
}
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_DATASET = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def write_model_card(folder: Path, model: Any, target: Path) -> None:
    """Write the card of ``model`` into ``folder``, unless ``target`` holds a README that is not ours.

    Raises:
        InvalidConfigError: ``model.card_facts`` would make metadata that the Hub refuses.
    """
    existing = target / CARD_FILE
    if existing.is_file() and _MARK not in existing.read_text("utf-8", errors="replace"):
        return
    write_bytes(folder / CARD_FILE, model_card(model, target.resolve().name).encode("utf-8"))


def model_card(model: Any, folder_name: str) -> str:
    """The text of the card.

    Raises:
        InvalidConfigError: lists every fault of the metadata.
    """
    facts = model.card_facts or CardFacts()
    name = facts.name or folder_name
    metadata = _metadata(model, facts, name)
    if faults := metadata_faults(metadata):
        raise InvalidConfigError("model card: " + "; ".join(faults), path="card_facts")
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    sections = [_usage(model), _architecture(model), _scores(facts.scores), _training(model), _files()]
    body = "\n\n".join(section for section in sections if section)
    summary = facts.summary or "A decoder-only language model whose reasoning depth is chosen at run time."
    return f"---\n{header}---\n{_MARK}\n\n# {name}\n\n{summary}\n\n{body}\n"


def metadata_faults(metadata: Any) -> list[str]:
    """What the Hub would refuse or misread in the metadata of a model card; empty if nothing."""
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"]
    faults = [f"{key}: missing" for key in ("library_name", "pipeline_tag", "tags") if not metadata.get(key)]
    if (task := metadata.get("pipeline_tag")) and task not in _TASKS.values():
        faults.append(f"pipeline_tag={task!r}: must be one of {', '.join(sorted(_TASKS.values()))}")
    patterns = (("license", _LICENCE), ("language", _LANGUAGE), ("datasets", _DATASET), ("base_model", _DATASET))
    for key, pattern in patterns:
        values = metadata.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not isinstance(value, str) or not pattern.fullmatch(value):
                faults.append(f"{key}={value!r}: not an identifier that the Hub knows")
    tags = metadata.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        faults.append(f"tags={tags!r}: must be a list of words")
    for model in metadata.get("model-index") or []:
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                value = metric.get("value")
                if not isinstance(value, int | float) or not math.isfinite(value):
                    faults.append(f"model-index: {metric.get('type')}={value!r}: must be a finite number")
                if not (metric.get("args") or {}).get("num_loops"):
                    faults.append(f"model-index: {metric.get('type')}: says nothing of num_loops")
    return faults


def _metadata(model: Any, facts: CardFacts, name: str) -> dict[str, Any]:
    task = _TASKS.get(type(model).__name__.removeprefix("FSDP"), "text-generation")
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.]+", "-", score.dataset.lower()).strip("-"),
            dataset_name=score.dataset,
            metric_type=score.metric,
            metric_value=score.value,
            metric_name=f"{score.metric} at {score.num_loops} loops",
            metric_args={"num_loops": score.num_loops, "flops_per_token": score.flops_per_token},
        )
        for score in facts.scores
    ]
    data = ModelCardData(
        language=list(facts.language) or None,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["cognexis", "recurrent-depth", "custom_code"],
        datasets=list(facts.datasets) or None,
        base_model=facts.base_model,
        model_name=name if results else None,
        eval_results=results or None,
    )
    parsed: dict[str, Any] = yaml.safe_load(data.to_yaml())
    return parsed


def _usage(model: Any) -> str:
    loops = model.config.default_loops
    if type(model).__name__ != "CognexisForCausalLM":
        return ""
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "..."  # this repository or a local copy
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
inputs = tokenizer("Once", return_tensors="pt")
for num_loops in (1, {loops}):
    print(num_loops, tokenizer.decode(model.generate(**inputs, num_loops=num_loops, max_new_tokens=20)[0]))
```

`trust_remote_code=True` runs the Python files of this repository; read them first. No package has to be installed
besides torch and transformers. `num_loops` is how often the shared block runs: more loops, more compute per token."""


def _architecture(model: Any) -> str:
    config = model.config
    rows = [
        ("parameters", f"{model.num_parameters():,}"),
        ("hidden size", str(config.hidden_size)),
        ("attention heads / key-value heads", f"{config.num_attention_heads} / {config.num_key_value_heads}"),
        (
            "blocks: prelude, shared core, coda",
            f"{config.num_prelude_blocks}, {config.num_recurrent_blocks}, {config.num_coda_blocks}",
        ),
        ("loops: default, trained up to", f"{config.default_loops}, {config.trained_max_loops}"),
        (
            "effective depth at 1 and at the trained loops",
            f"{config.effective_depth(1)}, {config.effective_depth(config.trained_max_loops)}",
        ),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("positions", f"{config.max_position_embeddings:,}"),
        ("weights", str(model.dtype).removeprefix("torch.")),
    ]
    if config.nonstandard_features:
        rows.append(("not part of the standard architecture", ", ".join(config.nonstandard_features)))
    return "## Architecture\n\n" + _table(("what", "value"), rows)


def _scores(scores: Sequence[DepthScore]) -> str:
    if not scores:
        return ""
    rows = [
        (score.dataset, score.metric, str(score.num_loops), f"{score.value:.4f}", f"{score.flops_per_token / 1e6:.2f}")
        for score in scores
    ]
    return "## Quality and compute\n\n" + _table(("data", "metric", "loops", "value", "MFLOP per token"), rows)


def _training(model: Any) -> str:
    record = model.training_record
    rows = [
        ("optimizer steps", record.checkpoint_step),
        ("tokens", record.training_tokens_seen),
        ("software", record.build_id),
        ("data manifest", record.data_manifest_checksum),
    ]
    if record.sampled_loops:
        loops = ", ".join(f"{loops}: {steps}" for loops, steps in sorted(record.sampled_loops.items()))
        rows.append(("steps by loop count", loops))
    known = [(what, f"{value:,}" if isinstance(value, int) else str(value)) for what, value in rows if value]
    return "## Training\n\n" + _table(("what", "value"), known) if known else ""


def _files() -> str:
    return """## Files

`manifest.json` holds the SHA-256 of the weights and settings; loading compares them. `metadata.json` says what the
weights are and how they came about."""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
