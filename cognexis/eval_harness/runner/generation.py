"""Generated answers, in batches of prompts that are padded at the left.

The time to the first new token is that of the prefill; what is left, divided by the further tokens of the longest
answer, is the time of decoding a token. Sampling of a batch is seeded by the seed of the run and the first example of
the batch, so every depth draws with the same random numbers. Operations are those of ``generation_flops``; loops of
the prompt are what the model reports as used less those of the later tokens.
"""

import hashlib
import math
import time
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from cognexis.errors import BudgetExceededError
from cognexis.eval_harness.compute import generation_flops
from cognexis.eval_harness.runner.encoding import EncodedExample
from cognexis.eval_harness.runner.execution import Deadline, Execution, batches
from cognexis.eval_harness.runner.loop_run import LoopRun
from cognexis.eval_harness.tasks.protocol import Generation, clip_at


class FirstTokenClock(BaseStreamer):
    """Notes when the first new token is there."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._saw_prompt = False

    def put(self, value: Any) -> None:
        if self._saw_prompt and self.first is None:
            self.first = time.perf_counter()
        self._saw_prompt = True

    def end(self) -> None:
        """Nothing is kept back."""


@torch.no_grad()
def run_generations(
    model: Any,
    tokenizer: Any,
    examples: list[EncodedExample],
    run: LoopRun,
    batch_size: int,
    deadline: Deadline,
    seed: int,
) -> Execution:
    """Answer every prompt; one token is generated before the clock runs.

    Raises:
        NonFiniteError: logits are NaN or infinite.
        TimeoutError: time is over.
    """
    found = Execution(batch_size=batch_size, num_requests=len(examples), elementwise=None)
    keywords = {**run.keywords, **run.limits, "return_loop_stats": True, "pad_token_id": _padding(model, tokenizer)}
    first = torch.tensor([examples[0].prompt], device=model.device)
    model.generate(first, attention_mask=torch.ones_like(first), max_new_tokens=1, do_sample=False, **run.keywords)
    run.overhead_s = 0.0
    for _, group in groupby(examples, key=_settings):
        for batch in batches(list(group), batch_size):
            _generate(model, tokenizer, batch, run, keywords, found, seed)
            deadline.require(len(found.predictions), len(examples))
    found.overhead_ms = 1e3 * run.overhead_s
    return found


def _settings(encoded: EncodedExample) -> tuple[int, int, float]:
    request = encoded.example.request
    assert isinstance(request, Generation)
    return request.max_new_tokens, request.num_samples, request.temperature


def _padding(model: Any, tokenizer: Any) -> int:
    for value in (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def _generate(
    model: Any,
    tokenizer: Any,
    batch: list[EncodedExample],
    run: LoopRun,
    keywords: dict[str, Any],
    found: Execution,
    seed: int,
) -> None:
    max_new_tokens, num_samples, temperature = _settings(batch[0])
    length = max(len(encoded.prompt) for encoded in batch)
    ids = torch.full((len(batch), length), keywords["pad_token_id"])
    mask = torch.zeros_like(ids)
    for row, encoded in enumerate(batch):
        ids[row, length - len(encoded.prompt) :] = torch.tensor(encoded.prompt)
        mask[row, length - len(encoded.prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        sampling["num_return_sequences"] = num_samples
    digest = hashlib.sha256(f"{seed}/{batch[0].example.id}".encode()).digest()
    clock, started = FirstTokenClock(), time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest[:8], "big"))
            result = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                streamer=clock,
                **sampling,
                **keywords,
            )
    except BudgetExceededError:
        if len(batch) > 1:  # some of them may fit
            for encoded in batch:
                _generate(model, tokenizer, [encoded], run, keywords, found, seed)
            return
        found.predictions.append([""] * num_samples)
        found.exhausted += 1
        return
    ended = time.perf_counter()
    found.batch_ms.append(1e3 * (ended - started))
    counts = result.loop_counts.cpu()
    if clock.first is not None:
        found.prefill_ms.append(1e3 * (clock.first - started))
        if (later := int((counts > 0).sum(1).max()) - 1) > 0:
            found.decode_ms.append(1e3 * (ended - clock.first) / later)
    _read(found, model.config, tokenizer, batch, result, counts, length, run.limits)


def _read(
    found: Execution,
    config: Any,
    tokenizer: Any,
    batch: list[EncodedExample],
    result: Any,
    counts: Tensor,
    length: int,
    limits: dict[str, Any],
) -> None:
    """Add answers and costs; rows of ``result`` are the samples of the prompts, one prompt after another."""
    samples = len(counts) // len(batch)
    new = result.sequences[:, length:].cpu()
    for index, encoded in enumerate(batch):
        request = encoded.example.request
        assert isinstance(request, Generation)
        answers, was_cut, went_beyond = [], False, False
        for row in range(index * samples, (index + 1) * samples):
            loops = [int(count) for count in counts[row] if count > 0]
            answers.append(clip_at(tokenizer.decode(new[row, : len(loops)], skip_special_tokens=True), request.stop))
            prompt_loops = max(1, int(result.budget_used[row]) - sum(loops[1:]))
            found.flops += generation_flops(config, len(encoded.prompt), [prompt_loops, *loops[1:]])
            found.loops += loops
            found.num_tokens += len(loops)
            found.halts.update(result.halt_reasons[row])
            was_cut |= result.stop_reasons[row] == "budget_exhausted"
            went_beyond |= int(result.budget_used[row]) > limits.get("max_total_loops", math.inf)
            went_beyond |= max(loops, default=0) > limits.get("max_loops_per_token", math.inf)
        found.exhausted += was_cut
        found.violations += went_beyond
        found.predictions.append(answers)
    cache = result.past_key_values
    if cache is not None and hasattr(cache, "memory_bytes"):
        found.cache_bytes = max(found.cache_bytes, round(cache.memory_bytes() / len(batch)))
