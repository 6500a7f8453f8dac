"""What the command line does with tokenizers: train one, look at one, and show what one makes of a text.

The functions return plain dictionaries; whoever calls them prints. Everything is checked before the first file is
written, and a new folder appears complete or not at all.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognexis.artifacts.licensed_text import corpora_manifest, installed_corpora
from cognexis.artifacts.text_corpus import Corpus
from cognexis.artifacts.tokenizer_training import byte_reference_tokenizer, train_tokenizer
from cognexis.errors import CheckpointError, InvalidConfigError, TokenizerError
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.tokens.layout import TOKENIZER_TYPES

INSTALLED = "installed"
"""The input that stands for the licensed text of this machine."""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".html", ".json", ".jsonl", ".csv", ".toml", ".yaml")


@dataclass(frozen=True)
class TrainingOrder:
    """What ``train`` shall make.

    Attributes:
        inputs: text files, folders (read for :data:`TEXT_SUFFIXES`), or :data:`INSTALLED`.
        output_dir: the new folder.
        vocab_size: number of ids, the 266 fixed ones included; ``byte_reference`` has no others.
        tokenizer_type: ``sentencepiece``, ``bpe`` or ``byte_reference``.
        max_characters: upper bound of the text.
        character_coverage: share of the text whose characters get ids of their own.
        tokenizer_version: name of the version in the manifest.
        licence: SPDX identifier of the given files, for the manifest.
        with_code: write the code files that load the tokenizer where the package is not installed.
    """

    inputs: Sequence[str | Path]
    output_dir: str | Path
    vocab_size: int = 8192
    tokenizer_type: str = "sentencepiece"
    max_characters: int = 20_000_000
    character_coverage: float = 0.999
    tokenizer_version: str = "1"
    licence: str = "unknown"
    with_code: bool = True


def train(order: TrainingOrder, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Train a tokenizer and commit its folder. The same order on the same text gives the same ids.

    Args:
        order: what to make.
        report: receives a line for each phase.

    Returns:
        What :func:`inspect` says about the new folder.

    Raises:
        InvalidConfigError: a setting is out of range, an input does not exist, or the output folder does.
        TokenizerError: an input is no UTF-8 text, or there is too little text.
    """
    output = Path(order.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidConfigError(
            f"output folder {output} exists and is not empty", path="output_dir", value=str(output)
        )
    if order.tokenizer_type not in TOKENIZER_TYPES:
        raise InvalidConfigError(
            f"tokenizer_type={order.tokenizer_type!r}: must be one of {', '.join(TOKENIZER_TYPES)}",
            path="tokenizer_type",
            value=order.tokenizer_type,
        )
    if order.tokenizer_type == TOKENIZER_TYPES[2]:
        tokenizer = byte_reference_tokenizer()
    else:
        corpora = _read(order)
        characters = sum(corpus.num_characters for corpus in corpora)
        report(f"text: {characters:,} characters in {sum(map(len, corpora))} files of {len(corpora)} sources")
        tokenizer = train_tokenizer(
            [document for corpus in corpora for document in corpus.documents],
            order.vocab_size,
            tokenizer_type=order.tokenizer_type,
            character_coverage=order.character_coverage,
            tokenizer_version=order.tokenizer_version,
            source=corpora_manifest(corpora),
        )
    report(f"tokenizer: {len(tokenizer)} ids, {tokenizer.checksum}")
    _commit(tokenizer, output, order.with_code)
    report(f"saved in {output}")
    return inspect(output)


def inspect(tokenizer: str | Path, text: str | None = None) -> dict[str, Any]:
    """Describe a tokenizer.

    Args:
        tokenizer: a folder, or a ``tokenizer.json``.
        text: text to measure compression on.

    Returns:
        The manifest's fields without the sources' details, ``verified`` (a sentence on the manifest), and for a text
        ``compression`` with its characters, bytes, tokens and bytes per token.

    Raises:
        TokenizerError: the files cannot be read, or the manifest is malformed.
        ArtifactMismatchError: tokenizer and manifest differ.
    """
    loaded = _load(tokenizer)
    folder = Path(tokenizer) if Path(tokenizer).is_dir() else Path(tokenizer).parent
    has_manifest = (folder / "tokenizer_manifest.json").is_file()
    described = loaded.manifest
    sources = described.pop("source", None) or []
    described["source"] = [f"{part['package']} {part['version']} ({part['licence']})" for part in sources]
    described["verified"] = "agrees with its manifest" if has_manifest else "has no manifest to compare with"
    if text is not None:
        num_tokens = len(loaded.encode_untrusted(text, add_bos=False))
        num_bytes = len(text.encode())
        described["compression"] = {
            "characters": len(text),
            "bytes": num_bytes,
            "tokens": num_tokens,
            "bytes_per_token": round(num_bytes / num_tokens, 3) if num_tokens else None,
        }
    return described


def tokenize(tokenizer: str | Path, text: str, allow_special: bool = False, add_bos: bool = False) -> dict[str, Any]:
    """Show the ids and pieces of a text.

    Args:
        tokenizer: a folder, or a ``tokenizer.json``.
        text: the text.
        allow_special: recognise control strings; otherwise they are encoded as text.
        add_bos: put the beginning-of-text token in front.

    Returns:
        ``ids``, ``pieces`` (as in the vocabulary), and ``text``, which is decoded from the ids.

    Raises:
        TokenizerError: the files or the text cannot be used.
    """
    loaded = _load(tokenizer)
    if allow_special:
        ids = loaded.encode(text, add_bos=add_bos)
    else:
        ids = loaded.encode_untrusted(text, add_bos=add_bos)
    return {"ids": ids, "pieces": loaded.convert_ids_to_tokens(ids), "text": loaded.decode(ids)}


def _load(path: str | Path) -> CognexisTokenizer:
    if not Path(path).exists():
        raise InvalidConfigError(f"{path}: no such folder or file", path="tokenizer", value=str(path))
    try:
        return CognexisTokenizer.from_pretrained(path)
    except OSError as error:
        raise TokenizerError(f"{path}: no tokenizer can be loaded from it ({error})") from error


def _read(order: TrainingOrder) -> list[Corpus]:
    if not order.inputs:
        raise InvalidConfigError(f"no input: give files, folders or {INSTALLED!r}", path="inputs")
    if order.max_characters < 1:
        raise InvalidConfigError(f"max_characters must be positive, got {order.max_characters}", path="max_characters")
    corpora: list[Corpus] = []
    for given in order.inputs:
        if str(given) == INSTALLED:
            corpora += installed_corpora(order.max_characters)
        else:
            corpora.append(_read_files(Path(given), order))
    if not any(corpus.documents for corpus in corpora):
        raise TokenizerError(f"there is no text in {', '.join(map(str, order.inputs))}")
    return corpora


def _read_files(path: Path, order: TrainingOrder) -> Corpus:
    if not path.exists():
        raise InvalidConfigError(f"{path}: no such folder or file", path="inputs", value=str(path))
    paths = [path]
    if path.is_dir():
        paths = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    room, texts, names = order.max_characters, [], []
    for file in paths:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{file}: byte {error.start} is not UTF-8") from error
        if text and len(text) <= room:
            room -= len(text)
            texts.append(text)
            names.append(file.relative_to(path).as_posix() if path.is_dir() else file.name)
    return Corpus(tuple(texts), tuple(names), path.resolve().name, "", order.licence)


def _commit(tokenizer: CognexisTokenizer, output: Path, with_code: bool) -> None:
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    try:
        tokenizer.save_pretrained(temporary)
        if not with_code:
            for path in temporary.glob("*_cognexis.py"):
                path.unlink()
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, output)
    except (OSError, CheckpointError) as error:
        raise InvalidConfigError(f"output folder {output} cannot be written: {error}", path="output_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
