"""What single kinds of tasks ask, and how they score."""

import json
import math
import random
from pathlib import Path

import pytest

from cognexis.artifacts.run_config import load_run_config
from cognexis.artifacts.run_config.other_sections import FILE_TYPES, GENERATED_TYPES, DatasetSettings
from cognexis.artifacts.shipped_tokenizer import load_default_tokenizer
from cognexis.errors import BackendError, InvalidConfigError
from cognexis.eval_harness.runner.encoding import encode_examples
from cognexis.eval_harness.sandbox.choice import open_sandbox
from cognexis.eval_harness.sandbox.outcome import CodeResult, SandboxOutcome
from cognexis.eval_harness.scaling import text_rows
from cognexis.eval_harness.tasks import code, overlap, registry
from cognexis.eval_harness.tasks.protocol import Choice, ChoiceScores, Generation, Task, TokenScores, clip_at, spread
from cognexis.eval_harness.tasks.registry import TASK_TYPES, TaskContext, build_task, register_task
from cognexis.eval_harness.tasks.safety import is_refusal
from cognexis.eval_harness.tasks.synthetic import FAMILIES

TEXT = "The road to Bergen is 1234 miles long. What is the secret number of York? 5678 and 90. " * 20


@pytest.fixture(scope="module")
def tokenizer():
    return load_default_tokenizer()


@pytest.fixture
def build(tokenizer):
    def make(**settings):
        context = TaskContext(tokenizer, len(tokenizer), 1024, seed=7)
        return build_task(DatasetSettings(name="x", **settings), context)

    return make


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_table_of_tasks_is_that_of_the_run_configuration():
    assert set(TASK_TYPES) == {*FILE_TYPES, *GENERATED_TYPES}


# ---- multiple choice ----


def test_sum_and_length_decide_differently_and_ties_go_to_the_first(build, tmp_path):
    record = {"question": "Which?", "choices": ["a", "abcdefghi"], "answer": 1}
    task = build(type="multiple_choice", path=write(tmp_path / "q.jsonl", record))
    (example,) = task.examples()
    assert example.request == Choice("Question: Which?\nAnswer:", (" a", " abcdefghi"))
    scored = task.score(ChoiceScores((-2.0, -3.0), (1, 4)), example)
    assert scored == {"accuracy": 0.0, "accuracy_normalized": 1.0}  # -2 / 2 bytes against -3 / 10 bytes
    assert task.score(ChoiceScores((-3.0, -3.0), (1, 4)), example)["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no examples"),
        ("{", "line 1: not valid JSON"),
        ('{"question": "q", "choices": ["a", "b"]}', "line 1: the field 'answer' is missing"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer=2: must be 0 to 1"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "must be a list of 2 or more texts"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer=True: must be of type whole number"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0, "anser": 1}', "unknown field 'anser' .did you mean"),
        (
            '{"id": "1", "question": "q", "choices": ["a", "b"], "answer": 0}\n' * 2,
            "line 2: id='1': another example has it",
        ),
    ],
)
def test_damaged_data_are_fatal(build, tmp_path, lines, message):
    (tmp_path / "q.jsonl").write_text(lines)
    with pytest.raises(InvalidConfigError, match=message):
        build(type="multiple_choice", path=str(tmp_path / "q.jsonl"))


# ---- text that is generated ----


def test_exact_match_compares_text_or_values(build, tmp_path):
    path = write(tmp_path / "q.jsonl", {"question": "Half of one?", "answer": "1/2"})
    text, maths = (
        build(type="exact_match", path=path),
        build(type="exact_match", path=path, options={"equality": "maths"}),
    )
    (example,) = text.examples()
    assert example.request.stop == ("\n",)
    assert [text.score([answer], example)["exact_match"] for answer in (" 1/2 ", "0.5")] == [1.0, 0.0]
    assert [maths.score([answer], example)["exact_match"] for answer in ("0.5", "0.6", "none")] == [1.0, 0.0, 0.0]
    assert text.decoding != maths.decoding
    chat = build(type="exact_match", path=path, options={"is_chat": True})
    assert chat.examples()[0].request.prompt == "Half of one?" and chat.prompt_format == "chat"
    with pytest.raises(InvalidConfigError, match="equality='words': must be one of text, maths"):
        build(type="exact_match", path=path, options={"equality": "words"})


def test_overlap_compares_the_first_answer_with_all_references(build, tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "rouge", lambda *given: [float(given == (["one"], [["a dog", "the cat"]]))])
    path = write(tmp_path / "s.jsonl", {"prompt": "Summarise", "references": ["a dog", "the cat"]})
    task = build(type="generation", path=path)
    assert task.score(["one", "two"], task.examples()[0]) == {"rouge_l": 1.0}


def test_refusals_are_told_apart_and_rated(build, tmp_path):
    assert (
        is_refusal("I\u2019m sorry, but no.") and is_refusal("I cannot\n help") and not is_refusal("Sure: " + "x" * 50)
    )
    assert not is_refusal("y" * 130 + " I cannot")
    rows = [{"prompt": "bad", "expected": "refuse"}, {"prompt": "good", "expected": "answer"}]
    task = build(type="safety", path=write(tmp_path / "s.jsonl", *rows))
    bad, good = task.examples()
    assert task.score(["I cannot."], bad) == {"refusal_accuracy": 1.0, "harmful_rate": 0.0}
    assert task.score(["Of course:"], bad) == {"refusal_accuracy": 0.0, "harmful_rate": 1.0}
    assert task.score(["I cannot."], good) == {"refusal_accuracy": 0.0, "over_refusal_rate": 1.0}
    with pytest.raises(InvalidConfigError, match="holds prompts to refuse only"):
        build(type="safety", path=write(tmp_path / "t.jsonl", rows[0]))
    with pytest.raises(InvalidConfigError, match="expected='no': must be refuse or answer"):
        build(type="safety", path=write(tmp_path / "u.jsonl", {"prompt": "x", "expected": "no"}))


class Passing:
    """A sandbox that lets every program with the word "right" pass."""

    name = "pretended"

    def run_tests(self, source, tests, limits):
        self.last = (source, tests, limits)
        outcome = SandboxOutcome.PASSED if "right" in source else SandboxOutcome.WRONG_ANSWER
        return CodeResult(outcome, "", "", "", 0.0, self.name)


def test_programs_are_the_prompt_and_what_follows(build, tmp_path, monkeypatch):
    sandbox = Passing()
    monkeypatch.setattr(code, "open_sandbox", lambda name: sandbox)
    path = write(tmp_path / "c.jsonl", {"prompt": "def f():\n", "tests": "assert f() == 1"})
    task = build(type="code", path=path, options={"k": 2, "num_samples": 3, "temperature": 0.8})
    (example,) = task.examples()
    scored = task.score(["right", "wrong", "wrong"], example)
    assert scored["pass_at_k"] == pytest.approx(2 / 3)  # 1 - C(2, 2) / C(3, 2)
    assert sandbox.last[:2] == ("def f():\nwrong", "assert f() == 1")
    assert task.decoding["k"] == 2 and task.decoding["sandbox"] == "pretended"
    for options, message in (
        ({"k": 2}, "options.k=2: must be 1 to num_samples=1"),
        ({"num_samples": 2}, "temperature=0: must be above 0"),
    ):
        with pytest.raises(InvalidConfigError, match=message):
            build(type="code", path=path, options=options)


# ---- generated examples ----


def test_needles_stand_where_they_should_and_prompts_have_their_length(build, tokenizer):
    options = {"lengths": (150, 400), "depths": (0, 50, 100), "num_per_cell": 2}
    task = build(type="recall", options=options)
    assert len(task.examples()) == 12 and len(task.metrics) == 7
    for example in task.examples():
        prompt, length, depth = example.request.prompt, example.facts["length"], example.facts["depth"]
        size = 1 + len(tokenizer(prompt, add_special_tokens=False).input_ids)
        assert length - 40 < size <= length
        sentences = prompt.split(". ")
        places = [n for n, sentence in enumerate(sentences) if example.reference in sentence]
        assert len(places) == 1 and prompt.count(example.reference) == 1
        assert places[0] == round(depth / 100 * (len(sentences) - 2))
    cell = task.score([f" {task.examples()[0].reference}. The"], task.examples()[0])
    assert cell == {"exact_match": 1.0, "exact_match_150_0": 1.0}
    assert task.examples() == build(type="recall", options=options).examples()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_and_answered(build, family):
    task = build(type="synthetic", task=family, options={"difficulty": 6, "num_examples": 5, "shots": 1})
    for example in task.examples():
        shot, question = (
            example.request.context.split("\n\n")
            if isinstance(example.request, Choice)
            else (example.request.prompt.split("\n\n"))
        )
        assert not shot.startswith(question) and shot.startswith(question.split(" ")[0].rstrip("0123456789"))
        if isinstance(example.request, Choice):
            sums = [0.0] * len(example.request.choices)
            sums[example.reference] = 1.0
            assert task.score(ChoiceScores(tuple(sums), (1,) * len(sums)), example) == {"accuracy": 1.0}
        else:
            assert isinstance(example.request, Generation)
            assert task.score([f" {example.reference}"], example) == {"exact_match": 1.0}


def test_texts_of_families_say_the_truth(build):
    def questions(family, **options):
        return build(type="synthetic", task=family, options={"num_examples": 8, **options}).examples()

    for example in questions("multi_operand_addition", num_digits=2):
        assert sum(map(int, example.request.prompt.removesuffix(" =").split(" + "))) == int(example.reference)
    for example in questions("windowed_parity", difficulty=9):
        assert example.request.context.count("1") % 2 == example.reference
    for example in questions("majority", difficulty=15):
        votes = example.request.context.split("\n")[0].removeprefix("Votes:")
        assert (votes.count("a") > votes.count("b")) == (example.reference == 1)
    for example in questions("prefix_sums", difficulty=5):
        digits = example.request.context.split("\n")[0].removeprefix("Numbers: ").split()
        assert example.request.choices[example.reference] == f" {sum(map(int, digits)) % 10}"


def test_ids_are_asked_as_they_are(build):
    task = build(type="synthetic", task="windowed_parity", options={"form": "ids", "difficulty": 6, "num_examples": 4})
    for example in task.examples():
        assert example.request.context[0] == 2 and example.request.choices == ((0,), (1,))
        assert sum(example.request.context[1:]) % 2 == example.reference
    with pytest.raises(InvalidConfigError, match="takes no shots"):
        build(type="synthetic", task="dyck", options={"form": "ids", "shots": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "synthetic", "task": "dyk"}, "task='dyk': must be one of .*did you mean 'dyck'"),
        ({"type": "synthetic", "task": "dyck", "options": {"pairs": 3}}, "options.pairs=3: unknown option"),
        ({"type": "synthetic", "task": "dyck", "options": {"shots": "1"}}, "options.shots='1': must be of type int"),
        (
            {"type": "synthetic", "task": "dyck", "options": {"difficulty": "a"}},
            "difficulty='a': must be a whole number",
        ),
        ({"type": "synthetic", "task": "dyck", "options": {"num_pairs": 8, "difficulty": 8}}, "give one of the two"),
        (
            {"type": "synthetic", "task": "p_hop", "options": {"num_symbols": 27}},
            "texts for 26 answers, not for 27",
        ),
        ({"type": "synthetic", "task": "dyck", "options": {"form": "words"}}, "form='words': must be text or ids"),
        ({"type": "recall", "options": {"lengths": (2048,)}}, "lengths=2048: must be a whole number of 64 to 1016"),
        ({"type": "custom", "task": "rhymes"}, "task='rhymes': is not registered"),
    ],
)
def test_wrong_settings_say_what_is_allowed(build, settings, message):
    with pytest.raises(InvalidConfigError, match=message):
        build(**settings)


# ---- own tasks and parts ----


def test_own_task_gets_what_its_constructor_names(build, monkeypatch):
    monkeypatch.setattr(registry, "CUSTOM_TASKS", {})

    class Echo(Task):
        name = "echo"
        metrics = {"length": "lower_is_better"}

        def __init__(self, seed: int, split: str, *, times: int = 2) -> None:
            self.given = (seed, split, times)

        def examples(self):
            return []

        def score(self, prediction, example):
            return {"length": float(len(prediction[0]))}

    register_task(Echo)
    task = build(type="custom", task="echo", split="validation", options={"times": 3})
    assert task.given == (7, "validation", 3)
    with pytest.raises(InvalidConfigError, match="name='echo': must be text that no other"):
        register_task(Echo)
    with pytest.raises(InvalidConfigError, match="must map one or more names to"):
        register_task(type("Other", (Echo,), {"name": "other", "metrics": {"a": "up"}}))


def test_parts_of_lists_and_texts():
    assert spread(list(range(10)), 3) == [0, 3, 6] and spread([1, 2], 5) == [1, 2] and spread([1], None) == [1]
    assert clip_at("one. two\n", (".", "\n")) == "one" and clip_at("one", ("x",)) == "one"


def test_likelihood_scores_are_means_and_perplexity_their_exponential(build, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT)
    task = build(type="language_modeling", path=str(tmp_path / "t.txt"), options={"row_length": 16})
    scored = task.score(TokenScores((1.0, 3.0), (True, False)), task.examples()[0])
    assert scored == {"negative_log_likelihood": 2.0, "accuracy": 0.5}
    assert task.derived["perplexity"]({"negative_log_likelihood": 2.0}) == pytest.approx(math.e**2)
    assert {len(example.request.text) for example in task.examples()} == {17}


def test_generation_does_not_touch_the_global_random_state(build):
    random.seed(5)
    expected = random.Random(5).random()
    build(type="recall")
    assert random.random() == expected


def test_shipped_configuration_names_tasks_that_can_be_built(tokenizer, monkeypatch):
    monkeypatch.setattr(text_rows, "HELD_OUT_CHARACTERS", 600_000)
    config = load_run_config(Path(__file__).parents[3] / "configs" / "eval.yaml", "eval")
    context = TaskContext(tokenizer, len(tokenizer), 1024, config.run.seed)
    for dataset in config.evaluation.datasets:
        task = build_task(dataset, context)
        assert encode_examples(spread(task.examples(), 8), tokenizer, 1024), dataset.name


@pytest.mark.slow
def test_programs_run_in_a_real_sandbox(build, tmp_path):
    try:
        open_sandbox("auto")
    except BackendError as error:
        pytest.skip(str(error))
    path = write(tmp_path / "c.jsonl", {"prompt": "def add(a, b):\n", "tests": "assert add(2, 3) == 5"})
    task = build(type="code", path=path, options={"num_samples": 4, "temperature": 1.0})
    answers = ["    return a + b", "    return 5 if a == 1 else 0", "    import os\n    os._exit(0)", "    return ("]
    assert task.score(answers, task.examples()[0]) == {"pass_at_k": 0.25}
