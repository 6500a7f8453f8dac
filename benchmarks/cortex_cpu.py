"""How fast the memory cells are on one CPU thread, beside the public cortexcore package.

    python benchmarks/cortex_cpu.py [--repeats 5] [--only lstm,mlstm] [--keep] [--recorded]

Per cell at B=4, T=256, H=256 in float32: a forward pass without gradients, forward and backward with a gradient of
ones for the output, and one step of a single token. The times are CPU seconds of the process, so that work beside it
on the machine disturbs them little. The calls of both packages are timed in turns and the best of the repeats
counts; the first calls are shown as well, since they would contain a compilation. The mLSTM is also timed at lengths
that its chunk does not divide. Before anything is timed, every cell is compared in float64 with its reference form on
a small input.

cortexcore is timed in the same run where it can be imported; elsewhere, and with ``--recorded`` (compiling its
AGaLiTe takes minutes), the rows show figures that were recorded with cortexcore 0.1.x on another machine, so that
only their order of magnitude can be compared.

Writes ``benchmarks/results/cortex_cpu.md``; with ``--keep``, rows that were not asked for stay as they are there.
"""

import argparse
import copy
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from cognexis.cortex_layers import config as ours
from cognexis.cortex_layers.cells import build_cell
from cognexis.kernels.dispatch import requested_form

RESULT = Path(__file__).parent / "results" / "cortex_cpu.md"
B, T, H = 4, 256, 256


@dataclass(frozen=True)
class Case:
    """One row: a cell, whether resets happen, and cortexcore's recorded milliseconds (forward, both, step)."""

    title: str
    config: str
    options: dict[str, Any]
    recorded: tuple[float | None, float | None, float | None]
    has_resets: bool = False


CASES = {
    "lstm": Case("LSTM", "LSTMCellConfig", {}, (14, 33, 0.52)),
    "lstm_resets": Case("LSTM, resets", "LSTMCellConfig", {}, (146, 505, None), has_resets=True),
    "mlstm": Case("mLSTM, chunk 64", "mLSTMCellConfig", {"chunk_size": 64}, (12, 37, 0.58)),
    "mlstm_long": Case("mLSTM, chunk 256", "mLSTMCellConfig", {"chunk_size": 256}, (52, 482, None)),
    "slstm": Case("sLSTM", "sLSTMCellConfig", {}, (72, 530, 1.3)),
    "axon": Case("Axon", "AxonConfig", {}, (30, 56, 0.35)),
    "xl": Case("XL", "XLCellConfig", {}, (18, 47, 1.9)),
    "xl_axon": Case("XL with Axon projections", "XLCellConfig", {"use_axon_qkv": True}, (194, 549, 51)),
    "agalite": Case("AGaLiTe", "AGaLiTeCellConfig", {}, (43, 1652, 0.67)),
    "conv": Case("convolution", "CausalConv1dConfig", {}, (0.8, 3.4, 0.10)),
    "conv_resets": Case("convolution, resets", "CausalConv1dConfig", {}, (24, 153, None), has_resets=True),
}
MODES = ("forward", "forward+backward", "step")
STEPS = 10  # tokens per timed call of a step
HEADING = [
    "cell",
    *MODES,
    "first",
    *(f"cc {mode}" for mode in MODES),
    "cc first",
    *(f"ratio {mode}" for mode in MODES),
    "difference",
    "cc figures",
]
LENGTHS = (64, 65, 100, 127, 200, 255, 256, 257, 300)


def make_resets(length: int) -> Tensor:
    """One position in twenty."""
    return torch.rand(B, length, generator=torch.Generator().manual_seed(1)) < 0.05


def calls_of(cell: torch.nn.Module, has_resets: bool) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, H, generator=generator)
    token = torch.randn(B, H, generator=generator)
    x_with_gradient = x.clone().requires_grad_()
    resets = make_resets(T) if has_resets else None
    with torch.no_grad():
        state = cell(x[:, :8], None)[1]

    def forward() -> None:
        with torch.no_grad():
            cell(x, None, resets=resets)

    def both() -> None:
        cell.zero_grad(set_to_none=True)
        x_with_gradient.grad = None
        cell(x_with_gradient, None, resets=resets)[0].sum().backward()

    def step() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                cell(token, state)

    return dict(zip(MODES, (forward, both, step), strict=True))


def check_parity(case: Case) -> float:
    """The largest difference to the reference form, output and gradients, in float64 with random parameters."""
    width = 16
    torch.manual_seed(0)
    options = case.options | {"hidden_size": width}
    cell = build_cell(getattr(ours, case.config)(**options)).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(B, 70, width, dtype=torch.float64)
    resets = make_resets(70) if case.has_resets else None
    found = []
    for form in ("reference", "vectorised"):
        os.environ["COGNEXIS_KERNELS"] = form
        requested_form.cache_clear()
        fresh, start = copy.deepcopy(cell), x.clone().requires_grad_()
        y = fresh(start, None, resets=resets)[0]
        y.square().sum().backward()
        found.append([y.detach(), start.grad, *(p.grad for p in fresh.parameters() if p.grad is not None)])
    del os.environ["COGNEXIS_KERNELS"]
    requested_form.cache_clear()
    difference = max(((a - b).abs().max() / (1 + a.abs().max())).item() for a, b in zip(*found, strict=True))
    assert difference < 1e-9, f"{case.title}: differs from its reference by {difference:.1e}"
    return difference


def build_peer(case: Case) -> torch.nn.Module | None:
    """The same cell of cortexcore, if it is installed."""
    try:
        from cortex import config as theirs
        from cortex.cells import build_cell as build
    except ImportError:
        return None
    return build(getattr(theirs, case.config)(**case.options, hidden_size=H))


def time_in_turns(
    calls: dict[tuple[str, ...], Callable[[], object]], repeats: int
) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], float]]:
    """Milliseconds of the first call of each, and of the best of the repeats that follow."""
    first: dict[tuple[str, ...], float] = {}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            milliseconds = 1000 * (time.process_time() - start)
            if name in first:
                best[name] = min(best[name], milliseconds)
            else:
                first[name] = milliseconds
    return first, best


def cell_row(key: str, repeats: int, with_peer: bool) -> list[str]:
    """The table's row of one cell; recorded figures of cortexcore unless ``with_peer`` and it is installed."""
    case = CASES[key]
    difference = check_parity(case)
    torch.manual_seed(0)
    cells = {
        "ours": build_cell(getattr(ours, case.config)(**case.options, hidden_size=H)),
        "peer": build_peer(case) if with_peer else None,
    }
    calls = {
        (owner, mode): call
        for owner, cell in cells.items()
        if cell is not None
        for mode, call in calls_of(cell, case.has_resets).items()
    }
    first, best = time_in_turns(calls, repeats)
    first_sum = {owner: sum(first[owner, mode] for mode in MODES) for owner, _ in first}
    for name in best:
        best[name] /= STEPS if name[1] == "step" else 1
    mine = [best["ours", mode] for mode in MODES]
    has_peer = cells["peer"] is not None
    other = [best["peer", mode] for mode in MODES] if has_peer else list(case.recorded)
    return [
        case.title,
        *map(shown, mine),
        shown(first_sum["ours"]),
        *map(shown, other),
        shown(first_sum.get("peer")),
        *("" if b is None else f"{b / a:.1f}" for a, b in zip(mine, other, strict=True)),
        f"{difference:.0e}",
        "measured" if has_peer else "recorded",
    ]


def shown(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.3g}"


def length_rows(repeats: int) -> list[list[str]]:
    """The mLSTM, forward and backward, at several lengths: microseconds per token and how far from the best."""
    torch.manual_seed(0)
    cell = build_cell(ours.mLSTMCellConfig(hidden_size=H))

    def call_at(length: int) -> Callable[[], object]:
        x = torch.randn(B, length, H, requires_grad=True)

        def both() -> None:
            cell.zero_grad(set_to_none=True)
            x.grad = None
            cell(x, None)[0].sum().backward()

        return both

    _, best = time_in_turns({(str(length),): call_at(length) for length in LENGTHS}, repeats)
    per_token = [1000 * best[str(length),] / (B * length) for length in LENGTHS]
    return [
        [str(length), f"{value:.1f}", f"{value / min(per_token):.2f}"]
        for length, value in zip(LENGTHS, per_token, strict=True)
    ]


def as_table(heading: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def rows_before() -> dict[str, list[str]]:
    """The rows of the first table of the file, by cell."""
    if not RESULT.is_file():
        return {}
    table = RESULT.read_text("utf-8").split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row for row in rows if len(row) == len(HEADING)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(CASES)}")
    parser.add_argument("--keep", action="store_true", help="keep the other rows of the file")
    parser.add_argument("--recorded", action="store_true", help="use recorded figures of cortexcore")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = rows_before() if options.keep else {}
    for key in options.only.split(",") if options.only else CASES:
        known[CASES[key].title] = cell_row(key, options.repeats, not options.recorded)
        print(known[CASES[key].title], flush=True)
    rows = [known[case.title] for case in CASES.values() if case.title in known]
    text = "\n".join(
        [
            "# Speed of the memory cells on a CPU",
            "",
            f"B={B}, T={T}, H={H}, float32, one thread, {platform.machine()}, torch {torch.__version__}; best of "
            f'{options.repeats}, in milliseconds of CPU time; "first" is the sum of the first call of each kind. '
            f"A step is one token for all {B} rows. Resets are at 5 % of the positions.",
            "",
            *as_table(HEADING, rows),
            "",
            "A ratio above 1 means that the cell here is faster. The figures of cortexcore (cc) were measured in the "
            "same run, in turns with ours, or recorded with version 0.1.x on one thread of another machine. The "
            "difference is the largest one, relative, of output and gradients to the reference form in float64.",
            "",
            "## The mLSTM at any length",
            "",
            "Chunks of 64, forward and backward.",
            "",
            *as_table(["T", "microseconds per token", "relative to the best"], length_rows(options.repeats)),
            "",
        ]
    )
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
