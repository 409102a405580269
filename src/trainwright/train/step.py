"""One optimizer step: accumulate, normalise, clip, refuse NaN, update. The host waits for the device once.

The loss is the sum of token cross entropies over all supervised tokens of the global batch, divided by their count over
data ranks, sequence ranks and micro batches: never a mean of means. The count is known before the first backward pass,
so every micro batch's gradient has its final scale at once.

Owns that arithmetic and the loss scale of fp16. What happens after a refused step is `trainer.py`'s decision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.data.loader import Batch
from trainwright.device import fetch, upload, widest_float
from trainwright.model.mask import document_offsets
from trainwright.model.transformer import LossOutput
from trainwright.parallel.local import sum_partial_gradients
from trainwright.parallel.mesh import World
from trainwright.parallel.pipeline import Pipeline
from trainwright.parallel.shard import begin_micro_batch, grad_norm
from trainwright.train.graph import GraphedPasses
from trainwright.train.in_backward import InBackward
from trainwright.train.optimizer import Optimizers

IGNORED = -100  # a label that is not trained


@dataclass(frozen=True)
class StepResult:
    """What one step did. `finite` is False when it was refused: then nothing was updated, or, by updates within the
    backward pass, only layers whose own gradients were finite."""

    loss: float
    grad_norm: float
    supervised_tokens: int
    tokens: int  # without padding
    stop_asked: bool
    finite: bool


class LossScale:
    """The factor that keeps small fp16 gradients from vanishing (Micikevicius et al. 2018, section 3.2).

    Not torch.amp.GradScaler: that looks at one rank's gradients, and the refusal here follows the global norm, which
    every layout has already.
    """

    def __init__(self, enabled: bool, value: float = 2.0**16, patience: int = 2000) -> None:
        self.enabled = enabled
        self.value = value if enabled else 1.0
        self.patience = patience
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Halves after an overflow, doubles after `patience` steps without one."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps == self.patience:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        if self.enabled and state:
            self.value, self.good_steps = state["value"], int(state["good_steps"])


class TrainStep:
    """Turns the micro batches of one global batch into one update."""

    def __init__(
        self,
        model: nn.Module | Pipeline,
        optimizers: Optimizers,
        world: World,
        *,
        max_grad_norm: float,
        loss_scale: LossScale,
        graphs: GraphedPasses | None = None,
        in_backward: InBackward | None = None,
    ) -> None:
        self.graphs = graphs
        self.in_backward = in_backward
        self.model = model
        self.optimizers = optimizers
        self.world = world
        self.max_grad_norm = max_grad_norm
        self.loss_scale = loss_scale

    def __call__(self, batches: Sequence[Batch], rate: float, stop_asked: bool = False) -> StepResult:
        """One update at learning rate `rate`. Gradients are freed afterwards."""
        counts = upload(count_tokens(batches, stop_asked).to(widest_float(self.world.device)), self.world.device)
        layout = self.world.layout
        counts = self.world.sum(counts, copies=layout.row_copies)
        self.optimizers.set_learning_rate(rate)
        if self.in_backward is not None:
            self.in_backward.begin()
        loss_sum = self.world.sum(self._accumulate(batches, counts[0].clamp(min=1)), copies=layout.token_copies)
        tp = self.world.axis("tp")
        if tp is not None:
            sum_partial_gradients(self.model.model if isinstance(self.model, Pipeline) else self.model, tp)
        norm = self.in_backward.finish() if self.in_backward else self._grad_norm() / self.loss_scale.value
        bad = 1 - (loss_sum.isfinite() & norm.isfinite()).float()
        report = fetch(torch.cat([counts, torch.stack([loss_sum, norm.to(counts.dtype), bad.to(counts.dtype)])]))
        after = self.in_backward is None
        # Queued before the host waits; the kernel refuses NaN itself. While it runs the host begins the next step.
        if after and self.optimizers.guards_itself:
            self.optimizers.step(self._coefficient(norm), bad)
        supervised, tokens, stop, loss, grad_norm, refused = report()
        if after and not self.optimizers.guards_itself and not refused:
            self.optimizers.step(self._coefficient(norm), bad)
        self.optimizers.zero_grad()
        return StepResult(
            loss=loss / max(supervised, 1),
            grad_norm=grad_norm,
            supervised_tokens=int(supervised),
            tokens=int(tokens),
            stop_asked=stop > 0,
            finite=not refused,
        )

    def _accumulate(self, batches: Sequence[Batch], count: Tensor) -> Tensor:
        """Gradients of the whole loss; returns this rank's sum of token losses."""
        if isinstance(self.model, Pipeline):
            inputs = [to_inputs(batch, self.world.device) for batch in batches]
            return self.model.forward_backward(inputs, lambda output: self.share(output, count)).to(count.dtype)
        total = torch.zeros((), dtype=count.dtype, device=self.world.device)
        for number, batch in enumerate(batches, 1):
            begin_micro_batch(self.model, self.world, last=number == len(batches))
            given = to_inputs(batch, self.world.device)
            if self.graphs is not None:
                total += self.graphs(self.model, given, count, self.share, alone=len(batches) == 1)
                continue
            output = self.model(**given)
            self.share(output, count).backward()
            total += output.loss_sum.detach()
        return total

    def probe(self, batch: Batch) -> Tensor:
        """The loss of a micro batch as a step computes it, scaled alike, for a search that runs it once more.

        Stages of a pipeline run both ways in one go, so what they return has no gradient left to compute.
        """
        one = torch.ones((), device=self.world.device)
        if isinstance(self.model, Pipeline):
            inputs = [to_inputs(batch, self.world.device)]
            return self.model.forward_backward(inputs, lambda output: self.share(output, one))
        output = self.model(**to_inputs(batch, self.world.device))
        return self.share(output, one)

    def share(self, output: LossOutput, count: Tensor) -> Tensor:
        """A micro batch's share of the step's loss, scaled, with the auxiliary loss.

        The auxiliary loss of a mixture of experts is a mean already: it is weighted by the tokens it was taken over.
        """
        loss = output.loss_sum + output.aux_loss * output.num_tokens
        return loss / count.float() * self.loss_scale.value

    def _grad_norm(self) -> Tensor:
        """Global L2 norm of the gradients, still scaled, float32 [] on the device."""
        copies = {id(tensor) for tensor in self.model.copies} if isinstance(self.model, Pipeline) else set()
        return grad_norm([tensor for tensor in self.optimizers.parameters if id(tensor) not in copies], self.world)

    def _coefficient(self, norm: Tensor) -> Tensor:
        """What gradients are multiplied by: undoes the loss scale and clips by global norm (Pascanu et al. 2013)."""
        clip = torch.ones_like(norm)
        if self.max_grad_norm > 0:
            clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return (clip / self.loss_scale.value).float()


def to_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What the model's forward takes, on the device, from a batch on the CPU.

    What kernels need to know of the documents is found here, where asking does not wait for the device. Rows of one
    whole document each need no document mask at all: plain causal attention is the fastest there is. Positions are the
    model's to make from the documents, by its family's own rule.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "labels": batch.labels}
    documents = batch.document_ids
    if documents is not None and bool(((documents != documents[:, :1]) | (documents < 0)).any()):
        offsets = document_offsets(documents)
        inputs |= {"document_ids": documents, "cu_seqlens": offsets, "max_seqlen": int(offsets.diff().max())}
    return {key: upload(item, device) if isinstance(item, Tensor) else item for key, item in inputs.items()}


def count_tokens(batches: Sequence[Batch], stop_asked: bool = False) -> Tensor:
    """[supervised tokens, tokens without padding, stop asked] of this rank in float64, on the CPU."""
    supervised = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    tokens = sum(_real_tokens(batch) for batch in batches)
    return torch.tensor([supervised, tokens, float(stop_asked)], dtype=torch.float64)


def _real_tokens(batch: Batch) -> int:
    documents = batch.document_ids
    return batch.input_ids.numel() if documents is None else int((documents >= 0).sum())


def finite_or_none(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
