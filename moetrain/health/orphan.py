"""A rank whose torchrun was killed must end: nobody would ever end it, and the other ranks would wait for it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_torchrun() -> None:
    """Have the kernel kill this process as soon as its torchrun is gone. Linux has this, other systems do not.

    By SIGKILL: a rank that is orphaned is a fault, and no request to leave.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it went before the kernel knew
        os._exit(128 + signal.SIGKILL)
