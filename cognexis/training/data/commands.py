"""``cognexis data build | verify | mix``: make token shards, check them, put them together.

The options are explained by ``--help``; the work is done by ``build.py``, ``verify.py`` and ``mixing.py``.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

data_app = typer.Typer(no_args_is_help=True, help="Make training data, check them, and mix them.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")]


@data_app.command("build")
def data_build(
    inputs: Annotated[
        list[str], typer.Argument(help="Files, folders or a manifest; 'installed' for licensed text of this machine.")
    ],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer; default: the shipped one.")] = None,
    data_format: Annotated[str, typer.Option("--format", help="Of the inputs; auto goes by their names.")] = "auto",
    domain: Annotated[str, typer.Option(help="Name of this kind of text.")] = "",
    weight: Annotated[float, typer.Option(help="How often a row is read in an epoch on average.")] = 1.0,
    policy: Annotated[str, typer.Option(help="A broken record: fail, skip or quarantine.")] = "fail",
    on_control: Annotated[str, typer.Option(help="A control string in raw text: raise, or text (letters).")] = "raise",
    validation_share: Annotated[float, typer.Option(help="Share of the documents that is held out.")] = 0.0,
    shard_tokens: Annotated[int, typer.Option(help="A shard ends when it has so many tokens.")] = 2**27,
    learn: Annotated[str, typer.Option(help="Of chats: assistant, or all.")] = "assistant",
    learn_end: Annotated[bool, typer.Option(help="Learn the end mark of the assistant's turns.")] = True,
    add_bos: Annotated[bool, typer.Option(help="Begin raw text with the beginning-of-text token.")] = True,
    min_characters: Annotated[int, typer.Option(help="Leave shorter texts out.")] = 0,
    max_characters: Annotated[int | None, typer.Option(help="Leave longer texts out.")] = None,
    corpus_characters: Annotated[int, typer.Option(help="At most so much installed text.")] = 20_000_000,
    copyleft: Annotated[bool, typer.Option("--copyleft", help="Installed text may be under GNU licences.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard an unfinished build first.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make token shards and their manifest; repeat the command to go on after an interruption."""
    from cognexis.artifacts.shipped_tokenizer import load_default_tokenizer
    from cognexis.tokenization_cognexis import CognexisTokenizer
    from cognexis.training.data.build import BuildOrder, build_data
    from cognexis.training.data.corpus import INSTALLED, installed_inputs
    from cognexis.training.data.inputs import DataInput

    given: list[DataInput] = []
    sources: list[dict[str, Any]] = []
    for name in inputs:
        if name == INSTALLED:
            found, sources = installed_inputs(corpus_characters, copyleft=copyleft)
            given += found
        else:
            given.append(DataInput(name, data_format, domain, weight, on_control))
    order = BuildOrder(
        inputs=given,
        output_dir=out,
        tokenizer=CognexisTokenizer.from_pretrained(tokenizer) if tokenizer else load_default_tokenizer(),
        policy=policy,
        shard_tokens=shard_tokens,
        validation_share=validation_share,
        add_bos=add_bos,
        learned=learn,
        learn_end=learn_end,
        min_characters=min_characters,
        max_characters=max_characters,
        sources=sources,
    )
    manifests = build_data(order, lambda line: print(line, file=sys.stderr, flush=True), restart=restart)
    _show({split or "data": _facts(manifest) for split, manifest in manifests.items()}, as_json)


@data_app.command("verify")
def data_verify(
    manifest: Annotated[Path, typer.Argument(help="A data manifest or its folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes and counts only.")] = False,
    vocab_size: Annotated[int | None, typer.Option(help="Token ids lie below it; default: the tokenizer's.")] = None,
    against: Annotated[Path | None, typer.Option(help="Held-out data: count the documents that both have.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare shards with their manifest; exit code 1 if they differ."""
    from cognexis.training.data.leaks import shared_documents
    from cognexis.training.data.manifest import read_data_manifest
    from cognexis.training.data.verify import verify_data

    read = read_data_manifest(manifest)
    held_out = read_data_manifest(against) if against is not None else None
    result = verify_data(read, contents=not quick, vocab_size=vocab_size)
    facts = _facts(read) | {"hashed_files": result.num_files, "faults": list(result.faults)}
    if held_out is not None and not result.faults:
        facts["shared_documents"] = shared_documents(read, held_out)
        if facts["shared_documents"]:
            share = f"{facts['shared_documents']} of {held_out.num_documents}"
            print(f"warning: {share} held-out documents are also in the training data", file=sys.stderr)
    _show(facts, as_json)
    if result.faults:
        raise typer.Exit(1)


@data_app.command("mix")
def data_mix(
    manifests: Annotated[list[Path], typer.Argument(help="Data manifests or their folders.")],
    out: Annotated[Path, typer.Option(help="The new manifest, in a folder above all of them.")],
    weights: Annotated[
        list[str] | None, typer.Option("--weight", metavar="DOMAIN=W", help="Multiply the weights of a domain.")
    ] = None,
    shares: Annotated[
        list[str] | None, typer.Option("--share", metavar="DOMAIN=S", help="Share of the tokens of an epoch.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one manifest over the shards of several, with weights or shares by domain."""
    from cognexis.training.data.mixing import mix_data

    mixed = mix_data(manifests, out, weights=_numbers("weight", weights), shares=_numbers("share", shares))
    _show(_facts(mixed), as_json)


def _facts(manifest: Any) -> dict[str, Any]:
    from cognexis.training.data.mixing import mixture

    facts = {
        "folder": str(manifest.folder),
        "shards": len(manifest.shards),
        "documents": manifest.num_documents,
        "tokens": manifest.num_tokens,
        "checksum": manifest.checksum,
        "domains": mixture(manifest),
    }
    return facts | ({"records": manifest.counts} if manifest.counts else {})


def _numbers(name: str, given: list[str] | None) -> dict[str, float]:
    from cognexis.errors import InvalidConfigError

    found = {}
    for text in given or ():
        domain, _, value = text.rpartition("=")
        try:
            found[domain] = float(value)
        except ValueError:
            raise InvalidConfigError(f"--{name} {text!r}: must be DOMAIN=NUMBER", path=name, value=text) from None
    return found


def _show(content: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(content)))


def _lines(content: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key or '-'}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list) and value:
            yield f"{indent}{key}:"
            yield from (f"{indent}  {item}" for item in value)
        else:
            yield f"{indent}{key}: {'none' if value in ({}, []) else value}"
