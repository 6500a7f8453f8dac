"""Programs in bubblewrap: own namespaces, no network, a read-only Python and nothing else of the host.

The sandbox sees an empty, read-only root with the interpreter under /python, the system's shared libraries, /dev/null
and its own runner; no /proc, no /sys, no home, no environment. A filter of system calls forbids further processes.
Limits of time, memory and files are set by the runner before the program starts. Everything dies with the host's
process. Only the standard library of Python can be imported.
"""

import functools
import importlib.util
import marshal
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from cognexis.errors import BackendError
from cognexis.eval_harness.sandbox.runner_text import joined_source
from cognexis.eval_harness.sandbox.seccomp import syscall_filter

INSTALL_HINT = (
    "install bubblewrap (Debian and Ubuntu: apt-get install bubblewrap) and allow user namespaces "
    "(sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns)"
)
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


@functools.cache
def runner() -> bytes:
    """The code of every process in a sandbox, compiled for this interpreter: channel, both sides, and the entry."""
    start = "\nsys.exit(begin(*sys.argv[1:]))\n"
    code = compile(joined_source("process_entry") + start, "sandbox", "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)


def _data_fd(data: bytes) -> int:
    fd = os.memfd_create("cognexis", 0)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _options(scratch_bytes: int, source_fd: int, filter_fd: int) -> list[str]:
    base, version = Path(sys.base_prefix), f"python{sys.version_info[0]}.{sys.version_info[1]}"
    binary = Path(sysconfig.get_config_var("BINDIR") or base / "bin") / version
    options = ["--unshare-user", "--unshare-all", "--disable-userns", "--die-with-parent", "--new-session"]
    options += ["--clearenv", "--hostname", "sandbox", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    for folder in _LIBRARIES:
        options += ["--ro-bind-try", folder, folder]
    options += ["--ro-bind", str(binary.resolve()), f"/python/bin/{version}"]
    options += ["--ro-bind", str(base / "lib"), "/python/lib"]
    options += ["--setenv", "LD_LIBRARY_PATH", "/python/lib", "--setenv", "MALLOC_ARENA_MAX", "1"]
    options += ["--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    options += [
        "--dir",
        "/dev",
        "--dev-bind",
        "/dev/null",
        "/dev/null",
        "--ro-bind-data",
        str(source_fd),
        "/runner.pyc",
    ]
    options += ["--size", str(scratch_bytes), "--tmpfs", "/tmp"] if scratch_bytes else ["--dir", "/tmp"]
    return [*options, "--chdir", "/tmp", "--remount-ro", "/", "--seccomp", str(filter_fd)]


class Bubblewrap:
    """Starts runners in bubblewrap."""

    name = "bubblewrap"

    def __init__(self, executable: str | None = None) -> None:
        self.executable = executable or shutil.which("bwrap") or "bwrap"

    def start(
        self,
        arguments: Sequence[str],
        *,
        pass_fds: Sequence[int],
        scratch_bytes: int = 0,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start one process.

        Args:
            arguments: words for ``cognexis.eval_harness.sandbox.process_entry.begin``.
            pass_fds: file descriptors that the runner gets, under the same numbers.
            scratch_bytes: size of a writable /tmp; 0: none.
            stdin: as for ``subprocess.Popen``; so are the other two.
        """
        fds: list[int] = []
        try:
            for data in (runner(), syscall_filter()):
                fds.append(_data_fd(data))
            options = _options(scratch_bytes, fds[0], fds[1])
            fds.append(_data_fd("\0".join(options).encode() + b"\0"))
            version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
            command = [self.executable, "--args", str(fds[2]), "--", f"/python/bin/{version}", "-I", "-S", "-B"]
            return subprocess.Popen(
                [*command, "/runner.pyc", *arguments],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[*fds, *pass_fds],
                env={},
            )
        finally:
            for fd in fds:
                os.close(fd)

    def fault(self) -> str | None:
        """Why it does not work here; None if it does."""
        return _fault(self.executable)


@functools.cache
def _fault(executable: str) -> str | None:
    if sys.platform != "linux":
        return f"bubblewrap runs on Linux, not on {sys.platform}"
    if shutil.which(executable) is None:
        return f"{executable} is not installed; {INSTALL_HINT}"
    try:
        probe = Bubblewrap(executable).start(("probe",), pass_fds=(), stderr=subprocess.PIPE)
        _, stderr = probe.communicate(timeout=60)
    except (BackendError, OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap cannot be started: {error}"
    if probe.returncode == 0:
        return None
    return f"bubblewrap fails: {stderr.decode(errors='replace').strip()[:300]}; {INSTALL_HINT}"
