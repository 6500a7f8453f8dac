"""What training does for ``cognexis ablate``: prepare text of this machine, and train a variant.

It satisfies ``Workshop`` of ``cognexis.eval_harness.ablations.running``, which may not be imported here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cognexis.checkpoints.json_file import read_json, write_bytes, write_json
from cognexis.errors import ArtifactMismatchError

if TYPE_CHECKING:
    from cognexis.artifacts.run_config import RunConfig
    from cognexis.training.pretrain import PretrainResult


@dataclass(frozen=True)
class PreparedText:
    """Paths of a tokenizer, of the manifest of training shards, and of held-out text."""

    tokenizer: str
    train_manifest: str
    held_out: str


class AblationWorkshop:
    """Trains with ``cognexis.training.pretrain``, without progress on the terminal."""

    def prepare_text(self, folder: Path, characters: int, held_out_share: float) -> PreparedText:
        """Source code of Python's standard library as shards of the shipped tokenizer, and held-out files as text.

        Raises:
            ArtifactMismatchError: the folder holds text of other settings, or of another Python.
        """
        from cognexis.artifacts.shipped_tokenizer import load_default_tokenizer
        from cognexis.artifacts.text_corpus import standard_library_corpus
        from cognexis.training.data.build import BuildOrder, build_data
        from cognexis.training.data.inputs import DataInput

        training, held_out = standard_library_corpus(characters).split(held_out_share)
        facts = {"training": training.manifest(), "held_out": held_out.manifest()}
        marker, shards = folder / "text.json", folder / "shards"
        files = PreparedText(str(folder / "tokenizer"), str(shards), str(folder / "held_out.jsonl"))
        if marker.is_file():
            if read_json(marker) != facts:
                raise ArtifactMismatchError(f"{marker}: the folder holds other text; choose another output folder")
            return files
        folder.mkdir(parents=True, exist_ok=True)
        for name, corpus in (("training", training), ("held_out", held_out)):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus.documents)
            write_bytes(folder / f"{name}.jsonl", lines.encode())
        tokenizer = load_default_tokenizer()
        tokenizer.save_pretrained(folder / "tokenizer")
        if not shards.exists():
            source = DataInput(str(folder / "training.jsonl"), on_control="text")
            build_data(BuildOrder([source], shards, tokenizer, sources=[training.manifest()]))
        write_json(marker, facts)
        return files

    def train(self, config: "RunConfig", *, use_cpu: bool) -> "PretrainResult":
        """Train, from the newest checkpoint of the configuration's folder if there is one."""
        from cognexis.training.pretrain import PretrainOrder, pretrain

        return pretrain(config, PretrainOrder(show_progress=False, use_cpu=use_cpu))
