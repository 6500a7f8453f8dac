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
from cognexis.training.scheduler.rows import DataRow, read_rows, rows_of_split
from cognexis.training.scheduler.runs import run_outcome

RESULTS = Path(__file__).parent / "results"
LONGEST_SHORT_ROW = 32
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


def by_loop_outcome(checkpoint: Path, data: Path, num_loops: int, device: str) -> dict[str, float]:
    """Mean loops, loss and accuracy with the thresholds by loop instead of the single one."""
    model: Any = CognexisForCausalLM.from_pretrained(checkpoint)
    model.to(device).eval()
    config, record = model.config, model.scheduler_record["value_head"]
    file = read_rows(data, vocab_size=config.vocab_size, max_length=config.max_position_embeddings)
    is_own = record["fit"]["data_checksum"] == file.checksum
    rows: list[DataRow] = rows_of_split(file.rows, "test") if is_own else list(file.rows)
    scheduler = {"type": "value_head", "loop_thresholds": record["calibrated"]["loop_thresholds"]}
    return run_outcome(model, rows, scheduler, num_loops=num_loops, dependency="row")


def section(found: dict[str, Any], report_text: str, by_loop: dict[str, float], picture: str) -> str:
    """The report's text one level lower, its picture, and what thresholds by loop give."""
    lines = report_text.splitlines()[1:]
    lowered = "\n".join(f"#{line}" if line.startswith("#") else line for line in lines).strip()
    best = next(row for row in found["operating_points"]["row"] if row["policy"] == "value_head")
    return "\n\n".join(
        [
            lowered,
            f"With thresholds by loop, whole rows halt after {by_loop['mean_loops']:.4g} loops with a loss of "
            f"{by_loop['loss']:.4g} and an accuracy of {by_loop['accuracy']:.4g}; with the single one after "
            f"{best['mean_loops']:.4g}.",
            f"![frontiers and reliability]({picture})",
        ]
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
        by_loop = by_loop_outcome(checkpoint, data, num_loops, options.device)
        picture = f"value_head_{Path(name).stem}_{options.device}.png"
        if (out / "report.png").is_file():
            shutil.copy(out / "report.png", RESULTS / picture)
        text = section(found, (out / "report.md").read_text("utf-8"), by_loop, picture)
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
