import importlib.metadata
import mmap
import os
import platform
import subprocess
import sys

import pytest

from dfqc.compiler import machine

linux = pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")


def fill_fresh_pages(size):
    """Touch memory that no allocator had before: freed heap would not raise the peak."""
    with mmap.mmap(-1, size) as memory:
        memory.write(b"x" * size)


@linux
def test_the_peak_is_that_of_the_block():
    with machine.measured() as big:
        fill_fresh_pages(64 << 20)
    with machine.measured() as small:
        pass
    assert big.peak_rss_bytes - small.peak_rss_bytes > 48 << 20


@linux
def test_an_outer_block_sees_the_peaks_before_and_inside_an_inner_one():
    with machine.measured() as outer:
        fill_fresh_pages(64 << 20)
        with machine.measured() as inner:
            pass
    assert outer.peak_rss_bytes - inner.peak_rss_bytes > 48 << 20
    with machine.measured() as outer, machine.measured() as inner:
        fill_fresh_pages(64 << 20)
    assert outer.peak_rss_bytes >= inner.peak_rss_bytes


def test_a_block_is_measured_when_it_fails_too():
    with pytest.raises(ValueError, match="x"), machine.measured() as usage:
        raise ValueError("x")
    assert usage.peak_rss_bytes > 0


@linux
def test_memory_agrees_with_psutil():
    psutil = pytest.importorskip("psutil")
    assert machine.total_memory() <= psutil.virtual_memory().total
    rss = psutil.Process().memory_info().rss
    assert abs(machine.current_rss() - rss) < 32 << 20


def test_versions_are_read_without_importing():
    code = (
        "import sys; from dfqc.compiler import machine;"
        "print(machine.version('numpy')); sys.exit('numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == importlib.metadata.version("numpy")
    assert machine.versions("no-such-distribution") == {"no-such-distribution": None}


def test_the_cpu_is_described():
    assert machine.cpu_model()
    assert 1 <= machine.cpu_count() <= os.cpu_count()
    assert set(machine.integer_flags()) <= {
        "avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2), ("150000 100000\n", 1), ("10000 100000", 1), ("max 100000", None)],
)
def test_a_containers_quota_is_read(tmp_path, text, cores):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert machine.cpu_quota(file) == cores
    assert machine.cpu_quota(tmp_path / "absent") is None
