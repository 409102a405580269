"""Generation and conversations: with a real model, and with a tiny one that speaks bytes."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from trainwright.chat import Sampling, Speaker, converse, generate_text
from trainwright.data.template import load_template
from trainwright.data.tokenizer import load_tokenizer
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config, load_model, save_model
from trainwright.model.transformer import Transformer

SHAPE = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with random weights and the byte tokenizer: it says noise, in bytes that need not be UTF-8."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = Transformer(load_config(SHAPE))
    model.init_weights(seed=1)
    with torch.no_grad():  # weights wide enough that it does not say one byte for ever
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    save_model(model, folder)
    load_tokenizer("byte").save(folder)
    return folder


def test_a_tokenizer_that_the_model_is_too_small_for(tmp_path, monkeypatch):
    """Of any kind: load_model itself reads the ids of a tokenizer.json only, which it does not here."""
    monkeypatch.setattr("trainwright.model.folder.check_tokenizer", lambda *_: None)
    save_model(Transformer(load_config(SHAPE | {"vocab_size": 200})).init_weights(), tmp_path / "model")
    load_tokenizer("byte").save(tmp_path / "model")
    with pytest.raises(UserError, match=r"ids up to 264, the model's vocab_size is 200"):
        Speaker.load(tmp_path / "model")


@pytest.fixture(scope="module")
def real(smollm2) -> Speaker:
    return Speaker.load(smollm2)


@pytest.mark.slow
def test_a_real_model_answers(real):
    speaker = real
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    sampling = Sampling(max_new_tokens=12)
    pieces = list(speaker.stream(asked, sampling))
    assert "".join(pieces) == "The capital of France is Paris."
    assert len(pieces) > 4
    raw = "One, two, three,"
    both = speaker.answers([asked, raw, asked], sampling)
    assert both == ["The capital of France is Paris.", "".join(speaker.stream(raw, sampling)), both[0]]
    assert "four" in both[1]


@pytest.mark.slow
def test_a_real_conversation_remembers(real):
    lines = iter(["Name one fruit.", "Name one more.", "/reset", "Name one more.", "/exit"])
    shown: list[str] = []
    converse(real, lambda: next(lines), shown.append, Sampling(max_new_tokens=16))
    before, after = "".join(shown).split("(the conversation starts anew)\n")
    first, second = before.splitlines()
    assert len({first, second, after.strip()}) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streams_batches_and_seeds_agree(tiny, temperature):
    speaker = Speaker.load(tiny)
    sampling = Sampling(max_new_tokens=20, temperature=temperature, top_p=0.9, top_k=50, seed=3)
    asked = [{"role": "user", "content": "你好"}]
    streamed = "".join(speaker.stream(asked, sampling))
    assert [streamed] == speaker.answers([asked], sampling)
    assert streamed == "".join(Speaker.load(tiny).stream(asked, sampling))
    if temperature:
        assert streamed != "".join(speaker.stream(asked, replace(sampling, seed=4)))
    else:
        prompts = [asked, [{"role": "user", "content": "a much longer question"}], "raw"]
        assert speaker.answers(prompts, sampling) == ["".join(speaker.stream(p, sampling)) for p in prompts]


def test_characters_of_several_tokens_come_whole(tiny, monkeypatch):
    speaker = Speaker.load(tiny)
    text = "né 你好 😀!"
    steps = [torch.tensor([byte]) for byte in [*text.encode(), 0xE4, speaker.tokenizer.eos_id]]
    monkeypatch.setattr("trainwright.chat.generate", lambda *_, **__: iter(steps))
    pieces = list(speaker.stream("x", Sampling()))
    assert pieces == [*text, "\ufffd"]


def test_converse(tiny, monkeypatch):
    """What is kept of a conversation: questions and answers, without the system message twice."""
    speaker = Speaker.load(tiny)
    asked: list[list[dict]] = []

    def stream(messages, sampling):
        asked.append([*messages, sampling.seed])
        yield "an "
        if len(asked) == 2:
            raise KeyboardInterrupt
        if len(asked) == 3:
            raise UserError("too long: /reset")
        yield "answer"

    monkeypatch.setattr(speaker, "stream", stream)
    lines = iter(["one", "", "two", "three", "/help", "/system Be brief.", "four", "/reset", "five"])
    shown: list[str] = []

    def read():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(speaker, read, shown.append, Sampling(seed=5), system="Be long.")
    roles = [[message["role"] for message in turn[:-1]] for turn in asked]
    assert roles[:3] == [["system", *["user", "assistant"] * turn, "user"] for turn in range(3)]
    assert asked[1][2] == {"role": "assistant", "content": "an answer"}
    assert asked[2][4] == {"role": "assistant", "content": "an "}
    assert [turn[-1] for turn in asked] == [5, 6, 7, 7, 8]
    assert asked[3][0]["content"] == asked[4][0]["content"] == "Be brief."
    assert len(asked[3]) == len(asked[4]) == 3
    assert "(too long: /reset)" in "".join(shown)
    assert "/exit leaves" in "".join(shown)


def test_generate_text(tiny):
    sampling = Sampling(max_new_tokens=5)
    answers = generate_text(tiny, ["a", "b"], sampling=sampling)
    assert len(answers) == 2
    assert generate_text(tiny.parent, ["a"], sampling=sampling) == answers[:1]  # a run's folder holds model/
    assert generate_text(tiny, ["a"], system="x", sampling=sampling) != generate_text(tiny, ["a"], raw=True)


def test_an_adapter_speaks_with_its_base(tiny, tmp_path):
    from trainwright.adapt.merge import merge_adapter
    from trainwright.adapt.peft import adapters_of, save_adapter
    from trainwright.adapt.rewrite import adapted_config
    from trainwright.model.checkpoint import load_weights
    from trainwright.recipe.model import AdapterRecipe

    model = Transformer(adapted_config(load_config(tiny), AdapterRecipe(rank=4)))
    load_weights(model, tiny)
    generator = torch.Generator().manual_seed(0)
    for module in adapters_of(model).values():
        for part in (module.lora_a, module.lora_b):
            torch.nn.init.normal_(part, std=0.3, generator=generator)
    run = tmp_path / "run"
    save_adapter(model, run / "adapter", base=str(tiny))
    merge_adapter(run / "adapter", tmp_path / "merged")
    load_tokenizer("byte").save(tmp_path / "merged")
    sampling = Sampling(max_new_tokens=12)
    spoken = generate_text(run, ["a"], sampling=sampling)
    assert spoken == generate_text(run / "adapter", ["a"], sampling=sampling)
    assert spoken == generate_text(tmp_path / "merged", ["a"], sampling=sampling)
    assert spoken != generate_text(tiny, ["a"], sampling=sampling)
    with pytest.raises(UserError, match="no-such-base"):
        Speaker.load(run, base=str(tmp_path / "no-such-base"))


def test_context_and_options_have_limits(tiny):
    speaker = Speaker.load(tiny)
    with pytest.raises(UserError, match=r"the prompt has 100 tokens, the model takes 1 to 63: shorten it"):
        speaker.answers(["x" * 100], Sampling())
    assert len(speaker.answers(["x" * 60], Sampling(max_new_tokens=50))[0].encode("utf-8", "replace")) <= 4 * 3
    with pytest.raises(UserError, match="1 to 63"):
        speaker.answers([""], Sampling())
    with pytest.raises(UserError, match="max_new_tokens=0"):
        Sampling(max_new_tokens=0)
    with pytest.raises(UserError, match="temperature=-1"):
        Sampling(temperature=-1)
    plain = Speaker(speaker.model, speaker.tokenizer, None)
    with pytest.raises(UserError, match="no chat template"):
        plain.prompt([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "wrong", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": float("nan")}, {"seed": 2**70}]
)
def test_sampling_takes_numbers_only(wrong):
    with pytest.raises(UserError, match="use "):
        Sampling(**wrong)


def test_stop_ids_come_from_every_place(tiny):
    speaker = Speaker(load_model(tiny), load_tokenizer("byte"), load_template("chatml", load_tokenizer("byte")))
    tokenizer = speaker.tokenizer
    assert set(speaker.stop_ids) >= {tokenizer.eos_id, tokenizer.token_id("<|im_end|>")}


def test_commands(tiny):
    import typer

    from trainwright.cli.chat import chat, generate

    app = typer.Typer()
    app.command("chat")(chat)
    app.command("generate")(generate)
    run = CliRunner().invoke
    once = run(app, ["generate", str(tiny), "--prompt", "hi", "--max-new-tokens", "4"])
    assert once.exit_code == 0, once.output
    many = run(app, ["generate", str(tiny), "--prompt", "hi", "--prompt", "yo", "--max-new-tokens", "4", "--json"])
    rows = [json.loads(line) for line in many.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["hi", "yo"]
    assert rows[0]["answer"] == once.stdout.rstrip("\n")
    talked = run(app, ["chat", str(tiny), "--max-new-tokens", "4"], input="hi\n/exit\n")
    assert talked.exit_code == 0, talked.output
    assert "you >" in talked.stdout
    bad = run(app, ["generate", str(tiny), "--prompt", "hi", "--raw", "--system", "x"])
    assert isinstance(bad.exception, UserError)
    assert isinstance(run(app, ["chat", str(tiny), "--dtype", "int8"]).exception, UserError)
    assert isinstance(run(app, ["chat", str(tiny), "--template", "llama3"]).exception, UserError)
