"""docs/finetuning.md does what it says: its commands run, and its table of memory is the planner's."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.warm import python
from trainwright.planner.plan import plan
from trainwright.recipe.load import load_recipe

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
KEYS = {
    "": [],
    "nf4 tables": ["quantize_tables=nf4"],
    "adamw8bit": ["train.optimizer=adamw8bit"],
    "offload": ["parallel.offload=activations"],
    "tiles of 4096": ["parallel.mlp_tokens=4096"],
}
PLAIN = ["quantize_tables=null", "train.optimizer=adamw", "train.gradient_accumulation_steps=1"]


def test_memory():
    table = re.search(r"<!-- memory -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)[1].splitlines()[2:]
    assert len(table) == 6
    for line in table:
        base, more, *sizes = (cell.strip() for cell in line.strip("|").split("|"))
        words = [f"quantize={'null' if base == 'bf16' else base}", *PLAIN]
        words += [word for key in more.split(", ") for word in KEYS[key]]
        for tokens, size in zip((512, 8192), sizes, strict=True):
            recipe = load_recipe("llama3_8b/qlora_alpaca_512", [*words, f"data.seq_len={tokens}"])
            found = plan(recipe, gpu="H200", gpus=1).memory.allocated / 2**30
            assert found == pytest.approx(float(size), abs=0.15), (line, tokens)


@pytest.mark.slow
def test_commands(tmp_path):
    lines = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert {shlex.split(line)[1] for line in lines} == {"plan", "recipes", "train", "generate", "convert"}
    for line in lines:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words += ["data.path=shipped:arithmetic?rows=300", "train.steps=2", "evaluation.generate=2"]
            words.append(f"data.cache={tmp_path / 'cache'}")
        done = subprocess.run([python(), "-m", "trainwright", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
