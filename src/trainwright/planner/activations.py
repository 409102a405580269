"""What a layer keeps between its forward and its backward pass on one rank, and what lives for a moment. No torch.

Bytes of one micro batch. Owns the list of tensors of each part: those that autograd keeps in `model/` with the kernels
of `model/kernels/` when the program is our own, and those that another program's traits say. Tests compare it with what
autograd really keeps. Which of them recomputation drops is counted here too; when they exist is `memory.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trainwright.adapt.lora import Lora
from trainwright.model.config import AttentionConfig, BlockConfig, LinearConfig, MlpConfig, MoeConfig, NormConfig
from trainwright.parallel.split import kv_copies
from trainwright.planner.job import Job
from trainwright.planner.states import whole_elements


@dataclass
class LayerActivations:
    """Bytes of one layer and one micro batch.

    kept: by part, with nothing recomputed. entry: the layer's input, all that full recomputation keeps. results:
    outputs of matrices and attention, which selective recomputation keeps beside the entry. work: gradients and copies
    that live for a moment in its backward pass. forward_work: the same of its forward pass.
    """

    kept: dict[str, int] = field(default_factory=dict)
    entry: int = 0
    results: int = 0
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
    attention = found.total - before
    mlp_work = _mlp(job, block, f"{path}.mlp", found)
    mlp = found.total - before - attention
    # When attention runs backward, what the MLP kept is gone.
    found.work = stream * job.program.stream_work + max(attention_work - mlp, mlp_work)
    found.forward_work = before - found.entry + max(attention, mlp)
    return found


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
    hidden = job.tokens * part.q_proj.in_features
    projections = {name: getattr(part, name) for name in ("q_proj", "k_proj", "v_proj")}
    if any(_reads(job, linear, f"{path}.{name}") for name, linear in projections.items()):
        found.add("norm", hidden * program.normed)
    found.add("attention", (queries + 2 * gathered) * program.queries)
    found.add("attention", queries * program.compute + job.tokens * heads * 4)  # the result and its log sum
    found.add("attention", queries * program.mixed)
    if part.rope is not None:
        found.add("attention", (queries + keys) * program.rotary)
    if part.q_norm is not None:
        found.add("attention", (queries + keys) * program.compute + job.tokens * (heads + kv_heads) * 4)
    scores = _scores(job, part, heads)
    found.add("scores", scores * program.scores)
    for linear in (*projections.values(), part.o_proj):
        _adapter(job, linear, job.tokens, found)
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
        found.add("norm", hidden * job.program.normed_inner)
    tile = job.recipe.parallel.mlp_tokens
    if tile is not None and tile < job.tokens:  # pieces keep their input and run one after another
        wide = inner * tile // job.tokens * (_inner(job, part) + job.program.inner_work)
        return wide + hidden * job.program.compute
    unread = 0 if _reads(job, part.down_proj, f"{path}.down_proj") else job.program.compute
    found.add("mlp", inner * (_inner(job, part) - unread))
    for linear in (*entering.values(), part.down_proj):
        _adapter(job, linear, job.tokens, found)
    found.results += (len(entering) * inner + job.tokens * part.down_proj.out_features) * job.program.compute
    return inner * job.program.inner_work


def _inner(job: Job, part: MlpConfig) -> int:
    """Bytes an element of the inner width. SiLU's gate is computed again; other activations keep their result."""
    if part.gate_proj is None:
        # ReLU keeps its result alone, which is what the last matrix reads.
        return job.program.plain_inner - (job.program.compute if part.activation == "relu" else 0)
    return job.program.inner + (0 if part.activation == "silu" else job.program.compute)


def _experts(job: Job, part: MoeConfig, path: str, found: LayerActivations) -> int:
    """Rows are tokens times chosen experts; with expert parallelism a rank computes as many on average."""
    rows = job.tokens * part.top_k
    hidden = part.gate.in_features
    inner = rows * -(-part.experts.intermediate_size // job.layout.tp)
    compute = job.program.compute
    found.add("norm", job.tokens * hidden * job.program.normed)  # read by the router and by the sort
    # Probabilities, their sum and the pad mask; of each row its expert, its token, its place and its weight twice.
    found.add("router", job.tokens * (part.experts.num_experts * 4 + 8) + rows * (3 * 8 + 4 + compute))
    # Rows as the experts read them, as they come out, and weighed.
    found.add("experts", 3 * rows * hidden * compute + inner * _inner(job, part.experts))
    matrices = 2 if part.experts.gate_proj else 1
    found.results += (matrices * inner + rows * hidden) * compute
    # When the activation runs backward, both forms of the rows that came out are gone, and their gradient is there.
    return inner * job.program.inner_work - rows * hidden * compute


def _adapter(job: Job, linear: LinearConfig, tokens: int, found: LayerActivations) -> None:
    """A low-rank adapter keeps the product of its first matrix; with dropout, what it let through too."""
    if not isinstance(linear.adapter, Lora):
        return
    found.add("adapters", tokens * linear.adapter.rank * job.program.compute)
    if linear.adapter.dropout:
        found.add("adapters", tokens * linear.in_features * (job.program.compute + 1))


def _reads(job: Job, linear: LinearConfig, path: str) -> bool:
    """Whether a layer's input is needed backward: for a trained weight, or for an adapter beside a frozen one."""
    return linear.adapter is not None or job.is_trained(f"{path}.weight")
