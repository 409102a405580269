"""How a program does the work: what it keeps, copies, casts and overlaps, as a few numbers with reasons. No torch.

Owns the description of our own program (a function of the recipe and the device, in step with `model/kernels/`,
`train/` and `parallel/`) and the shape of the description of other programs, whose published tables are estimated too
(`bench/published/*.yaml`, key `program`). What the numbers add up to is `memory.py`'s and `speed.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from trainwright.errors import UserError
from trainwright.planner.hardware import Card
from trainwright.recipe.schema import Recipe

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# Bytes of optimizer state for each trained parameter, in units of the state's own type.
MOMENTS = {"adamw": 2.0, "adamw8bit": 0.0, "adafactor": 0.0, "lion": 1.0, "muon": 1.0, "sgd": 0.0}


@dataclass(frozen=True)
class Program:
    """Sizes are bytes an element unless said otherwise."""

    name: str = "trainwright"

    compiled: bool = False
    """Whether layers are compiled."""

    # ---- states, a parameter
    compute: int = 2
    """What matrices are multiplied in."""
    trained: int = 4
    """A trained weight as it stays on the device."""
    frozen: int = 2
    """A frozen weight that is not quantized."""
    outer: int = 0
    """A frozen token table or head that is not quantized; 0: like other frozen weights."""
    cast: int = 0
    """A copy of a trained weight in the compute type, kept from its use forward to its use backward (one process with
    float32 weights; several have FSDP's gathered copies)."""
    master: int = 0
    """A float32 copy inside the optimizer (the mixed-precision optimizers of DeepSpeed, Megatron, Paddle)."""
    gradient: int = 4
    """A gradient as it waits for the optimizer."""
    moment: int = 4
    """One of the optimizer's moments."""
    reduce: int = 4
    """A gradient while it is summed over ranks."""
    weights_sharded_from: int = 1
    """The ZeRO stage from which weights are sharded between steps. FSDP: always; then below 3 a gathered copy in the
    compute type lives through the step."""

    gradients_sharded_from: int = 2
    """The ZeRO stage from which gradients are sharded while micro batches accumulate."""

    # ---- what a layer keeps for its backward pass
    stream: int = 2
    """The residual stream, kept by each norm."""
    norm: int = 0
    """What a norm keeps beside its input and output, an element of the stream (float32 copies, where not fused)."""
    normed: int = 2
    """A norm's output, kept by the matrices that read it."""
    normed_inner: int = 2
    """The same of the norm before the MLP."""
    mixed: int = 0
    """What the matrix after attention keeps of its input beside the result that attention keeps."""
    queries: int = 2
    """Queries, keys and values as attention keeps them."""
    rotary: int = 0
    """What rotation keeps of queries and keys beside them."""
    scores: int = 0
    """Attention scores that are kept; 0 where attention never holds them (flash)."""
    inner: int = 6
    """The MLP's inner width: gate, up and their product."""
    plain_inner: int = 4
    """The same of an MLP without gate: before and after the activation."""
    sequence_parallel: bool = True
    """Whether tensor parallel ranks share out norms and stream."""
    gathers_again: bool = False
    """Whether they gather a layer's input again in the backward pass instead of keeping all of it."""

    # ---- what lives for a moment
    inner_work: int = 4
    """Gradients in a layer's backward pass, an element of the MLP's inner width."""
    stream_work: int = 2
    """The same of the stream."""
    scores_work: int = 0
    """Scores and their gradients while one layer's attention runs backward; 0 for flash."""
    quantized_work: int = 2
    """A quantized weight while it is multiplied, unpacked, an element of a layer's largest matrix."""
    logits: float = 10
    """A logit at the peak of the loss."""
    loss_chunk: int = 0
    """Tokens whose logits exist at once; 0: all of the micro batch."""
    trained_rows: int = 0
    """The same where the head is trained, or more; 0: no such rule."""
    head_work: int = 8
    """What the loss holds beside its gradient, an element of a trained head."""
    head_product: int = 0
    """What one product of the head's gradient holds before it is added, an element of a trained head."""
    optimizer_work: int = 0
    """A trained parameter of this rank's shard while the optimizer steps."""

    # ---- communication
    gathered_layers: float = 3.0
    """Layers whose whole weights exist at once under ZeRO-3, in the compute type."""
    reducing_layers: float = 1.0
    """Layers whose whole gradients are being summed while the next one runs backward."""
    outer_gathered: bool = True
    """Whether embedding and head stay gathered from forward to backward."""
    copies: bool = False
    """Whether copy engines move shards inside a machine (`parallel/copies.py`), through buffers of their own."""
    bucket_gib: float = 0.0
    """Fixed communication buffers, all together."""
    reserved: float = 1.04
    """What the allocator takes for what it gives while there is room: rounding and fragments, a share."""
    slack: float = 1.02
    """What it cannot do without when the card is nearly full."""
    idle_gradients: float = 0.0
    """Share of a rank's gradients whose memory activations cannot use, because another stream owns it (FSDP2 as torch
    has it: 1; at 72 GiB of 79 that memory was given back and taken again in every step)."""
    context_gib: float = 0.0
    """What the driver and loaded kernels take; 0: the calibration's figure."""
    workspace_gib: float = 0.03
    """Workspaces of matrix libraries."""

    # ---- speed
    attention: str = "cudnn"
    """Which row of the calibration's attention table."""
    stream_traffic: float = 36.0
    """Bytes moved by a layer's forward and backward, an element of the stream, beside matrices and attention."""
    inner_traffic: float = 18.0
    """The same of the MLP's inner width."""
    gated_apart: bool = False
    """Whether gated SiLUs are operations of their own (`model/kernels/gated.py`): both inputs are read once more, but
    the product is gone before its gradients come, of which one takes its place."""
    row_passes: float = 39.0
    """The same of rows on their way to experts and back, in readings or writings of all of them at the memory's full
    rate. Measured for scattered sums left to torch (two H200, row moe2 of `benchmarks/speed_gpu.py`): gathers 2,
    weighed sum and its gradient 10, copies 13, each sum of a token's rows 15 (its kernel is far from that rate)."""
    rows_once: bool = False
    """Whether a token's row goes once to each rank that has any of its experts (`parallel/expert.py`), or once for each
    of them, and is put in their order where it arrives: 10 passes more."""
    experts_alone: bool = False
    """Whether FSDP leaves out experts that no other rank holds (`parallel/shard.py`)."""
    scores_traffic: float = 0.0
    """The same of attention scores; 0 for flash."""
    logits_aligned: bool = True
    """Whether rows of logits begin where matrix units read them, also those of an odd vocabulary."""
    logits_traffic: float = 34.0
    """The same of logits."""
    head_traffic: float = 0.0
    """The same of a trained head's weight, each time that a chunk of the loss adds to its gradient."""
    unpack_passes: float = 1.0
    """How often a quantized weight's bytes, packed and unpacked, move to make it ready for one product."""
    kernels: int = 60
    """Host time of a layer, forward and backward, in starts of a kernel: it bounds small models and short rows."""
    adapter_kernels: int = 0
    """The same of each adapter in it."""
    packed_kernels: int = 0
    """The same of each matrix in fewer bits that has no adapter."""
    recompute: float = 1.0
    """Time of a recomputed forward pass, relative to the first one."""
    matmul: float = 1.0
    """Share of the calibration's matmul figure that this program reaches."""
    step_seconds: float = 0.0
    """Fixed time of an optimizer step."""
    optimizer_seconds: float = 0.0
    """Seconds for each 1e9 parameters of a rank's shard in the optimizer, beside memory traffic."""
    earlier_updates: bool = False
    """Whether AdamW's kernel is torch's, and that of 8 bit AdamW looks its codes up."""
    overlap: float = 1.0
    """Share of the calibration's overlap that this program reaches; 0: communication hides behind nothing."""

    def with_values(self, values: Mapping[str, Any]) -> Program:
        """Changed fields, by name. Raises UserError for a name that is none."""
        unknown = set(values) - {item.name for item in fields(self)}
        if unknown:
            raise UserError(f"program.{min(unknown)} is no property of a program: see planner/program.py")
        return replace(self, **values)


# Float32 logits that exist at once, in bytes: `model/kernels/cross_entropy.py` chooses its chunks by it.
LOGIT_CHUNK_BYTES = {"cpu": 96 << 20, "gpu": 512 << 20}
TRAINED_ROWS = 4096
# A head in fewer bits takes slices of its rows, and as many tokens as give so many logits (`adapt/head.py`).
HEAD_SLICE, HEAD_TILE = 4096, 1 << 24
ROUNDED_AT_ONCE = 1 << 24  # numbers, `kernels/quantized.py`


def own_program(recipe: Recipe, card: Card, world_size: int) -> Program:
    """Our own program for a recipe. Each number says where in the code it comes from."""
    train = recipe.train
    compute = BYTES[train.precision]
    wide = 4 if train.master_weights or train.precision == "fp32" else compute
    cpu = card.name == "CPU"
    compiled = train.compile is True or (train.compile == "auto" and not cpu)
    # Products in 8 bits, scaled by tensor, keep each input in 8 bits: once where the compiler sees that it is the same.
    # Compiled for a GPU they keep none, and round again what they were rounded from (measured: 74.9 GiB of a
    # Llama-3-8B where 86 were planned, `benchmarks/results/speed_h200_4.json`).
    narrow = train.float8 == "tensorwise"
    again = 0 if compiled and not cpu else 1 if compiled else 3
    eighth = min(1, again)
    # Streams of FSDP have memory of their own (sums of gradients on their way).
    fragments = 1.04 if world_size > 1 and not cpu else 1.02
    return Program(
        compiled=compiled,
        compute=compute,
        trained=4 if recipe.adapter else wide,
        frozen=compute,
        cast=compute if wide != compute and not recipe.adapter else 0,
        gradient=4 if recipe.adapter else wide,
        moment=4 if recipe.adapter else wide,
        stream=compute,
        normed=again if narrow else compute,
        # Compiled layers keep the same: what a product reads backward is not computed again (torch 2.11, 2.13).
        normed_inner=min(2, again) if narrow else compute,
        mixed=eighth if narrow else 0,
        queries=compute,
        inner=2 * compute + (eighth if narrow else compute),
        plain_inner=compute + (eighth if narrow else compute),
        inner_work=2 * compute,
        quantized_work=compute,
        stream_work=compute,
        # One chunk in float32 and its gradient in the compute type, on a CPU in float32 twice. The head's gradient in
        # float32: products are added in place, on a CPU in bf16 as tensors of their own (in the compute type first).
        logits=8 if compute == 4 else 10 if cpu else 6,
        head_work=4,
        head_product=6 if cpu and compute != 4 else 0,
        attention="cudnn" if recipe.model.attention in ("auto", "cudnn") else "flash",
        loss_chunk=train.loss_chunk,
        trained_rows=0 if cpu else TRAINED_ROWS,
        # Compiled layers fuse norms, rotation, activation and residuals into a few passes (`benchmarks/floor.py`).
        stream_traffic=(50.0 if compiled else 540.0) * compute / 2,
        inner_traffic=(18.0 if compiled else 50.0) * compute / 2,
        gated_apart=compiled and recipe.parallel.recompute != "none" and train.float8 is None,
        # Counted in `kernels/rows.py`: written for the experts, read for the sum, read and written for its gradients,
        # read for the gradient of the tokens (a third less than these kernels took); and the copies as measured.
        row_passes=18.0,
        rows_once=True,
        experts_alone=True,
        logits_traffic=34.0 if cpu else 18.0,
        head_traffic=12.0 if cpu and compute != 4 else 8.0,
        # `triton_quantized.py` reaches 2.5 to 3.5 TB/s of an H200's 4.3. On an H200 `triton_adamw8bit.py` takes 5.7 ms
        # for 1e9 parameters where 2.4 would be the memory's; `triton_adamw.py` reaches the memory's rate.
        unpack_passes=1.0 if cpu else 1.3,
        optimizer_seconds=0.0033 if train.optimizer == "adamw8bit" and not cpu else 0.0,
        kernels=_host_work(recipe, world_size, compiled),
        adapter_kernels=0 if train.cuda_graph else 230,
        packed_kernels=0 if train.cuda_graph else 90,
        reducing_layers=0.0 if cpu else 1.0,
        workspace_gib=0.0 if cpu else 0.03,
        gathers_again=_overlaps(recipe),  # `parallel/overlap.py`
        copies=not cpu and recipe.parallel.fsdp_transport != "nccl",
        reserved=max(1.04, fragments),
        slack=fragments,
    )


def _overlaps(recipe: Recipe) -> bool:
    """Whether products of tensor parallelism take gathers and scatters along: those of plain layers."""
    plain = recipe.adapter is None and recipe.quantize is None and recipe.train.float8 is None
    return recipe.parallel.async_tp and recipe.parallel.tp > 1 and plain


def _host_work(recipe: Recipe, world_size: int, compiled: bool) -> int:
    """What the host does for a layer, in starts of a kernel: Python, autograd and the dispatcher take several times as
    long as the kernels' own starts, and so do the hooks that gather weights and cut activations. Fitted on H200s to a
    1B Llama with rows of 1024, not compiled (`docs/layouts.md`). Adapters and matrices in fewer bits go through Python,
    compiled or not: fitted to a Llama-3-8B with a row of 512 (`planner_qlora_h200_1`: 9 ms a layer with seven
    adapters) and to Llama-2-7B (`002_llama2_7b_peft`: 3.3 ms with two, 4.5 ms with five int4 matrices besides)."""
    if recipe.train.cuda_graph:  # a recorded pass is started once
        return 0
    parallel = recipe.parallel
    tensor, context = (60, 60) if compiled else (420, 200)  # compiled layers have these collectives in their graph
    work = (120 if compiled else 600) + (200 if recipe.adapter else 0)
    if world_size > 1:
        work += 260 if parallel.pp == 1 else 40  # stages keep their weights gathered
    work += tensor if parallel.tp > 1 else 0
    return work + (context if parallel.cp > 1 else 0)


def chunk_tokens(program: Program, tokens: int, vocab: int, device: str, trained: bool) -> int:
    """Tokens whose logits exist at once (the rule of `model/kernels/cross_entropy.py: chunk_rows`)."""
    if program.loss_chunk:
        return min(tokens, program.loss_chunk)
    if program.name != "trainwright":
        return tokens
    chunks = max(1, -(-tokens * vocab * 4 // LOGIT_CHUNK_BYTES[device]))
    if trained and program.trained_rows:
        chunks = min(chunks, max(1, -(-tokens // program.trained_rows)))
    return -(-tokens // chunks)
