"""Faults at an exact place: the n-th system call of a child is where it is killed, or where the disk is full."""

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
RETURNED, NUMBER = 10, 15  # rax and orig_rax among them
#: System calls of x86-64 that a full disk fails.
FILLING = {
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


def run_until(work: Callable[[], None], number: int, error: int | None = None) -> int | None:
    """Run some work in a child, up to a system call.

    Args:
        work: Ends in an exception or not; the child's exit code is 1 or 0.
        number: Of the call, among all that the work makes; of those that a full disk fails, if there is an error.
        error: Fail the call with this error, rather than kill the child before it.

    Returns:
        The child's exit code; -9 where it was killed; ``None`` where it never made so many calls.
    """
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("system calls are told apart by their numbers on x86-64 Linux")
    child = os.fork()
    if not child:
        _be_traced(work)
    os.waitpid(child, 0)
    if libc.ptrace(SETOPTIONS, child, None, SYSGOOD):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.skip("this process may not trace another")
    seen, entering, struck = 0, True, False
    registers = ctypes.create_string_buffer(REGISTERS.size)
    while True:
        libc.ptrace(SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            code = os.waitstatus_to_exitcode(status)
            return code if struck else None
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:  # a signal, which it does not get
            continue
        if entering:
            libc.ptrace(GETREGS, child, None, registers)
            values = list(REGISTERS.unpack(registers.raw))
            counts = error is None or values[NUMBER] in FILLING
            if counts and seen == number:
                struck = True
                if error is None:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return -signal.SIGKILL
                _set(child, values, NUMBER, -1)  # no call at all
            seen += counts
        elif struck and seen == number + 1 and error is not None:
            libc.ptrace(GETREGS, child, None, registers)
            _set(child, list(REGISTERS.unpack(registers.raw)), RETURNED, -error)
            seen += 1  # once
        entering = not entering


def _set(child: int, values: list[int], which: int, value: int) -> None:
    values[which] = value % 2**64
    libc.ptrace(SETREGS, child, None, REGISTERS.pack(*values))


def _be_traced(work: Callable[[], None]) -> None:
    code = 1
    try:
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()
        code = 0
    finally:
        os._exit(code)
