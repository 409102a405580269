"""A Python interpreter for tests that has imported everything already: `python()` instead of `sys.executable`.

A command of ours in a new interpreter takes three to seven seconds of imports before it does anything. Here one clean,
single-threaded process (`serve.py`) imports once for each pytest process, and every command is a fork of it with its
own words, environment, folder, input and outputs. What stands in the process table for a command is `ask.py`: it hands
these over, passes signals on and leaves with the command's status; whoever ends it ends the command's process group.
In such a command `sys.executable` is this interpreter again, so the processes that it starts are forks too.

Not for tests of imports, of processor time, of process trees and of what a new interpreter reads: they take
`sys.executable`. TRAINWRIGHT_COLD=1 gives all tests new interpreters.
"""

from __future__ import annotations

import atexit
import os
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent


def able() -> bool:
    """Whether this system tells when a process has ended, as `serve.py` asks it."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return not os.environ.get("TRAINWRIGHT_COLD")


@cache
def python() -> str:
    """The interpreter's path; started when first asked for."""
    if not able():
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    program, address = Path(folder.name, "python"), f"{folder.name}/socket"
    # -S -I: the few lines of ask.py want no site-packages, and start in hundredths of a second without.
    words = [sys.executable, "-SI", str(HERE / "ask.py"), sys.executable, address]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    program.chmod(0o700)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm.serve", str(program), address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # OpenBLAS starts threads when it is imported
        cwd=HERE.parents[1],
        start_new_session=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(folder.cleanup)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)  # the first of the three: they run backwards
    return str(program) if server.stdout.readline() == b"ready\n" and answers(program) else sys.executable


def answers(program: Path) -> bool:
    """Whether commands come through; not where programs in temporary folders may not run, say."""
    try:
        return subprocess.run([program, "-c", "pass"], timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
