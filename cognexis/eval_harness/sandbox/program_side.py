"""Inside the sandbox: the process of the program that is tested.

Reads the program from the channel, runs it as a module, and then carries out what the tests ask for: fetch a name,
call, use an attribute, advance an iterator. Nothing here is trusted; the program can change all of it. What it cannot
do is to decide, since the tests run elsewhere. As a script it takes no tests: the program runs as ``__main__``.

An audit hook tells of writing, networking and starting processes as soon as they are tried. It is a witness and no
wall: the sandbox around refuses them anyway.
"""

import builtins
import os
import sys
from typing import Any

from cognexis.eval_harness.sandbox.wire import Channel, Disconnected, TooLarge, decode, encode

VIOLATION_EXIT = 97
_STARTS = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.system")
_FORBIDDEN = {
    **dict.fromkeys((*_STARTS, "subprocess.Popen", "pty.spawn"), "started a process"),
    **dict.fromkeys(
        ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname"), "used the network"
    ),
    **dict.fromkeys(("socket.sendto", "socket.sendmsg", "socket.gethostbyaddr"), "used the network"),
    **dict.fromkeys(("os.kill", "os.killpg", "signal.pthread_kill"), "sent a signal"),
    **dict.fromkeys(("os.link", "os.symlink", "os.rename", "os.remove", "os.rmdir", "os.mkdir"), "changed files"),
    **dict.fromkeys(("os.truncate", "os.chmod", "os.chown", "shutil.rmtree"), "changed files"),
}
_FILE_EVENTS = ("changed files",)


def watch(scratch: str | None) -> None:
    """End the process with ``VIOLATION_EXIT`` when the program tries what it must not."""
    access_bits = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
    change_bits = os.O_CREAT | os.O_TRUNC | os.O_APPEND
    writing = (os.O_WRONLY, os.O_RDWR)
    write, leave, realpath = os.write, os._exit, os.path.realpath

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True
        place = realpath(os.fsdecode(path))
        return place == "/dev/null" or (scratch is not None and (place + "/").startswith(scratch + "/"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        what = _FORBIDDEN.get(event)
        if event == "open":
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            if (flags & change_bits or flags & access_bits in writing) and not is_inside(arguments[0]):
                what = "opened a file outside for writing"
        elif what in _FILE_EVENTS and is_inside(arguments[0]):
            what = None
        if what is not None:
            write(2, f"\nsandbox: the program {what} ({event})\n".encode())
            leave(VIOLATION_EXIT)

    sys.addaudithook(hook)


class Objects:
    """What is not plain, by number, on this side and on the other."""

    def __init__(self, server: "Server") -> None:
        self.kept: list[Any] = []
        self.server = server

    def keep(self, value: Any) -> int:
        self.kept.append(value)
        return len(self.kept) - 1

    def find(self, number: int) -> Any:
        """Own objects have numbers from 0; functions of the tests have negative ones."""
        if number >= 0:
            return self.kept[number]
        return lambda *arguments, **keywords: self.server.call_back(number, arguments, keywords)


class Server:
    """Answers the tests until they are done."""

    def __init__(self, channel: Channel, namespace: dict[str, Any]) -> None:
        self.channel, self.namespace = channel, namespace
        self.objects = Objects(self)

    def call_back(self, number: int, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Let the tests call a function of theirs that they passed in."""
        packed = [self.pack(list(arguments)), self.pack(keywords)]
        self.channel.send({"call_back": number, "arguments": packed})
        while "returned" not in (message := self.channel.receive()):
            self.answer(message)
        return decode(message["returned"], self.objects.find)

    def pack(self, value: Any) -> Any:
        return encode(value, self.objects.keep)

    def describe(self, error: BaseException) -> dict[str, Any]:
        """The nearest built-in class, and the own name, of what the program raised."""
        known = [base.__name__ for base in type(error).__mro__ if getattr(builtins, base.__name__, None) is base]
        text = str(error)[:500] if isinstance(error, Exception) else ""
        return {"raised": known[0], "name": type(error).__name__, "text": text}

    def answer(self, message: dict[str, Any]) -> None:
        try:
            result = self.perform(message)
        except (Disconnected, TooLarge):
            raise
        except BaseException as error:
            result = self.describe(error)
        try:
            self.channel.send(result)
        except MemoryError as error:
            self.channel.send(self.describe(error))

    def perform(self, message: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request: fetch, call, or iterate."""
        action = message["do"]
        if action == "fetch":
            name = message["name"]
            if name not in self.namespace:
                return {"raised": "NameError", "name": "NameError", "text": f"name {name!r} is not defined"}
            value = self.namespace[name]
            if isinstance(value, type) and issubclass(value, Exception):
                return {"error_class": value.__name__}
            return {"value": self.pack(value)}
        target = self.objects.find(message["object"])
        if action == "next":
            for value in target:
                return {"value": self.pack(value)}
            return {"end": True}
        arguments = decode(message["arguments"], self.objects.find)
        keywords = decode(message["keywords"], self.objects.find)
        if action == "call":
            value = target(*arguments, **keywords)
        else:
            value = getattr(builtins if message["is_builtin"] else target, message["name"])
            if action == "apply":
                value = value(*([target] if message["is_builtin"] else []), *arguments, **keywords)
        return {"value": self.pack(value), "arguments": self.pack(arguments)}


def load(source: str, name: str, channel: Channel) -> dict[str, Any] | None:
    """Compile the program and run it as the module ``name``; its namespace, or None where it cannot be compiled."""
    try:
        code = compile(source, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        channel.send({"compile_error": f"{type(error).__name__}: {error}"[:500]})
        return None
    module = type(sys)(name)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module.__dict__


def serve(channel: Channel) -> None:
    """Run the program that the tests send, then answer them until they are done."""
    source = channel.receive()["source"]
    server = Server(channel, {})
    try:
        namespace = load(source, "program", channel)
    except BaseException as error:
        channel.send(server.describe(error))
        return
    if namespace is None:
        return
    server.namespace = namespace
    channel.send({"ready": True})
    try:
        while True:
            server.answer(channel.receive())
    except Disconnected:
        return
    except TooLarge as error:
        channel.send({"too_large": str(error)})


def run_script(source: str, channel: Channel) -> int:
    """Run the program as ``__main__`` with its own stdin and stdout; the exit status of the process."""
    try:
        return 1 if load(source, "__main__", channel) is None else 0
    except MemoryError:
        channel.send({"raised": "MemoryError"})
        raise
