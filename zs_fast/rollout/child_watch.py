"""Runs a server while its owner lives: `python child_watch.py COMMAND...`, with a pipe from the owner as stdin.

A program of its own, of the standard library alone. The pipe ends with the owner however that ends, by SIGKILL too; the
server's whole process group is ended then. Where the system can (Linux) the server also dies with this program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0
"""Between the request to end and the end."""
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(group: int, number: signal.Signals) -> None:
    """Send a signal to every process of the group that is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def main(command: list[str]) -> int:
    """The server's exit status."""
    # No other thread runs yet, so that the call between fork and exec is safe.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)

    def end_with_owner() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        end(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE_S)
        end(server.pid, signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the owner ends the pipe when it is done
    owner = threading.Thread(target=end_with_owner, daemon=True)
    owner.start()
    status = server.wait()
    end(server.pid, signal.SIGKILL)  # its own children
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
