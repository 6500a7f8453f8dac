"""The command line: what it prints, how it fails, and that its help waits for nothing."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cognexis import CognexisForCausalLM, cli
from tests.batteries.saved_checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
COMMANDS = [
    *(["quickstart"], ["generate"], ["tokenize"], ["tokenizer"], ["tokenizer", "train"], ["tokenizer", "inspect"]),
    *(["inspect-checkpoint"], ["doctor"], ["config"], ["config", "check"], ["config", "resolve"]),
    *(["config", "defaults"], ["config", "migrate"], ["config", "variants"], ["train"], ["ablate"]),
    *(["scheduler", name] for name in ("collect", "fit", "calibrate", "report")),
    *(["data", name] for name in ("build", "verify", "mix")),
    *(["eval", *rest] for rest in ([], ["loop-scaling"], ["report"], ["data", "build"])),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    save_checkpoint(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Call the command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments: Any) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["cognexis", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return call


def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    command = [sys.executable, "-m", "cognexis", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


# -- help and usage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "Usage:" in out and "--help" in out


def test_help_imports_neither_torch_nor_transformers():
    program = (
        "import sys\nsys.argv = ['cognexis', '--help']\nfrom cognexis.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_version_is_printed(run):
    import cognexis

    assert run("--version")[:2] == (0, f"cognexis {cognexis.__version__}\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generat"], "No such command 'generat'"),
        (["generate", "--promt", "x"], "No such option: --promt"),
        (["generate", "--checkpoint", "x"], "Missing option '--prompt'"),
        (
            ["generate", "--checkpoint", "x", "--prompt", "y", "--num-loops", "two"],
            "'--num-loops': Input should be a valid integer",
        ),
        (["doctor", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith("error: ") and message in err


def test_a_fault_is_one_line_and_a_traceback_only_when_asked(run, tmp_path):
    code, _, err = run("inspect-checkpoint", tmp_path / "nowhere")
    assert code == 1 and err == f"error: {tmp_path}/nowhere: no such folder\n"
    with pytest.raises(Exception, match="no such folder"):
        run("--debug", "inspect-checkpoint", tmp_path / "nowhere")


# -- generate -----------------------------------------------------------------------------------------------------


def expected_text(folder: Path, prompt: str, new_tokens: int, **keywords: Any) -> str:
    from cognexis import CognexisTokenizer

    tokenizer = CognexisTokenizer.from_pretrained(folder)
    model = CognexisForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode_untrusted(prompt)])
    output = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **keywords)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("loops", [1, 3])
def test_generate_prints_what_the_model_generates(run, checkpoint, loops):
    code, out, err = run(
        *("generate", "--checkpoint", checkpoint, "--prompt", "abc", "--num-loops", loops, "--max-new-tokens", 12),
        *("--set", "inference.sampling.temperature=0"),
    )
    assert code == 0, err
    assert out == expected_text(checkpoint, "abc", 12, num_loops=loops) + "\n"


def test_generate_is_repeatable_with_a_seed(run, checkpoint):
    arguments = ("generate", "--checkpoint", checkpoint, "--prompt", "abc", "--max-new-tokens", 16, "--seed", 3)
    sampling = ("--set", "inference.sampling.temperature=1.0")
    first, second = run(*arguments, *sampling), run(*arguments, *sampling)
    other = run(*arguments[:-1], 4, *sampling)
    assert first == second and first[0] == 0 and first[1] != other[1]


def test_generate_reads_stdin_and_chats(run, checkpoint, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    code, out, _ = run("generate", "--checkpoint", checkpoint, "--prompt", "-", "--chat", "--max-new-tokens", 3)
    assert code == 0 and out.endswith("\n")


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--num-loops", "0"], 2, "num_loops"),
        (["--num-loops", "99"], 2, "num_loops"),
        (["--max-new-tokens", "-1"], 2, "max_new_tokens"),
        (["--set", "model.hidden_size=64"], 2, "model.hidden_size"),
        (["--set", "inference.max_lops=2"], 2, "max_loops"),
        (["--set", "inference.sampling.top_p=2"], 2, "top_p"),
        (["--verify", "loud"], 2, "verify='loud'"),
        (["--prompt", ""], 2, "prompt"),
    ],
)
def test_bad_settings_of_generate_name_the_field(run, checkpoint, arguments, code, message):
    base = ["generate", "--checkpoint", checkpoint, "--prompt", "abc"]
    result = run(*base, *arguments)
    assert result[0] == code and result[2].startswith("error: ") and message in result[2]


def test_generate_refuses_the_wrong_tokenizer(run, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text()) | {"tokenizer_checksum": "sha256:" + "0" * 64}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()
    arguments = ("generate", "--checkpoint", folder, "--prompt", "abc", "--max-new-tokens", 2)
    code, _, err = run(*arguments)
    assert code == 2 and "tokenizer" in err and "sha256:0000" in err
    assert run(*arguments, "--allow-tokenizer-mismatch")[0] == 0


def test_generate_refuses_a_damaged_checkpoint(run, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    os.truncate(folder / "model.safetensors", 5000)
    code, _, err = run("generate", "--checkpoint", folder, "--prompt", "abc")
    assert code == 1 and "model.safetensors: 5000 bytes" in err


# -- inspect-checkpoint -------------------------------------------------------------------------------------------


def test_inspect_shows_parameters_tensors_and_checksums(run, checkpoint):
    code, out, _ = run("inspect-checkpoint", checkpoint)
    assert code == 0 and "verified: every file of the manifest matches" in out
    model = CognexisForCausalLM.from_pretrained(checkpoint)
    code, out, _ = run("inspect-checkpoint", checkpoint, "--json")
    shown = json.loads(out)
    assert shown["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert shown["parameters"]["recurrent"] == sum(p.numel() for p in model.model.recurrent.parameters())
    assert set(shown["tensors"]) == {name for name, _ in model.named_parameters()}
    assert shown["faults"] == [] and shown["tokenizer"]["size"] == 266
    assert {file["path"] for file in shown["files"]} >= {"model.safetensors", "config.json", "tokenizer.json"}


def test_inspect_reports_every_fault_and_fails(run, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    (folder / "metadata.json").write_text("{}")
    code, out, _ = run("inspect-checkpoint", folder)
    assert code == 1 and "fault: model.safetensors: content" in out and "fault: metadata.json" in out
    assert "verified: no" in out


# -- tokenizers, configurations, doctor ---------------------------------------------------------------------------


def test_tokenize_shows_ids_and_never_control_tokens_unasked(run, checkpoint):
    code, out, _ = run("tokenize", "--tokenizer", checkpoint, "--text", "hi Σ", "--json")
    assert code == 0 and json.loads(out)["ids"] == [114, 115, 42, 216, 173]
    assert 5 not in json.loads(run("tokenize", "--tokenizer", checkpoint, "--text", "<|system|>", "--json")[1])["ids"]
    asked = run("tokenize", "--tokenizer", checkpoint, "--text", "<|system|>", "--json", "--allow-special")[1]
    assert json.loads(asked)["ids"][-1] == 5


def test_a_tokenizer_is_trained_and_inspected(run, tmp_path):
    (tmp_path / "text.txt").write_text(Path(__file__).read_text() * 3)
    code, out, err = run("tokenizer", "train", tmp_path / "text.txt", "--out", tmp_path / "t", "--vocab-size", 500)
    assert code == 0, err
    code, out, _ = run("tokenizer", "inspect", tmp_path / "t", "--text", tmp_path / "text.txt", "--json")
    assert code == 0 and json.loads(out)["vocab_size"] == 500 and json.loads(out)["compression"]["tokens"] > 0
    code, _, err = run("tokenizer", "train", tmp_path / "text.txt", "--out", tmp_path / "t")
    assert code == 2 and "exists" in err


def test_config_commands(run, tmp_path):
    sample = ROOT / "configs" / "cognexis-tiny.yaml"
    assert run("config", "check", sample)[:2] == (0, f"{sample}: valid\n")
    code, out, _ = run("config", "resolve", sample, "--out", tmp_path)
    assert code == 0 and (tmp_path / "config.resolved.yaml").read_text() == out
    assert run("config", "resolve", tmp_path / "config.resolved.yaml")[1] == out
    assert run("config", "defaults", "inference")[0] == 0
    assert "cognexis-1.28t" in run("config", "variants")[1]
    (tmp_path / "bad.yaml").write_text("schema_version: 1\nmodel: {variant: cognexis-tiny, rope_thetaa: 3}\nrum: {}\n")
    code, out, err = run("config", "check", tmp_path / "bad.yaml")
    assert code == 2 and not out
    assert "model.rope_thetaa" in err and "rum" in err and err.count("error: ") == 2


def test_doctor_reports_this_machine(run):
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 0 and checks["torch"]["detail"] == torch.__version__
    assert checks["cpu"]["state"] == "ok" and {check["state"] for check in checks.values()} <= {"ok", "missing"}


# -- the process --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(checkpoint):
    process = start("generate", "--checkpoint", checkpoint, "--prompt", "abc", "--max-new-tokens", 100)
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_code(tmp_path, number, code):
    # A test run in the background ignores SIGINT, and its children would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start("quickstart", "--out", tmp_path / "run", "--minutes", 5, preexec_fn=heed)
    process.stdout.readline()  # it is at work
    process.send_signal(number)
    started = time.monotonic()
    assert process.wait(timeout=60) == code
    assert time.monotonic() - started < 30 and "Traceback" not in process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"LANG": "C", "LC_ALL": "C"}, {"COLUMNS": "1"}, {"TERM": "dumb"}])
def test_odd_terminals_do_not_matter(environment):
    process = start("doctor", stdin=subprocess.DEVNULL, env=environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "transformers" in out, err
