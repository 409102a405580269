"""Other tools' argument files: what is carried means the same here, and nothing is lost in silence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import trainwright
from trainwright.errors import UserError
from trainwright.parallel.layout import Layout
from trainwright.recipe.imports import TOOLS, axolotl_data, import_file, llamafactory
from trainwright.recipe.load import load_recipe

PADDLE_PRETRAIN = {
    "model_name_or_path": "meta-llama/Llama-2-13b", "tokenizer_name_or_path": "meta-llama/Llama-2-13b",
    "input_dir": "corpus/ids", "output_dir": "checkpoints/llama2/long", "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 6, "per_device_eval_batch_size": 4, "tensor_parallel_degree": 2,
    "pipeline_parallel_degree": 2, "virtual_pp_degree": 3, "sharding": "stage1 offload",
    "sharding_parallel_degree": 2, "sequence_parallel": 1, "use_flash_attention": True, "use_fused_rms_norm": True,
    "max_seq_length": 8192, "learning_rate": 1e-4, "min_learning_rate": 1e-5, "warmup_steps": 0, "warmup_ratio": 0.02,
    "max_steps": 777, "decay_steps": 700, "save_steps": 50, "eval_steps": 25, "eval_iters": 4, "logging_steps": 5,
    "weight_decay": 0.02, "adam_beta2": 0.95, "bf16": True, "fp16_opt_level": "O2", "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine", "split": "900,75,25", "do_train": True, "do_eval": True, "recompute": True,
    "recompute_granularity": "core_attn", "save_total_limit": 3, "continue_training": 1, "unified_checkpoint": True,
    "hidden_dropout_prob": 0.1, "amp_mastre_grad": 1,
}  # fmt: skip
PADDLE_QLORA = {
    "model_name_or_path": "./weights/qwen", "dataset_name_or_path": "./mine", "output_dir": "out",
    "per_device_train_batch_size": 3, "num_train_epochs": 2, "learning_rate": 3e-4, "src_length": 512,
    "max_length": 1024, "fp16": True, "lora": True, "lora_rank": 12, "zero_padding": True, "do_eval": True,
    "evaluation_strategy": "epoch", "weight_quantize_algo": "nf4", "seed": 7,
}  # fmt: skip
FACTORY = """
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 24
lora_target: q_proj, v_proj
lora_dropout: 0.05
use_rslora: true
quantization_bit: 4
dataset: mine, chats
dataset_dir: sets
template: qwen
cutoff_len: 3072
neat_packing: true
mask_history: true
preprocessing_num_workers: 5
output_dir: saves/qwen/first
logging_steps: 4
save_steps: 120
save_total_limit: 6
plot_loss: true
report_to: wandb
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
learning_rate: 2e-4
num_train_epochs: 1.5
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_ratio: 0.1
bf16: true
ddp_timeout: 1800
val_size: 0.02
eval_strategy: steps
eval_steps: 60
deepspeed: configs/ds_z2_offload_config.json
flash_attn: fa2
optim: paged_adamw_8bit
loraplus_lr_ratio: 16.0
"""
INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "ask", "response": "output"}},
    "chats": {"hf_hub_url": "someone/chats", "formatting": "sharegpt", "columns": {"messages": "turns"}},
}
AXOLOTL = """
base_model: mistralai/Mistral-7B-v0.1
revision_of_model: abc123
model_type: MistralForCausalLM
load_in_8bit: true
datasets:
  - path: sets/rows.jsonl
    ds_type: json
    type:
      field_instruction: ask
      field_output: reply
      format: "Q: {instruction}"
  - path: someone/talks
    type: chat_template
    field_messages: conversations
    roles_to_train: [assistant]
    train_on_eos: last
val_set_size: 0.1
chat_template: chatml
output_dir: ./outputs/second
sequence_len: 6144
sample_packing: true
adapter: lora
lora_r: 20
lora_alpha: 10
lora_target_linear: true
lora_modules_to_save: [embed_tokens]
context_parallel_size: 2
batch_size: 12
micro_batch_size: 3
max_steps: 99
optimizer: lion_8bit
lr_scheduler: cosine
cosine_min_lr_ratio: 0.2
learning_rate: 5e-6
bf16: auto
gradient_checkpointing: offload
warmup_steps: 11
evals_per_epoch: 4
save_steps: 0.25
logging_steps: 2
train_on_inputs: true
wandb_project: talks
dataset_exact_deduplication: true
deepspeed: deepspeed_configs/zero1.json
resume_from_checkpoint:
sample_pakking: true
"""
TITAN = """
[job]
dump_folder = "./outputs/titan"
description = "a test"
[profiling]
enable_profiling = true
[model]
name = "qwen3"
flavor = "1.7B"
hf_assets_path = "./assets/hf/Qwen3-1.7B"
converters = ["float8"]
[optimizer]
name = "AdamW"
lr = 6e-4
beta2 = 0.98
[lr_scheduler]
warmup_steps = 30
decay_ratio = 0.4
min_lr_factor = 0.25
[training]
local_batch_size = 6
global_batch_size = 96
seq_len = 4096
steps = 400
dataset = "c4_test"
dataset_path = "corpus"
[parallelism]
data_parallel_replicate_degree = 2
data_parallel_shard_degree = 2
tensor_parallel_degree = 2
pipeline_parallel_degree = 2
pipeline_parallel_schedule = "ZBVZeroBubble"
pipeline_parallel_microbatch_size = 3
enable_async_tensor_parallel = true
[checkpoint]
enable = true
interval = 80
keep_latest_k = 4
[activation_checkpoint]
mode = "selective"
selective_ac_option = "2"
[validation]
enable = true
dataset_path = "held_out"
freq = 20
steps = 5
[compile]
enable = true
components = ["model", "loss"]
"""


@pytest.fixture
def files(tmp_path):
    """Writes a file and imports it; -> (recipe, what was not carried by key)."""

    def given(name, content, kind=None, gpus=None, overrides=()):
        file = tmp_path / name
        text = json.dumps(content) if isinstance(content, dict) else content
        file.write_text(text, encoding="utf-8")
        found = import_file(file, kind, gpus=gpus, overrides=overrides)
        again = tmp_path / "recipe.yaml"
        again.write_text(found.to_yaml(), encoding="utf-8")
        assert load_recipe(again) == found.recipe  # what is written is what was checked
        return found.recipe, {each.key: each for each in found.not_carried}

    return given


def pick(recipe, *paths):
    """Values by their path."""
    found = []
    for path in paths:
        value = recipe
        for part in path.split("."):
            value = getattr(value, part)
        found.append(value)
    return found


def rows_of_a_step(recipe, gpus):
    layout = Layout.of(recipe.parallel, gpus)
    train = recipe.train
    steps = layout.accumulation(train.micro_batch_size, train.global_batch_size, train.gradient_accumulation_steps)
    return train.micro_batch_size * steps * layout.data_ranks


def test_paddlenlp_pretraining(files):
    recipe, lost = files("pretrain.json", PADDLE_PRETRAIN, gpus=16)
    assert (recipe.task, recipe.name, recipe.output) == ("pretrain", "long", "checkpoints/llama2")
    assert pick(recipe, "model.path", "model.tokenizer") == ["hf:meta-llama/Llama-2-13b", None]
    assert pick(recipe, "data.path", "data.format", "data.seq_len") == ["corpus/ids", "indexed", 8192]
    assert recipe.data.validation == pytest.approx(0.075)
    train = recipe.train
    assert (train.steps, train.epochs, train.learning_rate, train.min_learning_rate) == (777, None, 1e-4, 1e-5)
    assert (train.schedule, train.warmup, train.betas, train.weight_decay) == ("cosine", 0.02, (0.9, 0.95), 0.02)
    assert (train.precision, train.max_grad_norm, train.seed) == ("bf16", 0.5, 42)
    parallel = recipe.parallel
    assert (parallel.tp, parallel.pp, parallel.zero, parallel.offload) == (2, 2, 1, "optimizer")
    assert (parallel.pp_schedule, parallel.pp_stages) == ("interleaved", 3)
    assert (parallel.dp_replicate, parallel.recompute) == (2, "selective")  # 16 / (2 x 2 x shards of 2)
    assert pick(recipe, "checkpoint.every", "checkpoint.keep_last", "evaluation.every", "evaluation.max_batches") == [
        50, 3, 25, 4,
    ]  # fmt: skip
    assert rows_of_a_step(recipe, 16) == 2 * 6 * 4  # its data ranks: 16 / (2 x 2), sharded or not
    assert set(lost) == {"decay_steps", "hidden_dropout_prob", "amp_mastre_grad"}
    assert "near its amp_master_grad" in lost["amp_mastre_grad"].why


def test_paddlenlp_groups_of_shards_need_the_number_of_gpus(files):
    _, lost = files("pretrain.json", PADDLE_PRETRAIN)
    assert "parallel.dp_replicate = GPUs / 8; say --gpus" in lost["sharding_parallel_degree"].why
    with pytest.raises(UserError, match="--gpus 12 is no multiple"):
        files("pretrain.json", PADDLE_PRETRAIN, gpus=12)


def test_paddlenlp_says_the_groups_itself(files):
    recipe, lost = files("pretrain.json", {**PADDLE_PRETRAIN, "data_parallel_degree": 3})
    assert recipe.parallel.dp_replicate == 3
    assert "sharding_parallel_degree" not in lost


def test_paddlenlp_from_random_weights(files):
    values = {**PADDLE_PRETRAIN, "continue_training": 0, "tokenizer_name_or_path": "./tokens"}
    recipe, _ = files("scratch.json", values)
    assert pick(recipe, "model.path", "model.config", "model.tokenizer") == [None, "meta-llama/Llama-2-13b", "./tokens"]


def test_paddlenlp_qlora(files):
    recipe, lost = files("qlora.json", PADDLE_QLORA)
    assert (recipe.task, recipe.quantize, recipe.model.path) == ("sft", "nf4", "./weights/qwen")
    assert pick(recipe, "adapter.rank", "adapter.alpha", "adapter.targets") == [12, 24, "all-linear"]
    source = recipe.data.sources[0]
    assert (source.path, source.format) == ("./mine/train.json", "prompt_completion")
    assert source.columns == {"prompt": "src", "completion": "tgt"}
    assert (recipe.data.validation, recipe.data.seq_len, recipe.data.packing) == ("./mine/dev.json", 1024, True)
    train = recipe.train
    assert (train.epochs, train.micro_batch_size, train.gradient_accumulation_steps) == (2, 3, 1)
    assert (train.schedule, train.warmup, train.precision, train.seed) == ("linear", 0, "fp16", 7)
    assert recipe.parallel.zero == 0  # no sharding: whole copies
    assert set(lost) == {"src_length", "eval_strategy"}


def test_llamafactory(files, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    recipe, lost = files("run.yaml", FACTORY)
    assert (recipe.task, recipe.name, recipe.output) == ("sft", "first", "saves/qwen")
    assert pick(recipe, "model.path", "model.attention") == ["hf:Qwen/Qwen2.5-7B-Instruct", "flash"]
    adapter = recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.rslora) == (24, 48, 0.05, True)
    assert (adapter.targets, recipe.quantize) == (["q_proj", "v_proj"], "nf4")
    alpaca, chats = recipe.data.sources
    assert (alpaca.path, alpaca.format, alpaca.columns) == ("sets/mine.json", "alpaca", {"instruction": "ask"})
    assert (chats.path, chats.format, chats.columns) == ("hf:someone/chats", "sharegpt", {"conversations": "turns"})
    data = recipe.data
    assert (data.template, data.seq_len, data.validation, data.workers) == ("qwen", 3072, 0.02, 5)
    assert (data.packing, data.document_mask, data.loss_on) == (True, True, "last")
    train = recipe.train
    assert (train.epochs, train.optimizer, train.learning_rate) == (1.5, "adamw8bit", 2e-4)
    assert (train.schedule, train.min_learning_rate, train.warmup) == ("cosine", pytest.approx(2e-5), 0.1)
    assert (train.betas, train.weight_decay, train.precision) == ((0.9, 0.999), 0, "bf16")
    parallel = recipe.parallel
    assert (parallel.zero, parallel.offload, parallel.recompute) == (2, "optimizer", "full")
    assert parallel.timeout_minutes == 30
    assert pick(recipe, "checkpoint.every", "checkpoint.keep_last", "evaluation.every") == [120, 6, 60]
    assert pick(recipe, "tracking.tracker", "tracking.log_every") == ["wandb", 4]
    assert rows_of_a_step(recipe, 4) == 2 * 3 * 4  # per device x accumulation x world
    assert set(lost) == {"loraplus_lr_ratio"}


AXOLOTL_LORA = {
    "base_model": "a/b",
    "adapter": "lora",
    "learning_rate": 1e-4,
    "datasets": [{"path": "x", "type": "alpaca"}],
}


@pytest.mark.parametrize(
    ("name", "content", "init"),
    [
        (
            "f.yaml",
            {"model_name_or_path": "a/b", "dataset": "x", "finetuning_type": "lora", "pissa_init": True},
            "pissa_niter_16",
        ),
        (
            "f.yaml",
            {
                "model_name_or_path": "a/b",
                "dataset": "x",
                "finetuning_type": "lora",
                "pissa_init": True,
                "pissa_iter": -1,
            },
            "pissa",
        ),
        ("a.yml", AXOLOTL_LORA | {"peft_init_lora_weights": "olora"}, "olora"),
        ("a.yml", AXOLOTL_LORA | {"peft_init_lora_weights": "eva"}, "kaiming"),
        ("p.json", PADDLE_QLORA | {"pissa": True}, "pissa"),
    ],
)
def test_how_an_adapter_starts(files, name, content, init):
    recipe, lost = files(name, content)
    assert recipe.adapter.init == init
    assert ("peft_init_lora_weights" in lost) == (init == "kaiming")
    assert not any("pissa" in key for key in lost)


def test_llamafactory_defaults_are_its_own(files):
    """What the file leaves out is what the tool does, not what we do."""
    recipe, lost = files("run.yaml", "model_name_or_path: a/b\ndataset: x\nfinetuning_type: full\ndeepspeed: z3.json\n")
    train = recipe.train
    assert (train.epochs, train.micro_batch_size, train.gradient_accumulation_steps) == (3, 8, 1)
    assert (train.learning_rate, train.schedule, train.warmup) == (5e-5, "linear", 0)
    assert (train.betas, train.weight_decay, train.seed, train.precision) == ((0.9, 0.999), 0, 42, "fp32")
    assert (recipe.data.seq_len, recipe.data.packing, recipe.parallel.recompute) == (2048, False, "full")
    assert (recipe.checkpoint.every, recipe.parallel.zero, recipe.adapter) == (500, 3, None)
    assert "data.path=data/x.json is a guess" in lost["dataset"].why


def test_axolotl(files):
    recipe, lost = files("run.yml", AXOLOTL)
    assert recipe.model.path == "hf:mistralai/Mistral-7B-v0.1@abc123"
    adapter = recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.targets, recipe.quantize) == (20, 10, "all-linear", "int8")
    rows, talks = recipe.data.sources
    assert (rows.path, rows.format) == ("sets/rows.jsonl", "alpaca")
    assert rows.columns == {"instruction": "ask", "output": "reply"}
    assert (talks.path, talks.format) == ("hf:someone/talks", "sharegpt")
    data = recipe.data
    assert (data.template, data.seq_len, data.packing, data.too_long) == ("chatml", 6144, True, "drop")
    assert (data.loss_on, data.filter.deduplicate, data.validation) == ("all", True, 0.1)
    train = recipe.train
    assert (train.steps, train.epochs, train.optimizer) == (99, None, "lion")
    assert (train.micro_batch_size, train.gradient_accumulation_steps) == (3, 4)  # batch_size 12 is of one device
    assert (train.learning_rate, train.min_learning_rate, train.warmup) == (5e-6, pytest.approx(1e-6), 11)
    parallel = recipe.parallel
    assert (parallel.cp, parallel.zero, parallel.recompute, parallel.offload) == (2, 1, "full", "activations")
    assert rows_of_a_step(recipe, 8) == 3 * 4 * 4  # 8 GPUs in pairs that share a row
    assert pick(recipe, "tracking.tracker", "tracking.project") == ["wandb", "talks"]
    assert set(lost) == {
        "datasets[].type.format", "datasets[].train_on_eos", "lora_modules_to_save", "optimizer", "evals_per_epoch",
        "save_steps", "sample_pakking",
    }  # fmt: skip
    assert "near its sample_packing" in lost["sample_pakking"].why


def test_axolotl_pretraining_and_its_defaults(files):
    text = "base_model: a/b\npretraining_dataset: [{path: someone/texts, text_column: body}]\nlearning_rate: 1e-4\n"
    recipe, lost = files("run.yaml", text + "max_steps: 5\n")
    assert (recipe.task, recipe.data.streaming, recipe.data.sources[0].columns) == ("pretrain", True, {"text": "body"})
    assert (recipe.data.seq_len, recipe.train.schedule, recipe.train.weight_decay) == (512, "cosine", 0)
    assert (recipe.train.precision, recipe.parallel.recompute, recipe.parallel.zero) == ("bf16", "none", 0)
    assert not lost


def test_torchtitan(files):
    recipe, lost = files("run.toml", TITAN, gpus=16)
    assert (recipe.task, recipe.description, recipe.output) == ("pretrain", "a test", "outputs/titan")
    assert pick(recipe, "model.config", "model.tokenizer") == ["Qwen/Qwen3-1.7B", "./assets/hf/Qwen3-1.7B"]
    assert pick(recipe, "data.path", "data.format", "data.seq_len") == ["corpus", "text", 4096]
    assert pick(recipe, "data.validation", "evaluation.every", "evaluation.max_batches") == ["held_out", 20, 5]
    train = recipe.train
    assert (train.steps, train.learning_rate, train.betas) == (400, 6e-4, (0.9, 0.98))
    assert (train.schedule, train.decay, train.warmup) == ("wsd", 0.4, 30)
    assert train.min_learning_rate == pytest.approx(1.5e-4)
    parallel = recipe.parallel
    assert (parallel.tp, parallel.pp, parallel.dp_replicate) == (2, 2, 2)
    assert (parallel.pp_schedule, parallel.zero, parallel.async_tp) == ("zbv", 2, True)  # weights stay whole under pp
    assert (train.micro_batch_size, train.global_batch_size) == (3, 96)
    assert rows_of_a_step(recipe, 16) == 96
    assert pick(recipe, "checkpoint.every", "checkpoint.keep_last") == [80, 4]
    assert set(lost) == {"activation_checkpoint.selective_ac_option", "model.converters"}


OLD = '[model]\nflavor = "8B"\nname = "llama3"\n[training]\nbatch_size = 2\nsteps = 9\n[parallelism]\n'


def test_torchtitan_global_batch_is_the_ranks_own_where_it_is_not_said(files):
    recipe, lost = files("old.toml", OLD + "context_parallel_degree = 2\n")
    assert rows_of_a_step(recipe, 8) == 2 * 4  # local batch x data ranks; pairs share a row
    assert (recipe.model.config, recipe.train.warmup) == ("meta-llama/Meta-Llama-3-8B", 9)
    assert (recipe.parallel.zero, recipe.parallel.recompute) == (3, "selective")
    assert "model.tokenizer_path" in lost  # it names none


def test_torchtitan_updates_in_the_backward_pass(files):
    early = TITAN.replace("beta2 = 0.98", "beta2 = 0.98\nearly_step_in_backward = true")
    recipe, lost = files("run.toml", early, gpus=16)
    assert not recipe.train.optimizer_in_backward
    assert "optimizer.early_step_in_backward" in lost  # beside tp and pp
    alone = OLD + "context_parallel_degree = 2\n[optimizer]\nearly_step_in_backward = true\n"
    recipe, lost = files("alone.toml", alone)
    assert (recipe.train.optimizer_in_backward, recipe.train.max_grad_norm) == (True, 0.0)
    assert "optimizer.early_step_in_backward" not in lost


def test_torchtitan_decay_gives_way_to_the_warmup(files):
    text = TITAN.replace("warmup_steps = 30", "warmup_steps = 300")
    recipe, _ = files("run.toml", text)
    assert (recipe.train.warmup, recipe.train.decay) == (300, 100)


def test_torchtitan_8_bit_floats_are_listed_in_both_spellings(files):
    old = "[float8]\nenable_float8_linear = true\nscaling_type_input = 'dynamic'\n"
    text = TITAN.replace('converters = ["float8"]', "") + old
    assert "model.converters" in files("run.toml", text)[1]
    assert "model.converters" not in files("run.toml", text.replace("linear = true", "linear = false"))[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "model_name_or_path: a/b\nstage: dpo\nfinetuning_type: full\n", "stage=dpo: a recipe pretrains"),
        ("a.yaml", "base_model: a/b\nrl: dpo\n", "rl=dpo: a recipe pretrains or fine-tunes"),
        ("a.yaml", "base_model: a/b\ndatasets: [{path: x}]\nlearning_rate: fast\n", "learning_rate='fast' is no"),
        ("a.yaml", "base_model: a/b\n", "datasets=None: it is missing"),
        ("a.toml", "[model]\nname = 'deepseek_v3'\nflavor = '16B'\n[training]\n", "no such shape is known here"),
        ("a.toml", "[model\n", "cannot be read as an argument file"),
        ("a.json", "{", "cannot be read as an argument file"),
        ("a.yaml", "colour: red\n", 'has the keys of no known tool (["colour"] ...): say --kind paddlenlp'),
        ("a.yaml", "task: sft\ndata: {path: x}\n", "is a recipe already"),
        ("a.json", '{"model_name_or_path": "x", "per_device_train_batch_size": 2.5, "sharding": "", "input_dir": "d"}',
         "per_device_train_batch_size=2.5 is no whole number"),
    ],
)  # fmt: skip
def test_refusals(files, name, content, words):
    with pytest.raises(UserError) as caught:
        files(name, content)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_a_recipe_refuses_is_mended_on_the_command_line(files):
    text = "model_name_or_path: a/b\nfinetuning_type: full\ndataset: x\nper_device_train_batch_size: 0\n"
    with pytest.raises(UserError, match=r"micro_batch_size=0 is below 1.*mend it behind the file"):
        files("run.yaml", text)
    recipe, _ = files("run.yaml", text, overrides=["train.micro_batch_size=4", "data.path=real.json"])
    assert (recipe.train.micro_batch_size, recipe.data.path) == (4, "real.json")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.toml", TITAN.replace("1.7B", "9.9B"), "model.config=Qwen/Qwen3-4B"),
        ("a.yaml", "model_name_or_path: a/b\nfinetuning_type: full\n", "data.path=mine.json"),
        ("a.yaml", "base_model: a/b\nlearning_rate: 1e-5\n", "data.path=mine.json"),
        ("a.json", '{"model_name_or_path": "x", "sharding": "stage1", "max_steps": 3}', "data.path=corpus"),
    ],
)
def test_what_a_file_lacks_may_stand_behind_it(files, name, text, word):
    key, _, value = word.partition("=")
    with pytest.raises(UserError, match=f"; say {key}=... behind the file"):
        files(name, text)
    recipe, _ = files(name, text, overrides=[word])
    assert pick(recipe, key) == [value]


def test_null_is_not_there(files):
    text = "base_model: a/b\ndatasets: [{path: x}]\nlearning_rate: 1e-5\n"
    empty = "adapter:\nlora_r:\nmax_steps:\nsequence_len:\nwandb_project:\nfsdp:\nsparkle_motion:\n"
    recipe, lost = files("a.yaml", text + empty)
    plain, _ = files("a.yaml", text)
    assert (recipe, lost) == (plain, {})


def test_no_key_is_lost_in_silence(files):
    """Every key of a file is in the recipe's making, known to change nothing, or listed: an unknown one always."""
    for name, content in (("p.json", json.dumps(PADDLE_PRETRAIN)), ("f.yaml", FACTORY), ("a.yaml", AXOLOTL)):
        values = yaml.safe_load(content)
        values["sparkle_motion"] = 3
        text = json.dumps(values) if name.endswith("json") else yaml.safe_dump(values)
        assert "sparkle_motion" in files(name, text)[1]
    text = TITAN.replace("[training]", "[training]\nsparkle_motion = 3")
    assert "training.sparkle_motion" in files("t.toml", text)[1]


def test_template_names_are_ours():
    shipped = {path.stem for path in (Path(trainwright.__file__).parent / "data" / "templates").glob("*.jinja")}
    assert {*llamafactory.TEMPLATES.values(), *axolotl_data.TEMPLATES.values()} <= shipped


@pytest.mark.parametrize(("name", "text"), [("a.yaml", FACTORY), ("a.yml", AXOLOTL), ("a.toml", TITAN)])
def test_a_file_that_is_trained_as_it_is_names_the_verb(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is another tool's file: `trainwright recipes import"):
        load_recipe(file)


def test_the_verb(tmp_path):
    def run(*words):
        command = [sys.executable, "-m", "trainwright", "recipes", "import", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    (tmp_path / "args.json").write_text(json.dumps(PADDLE_QLORA), encoding="utf-8")
    shown = run("args.json")
    assert shown.returncode == 0
    assert yaml.safe_load(shown.stdout)["quantize"] == "nf4"
    assert "not carried: src_length = 512: data.seq_len bounds" in shown.stderr
    assert "paddlenlp: 2 keys not carried" in shown.stderr
    assert run("args.json", "--write", "mine.yaml", "train.steps=3").returncode == 0
    assert load_recipe(tmp_path / "mine.yaml").train.steps == 3
    again = run("args.json", "--write", "mine.yaml")
    assert (again.returncode, "mine.yaml exists" in again.stderr) == (2, True)
    told = json.loads(run("args.json", "--json").stdout)
    assert (told["kind"], told["recipe"]["adapter"]["rank"]) == ("paddlenlp", 12)
    assert {each["key"] for each in told["not_carried"]} == {"src_length", "eval_strategy"}
    wrong = run("args.json", "--kind", "tensorflow")
    assert wrong.returncode == 2
    assert f"use {', '.join(TOOLS)}" in wrong.stderr
