"""What a GPU can do at most: the denominator of an MFU."""

import torch

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "GH200": 989,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "A10G": 70,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""Dense bf16 with fp32 sums, by the makers' data sheets."""


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second by the maker's data sheet; None on a CPU, an unknown GPU, or in fp32."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(device_name: str) -> float | None:
    """The same for the GPU that its driver calls so, e.g. ``NVIDIA H100 80GB HBM3``."""
    words = set(device_name.replace("-", " ").split())
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    if not known:
        return None
    return PEAK_TFLOPS[max(known, key=lambda name: len(name.split()))] * 1e12
