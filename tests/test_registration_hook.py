"""Registration in every order of imports; that memory cells never wait for it stands in the tests of their names."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from cognexis import registration_hook
from cognexis.configuration_cognexis import CognexisConfig
from tests.batteries.small_tokenizers import small_tokenizer
from tests.batteries.tiny import tiny_config, tiny_model

ROOT = Path(__file__).parents[1]
# Runs each program in a process of its own, forked after what transformers itself imports has been imported once.
FORKS = """
import json, os, sys, traceback
from pathlib import Path
import torch, tensordict, accelerate, huggingface_hub, scipy.special, sklearn.metrics, tokenizers
assert not {"cognexis", "transformers"} & set(sys.modules)
folder = Path(sys.argv[1])
for number, program in enumerate(json.loads(sys.stdin.read())):
    if not (child := os.fork()):
        copy, error = folder / f"copy_{os.getpid()}", ""
        try:
            exec(program, {"sys": sys, "folder": folder, "copy": copy})
        except BaseException:
            error = traceback.format_exc()
        (folder / f"error_{number}").write_text(error)
        os._exit(0)
    os.waitpid(child, 0)
"""
OURS = "assert type(model).__module__ == 'cognexis.modeling_cognexis', type(model)\n"
LOAD = (
    "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
    "assert type(AutoConfig.for_model('cognexis')).__module__ == 'cognexis.configuration_cognexis'\n"
    "assert type(AutoConfig.from_pretrained(folder)).__module__ == 'cognexis.configuration_cognexis'\n"
    "assert type(AutoTokenizer.from_pretrained(folder)).__module__ == 'cognexis.tokenization_cognexis'\n"
    "model = AutoModelForCausalLM.from_pretrained(folder)\n"
    f"{OURS}"
)
PIPELINE = f"from transformers import pipeline\nmodel = pipeline('text-generation', model=str(folder)).model\n{OURS}"
ORDERS = {
    "the package first": f"import cognexis\nassert 'transformers' not in sys.modules\n{LOAD}",
    # transformers.modeling_layers loads the Auto classes before it defines what the model takes from it.
    "transformers, the package, a module that is half-way when the Auto classes load": (
        "import transformers\nimport cognexis\nassert 'cognexis.registration' not in sys.modules\n"
        f"import transformers.modeling_layers\nassert 'cognexis.registration' in sys.modules\n{LOAD}"
    ),
    "the model's own module": (
        "from cognexis.modeling_cognexis import CognexisForCausalLM\n"
        "model = CognexisForCausalLM.from_pretrained(folder)\nmodel.save_pretrained(copy)\n"
        "assert (copy / 'modeling_cognexis.py').is_file()\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_config(model.config)\n{OURS}"
    ),
}
MORE_ORDERS = {
    "the Auto classes first": f"from transformers import AutoModelForCausalLM\nimport cognexis\n{LOAD}{PIPELINE}",
    "the package, then a pipeline": f"import cognexis\n{PIPELINE}",
    "the tokenizer alone": (
        "import cognexis\nfrom transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "assert type(tokenizer).__module__ == 'cognexis.tokenization_cognexis'\n"
        "tokenizer.save_pretrained(copy)\nassert (copy / 'tokenization_cognexis.py').is_file()\n"
    ),
    "the configuration's own module": (
        "from cognexis.configuration_cognexis import CognexisConfig\n"
        "config = CognexisConfig.from_pretrained(folder)\nconfig.save_pretrained(copy)\n"
        "assert (copy / 'configuration_cognexis.py').is_file()\n"
        f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_config(config)\n{OURS}"
    ),
    "a public name": (
        "from cognexis import CognexisConfig\nassert CognexisConfig._code_writer is not None\n"
        "import cognexis\nassert all(getattr(cognexis, name) is not None for name in cognexis.__all__)\n"
        "assert set(cognexis.__all__) <= set(dir(cognexis)) and '__version__' in dir(cognexis)\n"
    ),
    "a pickled configuration": (
        "import pickle\nconfig = pickle.loads((folder / 'config.pickle').read_bytes())\n"
        "assert type(config).__module__ == 'cognexis.configuration_cognexis' and config._code_writer is not None\n"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    tokenizer = small_tokenizer()
    tiny_model(tiny_config(vocab_size=len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "config.pickle").write_bytes(pickle.dumps(CognexisConfig.from_pretrained(path)))
    return path


def check(orders: dict[str, str], folder: Path) -> None:
    command = [sys.executable, "-c", FORKS, str(folder)]
    programs = json.dumps(list(orders.values()))
    done = subprocess.run(command, input=programs, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    errors = {order: (folder / f"error_{number}").read_text() for number, order in enumerate(orders)}
    assert not any(errors.values()), "\n".join(f"{order}: {error}" for order, error in errors.items() if error)


@pytest.mark.slow
def test_saved_models_load_and_classes_save_their_code(folder):
    check(ORDERS, folder)


@pytest.mark.slow
def test_further_orders_of_imports_do_the_same(folder):
    check(MORE_ORDERS, folder)


@pytest.fixture
def toys(tmp_path, monkeypatch) -> list[str]:
    """A package of modules that say when they are executed, watched as transformers is; the list of what they say."""
    package = tmp_path / "toy"
    package.mkdir()
    for name, source in {
        "__init__": "",
        "trigger": "",
        "outer": "SEEN.append('outer begins')\nimport toy.trigger\nSEEN.append('outer ends')",
        "broken": "import toy.trigger\nraise OSError('broken')",
        "later": "",
    }.items():
        (package / f"{name}.py").write_text(f"from builtins import SEEN\n{source}\n")
    seen: list[str] = []
    monkeypatch.setattr("builtins.SEEN", seen, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration_hook, "_WATCHED", ("toy",))
    monkeypatch.setattr(registration_hook, "_TRIGGERS", ("toy.trigger",))
    monkeypatch.setattr(registration_hook, "_register", lambda: seen.append("registered"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield seen
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


def load(name: str) -> None:
    exec(f"import {name}", {})


def test_registration_waits_for_the_outermost_import_and_happens_once(toys):
    registration_hook.register_when_needed()
    finders = len(sys.meta_path)
    load("toy")
    assert toys == []
    load("toy.outer")
    assert toys == ["outer begins", "outer ends", "registered"]
    assert len(sys.meta_path) == finders - 1
    load("toy.later")
    assert toys.count("registered") == 1


def test_registration_happens_at_once_where_a_trigger_is_loaded(toys):
    load("toy.trigger")
    before = list(sys.meta_path)
    registration_hook.register_when_needed()
    assert toys == ["registered"] and sys.meta_path == before


def test_a_failed_import_registers_nothing_and_the_next_one_does(toys):
    registration_hook.register_when_needed()
    with pytest.raises(OSError, match="broken"):
        load("toy.broken")
    assert toys == []
    load("toy.later")
    assert toys == ["registered"]


def test_watched_modules_keep_their_own_loader(toys):
    registration_hook.register_when_needed()
    load("toy.later")
    module = sys.modules["toy.later"]
    assert module.__loader__ is module.__spec__.loader
    assert module.__loader__.get_source("toy.later").startswith("from builtins")
    with pytest.raises(ModuleNotFoundError, match="toy.missing"):
        load("toy.missing")
