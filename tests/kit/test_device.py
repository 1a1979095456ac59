"""What a device is good for, by its name, capability, memory and flags."""

import pytest
import torch

from autoresearch.kit import device as kit_device
from autoresearch.kit.device import compute_dtype, peak_tflops, pick_size

PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA GeForce RTX 4070 Ti SUPER": 88.2,
    "NVIDIA GeForce RTX 4090 Laptop GPU": 0,
    "AMD Instinct MI355X": 2516.6,
    "AMD EPYC": 0,
}


def test_the_peak_by_the_device_name():
    assert {name: peak_tflops(name) for name in PEAKS} == PEAKS


class Card:
    def __init__(self, major, minor, gb):
        self.major = major
        self.minor = minor
        self.total_memory = int(gb * 1e9)  # as torch says it, a little under the name's


@pytest.mark.parametrize(
    "card, size",
    [
        (Card(9, 0, 85), "h100"),
        (Card(12, 0, 102), "h100"),  # RTX PRO 6000 Blackwell
        (Card(9, 0, 10.5), "gpu"),  # a slice of an H100
        (Card(8, 6, 51), "gpu"),  # RTX A6000
        (Card(8, 9, 25.3), "gpu"),  # RTX 4090
    ],
)
def test_the_size_by_capability_and_memory(monkeypatch, card, size):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert pick_size(torch.device("cuda"), "climbmix") == size
    assert pick_size(torch.device("cuda"), "demo") == "cpu"
    assert pick_size(torch.device("mps"), "climbmix") == "cpu"


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ("fpu avx2 avx512f", torch.float32),
        ("avx512f avx512_bf16", torch.bfloat16),
        ("", torch.float32),
    ],
)
def test_bf16_where_the_processor_multiplies_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(kit_device, "cpu_flags", lambda: set(flags.split()))
    assert compute_dtype(torch.device("cpu")) == dtype
    assert compute_dtype(torch.device("mps")) == torch.float32


def test_a_card_that_only_emulates_bf16_computes_in_float32(monkeypatch):
    emulates = lambda including_emulation: including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    assert compute_dtype(torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
