"""The small parts of a run: journal files, trackers, what is asked, what a token costs, what a person sees."""

import json
import math
import signal
import sys
import time
import types

import pytest
import torch

from tests.train.tiny import Output, Rows
from trainwright.data.loader import Batch
from trainwright.data.tokenizer import byte_tokenizer
from trainwright.errors import UserError
from trainwright.model.checkpoint import load_config
from trainwright.parallel.layout import Layout
from trainwright.parallel.mesh import World
from trainwright.train.display import Display, clock
from trainwright.train.evaluate import answer_questions, exact_match, held_out_loss, questions_in
from trainwright.train.metrics import Costs, JsonLines, read_lines
from trainwright.train.nonfinite import Finding, account
from trainwright.train.signals import StopRequest
from trainwright.train.step import to_inputs
from trainwright.train.trackers import check_tracker, open_trackers

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64,
}  # fmt: skip


def test_lines_beyond_the_step_go_and_so_does_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = JsonLines(path, keep_until=2)
    lines.write({"step": 3, "loss": 0.5})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]  # flushed without a close
    lines.close()


class Service(types.ModuleType):
    """Stands for a tracking service: keeps what it is told."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        self.started: dict = {}
        self.lines: list = []
        self.ended = False

    def init(self, **options):
        self.started = options

    def log(self, figures, step):
        self.lines.append((step, figures))

    def finish(self):
        self.ended = True


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_trackers_are_told_everything(name, tmp_path, monkeypatch):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    check_tracker(name)
    trackers = open_trackers(
        tmp_path, "small", "ab12", tensorboard=False, tracker=name, project="p", settings={"a": 1}, step=0
    )
    trackers[0].log(3, {"train/loss": 0.5})
    trackers[0].close()
    assert service.started["project"] == "p"
    assert service.started["config"] == {"a": 1}
    assert "ab12" in str(service.started)
    assert service.lines == [(3, {"train/loss": 0.5})]
    assert service.ended


def test_a_service_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    service = Service("wandb")
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(
        service, "init", lambda **options: (_ for _ in ()).throw(RuntimeError("api_key\nnot configured"))
    )
    with pytest.raises(UserError, match=r"tracking.tracker=wandb did not start .*api_key not configured.*: log in"):
        open_trackers(tmp_path, "n", "i", tensorboard=False, tracker="wandb", project="p", settings={}, step=0)


def test_no_tracker_is_imported_unless_named(tmp_path):
    assert open_trackers(tmp_path, "n", "i", tensorboard=False, tracker=None, project="p", settings={}, step=0) == []
    assert not {"wandb", "trackio", "swanlab"} & set(sys.modules)


def test_tensorboard_forgets_what_a_resume_writes_anew(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(first, last, step):
        options = {"tensorboard": True, "tracker": None, "project": "p", "settings": {}, "step": step}
        (tracker,) = open_trackers(tmp_path, "n", "i", **options)
        for number in range(first, last + 1):
            tracker.log(number, {"train/loss": first + number / 100})
        tracker.close()

    run(1, 6, 0)
    time.sleep(
        1
    )  # files are read in the order of their names: the second, then the writer's number as text, 10 before 9
    run(4, 8, 3)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = events.Scalars("train/loss")
    assert [event.step for event in found] == list(range(1, 9))
    assert [round(event.value) for event in found] == [1, 1, 1, 4, 4, 4, 4, 4]


def test_questions_are_cut_out_of_packed_rows():
    end, pad = 258, 256
    # Document 0: prompt 1 2, answer 3 end. Document 1: two turns, 4 -> 5 end, then 6 7 -> 8 9 end. Document 2: cut off.
    ids = torch.tensor([[1, 2, 3, end, 4, 5, end, 6, 7, 8, 9, end, 10, 11, 12, pad]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, -1]], dtype=torch.int32)
    labels = torch.full_like(ids, -100)
    for at in (1, 2, 4, 5, 8, 9, 10, 12, 13):
        labels[0, at] = ids[0, at + 1]
    found = list(questions_in(Batch(ids, labels, torch.zeros_like(ids), documents), [end]))
    assert [(q.prompt, q.answer) for q in found] == [((1, 2), (3,)), ((4, 5, end, 6, 7), (8, 9))]


def test_answers_are_compared_as_text():
    """A model that always says the next byte: its answers are cut at the end token and compared."""
    from trainwright.train.evaluate import Question

    class Counter(torch.nn.Module):
        """Says one more than the last token, modulo the end."""

        config = load_config(LLAMA)
        device = CPU

        def positions(self, ids, documents=None):
            return torch.arange(ids.shape[1])[None]

        def forward(self, ids, mask=None, *, position_ids=None, cache=None, logits_to_keep=0):
            if cache is not None:
                cache.layer("0").append(torch.zeros(*ids.shape, 1, 1), torch.zeros(*ids.shape, 1, 1))
            following = torch.where(ids[:, -1:] >= ord("d"), 258, ids[:, -1:] + 1)
            return torch.nn.functional.one_hot(following, 300).float()

    tokenizer = byte_tokenizer()
    prompts = [b"xa", b"b", b"zzzc"]
    questions = [
        Question(tuple(prompt), tuple(answer)) for prompt, answer in zip(prompts, [b"bcd", b"c", b" d "], strict=True)
    ]
    answers = answer_questions(Counter(), questions, tokenizer, stop_ids=[258], max_new_tokens=8)
    assert [(a.question, a.given, a.exact) for a in answers] == [
        ("xa", "bcd", True),
        ("b", "cd", False),
        ("zzzc", "d", True),
    ]
    assert exact_match(answers) == pytest.approx(2 / 3)
    assert exact_match([]) is None


def test_the_held_out_loss_is_no_mean_of_means():
    class Fixed(torch.nn.Module):
        def forward(self, input_ids, labels=None, **rest):
            count = (labels != -100).sum()
            return Output(count * input_ids[0, 0].float(), count, torch.zeros(()))

    def batch(loss, count):
        ids = torch.full((1, 8), loss)
        labels = torch.where(torch.arange(8) < count, 1, -100)[None]
        return Rows(ids, labels, ids, None)

    figures = held_out_loss(Fixed(), [batch(1, 1), batch(5, 7)], World(0, Layout(), CPU))
    assert figures["loss"] == pytest.approx((1 + 35) / 8)
    assert figures["supervised_tokens"] == 8


def test_a_held_out_loss_that_is_no_number_is_null():
    class Broken(torch.nn.Module):
        def forward(self, input_ids, labels=None, **rest):
            return Output(torch.tensor(math.nan), torch.tensor(1), torch.zeros(()))

    ids = torch.ones((1, 8), dtype=torch.long)
    figures = held_out_loss(Broken(), [Rows(ids, ids, ids, None)], World(0, Layout(), CPU))
    assert figures == {"loss": None, "perplexity": None, "supervised_tokens": 1}


def test_whole_rows_ask_for_no_document_mask():
    ids = torch.ones(2, 4, dtype=torch.int64)
    whole = Rows(ids, ids, ids, torch.tensor([[0] * 4, [3] * 4], dtype=torch.int32))
    packed = Rows(ids, ids, ids, torch.tensor([[0, 0, 1, 1], [0, 0, 0, -1]], dtype=torch.int32))
    assert set(to_inputs(whole, CPU)) == {"input_ids", "labels"}
    inputs = to_inputs(packed, CPU)
    assert inputs["cu_seqlens"].tolist() == [0, 2, 4, 7, 8]
    assert inputs["max_seqlen"] == 3
    padded = Rows(ids, ids, ids, torch.full((2, 4), -1, dtype=torch.int32))
    assert "document_ids" in to_inputs(padded, CPU)


def test_costs_follow_the_convention():
    config = load_config(LLAMA)
    count, attention = config.num_parameters(), 12 * 3 * 64 * 32
    options = {"peak_flops": 1e12, "gpus": 2}
    full = Costs.of(config, 32, trained_parameters=count, repeated=0.0, **options)
    assert full.flops_per_token == full.hardware_flops_per_token == 6 * count + attention
    figures = full.figures(tokens=1000, rows=10, seconds=0.5)
    assert figures["tokens_per_second_per_gpu"] == 1000
    assert figures["samples_per_second"] == 20
    assert figures["mfu"] == pytest.approx(1000 * full.flops_per_token / 1e12)
    again = Costs.of(config, 32, trained_parameters=count, repeated=1.0, **options)
    blocks = sum(block.num_parameters() for block in config.layers)
    assert again.hardware_flops_per_token - again.flops_per_token == pytest.approx(2 * blocks + attention / 3)
    adapter = Costs.of(config, 32, trained_parameters=1000, repeated=0.0, **options)
    assert adapter.flops_per_token == 4 * count + 2 * 1000 + attention
    assert (
        Costs.of(config, 32, trained_parameters=count, repeated=0.0, peak_flops=None, gpus=1).figures(1, 1, 1)["mfu"]
        is None
    )


def test_an_account_is_one_line_with_rows_of_all_ranks():
    line = account(
        7, "the loss is nan", [None, Finding("the output of x", [5, 2]), Finding("the output of x", [9])], "kept"
    )
    assert line.startswith(
        "step 7: the loss is nan; it came first from the output of x, in row 2, 5, 9 of the global batch"
    )
    assert "hints at the hardware" in account(7, "the loss is nan", [None], "kept")
    many = account(1, "x", [Finding("y", list(range(20)))], "kept")
    assert "0, 1, 2, 3, 4, 5, 6, 7 and 12 more" in many


def test_signals_are_remembered_and_a_second_interrupt_is_not_swallowed():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


LINE = {"step": 3, "loss": 1.25, "step_seconds": 2.0, "tokens_per_second_per_gpu": 1234.5, "mfu": 0.4}


def test_a_log_gets_plain_lines(capsys):
    display = Display(silent=False, total=10)
    display.step(3, LINE)
    display.close()
    assert capsys.readouterr().out == "step 3/10  loss 1.2500  1,234 tokens/s/GPU  ETA 0:14  MFU 40.0%\n"


def test_other_ranks_are_silent(capsys):
    display = Display(silent=True, total=10)
    display.step(3, LINE)
    display.say("hello")
    display.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "0:05"), (95.4, "1:35"), (3700, "1:01:40"), (2 * 86400 + 3600, "2d 1:00:00")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_report_of_a_run_with_nothing_yet(tmp_path):
    """The page can be made of a run at any moment."""
    from trainwright.train.report import write_report
    from trainwright.train.run import RunFolder

    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / "environment.json").write_text(json.dumps({"trainwright": "0"}))
    assert "<svg" not in write_report(RunFolder(tmp_path)).read_text()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**LINE, "grad_norm": None, "lr": 1e-3, "tokens": 5}) + "\n")
    assert "<svg" in write_report(RunFolder(tmp_path)).read_text()
