"""The interpreter that has imported everything already (tests/warm) does what a new one does."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.warm import able, python

pytestmark = pytest.mark.skipif(not able(), reason="new interpreters everywhere")
TELL = """
import json, os, sys, threading, torch
told = [sys.argv, os.getcwd(), os.environ["A"], sys.stdin.read(), torch.get_num_threads()]
print(json.dumps([*told, threading.active_count(), __name__]))
sys.exit("not well")
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_words_folder_environment_input_and_status(tmp_path, threads):
    told = {"cwd": tmp_path, "env": {**os.environ, "A": "a", "OMP_NUM_THREADS": threads}, "input": "read"}
    warm, cold = (
        subprocess.run([each, "-c", TELL, "word"], capture_output=True, text=True, **told)
        for each in (python(), sys.executable)
    )
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert (cold.returncode, cold.stderr) == (1, "not well\n")


def test_random_numbers_differ():
    command = [
        python(),
        "-c",
        "import numpy, random, torch; print(numpy.random.rand(), random.random(), torch.rand(()))",
    ]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert all(one != two for one, two in zip(*said, strict=True))


def test_files_and_modules_on_a_path(tmp_path):
    (tmp_path / "beside.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0], flush=True)\n")
    (tmp_path / "program.py").write_text("import beside, sys\nsys.exit(3)\n")
    told = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}}
    for words in (["-u", str(tmp_path / "program.py"), "x"], ["-m", "program", "x"], ["-m", "beside"]):
        warm, cold = (subprocess.run([each, *words], **told) for each in (python(), sys.executable))
        assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)


def test_what_an_interpreter_reads_when_it_starts_gets_a_new_one():
    command = [python(), "-c", "import sys; print(sys.executable, sys.flags.hash_randomization)"]
    told = {"capture_output": True, "text": True}
    assert subprocess.run(command, **told).stdout == f"{python()} 1\n"
    seeded = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "0"}, **told)
    assert seeded.stdout == f"{sys.executable} 0\n"


SLEEPS = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
try:
    print(os.getpid(), child.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_the_command(number):
    with subprocess.Popen([python(), "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        process.send_signal(number)
        if number == signal.SIGINT:
            assert process.stdout.readline() == b"interrupted\n"
        assert process.wait(60) == -number
        if number == signal.SIGKILL:  # and with the command its process group
            end = time.monotonic() + 30
            while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
                time.sleep(0.02)
            assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        else:
            os.kill(pids[1], signal.SIGKILL)
