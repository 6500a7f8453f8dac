"""A filter of system calls for a program that has no business with the kernel beyond computing.

The filter is a table of the kernel's packet-filter instructions (``struct sock_filter``): it checks the architecture,
reads the number of the call, and refuses with EPERM what is listed. Threads are allowed, processes are not: ``clone``
needs the flag CLONE_THREAD, and ``clone3``, whose flags a filter cannot read, does not exist (ENOSYS), upon which the
C library uses ``clone``. Calls of another architecture end the process.
Source: Linux, Documentation/userspace-api/seccomp_filter.rst; numbers of asm/unistd_64.h and asm-generic/unistd.h.
"""

import platform
import struct

from cognexis.errors import BackendError

_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CLONE_THREAD = 0x00010000

# Name: number on x86_64, number on aarch64 (None: no such call).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "socket": (41, 198),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_setup": (206, 0),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "vmsplice": (278, 75),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
}
# Machine: identifier of the architecture, place in the table, clone, clone3, first number of a second call table.
_MACHINES: dict[str, tuple[int, int, int, int, int | None]] = {
    "x86_64": (0xC000003E, 0, 56, 435, 0x40000000),
    "aarch64": (0xC00000B7, 1, 220, 435, None),
}


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def syscall_filter(machine: str | None = None) -> bytes:
    """The filter's instructions for ``bwrap --seccomp``.

    Args:
        machine: "x86_64" or "aarch64"; None takes this one.

    Raises:
        BackendError: there is no table for the machine.
    """
    machine = platform.machine() if machine is None else machine
    if machine not in _MACHINES:
        raise BackendError(f"machine={machine!r}: system calls are known for {', '.join(_MACHINES)}")
    architecture, column, clone, clone3, second_table = _MACHINES[machine]
    program = [
        _instruction(_LOAD, 4),
        _instruction(_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, 0),
    ]
    if second_table is not None:
        program += [_instruction(_AT_LEAST, second_table, 0, 1), _instruction(_RETURN, _KILL)]
    program += [_instruction(_EQUAL, clone3, 0, 1), _instruction(_RETURN, _ERRNO | _ENOSYS)]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            program += [_instruction(_EQUAL, number, 0, 1), _instruction(_RETURN, _ERRNO | _EPERM)]
    program += [
        _instruction(_EQUAL, clone, 0, 3),
        _instruction(_LOAD, 16),  # low half of the first argument, the flags
        _instruction(_ANY_BIT, _CLONE_THREAD, 1, 0),
        _instruction(_RETURN, _ERRNO | _EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(program)
