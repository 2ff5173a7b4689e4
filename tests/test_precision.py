"""Which precision a training takes, by what was asked for and what the device says of itself."""

import pytest
import torch

from dfqc.compiler.precision import choose_precision


def answering(answer):
    def is_bf16_supported(including_emulation=True):
        return answer or including_emulation

    return is_bf16_supported


@pytest.mark.parametrize(
    ("kind", "ask", "expected"),
    [
        ("cuda", answering(True), "bfloat16"),
        ("cuda", answering(False), "float32"),  # emulated: slower than float32
        ("xpu", lambda: True, "bfloat16"),  # cannot be asked about emulation
        ("mps", None, "float32"),
    ],
)
def test_auto_is_what_the_accelerator_computes_in(kind, ask, expected, monkeypatch):
    monkeypatch.setattr(getattr(torch, kind), "is_bf16_supported", ask, raising=False)
    assert choose_precision("auto", torch.device(kind)) == expected


def test_a_cpu_must_be_asked():
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == "float32"
    assert choose_precision("bfloat16", cpu) == "bfloat16"


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_what_was_asked_for_is_taken(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answering(asked == "float32"))
    assert choose_precision(asked, torch.device("cuda")) == asked
