"""What a layer keeps for its backward pass: predicted bytes equal those of the tensors that autograd really keeps."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.parallel.models import MODELS
from tests.parallel.parity import Case
from tests.parallel.worlds import run, world_of
from tests.planner.real import job_of, local, tree
from tests.planner.test_states import FAMILIES
from trainwright.adapt.lora import Lora, add_adapters
from trainwright.adapt.setup import freeze_base, start_adapters
from trainwright.model.config import ModelConfig, MoeConfig
from trainwright.model.linear import Linear
from trainwright.model.transformer import Transformer
from trainwright.parallel.expert import apply_experts
from trainwright.parallel.layout import Layout
from trainwright.planner.activations import layer_activations

ROWS, LENGTH, LAYER = 2, 64, 1
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kept_by_layer(model: nn.Module, vocab: int) -> dict[str, int]:
    """Bytes of the storages that each layer's forward pass is the first to save; weights left out."""
    weights = {local(tensor).untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
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


def built(config: ModelConfig, precision: str, masters: bool, adapted: bool) -> Transformer:
    model = Transformer(config)
    model.compute_dtype = DTYPES[precision]
    model.init_weights(1)
    if adapted:
        freeze_base(model)
        start_adapters(model, 1)
    if not masters:
        model.to(DTYPES[precision])
    return model.train()


def real(config: ModelConfig, precision: str, masters: bool, adapted: bool) -> int:
    return kept_by_layer(built(config, precision, masters, adapted), config.vocab_size)[str(LAYER)]


def mask_bytes(model: str, precision: str) -> int:
    """On a CPU torch's attention turns a dense mask into numbers and keeps them; on GPUs there is none."""
    size = LENGTH * LENGTH * torch.empty(0, dtype=DTYPES[precision]).itemsize
    return {"banded": size, "glm": ROWS * size, "golden:chatglm": ROWS * size}.get(model, 0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("precision", "masters"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_kept_bytes(model, precision, masters):
    case = Case(model, Layout(), length=LENGTH)
    config = tree(case)
    job = job_of(case, config, precision=precision, master_weights=masters, compile=False)
    found = real(config, precision, masters, adapted=False)
    assert layer_activations(job, LAYER).total + mask_bytes(model, precision) == found


def spread_experts(layout: Layout) -> tuple[int, int]:
    """(kept, predicted) where a token goes to all experts, so that as much comes to each rank as in the mean."""
    case = Case("mixtral", layout, length=LENGTH)
    block = tree(case).layers[LAYER]
    assert isinstance(block.mlp, MoeConfig)
    moe = replace(block.mlp, top_k=block.mlp.experts.num_experts)
    config = replace(tree(case), layers=(replace(block, mlp=moe),) * 2)
    job = job_of(case, config, precision="bf16", master_weights=False, compile=False)
    model = built(config, "bf16", False, False)
    apply_experts(model, world_of(layout).meshes["ep_tp"])
    return kept_by_layer(model, config.vocab_size)[str(LAYER)], layer_activations(job, LAYER).total


def test_kept_bytes_of_experts_on_several_ranks():
    """Beside them there are, of each layer, the counts of rows and a number that means nothing."""
    for kept, planned in run(2, spread_experts, Layout(world_size=2, ep=2)):
        assert 0 <= kept - planned <= 64


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_bytes_of_families(family):
    case = Case(f"golden:{family}", Layout(), length=LENGTH)
    config = tree(case)
    job = job_of(case, config, precision="bf16", master_weights=False, compile=False)
    found = real(config, "bf16", masters=False, adapted=False)
    assert layer_activations(job, LAYER).total + mask_bytes(case.model, "bf16") == found


@pytest.mark.parametrize("model", ["llama", "bloom", "glm", "qwen", "mixtral"])
@pytest.mark.parametrize("quantize", [None, "nf4", "int8", "fp8"])
def test_kept_bytes_with_adapters(model, quantize):
    case = Case(model, Layout(), length=LENGTH)
    config = tree(case, quantize, 4)
    job = job_of(case, config, precision="bf16", compile=False)
    found = real(config, "bf16", masters=False, adapted=True)
    assert layer_activations(job, LAYER).total + mask_bytes(model, "bf16") == found


@pytest.mark.parametrize("settings", [{"dora": True}, {"dropout": 0.1}, {"dora": True, "dropout": 0.1}], ids=str)
@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_kept_bytes_of_written_out_adapters(model, settings):
    case = Case(model, Layout(), length=LENGTH)
    config = add_adapters(tree(case), Lora(4, 8.0, **settings))
    job = job_of(case, config, precision="bf16", compile=False)
    assert layer_activations(job, LAYER).total == real(config, "bf16", masters=False, adapted=True)


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("model", ["llama", "bloom"])
def test_kept_bytes_of_products_in_8_bits(model, scaling):
    """Beside them each product keeps a float32 scale or two, which no plan counts."""
    case = Case(model, Layout(), length=LENGTH)
    config = tree(case)
    job = job_of(case, config, precision="bf16", master_weights=False, compile=False, float8=scaling)
    network = built(config, "bf16", masters=False, adapted=False)
    for module in network.modules():
        if isinstance(module, Linear):
            module.float8 = scaling
    found = kept_by_layer(network, config.vocab_size)[str(LAYER)]
    assert 0 <= found - layer_activations(job, LAYER).total <= 64


@pytest.mark.parametrize(("model", "masters"), [("llama", False), ("llama", True), ("bloom", False), ("banded", False)])
def test_compiled_layers_keep_the_same(model, masters):
    """Without a compiler of machine code: what waits between the passes is decided before it."""
    case = Case(model, Layout(), length=LENGTH)
    config = tree(case)
    network = built(config, "bf16", masters, adapted=False)
    layer = network.layers[str(LAYER)]
    layer.forward = torch.compile(layer.forward, backend="aot_eager_decomp_partition")
    job = job_of(case, config, precision="bf16", master_weights=masters, compile=True)
    found = kept_by_layer(network, config.vocab_size)[str(LAYER)]
    assert layer_activations(job, LAYER).total + mask_bytes(model, "bf16") == pytest.approx(found, rel=0.01)


def test_recomputation_keeps_less():
    case = Case("llama", Layout(), length=LENGTH)
    job = job_of(case, tree(case), precision="bf16", compile=False)
    activations = layer_activations(job, LAYER)
    assert activations.held("full") == ROWS * LENGTH * 32 * 2
    assert activations.held("full") < activations.held("selective") <= activations.held("none")
