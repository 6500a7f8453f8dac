"""Documents that stand in the training data and in the held-out data alike."""

import hashlib
from collections.abc import Iterator

from cognexis.training.data.manifest import TOKEN_FORMAT, DataManifest
from cognexis.training.data.verify import open_shard


def shared_documents(training: DataManifest, held_out: DataManifest) -> int:
    """How many documents of ``held_out`` are also in ``training``, token for token."""
    wanted = list(_digests(held_out))
    unseen = set(wanted)
    for digest in _digests(training):
        unseen.discard(digest)
    return sum(digest not in unseen for digest in wanted)


def _digests(manifest: DataManifest) -> Iterator[bytes]:
    for entry in manifest.shards:
        if entry.format == TOKEN_FORMAT:
            shard = open_shard(manifest, entry)
            for index in range(shard.num_documents):
                yield hashlib.blake2b(shard.document(index).tobytes(), digest_size=16).digest()
