"""The table of cards is found by the names that drivers really report."""

import subprocess
import sys

import pytest

from trainwright.planner.hardware import peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp8", 1671),
        ("NVIDIA H200", "fp8", 1978.9),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "fp8", 733),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", 80),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("Iluvatar BI-V150", "fp16", 96),  # one of the two dies of a board
    ],
)
def test_known_cards(name, dtype, tflops):
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"), [("cpu", "bf16"), ("NVIDIA A1000", "bf16"), ("Tesla V100-SXM2-32GB", "bf16")]
)
def test_what_is_not_known_is_none(name, dtype):
    assert peak_flops(name, dtype) is None


def test_no_torch():
    code = "import sys, trainwright.planner.hardware; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
