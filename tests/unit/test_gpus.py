"""GPUs by the names that CUDA gives them."""

import pytest

from megatron_sstoken.gpus import GPUS, peak_flops


@pytest.mark.parametrize(
    ("device", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(device, key):
    assert peak_flops(device, "bf16") == (GPUS[key].bf16 if key else None)


def test_a_gpu_without_fp8_has_no_peak_in_it():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None and peak_flops("NVIDIA H200", "fp8") == 1979e12
