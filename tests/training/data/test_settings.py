"""The data section of a run configuration."""

import pytest

from cognexis import CognexisConfig
from cognexis.artifacts.run_config.training_section import DataSettings
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.data.settings import open_run_data, run_loader


@pytest.fixture
def manifest(tmp_path, write_jsonl, build):
    build(write_jsonl([{"text": f"text {index}"} for index in range(30)]))
    return str(tmp_path / "out")


def config(**settings) -> CognexisConfig:
    return CognexisConfig.from_variant("tiny", vocab_size=266, pad_token_id=2, **settings)


def opened(manifest, model=None, **settings):
    given = DataSettings(train_manifest=manifest, **{"sequence_length": 20, **settings})
    return open_run_data(given, model or config())


def test_section_opens_data_and_loader(manifest, tokenizer):
    settings = DataSettings(train_manifest=manifest, sequence_length=20, num_workers=0, prefetch_batches=3)
    data = open_run_data(settings, config(), tokenizer=tokenizer)
    assert data.packing.block_length == 21 and data.packing.position_reset == "reset"
    loader = run_loader(data, settings, seed=4, batch_size=2, rank=1, world_size=2)
    assert (loader.rank, loader.prefetch_batches, loader.order.seed, loader.order.window) == (1, 3, 4, None)
    assert loader.data_checksum == data.checksum
    assert open_run_data(settings, config(), split="validation") is None


def test_shuffle_window_and_order_as_written(manifest):
    for buffer, shuffle, window in [(None, True, None), (5, True, 5), (0, False, None)]:
        settings = DataSettings(train_manifest=manifest, sequence_length=20, shuffle_buffer=buffer)
        order = run_loader(open_run_data(settings, config()), settings, seed=1, batch_size=1).order
        assert (order.shuffle, order.window) == (shuffle, window)


def test_positions_and_documents_follow_the_boundaries(manifest):
    assert "document_ids" in opened(manifest).rows[0]
    open_model = config(document_boundary_attention=False)
    data = opened(manifest, open_model)
    assert data.packing.position_reset == "continue" and "document_ids" in data.rows[0]  # for memory cells
    data = opened(manifest, document_boundary_attention=False)
    assert data.packing.position_reset == "continue" and "document_ids" not in data.rows[0]
    with pytest.raises(InvalidConfigError, match="document_boundary_attention=True: model.document_boundary_.* False"):
        opened(manifest, open_model, document_boundary_attention=True)
    with pytest.raises(InvalidConfigError, match="False: .*restarting positions separate documents"):
        opened(manifest, document_boundary_attention=False, position_reset="reset")


def test_section_that_does_not_fit_the_model_is_refused(manifest):
    with pytest.raises(InvalidConfigError, match=r"sequence_length=64: .*max_position_embeddings is 64; at most 63"):
        opened(manifest, config(max_position_embeddings=64), sequence_length=64)
    with pytest.raises(InvalidConfigError, match="training.data.train_manifest=None: name the manifest"):
        opened(None)
    with pytest.raises(ArtifactMismatchError, match="the model's is sha256:1"):
        opened(manifest, config(tokenizer_checksum="sha256:" + "1" * 64))
    with pytest.raises(InvalidConfigError, match="split='test'"):
        open_run_data(DataSettings(), config(), split="test")
