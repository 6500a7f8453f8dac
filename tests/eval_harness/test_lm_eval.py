"""Under lm-eval: its own command on a saved folder, and our model with depths, modes and costs."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.errors import BackendError, InvalidConfigError
from cognexis.eval_harness.compute import matmul_flops
from cognexis.eval_harness.lm_eval_study import evaluate_with_lm_eval

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
TEXT = "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2), add(10, 20))\n" * 4
DATA = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
metadata: {{version: 2.0}}
"""
TASKS = {
    "sums": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "answers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["="], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "code": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = train_tokenizer([TEXT], vocab_size=366)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = CognexisConfig.from_variant(
        "cognexis-tiny", vocab_size=len(tokenizer), initializer_range=0.3, max_position_embeddings=256, **shape, **ids
    )
    config.tokenizer_checksum = tokenizer.checksum
    CognexisForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "tasks").mkdir()
    rows = [{"question": f"{n} + {n} = ", "choices": [str(2 * n), str(n + 1)], "answer": 0} for n in range(2, 8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        head = f"task: {name}\n" + DATA.format(file=folder / "rows.jsonl")
        (folder / "tasks" / f"{name}.yaml").write_text(head + text)
    return folder


def study(place, tasks, **settings):
    settings = {"include_path": place / "tasks", "device": "cpu", "batch_size": 3, **settings}
    return evaluate_with_lm_eval(place / "model", tasks, **settings)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_message_says_what_to_install(place):
    with pytest.raises(BackendError, match=r"pip install lm-eval\[hf\]"):
        study(place, ["sums"])


@needs_lm_eval
@pytest.mark.slow
def test_depths_and_modes_are_rows_of_one_process(place, tmp_path):
    inference = {"scheduler": {"type": "rule_based", "min_delta": 0.1}}
    settings = {"depths": (1, 8), "modes": ("adaptive_token",), "inference": inference, "out": tmp_path / "rows.jsonl"}
    rows = study(place, list(TASKS), **settings)
    assert [(row.dataset, row.loop_mode, row.loop_count) for row in rows] == [
        (task, mode, loops) for task in TASKS for mode, loops in (("fixed", 1), ("fixed", 8), ("adaptive_token", 8))
    ]
    values = {(row.dataset, row.loop_mode, row.loop_count): row for row in rows}
    assert values["code", "fixed", 1].metric_value != values["code", "fixed", 8].metric_value
    assert {row.metric_direction for row in rows if row.dataset == "code"} == {"lower_is_better"}
    for task in TASKS:
        fixed, adaptive = values[task, "fixed", 8], values[task, "adaptive_token", 8]
        assert fixed.scheduler_diagnostics.average_loops_used == 8
        assert set(fixed.scheduler_diagnostics.halt_reasons) == {"max_loops"}
        assert 1 <= adaptive.scheduler_diagnostics.average_loops_used < 8
        assert "min_delta" in adaptive.scheduler_diagnostics.halt_reasons
        assert values[task, "fixed", 1].flops_mean < adaptive.flops_mean < fixed.flops_mean
        assert fixed.num_examples == 6 and fixed.task_version == "lm_eval 2.0"
    again = study(place, list(TASKS), **settings)
    assert again == rows and len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)


@needs_lm_eval
@pytest.mark.slow
def test_likelihoods_agree_with_a_plain_forward(place):
    from lm_eval.api.instance import Instance

    from cognexis.eval_harness.lm_eval_adapter import CognexisLM

    lm = CognexisLM(str(place / "model"), device="cpu", batch_size=2, num_loops=3)
    requests = [("1 + 1 =", " 2"), ("print(add(10, 20))", "\ndef")]
    instances = [Instance("loglikelihood", {}, request, 0) for request in requests]
    found = [value for value, _ in lm.loglikelihood(instances, disable_tqdm=True)]
    model = CognexisForCausalLM.from_pretrained(place / "model").eval()
    tokens = 0
    for (context, answer), value in zip(requests, found, strict=True):
        prompt, whole = lm.tok_encode(context), lm.tok_encode(context + answer)
        with torch.no_grad():
            logits = model(torch.tensor([whole[:-1]]), num_loops=3).logits[0].log_softmax(-1)
        scores = [logits[place, whole[place + 1]].item() for place in range(len(prompt) - 1, len(whole) - 1)]
        assert value == pytest.approx(sum(scores), rel=1e-4)
        tokens += len(whole) - 1
    assert lm.record.tokens == tokens and lm.record.loops == {3: tokens}
    lengths = [len(lm.tok_encode(context + answer)) - 1 for context, answer in requests]
    assert lm.record.flops == sum(matmul_flops(model.config, length, 3).total for length in lengths)


@needs_lm_eval
@pytest.mark.slow
def test_what_cannot_be_run_is_refused(place):
    with pytest.raises(InvalidConfigError, match="no likelihood"):
        study(place, ["sums"], modes=("adaptive_sequence",))
    with pytest.raises(InvalidConfigError, match="does not know sum"):
        study(place, ["sum"])
    with pytest.raises(InvalidConfigError, match="tasks: none given"):
        study(place, [])
    rows = study(place, ["answers"], modes=("adaptive_sequence",))
    assert [row.loop_mode for row in rows] == ["adaptive_sequence"]


@needs_lm_eval
@pytest.mark.slow
def test_the_command_of_lm_eval_runs_a_saved_folder(place, tmp_path):
    """Without this package on the path: what is saved is enough."""
    scores = {}
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path)}
    for loops in (1, 8):
        out = tmp_path / str(loops)
        words = ["--model_args", f"pretrained={place / 'model'},trust_remote_code=True,num_loops={loops}"]
        words += ["--include_path", str(place / "tasks"), "--tasks", ",".join(TASKS), "--device", "cpu"]
        words += ["--output_path", str(out), "--log_samples"]
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
        answers = next(out.rglob("samples_answers_*.jsonl")).read_text().splitlines()
        texts = [json.loads(line)["resps"] for line in answers]
        scores[loops] = (results["code"]["bits_per_byte,none"], texts)
    assert scores[1][0] != scores[8][0] and scores[1][1] != scores[8][1]
    rows = study(place, ["code"], depths=(1, 8))
    assert [row.metric_value for row in rows] == pytest.approx([scores[1][0], scores[8][0]], rel=1e-5)
