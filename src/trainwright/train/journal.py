"""Everything that a run says: the screen, metrics.jsonl, evaluation.jsonl, answers.json, trackers. Rank 0 only.

Owns which figure goes where. How a line looks is `display.py`'s, what it means `metrics.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainwright.parallel.mesh import World
from trainwright.recipe.schema import Recipe
from trainwright.store import read_json, write_json
from trainwright.train.display import Display
from trainwright.train.evaluate import Answer, as_rows, exact_match
from trainwright.train.metrics import JsonLines
from trainwright.train.run import RunFolder, add_to_environment, changed_keys, write_environment, write_recipe
from trainwright.train.startup import Startup
from trainwright.train.trackers import Tracker, open_trackers


class Journal:
    """The open files of a run that stands at `step`; lines beyond it go, since they will be written anew."""

    def __init__(self, folder: RunFolder, recipe: Recipe, world: World, *, total_steps: int, step: int) -> None:
        self.folder = folder
        self.total_steps = total_steps
        self.tracking = recipe.tracking
        self.display = Display(silent=not world.is_main, total=total_steps, done=step)
        self.trackers: list[Tracker] = []
        self.changed: list[str] = []
        self.evaluated: dict[str, dict[str, Any]] = {}
        self.writes = world.is_main
        if not self.writes:
            return
        self.changed = changed_keys(folder, recipe) if step else []
        write_recipe(folder, recipe)
        run_id = write_environment(folder, recipe, ranks=world.size, layout=str(world.layout))
        self.metrics = JsonLines(folder.metrics, keep_until=step)
        # Those at a run's two ends come after what is restored: they will be written anew.
        self.evaluations = JsonLines(folder.evaluations, keep_until=step - (step in (0, total_steps)))
        self.trackers = open_trackers(
            folder.path,
            recipe.name,
            run_id,
            tensorboard=self.tracking.tensorboard,
            tracker=self.tracking.tracker,
            project=self.tracking.project,
            settings=recipe.model_dump(mode="json"),
            step=step,
        )

    def say(self, text: str) -> None:
        """One line on the screen."""
        self.display.say(text)

    def started(self, startup: Startup) -> None:
        """How long the start took, on the screen and in environment.json."""
        self.say(str(startup))
        if self.writes:
            add_to_environment(self.folder, startup_seconds=startup.phases)

    def step(self, line: dict[str, Any]) -> None:
        """The figures of a finished step."""
        self.display.step(line["step"], line)
        if self.writes and (line["step"] % self.tracking.log_every == 0 or line["step"] == self.total_steps):
            self.metrics.write(line)
            self._track("train", line)

    def evaluation(self, line: dict[str, Any]) -> None:
        """The figures of the held-out split at a step."""
        loss = "not a finite number" if line["loss"] is None else f"{line['loss']:.4f}"
        self.say(f"held-out loss at step {line['step']}: {loss}")
        if self.writes:
            self.evaluations.write(line)
            self._track("evaluation", line)

    def answers(self, when: str, figures: dict[str, Any], answers: Sequence[Answer]) -> None:
        """What the model answered `before` or `after` training, into answers.json and a few on the screen."""
        self.evaluated[when] = {**figures, "exact_match": exact_match(answers)}
        if self.writes and (figures or answers):
            path = self.folder.answers
            kept = (read_json(path) if when == "after" else None) or {}
            kept[when] = {**self.evaluated[when], "answers": as_rows(answers)}
            write_json(path, kept)
        if answers:
            self.say(f"{when} training, {exact_match(answers):.1%} of {len(answers)} held-out answers are exact:")
        for answer in answers[:3]:
            mark = "right" if answer.exact else f"right is {answer.expected!r}"
            self.say(f"  ...{answer.question[-60:]!r} -> {answer.given!r} ({mark})")

    def _track(self, section: str, line: dict[str, Any]) -> None:
        figures = {f"{section}/{key}": value for key, value in line.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log(line["step"], figures)

    def close(self) -> None:
        """Closes all, also after an error."""
        self.display.close()
        if self.writes:
            self.metrics.close()
            self.evaluations.close()
        for tracker in self.trackers:
            tracker.close()
