"""TFLOP/s of training a looped model, beside a plain stack of equal depth and the machine's own matrix product.

    python benchmarks/training_throughput.py [--size 300m] [--device auto] [--compile blocks model] [--loops 8]
                     [--rows 16] [--length 1024] [--repeats 10] [--loss chunked] [--checkpoint-every 2]

One run measures, in this order: that the fast paths compute what the plain ones do; the fastest matrix product of the
dtype (the ceiling); and for each form of compilation the looped model and the peer, a Llama of transformers with as
many distinct blocks as the looped model applies: forward and backward, and a whole step with clipping and AdamW,
without and (the looped model) with recomputation of every few loops. All use the same loss.

Operations are those of ``cognexis.training.flops`` with half the positions in sight, since causal attention skips the
other half; loops are counted, what checkpointing computes again is not. The time is the median of the repeats, which
follow each other without waiting. ``--compile blocks`` compiles parts that every loop count shares (for the peer: its
blocks); ``model`` compiles the whole body, for one loop count. Weights are bfloat16, or float32 under autocast with
``--weights fp32``.

Writes ``benchmarks/results/training_throughput_<device>.md``, except for ``--size tiny``, which only shows that
everything runs: a minute on a CPU.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.decoder.loss import causal_lm_loss
from cognexis.training.activation_checkpointing import set_activation_checkpointing
from cognexis.training.compilation import compile_for_training
from cognexis.training.flops import step_flops
from cognexis.training.losses.linear_cross_entropy import chunked_causal_lm_loss

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, dict[str, int]] = {
    "300m": {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "vocab_size": 32_768},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 512},
}
FORMS = ("none", "blocks", "model")
BLOCKS = 4  # of the prelude, and of the coda


@dataclass
class Subject:
    """A model to measure: its body, its head, and what a step of it costs."""

    name: str
    model: Any
    keywords: dict[str, Any]
    flops: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training throughput.")
    parser.add_argument("--size", choices=list(SIZES), default="300m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", choices=FORMS, nargs="+", default=["blocks", "model"])
    parser.add_argument("--loss", choices=("chunked", "plain"), default="chunked")
    parser.add_argument("--weights", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--norm", choices=("sandwich", "none"), default="sandwich")
    parser.add_argument("--loops", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--checkpoint-every", type=int, default=2)
    parser.add_argument("--matmul", type=int, nargs="+", default=None, help="edges of the ceiling's matrices")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    require_equal_results(device)
    edges = arguments.matmul or ([4096, 8192] if device == "cuda" else [512])
    ceilings = {edge: matmul_rate(edge, device, arguments.repeats) for edge in edges}
    rows = []
    for form in arguments.compile:
        for build in (looped, peer):
            subject = build(arguments, device)
            rows += measure(subject, form, arguments, device, max(ceilings.values()))
            del subject
            torch.compiler.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
    report = markdown(arguments, device, ceilings, rows)
    print(report)
    if arguments.size == "tiny":
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"training_throughput_{device}.md").write_text(report)


def looped(arguments: Any, device: str) -> Subject:
    """The looped model: the preset's residual form, ``BLOCKS`` blocks, one shared block, ``BLOCKS`` blocks."""
    size = SIZES[arguments.size]
    config = CognexisConfig(
        **size,
        num_key_value_heads=size["num_attention_heads"],
        max_position_embeddings=arguments.length,
        num_prelude_blocks=BLOCKS,
        num_coda_blocks=BLOCKS,
        trained_max_loops=max(arguments.loops, 8),
        recurrent_gating=False,
        recurrent_residual_mode="fixed",
        recurrent_residual_scale=1.0,
        input_injection="residual",
        injection_projection="identity",
        injection_scale=1.0,
        recurrent_norm=arguments.norm,
    )
    config._attn_implementation = "sdpa"
    model = CognexisForCausalLM(config)
    model = model.to(device=device, dtype=dtype_of(arguments)).train()
    flops = step_flops(config, arguments.rows * arguments.length, arguments.length // 2, arguments.loops)
    return Subject(f"cognexis, {arguments.loops} loops", model, {"num_loops": arguments.loops}, flops)


def peer(arguments: Any, device: str) -> Subject:
    """A plain stack with as many blocks as the looped model applies."""
    size = SIZES[arguments.size]
    depth = 2 * BLOCKS + arguments.loops
    config = LlamaConfig(
        **size,
        num_key_value_heads=size["num_attention_heads"],
        max_position_embeddings=arguments.length,
        num_hidden_layers=depth,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).to(device=device, dtype=dtype_of(arguments)).train()
    tokens, width = arguments.rows * arguments.length, size["hidden_size"]
    block = 4 * width * width + 3 * width * size["intermediate_size"]
    forward = 2 * block * depth + 4 * (arguments.length // 2) * width * depth + 2 * width * size["vocab_size"]
    return Subject(f"Llama, {depth} blocks", model, {}, 3.0 * tokens * forward)


def dtype_of(arguments: Any) -> torch.dtype:
    return torch.bfloat16 if arguments.weights == "bf16" else torch.float32


def measure(subject: Subject, form: str, arguments: Any, device: str, ceiling: float) -> list[tuple[Any, ...]]:
    """Rows (what, milliseconds, TFLOP/s, share of the ceiling, tokens per second, memory)."""
    tokens = arguments.rows * arguments.length
    shape = (arguments.rows, arguments.length)
    batch = torch.randint(0, subject.model.config.vocab_size, shape, device=device)
    rows = []

    def add(what: str, action: Callable[[], None]) -> None:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median_seconds(action, device, arguments.repeats)
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device == "cuda" else "-"
        rate = subject.flops / seconds / 1e12
        name = f"{subject.name}, {form}: {what}"
        rows.append((name, 1000 * seconds, rate, rate / ceiling, tokens / seconds, memory))
        print(
            f"{name}: {1000 * seconds:.1f} ms, {rate:.1f} TFLOP/s, {rate / ceiling:.1%}", file=sys.stderr, flush=True
        )

    backward = training_pass(subject, form, arguments, device, batch)
    add("forward and backward", backward)
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-5, fused=device == "cuda")

    def step(run: Callable[[], None]) -> Callable[[], None]:
        def whole() -> None:
            run()
            nn.utils.clip_grad_norm_(subject.model.parameters(), 1.0)
            optimizer.step()

        return whole

    add("whole step", step(backward))
    if isinstance(subject.model, CognexisForCausalLM) and arguments.checkpoint_every:
        set_activation_checkpointing(subject.model, recurrent=f"every_{arguments.checkpoint_every}_loops")
        torch.compiler.reset()
        saving = training_pass(subject, form, arguments, device, batch)
        add(f"whole step, every {arguments.checkpoint_every} loops recomputed", step(saving))
    return rows


def training_pass(subject: Subject, form: str, arguments: Any, device: str, batch: Tensor) -> Callable[[], None]:
    """Forward and backward of one batch, from no gradients."""
    body = subject.model.model
    if form == "model":
        body = torch.compile(body)
    elif form == "blocks" and isinstance(subject.model, CognexisForCausalLM):
        compile_for_training(subject.model)
    elif form == "blocks":
        for layer in body.layers:
            layer.compile()
    autocast = arguments.weights == "fp32"

    def run() -> None:
        subject.model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16) if autocast else nullcontext():
            hidden = body(input_ids=batch, use_cache=False, return_dict=True, **subject.keywords).last_hidden_state
            loss = loss_of(arguments.loss, hidden, subject.model.lm_head, batch)
        loss.backward()

    return run


def loss_of(kind: str, hidden: Tensor, head: Any, labels: Tensor) -> Tensor:
    if kind == "chunked":
        return chunked_causal_lm_loss(hidden, head, labels)
    return causal_lm_loss(head(hidden), labels, head.out_features)


def require_equal_results(device: str) -> None:
    """The chunked loss and the checkpointed, compiled body give the loss and the gradients of the plain ones."""
    arguments = argparse.Namespace(size="tiny", length=64, rows=2, loops=4, weights="fp32", norm="sandwich")
    subject = looped(arguments, device)
    batch = torch.randint(0, subject.model.config.vocab_size, (2, 64), device=device)

    def gradients(body: Any, kind: str) -> list[Tensor]:
        subject.model.zero_grad()
        hidden = body(input_ids=batch, use_cache=False, return_dict=True, num_loops=4).last_hidden_state
        loss = loss_of(kind, hidden, subject.model.lm_head, batch)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in subject.model.parameters() if p.grad is not None)]

    expected = gradients(subject.model.model, "plain")
    found = [gradients(subject.model.model, "chunked")]
    if device == "cuda":
        found.append(gradients(torch.compile(subject.model.model), "chunked"))
        compile_for_training(subject.model)
        found.append(gradients(subject.model.model, "chunked"))
    set_activation_checkpointing(subject.model, recurrent="every_2_loops")
    found.append(gradients(subject.model.model, "chunked"))
    for values in found:
        for one, other in zip(values, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.compiler.reset()


def matmul_rate(edge: int, device: str, repeats: int) -> float:
    """TFLOP/s of a bfloat16 product of two ``edge`` x ``edge`` matrices."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    count = 20 if device == "cuda" else 2

    def run() -> None:
        for _ in range(count):
            torch.mm(a, b)

    return 2 * edge**3 * count / min(seconds_of(run, device, repeats)) / 1e12


def median_seconds(action: Callable[[], None], device: str, repeats: int) -> float:
    return statistics.median(seconds_of(action, device, repeats))


def seconds_of(action: Callable[[], None], device: str, repeats: int) -> list[float]:
    """Time of each repeat, after three that warm up; on a GPU they follow each other as the steps of a training do."""
    for _ in range(3):
        action()
    if device != "cuda":
        moments = [time.perf_counter()]
        for _ in range(repeats):
            action()
            moments.append(time.perf_counter())
        return [after - before for before, after in pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]


def markdown(arguments: Any, device: str, ceilings: dict[int, float], rows: list[tuple[Any, ...]]) -> str:
    place = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    lines = [
        "# Training throughput",
        "",
        f"{place}, torch {torch.__version__}; size {arguments.size}, {arguments.rows} rows of {arguments.length} "
        f"tokens, {arguments.loops} loops, weights {arguments.weights}, loss {arguments.loss}; "
        f"medians of {arguments.repeats}.",
        "",
        "Matrix products, measured in the same run: "
        + ", ".join(f"{rate:.1f} TFLOP/s at edge {edge}" for edge, rate in ceilings.items())
        + ". The fastest is the ceiling.",
        "",
        "| what, and what is compiled | ms | TFLOP/s | of the ceiling | tokens/s | peak GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {n} | {ms:.1f} | {rate:.2f} | {share:.1%} | {speed:,.0f} | {gib} |"
        for n, ms, rate, share, speed, gib in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
