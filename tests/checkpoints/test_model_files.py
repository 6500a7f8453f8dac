"""Saving and loading models: what is written, what is verified, and what is refused before it is believed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from cognexis import CognexisConfig, CognexisForCausalLM, CognexisModel
from cognexis.checkpoints.metadata import TrainingRecord
from cognexis.errors import ArtifactMismatchError, CheckpointError, CognexisError, InvalidConfigError
from tests.batteries.crash_points import crash_before_event
from tests.batteries.damaged_folders import damage
from tests.batteries.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "one"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sharded"
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit_weights(folder: Path, change: Any) -> None:
    """Rewrite the weights as another program would: with no manifest to say otherwise."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "manifest.json").unlink(missing_ok=True)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (path.parent / "manifest.json").unlink(missing_ok=True)


def same_weights(first: Any, second: Any) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- what is written ----------------------------------------------------------------------------------------------


def test_the_folder_holds_its_records(saved):
    names = {path.name for path in saved.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "metadata.json", "scheduler.json"} <= names
    artifacts = json.loads((saved / "manifest.json").read_text())["artifacts"]
    assert {artifact["path"] for artifact in artifacts} == names - {"manifest.json", "README.md"}
    assert not [name for name in names if name.startswith(".")]


def test_metadata_states_facts_and_no_invented_zeros(model, tmp_path):
    model.training_record = TrainingRecord(checkpoint_step=12, training_tokens_seen=3400, sampled_loops={1: 4, 3: 8})
    model.save_pretrained(tmp_path)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["parameter_count"] == sum(p.numel() for p in model.parameters())
    assert (metadata["tensor_dtype"], metadata["recurrent_blocks_stored"]) == ("float32", 1)
    assert (metadata["checkpoint_step"], metadata["training_tokens_seen"]) == (12, 3400)
    assert metadata["sampled_loops"] == {"1": 4, "3": 8} and metadata["data_manifest_checksum"] is None
    again = CognexisForCausalLM.from_pretrained(tmp_path)
    assert again.training_record.sampled_loops == {1: 4, 3: 8}
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "metadata.json").read_text())["training_tokens_seen"] == 3400
    model.training_record = TrainingRecord()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_a_round_trip_is_exact(tmp_path, dtype, shard_size):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    again = CognexisForCausalLM.from_pretrained(tmp_path, verify="strict", dtype="auto")
    assert again.dtype == dtype and same_weights(model, again)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids, num_loops=3).logits, again(ids, num_loops=3).logits)


def test_weights_hold_one_core_and_one_tied_tensor_whatever_the_loops(tmp_path):
    sizes = set()
    for loops in (1, 4, 32):
        tiny_model(tiny_config(trained_max_loops=loops)).save_pretrained(tmp_path / str(loops))
        path = tmp_path / str(loops) / "model.safetensors"
        names = set(load_file(path))
        assert "lm_head.weight" not in names and {n.split(".")[3] for n in names if "recurrent.blocks" in n} == {"0"}
        sizes.add(path.stat().st_size)
    assert len(sizes) == 1


def test_a_smaller_save_leaves_no_shards_behind(model, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("model*.safetensors*")] == ["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert same_weights(model, CognexisForCausalLM.from_pretrained(folder, verify="strict"))


def test_variants_lie_side_by_side(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = tiny_model(seed=1)
    other.save_pretrained(tmp_path, variant="other")
    assert same_weights(model, CognexisForCausalLM.from_pretrained(tmp_path, verify="strict"))
    assert same_weights(other, CognexisForCausalLM.from_pretrained(tmp_path, verify="strict", variant="other"))


def test_an_unknown_keyword_is_refused_before_anything_is_written(model, tmp_path):
    with pytest.raises(TypeError, match="max_shard_sise"):
        model.save_pretrained(tmp_path / "new", max_shard_sise="1GB")
    assert not (tmp_path / "new").exists()


def test_saving_onto_a_file_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_other_ranks_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


# -- verification -------------------------------------------------------------------------------------------------


def test_a_folder_without_manifest_is_loaded_with_a_warning(folder, caplog):
    (folder / "manifest.json").unlink()
    CognexisForCausalLM.from_pretrained(folder)
    assert "unverified" in caplog.text
    with pytest.raises(CheckpointError, match="verify='strict' needs one"):
        CognexisForCausalLM.from_pretrained(folder, verify="strict")
    caplog.clear()
    CognexisForCausalLM.from_pretrained(folder, verify="off")
    assert "unverified" not in caplog.text


def test_a_flipped_bit_is_found_unless_the_caller_looks_away(folder, caplog):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    for verify in (None, "strict"):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: content sha256:"):
            CognexisForCausalLM.from_pretrained(folder, verify=verify)
    CognexisForCausalLM.from_pretrained(folder, verify="warn")
    assert "model.safetensors: content" in caplog.text
    CognexisForCausalLM.from_pretrained(folder, verify="off")


def test_edited_generation_defaults_are_reported_and_loaded(folder, caplog):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 7}))
    assert CognexisForCausalLM.from_pretrained(folder).generation_config.max_new_tokens == 7
    assert "generation_config.json" in caplog.text


def test_verification_reaches_every_way_of_loading(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    for loader in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, CognexisModel):
        with pytest.raises(CheckpointError, match="does not match"):
            loader.from_pretrained(folder)
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder, verify="off"), CognexisForCausalLM)


@pytest.mark.parametrize("keyword, value", [("verify", "loud"), ("verify", True), ("use_safetensors", False)])
def test_bad_keywords_are_refused(folder, keyword, value):
    with pytest.raises(InvalidConfigError, match=keyword):
        CognexisForCausalLM.from_pretrained(folder, **{keyword: value})


def test_an_absent_scheduler_means_fixed_loops(folder):
    (folder / "scheduler.json").unlink()
    CognexisForCausalLM.from_pretrained(folder, verify="strict")


def test_a_scheduler_that_contradicts_the_resolved_configuration_is_refused(folder):
    scheduler = {"type": "rule_based", "min_delta": 0.03}
    (folder / "config.resolved.yaml").write_text("inference:\n  scheduler: {type: rule_based, min_delta: 0.03}\n")
    edit_json(folder / "scheduler.json", scheduler=scheduler)
    CognexisForCausalLM.from_pretrained(folder)
    edit_json(folder / "scheduler.json", scheduler=scheduler | {"min_delta": 0.13})
    with pytest.raises(ArtifactMismatchError, match=r"min_delta=0\.13, but config\.resolved\.yaml says 0\.03"):
        CognexisForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"tensor_dtype": ""}, {"checkpoint_step": -1}])
def test_bad_metadata_is_refused(folder, change):
    edit_json(folder / "metadata.json", **change)
    with pytest.raises(CheckpointError, match=rf"metadata\.json: {next(iter(change))}="):
        CognexisForCausalLM.from_pretrained(folder)


# -- weights against configuration --------------------------------------------------------------------------------

CORE = "model.recurrent.blocks.0.feed_forward.up_proj.weight"


def _nan(tensors: Any) -> None:
    tensors[CORE][3, 5] = float("nan")
    tensors[CORE][0, 0] = float("-inf")


WRONG_WEIGHTS = {
    "missing": (lambda t: t.pop(CORE), r"recurrent\.blocks\.0\.feed_forward\.up_proj\.weight: missing"),
    "extra block": (
        lambda t: t.update({"model.prelude.blocks.2.x": torch.ones(2)}),
        r"prelude\.blocks\.2\.x: .*no such",
    ),
    "copies": (
        lambda t: t.update(
            {n.replace("blocks.0", f"blocks.{i}"): v.clone() for n, v in t.items() if "recurrent" in n for i in (1, 2)}
            | t
        ),
        "3 copies of the recurrent block, expected 1",
    ),
    "shape": (lambda t: t.update({CORE: torch.ones(3, 4)}), r"shape \[3, 4\], the configuration asks for \[48, 32\]"),
    "vocabulary": (lambda t: t.update({"model.embed_tokens.weight": torch.ones(65, 32)}), r"embed_tokens.*\[65, 32\]"),
    "integers": (lambda t: t.update({CORE: torch.ones(48, 32, dtype=torch.int8)}), "dtype I8"),
    "fp8": (lambda t: t.update({CORE: torch.ones(48, 32).to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
    "untied": (lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}), "tied .* but differ"),
    "not finite": (_nan, r"up_proj\.weight: 2 of 1536 values are NaN or infinite"),
}


@pytest.mark.parametrize("change, message", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(folder, change, message):
    edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        CognexisForCausalLM.from_pretrained(folder)


def test_the_tied_tensor_may_stand_twice_when_it_is_the_same(model, folder):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same_weights(model, CognexisForCausalLM.from_pretrained(folder))


def test_non_finite_weights_load_with_permission(folder):
    edit_weights(folder, _nan)
    model = CognexisForCausalLM.from_pretrained(folder, allow_nonfinite=True)
    assert not torch.isfinite(model.get_parameter(CORE)).all()


def test_non_finite_weights_on_disk_are_found(folder, tmp_path):
    edit_weights(folder, _nan)
    with pytest.raises(CheckpointError, match="2 of 1536"):
        CognexisForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def test_an_unknown_tensor_is_an_error_in_strict_mode_only(model, folder, tmp_path):
    extended = tiny_model(cls=CognexisForCausalLM)
    extended.register_parameter("probe", torch.nn.Parameter(torch.ones(3)))
    extended.save_pretrained(tmp_path / "extended")
    CognexisForCausalLM.from_pretrained(tmp_path / "extended")
    with pytest.raises(CheckpointError, match="probe: the model of this configuration has no such tensor"):
        CognexisForCausalLM.from_pretrained(tmp_path / "extended", verify="strict")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_prelude_blocks": 3}, r"prelude\.blocks\.2\.\S+: missing"),
        ({"num_coda_blocks": 0}, r"coda\.blocks\.0\.\S+: .*no such tensor"),
        ({"intermediate_size": 64}, "shape"),
        ({"vocab_size": 80}, r"embed_tokens.weight: shape \[64, 32\], the configuration asks for \[80, 32\]"),
        ({"recurrent_gating": False}, r"recurrent\.\S*gate\S*: .*no such tensor"),
    ],
)
def test_a_configuration_of_another_size_is_refused(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        CognexisForCausalLM.from_pretrained(folder)


def test_ignore_mismatched_sizes_keeps_its_meaning(folder):
    edit_json(folder / "config.json", vocab_size=80)
    model = CognexisForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.get_input_embeddings().weight.shape == (80, 32)


def test_a_checkpoint_of_the_body_serves_the_heads_and_back(model, folder, tmp_path):
    model.model.save_pretrained(tmp_path / "body")
    assert same_weights(model, CognexisForCausalLM.from_pretrained(tmp_path / "body", verify="strict"))
    assert same_weights(model.model, CognexisModel.from_pretrained(folder, verify="strict"))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier", verify="strict")
    assert torch.equal(again.score.weight, classifier.score.weight)


# -- hostile folders ----------------------------------------------------------------------------------------------


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.ckpt"])
def test_pickles_are_never_read(folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    CognexisForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=rf"no weights in safetensors format; {name} could run code"):
        CognexisForCausalLM.from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("goal", ["../outside.safetensors", "/dev/zero", "sub/x.safetensors", "pipe", "link"])
def test_an_index_that_leaves_the_folder_is_refused(sharded, tmp_path, goal):
    folder = Path(shutil.copytree(sharded, tmp_path / "checkpoint"))
    shutil.copy(folder / "model-00001-of-00004.safetensors", tmp_path / "outside.safetensors") if (
        folder / "model-00001-of-00004.safetensors"
    ).exists() else save_file({"x": torch.ones(1)}, tmp_path / "outside.safetensors")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = goal
    index.write_text(json.dumps(content))
    (folder / "manifest.json").unlink()
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="only files in the folder|outside the checkpoint|not a regular file"):
        CognexisForCausalLM.from_pretrained(folder)
    assert time.monotonic() - started < 5  # a pipe without a writer does not block


def test_places_that_are_no_folder_are_refused(saved, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        CognexisForCausalLM.from_pretrained(saved / "model.safetensors")
    with pytest.raises(CheckpointError, match="points nowhere"):
        CognexisForCausalLM.from_pretrained(tmp_path / "dangling")
    with pytest.raises(InvalidConfigError, match="subfolder='..': lies outside"):
        CognexisForCausalLM.from_pretrained(saved, subfolder="..")


def refused(folder: Path) -> str | None:
    """What loading says against a folder; None if it takes it. Anything but a typed error is a failure."""
    try:
        CognexisForCausalLM.from_pretrained(folder)
    except CognexisError as error:
        return str(error)
    return None


def check_damages(saved: Path, sharded: Path, scratch: Path, seeds: range) -> list[str]:
    """Damage a copy for each seed; return the damages that loading did not refuse."""
    accepted = []
    for seed in seeds:
        folder = scratch / "damaged"
        shutil.copytree(saved if seed % 2 else sharded, folder)
        what = damage(folder, seed)
        started = time.monotonic()
        if refused(folder) is None:
            accepted.append(what)
        assert time.monotonic() - started < 2, what
        shutil.rmtree(folder)
    return accepted


def test_damaged_folders_are_refused(saved, sharded, tmp_path):
    assert check_damages(saved, sharded, tmp_path, range(100)) == []


@pytest.mark.slow
def test_a_thousand_damaged_folders_are_refused(saved, sharded, tmp_path):
    first, count = 100, int(os.environ.get("COGNEXIS_FUZZ_FOLDERS", "1000"))
    assert check_damages(saved, sharded, tmp_path, range(first, first + count)) == []


def test_without_verification_flipped_bits_slip_through(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("cognexis.checkpoints.model_files._require_verified", lambda folder, verify: None)
    accepted = 0
    for seed in range(12):
        folder = Path(shutil.copytree(saved, tmp_path / str(seed)))
        damage(folder, seed, only="bit flipped")
        accepted += refused(folder) is None
    assert accepted >= 3


# -- interrupted saves --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("overwrites", [False, True], ids=["first save", "overwriting save"])
def test_every_crash_of_saving_a_model_leaves_a_loadable_checkpoint(tmp_path, overwrites):
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    folder, kept = tmp_path / "checkpoint", tmp_path / "old"
    old.save_pretrained(kept, max_shard_size="40KB")
    outcomes = []
    for event in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        if overwrites:
            shutil.copytree(kept, folder)
        if crash_before_event(event, lambda: new.save_pretrained(folder)):
            break
        if folder.exists():
            found = CognexisForCausalLM.from_pretrained(folder, verify="strict")
            outcomes.append("new" if same_weights(found, new) else "old")
            assert same_weights(found, new) or (overwrites and same_weights(found, old))
        else:
            outcomes.append("nothing")
            assert not overwrites
    print(f"{len(outcomes)} crash points: {outcomes.count('new')} with the new checkpoint")
    assert len(outcomes) > 40 and outcomes.count("new") >= (10 if overwrites else 1)


@pytest.mark.slow
def test_an_interrupted_save_is_completed_by_the_next_reader(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    new = tiny_model(seed=3)
    new.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", folder / ".saved")
    program = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, verify='strict')\n"
        "print(model.model.final_norm.weight.sum().item())\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONSAFEPATH": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) == pytest.approx(new.model.final_norm.weight.sum().item())
    assert not (folder / ".saved").exists()


def test_a_configuration_saved_alone_keeps_the_manifest_true(folder):
    config = CognexisConfig.from_pretrained(folder)
    config.default_loops = 1
    config.save_pretrained(folder)
    assert CognexisForCausalLM.from_pretrained(folder, verify="strict").config.default_loops == 1


def test_settings_beside_the_name_count_when_the_weights_are_checked(folder):
    assert CognexisForCausalLM.from_pretrained(folder, default_loops=1).config.default_loops == 1
    with pytest.raises(CheckpointError, match="no such tensor"):
        CognexisForCausalLM.from_pretrained(folder, num_coda_blocks=0)
