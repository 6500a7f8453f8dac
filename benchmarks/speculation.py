"""How much faster self-speculation decodes than plain decoding at the same number of loops.

    python benchmarks/speculation.py runs/quickstart [--num-loops 8] [--tokens 1000] [--device auto] [--repeats 3]

Greedy, one row, from a random prompt of eight tokens. The plain run is the peer and the reference: both are timed in
turns, the best of the repeats counts, and the tokens of every setting are compared with the plain ones.

Writes ``benchmarks/results/speculation_<device>.md``.
"""

import argparse
import platform
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from cognexis import CognexisForCausalLM

RESULTS = Path(__file__).parent / "results"
DRAFTS = (1, 2, 4)
TOKENS = (2, 4, 8)
PROMPT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Time self-speculation beside plain decoding.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num-loops", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = CognexisForCausalLM.from_pretrained(arguments.checkpoint).to(device).eval()
    generator = torch.Generator().manual_seed(arguments.seed)
    prompt = torch.randint(4, model.config.vocab_size, (1, PROMPT), generator=generator).to(device)
    room = model.config.max_position_embeddings - PROMPT
    settings: dict[str, dict[str, Any]] = {"plain": {}}
    for draft in DRAFTS:
        if draft < arguments.num_loops:
            for tokens in TOKENS:
                settings[f"draft {draft}, {tokens} tokens"] = {
                    "speculative_draft_loops": draft,
                    "speculative_tokens": tokens,
                }
    best = dict.fromkeys(settings, float("inf"))
    sequences: dict[str, list[int]] = {}
    rates: dict[str, float | None] = {}
    used: dict[str, int] = {}
    for _ in range(arguments.repeats):
        for name, extra in settings.items():
            count = min(arguments.tokens, room)
            start = time.perf_counter()
            result = generate(model, prompt, count, arguments.num_loops, extra)
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - start)
            sequences[name] = result.sequences[0].tolist()
            rates[name] = result.loop_diagnostics.get("speculation", {}).get("acceptance_rate")
            used[name] = int(result.budget_used[0])
    new = len(sequences["plain"]) - PROMPT
    plain = sequences["plain"]
    rows = [
        f"| {name} | {new / best[name]:.1f} | {best['plain'] / best[name]:.2f} | {used[name] / new:.2f} | "
        f"{'' if rates[name] is None else format(rates[name], '.3f')} | {agreement(plain, sequences[name])} |"
        for name in settings
    ]
    place = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    text = "\n".join(
        [
            f"# Self-speculation on {place}",
            "",
            f"{arguments.checkpoint.name}: {model.num_parameters():,} parameters, {new} greedy tokens at "
            f"{arguments.num_loops} loops, one row, torch {torch.__version__}, best of {arguments.repeats}.",
            "",
            "| setting | tokens/s | ratio to plain | core passes per token | accepted | equal tokens |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
    target = RESULTS / f"speculation_{device}.md"
    target.write_text(text)
    print(text)


def generate(model: Any, prompt: Tensor, count: int, num_loops: int, extra: dict[str, Any]) -> Any:
    return model.generate(
        prompt,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        num_loops=num_loops,
        return_loop_stats=True,
        **extra,
    )


def agreement(reference: list[int], other: list[int]) -> str:
    """How many of the new tokens agree before the first difference."""
    same = next((i for i, (a, b) in enumerate(zip(reference, other, strict=True)) if a != b), len(reference))
    return f"{same - PROMPT} of {len(reference) - PROMPT}"


if __name__ == "__main__":
    main()
