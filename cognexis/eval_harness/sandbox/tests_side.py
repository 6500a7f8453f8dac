"""Inside a second sandbox: the process of the tests.

The tests run here, the program elsewhere. A name that the tests use and do not define is fetched from the program:
plain values come as they are, functions, classes and other objects as ``Remote``, whose calls travel over the channel.
So the tests compare plain values of their own process, and a program can neither reach the comparison nor the
verdict. A ``Remote`` has no operators, is equal to nothing, and contains what it yields: an operator would let the
program answer a question in which the expected value stands.

Lists, dicts, sets, deques and bytearrays that the program changes in place are changed here too. Names of built-ins
and of the standard library are never fetched. A class of errors becomes a class of the same name.
"""

import builtins
import importlib
import symtable
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from cognexis.eval_harness.sandbox.wire import Channel, Disconnected, TooLarge, decode, encode


class UnsupportedTest(BaseException):
    """The tests ask for something that the two processes cannot do."""


class Lost(BaseException):
    """The program is gone, or what it sent cannot be read."""


class Remote:
    """An object of the program."""

    __slots__ = ("__client", "__number")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, client: "Client", number: int) -> None:
        self.__client, self.__number = client, number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{name} of an object of the program")
        return self.__client.ask(do="get", object=self.__number, name=name, is_builtin=False)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__client.ask(arguments, keywords, do="call", object=self.__number)

    def __eq__(self, other: object) -> bool:
        raise TypeError("an object of the program cannot be compared; compare plain values")

    def __ne__(self, other: object) -> bool:
        raise TypeError("an object of the program cannot be compared; compare plain values")

    def __len__(self) -> int:
        return int(self.__builtin("len"))

    def __bool__(self) -> bool:
        return bool(self.__builtin("bool"))

    def __getitem__(self, key: Any) -> Any:
        return self.__client.ask((key,), do="apply", object=self.__number, name="__getitem__", is_builtin=False)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__client.ask((key, value), do="apply", object=self.__number, name="__setitem__", is_builtin=False)

    def __iter__(self) -> Iterator[Any]:
        iterator = self.__builtin("iter")
        while True:
            reply = iterator.__client.request({"do": "next", "object": iterator.__number})
            if "end" in reply:
                return
            yield self.__client.unpack(reply["value"])

    def __next__(self) -> Any:
        reply = self.__client.request({"do": "next", "object": self.__number})
        if "end" in reply:
            raise StopIteration
        return self.__client.unpack(reply["value"])

    def __enter__(self) -> Any:
        return self.__client.ask((), do="apply", object=self.__number, name="__enter__", is_builtin=False)

    def __exit__(self, *_: Any) -> None:
        self.__client.ask((None, None, None), do="apply", object=self.__number, name="__exit__", is_builtin=False)

    def __str__(self) -> str:
        return str(self.__builtin("str"))

    def __repr__(self) -> str:
        return str(self.__builtin("repr"))

    def __builtin(self, name: str) -> Any:
        return self.__client.ask((), do="apply", object=self.__number, name=name, is_builtin=True)

    def _cognexis_number(self) -> int:
        return self.__number


class Client:
    """Asks the program."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.functions: list[Any] = []
        self.error_classes: dict[str, type[Exception]] = {}
        self.num_requests = 0

    def keep(self, value: Any) -> int:
        if isinstance(value, Remote):
            return Remote._cognexis_number(value)
        if not callable(value):
            raise UnsupportedTest(f"the tests pass a {type(value).__name__}; only plain values and functions travel")
        self.functions.append(value)
        return -len(self.functions)

    def find(self, number: int) -> Any:
        return Remote(self, number) if number >= 0 else self.functions[-number - 1]

    def pack(self, value: Any) -> Any:
        return encode(value, self.keep)

    def unpack(self, value: Any) -> Any:
        try:
            return decode(value, self.find)
        except Exception as error:
            raise Lost(f"the program sent a value that cannot be read: {type(error).__name__}") from None

    def exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """One message there, one back."""
        try:
            self.channel.send(message)
            reply = self.channel.receive()
        except (Disconnected, ValueError, RecursionError) as error:
            raise Lost(f"the program ended or broke the channel: {error}") from None
        if not isinstance(reply, dict):
            raise Lost("the program broke the channel: no object")
        return reply

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Ask, serve the calls back in between, and raise here what the program raised there."""
        self.num_requests += 1
        reply = self.exchange(message)
        while "call_back" in reply:
            reply = self.exchange({"returned": self.call_back(reply)})
        if "too_large" in reply:
            raise TooLarge("a result of the program")
        if "raised" in reply:
            raise self.error(reply)
        if not {"value", "end", "error_class"} & set(reply):
            raise Lost("the program broke the channel: no value")
        return reply

    def call_back(self, message: dict[str, Any]) -> Any:
        arguments, keywords = (self.unpack(part) for part in message["arguments"])
        return self.pack(self.find(int(message["call_back"]))(*arguments, **keywords))

    def error(self, reply: dict[str, Any]) -> Exception:
        """The error of the program as one of this process: built-in classes, or those that the tests fetched."""
        text = str(reply.get("text", ""))
        kind = self.error_classes.get(str(reply.get("name")))
        known = getattr(builtins, str(reply["raised"]), None)
        if kind is None and isinstance(known, type) and issubclass(known, Exception):
            kind = known
        try:
            error = kind(text) if kind is not None else RuntimeError(f"{reply.get('name')}: {text}")
        except TypeError:
            error = RuntimeError(f"{reply.get('name')}: {text}")
        error.of_the_program = True  # type: ignore[attr-defined]
        return error

    def ask(self, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None, **message: Any) -> Any:
        packed = {"arguments": self.pack(list(arguments)), "keywords": self.pack(keywords or {})}
        reply = self.request({**message, **packed})
        if arguments and "arguments" in reply:
            after = self.unpack(reply["arguments"])
            if isinstance(after, list) and len(after) == len(arguments):
                for old, new in zip(arguments, after, strict=True):
                    change_in_place(old, new)
        return self.unpack(reply["value"])

    def fetch(self, name: str) -> Any:
        reply = self.request({"do": "fetch", "name": name})
        if "error_class" in reply:
            self.error_classes[name] = type(name, (Exception,), {})
            return self.error_classes[name]
        return self.unpack(reply["value"])


def change_in_place(old: Any, new: Any) -> None:
    """Give a mutable value of the tests the content that the program left in its copy."""
    if type(old) is not type(new):
        return
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)
    elif isinstance(old, deque):
        old.clear()
        old.extend(new)


def free_names(source: str) -> list[str]:
    """The names that the tests use and neither define nor import, built-ins left out."""
    table = symtable.symtable(source, "tests.py", "exec")
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    used, waiting = set(), [table]
    while waiting:
        part = waiting.pop()
        waiting += part.get_children()
        for symbol in part.get_symbols():
            if symbol.is_global() or (part is table and symbol.is_referenced()):
                used.add(symbol.get_name())
                if symbol.is_declared_global() and symbol.is_assigned():
                    bound.add(symbol.get_name())
    return sorted(used - bound - set(dir(builtins)) - {"__name__", "__file__", "__doc__"})


def judge(order: dict[str, Any], channel: Channel) -> tuple[str, str]:
    """Run the tests; the outcome ("lost" where the end of the program decides) and a detail."""
    try:
        code = compile(order["tests"], "tests.py", "exec", dont_inherit=True)
        names = free_names(order["tests"])
    except (SyntaxError, ValueError) as error:
        raise UnsupportedTest(f"the tests are no Python: {error}") from None
    client = Client(channel)
    start = client.exchange({"source": order["source"]})
    if "compile_error" in start:
        return "compile_error", str(start["compile_error"])
    if "raised" in start:
        return error_outcome(client.error(start), start)
    module = type(sys)("tests")
    sys.modules["tests"] = module
    for name in names:
        if name in sys.stdlib_module_names:
            module.__dict__[name] = importlib.import_module(name)
            continue
        try:
            module.__dict__[name] = client.fetch(name)
        except NameError as error:
            return "runtime_error", str(error)
    try:
        exec(code, module.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            return "wrong_answer", f"the tests ended with status {end.code!r}"
    except Exception as error:
        return test_outcome(error)
    if not client.num_requests:
        raise UnsupportedTest("the tests never use the program")
    return "passed", ""


def error_outcome(error: Exception, start: dict[str, Any]) -> tuple[str, str]:
    """The outcome of a program that failed while it was loaded."""
    if isinstance(error, MemoryError):
        return "memory_limit", "the program ran out of memory while it was loaded"
    return "runtime_error", f"while loading: {start.get('name')}: {start.get('text')}"[:500]


def test_outcome(error: Exception) -> tuple[str, str]:
    """The outcome of tests that raised."""
    if isinstance(error, TooLarge):
        return "output_limit", str(error)
    if isinstance(error, MemoryError):
        return "memory_limit", "out of memory"
    line = error.__traceback__
    number = 0
    while line is not None:
        if line.tb_frame.f_code.co_filename == "tests.py":
            number = line.tb_lineno
        line = line.tb_next
    outcome = "runtime_error" if getattr(error, "of_the_program", False) else "wrong_answer"
    return outcome, f"line {number} of the tests: {type(error).__name__}: {error}"[:500]


def verdict_of(order: dict[str, Any], channel: Channel) -> dict[str, str]:
    """Judge a program: the outcome of ``judge``, or "unsupported" where the tests themselves are at fault."""
    try:
        outcome, detail = judge(order, channel)
    except Lost as error:
        outcome, detail = "lost", str(error)
    except UnsupportedTest as error:
        outcome, detail = "unsupported", str(error)
    except MemoryError:
        outcome, detail = "memory_limit", "out of memory"
    return {"outcome": outcome, "detail": detail}
