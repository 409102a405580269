"""Whole runs of a small recipe: the folder they leave, how they stop, what they refuse."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.train.small import CONFIG, small_recipe
from trainwright.cli.train import train as train_verb
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_model
from trainwright.recipe.load import load_recipe
from trainwright.recipe.show import to_yaml
from trainwright.train.checkpoint import SaveError, list_checkpoints
from trainwright.train.metrics import read_lines
from trainwright.train.nonfinite import NonFiniteError
from trainwright.train.trainer import Trainer, train

FIELDS = [
    "step", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "step_seconds", "tokens_per_second_per_gpu",
    "samples_per_second", "tflops", "mfu", "hfu", "peak_memory_gib", "reserved_memory_gib", "data_wait_seconds",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, result) of one run that went to its end."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = small_recipe(
        folder,
        "train.steps=20",
        evaluation={"generate": 4, "max_new_tokens": 8, "every": 10},
        tracking={"tensorboard": True},
    )
    return recipe, train(recipe)


def test_the_folder_holds_everything(finished):
    _, result = finished
    names = {path.name for path in result.folder.iterdir()}
    assert names == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "evaluation.jsonl", "answers.json", "checkpoints", "model",
        "report.html", "loss.png", "planned.json", "tensorboard",
    }  # fmt: skip
    assert [c.step for c in list_checkpoints(result.folder / "checkpoints")] == [20]
    assert result.stopped is None
    assert (result.step, result.total_steps) == (20, 20)


def test_metrics_have_all_fields_and_losses_fall(finished):
    _, result = finished
    lines = read_lines(result.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(list(line) == FIELDS for line in lines)
    assert lines[-1]["loss"] == result.loss < 0.8 * lines[0]["loss"]
    last = lines[-1]
    assert last["tokens"] <= 20 * 4 * 48
    assert last["tokens"] > last["supervised_tokens"] > 0
    rows_per_second = 4 / last["step_seconds"]
    assert last["samples_per_second"] == pytest.approx(rows_per_second)
    config = load_model(result.folder / "model").config
    flops = last["tokens_per_second_per_gpu"] * config.flops_per_token(48)
    assert last["tflops"] == pytest.approx(flops / 1e12)


def test_held_out_data_is_looked_at_once_a_step(finished):
    """The last step is one of every ten, and the end of training."""
    _, result = finished
    assert [line["step"] for line in read_lines(result.folder / "evaluation.jsonl")] == [0, 10, 20]


def test_the_resolved_recipe_repeats_the_run(finished, tmp_path):
    recipe, result = finished
    again = load_recipe(result.folder / "recipe.yaml", [f"output={tmp_path}"])
    assert again.model_dump(exclude={"output"}) == recipe.model_dump(exclude={"output"})
    repeated = train(again)
    losses = [[line["loss"] for line in read_lines(r.folder / "metrics.jsonl")] for r in (result, repeated)]
    assert losses[0] == losses[1]


def test_environment(finished):
    recipe, result = finished
    found = json.loads((result.folder / "environment.json").read_text())
    assert found["packages"]["torch"] == torch.__version__
    assert found["seed"] == recipe.train.seed
    assert found["command"] == sys.argv
    assert found["devices"]


def test_the_model_is_what_transformers_loads_and_it_answers_alike(finished):
    transformers = pytest.importorskip("transformers")
    _, result = finished
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folder / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    ours = load_model(result.folder / "model")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    said = theirs.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    asked = json.loads((result.folder / "answers.json").read_text())["after"]["answers"]
    assert len(asked) == 4
    assert tokenizer.decode(said, skip_special_tokens=True) is not None
    for answer in asked:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": answer["question"]}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        out = theirs.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == answer["given"]


def test_the_report_stands_alone(finished):
    _, result = finished
    page = result.report.read_text(encoding="utf-8")
    assert "<svg" in page
    assert "prefers-color-scheme: dark" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page
    for text in ("exact answers", "Held-out split", "learning_rate: 0.005", "held-out loss"):
        assert text in page
    assert (result.folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_is_not_written_over(finished):
    recipe, _ = finished
    with pytest.raises(UserError, match=r"holds a run with a checkpoint at step 20: .*--resume.*name=small-2"):
        train(recipe)


def test_resuming_a_finished_run_only_finishes_it(finished):
    recipe, result = finished
    before = (result.folder / "metrics.jsonl").read_text()
    again = train(recipe, resume=True)
    assert (again.step, again.model) == (20, result.model)
    assert (result.folder / "metrics.jsonl").read_text() == before
    # It looks at the held-out split once more, and writes that in the place of what it wrote.
    assert [line["step"] for line in read_lines(result.folder / "evaluation.jsonl")] == [0, 10, 20]


def test_resuming_where_nothing_is_starts(tmp_path):
    assert train(small_recipe(tmp_path, "train.steps=1"), resume=True).step == 1


def test_a_run_can_be_made_longer_and_says_what_changed(tmp_path, capsys):
    train(small_recipe(tmp_path, "train.steps=4"))
    result = train(small_recipe(tmp_path, "train.steps=6", "train.learning_rate=1e-3"), resume=True)
    assert result.step == 6
    out = capsys.readouterr().out
    assert "changed since this run began: train.steps 4 -> 6" in out
    assert "train.learning_rate 0.005 -> 0.001" in out
    assert len(read_lines(result.folder / "metrics.jsonl")) == 6


def test_resuming_from_an_older_step_sets_the_newer_aside(tmp_path):
    train(small_recipe(tmp_path, "train.steps=6", checkpoint={"every": 2, "keep_last": 3}))
    trainer = Trainer(small_recipe(tmp_path, "train.steps=6"), resume=2)
    trainer.close()
    assert trainer.step == 2
    folder = tmp_path / "runs" / "small"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2]
    assert [c.step for c in list_checkpoints(folder / "checkpoints")] == [2]
    assert (folder / "checkpoints" / "step-00000006.abandoned").is_dir()


def test_other_data_are_refused_on_resume(tmp_path):
    train(small_recipe(tmp_path, "train.steps=2"))
    with pytest.raises(UserError, match="the data changed since the checkpoint"):
        train(small_recipe(tmp_path, "train.steps=4", "data.seq_len=40"), resume=True)


def test_a_corrupt_checkpoint_is_named(tmp_path):
    train(small_recipe(tmp_path, "train.steps=4", checkpoint={"every": 2}))
    file = tmp_path / "runs" / "small" / "checkpoints" / "step-00000004" / "tensors-00000-000.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(UserError, match=r"step-00000004 is corrupt .*train.resume=2"):
        train(small_recipe(tmp_path, "train.steps=6"), resume=True)
    assert train(small_recipe(tmp_path, "train.steps=6", "train.resume=2")).step == 6


def test_a_model_whose_checkpoints_are_gone_is_not_trained_anew(tmp_path):
    result = train(small_recipe(tmp_path, "train.steps=2"))
    shutil.rmtree(result.folder / "checkpoints")
    before = {file: file.read_bytes() for file in result.folder.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"model is a finished run's and no checkpoint is left .*name=small-2"):
        train(small_recipe(tmp_path, "train.steps=4"), resume=True)
    assert {file: file.read_bytes() for file in result.folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_goes_on_where_its_folder_is(tmp_path, monkeypatch, moved):
    """recipe.yaml may name another place: as seen from another folder, or before the run was moved."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    train(small_recipe(tmp_path, "train.steps=2", "output=runs"))
    folder = tmp_path / "here" / "runs" / "small"
    if moved:
        folder = folder.rename(tmp_path / "there" / "other")
    monkeypatch.chdir(tmp_path / "there")
    train_verb(str(folder), ["train.steps=3"], resume=True)
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
    assert not list(tmp_path.glob("there/runs"))
    train_verb(str(folder), ["train.steps=1", "output=new"], resume=True)  # words that name a place are obeyed
    assert len(list(tmp_path.glob("there/new/*/metrics.jsonl"))) == 1


def test_a_write_that_fails_leaves_the_recipe_of_the_run(tmp_path, monkeypatch):
    result = train(small_recipe(tmp_path, "train.steps=2"))
    before = (result.folder / "recipe.yaml").read_text()

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        train(small_recipe(tmp_path, "train.steps=4"), resume=True)
    assert (result.folder / "recipe.yaml").read_text() == before


# ---- stopping ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    recipe = small_recipe(tmp_path, "train.steps=100000", evaluation={"every": 0}, data={"validation": 0.0})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    command = [sys.executable, "-m", "trainwright", "train", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    metrics = tmp_path / "runs" / "small" / "metrics.jsonl"
    while len(read_lines(metrics)) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    step = read_lines(metrics)[-1]["step"]
    assert f"stopped by {number.name} after step {step}; resume with: trainwright train" in out
    assert "--resume" in out
    assert [c.step for c in list_checkpoints(metrics.parent / "checkpoints")] == [step]
    assert not (metrics.parent / "model").exists()
    trainer = Trainer(recipe, resume=True)
    trainer.close()
    assert trainer.step == step


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(tmp_path):
    trainer = Trainer(small_recipe(tmp_path, "train.steps=6", data={"validation": 0.5}, evaluation={"every": 3}))
    passes = []

    def look(module, args, kwargs):
        if not module.training and trainer.step == 3:
            passes.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    result = trainer.run()
    trainer.close()
    assert (result.stopped, result.step, len(passes)) == ("SIGTERM", 3, 1)
    assert [c.step for c in list_checkpoints(trainer.folder.checkpoints)] == [3]
    assert [line["step"] for line in read_lines(trainer.folder.evaluations)] == [0]
    assert train(small_recipe(tmp_path, "train.steps=6", data={"validation": 0.5}), resume=True).stopped is None


def poisoned(tmp_path, step, *overrides, backward=False):
    """A trainer whose second layer makes a NaN for one row at one step."""
    trainer = Trainer(small_recipe(tmp_path, *overrides, checkpoint={"every": 2}))
    inner = trainer.model.layers["1"].mlp.down_proj
    target = {"batch": None}

    def poison(module, args, out):
        if trainer.step + 1 != step or not torch.is_grad_enabled():
            return out
        target["batch"] = (target["batch"] or 0) + 1
        if target["batch"] % 2:  # of the two micro batches, the second
            return out
        factor = torch.ones(out.shape[0], 1, 1)
        factor[1] = float("inf")
        return Burst.apply(out, factor) if backward else out * factor

    inner.register_forward_hook(poison)
    return trainer


class Burst(torch.autograd.Function):
    """The identity, whose gradient bursts."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(factor)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def test_nan_stops_before_the_update_and_is_explained(tmp_path):
    trainer = poisoned(tmp_path, 4)
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    trainer.close()
    message = str(caught.value)
    assert message.startswith("step 4: the loss is nan; it came first from the output of layers.1.mlp.down_proj, ")
    assert "in row 3 of the global batch" in message
    assert "step-00000002 is the last good checkpoint" in message
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert [line["step"] for line in read_lines(trainer.folder.metrics)] == [1, 2, 3]
    assert [c.step for c in list_checkpoints(trainer.folder.checkpoints)] == [2]


def test_nan_of_a_gradient_is_found_in_the_backward_pass(tmp_path):
    trainer = poisoned(tmp_path, 3, backward=True)
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    trainer.close()
    message = str(caught.value)
    assert "step 3: a gradient is not finite; it came first from the backward pass between the output of" in message
    assert "and the output of layers.1.mlp" in message
    assert "in row 3 of" in message


def test_nan_can_be_skipped(tmp_path, capsys):
    trainer = poisoned(tmp_path, 4, "train.on_nonfinite=skip", "train.steps=6")
    result = trainer.run()
    trainer.close()
    lines = read_lines(trainer.folder.metrics)
    assert result.step == 6
    assert (lines[3]["loss"], lines[3]["skipped"]) == (None, True)
    assert all(line["loss"] is not None and "skipped" not in line for line in lines[:3] + lines[4:])
    assert "SKIPPED step 4: the loss is nan" in capsys.readouterr().out


def test_skipping_for_ever_does_not_help(tmp_path):
    trainer = Trainer(small_recipe(tmp_path, "train.on_nonfinite=skip", "train.steps=60"))
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the weight norm.weight, which held NaN .* 20 steps in a row"):
        trainer.run()
    trainer.close()


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path, monkeypatch, capsys):
    import trainwright.train.checkpoint as module

    trainer = Trainer(small_recipe(tmp_path, "train.steps=6", checkpoint={"every": 2}))
    real = module.write_chunks

    def fails_once(folder, rank, chunks):
        if trainer.step == 4:
            raise OSError(28, "No space left on device")
        return real(folder, rank, chunks)

    monkeypatch.setattr(module, "write_chunks", fails_once)
    assert trainer.run().step == 6
    trainer.close()
    assert "WARNING at step 4: the checkpoint could not be written" in capsys.readouterr().out
    assert [c.step for c in list_checkpoints(trainer.folder.checkpoints)] == [2, 6]


def test_a_stop_whose_checkpoint_fails_says_so(tmp_path, monkeypatch):
    import trainwright.train.checkpoint as module

    trainer = Trainer(small_recipe(tmp_path, "train.steps=6"))
    monkeypatch.setattr(module, "write_chunks", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    log = trainer.journal.step
    trainer.journal.step = lambda line: (log(line), os.kill(os.getpid(), signal.SIGTERM) if line["step"] == 2 else None)
    with pytest.raises(SaveError, match="there is no earlier one"):
        trainer.run()
    trainer.close()


# ---- refusing ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking.tracker=swanlab"], "pip install swanlab"),
        (["model.tokenizer=null"], "set model.tokenizer"),
        (["model.overrides.vocab_size=100", "model.overrides.pad_token_id=null"], "set model.overrides.vocab_size=320"),
        (["train.warmup=100"], "train.warmup=100 is longer than the run's 12 steps"),
        (["model.frozen=[nothing.*]"], "nothing.* matches no parameter"),
        (["model.frozen=['*']"], "nothing is trained"),
        (["train.gradient_accumulation_steps=null", "train.global_batch_size=5"], "use 4"),
        (["data.template=llama3"], "llama3"),
        (["train.resume=7"], "no checkpoint of step 7: there are none"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(tmp_path, overrides, message):
    with pytest.raises(UserError) as caught:
        train(small_recipe(tmp_path, *overrides))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    folder = tmp_path / "runs" / "small"
    assert not (folder / "metrics.jsonl").exists()


def test_an_output_that_cannot_be_written_is_said_before_the_data_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    recipe = small_recipe(tmp_path, f"output={tmp_path / 'file' / 'runs'}", "data.path=nothere.jsonl")
    with pytest.raises(UserError, match=r"nothing can be written in .*file: set output"):
        train(recipe)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # what another user's folder says
    with pytest.raises(UserError, match=r"nothing can be written in .*: set output"):
        train(small_recipe(tmp_path, "data.path=nothere.jsonl"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("hidden_size=-32", "which -8 dimensions are not"),
        ("hidden_size=1e9", "1000000000.0, not a whole number"),
        ("num_key_value_heads=3", "4 attention heads are no multiple of 3 key-value heads"),
        ("num_hidden_layers=0", "it has 0 layers"),
        ("rms_norm_eps=small", "eps is 'small', not a number"),
    ],
)
def test_a_config_that_no_model_has_is_refused_in_one_line(tmp_path, key, words):
    with pytest.raises(UserError, match=r"config\.json cannot be read as one of the family llama") as caught:
        train(small_recipe(tmp_path, f"model.config.{key}"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else_is_not_taken(tmp_path):
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.tex, which is no run's"):
        train(small_recipe(tmp_path))


def test_a_folder_where_nothing_was_finished_is_taken_again(tmp_path):
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    assert train(small_recipe(tmp_path, "train.steps=1")).step == 1


# ---- variations of the one loop ----


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_follow_thirty_two(tmp_path, precision):
    losses = {}
    for kind in ("fp32", precision):
        result = train(small_recipe(tmp_path, f"name={kind}", f"train.precision={kind}", data={"validation": 0.0}))
        losses[kind] = [line["loss"] for line in read_lines(result.folder / "metrics.jsonl") if line["loss"]]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]
        assert next(load_model(result.folder / "model").parameters()).dtype == dtype
    assert len(losses[precision]) >= 8
    assert losses[precision][-1] == pytest.approx(losses["fp32"][len(losses[precision]) - 1], rel=0.1)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_changes_no_number(tmp_path, mode):
    runs = [
        train(small_recipe(tmp_path, f"name={name}", f"parallel.recompute={name}", "train.steps=4"))
        for name in ("none", mode)
    ]
    lines = [[(line["loss"], line["grad_norm"]) for line in read_lines(run.folder / "metrics.jsonl")] for run in runs]
    assert lines[0] == lines[1]
    names = [sorted(json.loads((run.checkpoint / "index.json").read_text())) for run in runs]
    assert names[0] == names[1]


@pytest.mark.parametrize("length", ["epochs=1.0", "tokens=1000"])
def test_length_in_epochs_and_tokens(tmp_path, length):
    recipe = small_recipe(tmp_path, f"train.{length}", data={"validation": 0.0})
    trainer = Trainer(recipe)
    trainer.close()
    expected = -(-trainer.rows // 4) if "epochs" in length else -(-1000 // (4 * 48))
    assert trainer.total_steps == expected


def test_pretraining_on_plain_text(tmp_path):
    tmp_path.joinpath("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    recipe = small_recipe(tmp_path, "task=pretrain", data={"path": str(tmp_path / "text.txt"), "validation": 0.0})
    result = train(recipe)
    lines = read_lines(result.folder / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_frozen_parts_stay_and_are_not_saved(tmp_path):
    trainer = Trainer(small_recipe(tmp_path, "train.steps=3", model={"frozen": ["embed_tokens.*", "layers.0.*"]}))
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    result = trainer.run()
    trainer.close()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if n.startswith(("layers.1", "norm"))}
    index = json.loads((result.checkpoint / "index.json").read_text())
    assert {n.removeprefix("model.") for n in index if n.startswith("model.")} == moved


def test_weights_from_a_folder_are_those_that_train(finished, tmp_path):
    """Going on from the exported model begins at the loss where the run ended."""
    _, result = finished
    recipe = small_recipe(tmp_path, "train.steps=1")
    values = recipe.model_dump()
    values["model"] = {"path": str(result.folder / "model")}
    again = train(load_recipe(values))
    start = read_lines(again.folder / "evaluation.jsonl")[0]["loss"]
    assert start == pytest.approx(read_lines(result.folder / "evaluation.jsonl")[-1]["loss"], rel=1e-6)


def test_the_losses_are_those_of_transformers(tmp_path):
    """Five steps of AdamW with clipping on the same rows, by Hugging Face's model and torch's own functions."""
    transformers = pytest.importorskip("transformers")
    options = ["train.steps=5", "data.packing=false", "train.schedule=constant", "train.warmup=0"]
    trainer = Trainer(small_recipe(tmp_path, *options, data={"validation": 0.0}))
    from trainwright.model.checkpoint import save_model

    save_model(trainer.model, tmp_path / "start")
    batches = []
    take = trainer.take_step
    trainer.take_step = lambda rows, *rest: (batches.append(rows), take(rows, *rest))[1]
    trainer.run()
    trainer.close()
    ours = [line["loss"] for line in read_lines(trainer.folder.metrics)]
    norms = [line["grad_norm"] for line in read_lines(trainer.folder.metrics)]

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), eps=1e-8)
    theirs, their_norms = [], []
    for rows in batches:
        count = sum(int((batch.labels != -100).sum()) for batch in rows)
        total = 0.0
        for batch in rows:
            mask = (batch.document_ids >= 0).long() if batch.document_ids is not None else None
            logits = model(batch.input_ids, attention_mask=mask).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
        their_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(total)
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert norms == pytest.approx(their_norms, rel=1e-3)


def test_deterministic_runs_use_deterministic_kernels_only_and_repeat(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    monkeypatch.setattr(Trainer, "_greet", lambda self: seen.append(torch.are_deterministic_algorithms_enabled()))
    weights = []
    try:
        for number in (1, 2):
            result = train(small_recipe(tmp_path, f"name=run-{number}", "train.steps=3", "train.deterministic=true"))
            weights.append((result.model / "model.safetensors").read_bytes())
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        train(small_recipe(tmp_path, "name=plain", "train.steps=1"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True, True, False]
    assert weights[0] == weights[1]


def test_callable_from_python(tmp_path):
    import trainwright

    result = trainwright.train(
        trainwright.load_recipe(yaml.safe_load(to_yaml(small_recipe(tmp_path, "train.steps=1"))))
    )
    assert result.step == 1
    assert CONFIG["hidden_size"] == load_model(result.model).config.hidden_size
