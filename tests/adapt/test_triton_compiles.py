"""Every Triton kernel compiles to machine code of the cards it is meant for, which needs no card: Triton alone."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CARDS = (80, 90)


def compiled(kernel, types, constants, card, warps=4):
    """Machine code of `kernel` whose arguments without a constant have `types`, as its launcher passes them."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps}).asm["cubin"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("out", ["*bf16", "*fp32", "*fp16"])
def test_nf4(card, nested, out):
    from trainwright.model.kernels.triton_quantized import _nf4_kernel

    absmax = "*u8" if nested else "*fp32"
    types = ["*u8", absmax, "*fp32", "*fp32", "*fp32", "*fp32", out, "i32"]
    assert compiled(_nf4_kernel, types, {"NESTED": nested, "BLOCKS": 64}, card)


@pytest.mark.parametrize("card", CARDS)
def test_int8(card):
    from trainwright.model.kernels.triton_quantized import _int8_kernel

    assert compiled(_int8_kernel, ["*i8", "*fp32", "*bf16", "i32"], {"WIDTH": 4096}, card, 8)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("x", ["*bf16", "*fp32"])
def test_fp8_rows(scaled, x):
    from trainwright.model.kernels.quantized import FP8_LEAST_SCALE, FP8_MAX
    from trainwright.model.kernels.triton_quantized import _fp8_rows_kernel

    constants = {"columns": 14336, "LIMIT": FP8_MAX, "LEAST": FP8_LEAST_SCALE, "SCALED": scaled, "WIDTH": 4096}
    types = [x, "*fp32" if scaled else x, "*fp8e4nv", "*fp32"]
    assert compiled(_fp8_rows_kernel, types, constants, 90, 8)


@pytest.mark.parametrize("card", CARDS)
def test_transpose(card):
    from trainwright.model.kernels.triton_quantized import _transpose_kernel

    assert compiled(_transpose_kernel, ["*u8", "*u8", "i32", "i32"], {"SIZE": 128}, card, 8)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("weight", [tl.float32, tl.bfloat16], ids=str)
def test_adamw(card, guarded, weight):
    from trainwright.train import triton_adamw, triton_adamw8bit

    types = ["*i64", "*i64", "*i16", "*i32", "*fp32", "*fp32", *["fp32"] * 5, "i32"]
    both = {"WEIGHT": weight, "GRAD": tl.float32, "SCALED": guarded, "GUARDED": guarded, "ALIGNED": guarded}
    assert compiled(triton_adamw._adamw_kernel, types, {**both, "MOMENT": weight, "NUMBERS": 1024}, card)
    blocks = {"WHOLE": guarded, "SIZE": 256, "BLOCKS": 4, "TILES": 4}
    assert compiled(triton_adamw8bit._adamw_kernel, types, {**both, **blocks}, card)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32", "*fp16"])
def test_gated(card, kind):
    from trainwright.model.kernels.triton_gated import _gradients_kernel, _product_kernel

    assert compiled(_product_kernel, [kind, kind, kind, "i32"], {"BLOCK": 1024}, card)
    assert compiled(_gradients_kernel, [kind, kind, kind, kind, kind, "i32"], {"BLOCK": 1024}, card)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", ["*bf16", "*fp32", "*fp16"])
def test_embedding(card, kind):
    from trainwright.model.kernels.triton_embedding import _gradient_kernel

    constants = {"width": 4096, "ROWS": 8, "WIDTH": 512}
    assert compiled(_gradient_kernel, ["*i64", "*i64", kind, kind, "i32", "i32"], constants, card)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("out", ["*bf16", "*fp32", "*fp16"])
def test_cross_entropy(card, out):
    from trainwright.model.kernels.triton_cross_entropy import _softmax_kernel

    types = ["*fp32", "*i64", out, "*fp32"]
    constants = {"columns": 128256, "apart": 128256, "LEAST": -1e30, "WIDTH": 4096}
    assert compiled(_softmax_kernel, types, constants, card, 8)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", ["*bf16", "*fp32", "*fp16"])
def test_sums_of_rows(card, weighted, rows):
    from trainwright.model.kernels.triton_rows import _sums_kernel

    constants = {"width": 2048, "CHOICES": 8, "WEIGHTED": weighted, "WIDTH": 1024}
    types = [rows, "*fp32" if weighted else rows, "*i64", rows, "i32"]
    assert compiled(_sums_kernel, types, constants, card)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("rows", ["*bf16", "*fp32", "*fp16"])
def test_gradients_of_a_mix_of_rows(card, rows):
    from trainwright.model.kernels.triton_rows import _mix_gradients_kernel

    constants = {"width": 2048, "CHOICES": 8, "TILE": 8, "WIDTH": 512}
    types = [rows, rows, "*fp32", "*i64", rows, "*fp32", "i32"]
    assert compiled(_mix_gradients_kernel, types, constants, card)


@pytest.mark.parametrize("card", CARDS)
def test_sums_of_gradients(card):
    from trainwright.parallel.triton_sums import _add_kernel, _parts_kernel

    constants = {"RANK": 2, "RANKS": 4, "BLOCK": 1024}
    assert compiled(_parts_kernel, ["*bf16", "*bf16", "*fp32", "i32"], constants, card)
    assert compiled(_add_kernel, ["*fp32", "*bf16", "i32"], {"BLOCK": 1024}, card)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("x", "out", "scaled"), [
    ("*bf16", "*fp32", False), ("*fp16", "*fp32", False),
    ("*fp32", "*bf16", True), ("*fp32", "*fp32", True), ("*fp32", "*fp16", True),
])  # fmt: skip
def test_cast(card, x, out, scaled):
    from trainwright.model.kernels.triton_cast import _cast_kernel

    types = [x, "*fp32" if scaled else x, out, "i32"]
    assert compiled(_cast_kernel, types, {"SCALED": scaled, "BLOCK": 1024}, card)
