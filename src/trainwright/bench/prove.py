"""Does this recipe compute in its layout what it computes on one process? Short real runs, compared.

Every run is `trainwright train` itself on the recipe's own model and data, made short, deterministic and constant in
its learning rate; all take the same rows in the same order:

    plain          one process, nothing split                           the reference
    layout         the recipe's layout on N processes                   losses and gradient norms
    accumulation   one process, the micro batches cut or joined         losses
    packing        packed rows against each document on its own         loss of the trained model
    resume         the layout again, from its checkpoint halfway        bit for bit
    resume, plain  one process, from the layout's checkpoint halfway    losses
    export         the layout's model or adapter folder, loaded         loss of the next rows, as the plain run saw it

Owns these runs, the bounds and the verdicts. What a layout does wrong when a check fails, the figures say and no more.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainwright.errors import UserError
from trainwright.parallel.layout import Layout
from trainwright.recipe.load import load_recipe
from trainwright.recipe.schema import Recipe
from trainwright.recipe.show import to_yaml


@dataclass(frozen=True)
class Bounds:
    """Largest relative differences that rounding explains."""

    loss: float
    grad_norm: float


# Sums in another order: float32 rounds at 6e-8, and a few steps of Adam carry it on. In 16 bits half a percent at every
# step, which is what published tests of parity allow.
BOUNDS = {"fp32": Bounds(1e-5, 1e-4), "bf16": Bounds(5e-3, 5e-2), "fp16": Bounds(5e-3, 5e-2)}


@dataclass(frozen=True)
class Check:
    """One line of the proof. `difference` None: not compared, `what` says why; a bound of 0 is bit for bit."""

    name: str
    what: str
    difference: float | None = None
    bound: float = 0.0

    @property
    def holds(self) -> bool:
        return self.difference is None or self.difference <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """For --json: a difference that is not finite is null."""
        shown = self.difference if self.difference is not None and math.isfinite(self.difference) else None
        return {**asdict(self), "difference": shown, "compared": self.difference is not None, "holds": self.holds}


class RunFailed(Exception):
    """A run of the proof ended badly; its last line says why."""


def processes_needed(recipe: Recipe, available: int) -> int:
    """How many processes the layout takes by default: all GPUs that it divides, else its own product, 2 at least."""
    part = recipe.parallel
    product = part.pp * part.dp_replicate * part.cp * part.tp
    product *= part.ep // math.gcd(part.ep, part.cp)  # experts live on dp_shard x cp ranks
    if available >= product and available % product == 0 and available > 1:
        return available
    return product if product > 1 else 2


class Proof:
    """The runs of one proof, under `folder`."""

    def __init__(self, recipe: Recipe, processes: int, folder: Path, *, steps: int, precision: str) -> None:
        if steps < 2:
            raise UserError(f"--steps {steps}: resuming halfway needs at least 2")
        self.steps, self.processes, self.folder = steps, processes, folder
        self.bounds = BOUNDS[precision]
        self.layout = Layout.of(recipe.parallel, processes)
        size = recipe.train.micro_batch_size
        if not isinstance(size, int):
            raise UserError("train.micro_batch_size=auto differs from layout to layout: give prove a number of rows")
        accumulation = self.layout.accumulation(
            size, recipe.train.global_batch_size, recipe.train.gradient_accumulation_steps
        )
        self.rows = size * accumulation * self.layout.data_ranks
        self.micro_batch = size
        self.recipe = short(recipe, folder, steps=steps, rows=self.rows, precision=precision)

    def checks(self, said: Callable[[str], None] = lambda line: None) -> Iterator[Check]:
        """Every check as it is made. Raises UserError for a recipe that does not train even plainly."""
        plain = {"parallel": {}, "train": {"steps": self.steps + 1}}
        half = {"checkpoint": {"every": self.steps // 2, "keep_last": self.steps}}
        said(f"{self.steps} steps of {self.rows} rows on one process")
        try:
            reference = self._train("plain", plain, 1)
        except RunFailed as error:
            raise UserError(f"the recipe does not train on one process: {error}") from None
        said(f"the same in {self.layout} on {self.processes} processes")
        try:
            found = self._train("layout", half, self.processes)
        except RunFailed as error:
            yield Check("layout", str(error), math.inf)
            return
        where = f"{self.layout}, ZeRO {self.layout.zero}, {self.processes} processes, {self.steps} steps"
        yield self._compare("layout: loss", where, found, reference, "loss")
        yield self._compare("layout: gradient norm", where, found, reference, "grad_norm")
        yield self._accumulation(reference, said)
        yield from self._resume(found, reference, said)
        said("the exported model on the next rows")
        yield from self._model_checks(reference)

    # ---- single checks ----

    def _accumulation(self, reference: Mapping[int, Mapping[str, Any]], said: Callable[[str], None]) -> Check:
        """The same rows in other micro batches."""
        other = self.micro_batch * 2 if self.rows % (self.micro_batch * 2) == 0 else 1
        if other == self.micro_batch:
            return Check("accumulation", f"a step of {self.rows} rows has one way to be cut only")
        what = f"micro batches of {other} rows instead of {self.micro_batch}"
        said(what)
        change: dict[str, Any] = {"parallel": {}, "train": {"steps": self.steps, "micro_batch_size": other}}
        return self._against("accumulation: loss", what, "accumulation", change, 1, reference)

    def _resume(
        self, found: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]], said: Any
    ) -> Iterator[Check]:
        """From the layout's checkpoint halfway: in the same layout, and on one process."""
        at = self.steps // 2
        said(f"resumed after step {at}, in the layout and on one process")
        plain: dict[str, Any] = {"parallel": {}}
        for name, change, count in (("resumed", {}, self.processes), ("resumed-plain", plain, 1)):
            self._copy_until(at, name)
            label = "resume: loss" if count > 1 else "resume on one process: loss"
            what = f"from the checkpoint of step {at} to step {self.steps}"
            if count > 1:
                yield self._against(label, what, name, change, count, found, bound=0.0, resume=True)
            else:
                yield self._against(label, what, name, change, count, reference, resume=True)

    def _copy_until(self, step: int, name: str) -> None:
        """A run's folder as it was after `step`."""
        target = self.folder / name
        shutil.copytree(self.folder / "layout", target)
        for later in (target / "checkpoints").iterdir():
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        for made in ("model", "adapter"):
            shutil.rmtree(target / made, ignore_errors=True)

    def _model_checks(self, reference: Mapping[int, Mapping[str, Any]]) -> Iterator[Check]:
        """The layout's model or adapter folder, loaded into this process."""
        run = self.folder / "layout"
        folder = next((run / name for name in ("model", "adapter") if (run / name).is_dir()), None)
        if folder is None:
            yield Check("export", "the layout's run wrote no model", math.inf)
            return
        if folder.name == "adapter" and self.recipe.model.path is None:
            yield Check("export", "an adapter beside random weights: no folder has its base")
            return
        from trainwright.bench.whole_rows import alone, load, mean_loss, next_batches
        from trainwright.parallel.apply import DTYPES

        dtype = DTYPES[self.recipe.train.precision]
        batches = next_batches(self.recipe, self.micro_batch, self.rows, after=self.steps)
        model = load(folder, self.recipe, dtype)
        loss = mean_loss(model, batches)
        what = f"the exported {folder.name}'s loss on the rows of step {self.steps + 1}"
        yield Check("export: loss", what, _apart(loss, reference[self.steps + 1]["loss"]), self.bounds.loss)
        apart = alone(batches)
        if apart is None:
            yield Check("packing", "every row is one document")
        else:
            what = "packed rows against each document on its own"
            yield Check("packing: loss", what, _apart(loss, mean_loss(model, apart)), self.bounds.loss)

    # ---- runs ----

    def _against(
        self,
        label: str,
        what: str,
        name: str,
        change: Mapping[str, Any],
        count: int,
        reference: Mapping[int, Mapping[str, Any]],
        *,
        bound: float | None = None,
        resume: bool = False,
    ) -> Check:
        try:
            found = self._train(name, change, count, resume=resume)
        except RunFailed as error:
            return Check(label, str(error), math.inf)
        return self._compare(label, what, found, reference, "loss", bound)

    def _compare(
        self, label: str, what: str, found: Any, reference: Any, key: str, bound: float | None = None
    ) -> Check:
        """The largest relative difference of a figure over the steps."""
        steps = range(1, self.steps + 1)
        worst = max(_apart(found.get(step, {}).get(key), reference.get(step, {}).get(key)) for step in steps)
        limit = getattr(self.bounds, key) if bound is None else bound
        return Check(label, what, worst, limit)

    def _train(self, name: str, change: Mapping[str, Any], count: int, *, resume: bool = False) -> Any:
        """One run by the command line; -> step -> its line of metrics.jsonl."""
        values = merged(self.recipe.model_dump(mode="json"), {"name": name, **change})
        if "parallel" in change:
            values["parallel"] = {}
        file = self.folder / f"{name}.yaml"
        file.write_text(to_yaml(load_recipe(values), comments=False), encoding="utf-8")
        command = [sys.executable, "-m", "trainwright", "train", str(file), "--gpus", str(count)]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            [*command, "--resume"] if resume else command, capture_output=True, text=True, env=environment
        )
        (self.folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("trainwright: ")]
            last = (lines or done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise RunFailed(last.removeprefix("trainwright: "))
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}


def _apart(ours: float | None, theirs: float | None) -> float:
    """Relative difference; infinite where one is missing."""
    if ours is None or theirs is None:
        return math.inf
    return 0.0 if ours == theirs else abs(ours - theirs) / max(abs(theirs), 1e-30)


def merged(values: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `change` over them, section by section."""
    result = dict(values)
    for key, value in change.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, Mapping) and isinstance(below, dict) else value
    return result


def short(recipe: Recipe, folder: Path, *, steps: int, rows: int, precision: str) -> Recipe:
    """The recipe for a proof: `steps` of `rows`, a constant rate, no questions, everything under `folder`.

    Without dropout on adapters, whose random numbers no two layouts share.
    """
    change: dict[str, Any] = {
        "output": str(folder),
        "train": {
            "steps": steps, "epochs": None, "tokens": None, "global_batch_size": rows,
            "gradient_accumulation_steps": None, "schedule": "constant", "warmup": 0.0, "precision": precision,
            "deterministic": True, "resume": False,
        },
        "evaluation": {"every": 0, "generate": 0, "max_batches": 1},
        "checkpoint": {"every": 0, "keep_every": 0},
        "tracking": {"tensorboard": False, "tracker": None, "log_every": 1},
    }  # fmt: skip
    if recipe.adapter is not None:
        change["adapter"] = {"dropout": 0.0}
    return load_recipe(merged(recipe.model_dump(mode="json"), change))


def with_layers(recipe: Recipe, layers: int) -> Recipe:
    """The recipe with the first `layers` layers of its model's shape and random weights.

    Raises UserError where the model has fewer.
    """
    from dataclasses import replace

    from trainwright.model import families
    from trainwright.train.build import find_sources

    config = find_sources(recipe.model, recipe.data.seq_len).config
    if not 0 < layers <= config.num_layers:
        raise UserError(f"--layers {layers}: the model has {config.num_layers}; use 1 to {config.num_layers}")
    keys = families.get(config.family).to_hf(replace(config, layers=config.layers[:layers]))
    tokenizer = recipe.model.tokenizer or recipe.model.path
    if tokenizer is None and isinstance(recipe.model.config, str):
        tokenizer = recipe.model.config
    change = {
        "path": None, "config": {**config.source, **keys}, "family": config.family, "overrides": {},
        "tokenizer": tokenizer,
    }  # fmt: skip
    return load_recipe(merged(recipe.model_dump(mode="json"), {"model": change}))
