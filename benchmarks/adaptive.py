"""What adaptive depth saves on a trained model: accuracy against loops, distance to an oracle, tokens per second.

    python -m cognexis.training.windowed_parity --out runs/parity     # on a GPU: --hidden-size 128 --max-length 32
    python benchmarks/adaptive.py runs/parity [--device auto] [--rows 128] [--max-loops 128] [--repeats 3]

Held-out rows of the trained length and of longer ones. Stopped tokens are really frozen: later loops read their last
state. Rules are the KL divergence of successive predictions and the relative change of the state, both below a
threshold, each with the three dependencies "token", "prefix" and "row". Means are over the bits, BOS left out.

    oracle   first loop from which a bit's answer stays right in a full-depth run; 1 where it is wrong at the end
    settled  first loop from which the answer stays what it is in the end, right or wrong
    bound    the fewest loops after which the first bit can be known at all (``fewest_loops``)
    regret   (mean loops - mean oracle loops) / mean oracle loops

The oracle leaves states unfrozen, so that a real scheduler may need more. Before anything is measured, the adaptive
modes are compared in float64 with a plain masked run that this file makes from a fixed one by a hook. Times are the
best of the repeats, the modes measured in turns, the device waited for.

Writes ``benchmarks/results/adaptive_<device>.md`` and, where matplotlib is installed, a picture of the frontier.
Letters: B rows, T tokens, L loops, V vocabulary.
"""

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from cognexis import CognexisForCausalLM
from cognexis.checkpoints.json_file import read_json
from cognexis.decoder.cache import CognexisCache
from cognexis.tasks.windowed_parity import fewest_loops
from cognexis.training.windowed_parity import ParitySettings, answers_by_loop, held_out

RESULTS = Path(__file__).parent / "results"
SEED = 1_000_003
ROWS_PER_CALL = 64
DEPENDENCIES = ("token", "prefix", "row")
SIGNALS = ("KL", "change")
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
TOLERANCE = 0.002
ALLOWED_SHARE = 0.55
BATCHES = (1, 32)


@dataclass(frozen=True)
class Rule:
    """One signal below one threshold."""

    signal: str
    threshold: float
    patience: int = 1

    @property
    def scheduler(self) -> dict[str, Any]:
        common = {"type": "rule_based", "patience": self.patience}
        if self.signal == "KL":
            return common | {"min_delta": 0.0, "kl_threshold": self.threshold}
        return common | {"min_delta": self.threshold, "delta_kind": "relative"}

    def __str__(self) -> str:
        times = "" if self.patience == 1 else f", {self.patience} times"
        return f"{self.signal} < {self.threshold:g}{times}"


RULES = (
    *(Rule("KL", threshold) for threshold in (5e-4, 1e-5, 1e-7)),
    *(Rule("KL", threshold, patience=3) for threshold in (1e-2, 5e-4)),
    *(Rule("change", threshold) for threshold in (0.5, 0.3, 0.1, 0.03)),
)
DECODE_RULES = (Rule("KL", 1e-5), Rule("change", 0.1))


@dataclass(frozen=True)
class Halting:
    """A rule with whose agreement a token needs; the settings of one adaptive run."""

    rule: Rule
    dependency: str
    max_loops: int
    cache_policy: str = "depth_indexed"
    compaction: str = "auto"
    """Whether stopped tokens are left out of the computation; an attribute of the model, not of a call."""

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "loop_mode": "adaptive_token",
            "scheduler": self.rule.scheduler,
            "halt_dependency": self.dependency,
            "cache_policy": self.cache_policy,
            "max_loops": self.max_loops,
            "allow_extrapolation": True,
        }

    def __str__(self) -> str:
        policy = "" if self.cache_policy == "depth_indexed" else f", {self.cache_policy} cache"
        compaction = "" if self.compaction == "auto" else f", compaction {self.compaction}"
        return f"{self.rule}, {self.dependency}{policy}{compaction}"


@dataclass(frozen=True)
class Fixed:
    """The same number of loops for every token."""

    num_loops: int
    compaction = "auto"

    @property
    def arguments(self) -> dict[str, Any]:
        return {"num_loops": self.num_loops, "allow_extrapolation": True}

    def __str__(self) -> str:
        return f"fixed at {self.num_loops}"


Mode = Fixed | Halting


@dataclass(frozen=True)
class Score:
    """What one way of halting gave on the rows of one length."""

    halting: Halting
    accuracy: float
    mean_loops: float
    most_loops: int


@dataclass(frozen=True)
class FullDepth:
    """A run of all loops on the rows of one length, its answers read after every loop."""

    accuracy: Tensor  # [L]
    oracle_loops: float
    settled_loops: float


def masked_run(model: CognexisForCausalLM, ids: Tensor, halting: Halting) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` and loops ``[B, T]`` of a fixed run in which a hook freezes the tokens that stopped.

    The model's recurrence must start from the prelude's output.
    """
    body: Any = model.model
    stage_arguments: dict[str, Any] = {}
    state, log_before = torch.empty(0), None
    active = torch.ones_like(ids, dtype=torch.bool)
    loops, times = torch.zeros_like(ids), torch.zeros_like(ids)

    def begin(module: Any, args: Any, kwargs: dict[str, Any], h0: Tensor) -> None:
        nonlocal state
        stage_arguments.update(kwargs)
        state = h0

    def freeze(module: Any, args: Any, update: Tensor) -> Tensor:
        nonlocal state, log_before, active, loops, times
        before, state = state, torch.where(active[..., None], update, state)
        loops = loops + active
        if halting.rule.signal == "KL":
            logits = model.lm_head(body.final_norm(body.coda(state, **stage_arguments)))
            now = logits.log_softmax(-1)
            value = torch.full_like(now[..., 0], torch.inf)
            if log_before is not None:
                value = (log_before.exp() * (log_before - now)).sum(-1)
            log_before = now
        else:
            value = (state - before).norm(dim=-1) / (before.norm(dim=-1) + 1e-6)
        times = torch.where(value < halting.rule.threshold, times + 1, 0)
        settled = times >= halting.rule.patience
        agrees = settled | ~active
        may_stop = {"token": settled, "prefix": agrees.cumprod(1).bool(), "row": agrees.all(1, keepdim=True)}
        active = active & ~may_stop[halting.dependency]
        return state

    handles = [
        body.prelude.register_forward_hook(begin, with_kwargs=True),
        body.recurrent.loop_state.register_forward_hook(freeze),
    ]
    try:
        logits = model(input_ids=ids, use_cache=False, **Fixed(halting.max_loops).arguments).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, loops


def adaptive_run(model: CognexisForCausalLM, ids: Tensor, halting: Halting) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` and loops ``[B, T]`` of an adaptive forward."""
    outputs = forward(model, halting, input_ids=ids, use_cache=False)
    return outputs.logits, outputs.loop_counts


def forward(model: CognexisForCausalLM, mode: Mode, **inputs: Any) -> Any:
    model.model.compaction = mode.compaction
    return model(**inputs, **mode.arguments)


@torch.no_grad()
def check_parity(model: CognexisForCausalLM, num_bits: int, max_loops: int) -> float:
    """The largest difference of logits between adaptive and masked runs in float64; the loops must be equal."""
    wide = copy.deepcopy(model).double()
    ids = held_out(6, num_bits, SEED)[0].to(model.device)
    worst = 0.0
    for rule, dependency, compaction in product(RULES, DEPENDENCIES, ("exact", "off")):
        halting = Halting(rule, dependency, max_loops, compaction=compaction)
        (logits, loops), (expected, expected_loops) = (run(wide, ids, halting) for run in (adaptive_run, masked_run))
        assert torch.equal(loops, expected_loops), f"{halting}: stops at other loops than the masked run"
        worst = max(worst, (logits - expected).abs().max().item())
    assert worst < 1e-9, f"adaptive logits differ from the masked run by {worst:.1e}"
    return worst


def full_depth(model: CognexisForCausalLM, ids: Tensor, labels: Tensor, max_loops: int) -> FullDepth:
    """Run all loops once and find the loop from which each answer stays."""
    every = range(1, max_loops + 1)
    accuracy = torch.zeros(max_loops, dtype=torch.double)
    oracle = settled = 0.0
    for some_ids, some_labels in zip(ids.split(ROWS_PER_CALL), labels.split(ROWS_PER_CALL), strict=True):
        answers = answers_by_loop(model, some_ids, every)[..., 1:]
        is_right = answers == some_labels[:, 1:]
        accuracy += is_right.sum((1, 2)).double().cpu()
        oracle += first_lasting(is_right).where(is_right[-1], 1).sum().item()
        settled += first_lasting(answers == answers[-1]).sum().item()
    count = labels[:, 1:].numel()
    return FullDepth(accuracy / count, oracle / count, settled / count)


def first_lasting(holds: Tensor) -> Tensor:
    """First loop, from 1, from which ``holds`` ``[L, ...]`` is true to the end; L + 1 where it never is."""
    return len(holds) + 1 - holds.flip(0).long().cumprod(0).sum(0)


@torch.no_grad()
def score(model: CognexisForCausalLM, ids: Tensor, labels: Tensor, halting: Halting) -> Score:
    right = loops_run = most = 0
    for some_ids, some_labels in zip(ids.split(ROWS_PER_CALL), labels.split(ROWS_PER_CALL), strict=True):
        logits, loops = adaptive_run(model, some_ids, halting)
        right += int((logits.argmax(-1) == some_labels)[:, 1:].sum())
        loops_run += int(loops[:, 1:].sum())
        most = max(most, int(loops.max()))
    count = labels[:, 1:].numel()
    return Score(halting, right / count, loops_run / count, most)


def cheapest(scores: list[Score], dependency: str, signal: str, full: float) -> Score:
    """The score with the fewest loops that keeps the accuracy, or the most accurate one."""
    own = [s for s in scores if (s.halting.dependency, s.halting.rule.signal) == (dependency, signal)]
    kept = [found for found in own if found.accuracy >= full - TOLERANCE]
    return min(kept, key=lambda found: found.mean_loops) if kept else max(own, key=lambda found: found.accuracy)


@torch.no_grad()
def prefill(model: CognexisForCausalLM, ids: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """Answers ``[B, T]`` and loops ``[B, T]`` of whole rows."""
    outputs = forward(model, mode, input_ids=ids, use_cache=False)
    return outputs.logits.argmax(-1), by_token(outputs.loop_counts, ids)


@torch.no_grad()
def decode(model: CognexisForCausalLM, ids: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """The same, token by token with a cache; the rows' own tokens are fed.

    The cache of ``last_exited`` gets a single slot, so that earlier tokens show their last state to every loop.
    """
    answers, loops = [], []
    slots = model.config.kv_slots
    model.config.kv_slots = 1 if getattr(mode, "cache_policy", "") == "last_exited" else slots
    try:
        cache = CognexisCache(model.config)
        for token in ids.split(1, dim=1):
            outputs = forward(model, mode, input_ids=token, past_key_values=cache, use_cache=True)
            answers.append(outputs.logits.argmax(-1))
            loops.append(by_token(outputs.loop_counts, token))
    finally:
        model.config.kv_slots = slots
    return torch.cat(answers, dim=1), torch.cat(loops, dim=1)


def by_token(loop_counts: Tensor, ids: Tensor) -> Tensor:
    return (loop_counts if loop_counts.ndim == 2 else loop_counts[:, None]).expand_as(ids)


def best_seconds(calls: Mapping[Any, Callable[[], object]], repeats: int, device: torch.device) -> dict[Any, float]:
    best: dict[Any, float] = dict.fromkeys(calls, float("inf"))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for round_number in range(repeats + 1):  # the first round warms up
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds = time.perf_counter() - start
            if round_number:
                best[name] = min(best[name], seconds)
    return best


def speed_lines(
    model: CognexisForCausalLM,
    phase: Callable[[CognexisForCausalLM, Tensor, Mode], tuple[Tensor, Tensor]],
    num_bits: int,
    modes: list[Mode],
    repeats: int,
) -> list[list[str]]:
    """One line for each batch size and mode; the first mode is what the others are compared with."""
    lines = []
    all_ids, all_labels = (rows.to(model.device) for rows in held_out(max(BATCHES), num_bits, SEED + 1))
    for batch in BATCHES:
        ids, labels = all_ids[:batch], all_labels[:batch]
        calls = {mode: partial(phase, model, ids, mode) for mode in dict.fromkeys(modes)}
        seconds = best_seconds(calls, repeats, model.device)
        for mode, call in calls.items():
            answers, loops = call()
            lines.append(
                [
                    f"{phase.__name__}, {num_bits} bits",
                    str(batch),
                    str(mode),
                    f"{loops[:, 1:].double().mean().item():.1f}",
                    f"{(answers == labels)[:, 1:].double().mean().item():.4f}",
                    f"{ids.numel() / seconds[mode]:,.0f}",
                    f"{seconds[modes[0]] / seconds[mode]:.2f}",
                ]
            )
    return lines


def markdown(heading: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *lines)]


def depth_section(full: dict[int, FullDepth]) -> list[str]:
    depths = [depth for depth in DEPTHS if depth <= len(next(iter(full.values())).accuracy)]
    lines = [
        [str(num_bits), *(f"{found.accuracy[depth - 1]:.4f}" for depth in depths)] for num_bits, found in full.items()
    ]
    return ["## Fixed depths", "", "Accuracy by length and loops.", "", *markdown(["bits", *map(str, depths)], lines)]


def frontier_section(num_bits: int, full: FullDepth, scores: list[Score], window: int) -> list[str]:
    bound = sum(fewest_loops(position, window) for position in range(1, num_bits + 1)) / num_bits
    of_row = {found.halting.rule: found.mean_loops for found in scores if found.halting.dependency == "row"}
    lines = [
        [
            str(found.halting.rule),
            found.halting.dependency,
            f"{found.mean_loops:.2f}",
            str(found.most_loops),
            f"{found.accuracy:.4f}",
            f"{found.accuracy - full.accuracy[-1].item():+.4f}",
            f"{found.mean_loops / of_row[found.halting.rule]:.2f}",
            f"{found.mean_loops / full.oracle_loops - 1:+.2f}",
        ]
        for found in scores
    ]
    heading = ["rule", "dependency", "mean loops", "most", "accuracy", "to full depth", "to row rule", "regret"]
    prefix = [found for found in scores if found.halting.dependency == "prefix"]
    kept = [found for found in prefix if found.accuracy >= full.accuracy[-1].item() - TOLERANCE]
    good = [str(f.halting.rule) for f in kept if f.mean_loops <= ALLOWED_SHARE * of_row[f.halting.rule]]
    verdict = f"is met by {'; '.join(good)}" if good else "is not met"
    return [
        f"## {num_bits} bits",
        "",
        f"Full depth: accuracy {full.accuracy[-1]:.4f}. Mean loops: oracle {full.oracle_loops:.2f}, settled "
        f"{full.settled_loops:.2f}, bound {bound:.2f}.",
        "",
        *markdown(heading, lines),
        "",
        f"The goal for the prefix rule, within {TOLERANCE} of full depth at no more than {ALLOWED_SHARE:.0%} of the "
        f"row rule's loops, {verdict}.",
    ]


def draw_frontier(full: dict[int, FullDepth], scores: dict[int, list[Score]], path: Path) -> bool:
    """One panel for each length; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4 * len(full), 3.6), layout="constrained")
    panels = figure.subplots(1, len(full), sharey=True, squeeze=False)[0]
    colours = dict(zip(DEPENDENCIES, ("tab:red", "tab:blue", "tab:green"), strict=True))
    for panel, (num_bits, found) in zip(panels, full.items(), strict=True):
        panel.plot(range(1, len(found.accuracy) + 1), found.accuracy.tolist(), color="grey", label="fixed")
        panel.axvline(found.oracle_loops, color="black", linestyle=":", label="oracle")
        for dependency, colour in colours.items():
            for signal, style in zip(SIGNALS, ("o-", "x--"), strict=True):
                own = sorted(
                    (s.mean_loops, s.accuracy)
                    for s in scores[num_bits]
                    if (s.halting.dependency, s.halting.rule.signal) == (dependency, signal)
                )
                panel.plot(*zip(*own, strict=True), style, color=colour, label=f"{dependency}, {signal}")
        panel.set(title=f"{num_bits} bits", xlabel="mean loops", xscale="log")
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    return True


def speed_section(
    model: CognexisForCausalLM,
    full: dict[int, FullDepth],
    scores: dict[int, list[Score]],
    max_loops: int,
    decode_bits: int,
    repeats: int,
) -> list[str]:
    lines = []
    for num_bits in sorted({min(full), max(full)}):
        accuracy = full[num_bits].accuracy
        final = accuracy[-1].item()
        enough = int((accuracy >= final - TOLERANCE).nonzero()[0]) + 1
        modes: list[Mode] = [Fixed(max_loops)]
        for dependency, signal in product(DEPENDENCIES[::-1], SIGNALS):
            halting = cheapest(scores[num_bits], dependency, signal, final).halting
            choices = ("exact", "off") if dependency == "prefix" else ("auto",)
            modes += [replace(halting, compaction=compaction) for compaction in choices]
        modes.append(Fixed(enough))
        lines += speed_lines(model, prefill, num_bits, modes, repeats)
    alone = [Halting(rule, dependency, max_loops) for rule in DECODE_RULES for dependency in ("prefix", "token")]
    shared = [Halting(rule, "token", max_loops, "last_exited") for rule in DECODE_RULES]
    lines += speed_lines(model, decode, decode_bits, [Fixed(max_loops), *alone, *shared], repeats)
    heading = ["work", "rows", "mode", "mean loops", "accuracy", "tokens/s", "times fixed"]
    return [
        "## Speed",
        "",
        "Prefill of whole rows, and decoding token by token with a cache. In prefill, for each dependency and signal "
        "the rule that keeps the accuracy with the fewest loops was taken, or the most accurate where none keeps it. "
        "KL runs coda and head after every loop. The last fixed mode of each length has the fewest loops that "
        "suffice, which nobody knows beforehand. With the exact cache a new token reads what earlier ones were after "
        "as many loops, so that its own rule alone is deceived in decoding too; the last_exited cache, which is an "
        "approximation, shows it their last states.",
        "",
        *markdown(heading, lines),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max-loops", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--lengths", help="comma-separated numbers of bits; the default is the trained one, 64, 128, 256"
    )
    parser.add_argument("--decode-bits", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = ParitySettings(device=options.device).torch_device()
    trained = read_json(options.checkpoint / "accuracy.json")["settings"]["max_length"]
    lengths = [int(part) for part in options.lengths.split(",")] if options.lengths else [trained, 64, 128, 256]
    loaded: Any = CognexisForCausalLM.from_pretrained(options.checkpoint)
    model = loaded.to(device).eval()

    worst = check_parity(model, num_bits=40, max_loops=24)
    full: dict[int, FullDepth] = {}
    scores: dict[int, list[Score]] = {}
    for num_bits in lengths:
        ids, labels = (rows.to(device) for rows in held_out(options.rows, num_bits, SEED))
        full[num_bits] = full_depth(model, ids, labels, options.max_loops)
        scores[num_bits] = [
            score(model, ids, labels, Halting(rule, dependency, options.max_loops))
            for rule in RULES
            for dependency in DEPENDENCIES
        ]
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, one thread"
    path = RESULTS / f"adaptive_{device.type}.md"
    path.parent.mkdir(exist_ok=True)
    picture = draw_frontier(full, scores, path.with_suffix(".png"))
    text = "\n".join(
        [
            "# Adaptive depth",
            "",
            f"Windowed parity, trained on up to {trained} bits, {model.num_parameters():,} parameters; at most "
            f"{options.max_loops} loops, {options.rows} held-out rows, float32, {hardware}, torch "
            f"{torch.__version__}. Times are the best of {options.repeats}.",
            "",
            *depth_section(full),
            *(
                line
                for num_bits in lengths
                for line in (
                    "",
                    *frontier_section(num_bits, full[num_bits], scores[num_bits], model.config.sliding_window),
                )
            ),
            "",
            *([f"![Accuracy and mean loops]({path.stem}.png)", ""] if picture else []),
            *speed_section(model, full, scores, options.max_loops, options.decode_bits, options.repeats),
            "",
            "Before the measurements the adaptive runs were compared in float64 with plain masked ones, for every "
            f"rule and dependency: equal loops, logits within {worst:.0e}.",
            "",
        ]
    )
    print(text)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
