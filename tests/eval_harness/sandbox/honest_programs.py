"""Ordinary solutions of small problems, and for each a wrong one: what a sandbox must tell apart.

The tests compare with what the right solution returns in this process, so the verdict of a sandbox is checked against
running the same code without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A function with a gap, which is filled rightly or wrongly, and a maker of arguments."""

    name: str
    text: str
    right_piece: str
    wrong_piece: str
    arguments: Callable[[Random], tuple[Any, ...]]

    def program(self, is_right: bool) -> str:
        """The whole text."""
        return self.text.replace("@", self.right_piece if is_right else self.wrong_piece)

    def tests(self, seed: int, num_calls: int = 5) -> str:
        """Assertions in the style of the common benchmarks; the seed decides the arguments."""
        random = Random(f"{self.name} {seed}")
        namespace: dict[str, Any] = {"__name__": "reference"}
        exec(self.program(is_right=True), namespace)
        lines = ["from collections import Counter, deque", "from fractions import Fraction", "def check(candidate):"]
        for _ in range(num_calls):
            arguments = self.arguments(random)
            call = f"candidate(*{arguments!r})"  # before the reference may change its arguments
            result = namespace[self.name](*arguments)
            lines.append(f"    assert {call} == {result!r}")
        return "\n".join([*lines, f"check({self.name})", ""])


def ints(r: Random) -> list[int]:
    return [r.randint(-50, 50) for _ in range(r.randint(1, 9))]


def word(r: Random) -> str:
    return "".join(r.choice("abcAB zé") for _ in range(r.randint(4, 12)))


PROBLEMS = [
    Problem("add", "def add(a, b):\n    return a @ b", "+", "-", lambda r: (r.randint(1, 9), r.randint(1, 9))),
    Problem(
        "factorial",
        "def factorial(n):\n    return 1 if n < @ else n * factorial(n - 1)",
        "2",
        "3",
        lambda r: (r.randint(20, 90),),
    ),
    Problem(
        "fibonacci",
        "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a @",
        "",
        "+ 1",
        lambda r: (r.randint(5, 80),),
    ),
    Problem(
        "is_prime",
        "def is_prime(n):\n    return @ all(n % d for d in range(2, int(n**0.5) + 1))",
        "",
        "not",
        lambda r: (r.randint(2, 400),),
    ),
    Problem("reverse", "def reverse(s):\n    return s[@]", "::-1", "1:", lambda r: (word(r),)),
    Problem(
        "count_words",
        "from collections import Counter\ndef count_words(s):\n    return Counter(s@.split())",
        "",
        ".upper()",
        lambda r: (" ".join(r.choice(["to", "be", "or"]) for _ in range(8)),),
    ),
    Problem("unique", "def unique(xs):\n    return set(xs) @", "", "| {99}", lambda r: (ints(r),)),
    Problem(
        "pairs", "def pairs(xs):\n    return list(zip(xs, xs[@:]))", "1", "0", lambda r: ([*range(r.randint(2, 9))],)
    ),
    Problem("mean", "def mean(xs):\n    return sum(xs) / len(xs) @", "", "+ 1", lambda r: (ints(r),)),
    Problem("to_bytes", "def to_bytes(s):\n    return s.encode() @", "", "+ b'x'", lambda r: (word(r),)),
    Problem(
        "flatten",
        "def flatten(xs):\n    return [y for x in xs for y in x[@:]]",
        "0",
        "1",
        lambda r: ([ints(r) for _ in range(3)],),
    ),
    Problem(
        "invert",
        "def invert(d):\n    return {@ for k, v in d.items()}",
        "v: k",
        "k: v",
        lambda r: ({i: f"x{i}" for i in range(r.randint(1, 5))},),
    ),
    Problem(
        "part",
        "from fractions import Fraction\ndef part(a, b):\n    return Fraction(a, b) @",
        "",
        "+ 1",
        lambda r: (r.randint(1, 99), r.randint(1, 99)),
    ),
    Problem(
        "root",
        "import cmath\ndef root(a, b, c):\n    return (-b + cmath.sqrt(b * b - 4 * a * c)) / (2 * a) @",
        "",
        "- 1",
        lambda r: (r.randint(1, 5), r.randint(-5, 5), r.randint(-5, 5)),
    ),
    Problem(
        "balanced",
        "def balanced(s):\n    while '()' in s:\n        s = s.replace('()', '')\n    return s @ ''",
        "==",
        "!=",
        lambda r: ("(" * r.randint(1, 3) + ")" * r.randint(1, 3),),
    ),
    Problem(
        "orders",
        "import itertools\ndef orders(xs):\n    return [list(p)@ for p in itertools.permutations(xs)]",
        "",
        "[1:]",
        lambda r: (r.sample(range(9), 3),),
    ),
    Problem(
        "words_of",
        "import re\ndef words_of(s):\n    return re.findall('[a-z]+', s) @",
        "",
        "+ ['']",
        lambda r: (word(r),),
    ),
    Problem(
        "running_max",
        "from itertools import accumulate\ndef running_max(xs):\n    return @(accumulate(xs, max))",
        "tuple",
        "list",
        lambda r: (ints(r),),
    ),
    Problem("binary", "def binary(n):\n    return bin(n)[@:]", "2", "3", lambda r: (r.randint(1, 10**30),)),
    Problem(
        "dot",
        "def dot(a, b):\n    return sum(x * y for x, y in zip(a, b)) @",
        "",
        "* 2",
        lambda r: ([1.5, 2.0, float(r.randint(1, 9))], [3.0, 4.25, 5.0]),
    ),
    Problem(
        "median",
        "import statistics\ndef median(xs):\n    return statistics.median@(xs)",
        "",
        "_high",
        lambda r: ([1, 2, r.randint(5, 9), 10],),
    ),
    Problem(
        "gcd",
        "import math\ndef gcd(a, b):\n    return math.@(a, b)",
        "gcd",
        "lcm",
        lambda r: (r.randint(1, 99), r.randint(100, 999)),
    ),
    Problem(
        "sort_in_place", "def sort_in_place(xs):\n    xs.sort()\n    return xs@", "", "[1:]", lambda r: (ints(r),)
    ),
    Problem("nothing", "def nothing(x):\n    @", "return None", "return x", lambda r: (word(r),)),
    Problem(
        "window",
        "from collections import deque\ndef window(xs):\n    return deque(xs, maxlen=@)",
        "3",
        "2",
        lambda r: ([*range(r.randint(4, 9))],),
    ),
]
