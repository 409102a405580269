"""Writes docs/families.md from the golden tests: `python -m tests.model.families_page`.

Each family's parts are read from its tree, each error is measured now. tests/model/test_families_page.py checks that
the page says what the code does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.golden import golden_dir
from tests.model.golden_case import GoldenCase, errors
from tests.model.test_against_transformers import BUILDERS
from tests.model.test_rows import packed_error
from trainwright.model import families, named
from trainwright.model.checkpoint import save_model
from trainwright.model.config import MlpConfig, ModelConfig, MoeConfig
from trainwright.model.families.family import Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

HEAD = """# Families

One decoder computes every family; a family is a tree of parts (`model/config.py`) and a table of weight names
(`model/families/`). This page is written by `python -m tests.model.families_page` and checked by a test.

## Parity

Against numbers that each family's original implementation computed in float32 on a CPU (a small random model a family:
weights, inputs, logits, the stream after every layer, loss, every gradient). Largest difference anywhere; the bound is
1e-4. Gradients are relative to each tensor's largest entry. *Packed*: how far logits of documents packed into one row
are from those of each document alone; tests hold that, padding left and right, and the gradients of all, to 1e-5, and
logits with a cache to those of the full forward. *Saved*: whether saving what was loaded gives the same
`model.safetensors`, byte for byte. *Random*: random configurations against `transformers` itself, where it has the
family.

| family | logits | streams | loss | gradients | packed | saved | random |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

PARTS = """
## Parts

As in the small models of those numbers; `model/families/NAME.py` says which keys of `config.json` change them.

| family | position | mask | attention | norm and residual | MLP | head |
| --- | --- | --- | --- | --- | --- | --- |
"""

NAMES = """
## Named models

`model.config: NAME` gives random weights of this shape; the owner and capitals may be left out. Counts are exact and
tested against the published ones.

| name | family | parameters | context | licence |
| --- | --- | --- | --- | --- |
"""

TAIL = """
## What to know

- **Which family.** `config.json` says it. Baichuan's four share one `model_type`: 4096 wide is 7B, 5120 is 13B, 64000
  tokens is the first generation, 125696 or `z_loss_weight` the second. Where that does not tell, `model.family` does.
- **GLM (ChatGLM-6B, GLM-130B)** reads the prompt's end from the tokens: everything before the first `sop` is visible to
  all, positions follow the published code. `prefix_mask` and `position_ids` say it outright. Its rotary frequencies are
  rounded to float16, as published.
- **Qwen 1** changes its rotary base and scales queries beyond `seq_length`, in evaluation only, as published. Positions
  are counted inside a row's real tokens; the published code counts padding too, which moves log-n in left-padded rows
  longer than `seq_length`.
- **Dynamic scaling with a cache.** All angles change as a row grows beyond the trained length, and with them what every
  layer made of them; then generation reads the row anew, so it equals the full forward there too. For Qwen 1 that is
  at each doubling of `seq_length`; for `rope_type: dynamic` at every token beyond `max_position_embeddings`.
- **ChatGLM-6B's head** is a tensor of its own in the files. The published code ties it to the token table when
  `tie_word_embeddings` is true, which is its library's default; say `tie_word_embeddings: true` to train it so. The
  named model does, hence 6.17 billion parameters.
- **Dropout** in published configs (GPT-2, BLOOM, OPT: 0.1) is not applied.
- **Options that are not here** are refused in one line and never ignored: a test changes every key of every family's
  published config class. Among them: GPT-2's `scale_attn_by_inverse_layer_idx`, Baichuan 2's `z_loss_weight`, Mixtral's
  `router_jitter_noise`, `rope_type: longrope`, `quantization_config`.
- **`rope_ratio`** in a ChatGLM config has two meanings. ChatGLM2-6B-32K divides positions by it, ChatGLM3-6B-32K and
  GLM-4-9B multiply the rotary base. GLM-4 is known by its vocabulary; for the others `rope_ratio_scales: positions` or
  `base` in the config says it.
- **Qwen3-MoE's window** (`use_sliding_window`) is one of every layer, as in its published code; `max_window_layers`
  between the first and the last layer is refused.
- **GPT-3's banded layers**: `banded_window: 256` in a GPT-2 config makes every second layer see 256 positions.
- **Pickles** (`pytorch_model.bin`) are not read in training: `trainwright convert import FOLDER NEW_FOLDER` turns them
  into safetensors with a reader that builds tensors and nothing else.
"""


def position(config: ModelConfig) -> str:
    attention = config.layers[0].self_attn
    if attention.alibi:
        return "ALiBi"
    if config.embed_positions:
        offset = config.embed_positions.offset
        return f"learned, offset {offset}" if offset else "learned"
    rope = attention.rope
    assert rope is not None
    share = rope.channels * rope.rotary_dim / attention.head_dim
    words = ["2 channels" if rope.channels > 1 else rope.layout] + (["half of each head"] if share < 1 else [])
    words += ["float16 frequencies"] if rope.float16_frequencies else []
    words += ["dynamic NTK", "log-n"] if attention.logn_length else []
    return "rotary: " + ", ".join(words)


def row_of_parts(config: ModelConfig) -> list[str]:
    block = config.layers[0]
    attention, mlp = block.self_attn, block.mlp
    kind = "grouped" if attention.num_kv_heads < attention.num_heads else "all heads"
    biases = [name for name, part in (("qkv", attention.q_proj), ("o", attention.o_proj)) if part.bias]
    extra = (["q and k norm"] if attention.q_norm else []) + ([f"bias {', '.join(biases)}"] if biases else [])
    window = f", window {attention.mask.window}" if attention.mask.window else ""
    norm = {"rms": "RMS", "layer": "Layer"}[block.input_layernorm.kind]
    residual = {"pre": "pre", "post": "post", "scaled": "scaled by sqrt(2 L)"}[block.residual.kind]
    embed = ", embedding norm" if config.embed_norm else ""
    head = ["tied" if config.lm_head.tied else "own"] + (["normalised"] if config.lm_head.normalized else [])
    return [
        position(config),
        attention.mask.kind + window,
        ", ".join([kind, *extra]),
        f"{norm}, {residual}{embed}",
        f"{mlp_words(mlp)}",
        ", ".join(head),
    ]


def mlp_words(mlp: MlpConfig | MoeConfig) -> str:
    if isinstance(mlp, MoeConfig):
        return f"{mlp.experts.num_experts} experts, top {mlp.top_k}: {mlp_words(mlp.experts)}"
    return f"{'gated ' if mlp.gate_proj else ''}{mlp.activation}" + (", bias" if mlp.up_proj.bias else "")


def line(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def parity(family: Family) -> str:
    case = GoldenCase(golden_dir(family.name), family.name)
    numbers = [*errors(case).values(), packed_error(case.model)]
    with tempfile.TemporaryDirectory() as folder:
        save_model(case.model, folder)
        same = (Path(folder) / "model.safetensors").read_bytes() == (case.folder / "model.safetensors").read_bytes()
    random = "yes" if family.name in BUILDERS else ""
    return line(f"`{family.name}`", *(f"{n:.0e}" for n in numbers), "equal" if same else "differs", random)


def page() -> str:
    all_families = [families.get(name) for name in families.names()]
    configs = {family.name: GoldenCase(golden_dir(family.name), family.name).config for family in all_families}
    text = HEAD + "".join(parity(family) for family in all_families)
    text += PARTS + "".join(line(f"`{name}`", *row_of_parts(config)) for name, config in configs.items())
    text += NAMES
    for model in named.named_models():
        text += line(f"`{model.name}`", model.family, f"{model.parameters:,}", f"{model.context:,}", model.licence)
    return text + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
