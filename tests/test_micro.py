"""Rows that fit into memory while something is trained."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import nn

from dfqc.compiler.quantize._micro import rows_at_once, training_bytes


def test_what_grows_with_rows_is_counted_and_parameters_are_not():
    # Kept of every row: the first layer's input, and the ReLU's result, which the second one reads.
    module = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 1000))
    row = torch.randn(1, 100)
    per_row = 4 * (100 + 50)
    assert rows_at_once(module, row, 10 * per_row) == 10
    assert rows_at_once(module, row, 11 * per_row - 1) == 10


def test_tensors_stay_small_on_a_cpu():
    # The larger of the two that are kept decides, not the weight, which does not grow.
    module = nn.Sequential(nn.Linear(1 << 12, 1 << 14), nn.ReLU(), nn.Linear(1 << 14, 2))
    row = torch.randn(1, 1 << 12)
    assert rows_at_once(module, row, 1 << 40) == (16 << 20) // (4 << 14)


def test_one_row_always_fits():
    assert rows_at_once(nn.Linear(8, 8), torch.randn(1, 8), 1) == 1


def test_nothing_is_held_when_it_has_been_counted():
    held = []
    module = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8))  # keeps its own output
    module[1].register_forward_hook(lambda _, __, output: held.append(weakref.ref(output)))
    rows_at_once(module, torch.randn(1, 8), 1000)
    gc.collect()
    assert len(held) == 2
    assert all(output() is None for output in held)


def test_the_share_follows_the_limit():
    assert training_bytes(1 << 30) == 1 << 28
    assert training_bytes(None) == 2 << 30
