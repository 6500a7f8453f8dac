"""Load a saved model without the package, and measure it at several loop counts.

    python quickstart_reload.py request.json answer.json

The script takes the place of a user who has the saved folder, torch and transformers, and nothing else: before
it loads, it makes every import of ``cognexis`` fail. The job that trained the model imports the same functions,
so that its own loss and the loss of the reloaded model are the same computation on the same rows.

    loss      mean of -ln p(token) over the predicted tokens, in nats
    bits per byte = loss * predicted tokens / (ln 2 * UTF-8 bytes they stand for)

Bits per byte can be compared between tokenizers, loss and perplexity cannot. Control tokens stand for no bytes.
FLOPs are those of one forward pass divided by its tokens: matrix products, the head and the attention scores
(of all pairs, masked ones too) included, elementwise work not. They are counted under eager attention, because
torch's counter does not see the fused attention on CPUs.
Letters: R rows, T tokens in a row.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

_ROWS_PER_CALL = 16


def pack_rows(documents: Iterable[str], tokenizer: Any, row_length: int) -> Tensor:
    """Encode documents as ``<s>`` text ``<eod>``, put them one after another, and cut rows ``[R, T]``.

    A row may hold the end of one document and the start of the next. The last tokens, too few for a row, are
    dropped. Control strings inside the text are encoded as plain text.
    """
    encoded = tokenizer(list(documents), add_special_tokens=False, split_special_tokens=True).input_ids
    end = tokenizer.convert_tokens_to_ids("<eod>")
    stream = torch.tensor([token for ids in encoded for token in (tokenizer.bos_token_id, *ids, end)])
    num_rows = len(stream) // row_length
    return stream[: num_rows * row_length].view(num_rows, row_length)


def spread_rows(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` rows at equal distances, so that every document has its share."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count) * len(rows) // count]


def bytes_per_token(tokenizer: Any, rows: Tensor) -> float:
    """UTF-8 bytes that a predicted token of ``rows`` stands for, on average."""
    sizes = torch.zeros(len(tokenizer))
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        if index not in tokenizer.all_special_ids:
            is_byte = len(token) == 6 and token.startswith("<0x")
            sizes[index] = 1 if is_byte else len(token.encode())
    return sizes[rows[:, 1:]].mean().item()


@torch.no_grad()
def mean_loss(model: Any, rows: Tensor, num_loops: int) -> float:
    """Mean loss over the predicted tokens of ``rows`` ``[R, T]`` at ``num_loops`` loops."""
    total = 0.0
    for part in rows.split(_ROWS_PER_CALL):
        output = model(input_ids=part, labels=part, num_loops=num_loops, use_cache=False)
        total += output.loss.item() * len(part)
    return total / len(rows)


@torch.no_grad()
def flops_per_token(model: Any, row: Tensor, num_loops: int) -> float:
    """FLOPs of a forward pass over ``row`` ``[1, T]`` divided by T; the model must use eager attention."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=row, num_loops=num_loops, use_cache=False)
    return counter.get_total_flops() / row.numel()


def continue_prompt(model: Any, tokenizer: Any, prompt: str, num_loops: int, num_tokens: int) -> tuple[str, float]:
    """A continuation of ``prompt``, and the generated tokens per second, prefill included.

    It is sampled, because a model this small repeats itself otherwise; every call uses the same random numbers, so
    that two loop counts write the same text as long as they agree about the probabilities.
    """
    inputs = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(0)
    start = time.perf_counter()
    output = model.generate(
        **inputs, num_loops=num_loops, max_new_tokens=num_tokens, do_sample=True, temperature=0.7, top_p=0.9
    )
    seconds = time.perf_counter() - start
    new_tokens = output[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(new_tokens, skip_special_tokens=True), len(new_tokens) / seconds


def measure(model: Any, tokenizer: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each depth of the request."""
    rows = spread_rows(pack_rows(request["documents"], tokenizer, request["row_length"]), request["num_rows"])
    bytes_of_one = bytes_per_token(tokenizer, rows)
    model.eval()
    continue_prompt(model, tokenizer, request["prompt"], 1, 2)  # the first call is slower than the others
    records: list[dict[str, Any]] = []
    for num_loops in request["depths"]:
        loss = mean_loss(model, rows, num_loops)
        text, speed = continue_prompt(model, tokenizer, request["prompt"], num_loops, request["num_new_tokens"])
        records.append(
            {
                "num_loops": num_loops,
                "effective_depth": model.config.effective_depth(num_loops),
                "loss": loss,
                "perplexity": math.exp(loss),
                "bits_per_byte": loss / math.log(2) / bytes_of_one,
                "generated_tokens_per_second": speed,
                "continuation": text,
            }
        )
    model.set_attn_implementation("eager")
    for record in records:
        record["flops_per_token"] = flops_per_token(model, rows[:1], record["num_loops"])
    return records


def main(request_file: str, answer_file: str) -> None:
    """Answer a request; see ``quickstart.reload_and_measure`` for its fields."""
    sys.modules["cognexis"] = None  # type: ignore[assignment]  # from here on, importing it raises ImportError
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    torch.set_num_threads(request["num_threads"])
    folder = request["folder"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    answer = {
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "depths": measure(model, tokenizer, request),
    }
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
