"""Become another program that is told when its parent dies: `python -I deathwatch.py PARENT SIGNAL PROGRAM ARG…`.

A supervisor that is killed with SIGKILL cannot end its children. Linux can: a process may ask for a signal at its
parent's death, and keeps that wish across exec. Asking happens in this small program, between fork and exec of the
real one, because Python code run in the forked child itself (`preexec_fn`) may deadlock when the parent has threads.

Run by `broker.supervise.processes`; it imports nothing of Hansa, so that it costs some milliseconds only. Processes that
fork by themselves (gunicorn, Celery's beat) call `die_with_parent` in the child.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


def main(arguments: list[str]) -> None:
    """Ask for the signal, make sure the parent still lives, restore the signals' defaults, and become the program."""
    parent, death_signal, *argv = arguments
    if not die_with_parent(int(parent), int(death_signal)):
        sys.exit("the supervisor died before its child could start")  # it would never have been signalled
    # The supervisor forks with its signals blocked, and an ignored signal would stay ignored across exec.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - becoming the given program, with no shell between, is the purpose
    except OSError as error:
        sys.exit(f"cannot run {argv[0]}: {error.strerror}")


def die_with_parent(parent: int, number: int) -> bool:
    """Have the kernel send `number` to this process when `parent` dies; False where that has happened already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # Asked after the wish is made: a parent that died between the fork and the wish is never noticed by the kernel.
    return os.getppid() == parent


if __name__ == "__main__":
    main(sys.argv[1:])
