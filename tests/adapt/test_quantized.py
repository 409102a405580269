"""Number formats: the published algorithms' numbers, and that storage, slices and lookups agree with the whole."""

import pytest
import torch

from trainwright.adapt.quantize import FewerBits
from trainwright.model.kernels import quantized

SHAPES = [(7, 64), (96, 192), (5, 100), (3, 8, 128)]


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_nf4_codes_and_scales_by_hand():
    row = torch.zeros(1, 128)
    row[0, :64] = torch.tensor(quantized.NF4_CODE).repeat(4) * 3.0
    row[0, 64:] = 0.5
    codes, absmax = quantized.quantize("nf4", row, double=False)
    expected = torch.arange(16, dtype=torch.uint8).repeat(4)
    assert torch.equal(codes[0, :32], expected[0::2] << 4 | expected[1::2])
    assert torch.equal(codes[0, 32:], torch.full((32,), 255, dtype=torch.uint8))
    assert torch.equal(absmax, torch.tensor([[3.0, 0.5]]))
    torch.testing.assert_close(quantized.dequantize("nf4", [codes, absmax], 128, torch.float32), row)


def test_dynamic_type_has_seven_decades():
    _, code = quantized.tables(torch.device("cpu"))
    assert code.numel() == 256 == code.unique().numel()
    assert code[127] == 0
    assert code[-1] == 1
    assert (code[1:] > code[:-1]).all()
    assert torch.isclose(code[code > 0].min(), torch.tensor(0.55e-6))


def test_numbers_are_those_of_bitsandbytes():
    """Without a live library: a digest of what bitsandbytes 0.50.2 gives for this weight, made with
    quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)."""
    w = torch.linspace(-1, 1, 96 * 192).sin().mul(0.05).view(96, 192).roll(31, 1)
    codes, absmax, scales, offset = quantized.quantize("nf4", w)
    assert codes.int().sum() == BNB["codes"]
    assert absmax.int().sum() == BNB["absmax"]
    torch.testing.assert_close(scales, torch.tensor(BNB["scales"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(offset, torch.tensor([BNB["offset"]]), rtol=1e-6, atol=0)
    back = quantized.dequantize("nf4", [codes, absmax, scales, offset], 192, torch.float32)
    assert back.double().square().sum().item() == pytest.approx(BNB["square_sum"], rel=1e-6)


BNB = {
    "codes": 1174346,
    "absmax": 37615,
    "scales": [0.022714238613843918, 0.018846595659852028],
    "offset": 0.02322695218026638,
    "square_sum": 12.757583339694705,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_are_those_of_a_live_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(shape)
    if shape[-1] % 64:
        pytest.skip("bitsandbytes lets blocks run over the end of a row, ours end with it")
    theirs, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax, scales, offset = quantized.quantize("nf4", w)
    assert torch.equal(codes.flatten(), theirs.flatten())
    # Its CPU code finds the nearest of 256 values through a coarse table and is one off now and then.
    assert (absmax.flatten().int() - state.absmax.int()).abs().max() <= 1
    torch.testing.assert_close(scales, state.state2.absmax)
    torch.testing.assert_close(offset[0], state.offset)
    back = functional.dequantize_4bit(theirs, state)
    same = [codes, state.absmax.view(absmax.shape), scales, offset]
    assert torch.equal(quantized.dequantize("nf4", same, shape[-1], torch.float32).view(back.shape), back)
    rows, row_max, _ = functional.int8_vectorwise_quant(w.flatten(0, -2).half())
    mine = quantized.quantize("int8", w.half())
    assert torch.equal(mine[0].view(torch.int8).flatten(0, -2), rows)
    torch.testing.assert_close(mine[1].flatten(), row_max)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_that_of_the_format(kind, shape):
    w = weight(shape)
    back = quantized.dequantize(kind, quantized.quantize(kind, w), shape[-1], torch.float32)
    error = ((back - w).norm() / w.norm()).item()
    assert 0.0001 < error < {"nf4": 0.11, "int8": 0.011, "fp8": 0.04}[kind]
    assert (back - w).abs().max() <= w.abs().max() * {"nf4": 0.2, "int8": 1 / 250, "fp8": 1 / 15}[kind]


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_as_empty_pieces_says_and_cost_what_the_planner_counts(kind, shape):
    pieces = quantized.quantize(kind, weight(shape))
    empty = quantized.empty_pieces(kind, shape)
    assert [(p.shape, p.dtype) for p in pieces] == [(p.shape, p.dtype) for p in empty]
    assert (
        sum(piece.nbytes for piece in pieces) == quantized.num_bytes(kind, shape) == FewerBits(kind).num_bytes(*shape)
    )


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_rows_by_rows_is_the_whole(kind, monkeypatch):
    w = weight((64, 192))
    whole = quantized.quantize(kind, w)
    monkeypatch.setattr(quantized, "_ROWS_NUMEL", 1000)
    assert all(torch.equal(a, b) for a, b in zip(quantized.quantize(kind, w), whole, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_slices_and_lookups_are_parts_of_the_whole(kind):
    w = weight((300, 192))
    pieces = quantized.quantize(kind, w)
    whole = quantized.dequantize(kind, pieces, 192, torch.float32)
    part = quantized.dequantize(kind, quantized.slice_rows(kind, pieces, 17, 203), 192, torch.float32)
    assert torch.equal(part, whole[17:203])
    ids = torch.tensor([[0, 299, 5], [5, 128, 77]])
    assert torch.equal(quantized.select_rows(kind, pieces, ids, 192, torch.float32), whole[ids])


def test_zero_rows_stay_zero():
    w = weight((4, 128))
    w[2] = 0
    for kind in ("nf4", "int8", "fp8"):
        back = quantized.dequantize(kind, quantized.quantize(kind, w), 128, torch.float32)
        assert back.isfinite().all()
        assert back[2].abs().max() == 0


def test_fp8_product_matches_its_rounded_operands():
    x, w = weight((10, 64), 1) * 50, weight((32, 64), 2)
    codes, scale = quantized.quantize("fp8", w)
    y = quantized.fp8_linear(x, codes, scale)
    assert ((y - x @ w.t()).norm() / (x @ w.t()).norm()) < 0.05
    grad = weight((10, 32), 3)
    back = quantized.fp8_linear_backward(grad, codes, scale)
    assert ((back - grad @ w).norm() / (grad @ w).norm()) < 0.05
