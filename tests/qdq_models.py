"""Hand-made QDQ models, what they compute, and packages around them; no torch, no lowering.

`tiny_net(images)` writes a small residual network node by node with `onnx.helper` and, beside
every node, computes it with numpy (exact integers, float64 where a real number is needed).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper

from dfqc.compiler import package, verify_package

SIZE = (3, 8, 8)
CLASSES = 5


@dataclass
class Value:
    """A value of the graph and, for the sample images, its numbers.

    `step` and `codes` are set behind a Q/DQ pair: `real = codes * step`, zero point subtracted.
    """

    name: str
    real: np.ndarray
    step: np.float32 | None = None
    codes: np.ndarray | None = None


@dataclass(frozen=True)
class Net:
    """A model with its name maps, and its exact outputs and codes for the sample images."""

    model: onnx.ModelProto
    images: np.ndarray
    outputs: np.ndarray
    codes: dict[str, np.ndarray]
    taps: dict[str, str]
    layers: dict[str, str]

    @property
    def data(self) -> bytes:
        return self.model.SerializeToString(deterministic=True)


@dataclass
class Writer:
    """Adds nodes to a graph and computes them in the same breath."""

    images: np.ndarray
    rng: np.random.Generator
    float32: bool = False  # leave everything in floating point
    nodes: list = field(default_factory=list)
    constants: dict = field(default_factory=dict)
    taps: dict = field(default_factory=dict)
    layers: dict = field(default_factory=dict)
    codes: dict = field(default_factory=dict)

    def constant(self, name, value):
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def node(self, op, inputs, output, **attributes):
        name = f"node_{output}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def quantize(self, x, name, zero_point=0, bits=8, step=None):
        """Q, an integer Clip below 8 bits, DQ; the scale fits the sample images."""
        if self.float32:
            return x
        levels = 2**bits - 1
        largest = np.abs(x.real).max()
        step = np.float32(step or largest / (levels - zero_point if zero_point else levels))
        codes = np.rint(x.real.astype(np.float32) / step) + zero_point
        codes = np.clip(codes, 0, levels).astype(np.uint8)
        s = self.constant(f"{name}.s", step)
        z = self.constant(f"{name}.z", np.uint8(zero_point))
        value = self.node("QuantizeLinear", [x.name, s, z], f"{name}.q")
        if bits < 8:
            low = self.constant(f"{name}.low", np.uint8(0))
            high = self.constant(f"{name}.high", np.uint8(levels))
            value = self.node("Clip", [value, low, high], f"{name}.c")
        self.taps[name], self.codes[name] = value, codes
        dq = self.node("DequantizeLinear", [value, s, z], f"{name}.dq")
        centered = codes.astype(np.int64) - zero_point
        return Value(dq, centered.astype(np.float32) * step, step, centered)

    def weight(self, path, shape, bits):
        limit = 2 ** (bits - 1) - 1
        codes = self.rng.integers(-limit, limit + 1, shape)
        fan_in = codes[0].size
        step = self.rng.uniform(0.5, 1.5, shape[0]) / (limit * fan_in**0.5)
        step = step.astype(np.float32)
        if self.float32:
            real = codes * step.reshape(-1, *[1] * (len(shape) - 1))
            return self.constant(f"{path}.weight", real.astype(np.float32)), codes, step
        if bits <= 4:
            name = self.constant(f"{path}.weight", codes.astype(ml_dtypes.int4))
            name = self.node("Cast", [name], f"{path}.weight.i8", to=TensorProto.INT8)
        else:
            name = self.constant(f"{path}.weight", codes.astype(np.int8))
        inputs = [name, self.constant(f"{path}.weight.s", step)]
        if len(shape) == 2:  # integer matrix products want the zero point
            inputs.append(self.constant(f"{path}.weight.z", np.zeros(shape[0], np.int8)))
        name = self.node("DequantizeLinear", inputs, f"{path}.weight.dq", axis=0)
        return name, codes, step

    def bias(self, path, x, step):
        """Return the bias input, and its real values: int32 behind a quantized input."""
        real = self.rng.normal(size=len(step)).astype(np.float32) * 0.2
        if x.step is None:
            return self.constant(f"{path}.bias", real), real.astype(np.float64)
        grid = x.step * step
        codes = np.rint(real.astype(np.float64) / grid).astype(np.int32)
        name = self.constant(f"{path}.bias", codes)
        scale = self.constant(f"{path}.bias.s", grid)
        name = self.node("DequantizeLinear", [name, scale], f"{path}.bias.dq", axis=0)
        return name, codes * grid.astype(np.float64)

    def conv(self, x, path, out, *, bits=8, group=1, kernel=3):
        shape = (out, x.real.shape[1] // group, kernel, kernel)
        weight, codes, step = self.weight(path, shape, bits)
        bias, bias_real = self.bias(path, x, step)
        pads = [kernel // 2] * 4
        name = self.node("Conv", [x.name, weight, bias], path, pads=pads, group=group)
        self.layers[path] = name
        sums = _conv(x.real if x.codes is None else x.codes, codes, kernel // 2, group)
        scale = step.astype(np.float64) * (1.0 if x.step is None else np.float64(x.step))
        per_channel = (1, -1, 1, 1)
        return Value(name, sums * scale.reshape(per_channel) + bias_real.reshape(per_channel))

    def linear(self, x, path, out, *, output, bits=8):
        weight, codes, step = self.weight(path, (out, x.real.shape[1]), bits)
        bias, bias_real = self.bias(path, x, step)
        self.layers[path] = self.node("Gemm", [x.name, weight, bias], output, transB=1)
        sums = (x.real if x.codes is None else x.codes).astype(np.float64) @ codes.T
        scale = step.astype(np.float64) * (1.0 if x.step is None else np.float64(x.step))
        return Value(output, sums * scale + bias_real)

    def relu(self, x, name):
        return Value(self.node("Relu", [x.name], name), np.maximum(x.real, 0))

    def add(self, x, y, name):
        return Value(self.node("Add", [x.name, y.name], name), x.real + y.real)

    def pool(self, x, name):
        real = x.real.astype(np.float64).mean((2, 3), keepdims=True)
        return Value(self.node("GlobalAveragePool", [x.name], name), real)

    def flatten(self, x, name):
        return Value(self.node("Flatten", [x.name], name), x.real.reshape(len(x.real), -1))

    def finish(self, output, metadata):
        def tensor(name, shape):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

        graph = helper.make_graph(
            self.nodes,
            "dfqc",
            [tensor("input", SIZE)],
            [tensor("output", output.real.shape[1:])],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", 21)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        outputs = output.real.astype(np.float32)
        return Net(model, self.images, outputs, self.codes, self.taps, self.layers)


def sample_images(count=16, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *SIZE)).astype(np.float32)


def tiny_net(images=None, *, weight=8, act=8, float32=False, seed=1, metadata=None):
    """A residual block between a full and a depthwise convolution, and a linear head.

    `act` below 8 narrows the inputs of the inner convolutions behind the 8-bit stream. 16 leaves
    activations in floating point (weight-only).
    """
    images = sample_images() if images is None else images
    w = Writer(images, np.random.default_rng(seed), float32)
    weight_only = act == 16

    def quantize(x, *args, **kwargs):
        return x if weight_only else w.quantize(x, *args, **kwargs)

    def narrow(x, name):
        return x if act >= 8 else w.quantize(x, name, bits=act)

    x = quantize(Value("input", images), "input.a8", 128)
    x = quantize(w.relu(w.conv(x, "stem", 8), "stem.relu"), "stem.a8")
    y = w.conv(narrow(x, "stem.narrow"), "block.depthwise", 8, bits=weight, group=8)
    y = quantize(w.relu(y, "block.relu"), "block.a8")
    y = w.conv(narrow(y, "block.narrow"), "block.pointwise", 8, bits=weight, kernel=1)
    y = quantize(y, "block.out", 120)
    x = quantize(w.relu(w.add(x, y, "sum"), "sum.relu"), "sum.a8")
    x = w.flatten(quantize(w.pool(x, "pool"), "pool.a8"), "flat")
    x = quantize(x, "flat.a8", step=None if weight_only or float32 else _step(w, "pool.a8"))
    x = w.linear(x, "head", CLASSES, output="output")
    properties = {"dfqc.weight_only": "true"} if weight_only and not float32 else {}
    return w.finish(x, properties | (metadata or {}))


def tiny_manifest(**extra):
    """The least a manifest must have."""
    image = {"size": list(SIZE), "mean": [0.5] * 3, "std": [0.25] * 3, "resize": None}
    return {"schema": 1, "dfqc": "0.0", "target": "ort", "bits": "w8a8", "image": image} | extra


def write_tiny_package(folder, *, manifest=None, golden=None, **net_options):
    """A package as the driver writes it, around `tiny_net`; returns the net."""
    net = tiny_net(**net_options)
    golden = golden or golden_of(net)
    path = folder.parent / f"{folder.name}.golden.npz"
    verify_package.write_golden(path, golden)
    contents = {
        "model.onnx": net.data,
        "float.onnx": tiny_net(float32=True).data,
        "golden.npz": path,
    }
    package.write_package(folder, tiny_manifest(**(manifest or {})), contents)
    path.unlink()
    return net


def golden_of(net, *, code_images=2, **changes):
    codes = {name: values[:code_images] for name, values in net.codes.items()}
    golden = verify_package.Golden(net.images, net.outputs, codes, net.taps, net.layers)
    return dataclasses.replace(golden, **changes)


def _step(writer, name):
    return float(numpy_helper.to_array(writer.constants[f"{name}.s"]))


def _conv(x, weight, pad, group):
    """Exact sums: int64 for codes, float64 for real inputs."""
    kind = np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64
    x = np.pad(x.astype(kind), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    inputs = np.split(windows, group, axis=1)
    filters = np.split(weight.astype(kind), group, axis=0)
    parts = [np.einsum("nchwij,ocij->nohw", i, f) for i, f in zip(inputs, filters, strict=True)]
    return np.concatenate(parts, axis=1)
