"""Fault injection with ptrace: kill a child process at its n-th system call, or make that call fail."""

import ctypes
import os
import platform
import signal
import struct
from collections.abc import Callable

import pytest

TRACEME, SYSCALL, GETREGS, SETREGS, SETOPTIONS = 0, 24, 12, 13, 0x4200
SYSGOOD = 1
REGISTERS = struct.Struct("27Q")
RESULT, CALL = 10, 15  # indices of rax and orig_rax
#: x86-64 system calls that fail on a full disk.
DISK_CALLS = {
    1: "write",
    18: "pwrite64",
    20: "writev",
    74: "fsync",
    82: "rename",
    257: "openat",
    264: "renameat",
    83: "mkdir",
}

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def run_until_syscall(work: Callable[[], None], number: int, error: int | None = None) -> int | None:
    """Run a function in a child process with a fault at one system call.

    Args:
        work: Function to run. The child's exit code is 1 if it raises, else 0.
        number: Index of the system call; with ``error``, among ``DISK_CALLS`` only.
        error: The call fails with this errno. Without it, the child is killed before the call.

    Returns:
        The child's exit code, -9 if it was killed; ``None`` if it made fewer calls.
    """
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("system call numbers are those of x86-64 Linux")
    child = os.fork()
    if not child:
        _run_traced(work)
    os.waitpid(child, 0)
    if libc.ptrace(SETOPTIONS, child, None, SYSGOOD):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.skip("this process may not trace another")
    count, entering, injected = 0, True, False
    registers = ctypes.create_string_buffer(REGISTERS.size)
    while True:
        libc.ptrace(SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            code = os.waitstatus_to_exitcode(status)
            return code if injected else None
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:  # a signal, which is discarded
            continue
        if entering:
            libc.ptrace(GETREGS, child, None, registers)
            values = list(REGISTERS.unpack(registers.raw))
            matches = error is None or values[CALL] in DISK_CALLS
            if matches and count == number:
                injected = True
                if error is None:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return -signal.SIGKILL
                _set_register(child, values, CALL, -1)  # skip the call
            count += matches
        elif injected and count == number + 1 and error is not None:
            libc.ptrace(GETREGS, child, None, registers)
            _set_register(child, list(REGISTERS.unpack(registers.raw)), RESULT, -error)
            count += 1  # inject once
        entering = not entering


def _set_register(child: int, values: list[int], index: int, value: int) -> None:
    values[index] = value % 2**64
    libc.ptrace(SETREGS, child, None, REGISTERS.pack(*values))


def _run_traced(work: Callable[[], None]) -> None:
    code = 1
    try:
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        code = 0
    finally:
        os._exit(code)
