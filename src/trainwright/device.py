"""The accelerator, whatever it is: choosing it, naming it, its memory, its random numbers, its determinism.

Everything goes through `torch.accelerator`, so CUDA, ROCm, XPU, NPU and CUDA-like cards run what their torch runs.
Kernels choose for themselves in `model/kernels/`; process groups are `parallel/mesh.py`'s work.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

GIB = 2**30
_outside = 0  # bytes on this process's device that torch's own allocator did not give


def default_device(local_rank: int = 0) -> torch.device:
    """The accelerator of this process, or the CPU where there is none. Makes it the current device."""
    kind = os.environ.get("TRAINWRIGHT_DEVICE", "")
    if kind == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    torch.accelerator.set_device_index(local_rank)
    return torch.device(accelerator.type, local_rank)


def device_name(device: torch.device) -> str:
    """The device's own name, such as "NVIDIA H200"; "cpu" for the CPU."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def describe_devices() -> list[dict[str, str]]:
    """One row a device for `doctor` and environment.json: kind, name, memory."""
    if not torch.accelerator.is_available():
        capability = torch.backends.cpu.get_cpu_capability()
        return [{"kind": "cpu", "name": capability, "threads": str(torch.get_num_threads())}]
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    rows = []
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        row = {"kind": accelerator.type, "name": device_name(device)}
        properties: Any = torch.get_device_module(device).get_device_properties(index)
        if hasattr(properties, "total_memory"):
            row["memory"] = f"{properties.total_memory / GIB:.1f} GiB"
        rows.append(row)
    return rows


def widest_float(device: torch.device) -> torch.dtype:
    """float64, which counts tokens exactly; float32 on devices that have nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor from the CPU without waiting for the device, which a copy from pageable memory would."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def fetch(tensor: torch.Tensor) -> Callable[[], list[Any]]:
    """Begins to copy a tensor to the CPU; the call that comes back waits for this copy alone and gives the numbers,
    while the device goes on with what was queued since."""
    if tensor.device.type == "cpu":
        return tensor.tolist
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.Event(tensor.device)
    copied.record()

    def numbers() -> list[Any]:
        copied.synchronize()
        return list(here.tolist())

    return numbers


def synchronize(device: torch.device) -> None:
    """Waits for the device; nothing on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seed_everything(seed: int) -> None:
    """Seeds python, numpy, torch and every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Bit-exact repeats: deterministic kernels only, no autotuning that depends on timing.

    cuBLAS reads its workspace setting when the device starts, so call this before the first kernel.
    """
    torch.use_deterministic_algorithms(on)
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what was compiled runs as it is written."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


def get_rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Every generator of this process as tensors that safetensors can hold: python, numpy, torch, the device's."""
    _, words, gauss = random.getstate()
    state: dict[str, Any] = np.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(state["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([state["state"]["pos"], state["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state(device)
    return tensors


def set_rng_state(tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts every generator back where `get_rng_state` found it."""
    gauss = tensors["python_gauss"].tolist()
    random.setstate((3, tuple(tensors["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = tensors["numpy_position"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": tensors["numpy_gauss"].item(),
        }
    )
    torch.set_rng_state(tensors["torch"])
    if device.type in tensors:
        torch.get_device_module(device).set_rng_state(tensors[device.type], device)


def _optional(value: float | None) -> torch.Tensor:
    return torch.tensor([] if value is None else [value], dtype=torch.float64)


def note_outside(bytes_: int) -> None:
    """Counts device memory that is held until the end and that torch's allocator does not know of."""
    global _outside
    _outside += bytes_


def peak_memory_gib(device: torch.device) -> tuple[float | None, float | None]:
    """Most memory (allocated, reserved) since the start, in GiB. On a CPU: the process's resident peak, and None."""
    if device.type != "cpu":
        found = torch.accelerator.memory_stats(device)  # once: it takes half a millisecond
        allocated, reserved = (found.get(f"{kind}_bytes.all.peak") for kind in ("allocated", "reserved"))
        return allocated and (allocated + _outside) / GIB, reserved and (reserved + _outside) / GIB
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if os.uname().sysname == "Darwin" else 1024) / GIB, None
