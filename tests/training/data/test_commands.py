"""`cognexis data build | verify | mix` from the command line."""

import json
import sys

import pytest

from cognexis.cli import main


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a command; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str):
        monkeypatch.setattr(sys, "argv", ["cognexis", "data", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return call


@pytest.fixture
def texts(write_jsonl):
    return write_jsonl([{"text": f"a line of text, number {index}"} for index in range(30)])


def test_build_verify_and_mix(run, texts, tmp_path):
    code, out, err = run("build", str(texts), "--out", "data/a", "--domain", "lines", "--shard-tokens", "100")
    assert code == 0 and "documents: 30" in out and "lines:" in out and "tokens in" in err
    code, out, _ = run("verify", "data/a", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["faults"] == [] and facts["documents"] == 30 and facts["hashed_files"] > 2
    code, out, _ = run("mix", "data/a", "--out", "data/mix.json", "--weight", "lines=2")
    assert code == 0 and (tmp_path / "data/mix.json").is_file()
    code, out, err = run("verify", "data/mix.json", "--against", "data/a")
    assert code == 0 and "shared_documents: 30" in out and "30 of 30 held-out documents" in err
    (tmp_path / "data/a/lines-00000.bin").write_bytes(b"1234")
    code, out, err = run("verify", "data/mix.json", "--quick")
    assert code == 1 and "lines-00000.bin: 4 bytes, but num_tokens" in out


def test_policies_and_shares_by_option(run, write_jsonl, tmp_path):
    path = write_jsonl([{"text": f"text {index}"} for index in range(100)] + [b"broken"])
    code, _, err = run("build", str(path), "--out", "x")
    assert code == 2 and "records.jsonl, line 101: the record is no strict JSON" in err and err.count("\n") == 1
    words = ("--policy", "quarantine", "--validation-share", "0.2", "--no-add-bos")
    code, out, _ = run("build", str(path), "--out", "x", "--json", *words)
    facts = json.loads(out)
    assert code == 0 and facts["train"]["documents"] + facts["validation"]["documents"] == 100
    assert facts["train"]["records"]["skipped"] == {"invalid_json": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "none.jsonl", "--out", "x"), "none.jsonl: no such file"),
        (("build", "none.jsonl", "--out", "x", "--policy", "drop"), "corruption_policy='drop'"),
        (("verify", "nowhere"), "nowhere: cannot be read"),
        (("mix", "nowhere", "--out", "x.json", "--share", "a"), "--share 'a': must be DOMAIN=NUMBER"),
        (("build",), "Missing argument"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, words, message, tmp_path):
    code, out, err = run(*words)
    assert code == 2 and message in err and not out and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
