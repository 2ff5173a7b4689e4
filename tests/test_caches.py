from pathlib import Path

import pytest
import torch

from dfqc.compiler.quantize._caches import Budget, Cache, Spilled, fill

CPU = torch.device("cpu")


def source(rows=10):
    return Cache(torch.arange(rows * 6, dtype=torch.float32).view(rows, 6), Budget())


def double(x):
    return 2 * x


def make(budget, dtype=torch.float32):
    return fill(budget, double, source(), batch=4, device=CPU, dtype=dtype)


@pytest.mark.parametrize("limit", [None, 0, 1 << 20])
def test_rows_come_back_from_memory_and_from_disk(limit):
    budget = Budget(limit)
    made = make(budget)
    index = torch.tensor([9, 0, 3])
    assert torch.equal(made.read(index, CPU), 2 * source().rows[index])
    assert torch.equal(made.read(slice(2, 5), CPU), 2 * source().rows[2:5])
    assert isinstance(made, Spilled) == (limit == 0)
    assert budget.spilled == (240 if limit == 0 else 0)
    budget.close()


def test_memory_is_counted_and_given_back():
    budget = Budget(500)
    first, second = make(budget), make(budget)
    assert budget.used == 480
    third = make(budget)
    assert third.path.stat().st_size == 240
    first.free()
    assert budget.used == 240
    assert isinstance(make(budget), Cache)
    third.free()
    assert not third.path.exists()
    second.free()
    budget.close()


def test_half_precision_takes_half():
    budget = Budget()
    made = make(budget, torch.float16)
    assert budget.used == 120
    assert made.read(slice(0, 2), CPU).dtype == torch.float32


@pytest.mark.parametrize("limit", [None, 0])
def test_what_half_precision_cannot_hold_is_held_in_full(limit, caplog):
    rows = Cache(torch.tensor([[1.0], [65504.0], [7e4]]), Budget())
    budget = Budget(limit)

    def store(values):
        return fill(budget, values, rows, batch=4, device=CPU, dtype=torch.float16)

    assert store(lambda x: x.clamp(max=65504)).read(slice(1, 3), CPU).max() == 65504
    assert (budget.widened, caplog.text) == (0, "")
    held = budget.used, budget.spilled
    wide = store(lambda x: x)  # made anew: nothing of the first attempt stays
    assert wide.read(slice(0, 3), CPU).tolist() == [[1.0], [65504.0], [7e4]]
    assert budget.widened == 1
    assert budget.used - held[0] == (12 if limit is None else 0)
    assert "values up to 7e+04" in caplog.text
    assert store(lambda x: x / 0).read(slice(0, 3), CPU).isinf().all()  # infinite before
    assert budget.widened == 1
    store(lambda x: torch.cat((x[:1] / 0, x[1:])))  # another one is not
    assert budget.widened == 2
    budget.close()


def test_files_go_with_the_budget():
    budget = Budget(0)
    folder = make(budget).path.parent
    assert folder.exists()
    budget.close()
    assert not folder.exists()


def test_a_spilled_cache_takes_no_memory_and_leaves_no_file_open(tmp_path):
    from dfqc.compiler import machine

    budget, rows = Budget(0, tmp_path), Cache(torch.ones(64, 250_000), Budget())
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    before = machine.current_rss()
    made = fill(budget, lambda x: x, rows, batch=4, device=CPU, dtype=torch.float32)
    assert machine.current_rss() - before < 32 << 20  # of 64 MB
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
    assert made.path.stat().st_size == 64_000_000
    assert made.path.is_relative_to(tmp_path)
    budget.close()
