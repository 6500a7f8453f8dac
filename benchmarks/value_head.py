"""What the value head of the windowed-parity model is worth, by the commands of ``cognexis scheduler``.

    python benchmarks/value_head.py hub_assets/windowed_parity [--fit] [--device cpu] [--work runs/value_head]

The rows are made here: 2,000 of 8 to 64 bits for fitting (80 %), calibrating (10 %) and a first report (10 %), and 48
of 65 to 128 bits, beyond what model and head have seen. With ``--fit`` the head is fitted and calibrated first, else
the checkpoint brings one. Thresholds are chosen for whole rows, within 0.01 nats of full depth.

Writes ``benchmarks/results/value_head_<device>.md`` with the report's figures, and its pictures.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from cognexis import CognexisForCausalLM
from cognexis.checkpoints.json_file import read_json
from cognexis.tasks.windowed_parity import draw_rows
from cognexis.training.scheduler.commands import CalibrationOptions, DataOptions, calibrate, fit, report
from cognexis.training.scheduler.frontier import regret
from cognexis.training.scheduler.report import table
from cognexis.training.scheduler.rows import read_rows, rows_of_split
from cognexis.training.scheduler.runs import run_outcome

RESULTS = Path(__file__).parent / "results"
LONGEST_SHORT_ROW = 32
REST = 0.5
"""Relative change of a state that has come to rest."""
FEATURES = ["relative_delta", "confidence"]
DATA = {"rows.jsonl": (2000, 8, 64, 0, 32), "others.jsonl": (48, 65, 128, 1, 64)}
"""File -> rows, fewest and most bits, seed, depth of the runs."""


def write_rows(path: Path, count: int, fewest: int, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            num_bits = int(torch.randint(fewest, most + 1, (), generator=generator))
            ids, labels = draw_rows(1, num_bits, generator)
            task = "short" if num_bits <= LONGEST_SHORT_ROW else "long"
            file.write(json.dumps({"input_ids": ids[0].tolist(), "labels": labels[0].tolist(), "task": task}) + "\n")


def fitted(checkpoint: Path, work: Path, device: str) -> Path:
    """Fit and calibrate a head; returns the new checkpoint."""
    out = work / "model"
    options = {"data": work / "rows.jsonl", "max_loops": DATA["rows.jsonl"][4], "device": device}
    head = {"kind": "token", "features": FEATURES}
    fit(DataOptions(checkpoint, **options), out, report=print, unlabelled="zero", head=head)
    calibrate(DataOptions(out, **options), CalibrationOptions())
    return out


def further_outcomes(
    checkpoint: Path, data: Path, num_loops: int, device: str, oracle: list[dict[str, float]]
) -> list[list[str]]:
    """Mean loops, loss, accuracy and regret of schedulers that the report leaves out."""
    model: Any = CognexisForCausalLM.from_pretrained(checkpoint)
    model.to(device).eval()
    config, record = model.config, model.scheduler_record["value_head"]
    file = read_rows(data, vocab_size=config.vocab_size, max_length=config.max_position_embeddings)
    is_own = record["fit"]["data_checksum"] == file.checksum
    rows = rows_of_split(file.rows, "test") if is_own else list(file.rows)
    gain = record["calibrated"]["chosen"]["value_head"]["threshold"]
    hybrid = {"type": "hybrid", "min_delta": REST, "confidence_threshold": None, "gain_threshold": gain}
    schedulers = {
        "value_head, thresholds by loop": {
            "type": "value_head",
            "loop_thresholds": record["calibrated"]["loop_thresholds"],
        },
        f"hybrid, change < {REST}": hybrid,
        "act": {"type": "act", "gain_threshold": gain, "ponder_cost": 0.0},
        f"rule_based, change < {REST}": {"type": "rule_based", "min_delta": REST},
    }
    lines = []
    for name, scheduler in schedulers.items():
        for dependency in ("row", "prefix"):
            found = run_outcome(model, rows, scheduler, num_loops=num_loops, dependency=dependency)
            values = found | regret(found, oracle)
            keys = ("mean_loops", "loss", "accuracy", "loops_regret", "loss_regret")
            lines.append([dependency, name, *("" if values[k] is None else f"{values[k]:.4g}" for k in keys)])
    return lines


def section(report_text: str, further: list[list[str]], picture: str) -> str:
    """The report's text one level lower, further schedulers, and the picture."""
    lines = report_text.splitlines()[1:]
    lowered = "\n".join(f"#{line}" if line.startswith("#") else line for line in lines).strip()
    header = ("halting by", "scheduler", "mean loops", "loss", "accuracy", "loops regret", "loss regret")
    return "\n\n".join(
        [lowered, "### Further schedulers", table(header, further), f"![frontiers and reliability]({picture})"]
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/value_head"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    for name, (count, fewest, most, seed, _) in DATA.items():
        write_rows(options.work / name, count, fewest, most, seed)
    checkpoint = fitted(options.checkpoint, options.work, options.device) if options.fit else options.checkpoint
    sections = []
    for name, (_, fewest, most, _, num_loops) in DATA.items():
        data, out = options.work / name, options.work / f"report_{Path(name).stem}"
        found = report(DataOptions(checkpoint, data, max_loops=num_loops, device=options.device), out)
        oracle = found["frontiers"]["row"]["oracle"]
        further = further_outcomes(checkpoint, data, num_loops, options.device, oracle)
        picture = f"value_head_{Path(name).stem}_{options.device}.png"
        if (out / "report.png").is_file():
            shutil.copy(out / "report.png", RESULTS / picture)
        text = section((out / "report.md").read_text("utf-8"), further, picture)
        sections.append(f"## Rows of {fewest} to {most} bits\n\n{text}")
    fit_facts = read_json(checkpoint / "scheduler.json")["value_head"]["fit"]
    heading = (
        f"# Value head of the windowed-parity model\n\nFitted on {fit_facts['train_rows']:,} rows of 8 to 64 bits at "
        f"{fit_facts['settings']['num_loops']} loops, {fit_facts['best_step']} steps, features "
        f"{', '.join(fit_facts['settings']['head']['features'])}: validation loss {fit_facts['validation_loss']:.4g}, "
        f"of the best constant {fit_facts['constant_loss']:.4g}. Regret is the distance to an oracle that knows every "
        "loss."
    )
    target = RESULTS / f"value_head_{options.device}.md"
    target.write_text("\n\n".join([heading, *sections]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
