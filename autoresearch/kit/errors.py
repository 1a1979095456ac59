"""Reading an exception: one line of it, what lies below a compiler's wrapping, was it memory."""

from __future__ import annotations

import errno
import re


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["-"]
    return f"{type(error).__name__}: {lines[0][:300]}"


def root_cause(error: BaseException) -> str:
    """One line of what lies below the errors that a compiler wraps around it."""
    while inner := getattr(error, "inner_exception", None) or error.__cause__:
        error = inner
    if "Traceback (most recent call last)" in str(error):  # of a worker process
        return str(error).strip().splitlines()[-1][:300]
    return first_line(error)


REFUSALS = "ENOSPC EDQUOT EMFILE ENFILE EACCES EPERM EROFS".split()


def refusal(error: BaseException) -> OSError | None:
    """The error of the system below a compiler's: a full disk, a forbidden folder. Not damage."""
    while error:
        if isinstance(error, OSError) and errno.errorcode.get(error.errno) in REFUSALS:
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def out_of_memory(error: BaseException) -> bool:
    """Of any device: CPU and MPS raise plain RuntimeErrors, and a compiler wraps what it meets."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return bool(re.search("out of memory|can't allocate memory", str(error)))


def out_of_shared_memory(error: BaseException) -> bool:
    """Triton's OutOfResources: one block of a kernel needs more than a multiprocessor has."""
    return "out of resource" in f"{error} {root_cause(error)}"
