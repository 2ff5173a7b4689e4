"""What the classes of the fake TensorRT do; `fake_trt.py` guards their names."""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx

from dfqc.backends import ort


class Plain:
    def _start(self, *arguments):
        self._arguments = arguments


class Builder(Plain):
    def create_network(self, flags):
        self._flags = flags
        return self._trt.INetworkDefinition()

    def create_builder_config(self):
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self):
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network, config):
        if self._world.build_fails:
            logger = self._arguments[0]
            logger.log(self._trt.ILogger.Severity.ERROR, "no implementation for node conv")
            return None
        plan = {
            "model": network._model.hex(),
            "outputs": network._marked,
            "profiles": [profile._shapes for profile in config._profiles],
        }
        return _memory(self._trt, json.dumps(plan).encode())


class HostMemory(Plain):
    def __bytes__(self):
        return self._data


def _memory(trt, data):
    memory = trt.IHostMemory()
    memory._data = data
    return memory


class Tensor(Plain):
    def _start(self, name, shape):
        self._name, self._shape = name, shape

    name = property(lambda self: self._name)
    shape = property(lambda self: self._shape)


class Layer(Plain):
    def _start(self, outputs):
        self._outputs = outputs

    num_outputs = property(lambda self: len(self._outputs))

    def get_output(self, index):
        return self._outputs[index]


class Network(Plain):
    def _start(self):
        self._marked, self._layers, self._inputs, self._model = [], [], [], b""

    num_inputs = property(lambda self: len(self._inputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]

    def mark_output(self, tensor):
        self._marked.append(tensor.name)


class Parser(Plain):
    def parse(self, model):
        network = self._arguments[0]
        if self._world.parse_errors:
            return False
        graph = onnx.load_from_string(model).graph
        for value in graph.input:
            dims = tuple(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)
            network._inputs.append(self._trt.ITensor(value.name, dims))
        for node in graph.node:
            outputs = [self._trt.ITensor(name, ()) for name in node.output]
            network._layers.append(self._trt.ILayer(outputs))
        network._model = model
        return True

    num_errors = property(lambda self: len(self._world.parse_errors))

    def get_error(self, index):
        return self._trt.ParserError(*self._world.parse_errors[index])


class ParserError(Plain):
    def node_name(self):
        return self._arguments[0]

    def node_operator(self):
        return self._arguments[1]

    def desc(self):
        return self._arguments[2]


class Config(Plain):
    profiling_verbosity = builder_optimization_level = hardware_compatibility_level = None

    def _start(self):
        self._profiles, self._cache, self._asked = [], None, 0

    def set_memory_pool_limit(self, pool, size):
        pass

    def set_flag(self, flag):
        pass

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data):
        return self._trt.ITimingCache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        self._asked += 1
        if self._world.stale_cache and self._asked == 1:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self):
        return self._cache


class TimingCache(Plain):
    def serialize(self):
        return _memory(self._trt, self._arguments[0] + b"measured;")


class Profile(Plain):
    def _start(self):
        self._shapes = {}

    def set_shape(self, name, low, best, high):
        self._shapes[name] = [list(low), list(best), list(high)]


class Runtime(Plain):
    engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan):
        try:
            return self._trt.ICudaEngine(json.loads(plan))
        except ValueError:
            self._arguments[0].log(self._trt.ILogger.Severity.ERROR, "magic tag does not match")
            return None


class Engine(Plain):
    def _start(self, plan):
        self._plan = plan
        self._data = bytes.fromhex(plan["model"])
        graph = onnx.load_from_string(self._data).graph
        self._graph = graph
        self._names = [graph.input[0].name, *plan["outputs"], graph.output[0].name]

    num_io_tensors = property(lambda self: len(self._names))
    num_optimization_profiles = property(lambda self: len(self._plan["profiles"]))

    def get_tensor_name(self, index):
        return self._names[index]

    def get_tensor_mode(self, name):
        modes = self._trt.TensorIOMode
        return modes.INPUT if name == self._names[0] else modes.OUTPUT

    def get_tensor_profile_shape(self, name, index):
        return self._plan["profiles"][index][name]

    def get_tensor_shape(self, name):
        dims = self._graph.input[0].type.tensor_type.shape.dim
        return tuple(d.dim_value or -1 for d in dims)

    def get_tensor_dtype(self, name):
        kinds = self._trt.DataType
        return kinds.INT8 if name in self._plan["outputs"] else kinds.FLOAT

    def create_execution_context(self):
        return self._trt.IExecutionContext(self)

    def create_engine_inspector(self):
        return self._trt.EngineInspector(self)


class Context(Plain):
    profiler = None

    def _start(self, engine):
        self._engine, self._addresses, self._values, self._profile = engine, {}, {}, -1
        self._file = tempfile.NamedTemporaryFile(suffix=".onnx")  # noqa: SIM115 (the context's)
        self._file.write(engine._data)
        self._file.flush()
        self._runner = ort.open_runner(Path(self._file.name), threads=1, as_written=True)

    def set_optimization_profile_async(self, index, stream):
        self._profile = index
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self._engine._plan["profiles"][self._profile][name]
        self._shape = shape
        return all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def infer_shapes(self):
        size = int(np.prod(self._shape))
        zeros = np.zeros(size, np.float32).reshape(self._shape)
        self._values = dict(self._runner.codes(zeros, self._engine._plan["outputs"]))
        return []

    def get_tensor_shape(self, name):
        return self._values[name].shape

    def execute_async_v3(self, stream):
        first = self._engine._names[0]
        count = int(np.prod(self._shape))
        raw = ctypes.string_at(self._addresses[first], 4 * count)
        images = np.frombuffer(raw, np.float32).reshape(self._shape)
        self._values = dict(self._runner.codes(images, self._engine._plan["outputs"]))
        for name, values in self._values.items():
            values = np.ascontiguousarray(values)
            ctypes.memmove(self._addresses[name], values.ctypes.data, values.nbytes)
        if self.profiler is not None:
            for node in self._engine._graph.node:
                if node.name:
                    self.profiler.report_layer_time(node.name, 0.25)
        return True


class Inspector(Plain):
    def get_engine_information(self, form):
        eleven = self._world.version.startswith("11")
        layers = [_layer(node, eleven) for node in self._arguments[0]._graph.node if node.name]
        ends = list(self._arguments[0]._names)
        key = "I/O Tensors" if eleven else "Bindings"
        return json.dumps({"Layers": layers, key: ends})


def _layer(node, eleven):
    tensor = {"Name": node.input[0], "Location": "Device", "Dimensions": [1, 3, 8, 8]}
    if eleven:
        tensor |= {"Format": "Row major linear", "DataType": "Int8"}
    else:
        tensor |= {"Format/Datatype": "Four wide channel vectorized row major Int8 format"}
    return {
        "Name": node.name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor],
        "Outputs": [tensor],
        "TacticName": "sm80_xmma_fprop_i8",
        "Metadata": f"[ONNX Layer: {node.name}]",
    }


IMPLEMENTATIONS = {
    "ILogger": Plain,
    "IProfiler": Plain,
    "Builder": Builder,
    "IHostMemory": HostMemory,
    "ITensor": Tensor,
    "ILayer": Layer,
    "INetworkDefinition": Network,
    "OnnxParser": Parser,
    "ParserError": ParserError,
    "IBuilderConfig": Config,
    "ITimingCache": TimingCache,
    "IOptimizationProfile": Profile,
    "Runtime": Runtime,
    "ICudaEngine": Engine,
    "IExecutionContext": Context,
    "EngineInspector": Inspector,
}
