"""The model card: complete metadata, true figures, nobody else's text overwritten."""

import math
import subprocess
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from cognexis import CardFacts, CognexisForCausalLM, DepthScore
from cognexis.errors import InvalidConfigError
from cognexis.hub.build import commit_of
from cognexis.hub.model_card import metadata_faults
from tests.batteries.saved_checkpoint import save_checkpoint
from tests.batteries.tiny import tiny_model

FACTS = CardFacts(
    name="demo",
    license="apache-2.0",
    language=("en", "code"),
    datasets=("me/texts",),
    base_model="me/base",
    summary="A demonstration.",
    scores=(DepthScore("me/texts", "loss", 3.5, 1, 2e6), DepthScore("me/texts", "loss", 3.25, 4, 4e6)),
)


def metadata_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_every_save_writes_a_card_with_valid_metadata(tmp_path):
    save_checkpoint(tmp_path / "model")
    metadata = metadata_of(tmp_path / "model")
    assert metadata_faults(metadata) == []
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert {"cognexis", "recurrent-depth", "custom_code"} <= set(metadata["tags"])
    assert "license" not in metadata and "model-index" not in metadata  # nobody said


def test_the_card_says_what_its_owner_says(tmp_path):
    model = tiny_model()
    model.card_facts = FACTS
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")  # the Hub's own reader
    assert (card.data.license, card.data.language, card.data.base_model) == ("apache-2.0", ["en", "code"], "me/base")
    assert [(r.metric_value, r.metric_args["num_loops"]) for r in card.data.eval_results] == [(3.5, 1), (3.25, 4)]
    text = (tmp_path / "README.md").read_text()
    assert "| me/texts | loss | 4 | 3.2500 | 4.00 |" in text and f"{model.num_parameters():,}" in text


def test_the_code_of_the_card_runs(tmp_path):
    save_checkpoint(tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace('"..."', repr(str(tmp_path / "model")))
    exec(compile(code, "card", "exec"), {})


def test_a_card_of_ours_is_renewed_and_another_is_kept(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.card_facts = FACTS
    model.save_pretrained(tmp_path)
    assert "# demo" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_training_record_is_shown(tmp_path):
    model = tiny_model()
    model.training_record.checkpoint_step = 1234
    model.training_record.sampled_loops = {2: 1000, 1: 234}
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| optimizer steps | 1,234 |" in text and "| steps by loop count | 1: 234, 2: 1000 |" in text
    assert CognexisForCausalLM.from_pretrained(tmp_path).training_record.checkpoint_step == 1234


@pytest.mark.parametrize(
    "facts, message",
    [
        (CardFacts(license="Apache 2!"), "license='Apache 2!'"),
        (CardFacts(language=("English",)), "language='English'"),
        (CardFacts(datasets=("a b",)), "datasets='a b'"),
        (CardFacts(scores=(DepthScore("x", "loss", math.nan, 1, 1.0),)), "must be a finite number"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_refused_before_anything_is_written(tmp_path, facts, message):
    model = tiny_model()
    model.card_facts = facts
    with pytest.raises(InvalidConfigError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("missing", ["library_name", "pipeline_tag", "tags"])
def test_missing_keys_are_found(tmp_path, missing):
    save_checkpoint(tmp_path)
    metadata = metadata_of(tmp_path)
    del metadata[missing]
    assert any(missing in fault for fault in metadata_faults(metadata))


def test_the_commit_of_a_checkout_is_read_from_its_files(tmp_path):
    assert commit_of(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    wanted = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert commit_of(tmp_path) == wanted
    subprocess.run([*git, "pack-refs", "--all"], check=True)
    assert commit_of(tmp_path) == wanted
    subprocess.run([*git, "checkout", "-q", "--detach"], check=True)
    assert commit_of(tmp_path) == wanted
