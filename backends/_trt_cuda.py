"""Device memory and one stream, by NVIDIA's cuda-python: arrays in, arrays out."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from dfqc.compiler.errors import EnvironmentFault

_MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # its name since 12.8, and before


class Device:
    """Named buffers that grow as they must, and a stream; `close` frees all."""

    def __init__(self) -> None:
        self._cuda = _import_runtime()
        self.stream = int(self._call("cudaStreamCreate"))
        self._buffers: dict[str, tuple[int, int]] = {}

    def buffer(self, name: str, size: int) -> int:
        """Return the address of at least `size` bytes."""
        address, held = self._buffers.get(name, (0, 0))
        if held < size or not address:
            if address:
                self._call("cudaFree", address)
            address = int(self._call("cudaMalloc", max(size, 1)))
            self._buffers[name] = address, max(size, 1)
        return address

    def upload(self, name: str, array: np.ndarray) -> int:
        """Copy an array to its buffer and return the address."""
        address = self.buffer(name, array.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpy", address, array.ctypes.data, array.nbytes, kind)
        return address

    def download(self, name: str, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        """Copy a buffer back."""
        array = np.empty(shape, kind)
        way = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpy", array.ctypes.data, self._buffers[name][0], array.nbytes, way)
        return array

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free everything."""
        for address, _ in self._buffers.values():
            self._call("cudaFree", address)
        self._buffers.clear()
        if self.stream:
            self._call("cudaStreamDestroy", self.stream)
            self.stream = 0

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the runtime; its functions return (error, value) or (error,)."""
        code, *values = getattr(self._cuda, function)(*arguments)
        if int(code):
            raise EnvironmentFault(
                f"the CUDA runtime answers {function} with {code}; is the GPU full or in use?"
            )
        return values[0] if values else None


def _import_runtime() -> Any:
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise EnvironmentFault(
        "engines are run through cuda-python, which cannot be imported; pip install cuda-python"
    )
