"""What a layer keeps for its backward pass: predicted bytes equal those of the tensors that autograd really keeps."""

import pytest
import torch
from torch import nn

from tests.parallel.models import MODELS
from tests.parallel.parity import Case
from tests.planner.real import job_of, tree
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.model.config import ModelConfig
from trainwright.model.transformer import Transformer
from trainwright.parallel.layout import Layout
from trainwright.planner.activations import layer_activations

ROWS, LENGTH, LAYER = 2, 64, 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kept_by_layer(model: nn.Module, vocab: int) -> dict[str, int]:
    """Bytes of the storages that each layer's forward pass is the first to save; weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    seen: dict[int, tuple[str, int]] = {}
    running = [""]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen.setdefault(storage.data_ptr(), (running[0], storage.nbytes()))
        return tensor

    for name, layer in model.layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: running.__setitem__(0, name))
        layer.register_forward_hook(lambda *_: running.__setitem__(0, ""))
    ids = torch.randint(0, min(vocab, 90), (ROWS, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(ids, labels=ids)
    sizes: dict[str, int] = {}
    for name, size in seen.values():
        sizes[name] = sizes.get(name, 0) + size
    del kept
    return sizes


def real(config: ModelConfig, precision: str, masters: bool, adapted: bool) -> int:
    model = Transformer(config)
    model.compute_dtype = DTYPES[precision]
    model.init_weights(1)
    if adapted:
        freeze_base(model)
        start_adapters(model, 1)
    if not masters:
        model.to(DTYPES[precision])
    return kept_by_layer(model, config.vocab_size)[str(LAYER)]


def mask_bytes(model: str, precision: str) -> int:
    """On a CPU torch's attention turns a dense mask into numbers and keeps them; on GPUs there is none."""
    size = LENGTH * LENGTH * torch.empty(0, dtype=DTYPES[precision]).itemsize
    return {"banded": size, "glm": ROWS * size}.get(model, 0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("precision", "masters"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_kept_bytes(model, precision, masters):
    case = Case(model, Layout(), length=LENGTH)
    config = tree(case)
    job = job_of(case, config, precision=precision, master_weights=masters, compile=False)
    found = real(config, precision, masters, adapted=False)
    assert layer_activations(job, LAYER).total + mask_bytes(model, precision) == found


@pytest.mark.parametrize("model", ["llama", "bloom"])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_kept_bytes_with_adapters(model, quantize):
    case = Case(model, Layout(), length=LENGTH)
    config = tree(case, quantize, 4)
    job = job_of(case, config, precision="bf16", compile=False)
    assert layer_activations(job, LAYER).total == real(config, "bf16", masters=False, adapted=True)


def test_recomputation_keeps_less():
    case = Case("llama", Layout(), length=LENGTH)
    job = job_of(case, tree(case), precision="bf16", compile=False)
    activations = layer_activations(job, LAYER)
    assert activations.held("full") == ROWS * LENGTH * 32 * 2
    assert activations.held("full") < activations.held("selective") <= activations.held("none")
