"""One manifest from several: a mixture whose proportions are weights.

With a weight w a shard of n rows fills w n places of an epoch. Given shares s_d of the tokens by domain, d having T_d
of T tokens, the weights are w_d = s_d T / T_d: an epoch then reads as many tokens as there are, in these proportions.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cognexis.configuration_rules import nearest_name
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.data.manifest import DataManifest, check_shards, check_weight, read_data_manifest


def mix_data(
    manifests: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Mapping[str, float] | None = None,
    shares: Mapping[str, float] | None = None,
) -> DataManifest:
    """Write a manifest over the shards of others; the shards stay where they are.

    Args:
        manifests: manifests or their folders, all below the folder of ``output``.
        output: the new manifest.
        weights: domain -> factor of the weights of its shards; others keep theirs.
        shares: domain -> share of the tokens of an epoch; must name every domain. Excludes ``weights``.

    Raises:
        InvalidConfigError: no manifest, an unknown domain, a weight or share out of range, a place that cannot be
            named from the new one, or a file that exists.
        ArtifactMismatchError: the manifests were made with different tokenizers.
    """
    path = Path(output).absolute()
    if not manifests or (weights and shares):
        raise InvalidConfigError("mix: needs at least one manifest, and either weights or shares", path="manifests")
    if path.exists():
        raise InvalidConfigError(f"output={str(output)!r}: exists already", path="output", value=str(output))
    read = [read_data_manifest(manifest) for manifest in manifests]
    tokenizers = [(manifest.tokenizer or {}).get("checksum") for manifest in read]
    if len(set(tokenizers)) > 1:
        raise ArtifactMismatchError(f"mix: made with different tokenizers: {tokenizers}", path="tokenizer")
    shards = []
    for manifest in read:
        folder = manifest.folder.absolute().resolve()
        if not folder.is_relative_to(path.parent.resolve()):
            raise InvalidConfigError(
                f"manifests: {manifest.folder} is not below {path.parent}; put the mixture above its parts",
                path="manifests",
                value=str(manifest.folder),
            )
        prefix = folder.relative_to(path.parent.resolve())
        shards += [replace(shard, path=(prefix / shard.path).as_posix()) for shard in manifest.shards]

    def refuse(reason: str) -> NoReturn:
        raise InvalidConfigError(f"mix: {reason}", path="manifests")

    check_shards(shards, refuse)
    tokens: Counter[str] = Counter()
    for shard in shards:
        tokens[shard.domain] += shard.num_tokens or 0
    factors = _factors(tokens, weights or {}, shares)
    if shares:
        shards = [replace(shard, weight=factors[shard.domain]) for shard in shards]
    else:
        shards = [replace(shard, weight=shard.weight * factors.get(shard.domain, 1.0)) for shard in shards]
    sources = [source for manifest in read for source in manifest.sources or ()]
    mixed = DataManifest(tuple(shards), path.parent, tokenizer=read[0].tokenizer, sources=sources or None)
    mixed.write(path)
    return mixed


def mixture(manifest: DataManifest) -> dict[str, dict[str, Any]]:
    """Documents, tokens, and the share of the tokens of an epoch, by domain."""
    found: dict[str, dict[str, Any]] = {}
    total = sum(shard.weight * (shard.num_tokens or 0) for shard in manifest.shards)
    for shard in manifest.shards:
        entry = found.setdefault(shard.domain, {"documents": 0, "tokens": 0, "share": 0.0})
        entry["documents"] += shard.num_documents
        entry["tokens"] += shard.num_tokens or 0
        entry["share"] += shard.weight * (shard.num_tokens or 0) / total if total else 0.0
    return {domain: {**entry, "share": round(entry["share"], 4)} for domain, entry in sorted(found.items())}


def _factors(
    tokens: Mapping[str, int], weights: Mapping[str, float], shares: Mapping[str, float] | None
) -> dict[str, float]:
    name, given = ("shares", shares) if shares else ("weights", weights)
    for domain, value in given.items():
        if domain not in tokens:
            known = ", ".join(map(repr, sorted(tokens)))
            raise InvalidConfigError(
                f"{name}: no domain {domain!r}{nearest_name(domain, tokens)}; there are {known}", path=name
            )

        def refuse(rule: str, domain: str = domain, value: float = value) -> None:
            raise InvalidConfigError(f"{name}[{domain!r}]={value!r}: {rule}", path=name, value=value)

        check_weight(value, refuse)
    if not shares:
        return dict(weights)
    if missing := sorted(set(tokens) - set(shares)):
        raise InvalidConfigError(f"shares: no share for {missing}", path="shares")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise InvalidConfigError(f"shares: must add up to 1, got {sum(shares.values())}", path="shares")
    total = sum(tokens.values())
    return {domain: share * total / tokens[domain] for domain, share in shares.items()}
