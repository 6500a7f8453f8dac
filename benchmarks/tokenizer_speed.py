"""How fast the tokenizer is beside the bare ``tokenizers`` library, and how long hostile text takes.

    python benchmarks/tokenizer_speed.py [--megabytes 10] [--repeats 3]

The text is that of installed, permissively licensed packages, cut into documents. Each call encodes all documents in
this process; the ids are compared before anything is timed. The best of the repeats counts, and the calls take turns,
so that a busy machine slows all alike. Writes ``benchmarks/results/tokenizer_speed.md``.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, __version__

sys.path.insert(0, str(Path(__file__).parents[1]))

from cognexis.artifacts.licensed_text import installed_corpora
from cognexis.artifacts.shipped_tokenizer import DEFAULT_TOKENIZER, load_default_tokenizer
from cognexis.tokenization_cognexis import CognexisTokenizer

RESULT = Path(__file__).parent / "results" / "tokenizer_speed.md"
GOAL = 1.2
HOSTILE = {
    "one letter": "a",
    "combining mark": "\u0301",
    "NUL": "\x00",
    "digit": "1",
    "space": " ",
    "opening bracket": "<",
    "Chinese character": "漢",
}


def documents_of(num_bytes: int) -> list[str]:
    found: list[str] = []
    for corpus in installed_corpora(num_bytes * 2):
        for document in corpus.documents:
            size = len(document.encode())
            if size <= num_bytes:
                found.append(document)
                num_bytes -= size
    return found


def best_times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def hostile_rows(tokenizer: CognexisTokenizer) -> list[str]:
    rows = []
    for name, character in HOSTILE.items():
        text = character * (1_000_000 // len(character.encode()))
        start = time.perf_counter()
        tokenizer.encode_untrusted(text)
        rows.append(f"| {name} | {time.perf_counter() - start:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    documents = documents_of(int(options.megabytes * 1e6))
    num_bytes = sum(len(document.encode()) for document in documents)
    tokenizer = load_default_tokenizer()
    bare = Tokenizer.from_file(str(DEFAULT_TOKENIZER / "tokenizer.json"))
    tokenizer.encode_untrusted("build the second backend")
    expected = [encoding.ids for encoding in bare.encode_batch(documents[:50])]
    assert tokenizer(documents[:50]).input_ids == expected

    reference = "bare `tokenizers`: `encode_batch`, ids"
    calls: dict[str, Callable[[], object]] = {
        reference: lambda: [encoding.ids for encoding in bare.encode_batch(documents)],
        "`tokenizer(documents)`: ids and mask": lambda: tokenizer(documents),
        "`tokenizer.encode`, one by one": lambda: [tokenizer.encode(document) for document in documents],
        "`tokenizer.encode_untrusted`, one by one": lambda: [tokenizer.encode_untrusted(d) for d in documents],
    }
    times = best_times(calls, options.repeats)
    ratio = times["`tokenizer(documents)`: ids and mask"] / times[reference]
    lines = [
        "# Speed of the tokenizer",
        "",
        f"{num_bytes / 1e6:.1f} MB of installed text in {len(documents)} documents, shipped tokenizer; Python "
        f"{platform.python_version()}, tokenizers {__version__}, {platform.machine()}, best of {options.repeats}.",
        "",
        "| call | seconds | MB/s | beside the bare library |",
        "|---|---|---|---|",
        *(
            f"| {name} | {seconds:.2f} | {num_bytes / 1e6 / seconds:.2f} | {seconds / times[reference]:.2f} |"
            for name, seconds in times.items()
        ),
        "",
        f"The goal of at most {GOAL} times the bare library's time is {'met' if ratio <= GOAL else 'missed'}.",
        "",
        "One megabyte of a single repeated character through `encode_untrusted`:",
        "",
        "| character | seconds |",
        "|---|---|",
        *hostile_rows(tokenizer),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
