"""The one loop: pretraining and fine-tuning, all weights and adapters, one process and a thousand.

Reads like the run: find the parts, restore, step until done, then evaluate, export and report. Arithmetic of a step is
in `step.py`, files of a checkpoint in `checkpoint.py`, what a run says in `journal.py`.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from trainwright.adapt.peft import write_adapter
from trainwright.data.loader import Batch, Loader
from trainwright.data.prepare import prepare
from trainwright.device import get_rng_state, peak_memory_gib, seed_everything, set_deterministic, set_rng_state
from trainwright.errors import UserError
from trainwright.model.kernels.flash import SERVED
from trainwright.model.kernels.flash import activate as newest_flash
from trainwright.parallel.layout import check_model
from trainwright.parallel.mesh import join_world
from trainwright.parallel.split import check_micro_batches, check_one_pass
from trainwright.parallel.stages import without_twins
from trainwright.parallel.watch import begin_watch
from trainwright.parallel.whole import WholeWeights
from trainwright.recipe.schema import Recipe
from trainwright.train.build import (
    adapt,
    build_costs,
    build_model,
    build_schedule,
    find_sources,
    find_template,
    micro_batches,
    total_steps,
)
from trainwright.train.checkpoint import Checkpoint, Checkpoints, SaveError, list_checkpoints
from trainwright.train.evaluate import HeldOut, Interrupted
from trainwright.train.export import export_model, stop_ids
from trainwright.train.graph import GraphedPasses, check_graph
from trainwright.train.in_backward import InBackward
from trainwright.train.journal import Journal
from trainwright.train.nonfinite import NonFinite, account, find_nonfinite
from trainwright.train.optimizer import build_optimizer
from trainwright.train.planned import accounted, fitted, predicted_beside_measured
from trainwright.train.report import write_report
from trainwright.train.run import RunResult, check_folder
from trainwright.train.signals import StopRequest
from trainwright.train.startup import Startup
from trainwright.train.step import LossScale, StepResult, TrainStep, finite_or_none
from trainwright.train.trackers import check_tracker

GARBAGE_STEPS = 100  # between collections: Python's own moments would stall one rank and so all


def train(recipe: Recipe, *, resume: bool | int | None = None, force: bool = False) -> RunResult:
    """Trains a recipe and returns what came of it; the run's folder holds everything.

    Args:
        resume: go on from the newest checkpoint (True) or from that of a step; default: what the recipe says.
        force: try also what the plan says cannot fit.

    Raises:
        UserError: the recipe, the data, the disk or the training itself need the user. Checkpoints stay.
    """
    trainer = Trainer(recipe, resume=resume, force=force)
    try:
        with accounted(trainer.plan, trainer.whereabouts):
            return trainer.run()
    except OSError as error:  # a disk that is full, or gone
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        fix = "mend that and go on with --resume"
        raise UserError(f"{trainer.whereabouts()}: {what}; {trainer.kept()}: {fix}") from error
    finally:
        trainer.close()


class Trainer:
    """A run and its parts. Made whole by the constructor, which also restores; `run` does the rest."""

    def __init__(self, recipe: Recipe, *, resume: bool | int | None = None, force: bool = False) -> None:
        self.startup = Startup()
        settings = recipe.train
        resume = settings.resume if resume is None else resume
        self.folder = check_folder(recipe, resume is not False)
        check_tracker(recipe.tracking.tracker)
        self.sources = adapt(find_sources(recipe.model, recipe.data.seq_len), recipe)
        self.tokenizer = self.sources.tokenizer
        self.template = find_template(recipe, self.tokenizer)
        set_deterministic(settings.deterministic)
        self.startup.done("tokenizer")
        self.world = join_world(recipe.parallel)
        self.startup.done("process group")
        if settings.cuda_graph:
            check_graph(self.world.device, alone=self.world.size == 1)
        self.recipe, self.plan = fitted(recipe, self.world, self.sources.config, force=force)
        check_model(
            self.world.layout,
            self.sources.config,
            recipe.data.seq_len,
            kv_replication=recipe.parallel.kv_replication,
        )
        self.watch = begin_watch(self.folder.ranks, self.world, recipe.parallel.timeout_minutes)
        seed_everything(settings.seed + self.world.data_rank)
        self._build_data()
        self.startup.done("data")
        with accounted(self.plan, lambda: "before the first step"):
            self._build_model(going_on=resume is not False and bool(list_checkpoints(self.folder.checkpoints)))
        self.nonfinite = NonFinite(settings.on_nonfinite)
        self.step = self.tokens = self.supervised_tokens = 0
        self.loss: float | None = None
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            self.world,
            keep_last=recipe.checkpoint.keep_last,
            keep_every=recipe.checkpoint.keep_every,
        )
        self.checkpoint: Checkpoint | None = None
        if resume is not False:
            self._restore(None if resume is True else resume)
        self.journal = Journal(self.folder, self.recipe, self.world, total_steps=self.total_steps, step=self.step)
        self.startup.done("optimizer and restore")

    def _build_data(self) -> None:
        """Rows, the loader over them, and from their number the length of the run."""
        recipe, world = self.recipe, self.world
        vocab_size = self.sources.config.vocab_size
        data = prepare(recipe, self.tokenizer, vocab_size=vocab_size, progress=world.is_main)
        self.rows = 0 if recipe.data.streaming else len(data.train)  # a stream's length is not known
        size, accumulation = micro_batches(recipe.train, world.layout)
        check_micro_batches(recipe.parallel.pp_schedule, world.layout.pp, accumulation)
        check_one_pass(recipe.train.optimizer_in_backward, accumulation)
        self.loader = Loader(
            data.train,
            micro_batch_size=size,
            rank=world.data_rank,
            world_size=world.layout.data_ranks,
            seed=recipe.train.seed,
            shuffle=recipe.data.shuffle,
            accumulation=accumulation,
            pin_memory=world.device.type != "cpu",
        )
        stops = stop_ids(self.tokenizer, self.template)
        self.held_out = HeldOut(data.validation, recipe.evaluation, world, self.tokenizer, stops)
        self.total_steps = total_steps(recipe.train, self.rows, self.loader.rows_per_step, recipe.data.seq_len)
        self.schedule = build_schedule(recipe.train, self.total_steps)

    def _build_model(self, going_on: bool) -> None:
        """The model in its layout, its optimizer, and the step that joins them."""
        settings, adapter = self.recipe.train, self.recipe.adapter
        self.adapter_began = self.folder.adapter_began if adapter is not None and adapter.from_base else None
        began = self.adapter_began if going_on else None
        self.model, spread = build_model(self.recipe, self.sources, self.world, self.startup.done, began=began)
        if self.adapter_began is not None and not going_on:  # before any step: a checkpoint is nothing without it
            whole = WholeWeights(self.model, self.world)
            write_adapter(self.model.config, whole, self.adapter_began, write=self.world.is_main)
        newer = newest_flash(self.world.device).name if self.model.attention_backend in SERVED else None
        self.spread_notes = spread.notes + ([f"attention: {newer}"] if newer else [])
        self.passes: Any = spread.pipeline or self.model  # what runs forward and backward; weights are the model's
        self.optimizers = build_optimizer(
            self.model,
            settings.optimizer,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            by_layer=settings.optimizer_in_backward,
        )
        self.loss_scale = LossScale(settings.precision == "fp16")
        self.take_step = TrainStep(
            self.passes,
            self.optimizers,
            self.world,
            max_grad_norm=settings.max_grad_norm,
            loss_scale=self.loss_scale,
            graphs=GraphedPasses(self.optimizers.parameters) if settings.cuda_graph else None,
            in_backward=InBackward(self.optimizers, self.world) if settings.optimizer_in_backward else None,
        )
        repeated = self.plan.speed.repeated
        self.costs = build_costs(self.recipe, self.sources.config, self.model, self.world, repeated)

    # ---- the run ----

    def whereabouts(self) -> str:
        """The step that is being taken, and by whom."""
        step = f"step {self.step + 1}"
        return f"rank {self.world.rank} of {self.world.size}, {step}" if self.world.size > 1 else step

    def kept(self) -> str:
        """What is left of the run if it ends now."""
        return (
            f"{self.checkpoint.path} is the last good checkpoint" if self.checkpoint else "no checkpoint was made yet"
        )

    def run(self) -> RunResult:
        """Trains to the end, or until a signal asks to stop; then the run's last files."""
        self._greet()
        with StopRequest() as stop:
            if self.step == 0:
                self._evaluate(stop, "before")
            ended = self._fit(stop) and self._evaluate(stop, "after")
        if not ended:
            again = f"trainwright train {self.folder.path} --resume"
            self.journal.say(f"stopped by {stop.name} after step {self.step}; resume with: {again}")
            return self._result(stopped=stop.name)
        self.watch.beat(self.step, "exporting")
        model = export_model(
            self.model,
            self.folder.adapter if self.recipe.adapter is not None else self.folder.model,
            self.tokenizer,
            self.template,
            base=self.recipe.model.path,
            precision=self.recipe.train.precision,
            world=self.world,
            began=self.adapter_began,
        )
        compared = predicted_beside_measured(self.plan, self.folder.metrics, self.world)
        if compared is not None:
            self.journal.say(f"planned and taken: {compared}")
        report = write_report(self.folder) if self.world.is_main else None
        self.journal.say(f"done: {model} is the model, {report} the report")
        return self._result(model=model, report=report)

    def _fit(self, stop: StopRequest) -> bool:
        """Steps until the run's end; False when a signal ended it, and then the last step is saved."""
        self.startup.done("first answers")
        with quiet_garbage():
            self.clock = time.perf_counter()
            while self.step < self.total_steps:
                batches = list(islice(self.loader, self.loader.accumulation))
                asked = self._one_step(batches, bool(stop))
                # The last step's is the one after training.
                if not asked and self.step < self.total_steps and self._due(self.recipe.evaluation.every):
                    asked = not self._evaluate(stop)
                if asked:
                    self._save()
                    return False
                if self._due(self.recipe.checkpoint.every) or self.step == self.total_steps:
                    self._save(may_fail=True)
                if self._due(GARBAGE_STEPS):
                    gc.collect(1)
        return True

    def _one_step(self, batches: list[Batch], stop_asked: bool) -> bool:
        """One optimizer step and its line; returns whether some rank was asked to stop."""
        self.watch.beat(self.step + 1, "training")
        rate = self.schedule.at(self.step)
        result = self.take_step(batches, rate, stop_asked)
        if result.finite:
            self.nonfinite.in_a_row = 0
        else:
            self._refused(result, batches)
        self.loss_scale.update(result.finite)
        self.step += 1
        self.tokens += result.tokens
        self.supervised_tokens += result.supervised_tokens
        self.loss = finite_or_none(result.loss)
        self._log(result, rate)
        if "first step" not in self.startup.phases:
            self.startup.first_step_done()
            self.journal.started(self.startup)
        return result.stop_asked

    def _refused(self, result: StepResult, batches: list[Batch]) -> None:
        """A step met NaN or infinity. An overflow of fp16 lowers the loss scale; anything else is looked into."""
        if math.isfinite(result.loss) and self.loss_scale.value > 1:
            return
        world, size = self.world, self.loader.micro_batch_size
        found = find_nonfinite(
            self.model,
            batches,
            loss_of=self.take_step.probe,
            row_number=lambda number, row: (number * world.layout.data_ranks + world.data_rank) * size + row,
        )
        what = f"the loss is {result.loss}" if not math.isfinite(result.loss) else "a gradient is not finite"
        line = account(self.step + 1, what, world.gather(found), self.kept())
        self.nonfinite.judge(line)
        self.journal.say(f"SKIPPED {line}")

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self, result: StepResult, rate: float) -> None:
        """The step's line, on screen, in metrics.jsonl and in every tracker."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        peak, reserved = peak_memory_gib(self.world.device)
        line: dict[str, Any] = {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": finite_or_none(result.grad_norm),
            "lr": rate,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            **self.costs.figures(result.tokens, self.loader.rows_per_step, seconds),
            "peak_memory_gib": peak,
            "reserved_memory_gib": reserved,
            "data_wait_seconds": self.loader.take_wait_seconds(),
        }
        if not result.finite:
            line["skipped"] = True
        self.journal.step(line)

    def _evaluate(self, stop: StopRequest, when: str | None = None) -> bool:
        """The held-out loss; `before` and `after` training also answers. False: a signal cut it short."""

        def asked() -> bool:
            self.watch.beat(self.step, "evaluating")
            return any(self.world.gather(bool(stop)))

        try:
            figures: dict[str, Any] = self.held_out.loss(self.passes, self.loader.micro_batch_size, asked)
            if figures:
                self.journal.evaluation({"step": self.step, **figures})
            if when is not None:
                answers = self.held_out.answers(self.passes, asked)
                self.journal.answers(when, {"step": self.step, **figures}, answers)
        except Interrupted:
            return False
        finally:
            self.clock = time.perf_counter()
        return True

    # ---- checkpoints ----

    def _save(self, may_fail: bool = False) -> None:
        """A checkpoint of this step. One that may fail costs a warning, and the run goes on with the one before."""
        self.watch.beat(self.step, "saving a checkpoint")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "loader": self.loader.state_dict(),
            "loss_scale": self.loss_scale.state(),
            "layout": str(self.world.layout),
            "ranks": self.world.size,
        }
        try:
            path = self.checkpoints.save(self.step, self._tensors(), state, get_rng_state(self.world.device))
            self.checkpoint = Checkpoint(self.step, path)
        except SaveError as error:
            kept = f"{self.checkpoint.path} is kept" if self.checkpoint else "there is no earlier one"
            if not may_fail:
                raise SaveError(f"{error}; {kept}") from None
            self.journal.say(f"WARNING at step {self.step}: {error}; {kept}, training goes on")
        self.clock = time.perf_counter()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything of a checkpoint that is a tensor and has a layout: what is trained, and its states."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.named_parameters() if tensor.requires_grad}
        states = {f"optimizer.{name}": tensor for name, tensor in self.optimizers.state_tensors().items()}
        return without_twins(self.model, weights | states)[0]

    def _restore(self, step: int | None) -> None:
        """Puts the run back to a checkpoint; without any, it starts from its beginning."""
        found = self.checkpoints.find(step)
        if found is None:
            return
        self.optimizers.create_states()
        state = self.checkpoints.load(found, self._tensors())
        self._copy_twins()
        self.loader.load_state_dict(state["loader"])
        self.loss_scale.restore(state["loss_scale"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.supervised_tokens = state["supervised_tokens"]
        self.checkpoints.set_aside_after(self.step)
        self.checkpoint = found
        random = self.checkpoints.random_numbers(found)
        if random is not None:
            set_rng_state(random, self.world.device)
        else:  # a rank that the run did not have before
            seed_everything(self.recipe.train.seed + self.world.data_rank + self.step)

    def _copy_twins(self) -> None:
        """What this rank holds twice is stored once."""
        everything = dict(self.model.named_parameters()) | self.optimizers.state_tensors()
        with torch.no_grad():
            for original, twin in without_twins(self.model, everything)[1]:
                twin.copy_(original)

    # ---- small parts ----

    def _greet(self) -> None:
        """What runs, in one line, and what may surprise."""
        rows, say = self.loader.rows_per_step, self.journal.say
        say(
            f"{self.folder.path}: {self.sources.config.num_parameters():,} parameters, {self.total_steps} steps of "
            f"{rows} rows x {self.recipe.data.seq_len} tokens, {self.world.layout} on {self.world.device.type}"
        )
        for note in self.spread_notes:
            say(note)
        if self.checkpoint is not None:
            say(f"resumed after step {self.step} from {self.checkpoint.path}")
        for change in self.journal.changed:
            say(f"changed since this run began: {change}")
        if rows > self.rows > 0:
            say(f"NOTE: the data have {self.rows} rows, so some come more than once in a step of {rows}")

    def _result(self, **more: Any) -> RunResult:
        return RunResult(
            folder=self.folder.path,
            step=self.step,
            total_steps=self.total_steps,
            loss=self.loss,
            evaluation=self.journal.evaluated,
            checkpoint=self.checkpoint.path if self.checkpoint else None,
            **more,
        )

    def close(self) -> None:
        """Ends threads and files, also after an error."""
        self.watch.close()
        self.loader.close()
        self.journal.close()


@contextmanager
def quiet_garbage() -> Iterator[None]:
    """Python's collector off, and what lives by now out of its sight."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
