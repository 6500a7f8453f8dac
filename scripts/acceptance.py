"""The whole way of a tiny model, as a checklist: train, save and load, generate, keep to budgets, evaluate.

    python scripts/acceptance.py [--out FOLDER]

Each line says what holds, with a figure. A check that fails is named with its reason, and those that need its result
are left out. The exit status is 1 if a check failed. Takes about a minute on one core; nothing is downloaded.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from cognexis import CognexisConfig, CognexisForCausalLM, CognexisTokenizer
from cognexis.artifacts.text_corpus import standard_library_corpus
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.checkpoints.json_file import parse_strict_json, write_json
from cognexis.errors import BudgetExceededError, InvalidConfigError
from cognexis.eval_harness.result_files import read_rows
from cognexis.eval_harness.runner.evaluation import EvaluationOrder, run_evaluation
from cognexis.looping.cost import core_flops_per_token
from cognexis.training.quickstart_reload import mean_loss, pack_rows
from cognexis.training.quickstart_training import QuickstartSettings, train

STEPS, ROW_LENGTH, NEW_TOKENS, MAX_LOOPS = 12, 32, 6, 4
RULE = {"type": "rule_based", "min_delta": 0.2}


@dataclass
class Place:
    """What the checks hand on: the folder of all files, and what was made in it."""

    folder: Path
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The trained model."""
        return self.made["model"]

    @property
    def prompt(self) -> torch.Tensor:
        """Token ids ``[2, T]``."""
        return self.made["rows"][:2, :8]


def require(holds: bool, reason: str) -> None:
    """End the check at hand with ``reason`` unless ``holds``."""
    if not holds:
        raise RuntimeError(reason)


def training_lowers_the_loss(place: Place) -> str:
    corpus = standard_library_corpus(200_000)
    tokenizer = train_tokenizer(corpus.documents, vocab_size=512)
    rows = pack_rows(corpus.documents, tokenizer, ROW_LENGTH)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CognexisConfig.from_variant(
        "cognexis-tiny", vocab_size=len(tokenizer), trained_max_loops=MAX_LOOPS, max_loops=MAX_LOOPS, **shape, **ids
    )
    torch.manual_seed(0)
    model = CognexisForCausalLM(config)
    settings = QuickstartSettings(output_dir=place.folder / "training", steps=STEPS, row_length=ROW_LENGTH)
    held_out, rows = rows[-32:], rows[:-32]
    before = mean_loss(model.eval(), held_out, 2)
    result = train(model.train(), rows, settings, seconds=1.0)
    after = mean_loss(model.eval(), held_out, 2)
    model.config.tokenizer_checksum = tokenizer.checksum
    place.made |= {"model": model, "tokenizer": tokenizer, "rows": held_out}
    require(result.steps == STEPS, f"{result.steps} steps were made, not {STEPS}")
    require(after < before - 0.1, f"held-out loss {before:.3f} before and {after:.3f} after {STEPS} steps")
    return f"{STEPS} steps, held-out loss {before:.2f} to {after:.2f}"


def round_trip_holds(place: Place) -> str:
    folder = place.folder / "model"
    place.model.save_pretrained(folder)
    place.made["tokenizer"].save_pretrained(folder)
    loaded = CognexisForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for loops in (1, MAX_LOOPS):
            same = torch.equal(
                loaded(place.prompt, num_loops=loops).logits, place.model(place.prompt, num_loops=loops).logits
            )
            require(same, f"the logits of the loaded model differ at {loops} loops")
    text = "def read(path):\n    return path"
    tokenizer = CognexisTokenizer.from_pretrained(folder)
    require(tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text, "a text does not come back")
    size = (folder / "model.safetensors").stat().st_size
    return f"logits bit-equal at 1 and {MAX_LOOPS} loops, {size:,} bytes of weights"


def _generated(place: Place, **settings: Any) -> Any:
    mask = torch.ones_like(place.prompt)
    common = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "return_loop_stats": True}
    return place.model.generate(place.prompt, attention_mask=mask, **common, **settings)


def fixed_generation_runs(place: Place) -> str:
    texts = []
    for loops in (1, MAX_LOOPS):
        output = _generated(place, num_loops=loops)
        require(bool((output.loop_counts == loops).all()), f"loop_counts={output.loop_counts.tolist()}, not {loops}")
        texts.append(output.sequences)
    again = _generated(place, num_loops=MAX_LOOPS).sequences
    require(torch.equal(again, texts[1]), "a second run gives other tokens")
    return f"{NEW_TOKENS} tokens at 1 and {MAX_LOOPS} loops, repeatable"


def adaptive_generation_runs(place: Place) -> str:
    seen = []
    for mode in ("adaptive_sequence", "adaptive_token"):
        output = _generated(place, loop_mode=mode, scheduler=RULE, min_loops=1, max_loops=MAX_LOOPS)
        counts = output.loop_counts
        require(counts.shape[1] == NEW_TOKENS, f"{mode}: {counts.shape[1]} tokens, not {NEW_TOKENS}")
        require(int(counts.min()) >= 1 and int(counts.max()) <= MAX_LOOPS, f"{mode}: loop_counts={counts.tolist()}")
        seen.append(f"{mode} {counts.double().mean():.2f}")
    return "mean loops: " + ", ".join(seen)


def budgets_are_enforced(place: Place) -> str:
    limit = 3 * MAX_LOOPS
    output = _generated(place, num_loops=MAX_LOOPS, min_loops=MAX_LOOPS, max_total_loops=limit)
    require(bool((output.budget_used <= limit).all()), f"max_total_loops={limit}: used {output.budget_used.tolist()}")
    require(set(output.stop_reasons) == {"budget_exhausted"}, f"stop_reasons={output.stop_reasons}")
    length = place.prompt.shape[1]
    prefill = MAX_LOOPS * length * core_flops_per_token(place.model.config, length, length)
    output = _generated(place, num_loops=MAX_LOOPS, min_loops=MAX_LOOPS, max_recurrent_flops=prefill)
    require(output.loop_counts.shape[1] == 1, "max_recurrent_flops of a prefill lets more than one token pass")
    try:
        _generated(place, num_loops=MAX_LOOPS, min_loops=MAX_LOOPS, max_recurrent_flops=prefill - 1)
        require(False, "a budget below one token is accepted")
    except BudgetExceededError:
        pass
    try:
        _generated(place, num_loops=MAX_LOOPS + 1)
        require(False, "more loops than max_loops are accepted")
    except InvalidConfigError:
        pass
    return f"{limit} loops, {prefill:,} FLOPs, and too little for a token"


def evaluation_writes_rows(place: Place) -> str:
    document = "\n".join(standard_library_corpus(40_000).documents)
    (place.folder / "text.jsonl").write_text(json.dumps({"text": document}) + "\n", encoding="utf-8")
    sets = [
        {"name": "text", "type": "language_modeling", "path": str(place.folder / "text.jsonl"), "max_examples": 4},
        {"name": "sums", "type": "synthetic", "task": "prefix_sums", "options": {"num_examples": 4, "difficulty": 3}},
    ]
    modes = ["fixed", "adaptive_token"]
    section = {"datasets": sets, "loop_counts": [1, MAX_LOOPS], "adaptive_modes": modes, "batch_size": 4}
    content = {"schema_version": 1, "run": {"name": "acceptance"}, "evaluation": section}
    write_json(place.folder / "eval.json", content)
    order = EvaluationOrder(place.folder / "eval.json", place.folder / "model", place.folder / "evaluation", (), "cpu")
    rows = run_evaluation(order, lambda line: None)
    path = place.folder / "evaluation" / "rows.jsonl"
    lines = path.read_bytes().splitlines()
    for line in lines:
        parse_strict_json(line, _refuse)
    require(read_rows(path) == rows and len(rows) == len(lines), "rows.jsonl does not hold the rows")
    failed = [row.detail for row in rows if row.status == "failed"]
    require(not failed, f"{len(failed)} rows failed: {failed[:1]}")
    wanted = {("text", 1), ("text", MAX_LOOPS), ("sums", 1), ("sums", MAX_LOOPS)}
    missing = wanted - {(row.dataset, row.loop_count) for row in rows if row.loop_mode == "fixed"}
    require(not missing, f"no rows of {sorted(missing)}")
    require(any(row.loop_mode == "adaptive_token" for row in rows), "no adaptive rows")
    before = path.read_bytes()
    run_evaluation(order, lambda line: None)
    require(path.read_bytes() == before, "a second run adds rows")
    return f"{len(rows)} strict rows of {len(sets)} tasks, none failed, none twice"


def _refuse(reason: str) -> Any:
    raise RuntimeError(f"rows.jsonl: {reason}")


Check = Callable[[Place], str]
CHECKS: Sequence[tuple[str, Check]] = (
    ("a tiny model trains", training_lowers_the_loss),
    ("a checkpoint comes back the same", round_trip_holds),
    ("generation at fixed depths", fixed_generation_runs),
    ("generation at adaptive depths", adaptive_generation_runs),
    ("budgets are kept", budgets_are_enforced),
    ("an evaluation writes valid rows", evaluation_writes_rows),
)


def run_checks(place: Place, checks: Sequence[tuple[str, Check]] = CHECKS) -> int:
    """Print the checklist; the number of checks that failed. After a failed first check nothing else can be done."""
    failed = 0
    for index, (title, check) in enumerate(checks):
        try:
            print(f"[ok]     {title}: {check(place)}", flush=True)
        except Exception as error:
            failed += 1
            reason = " ".join(str(error).split())
            print(f"[FAILED] {title}: {type(error).__name__}: {reason}", flush=True)
            if index == 0:
                for later, _ in checks[1:]:
                    print(f"[--]     {later}: left out, there is no model", flush=True)
                return len(checks)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks; the exit status."""
    parser = argparse.ArgumentParser(description="Check the whole way of a tiny model.")
    parser.add_argument("--out", type=Path, help="keep the files in this folder; default: a temporary one")
    out = parser.parse_args(arguments).out
    with tempfile.TemporaryDirectory(prefix="cognexis-acceptance-") as scratch:
        folder = out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        failed = run_checks(Place(folder))
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} checks hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
