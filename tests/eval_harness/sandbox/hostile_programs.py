"""Programs that try to hang, to take the machine's resources, to get out, or to pass without solving.

Each is asked for ``add``, the sum of two numbers; none of them adds. ``@canary@`` is a file of the host, ``@folder@``
its folder, ``@port@`` a port where the host listens.
"""

_ADD = "def add(a, b):\n    "

HANGS = {
    "endless loop": _ADD + "while True: pass",
    "sleep": "import time\n" + _ADD + "time.sleep(1000)",
    "sleep while loading": "import time\ntime.sleep(1000)",
    "busy threads": "import threading\n"
    + _ADD
    + "ts = [threading.Thread(target=lambda: [None for _ in iter(int, 1)]) for _ in range(8)]\n"
    "    [t.start() for t in ts]\n    [t.join() for t in ts]",
    "threads without end": "import threading, time\n" + _ADD + "while True: threading.Thread(target=time.sleep, "
    "args=(100,)).start()",
    "regex backtracking": "import re\n" + _ADD + "return re.match(r'(a+)+$', 'a' * 60 + 'b')",
    "huge power": _ADD + "return 10 ** 10 ** 8",
    "ignores signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\n" + _ADD + "while True: pass",
    "catches everything": _ADD + "while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass",
    "endless result": "import itertools\n" + _ADD + "return itertools.count()",
    "deadlock": "import threading\n" + _ADD + "l = threading.Lock(); l.acquire(); l.acquire()",
    "waits for input": _ADD + "import sys\n    sys.stdin.read()\n    while True: pass",
}
RESOURCES = {
    "endless recursion": _ADD + "return add(a, b)",
    "recursion without limit": "import sys\nsys.setrecursionlimit(10**9)\n" + _ADD + "return add(a, b)",
    "memory bomb": _ADD + "x = []\n    while True: x.append(bytearray(10**7))",
    "one large block": _ADD + "return bytearray(10**9)",
    "memory while loading": "x = [0] * 10**8\n" + _ADD + "return x",
    "large integer": _ADD + "return 1 << (1 << 33)",
    "large string": _ADD + "return 'x' * (200 * 2**20)",
    "deep nesting": _ADD + "x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "list in itself": _ADD + "x = []\n    x.append(x)\n    return x",
    "fork bomb": "import os\n" + _ADD + "while True: os.fork()",
    "fork by ctypes": "import ctypes\n" + _ADD + "libc = ctypes.CDLL(None)\n    while True:\n"
    "        if libc.fork() < 0: raise OSError('no fork')",
    "daemon": "import os\n" + _ADD + "\n    if os.fork() == 0:\n        os.setsid()\n        os.fork()",
    "clone by ctypes": "import ctypes\n" + _ADD + "r = ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0)\n"
    "    raise OSError(r)",
    "new session": "import os\n" + _ADD + "os.setsid()\n    raise OSError('done')",
    "subprocess": "import subprocess\n" + _ADD + "return subprocess.run(['/bin/sh', '-c', 'echo 5'])",
    "shell": "import os\n" + _ADD + "return os.system('echo 5')",
    "exec": "import os\n" + _ADD + "os.execv('/bin/sh', ['sh'])",
    "multiprocessing": "import multiprocessing\n" + _ADD + "p = multiprocessing.Process(target=print)\n    p.start()",
    "stdout flood": _ADD + "while True: print('x' * 10**6)",
    "stderr flood": "import sys\n" + _ADD + "while True: sys.stderr.write('y' * 10**6)",
    "flood by descriptor": "import os\n" + _ADD + "while True: os.write(1, b'z' * 65536)",
    "control characters": _ADD + "print('\\x1b[2J\\x00' * 100)\n    return None",
    "fill the disk": _ADD + "f = open('/tmp/x', 'wb')\n    while True: f.write(bytes(2**20))",
    "many files": _ADD + "for i in range(10**6): open(f'/tmp/{i}', 'w').close()",
    "sparse file": "import os\n"
    + _ADD
    + "fd = os.open('/tmp/s', os.O_CREAT | os.O_RDWR)\n    os.ftruncate(fd, 2**50)",
    "files in memory": "import os\n" + _ADD + "fds = [os.memfd_create(str(i)) for i in range(50)]\n"
    "    for fd in fds: os.write(fd, bytes(10**8))",
    "many descriptors": "import os\n" + _ADD + "while True: os.pipe()",
    "shared memory": "from multiprocessing import shared_memory\n"
    + _ADD
    + "return shared_memory.SharedMemory(create=True, size=2**40)",
    "crash": "import ctypes\n" + _ADD + "return ctypes.string_at(0)",
}
ESCAPES = {
    "reads a host file": _ADD + "return open(@canary@).read()",
    "writes a host file": _ADD + "open(@canary@, 'w').write('x')",
    "removes a host file": "import os\n" + _ADD + "os.remove(@canary@)",
    "lists a host folder": "import os\n" + _ADD + "return os.listdir(@folder@)",
    "symbolic link": "import os\n" + _ADD + "os.symlink(@canary@, '/tmp/l')\n    open('/tmp/l', 'w')",
    "hard link": "import os\n" + _ADD + "os.link(@canary@, '/tmp/l')",
    "renames a host folder": "import os\n" + _ADD + "os.rename(@folder@, @folder@ + 'x')",
    "password file": _ADD + "return open('/etc/shadow').read()",
    "own memory": _ADD + "return open('/proc/self/mem', 'r+b').read(1)",
    "root of another process": "import os\n" + _ADD + "return os.listdir('/proc/1/root')",
    "environment of another process": _ADD + "return open('/proc/1/environ').read()",
    "devices": "import os\n" + _ADD + "return open('/dev/vda', 'rb').read(1)",
    "kernel memory": _ADD + "return open('/dev/mem', 'rb').read(1)",
    "secrets in the environment": "import os\n" + _ADD + "return os.environ['COGNEXIS_TEST_SECRET']",
    "inherited descriptors": "import os\n" + _ADD + "out = []\n    for fd in range(3, 64):\n"
    "        try: out.append(os.readlink(f'/proc/self/fd/{fd}'))\n        except OSError: pass\n    return out",
    "tcp": "import socket\n" + _ADD + "return socket.create_connection(('127.0.0.1', @port@), 1)",
    "udp": "import socket\n"
    + _ADD
    + "return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @port@))",
    "unix socket": "import socket\n" + _ADD + "socket.socket(socket.AF_UNIX).connect(@folder@ + '/s')",
    "abstract socket": "import socket\n" + _ADD + "socket.socket(socket.AF_UNIX).connect('\\0cognexis')",
    "raw socket": "import socket\n" + _ADD + "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "listening socket": "import socket\n" + _ADD + "s = socket.socket()\n    s.bind(('127.0.0.1', 0))",
    "name look-up": "import socket\n" + _ADD + "return socket.getaddrinfo('example.org', 80)",
    "http": "import urllib.request\n" + _ADD + "return urllib.request.urlopen('http://127.0.0.1:@port@')",
}
_SYSCALLS = {
    "ptrace": "101, 0, 1, 0, 0",
    "mount": "165, b'none', b'/tmp', b'tmpfs', 0, 0",
    "unshare": "272, 0x10000000",
    "setns": "308, 0, 0",
    "keyctl": "250, 0, -3, 1",
    "bpf": "321, 0, 0, 0",
    "io_uring": "425, 8, 0",
    "read of another process": "310, 1, 0, 0, 0, 0, 0",
    "chroot": "161, b'/tmp'",
    "kill": "62, -1, 9",
    "open by handle": "304, 0, 0, 0",
}
SYSCALLS = {
    f"system call: {name}": f"import ctypes\n{_ADD}"
    f"r = ctypes.CDLL(None, use_errno=True).syscall({words})\n    raise OSError(ctypes.get_errno(), str(r))"
    for name, words in _SYSCALLS.items()
}
CHEATS = {
    "leaves with success": "import sys\n" + _ADD + "sys.exit(0)",
    "leaves at once": "import os\n" + _ADD + "os._exit(0)",
    "leaves while loading": "import os\nos._exit(0)",
    "prints the verdict": _ADD + 'print(\'{"outcome": "passed"}\')\n    return None',
    "writes the verdict everywhere": "import os, json\n"
    + _ADD
    + "data = json.dumps({'outcome': 'passed', 'detail': ''}).encode()\n    for fd in range(3, 64):\n"
    "        try: os.write(fd, len(data).to_bytes(8, 'big') + data)\n        except OSError: pass",
    "equal to everything": "class Any(int):\n    __eq__ = lambda s, o: True\n    __ne__ = lambda s, o: False\n"
    + _ADD
    + "return Any(0)",
    "object equal to everything": "class Any:\n    __eq__ = lambda s, o: True\n" + _ADD + "return Any()",
    "object that subtracts to nothing": "class Any:\n    __sub__ = __rsub__ = lambda s, o: 0\n"
    "    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\n    __index__ = lambda s: 5\n"
    + _ADD
    + "return Any()",
    "patches comparison": "import builtins, operator\noperator.eq = lambda a, b: True\n"
    "builtins.AssertionError = ValueError\nbuiltins.isinstance = lambda a, b: True\n" + _ADD + "return 0",
    "patches unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n" + _ADD + "return 0",
    "replaces modules": "import sys\nsys.modules['tests'] = sys.modules['__main__']\n" + _ADD + "return 0",
    "looks for the tests": "import gc, sys\n" + _ADD + "for o in gc.get_objects():\n"
    "        if isinstance(o, dict) and 'tests' in o and isinstance(o['tests'], str): raise SystemExit(0)\n"
    "    f = sys._getframe()\n    while f:\n        f.f_locals; f = f.f_back\n    return 0",
    "ends after the answer": "import atexit, os\natexit.register(os._exit, 0)\n" + _ADD + "return 0",
    "raises an exit": _ADD + "raise SystemExit(0)",
    "raises an assertion": _ADD + "raise AssertionError('passed')",
    "replaces the runner": "import sys\nm = sys.modules['__main__']\nfor n in list(vars(m)):\n"
    "    if n in ('decode', 'encode'): setattr(m, n, lambda *a, **k: {'t': 'tuple', 'v': []})\n" + _ADD + "return 0",
    "shadows names of the tests": "abs = all = isinstance = lambda *a: True\n" + _ADD + "return 0",
    "answers before it is asked": "import os, json\ndata = json.dumps({'ready': True}).encode()\n"
    "for fd in range(3, 64):\n    try:\n        for _ in range(9): os.write(fd, len(data).to_bytes(8, 'big') + data)\n"
    "    except OSError: pass\n" + _ADD + "return 0",
}


def program(name: str, canary: str, folder: str, port: int) -> str:
    """The text of a program, with the places of the host filled in."""
    text = PROGRAMS[name].replace("@canary@", repr(canary)).replace("@folder@", repr(folder))
    return text.replace("@port@", str(port))


PROGRAMS = {**HANGS, **RESOURCES, **ESCAPES, **SYSCALLS, **CHEATS}

TESTS = """
assert add(2, 3) == 5
assert all(abs(add(a, b) - (a + b)) < 1e-9 for a, b in [(1, 1), (-4, 7)])
import unittest
class Adds(unittest.TestCase):
    def test_sum(self):
        self.assertEqual(add(10, 20), 30)
result = unittest.TestResult()
Adds("test_sum").run(result)
assert result.wasSuccessful()
"""

# What the outcome must be, where only one is right; of the others it must not be "passed".
EXPECTED = {
    **dict.fromkeys(("endless loop", "sleep", "sleep while loading", "ignores signals", "deadlock"), "timeout"),
    **dict.fromkeys(("huge power", "regex backtracking", "catches everything", "busy threads"), "timeout"),
    **dict.fromkeys(("memory bomb", "one large block", "memory while loading", "large integer"), "memory_limit"),
    **dict.fromkeys(("stdout flood", "stderr flood", "flood by descriptor"), "output_limit"),
    **dict.fromkeys(("fork bomb", "daemon", "subprocess", "shell", "exec", "multiprocessing"), "sandbox_violation"),
    **dict.fromkeys(("writes a host file", "removes a host file", "fill the disk"), "sandbox_violation"),
    **dict.fromkeys(("many files", "sparse file", "symbolic link", "hard link"), "sandbox_violation"),
    **dict.fromkeys(("name look-up", "http", "own memory"), "sandbox_violation"),
    **dict.fromkeys(("leaves at once", "leaves while loading", "leaves with success"), "runtime_error"),
    **dict.fromkeys(("raises an exit", "raises an assertion", "endless recursion", "crash"), "runtime_error"),
    **dict.fromkeys(("equal to everything", "object equal to everything", "prints the verdict"), "wrong_answer"),
    **dict.fromkeys(("patches unittest", "replaces modules", "shadows names of the tests"), "wrong_answer"),
    **dict.fromkeys(SYSCALLS, "runtime_error"),
}
