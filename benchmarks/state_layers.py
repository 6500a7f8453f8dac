"""Layers with memory over time beside attention: bytes and time of decoding by length, and what training learns.

    python benchmarks/state_layers.py decoding                     one row per model and length
    python benchmarks/state_layers.py training --seeds 0 1 2       held-out loss of models of equal size

``decoding`` reads a prompt in chunks and times steps of one token behind it; the figure to look at is the ratio of the
longest to the shortest prompt. ``training`` gives all models the same text, steps, batches and loop counts; the width
of the feed-forward layers of the models with attention is chosen so that the parameters are as many as those of
cognexis-cortex-tiny.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cognexis import CognexisCache, CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.text_corpus import standard_library_corpus

CHUNK = 1000
MODELS = ("tiny", "cortex-tiny", "axon-tiny", "xlstm-tiny")
LENGTH, ROWS, WARMUP = 256, 32, 50


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def decoding(name: str, length: int, device: str, loops: int, steps: int = 200) -> dict[str, Any]:
    """Bytes of the cache behind a prompt of ``length`` tokens, and milliseconds of one more token."""
    torch.manual_seed(0)
    config = CognexisConfig.from_variant(name, vocab_size=256, max_position_embeddings=length + steps + 1)
    model = CognexisForCausalLM(config).eval().to(device)
    ids = torch.randint(3, 256, (1, length), device=device)
    cache = CognexisCache(config)
    for chunk in ids.split(CHUNK, dim=1):
        model(chunk, past_key_values=cache, num_loops=loops, logits_to_keep=1)
    size, token, times = cache.memory_bytes(), ids[:, :1], []
    for _ in range(steps):
        synchronise(device)
        start = time.perf_counter()
        model(token, past_key_values=cache, num_loops=loops)
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - start))
    return {"model": name, "tokens": length, "bytes": size, "ms_per_token": statistics.median(times[20:])}


def sized(name: str, wanted: int, vocab_size: int) -> CognexisConfig:
    """The named size; with attention in it, feed-forward layers such that there are about ``wanted`` parameters."""
    config = CognexisConfig.from_variant(name, vocab_size=vocab_size)
    if not config.has_attention:
        return config
    blocks = sum(kind == "full_attention" for s in ("prelude", "core", "coda") for kind in config.stage_layer_types(s))
    missing = wanted - parameters(config)
    width = config.intermediate_size + round(missing / (3 * config.hidden_size * blocks))
    return CognexisConfig.from_variant(name, vocab_size=vocab_size, intermediate_size=width)


def parameters(config: CognexisConfig) -> int:
    with torch.device("meta"):
        return int(CognexisForCausalLM(config).num_parameters())


def training(task: tuple[str, int, int, str, int]) -> dict[str, Any]:
    """Train one model on bytes of text; returns bits per byte of held-out text at several depths."""
    name, seed, steps, device, characters = task
    if device == "cpu":
        torch.set_num_threads(1)
    seen, unseen = (
        torch.tensor(list("\n".join(part.documents).encode()), dtype=torch.long) + 3
        for part in standard_library_corpus(characters).split()
    )
    torch.manual_seed(seed)
    config = sized(name, parameters(CognexisConfig.from_variant("cortex-tiny", vocab_size=259)), 259)
    model = CognexisForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * max(0.02, 1.0 - step / steps)
    )
    draw = torch.Generator().manual_seed(1000 + seed)
    start = time.perf_counter()
    for _ in range(steps):
        at = torch.randint(0, len(seen) - LENGTH, (ROWS,), generator=draw)
        loops = 1 + min(7, int(torch.poisson(torch.tensor(3.0), generator=draw)))
        ids = torch.stack([seen[i : i + LENGTH] for i in at.tolist()]).to(device)
        loss = model(ids, labels=ids, num_loops=loops, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    model.eval()
    rows = unseen[: len(unseen) // LENGTH * LENGTH].view(-1, LENGTH)[:256]
    losses = {}
    for loops in (1, 2, 4, 8):
        with torch.no_grad():
            batches = [model(b.to(device), labels=b.to(device), num_loops=loops).loss.item() for b in rows.split(ROWS)]
        losses[str(loops)] = sum(batches) / len(batches) / 0.6931471805599453
    return {
        "model": name,
        "seed": seed,
        "parameters": parameters(config),
        "bits_per_byte": losses,
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of training rows: mean and range over the seeds."""
    lines = ["| model | parameters | loops 1 | 2 | 4 | 8 |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        cells = []
        for loops in mine[0]["bits_per_byte"]:
            values = [row["bits_per_byte"][loops] for row in mine]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {name} | {mine[0]['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["decoding", "training"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 10_000, 32_000, 100_000])
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--characters", type=int, default=4_000_000, help="text to train on")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    parser.add_argument("--rows", type=Path, help="also write the rows as JSON lines")
    arguments = parser.parse_args()
    rows = []
    if arguments.what == "decoding":
        print("| model | prompt | cache bytes | ms per token |\n|---|---|---|---|")
        for name in arguments.models:
            for length in arguments.lengths:
                row = decoding(name, length, arguments.device, arguments.loops)
                rows.append(row)
                print(f"| {name} | {length:,} | {row['bytes']:,} | {row['ms_per_token']:.3f} |", flush=True)
    else:
        tasks = [
            (name, seed, arguments.steps, arguments.device, arguments.characters)
            for name in arguments.models
            for seed in arguments.seeds
        ]
        with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
            for row in pool.map(training, tasks):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
        print(table(rows))
    if arguments.rows:
        arguments.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
