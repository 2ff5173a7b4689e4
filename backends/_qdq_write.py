"""Turn markers into Q/DQ: an exported model with `dfqc::Tap` nodes in, integer initializers out."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx_ir as ir

from dfqc.compiler import affine
from dfqc.compiler.contracts import QParams, QuantState
from dfqc.compiler.spec import LayerPlan, QScheme, Quantizer, TargetSpec

PACKED_BITS = 4  # weights of this many bits and fewer are stored two to a byte
BLOCKS = (128, 64, 32, 16)  # inputs that share a scale in a weight-only INT4 product
HELPER = "%"  # begins the names that are not the user's, so that the two never meet


class QdqWriter:
    """Replaces every marker of one model; `run` fills the maps.

    `taps` maps quantizers to the value with their codes, `layers` module paths to the value they
    compute, `saturating` the id of each Q node to the real interval its grid covers.
    """

    def __init__(self, model: ir.Model, state: QuantState, target: TargetSpec) -> None:
        self.graph = model.graph
        self.state = state
        self.target = target
        self.taps: dict[str, ir.Value] = {}
        self.layers: dict[str, ir.Value] = {}
        self.saturating: dict[int, tuple[float, float]] = {}
        self.constants: dict[tuple[str, str, bytes], ir.Value] = {}
        self.spared: set[str] = set()  # quantizers whose codes are there without them

    def run(self) -> None:
        """Replace all markers; raise RuntimeError if a planned one is missing."""
        for node in list(self.graph):
            if node.domain != "dfqc":
                continue
            kind, _, name = node.attributes["name"].as_string().partition(":")
            if kind == "a":
                self._activation(node, self.state.plan.quantizers[name])
            else:
                self._weight(node, self.state.plan.layers[name])
        self._check_complete()

    def name_values(self) -> tuple[dict[str, str], dict[str, str]]:
        """Name every value once the graph is final; return the maps with names for values.

        Codes bear the name of their quantizer and layers their module path, whatever the exporter
        had called by that name; the rest are numbered. Inputs and outputs keep their names.
        """
        values = [value for node in self.graph for value in node.outputs]
        for count, value in enumerate(v for v in values if v.name and not v.is_graph_output()):
            value.name = f"{HELPER}{count}"
        fixed = {value.name for value in (*self.graph.inputs, *self.graph.outputs)}
        for name, value in (*self.taps.items(), *self.layers.items()):
            if not value.is_graph_output():
                value.name = f"{HELPER}{name}" if name in fixed else name
        taps = {name: value.name or "" for name, value in self.taps.items()}
        return taps, {name: value.name or "" for name, value in self.layers.items()}

    def _check_complete(self) -> None:
        planned = set(self.state.plan.quantizers)
        weights = {p.name for p in self.state.plan.layers.values() if p.weight is not None}
        missing = (planned - self.taps.keys() - self.spared) | (weights - self.layers.keys())
        if missing:
            raise RuntimeError(f"planned but not found in the exported model: {sorted(missing)}")

    def _activation(self, tap: ir.Node, quantizer: Quantizer) -> None:
        """Write Q, the clip that keeps a grid below 8 bits, and DQ in place of a marker."""
        if self._is_spare(tap, quantizer):
            self.spared.add(quantizer.name)
            self._swap(tap, [])
            return
        qparams, scheme = self.state.acts[quantizer.name], quantizer.scheme
        scale = self._constant(np.float32(qparams.scale))
        zero_point = self._constant(self._code_type()(qparams.zero_point))
        low, high = _interval(qparams, scheme)
        source = tap.inputs[0]
        nodes = []
        if scheme.bits < 8 and self.target.clip == "float":
            bounds = [self._constant(np.float32(low)), self._constant(np.float32(high))]
            nodes.append(ir.node("Clip", [source, *bounds]))
            source = nodes[-1].outputs[0]
        first = ir.node("QuantizeLinear", [source, scale, zero_point])
        nodes.append(first)
        if scheme.bits < 8 and self.target.clip == "integer":
            code = self._code_type()
            limits = [
                self._constant(code(scheme.quant_min)),
                self._constant(code(scheme.quant_max)),
            ]
            nodes.append(ir.node("Clip", [first.outputs[0], *limits]))
        codes = self.taps[quantizer.name] = nodes[-1].outputs[0]
        nodes.append(ir.node("DequantizeLinear", [codes, scale, zero_point]))
        self.saturating[id(nodes[0])] = (low, high)
        self._swap(tap, nodes)

    def _is_spare(self, tap: ir.Node, quantizer: Quantizer) -> bool:
        """Report whether a quantizer repeats, behind a maximum pool, the grid in front of it.

        ONNX Runtime needs it there for its integer pool. OpenVINO moves the scale behind the pool
        itself, and would round the codes once more: a pass over them.
        """
        pool = tap.inputs[0].producer() if tap.inputs[0] is not None else None
        fuses = self.target.placement == "fused" and quantizer.tied is not None
        return fuses and pool is not None and pool.op_type == "MaxPool"

    def _weight(self, tap: ir.Node, layer: LayerPlan) -> None:
        """Write the integer weight and its DQ in place of a marker, and the snapped bias."""
        assert layer.weight is not None
        stored = self.state.weights[layer.name]
        codes, axis = stored.codes.cpu().numpy(), 0
        users = [use.node for use in tap.outputs[0].uses()]
        if len(users) == 1 and users[0].op_type == "Transpose":
            # Linear over more than two dimensions: MatMul wants (in, out).
            transpose, codes, axis = users[0], np.ascontiguousarray(codes.T), 1
            _replace_uses(transpose.outputs[0], tap.outputs[0])
            self.graph.remove(transpose, safe=True)
            users = [use.node for use in tap.outputs[0].uses()]
        (user,) = users
        if self.target.block_int4 and layer.exported.weight_only:
            block = block_size(codes.shape[1 - axis], codes.shape[axis])
            if layer.weight.bits <= PACKED_BITS and block:
                if axis == 0:
                    codes = np.ascontiguousarray(codes.T)
                self._weight_blocks(tap, layer, codes, block)
                return
        name = f"{layer.name}.weight"
        nodes: list[ir.Node] = []
        source = self._initializer(name, _pack(codes, layer.weight.bits, self.target))
        if source.dtype == ir.DataType.INT4:
            # Cast is folded when the engine loads; a DQ of INT4 would keep the layer in float.
            nodes.append(ir.node("Cast", [source], {"to": ir.DataType.INT8}))
            source = nodes[-1].outputs[0]
        inputs = [source, self._initializer(_scale_name(name), stored.scale.cpu().numpy())]
        if user.op_type != "Conv":  # integer matrix products need the zero point spelled out
            inputs.append(self._constant(np.zeros(len(stored.scale), np.int8)))
        nodes.append(ir.node("DequantizeLinear", inputs, {"axis": axis}))
        self._swap(tap, nodes)
        self._bias(user, layer, inputs[1])
        user.name = layer.name
        self.layers[layer.name] = user.outputs[0]

    def _weight_blocks(self, tap: ir.Node, layer: LayerPlan, codes: np.ndarray, block: int) -> None:
        """Write INT4 codes (in, out) with a scale per block of inputs, read by a MatMul.

        The scales of a channel's blocks are equal: the grid is the simulation's, per channel. What
        the blocks buy is the engine's weight-only kernel.
        """
        (user,) = [use.node for use in tap.outputs[0].uses()]
        if user.op_type == "Gemm":
            user = self._split_gemm(user, tap)
        name = f"{layer.name}.weight"
        source = self._initializer(name, codes.astype(ml_dtypes.int4))
        scale = self.state.weights[layer.name].scale.cpu().numpy()
        scales = np.ascontiguousarray(np.broadcast_to(scale, (len(codes) // block, len(scale))))
        step = self._initializer(_scale_name(name), scales)
        attributes = {"axis": 0, "block_size": block}
        self._swap(tap, [ir.node("DequantizeLinear", [source, step], attributes)])
        self._bias(user, layer, step)
        user.name = layer.name
        self.layers[layer.name] = user.outputs[0]

    def _split_gemm(self, gemm: ir.Node, tap: ir.Node) -> ir.Node:
        """Replace a Gemm by a MatMul on a weight (in, out), and an Add where it has a bias."""
        product = ir.node("MatMul", [gemm.inputs[0], tap.outputs[0]])
        nodes = [product]
        if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
            nodes.append(ir.node("Add", [product.outputs[0], gemm.inputs[2]]))
        self.graph.insert_before(gemm, nodes)
        _replace_uses(gemm.outputs[0], nodes[-1].outputs[0])
        self.graph.remove(gemm, safe=True)
        return product

    def _bias(self, user: ir.Node, layer: LayerPlan, weight_step: ir.Value) -> None:
        """Store the bias on the int32 grid of input scale times weight scale.

        The product is left to the engine, which folds it when it loads: stored, it would be one
        more float per channel, a tenth of a small depthwise network.
        """
        bias = self.state.biases.get(layer.name)
        if bias is None:
            return
        slot = self._bias_slot(user)
        if slot is None and not bias.any():
            return  # the exporter drops a bias of zeros
        if slot is None:
            raise RuntimeError(f"{layer.name}: its bias was not found in the exported model")
        node, index = slot
        name = f"{layer.name}.bias"
        if layer.input is None:
            node.replace_input_with(index, self._initializer(name, bias.cpu().float().numpy()))
            return
        scale = self.state.acts[layer.input].scale
        weight_scale = self.state.weights[layer.name].scale.cpu()
        codes = affine.bias_codes(bias.cpu(), scale, weight_scale)
        if self.target.bias == "float32" or node is not user:
            step = affine.bias_scale(scale, weight_scale)
            value = self._initializer(name, (codes.float() * step).numpy())
        else:
            product = ir.node("Mul", [weight_step, self._constant(np.float32(scale))])
            inputs = [self._initializer(name, codes.numpy()), product.outputs[0]]
            dequantize = ir.node("DequantizeLinear", inputs, {"axis": 0})
            self.graph.insert_before(node, [product, dequantize])
            value = dequantize.outputs[0]
        node.replace_input_with(index, value)

    def _bias_slot(self, user: ir.Node) -> tuple[ir.Node, int] | None:
        """Return where the bias enters: third input, or the Add behind a MatMul."""
        if len(user.inputs) > 2 and user.inputs[2] is not None:
            return user, 2
        if user.op_type == "MatMul":
            for use in user.outputs[0].uses():
                other = use.node.inputs[1 - use.idx] if use.node.op_type == "Add" else None
                if other is not None and other.is_initializer():
                    return use.node, 1 - use.idx
        return None

    def _swap(self, tap: ir.Node, nodes: Iterable[ir.Node]) -> None:
        chain = list(nodes)
        self.graph.insert_before(tap, chain)
        last = chain[-1].outputs[0] if chain else tap.inputs[0]
        assert last is not None
        _replace_uses(tap.outputs[0], last)
        self.graph.remove(tap, safe=True)

    def _code_type(self) -> type[np.int8] | type[np.uint8]:
        return np.int8 if self.target.act_signed else np.uint8

    def _constant(self, value: np.generic | np.ndarray) -> ir.Value:
        """Return a shared initializer: equal constants are stored once."""
        array = np.asarray(value)
        key = (str(array.dtype), str(array.shape), array.tobytes())
        if key not in self.constants:
            self.constants[key] = self._initializer(f"{HELPER}c{len(self.constants)}", array)
        return self.constants[key]

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def block_size(inputs: int, outputs: int) -> int:
    """Return the block of a weight-only INT4 product: the largest that divides its inputs.

    0 where there is none, and where two codes to a byte do not fill the rows of all parsers.
    """
    return next((b for b in BLOCKS if inputs % b == 0 and outputs % 2 == 0), 0)


def _scale_name(name: str) -> str:
    """Return `<path>.ws`: long names weigh in a file of a few kilobytes."""
    path, _, kind = name.rpartition(".")
    return f"{path}.{kind[0]}s"


def _interval(qparams: QParams, scheme: QScheme) -> tuple[float, float]:
    """Return the real values at the two ends of a grid."""
    low = (scheme.quant_min - qparams.zero_point) * qparams.scale
    return low, (scheme.quant_max - qparams.zero_point) * qparams.scale


def _pack(codes: np.ndarray, bits: int, target: TargetSpec) -> np.ndarray:
    if bits <= PACKED_BITS and target.packed_int4:
        packed: np.ndarray = codes.astype(ml_dtypes.int4)
        return packed
    return codes


def _replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand for `old`, as an output of the model too."""
    if old.is_graph_output():
        new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
