"""How it is trained: the `train`, `evaluation`, `checkpoint` and `tracking` keys of a recipe. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainwright.recipe.strict import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainRecipe(Section):
    """Length, batch, optimizer, schedule, precision."""

    steps: int | None = Field(None, ge=1, description="optimizer steps (one of steps, epochs, tokens)")
    epochs: float | None = Field(None, gt=0, description="passes over the data")
    tokens: int | None = Field(None, ge=1, description="tokens seen")
    micro_batch_size: int | Literal["auto"] = Field(1, description="rows in one forward pass of one data rank")
    global_batch_size: int | None = Field(None, ge=1, description="rows in one optimizer step, all ranks together")
    gradient_accumulation_steps: int | None = Field(None, ge=1, description="instead of global_batch_size")
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "muon", "sgd"] = Field(
        "adamw", description="fused where the device has it"
    )
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="where the decay ends")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field("cosine", description="after the warmup")
    warmup: float = Field(0.03, ge=0, description="steps (>= 1) or share of all steps (< 1)")
    decay: float = Field(0.1, ge=0, description="wsd only: last steps (>= 1) or share (< 1) that decay")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Adam's moments")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.1, ge=0, description="on matrices only, never on norms and biases")
    max_grad_norm: float = Field(1.0, ge=0, description="clip by global norm; 0 does not clip")
    precision: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="compute type; fp16 scales the loss")
    float8: Literal["tensorwise", "rowwise"] | None = Field(
        None, description="layers' matrix products in 8-bit floats, scaled by tensor (fastest) or by row"
    )
    master_weights: bool = Field(True, description="float32 weights and optimizer states beside bf16/fp16 compute")
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile each block; auto: on GPUs")
    optimizer_in_backward: bool = Field(
        False, description="update each layer once its gradients are there, and free them; needs max_grad_norm=0"
    )
    cuda_graph: bool = Field(False, description="record a pass and replay it: for rows of up to about 2048 tokens")
    loss_chunk: int = Field(0, ge=0, description="tokens whose logits exist at once; 0 chooses")
    seed: int = Field(0, ge=0, lt=2**63, description="weights, data order, dropout")
    deterministic: bool = Field(False, description="bit-exact repeats, at some cost in speed")
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="NaN or Inf in loss or gradient")
    resume: bool | int = Field(False, description="go on from the run's newest checkpoint, or from that of a step")

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        lengths = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(lengths) != 1:
            found = " and ".join(lengths) or "none"
            raise ValueError(f"train needs exactly one of steps, epochs, tokens; found {found}")
        if self.global_batch_size is not None and self.gradient_accumulation_steps is not None:
            raise ValueError("train.global_batch_size and train.gradient_accumulation_steps say the same: keep one")
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size={self.micro_batch_size} is below 1: use 1 or more, or auto")
        if self.micro_batch_size == "auto" and self.global_batch_size is None:
            raise ValueError(
                "train.micro_batch_size=auto keeps train.global_batch_size, which is not set: "
                "set it to the rows of one optimizer step"
            )
        if self.optimizer_in_backward:
            self._check_in_backward()
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"train.min_learning_rate={self.min_learning_rate} is above "
                f"train.learning_rate={self.learning_rate}: lower it"
            )
        return self

    def _check_in_backward(self) -> None:
        """What needs all gradients at once, or passes that are replayed."""
        why = {
            "max_grad_norm=0": self.max_grad_norm > 0 and "clipping needs the norm of all gradients first",
            "precision=bf16": self.precision == "fp16" and "a loss scale that is too large shows at the end of a pass",
            "cuda_graph=false": self.cuda_graph and "a recorded pass has no updates in it",
            "gradient_accumulation_steps=1": (self.gradient_accumulation_steps or 1) > 1
            and "gradients of several passes add up",
        }
        for fix, reason in why.items():
            if reason:
                raise ValueError(f"train.optimizer_in_backward=true, and {reason}: set train.{fix}, or leave it out")


class EvaluationRecipe(Section):
    """Loss on the held-out split, and answers to its questions."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    max_batches: int | None = Field(None, ge=1, description="at most this many micro batches")
    generate: int = Field(0, ge=0, description="held-out questions answered before and after, with exact match")
    max_new_tokens: int = Field(128, ge=1, description="longest answer")


class CheckpointRecipe(Section):
    """Safetensors and JSON, complete or absent."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end or when stopped")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_every: int = Field(0, ge=0, description="and every checkpoint whose step this divides")


class TrackingRecipe(Section):
    """Besides metrics.jsonl and report.html, which are always written."""

    tensorboard: bool = Field(True, description="event files under the run, where tensorboard is installed")
    tracker: Literal["wandb", "trackio", "swanlab"] | None = Field(None, description="one more tracker")
    project: str = Field("trainwright", description="project name for the tracker")
    log_every: int = Field(1, ge=1, description="steps between lines of metrics.jsonl")
