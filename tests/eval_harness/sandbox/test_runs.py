"""Programs in a sandbox: verdicts on honest ones, and what hostile ones can reach."""

import os
import platform
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cognexis.errors import BackendError, InvalidConfigError, SafetyError
from cognexis.eval_harness.sandbox.bubblewrap_runs import BubblewrapSandbox
from cognexis.eval_harness.sandbox.choice import open_sandbox, sandboxes
from cognexis.eval_harness.sandbox.outcome import Limits, SandboxOutcome
from tests.eval_harness.sandbox.honest_programs import PROBLEMS
from tests.eval_harness.sandbox.hostile_programs import EXPECTED, PROGRAMS, SYSCALLS, TESTS, program

LIMITS = Limits(cpu_seconds=5, wall_seconds=60)
SHORT = Limits(cpu_seconds=1, wall_seconds=10, memory_bytes=256 * 2**20)
ADD = "def add(a, b):\n    return a + b\n"
QUICK = ("writes a host file", "fork by ctypes", "tcp", "memory bomb", "object that subtracts to nothing")
QUICK += ("leaves at once", "writes the verdict everywhere", "stdout flood", "system call: ptrace")


@pytest.fixture(scope="module", params=["bubblewrap", pytest.param("wasi", marks=pytest.mark.slow)])
def sandbox(request):
    found = sandboxes()[request.param]
    if (fault := found.fault()) is not None:
        pytest.skip(fault)
    return found


class Host:
    """What hostile programs aim at: a file, a port, an environment variable; and whether they got there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.canary = folder / "canary.txt"
        self.canary.write_text("unharmed")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0)
        self.port = self.listener.getsockname()[1]

    def check_unharmed(self) -> None:
        assert self.canary.read_text() == "unharmed"
        assert [path.name for path in self.folder.iterdir()] == ["canary.txt"]
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        assert not Path("/tmp/l").exists()


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("COGNEXIS_TEST_SECRET", "unseen")
    found = Host(tmp_path)
    yield found
    found.listener.close()


def children() -> set[str]:
    """Processes of ours that are still there."""
    mine, found = str(os.getpid()), set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = place.read_text().rsplit(") ", 1)
        except OSError:
            continue
        if fields.split()[1] == mine:
            found.add(name)
    return found


def check_hostile(sandbox, host, name):
    result = sandbox.run_tests(program(name, str(host.canary), str(host.folder), host.port), TESTS, SHORT)
    assert not result.passed, name
    assert "unharmed" not in result.detail + result.stdout and "unseen" not in result.detail + result.stdout
    if sandbox.name == "bubblewrap" and (name not in SYSCALLS or platform.machine() == "x86_64"):
        assert result.outcome == EXPECTED.get(name, result.outcome), f"{name}: {result}"


@pytest.mark.parametrize("name", QUICK)
def test_hostile_program_neither_passes_nor_gets_out(sandbox, host, name):
    check_hostile(sandbox, host, name)
    host.check_unharmed()


@pytest.mark.slow
def test_all_hostile_programs_neither_pass_nor_get_out(sandbox, host):
    assert len(PROGRAMS) >= 80
    before = children()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: check_hostile(sandbox, host, name), PROGRAMS))
    host.check_unharmed()
    assert children() == before
    assert sandbox.run_tests(ADD, TESTS, SHORT).passed


@pytest.mark.slow
def test_honest_programs_get_the_right_verdict_sixteen_at_once(sandbox):
    jobs = [(problem, seed, is_right) for problem in PROBLEMS for seed in range(10) for is_right in (True, False)]
    assert len(jobs) == 500

    def verdict(job):
        problem, seed, is_right = job
        return sandbox.run_tests(problem.program(is_right), problem.tests(seed), LIMITS)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(verdict, jobs))
    wrong = [(job[0].name, result) for job, result in zip(jobs, results, strict=True) if result.passed != job[2]]
    assert not wrong
    assert {result.outcome for result in results} == {SandboxOutcome.PASSED, SandboxOutcome.WRONG_ANSWER}


@pytest.mark.parametrize("problem", PROBLEMS[::6], ids=lambda problem: problem.name)
def test_honest_programs_get_the_right_verdict(sandbox, problem):
    assert sandbox.run_tests(problem.program(is_right=True), problem.tests(0), LIMITS).passed
    result = sandbox.run_tests(problem.program(is_right=False), problem.tests(0), LIMITS)
    assert result.outcome is SandboxOutcome.WRONG_ANSWER and "of the tests" in result.detail


@pytest.mark.parametrize(
    ("source", "outcome", "detail"),
    [
        (ADD, "passed", ""),
        ("def add(a, b) return a + b", "compile_error", "SyntaxError"),
        ("def add(a, b):\n    return a - b", "wrong_answer", "line 1 of the tests: AssertionError"),
        ("def add(a, b):\n    return a / 0", "runtime_error", "ZeroDivisionError"),
        ("def sub(a, b):\n    return a - b", "runtime_error", "name 'add' is not defined"),
        ("raise ValueError('broken')", "runtime_error", "while loading: ValueError: broken"),
        ("def add(a, b):\n    while True: pass", "timeout", ""),
        ("def add(a, b):\n    return [0] * 10**8", "memory_limit", "out of memory"),
        ("def add(a, b):\n    return print('x' * 10**7)", "output_limit", "bytes of output"),
        ("def add(a, b):\n    open('/etc/x', 'w')", "sandbox_violation", "opened a file outside for writing"),
    ],
)
def test_every_end_has_its_outcome(sandbox, source, outcome, detail):
    result = sandbox.run_tests(source, "assert add(1, 2) == 3", SHORT)
    assert result.outcome == outcome and detail in result.detail
    assert result.sandbox == sandbox.name


UNIVERSAL = """
class Universal:
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __mod__ = lambda self, other: 0
    __hash__ = __index__ = __int__ = lambda self: 5
    __float__ = lambda self: 5.0
    __abs__ = __neg__ = __round__ = lambda self, *digits: 0
def add(a, b): return Universal()
"""


@pytest.mark.parametrize(
    "question",
    [
        *("add(2, 3) == 5", "5 == add(2, 3)", "not add(2, 3) != 5", "add(2, 3) <= 5 <= add(2, 3)", "5 in add(2, 3)"),
        *("abs(add(2, 3) - 5) < 1e-9", "abs(5 - add(2, 3)) < 1e-9", "round(add(2, 3) - 5) == 0", "5 in [add(2, 3)]"),
        *("add(2, 3) in {5}", "[add(2, 3)] == [5]", "math.isclose(add(2, 3), 5)", "{add(2, 3): 1}.get(5) == 1"),
        *("add(2, 3) % 5 == 0", "sum([add(2, 3), -5]) == 0", "max(add(2, 3), 5) == 5", "int(add(2, 3)) == 5"),
    ],
)
def test_no_object_of_the_program_answers_for_a_value(sandbox, question):
    result = sandbox.run_tests(UNIVERSAL, f"assert {question}", LIMITS)
    assert not result.passed and "TypeError" in result.detail, result


OBJECTS = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self):
        if not self.items: raise Empty("nothing left")
        return self.items.pop()
    def __len__(self): return len(self.items)
class Empty(Exception): pass
def count():
    n = 0
    while True:
        yield n
        n += 1
def apply(function, items): return [function(item) for item in items]
def reorder(items): items.sort()
LIMIT = 3
"""
OBJECT_TESTS = """
import itertools
stack = Stack()
stack.push(4); stack.push((1, 2))
assert len(stack) == 2 and stack.pop() == (1, 2) and stack.items == [4]
stack.pop()
try:
    stack.pop()
    assert False, "an empty stack gives nothing"
except Empty as error:
    assert str(error) == "nothing left"
assert list(itertools.islice(count(), 3)) == [0, 1, 2] and 2 in count()
assert apply(lambda item: item + LIMIT, [1, 2]) == [4, 5]
numbers = [3, 1, 2]
assert reorder(numbers) is None and numbers == [1, 2, 3]
assert math.isclose(LIMIT, 3.0)
"""


def test_tests_use_objects_iterators_errors_and_functions(sandbox):
    result = sandbox.run_tests(OBJECTS, OBJECT_TESTS, LIMITS)
    assert result.passed, result


def test_values_keep_their_types(sandbox):
    values = [None, True, 1, -(2**200), 0.5, "é\ud800\x00", b"\x00\xff", 1 + 2j, (1, (2,)), {1: {"a"}}, frozenset([3])]
    source = "def same(x):\n    return x\ndef special():\n    return float('inf'), float('nan'), range(1, 9, 2)"
    tests = f"""
for value in {values!r}:
    found = same(value)
    assert found == value and type(found) is type(value), value
inf, nan, numbers = special()
assert inf == float("inf") and nan != nan and numbers == range(1, 9, 2)
"""
    result = sandbox.run_tests(source, tests, LIMITS)
    assert result.passed, result


def test_standard_library_of_the_tests_is_not_the_program_s(sandbox):
    source = "class math:\n    isclose = lambda a, b: True\ndef half(x):\n    return 0"
    assert sandbox.run_tests(source, "assert math.isclose(half(3), 1.5)", LIMITS).outcome == "wrong_answer"


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert add(1, 2 == 3", "no Python"),
        ("assert 1 + 1 == 2", "never use the program"),
        ("assert add(object(), 2) == 3", "pass a object; only plain values and functions"),
    ],
)
def test_faults_of_the_tests_are_errors(sandbox, tests, message):
    with pytest.raises(InvalidConfigError, match=message):
        sandbox.run_tests(ADD, tests, LIMITS)


def test_script_is_compared_with_what_it_should_print(sandbox):
    source = "a, b = map(int, input().split())\nprint(a + b, end=' \\n\\n')"
    assert sandbox.run_script(source, "1 2\n", "3\n", LIMITS).passed
    assert sandbox.run_script(source, "1 3\n", "3\n", LIMITS).outcome == "wrong_answer"
    assert sandbox.run_script("print('3')\nraise SystemExit(4)", "", "3", LIMITS).outcome == "runtime_error"
    assert sandbox.run_script("print(", "", "3", LIMITS).outcome == "compile_error"
    assert sandbox.run_script("x = [0] * 3 * 10**8", "", "3", LIMITS).outcome == "memory_limit"
    result = sandbox.run_script("if __name__ == '__main__':\n    print('x')", "", None, LIMITS)
    assert result.passed and result.stdout == "x\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpu_seconds": 0}, "cpu_seconds=0"),
        ({"wall_seconds": float("nan")}, "wall_seconds=nan"),
        ({"memory_bytes": 10}, "memory_bytes=10"),
        ({"output_bytes": True}, "output_bytes=True"),
    ],
)
def test_limits_without_sense_are_refused(settings, message):
    with pytest.raises(InvalidConfigError, match=message):
        Limits(**settings)


# ---- the choice ----


def test_without_bubblewrap_it_says_what_to_install(monkeypatch, tmp_path):
    fault = BubblewrapSandbox(str(tmp_path / "bwrap")).fault()
    assert "is not installed" in fault and "apt-get install bubblewrap" in fault


def test_bubblewrap_that_fails_is_refused_with_its_words(tmp_path):
    executable = tmp_path / "bwrap"
    executable.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    executable.chmod(0o755)
    fault = BubblewrapSandbox(str(executable)).fault()
    assert "No permissions to create new namespace" in fault and "user.max_user_namespaces" in fault


class Broken:
    name = "broken"

    def fault(self):
        return "it is not there"


def test_nothing_runs_where_no_sandbox_works(monkeypatch):
    monkeypatch.setattr("cognexis.eval_harness.sandbox.choice.sandboxes", lambda: {"broken": Broken()})
    for name in ("auto", "broken"):
        with pytest.raises(BackendError, match="broken: it is not there"):
            open_sandbox(name)
    with pytest.raises(InvalidConfigError, match="must be one of auto, broken, disabled"):
        open_sandbox("docker")


def test_the_first_that_works_is_chosen(monkeypatch):
    class Working(Broken):
        name = "working"

        def fault(self):
            return None

    monkeypatch.setattr(
        "cognexis.eval_harness.sandbox.choice.sandboxes", lambda: {"broken": Broken(), "working": Working()}
    )
    assert open_sandbox().name == "working"


def test_disabled_is_a_policy():
    with pytest.raises(SafetyError, match="not run"):
        open_sandbox("disabled")
