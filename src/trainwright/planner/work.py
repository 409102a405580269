"""Seconds of computation of each part of a layer and of the head, forward and backward, on one rank. No torch.

A roofline for each operation: the longer of its arithmetic at the share of the peak that its shape reaches and its
bytes at the share of the memory's bandwidth. Owns which operations there are; communication is `collectives.py`'s, the
step as a whole `speed.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainwright.adapt.lora import Lora
from trainwright.model.config import AttentionConfig, LinearConfig, MoeConfig
from trainwright.parallel.split import PartCosts, kv_copies
from trainwright.planner.hardware import GIGA
from trainwright.planner.job import Job
from trainwright.planner.program import chunk_tokens

Seconds = tuple[float, float]
"""Forward, backward."""


@dataclass
class Work:
    """Seconds by part. `host` is what starting the kernels takes: the device cannot be faster than that."""

    parts: dict[str, Seconds] = field(default_factory=dict)
    host: Seconds = (0.0, 0.0)
    flops: float = 0.0
    """What is really computed, forward and backward, without recomputation."""
    forward_flops: float = 0.0

    def add(self, part: str, seconds: Seconds) -> None:
        before = self.parts.get(part, (0.0, 0.0))
        self.parts[part] = (before[0] + seconds[0], before[1] + seconds[1])

    def start(self, seconds: float, forward: float) -> None:
        """Host time, of which the forward pass has the share `forward`."""
        self.host = (self.host[0] + seconds * forward, self.host[1] + seconds * (1 - forward))

    def count(self, forward: float, backward: float) -> None:
        self.flops += forward + backward
        self.forward_flops += forward

    @property
    def device(self) -> Seconds:
        """What the device computes, however long the host takes."""
        forward, backward = (sum(seconds[side] for seconds in self.parts.values()) for side in (0, 1))
        return forward, backward

    @property
    def forward(self) -> float:
        return max(self.device[0], self.host[0])

    @property
    def backward(self) -> float:
        return max(self.device[1], self.host[1])

    def forward_of(self, *parts: str) -> float:
        return sum(self.parts.get(part, (0.0, 0.0))[0] for part in parts)


GROUPED = 0.75
"""Rate of torch's grouped product beside a plain one's: 525 TFLOP/s on an H200, kernels of the row moe2 of
`benchmarks/speed_gpu.py`."""
UNALIGNED = 0.1
"""Rate of a head's products over an odd vocabulary whose logits stand anywhere beside one whose rows are aligned; from
gpt2-xl on an H200."""


class Roofline:
    """Seconds of single operations on one card with one program."""

    def __init__(self, job: Job) -> None:
        self.job, self.program, self.calibration = job, job.program, job.calibration
        card = job.cluster.card
        dtype = "fp32" if self.program.compute == 4 else job.recipe.train.precision
        self.dtype = dtype
        self.peak = card.rate(dtype)
        self.fp8 = card.peak("fp8")
        self.bandwidth = card.bandwidth * GIGA * self.calibration.bandwidth

    def matmul(self, rows: float, depth: float, columns: float, *, fp8: bool = False) -> float:
        """[rows, depth] x [depth, columns]; fp8: both sides in 8 bits, where the card has a unit for it."""
        if not rows * depth * columns:
            return 0.0
        calibration = self.calibration
        dtype, peak = ("fp8", self.fp8) if fp8 and self.fp8 else (self.dtype, self.peak)
        share = calibration.matmul.get(dtype, calibration.matmul["bf16"]) * self.program.matmul
        share *= depth / (depth + calibration.half_depth)
        share *= rows * columns / (rows * columns + calibration.half_area)
        size = (rows * depth + depth * columns + rows * columns) * self.program.compute
        return max(2 * rows * depth * columns / (peak * share), size / self.bandwidth)

    def grouped(self, rows: float, depth: float, columns: float, groups: int) -> float:
        """`groups` products of one shape in one kernel: together they fill the card."""
        size = groups * (rows * depth + depth * columns + rows * columns) * self.program.compute
        return max(self.matmul(rows * groups, depth, columns) / GROUPED, size / self.bandwidth)

    def casts(self, trained: float, *, alone: bool = False) -> Seconds:
        """Where one process casts float32 weights as it uses them: weights are read and written narrower, gradients the
        other way. alone: experts that FSDP leaves out, cast once more in the backward pass."""
        if not self.program.cast or (self.job.fsdp and not alone):
            return 0.0, 0.0
        narrow, wide, gradient = self.program.cast, self.program.trained, self.program.gradient
        forward = self.move(trained * (wide + narrow))
        return forward, self.move(trained * (narrow + gradient)) + (forward if alone else 0.0)

    def attention(self, backend: str, flops: float, length: float, *, backward: bool) -> float:
        share = self.calibration.attention_share(backend, length, backward=backward)
        return flops / (self.peak * share)

    def move(self, size: float) -> float:
        """Seconds for elementwise work that moves so many bytes."""
        return size / self.bandwidth


def kind_work(job: Job, layer: int) -> Work:
    """`layer_work` of the first layer of a kind, counted once for all stages."""
    return job.once(("work", layer), lambda: layer_work(job, layer))


def layer_work(job: Job, layer: int) -> Work:
    """One layer, one micro batch."""
    block, path, roofline, program = job.block(layer), f"layers.{layer}", Roofline(job), job.program
    work = Work()
    work.start(program.kernels * job.calibration.launch, 1 / 3)
    attention = block.self_attn
    tp = job.layout.tp
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(attention, name)
        kv = name in ("k_proj", "v_proj")
        share = job.heads(attention)[kv] / (attention.num_kv_heads if kv else attention.num_heads)
        cut_output = name != "o_proj"
        _linear(job, roofline, work, "attention", linear, f"{path}.self_attn.{name}", job.tokens, share, cut_output)
    _attention(job, roofline, work, layer)
    stream = job.stream_tokens * block.input_layernorm.size * program.stream_traffic
    work.add("norms", (roofline.move(stream / 3), roofline.move(stream * 2 / 3)))
    if isinstance(block.mlp, MoeConfig):
        _experts(job, roofline, work, block.mlp, f"{path}.mlp")
    else:
        for name in ("gate_proj", "up_proj", "down_proj"):
            if linear := getattr(block.mlp, name):
                _linear(
                    job, roofline, work, "mlp", linear, f"{path}.mlp.{name}", job.tokens, 1 / tp, name != "down_proj"
                )
        inner = job.tokens * block.mlp.intermediate_size / tp
        twice = 2 * program.compute if job.gates_apart(block.mlp) else 0
        forward = inner * program.inner_traffic / 3
        work.add("activation", (roofline.move(forward), roofline.move(2 * forward + inner * twice)))
    return work


def _linear(
    job: Job,
    roofline: Roofline,
    work: Work,
    part: str,
    linear: LinearConfig,
    path: str,
    rows: float,
    share: float,
    cut_output: bool,
) -> None:
    """A linear layer of which this rank has `share`; its adapter and the unpacking of its weight."""
    inner, outer = linear.in_features, linear.out_features
    depth, columns = (inner, outer * share) if cut_output else (inner * share, outer)
    float8 = job.recipe.train.float8 if job.program.name == "trainwright" and part != "router" else None
    fp8 = float8 is not None or (linear.quantization is not None and linear.quantization.kind == "fp8")
    forward = roofline.matmul(rows, depth, columns, fp8=fp8)
    backward = roofline.matmul(rows, columns, depth, fp8=fp8)
    flops = 2 * rows * depth * columns
    trained = job.is_trained(f"{path}.weight")
    if trained:
        backward += roofline.matmul(depth, rows, columns, fp8=float8 is not None)
        work.add("weights' casts", roofline.casts(depth * columns))
    work.add(part, (forward, backward))
    work.count(flops, flops * (2 if trained else 1))
    if float8 is not None:  # largest number, rounding, and the copies that the matrix units' order asks for
        ins, outs, weight = rows * depth, rows * columns, depth * columns
        work.add("rounding", (roofline.move(5 * (ins + weight)), roofline.move(7 * outs + 5 * weight + 2 * ins)))
    elif fp8:  # rows become 8 bits wide on the way in, and the weight is turned for the way back
        narrow = job.program.compute + 1
        work.add(
            "rounding", (roofline.move(rows * depth * narrow), roofline.move((rows * narrow + 2 * depth) * columns))
        )
    elif linear.quantization is not None:
        work.start(job.program.packed_kernels * job.calibration.launch * (linear.adapter is None), 0.4)
        size = linear.quantization.num_bytes(int(columns), int(depth)) + depth * columns * job.program.compute
        unpack = roofline.move(size * job.program.unpack_passes)
        work.add("unpacking", (unpack, unpack))
    if isinstance(linear.adapter, Lora):
        rank = linear.adapter.rank
        work.start(job.program.adapter_kernels * job.calibration.launch, 0.4)
        down, up = roofline.matmul(rows, depth, rank), roofline.matmul(rows, rank, columns)
        add = roofline.move(2 * rows * columns * job.program.compute)
        work.add("adapters", (down + up + add, 2 * (down + up) + add))
        work.count(2 * rows * rank * (depth + columns), 4 * rows * rank * (depth + columns))


def _attention(job: Job, roofline: Roofline, work: Work, layer: int) -> None:
    part, program, tp = job.block(layer).self_attn, job.program, job.layout.tp
    causal = program.scores == 0 and program.scores_traffic == 0
    heads = -(-part.num_heads // tp) / part.num_heads
    forward_flops = part.flops_per_token(job.seq_len, causal=causal) / 3 * job.tokens * heads
    if part.mask.kind == "prefix":
        forward_flops = part.flops_per_token(job.seq_len, causal=False) / 3 * job.tokens * heads
    work.count(forward_flops, 2 * forward_flops)
    if causal:
        length = min(job.seq_len, part.mask.window or job.seq_len)
        backend = attention_backend(job, part)
        forward = roofline.attention(backend, forward_flops, length, backward=False)
        work.add("scores", (forward, roofline.attention(backend, 2 * forward_flops, length, backward=True)))
    else:  # written out: two products of whole score matrices, which move through memory
        matmul = job.calibration.matmul.get(roofline.dtype, 0.5) * 0.7
        forward = forward_flops / (roofline.peak * matmul)
        work.add("scores", (forward, 2 * forward))
    scores = job.micro_batch * part.num_heads / tp * job.seq_len * job.seq_len / job.layout.cp
    moved = roofline.move(scores * program.scores_traffic)
    work.add("scores", (moved / 3, moved * 2 / 3))


def attention_backend(job: Job, part: AttentionConfig) -> str:
    """Which row of the calibration's attention table: what `model/kernels/attention.py: choose` takes on a GPU."""
    program, recipe = job.program, job.recipe
    if program.name != "trainwright" or job.cluster.card.name == "CPU" or recipe.model.attention in ("sdpa", "eager"):
        return program.attention
    data = recipe.data
    documents = data.document_mask if data.document_mask is not None else data.packing and recipe.task != "pretrain"
    if part.alibi or part.mask.kind == "prefix":
        return "flex"
    apart = documents or part.mask.window is not None or job.row_split.ring > 1
    return "varlen" if apart else program.attention


def _experts(job: Job, roofline: Roofline, work: Work, part: MoeConfig, path: str) -> None:
    """Rows of this rank's experts, with even routing; each expert is a product of its own share of the rows."""
    tp = job.layout.tp
    rows = job.tokens * part.top_k
    experts = max(1, part.experts.num_experts // job.layout.ep)
    trained = job.is_trained(f"{path}.experts.up_proj.weight")
    each = rows / experts
    for name in ("gate_proj", "up_proj", "down_proj"):
        if (linear := getattr(part.experts, name)) is None:
            continue
        shape = (linear.in_features, linear.out_features / tp) if name != "down_proj" else (
            linear.in_features / tp, linear.out_features)  # fmt: skip
        one = roofline.grouped(each, *shape, experts)
        work.add("experts", (one, one * (2 if trained else 1)))
        if trained:
            work.add("weights' casts", roofline.casts(experts * shape[0] * shape[1], alone=job.experts_alone))
        flops = 2 * rows * shape[0] * shape[1]
        work.count(flops, flops * (2 if trained else 1))
    hidden = part.gate.in_features
    _linear(job, roofline, work, "router", part.gate, f"{path}.gate", job.tokens, 1.0, True)
    inner = rows * part.experts.intermediate_size / tp * job.program.inner_traffic
    sorting = job.program.row_passes * rows
    if job.layout.ep > 1:  # where they leave, arrive, are spread, summed, come back: 8 times each, by count
        sorting += 8 * job.rows_sent(part) if job.program.rows_once else 10 * rows
    moved = roofline.move(inner + sorting * hidden * job.program.compute)
    work.add("activation", (moved / 3, moved * 2 / 3))


SLICED_TRAFFIC = 80.0
"""Bytes that move for each logit of a head in fewer bits: maximum, exponentials, sums and gradient are operations of
their own, and each slice's gradient is added to a float32 total."""


def head_work(job: Job) -> Work:
    """Head and loss of one micro batch; our loss makes the gradients in its forward pass, which changes no sum."""
    roofline, head, tp = Roofline(job), job.config.lm_head, job.layout.tp
    work = Work()
    work.start(20 * job.calibration.launch, 1 / 3)
    columns = head.out_features / tp
    name = "embed_tokens.weight" if head.tied else "lm_head.weight"
    forward = roofline.matmul(job.tokens, head.in_features, columns)
    if columns % 8 and not job.program.logits_aligned:
        forward /= UNALIGNED
    trained = job.is_trained(name)
    work.add("head", (forward, forward * (2 if trained else 1)))
    if trained:
        work.add("weights' casts", roofline.casts(columns * head.in_features))
    flops = 2 * job.tokens * head.in_features * columns
    work.count(flops, flops * (2 if trained else 1))
    size = job.tokens * columns * job.program.logits_traffic
    if head.quantization is not None and job.program.name == "trainwright":  # `adapt/head.py`: two passes over slices
        work.add("head", (forward, 0.0))
        work.count(flops, 0.0)
        size = job.tokens * columns * SLICED_TRAFFIC
    if trained and job.program.head_traffic:
        chunk = chunk_tokens(job.program, job.tokens, int(columns), "gpu", trained)
        size += job.tokens / chunk * head.in_features * columns * job.program.head_traffic
    moved = roofline.move(size)
    work.add("loss", (moved / 2, moved / 2))
    return work


def part_seconds(job: Job) -> PartCosts:
    """Forward and backward of each part on its own, layers' forward once more with full recomputation."""
    roofline, again = Roofline(job), job.recompute == "full"
    kinds = {}
    for kind in set(job.kinds.values()):
        work = kind_work(job, kind)
        kinds[kind] = work.forward * (1 + again) + work.backward
    head = head_work(job)
    table = job.config.embed_tokens
    # The lookup's gradient is a whole table: filled, and read and written where tokens were.
    moved = table.num_embeddings * table.embedding_dim + 4 * job.tokens * table.embedding_dim
    embedding = roofline.move(moved * job.program.compute) + 20 * job.calibration.launch
    layers = tuple(kinds[job.kinds[layer]] for layer in range(job.config.num_layers))
    return PartCosts(layers, embedding, head.forward + head.backward)


def kv_width(job: Job) -> tuple[int, int]:
    """(query, key) widths of one rank's heads in elements a token, KV copies for Ulysses included."""
    part = job.config.layers[0].self_attn
    heads, kv = job.heads(part)
    return heads * part.head_dim, kv * kv_copies(kv, job.row_split.ulysses) * part.head_dim
