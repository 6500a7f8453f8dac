"""Quality and latency of a checkpoint by depth, beside a plain Llama of the same unrolled depth in the same run.

    python benchmarks/depth.py runs/quickstart [--depths 1,2,4,8] [--rows 64] [--length 128] [--repeats 7]

The checkpoint has a tokenizer and attention in all blocks. Its quality is the loss on the text that the quickstart
holds out. The peer is transformers' ``LlamaForCausalLM`` with one layer per executed block and the same widths, heads
and vocabulary; its weights are random, so it is a peer in time and not in quality. Before anything is timed, torch's
counter must find the same operations in both within 2 %; a gate or an injection of the checkpoint is counted as its
own. Both run in turns, use sdpa attention, and the medians of the repeats are shown:

    prefill   one forward pass over a row of ``length`` tokens
    step      one more token behind that row, with its keys and values cached

Writes ``benchmarks/results/depth_<device>.md``.
"""

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cognexis import CognexisForCausalLM, CognexisTokenizer
from cognexis.eval_harness.compute import matmul_flops
from cognexis.eval_harness.scaling.grid import parse_depths
from cognexis.eval_harness.scaling.measure import measure_depth
from cognexis.eval_harness.scaling.row_sources import read_scaling_rows

RESULTS = Path(__file__).parent / "results"
STEPS = 8
HEAD = (
    *("loops", "blocks", "loss", "standard error", "MFLOPs per token", "prefill ms", "Llama", "ratio"),
    *("step ms", "Llama", "ratio", "parameters", "Llama"),
)


def llama_of(config: Any, num_loops: int) -> Any:
    """A Llama with one layer per block that ``num_loops`` loops execute."""
    peer = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_hidden_layers=config.effective_depth(num_loops),
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(peer).eval()


@torch.no_grad()
def counted(model: Any, ids: torch.Tensor, **arguments: Any) -> int:
    """Operations of a forward pass under eager attention, by torch's counter."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        plain(input_ids=ids, use_cache=False, **arguments)
    return int(counter.get_total_flops())


def check_equal_work(model: Any, peer: Any, ids: torch.Tensor, num_loops: int) -> None:
    """End the program unless both do the same operations within 2 %, what the recurrence adds left out."""
    config = copy.deepcopy(model.config)
    formula = matmul_flops(config, ids.shape[1], num_loops).total
    config.recurrent_gating, config.input_injection = False, "none"
    added = formula - matmul_flops(config, ids.shape[1], num_loops).total
    own, other = counted(model, ids, num_loops=num_loops, allow_extrapolation=True), counted(peer, ids)
    if abs(own - added - other) > 0.02 * other or abs(own - formula) > 0.02 * own:
        sys.exit(f"{num_loops} loops: {own:,} operations, {added:,} of them of the recurrence; the peer has {other:,}")


def waited(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def timed(model: Any, ids: torch.Tensor, arguments: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds of a prefill, and of a step behind it."""
    cache = None if arguments else DynamicCache(config=model.config)
    start = waited(ids.device)
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
    read = waited(ids.device)
    for _ in range(STEPS):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **arguments)
    return 1e3 * (read - start), 1e3 * (waited(ids.device) - read) / STEPS


def medians(runs: dict[str, Callable[[], tuple[float, float]]], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians by name, measured in turns after one run each that does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            found = run()
            if turn:
                times[name].append(found)
    return {
        name: (statistics.median(p for p, _ in found), statistics.median(s for _, s in found))
        for name, found in times.items()
    }


def line_of(model: Any, data: Any, num_loops: int, repeats: int) -> list[str]:
    """The cells of one depth."""
    peer = llama_of(model.config, num_loops).to(model.device)
    ids = data.ids[:1, :-1].to(model.device)
    check_equal_work(model, peer, ids, num_loops)
    quality = measure_depth(model, data.ids, num_loops, batch_size=16)
    own = {"num_loops": num_loops, "allow_extrapolation": True}
    found = medians({"own": lambda: timed(model, ids, own), "peer": lambda: timed(peer, ids, {})}, repeats)
    (prefill, step), (peer_prefill, peer_step) = found["own"], found["peer"]
    spread = statistics.stdev(quality.losses) / len(quality.losses) ** 0.5
    label = f"{num_loops} (beyond training)" if num_loops > model.config.trained_max_loops else str(num_loops)
    return [
        *(label, str(model.config.effective_depth(num_loops))),
        *(f"{statistics.fmean(quality.losses):.4f}", f"{spread:.3f}"),
        f"{matmul_flops(model.config, data.length, num_loops).total / data.length / 1e6:.2f}",
        *(f"{prefill:.2f}", f"{peer_prefill:.2f}", f"{prefill / peer_prefill:.2f}"),
        *(f"{step:.2f}", f"{peer_step:.2f}", f"{step / peer_step:.2f}"),
        *(f"{model.num_parameters():,}", f"{peer.num_parameters():,}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality and latency by depth, beside a plain Llama.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--depths", default="1,2,4,8", type=parse_depths)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--note", default="", help="a sentence about the machine, such as what else ran on it")
    given = parser.parse_args()
    model: Any = CognexisForCausalLM.from_pretrained(given.checkpoint).to(given.device).eval()
    model.set_attn_implementation("sdpa")
    tokenizer = CognexisTokenizer.from_pretrained(given.checkpoint)
    text = SimpleNamespace(name="held-out text", type="language_modeling", path="quickstart-held-out")
    data = read_scaling_rows(text, tokenizer, model.config, length=given.length, max_rows=given.rows, seed=0)
    lines = [HEAD, ["---"] * len(HEAD), *(line_of(model, data, depth, given.repeats) for depth in given.depths)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    is_cuda = model.device.type == "cuda"
    machine = torch.cuda.get_device_name() if is_cuda else f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    weights = f"{model.num_parameters():,} parameters, {str(model.dtype).removeprefix('torch.')}"
    head = (
        f"# Quality and latency by depth\n\n{given.checkpoint.name}: {weights}, {len(data.ids)} held-out rows of "
        f"{data.length} tokens, {machine}, torch {torch.__version__}. One row at a time, medians of {given.repeats}; "
        f"the Llama has a layer per executed block and random weights. {given.note}".rstrip()
    )
    (RESULTS / f"depth_{model.device.type}.md").write_text(f"{head}\n\n{table}\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
