"""``scheduler.json`` and what must agree with it."""

import json

import pytest

from cognexis import CognexisForCausalLM
from cognexis.checkpoints.manifest import verify_folder
from cognexis.checkpoints.metadata import read_metadata, read_scheduler, scheduler_state, write_scheduler
from cognexis.errors import ArtifactMismatchError, CheckpointError
from tests.batteries.tiny import tiny_config, tiny_model

HEAD = {"kind": "token", "bottleneck_size": 8}
VALUE = {"type": "value_head", "gain_threshold": 0.02, "output_kind": "predicted_gain"}
CALIBRATION = {"method": "linear", "scale": 2.0, "offset": 0.5}


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(tiny_config(value_head=HEAD))
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_written_scheduler_is_read_loaded_and_verified(saved):
    model, folder = saved
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    model.scheduler_record = scheduler_state(VALUE, {"weights": "model.value_head"}, CALIBRATION)
    write_scheduler(folder, model)
    assert read_scheduler(folder) == model.scheduler_record
    assert (read_metadata(folder) or {})["scheduler_mode"] == "value_head"
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    result = verify_folder(folder)
    assert result.is_present and not result.faults and not result.notes
    loaded = CognexisForCausalLM.from_pretrained(folder, verify="strict")
    assert loaded.scheduler_record == model.scheduler_record
    assert loaded.model.value_head.calibration.settings == CALIBRATION
    loaded.save_pretrained(folder)  # a second save keeps scheduler, resolved configuration and metadata in agreement
    assert CognexisForCausalLM.from_pretrained(folder, verify="strict").scheduler_record == model.scheduler_record
    assert (read_metadata(folder) or {})["scheduler_mode"] == "value_head"


@pytest.mark.parametrize("scheduler", [VALUE, {"type": "rule_based", "min_delta": 0.2}], ids=lambda s: s["type"])
def test_threshold_that_differs_from_the_resolved_configuration_is_refused(saved, scheduler):
    model, folder = saved
    model.scheduler_record = scheduler_state(scheduler)
    write_scheduler(folder, model)
    field = "gain_threshold" if scheduler is VALUE else "min_delta"
    content = json.loads((folder / "scheduler.json").read_text())
    content["scheduler"][field] += 0.1
    (folder / "scheduler.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactMismatchError, match=rf"scheduler\.{field}=.*config.resolved.yaml says"):
        CognexisForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scheduler": {"min_delta": 1}}, "scheduler must be an object with a type"),
        ({"value_head": [1]}, "value_head must be an object or null"),
        ({"calibration": 3}, "calibration must be an object or null"),
        ({"schema_version": 2}, "schema_version=2: must be 1"),
    ],
)
def test_record_of_the_wrong_form_is_neither_written_nor_read(saved, changes, message):
    model, folder = saved
    before = (folder / "scheduler.json").read_bytes()
    broken = scheduler_state() | changes
    (folder / "scheduler.json").write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match=message):
        read_scheduler(folder)
    (folder / "scheduler.json").write_bytes(before)
    if "scheduler" in changes or "calibration" in changes:
        return  # the model itself refuses to take such a record
    model.scheduler_record = broken
    with pytest.raises(CheckpointError, match=message):
        write_scheduler(folder, model)
    assert (folder / "scheduler.json").read_bytes() == before


def test_file_of_before_the_value_head_is_still_read(saved):
    _, folder = saved
    old = {"schema_version": 1, "scheduler": {"type": "fixed"}, "value_head": None, "calibration": None}
    (folder / "scheduler.json").write_text(json.dumps(old))
    assert read_scheduler(folder) == old == scheduler_state()
