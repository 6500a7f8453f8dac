"""A folder with a tiny model, its tokenizer, and data sets that take a second."""

import json
from pathlib import Path
from typing import Any

import torch

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.tokenizer_training import train_tokenizer

TEXT = "The shared block runs as often as it is asked to, and each loop sees what the loop before it left. " * 30
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"head_dim": 8, "num_prelude_blocks": 1, "num_coda_blocks": 1, "trained_max_loops": 2, "max_loops": 4}
QUESTIONS = [
    {"question": "What runs?", "choices": ["the block", "a loop it left"], "answer": 0},
    {"question": "What sees?", "choices": ["it", "each loop", "a"], "answer": 1},
]
DATASETS: dict[str, dict[str, Any]] = {
    "prose": {"type": "language_modeling", "path": "text.txt", "options": {"row_length": 12}, "max_examples": 5},
    "quiz": {"type": "multiple_choice", "path": "quiz.jsonl"},
    "words": {"type": "exact_match", "path": "words.jsonl", "options": {"max_new_tokens": 4, "stop": ["\n"]}},
}


def make_place(folder: Path) -> Path:
    """Write model and data into ``folder``."""
    tokenizer = train_tokenizer([TEXT], vocab_size=372)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = CognexisConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **SHAPE, **ids)
    config.tokenizer_checksum = tokenizer.checksum
    CognexisForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    lines = {"quiz": QUESTIONS, "words": [{"question": word, "answer": "it"} for word in ("a", "each loop", "it")]}
    for name, records in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_config(folder: Path, target: Path, names: tuple[str, ...] = tuple(DATASETS), **evaluation: Any) -> Path:
    """A run configuration over some of the data sets."""
    sets = []
    for name in names:
        settings = {"name": name, **DATASETS[name]}
        sets.append(settings | {"path": str(folder / settings["path"])})
    section = {"datasets": sets, "batch_size": 2, "metrics": ["flops", "loops_mean"], "loop_counts": [1, 2]}
    section |= evaluation
    content = {"schema_version": 1, "run": {"name": "x", "seed": 3}, "evaluation": section}
    target.write_text(json.dumps(content))
    return target
