"""One signature per operation, several backends. A backend is chosen from device, dtype and mask, never by a flag day.

`attention`, `embedding`, `linear_cross_entropy`, `rms_norm`, `layer_norm`, `gated`, `grouped_linear`, `float8_linear`
live in their own files.
"""

from functools import cache


@cache
def has_triton() -> bool:
    """Whether Triton is here and there is a device for it."""
    from torch.utils._triton import has_triton

    return has_triton()


def chosen_backends() -> dict[str, str]:
    """Operation -> the backend that this machine takes for bf16 training, for `trainwright doctor`."""
    import torch

    from trainwright.model.kernels.attention import describe as attention
    from trainwright.model.kernels.float8 import describe as float8
    from trainwright.model.kernels.grouped import describe as experts
    from trainwright.model.kernels.product import describe as products

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return {
        "attention": attention(device),
        "cross entropy": "chunked, logits never held whole" + (", Triton" if has_triton() else ""),
        "norm": "torch fused" if device.type == "cuda" else "own backward",
        "token table": "own gradient, Triton" if device.type == "cuda" and has_triton() else "torch",
        "experts": experts(device),
        "float32 products on a CPU": products(),
        "train.float8": float8(device),
    }
