"""What a layer keeps between its forward and its backward pass on one rank, and what lives for a moment. No torch.

Bytes of one micro batch. Owns the list of tensors of each part: those that autograd keeps in `model/` with the kernels
of `model/kernels/` when the program is our own, and those that another program's traits say. Tests compare it with what
autograd really keeps. Which of them recomputation drops is counted here too; when they exist is `moments.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trainwright.adapt.lora import Lora
from trainwright.model.config import AttentionConfig, BlockConfig, LinearConfig, MlpConfig, MoeConfig, NormConfig
from trainwright.parallel.split import kv_copies, rich_layers
from trainwright.planner.hardware import GIB
from trainwright.planner.job import Job, Stage
from trainwright.planner.states import local_shape, whole_elements


@dataclass
class LayerActivations:
    """Bytes of one layer and one micro batch.

    kept: by part, with nothing recomputed. entry: the layer's input, all that full recomputation keeps. results:
    outputs of matrices and attention, which selective recomputation keeps beside the entry; attention_results: those of
    its attention. work: gradients and copies that live for a moment in its backward pass. forward_work: the same of its
    forward pass.
    """

    kept: dict[str, int] = field(default_factory=dict)
    entry: int = 0
    results: int = 0
    attention_results: int = 0
    work: int = 0
    forward_work: int = 0

    @property
    def total(self) -> int:
        return sum(self.kept.values())

    def held(self, recompute: str) -> int:
        """What waits for the backward pass."""
        if recompute == "full":
            return self.entry
        return min(self.entry + self.results, self.total) if recompute == "selective" else self.total

    def add(self, part: str, size: float) -> None:
        self.kept[part] = self.kept.get(part, 0) + int(size)


def kind_activations(job: Job, layer: int) -> LayerActivations:
    """`layer_activations` of the first layer of a kind, counted once for all stages."""
    return job.once(("activations", layer), lambda: layer_activations(job, layer))


def kept_levels(job: Job, stage: Stage, layer: int) -> tuple[int, int] | None:
    """How many of a stage's compiled layers keep (all results, at least those of attention) within `recompute_memory`;
    the others keep their input. None where there is no such budget."""
    memory, layers = job.recipe.parallel.recompute_memory, len(stage.layers)
    if job.recompute != "selective" or memory is None or not job.program.compiled:
        return None
    kept = kind_activations(job, layer)
    return rich_layers(memory * GIB / stage.sharers, layers, kept.attention_results, kept.results)


def mean_held(job: Job, stage: Stage, layer: int) -> int:
    """Bytes that a layer keeps for its backward pass, in the mean of those of its kind; with `offload` some of them in
    host memory."""
    activations, memory = kind_activations(job, layer), job.recipe.parallel.recompute_memory
    held = activations.held(job.recompute)
    if job.recompute != "selective" or memory is None:
        return held
    layers, levels = len(stage.layers), kept_levels(job, stage, layer)
    if levels is None:  # operation by operation, as far as it goes
        return min(held, activations.entry + int(memory * GIB / stage.sharers / layers))
    whole, several = levels
    kept = whole * activations.results + (several - whole) * activations.attention_results
    return min(held, activations.entry + kept // layers)


def layer_activations(job: Job, layer: int) -> LayerActivations:
    """Counts one layer. Layers that are equal in shape and in what is trained give equal counts."""
    block, path = job.block(layer), f"layers.{layer}"
    found = LayerActivations()
    stream = job.stream_tokens * block.input_layernorm.size
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        found.add("stream", stream * job.program.stream)
        found.add("norm", stream * job.program.norm + job.stream_tokens * _statistics(job, norm))
    found.entry = stream * job.program.stream
    if job.program.cast and not job.fsdp:
        # Our own RMS norm for CPUs casts nothing, and biases are not kept.
        norms = job.cluster.card.name != "CPU" or block.input_layernorm.kind == "layer"
        trained = [item for item in job.by_layer.get(layer, ()) if item.trained and item.kind != "adapter"]
        cast = [item for item in trained if len(item.shape) > 1 or (item.kind == "norm" and norms)]
        found.add("weights in compute type", whole_elements(job, cast) * job.program.cast)
    before = found.total
    attention_work = _attention(job, block, f"{path}.self_attn", found)
    attention, found.attention_results = found.total - before, found.results
    mlp_work = _mlp(job, block, f"{path}.mlp", found)
    mlp = found.total - before - attention
    # When attention runs backward, what the MLP kept is gone.
    unpacked = _unpacked(job, layer)
    found.work = stream * job.program.stream_work + max(attention_work - mlp, mlp_work) + unpacked
    found.forward_work = before - found.entry + max(attention, mlp) + unpacked
    return found


def _unpacked(job: Job, layer: int) -> int:
    """A quantized weight in full width while it is multiplied (fp8: turned, in its own width); where lengths of rows
    are trained, a float32 weight twice while they are taken."""
    items = job.by_layer.get(layer, ())
    sizes = [
        math.prod(local_shape(job, item)) * (1 if item.quantization.kind == "fp8" else job.program.quantized_work)
        for item in items
        if item.quantization is not None
    ]
    if any(item.name.endswith(".magnitude") for item in items):
        adapted = {item.name.removesuffix(".lora_a") for item in items if item.name.endswith(".lora_a")}
        weights = [item for item in items if item.name.removesuffix(".weight") in adapted]
        sizes += [8 * math.prod(local_shape(job, item)) for item in weights]
    return max(sizes, default=0)


def _statistics(job: Job, norm: NormConfig) -> int:
    """Bytes that a norm keeps for each row: one float32 number of RMS; two of layer norm, on a CPU in the input's
    type."""
    if norm.kind == "rms":
        return 4
    return 2 * job.program.compute if job.cluster.card.name == "CPU" else 8


def _attention(job: Job, block: BlockConfig, path: str, found: LayerActivations) -> int:
    """Adds the attention's tensors; returns the bytes of its backward pass."""
    part, program = block.self_attn, job.program
    heads, kv_heads = job.heads(part)
    queries = job.tokens * heads * part.head_dim
    keys = job.tokens * kv_heads * part.head_dim * kv_copies(kv_heads, job.row_split.ulysses)
    gathered = keys * job.row_split.ring
    projections = {name: getattr(part, name) for name in ("q_proj", "k_proj", "v_proj")}
    if any(_reads(job, linear, f"{path}.{name}") for name, linear in projections.items()):
        found.add("norm", job.entering_tokens * part.q_proj.in_features * program.normed)
    found.add("attention", (queries + 2 * gathered) * program.queries)
    found.add("attention", queries * program.compute + job.tokens * heads * 4)  # the result and its log sum
    found.add("attention", queries * program.mixed)
    if part.rope is not None:
        found.add("attention", (queries + keys) * program.rotary)
    if part.q_norm is not None:
        found.add("attention", (queries + keys) * program.compute + job.tokens * (heads + kv_heads) * 4)
    scores = _scores(job, part, heads)
    found.add("scores", scores * program.scores)
    for linear in projections.values():
        _adapter(job, linear, job.tokens, found)
    _adapter(job, part.o_proj, job.tokens, found, cut_input=True)
    found.results += (2 * queries + 2 * keys + job.tokens * part.o_proj.out_features) * program.compute
    found.results += job.tokens * heads * 4
    # Gradients of queries, keys, values and of the result; kernels sum those of the queries in float32.
    return (3 * queries + 2 * gathered) * program.compute + 4 * queries + scores * program.scores_work


def _scores(job: Job, part: AttentionConfig, heads: int) -> int:
    """Elements of one layer's attention matrix on this rank, hidden half included."""
    rows = job.seq_len // job.row_split.ring
    return job.micro_batch * -(-heads // job.row_split.ulysses) * rows * job.seq_len


def _mlp(job: Job, block: BlockConfig, path: str, found: LayerActivations) -> int:
    """Adds the MLP's or the experts' tensors; returns the bytes of its backward pass."""
    if isinstance(block.mlp, MoeConfig):
        return _experts(job, block.mlp, path, found)
    part = block.mlp
    hidden = job.tokens * part.up_proj.in_features
    inner = job.tokens * -(-part.intermediate_size // job.layout.tp)
    entering = {name: linear for name in ("gate_proj", "up_proj") if (linear := getattr(part, name))}
    if any(_reads(job, linear, f"{path}.{name}") for name, linear in entering.items()):
        copies = len(entering) if job.program.mixed else job.program.normed_inner  # in 8 bits, one for each reader
        found.add("norm", job.entering_tokens * part.up_proj.in_features * min(copies, job.program.normed_inner))
    tile = job.recipe.parallel.mlp_tokens
    if tile is not None and tile < job.tokens:  # pieces keep their input and run one after another
        wide = inner * tile // job.tokens * (_inner(job, part) + job.program.inner_work)
        return wide + hidden * job.program.compute
    unread = 0 if _reads(job, part.down_proj, f"{path}.down_proj") else job.program.compute
    found.add("mlp", inner * (_inner(job, part) - unread))
    for linear in entering.values():
        _adapter(job, linear, job.tokens, found)
    _adapter(job, part.down_proj, job.tokens, found, cut_input=True)
    found.results += (len(entering) * inner + job.tokens * part.down_proj.out_features) * job.program.compute
    return inner * (job.program.inner_work - (job.program.compute if job.gates_apart(part) else 0))


def _inner(job: Job, part: MlpConfig) -> int:
    """Bytes an element of the inner width. SiLU's gate is computed again; other activations keep their result."""
    if part.gate_proj is None:
        if part.activation != "relu":
            return job.program.plain_inner
        # Its result alone, which is what the last matrix reads; compiled, where it is above 0 besides, a byte each.
        return job.program.plain_inner - job.program.compute + job.program.compiled
    return job.program.inner + (0 if part.activation == "silu" else job.program.compute)


def _experts(job: Job, part: MoeConfig, path: str, found: LayerActivations) -> int:
    """Rows are tokens times chosen experts; with expert parallelism a rank computes as many on average."""
    rows = job.tokens * part.top_k
    hidden = part.gate.in_features
    inner = rows * -(-part.experts.intermediate_size // job.layout.tp)
    compute = job.program.compute
    if _reads(job, part.gate, f"{path}.gate") or any(
        _reads(job, linear, f"{path}.experts.{name}")
        for name in ("gate_proj", "up_proj")
        if (linear := getattr(part.experts, name)) and linear.adapter is None
    ):
        found.add("norm", job.tokens * hidden * job.program.normed)
    # Probabilities, their sum and the pad mask; of each row its expert, its choice, its place and its weight twice.
    found.add("router", job.tokens * (part.experts.num_experts * 4 + 8) + rows * (3 * 8 + 2 * 4))
    ep = job.layout.ep
    if ep > 1 and job.program.rows_once:
        # Instead of the last three: where in line; with each row that has come, of every choice, here or not, number,
        # place and weight. Exchanges are results too, there and back.
        came = job.rows_sent(part)
        found.add("router", job.tokens * ep * 2 * 8 - rows * (2 * 8 + 4))
        found.add("router", came * part.top_k * (2 * 8 + 4))
        found.results += int(2 * came * hidden * compute)
    # Rows as the experts read them, and as they come out.
    found.add("experts", 2 * rows * hidden * compute + inner * _inner(job, part.experts))
    linears = [part.experts.gate_proj, part.experts.up_proj, part.experts.down_proj]
    count = -(-part.experts.num_experts // job.layout.ep)
    for linear in linears:
        if linear is not None:
            _adapter(job, linear, rows, found, cut_input=linear is linears[2], stack=count)
    if any(linear is not None and linear.quantization is not None for linear in linears):
        found.add("router", 8 * (part.experts.num_experts // ep + 1))  # rows of each, and of none
    matrices = 2 if part.experts.gate_proj else 1
    found.results += (matrices * inner + rows * hidden) * compute
    # When the activation runs backward, the rows that came out are gone, and their gradient is there.
    return inner * job.program.inner_work


def _adapter(
    job: Job, linear: LinearConfig, tokens: int, found: LayerActivations, *, cut_input: bool = False, stack: int = 0
) -> None:
    """What a low-rank adapter keeps: the product of its first matrix; with dropout, what it let through and its mask;
    with trained lengths, the result that they scale. stack: so many experts, whose adapters are not one operation.
    """
    lora, compute = linear.adapter, job.program.compute
    if not isinstance(lora, Lora):
        return
    tp = job.layout.tp
    ins, outs = (linear.in_features / tp, linear.out_features) if cut_input else (
        linear.in_features, linear.out_features / tp)  # fmt: skip
    found.add("adapters", tokens * lora.rank * compute)
    if lora.dropout or lora.dora or stack:  # written out: both matrices wait in the compute type
        found.add("adapters", max(1, stack) * lora.rank * (ins + outs) * (compute if compute != 4 else 0))
    if lora.dropout:
        mask = compute if job.cluster.card.name == "CPU" else 1
        found.add("adapters", tokens * ins * (compute + mask))
    if lora.dora:
        found.add("adapters", tokens * outs * compute + outs * (4 + compute))


def _reads(job: Job, linear: LinearConfig, path: str) -> bool:
    """Whether a layer's input is needed backward: for a trained weight, or for an adapter beside a frozen one."""
    lora = linear.adapter
    if isinstance(lora, Lora) and lora.dropout:  # the adapter keeps what its dropout let through instead
        return False
    return lora is not None or job.is_trained(f"{path}.weight")
