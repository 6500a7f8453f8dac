"""Saved folders load elsewhere: without the package, from a directory, from a Hub cache, and after an upload.

Five checkpoints (body, language model, three task heads) are saved once. Processes that cannot import the package
look at them and print what they saw as JSON; the tests read it.
"""

import ast
import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cognexis import (
    CognexisForCausalLM,
    CognexisForQuestionAnswering,
    CognexisForSequenceClassification,
    CognexisForTokenClassification,
)
from cognexis.configuration_cognexis import AUTO_MAP
from tests.batteries.tiny import tiny_config, tiny_model
from tests.batteries.without_package import put_in_hub_cache, run_without_package

MAX_CODE_FILES = 15
AUTO_CLASSES = {
    "lm": "AutoModelForCausalLM",
    "body": "AutoModel",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "question": "AutoModelForQuestionAnswering",
}
LOOPS = (1, 2, 4)
PLACES = ("directory", "hub_cache")
PROMPT = "the sun and the moon"


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A small byte-pair tokenizer with an end token, trained on the spot (in a repeatable way)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the sun and the moon and the stars shine over the sea"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )


def heads() -> dict[str, Any]:
    lm = tiny_model()
    classes = {
        "sequence": CognexisForSequenceClassification,
        "token": CognexisForTokenClassification,
        "question": CognexisForQuestionAnswering,
    }
    return {"lm": lm, "body": lm.model} | {
        name: tiny_model(tiny_config(num_labels=3), seed=1, cls=cls) for name, cls in classes.items()
    }


def outputs_of(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        output = model(ids)
    names = ("logits", "last_hidden_state", "start_logits", "end_logits")
    found = {name: output[name] for name in names if output.get(name) is not None}
    assert found
    return found


def greedy(model: Any, ids: torch.Tensor) -> dict[str, list]:
    return {
        str(loops): model.generate(ids, num_loops=loops, max_new_tokens=6, do_sample=False).tolist() for loops in LOOPS
    }


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The checkpoints as folders and in a Hub cache, with what the package's own models compute."""
    work = tmp_path_factory.mktemp("checkpoints")
    tokenizer = word_tokenizer(tiny_config().vocab_size)
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    expected: dict[str, Any] = {"input_ids": ids}
    for name, model in heads().items():
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
        put_in_hub_cache(work / name, work / "home", f"me/{name}")
        expected[name] = outputs_of(model, ids)
        if name == "lm":
            expected["greedy"] = greedy(model, ids)
            prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
            text = model.generate(prompt, max_new_tokens=6, do_sample=False, num_loops=2)
            expected["text"] = PROMPT + tokenizer.decode(text[0, prompt.shape[1] :], skip_special_tokens=True)
    torch.save(expected, work / "expected.pt")
    return work


# ---- loading without the package ----

LOAD = """
import json, os, pickle, sys, time
start = time.perf_counter()
import torch, transformers
from pathlib import Path
from transformers import AutoConfig, AutoTokenizer, pipeline

work, auto_classes = Path(sys.argv[1]), json.loads(sys.argv[2])
expected = torch.load(work / "expected.pt")
ids = expected["input_ids"]
seen = {"seconds": {"import of transformers": time.perf_counter() - start}, "auto_map": {}}
loaded_before = {name.partition(".")[0] for name in sys.modules}


def timed(name, call):
    start = time.perf_counter()
    result = call()
    seen["seconds"][name] = time.perf_counter() - start
    return result


def load(auto_class, place, **kwargs):
    return getattr(transformers, auto_class).from_pretrained(place, trust_remote_code=True, **kwargs).eval()


def equal(model, name):
    with torch.no_grad():
        output = model(ids)
    return [key for key, value in expected[name].items() if not torch.equal(output[key], value)]


for kind, prefix in (("directory", f"{work}/"), ("hub_cache", "me/")):
    place = prefix + "lm"
    now = seen[kind] = {"different": {}, "modules": {}}
    timed(f"{kind}, first load", lambda: load("AutoModelForCausalLM", place))
    model = timed(f"{kind}, second load", lambda: load("AutoModelForCausalLM", place))
    config = AutoConfig.from_pretrained(place, trust_remote_code=True)
    now["config"] = [type(config).__name__, config.num_hidden_layers, config.num_loops, config.tie_word_embeddings]
    now["same_config_class"] = isinstance(config, model.config_class) and isinstance(model.config, model.config_class)
    now["tied"] = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    now["greedy"] = {
        n: model.generate(ids, num_loops=int(n), max_new_tokens=6, do_sample=False).tolist()
        for n in expected["greedy"]
    }
    for name, auto_class in auto_classes.items():
        head = load(auto_class, prefix + name)
        now["different"][name] = equal(head, name)
        now["modules"][name] = type(head).__module__
        head.save_pretrained(work / f"again_{kind}_{name}")
    now["different"]["body as lm"] = equal(load("AutoModelForCausalLM", prefix + "body"), "lm")
    now["different"]["lm as body"] = equal(load("AutoModel", place), "body")
    now["different"]["pickled"] = equal(pickle.loads(pickle.dumps(model)), "lm")
    _, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        place, trust_remote_code=True, output_loading_info=True
    )
    now["missing for a new head"] = sorted(report["missing_keys"])
    empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    now["from_config"] = [type(empty).__name__, sum(p.numel() for p in empty.parameters())]
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    generator = pipeline("text-generation", model=place, tokenizer=tokenizer, trust_remote_code=True)
    prompt = sys.argv[3]
    now["text"] = generator(prompt, max_new_tokens=6, do_sample=False, num_loops=2)[0]["generated_text"]
    try:
        getattr(transformers, "AutoModelForCausalLM").from_pretrained(place, trust_remote_code=False)
        now["refusal"] = ""
    except ValueError as error:
        now["refusal"] = str(error)
    try:
        model(ids, num_loops=99)
        now["error"] = ""
    except ValueError as error:
        now["error"] = f"{type(error).__name__}: {error}"
    try:
        AutoConfig.from_pretrained(place, trust_remote_code=True, trained_max_loops=0)
        now["config_error"] = ""
    except ValueError as error:
        now["config_error"] = str(error)
loaded_now = {name.partition(".")[0] for name in sys.modules}
seen["new packages"] = sorted(loaded_now - loaded_before)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def loaded(work) -> dict[str, Any]:
    return run_without_package(LOAD, work, json.dumps(AUTO_CLASSES), PROMPT, hf_home=work / "home")


@pytest.fixture(scope="module")
def expected(work) -> dict[str, Any]:
    return torch.load(work / "expected.pt")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", [*AUTO_CLASSES, "body as lm", "lm as body", "pickled"])
def test_outputs_are_bit_equal_to_the_packages(loaded, place, what):
    assert loaded[place]["different"][what] == []


@pytest.mark.parametrize("place", PLACES)
def test_classes_come_from_the_folder(loaded, place):
    assert all(module.startswith("transformers_modules.") for module in loaded[place]["modules"].values())
    assert loaded[place]["config"] == ["CognexisConfig", 7, 4, True]
    assert loaded[place]["tied"]
    if place == "hub_cache":  # from a directory, the loader reads the configuration file twice, as two modules
        assert loaded[place]["same_config_class"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("loops", LOOPS)
def test_generated_tokens_are_the_packages(loaded, expected, place, loops):
    assert loaded[place]["greedy"][str(loops)] == expected["greedy"][str(loops)]


def test_loop_counts_give_different_tokens(expected):
    assert len({json.dumps(tokens) for tokens in expected["greedy"].values()}) == len(LOOPS)


@pytest.mark.parametrize("place", PLACES)
def test_pipeline_generates_the_packages_text(loaded, expected, place):
    assert loaded[place]["text"] == expected["text"]


@pytest.mark.parametrize("place", PLACES)
def test_model_is_built_from_the_configuration_alone(loaded, place):
    parameters = sum(p.numel() for p in CognexisForCausalLM(tiny_config()).parameters())
    assert loaded[place]["from_config"] == ["CognexisForCausalLM", parameters]


@pytest.mark.parametrize("place", PLACES)
def test_new_head_on_a_language_model_misses_only_itself(loaded, place):
    assert loaded[place]["missing for a new head"] == ["score.weight"]


@pytest.mark.parametrize("place", PLACES)
def test_loading_without_trust_is_refused_in_words(loaded, place):
    assert "trust_remote_code=True" in loaded[place]["refusal"]


@pytest.mark.parametrize("place", PLACES)
def test_errors_of_the_folders_code_are_the_packages(loaded, place):
    assert loaded[place]["error"].startswith("InvalidConfigError: num_loops=99: must lie between")
    assert "trained_max_loops=0: must be between 1" in loaded[place]["config_error"]


def test_loading_imports_no_further_package(loaded):
    allowed = {"transformers_modules", *sys.stdlib_module_names}
    assert {"tensordict", "pydantic", "cognexis"}.isdisjoint(loaded["new packages"])
    unknown = [name for name in loaded["new packages"] if name not in allowed]
    # What transformers and torch import late for their own ends is theirs; the folder's code asks for none of it.
    assert not {"peft", "datasets", "trl", "triton"} & set(unknown), unknown


def test_load_times_are_shown(loaded, capsys):
    with capsys.disabled():
        print("\n" + ", ".join(f"{name}: {seconds:.2f} s" for name, seconds in loaded["seconds"].items()))
    assert loaded["seconds"]["directory, second load"] < 30


# ---- the files ----


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_folder_holds_few_code_files_and_the_whole_auto_map(work, name):
    code = sorted(path.name for path in (work / name).glob("*.py"))
    assert len(code) <= MAX_CODE_FILES
    assert json.loads((work / name / "config.json").read_text())["auto_map"] == AUTO_MAP
    for target in AUTO_MAP.values():
        module, _, attribute = target.partition(".")
        source = (work / name / f"{module}.py").read_text()
        assert re.search(rf"^(class )?{attribute}\b", source, re.MULTILINE)


def test_code_imports_torch_transformers_and_the_standard_library_alone(work):
    # transformers itself needs these
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "tokenizers", "yaml"}
    for path in (work / "lm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            for name in names:
                package = name.partition(".")[0]
                assert package in allowed or package in sys.stdlib_module_names, f"{path.name}: {name}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_second_save_writes_the_same_files(loaded, work, place, name):
    again = work / f"again_{place}_{name}"
    code = {path.name: path.read_text() for path in (work / name).glob("*.py")}
    assert {path.name: path.read_text() for path in again.glob("*.py")} == code
    assert json.loads((again / "config.json").read_text()) == json.loads((work / name / "config.json").read_text())
    assert (again / "model.safetensors").read_bytes() == (work / name / "model.safetensors").read_bytes()


# ---- a second save, and the Hub ----


class StubHub(ThreadingHTTPServer):
    """As much of the Hub's HTTP interface as uploading a model and loading it need; files are kept in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str) -> str:
        """A commit id that changes with the content."""
        digest = hashlib.sha1()
        for name, content in sorted(self.files[repo].items()):
            digest.update(name.encode() + content)
        return digest.hexdigest()


class StubHandler(BaseHTTPRequestHandler):
    server: StubHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer({"error": f"{what} not found"}, status=404, X_Error_Code=f"{what}NotFound")

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/api/repos/create":
            wanted = json.loads(data)
            repo = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.server.files.setdefault(repo, {})
            self.answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(data)["files"]
            ]
            self.answer({"files": files, "commitOid": self.server.commit(match[1])})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[match[1]][value["path"]] = base64.b64decode(value["content"])
            commit = self.server.commit(match[1])
            self.answer(
                {"commitUrl": f"{self.server.url}/{match[1]}/commit/{commit}", "commitOid": commit, "success": True}
            )
        else:
            self.server.unknown.append(f"POST {self.path}")
            self.missing("Repo")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if match[1] not in self.server.files:
                self.missing("Repo")
                return
            names = sorted(self.server.files[match[1]])
            self.answer(
                {
                    "id": match[1],
                    "modelId": match[1],
                    "sha": self.server.commit(match[1]),
                    "private": False,
                    "tags": [],
                    "downloads": 0,
                    "siblings": [{"rfilename": name} for name in names],
                }
            )
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.server.files.get(match[1], {}).get(match[2])
            if content is None:
                self.missing("Entry")
                return
            etag = hashlib.sha1(content).hexdigest()
            self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=self.server.commit(match[1]))
        else:
            if not re.search(r"/tree/|whoami", path):
                self.server.unknown.append(f"GET {self.path}")
            self.missing("Entry")

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub() -> Iterator[StubHub]:
    server = StubHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def hub_environment(hub: StubHub) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_any",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


PUSH = """
import json, sys
from cognexis import CognexisForCausalLM
from transformers import AutoTokenizer

model = CognexisForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("me/pushed")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("me/pushed")
print(json.dumps([]))
"""
LOAD_AGAIN = """
import json, sys
import torch, transformers
from pathlib import Path

work, auto_classes = Path(sys.argv[1]), json.loads(sys.argv[2])
expected = torch.load(work / "expected.pt")
ids = expected["input_ids"]
seen = {}


def different(model, name):
    with torch.no_grad():
        output = model.eval()(ids)
    return [key for key, value in expected[name].items() if not torch.equal(output[key], value)]


for kind in ("directory", "hub_cache"):
    for name, auto_class in auto_classes.items():
        place = work / f"again_{kind}_{name}"
        model = getattr(transformers, auto_class).from_pretrained(place, trust_remote_code=True)
        seen[f"second save, {kind}, {name}"] = different(model, name)
model = transformers.AutoModelForCausalLM.from_pretrained("me/pushed", trust_remote_code=True)
seen["pushed by the package"] = different(model, "lm")
transformers.AutoTokenizer.from_pretrained("me/pushed", trust_remote_code=True)
model.push_to_hub("me/pushed_again")
model = transformers.AutoModelForCausalLM.from_pretrained("me/pushed_again", trust_remote_code=True)
seen["pushed without the package"] = different(model, "lm")
model = transformers.AutoModel.from_pretrained("me/pushed_again", trust_remote_code=True)
seen["pushed without the package, body"] = different(model, "body")
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def loaded_again(loaded, work, hub) -> dict[str, Any]:
    environment = hub_environment(hub)
    run_without_package(PUSH, work / "lm", hf_home=work / "pusher", has_package=True, **environment)
    return run_without_package(LOAD_AGAIN, work, json.dumps(AUTO_CLASSES), hf_home=work / "reader", **environment)


@pytest.mark.slow
def test_second_saves_and_uploads_load_bit_equal_in_a_new_process(loaded_again):
    assert len(loaded_again) == len(PLACES) * len(AUTO_CLASSES) + 3
    assert {name: keys for name, keys in loaded_again.items() if keys} == {}


@pytest.mark.slow
@pytest.mark.parametrize("repo", ["me/pushed", "me/pushed_again"])
def test_upload_holds_the_code_and_the_whole_auto_map(loaded_again, hub, work, repo):
    files = hub.files[repo]
    for path in (work / "lm").glob("*.py"):
        assert files[path.name] == path.read_bytes()
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    assert {"model.safetensors", "generation_config.json", "README.md"} <= set(files)
    assert hub.unknown == []


# ---- with the package ----


def test_package_loads_its_own_class_with_and_without_trust(work):
    for arguments in ({}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained(work / "lm", **arguments)
        assert type(model) is CognexisForCausalLM
    assert len(AutoTokenizer.from_pretrained(work / "lm")) <= model.config.vocab_size


def test_package_saves_over_an_older_folder_without_leftovers(work, tmp_path):
    model = CognexisForCausalLM.from_pretrained(work / "lm")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
