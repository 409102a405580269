"""The main road, end to end: the two recipes that run anywhere, from recipe to a model that transformers loads."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainwright
from trainwright.chat import Sampling, generate_text
from trainwright.train.metrics import read_lines


def answers_of_transformers(folder, questions, max_new_tokens):
    """What transformers says to each question, greedy, in the folder's own template."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for question in questions:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_learns_and_its_model_answers_alike_in_transformers(tmp_path):
    recipe = trainwright.load_recipe("quickstart", [f"output={tmp_path}"])
    result = trainwright.train(recipe)
    before, after = (json.loads((result.folder / "answers.json").read_text())[when] for when in ("before", "after"))
    assert before["exact_match"] < 0.1
    assert after["exact_match"] > 0.5
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "report.html", "loss.png", "model/config.json"):
        assert (result.folder / name).stat().st_size, name
    questions = ["Tom has 7 pens and buys 5 more. How many now?", "小明有9个苹果,送出4个,还剩几个?"]
    ours = generate_text(result.folder, questions, sampling=Sampling(max_new_tokens=8))
    assert ours == answers_of_transformers(result.folder / "model", questions, 8)


@pytest.mark.slow
def test_smollm2_trains_on_real_weights_and_its_export_has_equal_logits(smollm2, tmp_path):
    overrides = [
        f"model.path={smollm2}", f"output={tmp_path}", "train.steps=10", "data.path=shipped:arithmetic?rows=400",
        "data.seq_len=128", "train.micro_batch_size=2", "data.validation=0.05", "evaluation.generate=0",
        "train.precision=fp32",
    ]  # fmt: skip
    result = trainwright.train(trainwright.load_recipe("smollm2_135m/sft", overrides))
    assert len(read_lines(result.folder / "metrics.jsonl")) == 10
    before, after = (line["loss"] for line in read_lines(result.folder / "evaluation.jsonl"))
    assert after < 0.9 * before
    ids = torch.randint(0, 40_000, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = trainwright.load_model(result.folder / "model", dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(result.folder / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4
