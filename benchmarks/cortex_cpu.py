"""How fast the memory cells are on one CPU thread, beside figures of the public cortexcore package.

    python benchmarks/cortex_cpu.py [--repeats 5] [--only lstm,mlstm]

Per cell at B=4, T=256, H=256 in float32: a forward pass without gradients, forward and backward with a gradient of
ones for the output, and one step of a single token. The calls of all cells are timed in turns and the best of the
repeats counts. Before anything is timed, every cell is compared in float64 with its reference form on a small input.

cortexcore is timed in the same run where it can be imported; elsewhere the table shows figures that were recorded with
cortexcore 0.1.x on another machine, so that only their order of magnitude can be compared.

Writes ``benchmarks/results/cortex_cpu.md``.
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
            for _ in range(10):
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


def best_times(calls: dict[tuple[str, ...], Callable[[], object]], repeats: int) -> dict[tuple[str, ...], float]:
    best = dict.fromkeys(calls, float("inf"))
    for round_number in range(repeats + 1):  # the first round warms up
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if round_number:
                best[name] = min(best[name], seconds)
    return best


def measure(keys: list[str], repeats: int) -> tuple[dict[tuple[str, ...], float], bool]:
    """Milliseconds by (key, owner, mode), and whether cortexcore was there."""
    calls: dict[tuple[str, ...], Callable[[], object]] = {}
    for key in keys:
        case = CASES[key]
        torch.manual_seed(0)
        cells = {
            "ours": build_cell(getattr(ours, case.config)(**case.options, hidden_size=H)),
            "peer": build_peer(case),
        }
        for owner, cell in cells.items():
            if cell is not None:
                calls |= {(key, owner, mode): call for mode, call in calls_of(cell, case.has_resets).items()}
    seconds = best_times(calls, repeats)
    times = {name: 1000 * value / (10 if name[2] == "step" else 1) for name, value in seconds.items()}
    return times, any(owner == "peer" for _, owner, _ in times)


def table(keys: list[str], times: dict[tuple[str, ...], float], has_peer: bool) -> list[str]:
    heading = ["cell", *(f"{mode}, ms" for mode in MODES), *(f"cortexcore {mode}, ms" for mode in MODES)]
    lines = [[*heading, *(f"ratio {mode}" for mode in MODES)]]
    lines.append(["---"] * len(lines[0]))
    for key in keys:
        case = CASES[key]
        mine = [times[key, "ours", mode] for mode in MODES]
        other = [times[key, "peer", mode] for mode in MODES] if has_peer else list(case.recorded)
        ratios = ["" if b is None else f"{b / a:.1f}" for a, b in zip(mine, other, strict=True)]
        shown = ["" if value is None else f"{value:.3g}" for value in other]
        lines.append([case.title, *(f"{value:.3g}" for value in mine), *shown, *ratios])
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(CASES)}")
    options = parser.parse_args()
    keys = options.only.split(",") if options.only else list(CASES)
    torch.set_num_threads(1)
    worst = max(check_parity(CASES[key]) for key in keys)
    times, has_peer = measure(keys, options.repeats)
    source = (
        "The figures of cortexcore were measured in the same run."
        if has_peer
        else "cortexcore is not installed here. Its figures are recorded ones, of version 0.1.x on one thread of "
        "another machine at the same sizes, so the ratios show the order of magnitude only."
    )
    text = "\n".join(
        [
            "# Speed of the memory cells on a CPU",
            "",
            f"B={B}, T={T}, H={H}, float32, one thread, {platform.machine()}, torch {torch.__version__}; best of "
            f"{options.repeats}. A step is one token for all {B} rows. Resets are at 5 % of the positions.",
            "",
            *table(keys, times, has_peer),
            "",
            f"A ratio above 1 means that the cell here is faster. {source}",
            "",
            "Before the timing every cell agreed with its reference form: the largest relative difference of output "
            f"and gradients was {worst:.0e} in float64.",
            "",
        ]
    )
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
