"""Mean and variance of activations without data: unfolded graph in, expected layer inputs out.

Every batch norm states the mean (beta) and the standard deviation (|gamma|) of its output. The
moments travel from there through the graph: clipped-normal formulas for ReLU and ReLU6
(Nagel et al. 2019, appendix C; the ReLU6 form by the same integrals), Gauss-Hermite quadrature
for other activations, and the op itself for ops that are linear in their input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqc.compiler.graph import LAYER_TYPES, Graph, Norm, batch_norms, node_shapes
from dfqc.compiler.operators import ADD, CAT, CLIP, GRID_PRESERVING, RELU

# Natural images: mean and standard deviation of a pixel in [0, 1].
PIXEL_MEAN, PIXEL_STD = 0.45, 0.225
_aten = torch.ops.aten
AVERAGING = frozenset({_aten.mean.dim, _aten.avg_pool2d.default, _aten.adaptive_avg_pool2d.default})
SMOOTH: dict[Any, Callable[[Tensor], Tensor]] = {
    _aten.silu.default: F.silu,
    _aten.hardswish.default: F.hardswish,
    _aten.sigmoid.default: torch.sigmoid,
    _aten.hardsigmoid.default: F.hardsigmoid,
    _aten.gelu.default: F.gelu,
    _aten.tanh.default: torch.tanh,
}
QUADRATURE_POINTS = 64


@dataclass(frozen=True)
class Moments:
    """Mean and variance maps of one activation, both of the shape it has for one image."""

    mean: Tensor
    var: Tensor


def expected_inputs(graph: Graph) -> dict[str, Tensor]:
    """Return, per layer (module path), the expected input for one image, (1, ...) float64.

    Layers whose input cannot be derived (an op that is not understood before any later batch
    norm) are left out: the caller must say so rather than guess.
    """
    return {path: moments.mean for path, moments in input_moments(graph).items()}


def folded_inputs(graph: Graph, folded: Graph) -> dict[str, Tensor]:
    """Return `expected_inputs` as the layers of the folded graph see them."""
    return {path: moments.mean for path, moments in folded_moments(graph, folded).items()}


def input_moments(graph: Graph) -> dict[str, Moments]:
    """Return, per layer (module path), mean and variance of its input; as `expected_inputs`."""
    walker = _MomentWalker(graph)
    with torch.inference_mode():
        walker.run(torch.zeros(1, *graph.image.size, dtype=torch.float64))
    return walker.inputs


def node_moments(graph: Graph) -> dict[str, Moments]:
    """Return, per node name, mean and variance of its output, as far as they can be derived."""
    walker = _MomentWalker(graph)
    walker.garbage_collect_values = False
    with torch.inference_mode():
        walker.run(torch.zeros(1, *graph.image.size, dtype=torch.float64))
    return {n.name: value for n, value in walker.env.items() if isinstance(value, Moments)}


def folded_moments(graph: Graph, folded: Graph) -> dict[str, Moments]:
    """Return `input_moments` as the layers of the folded graph see them.

    A layer that took in the batch norm before it reads what that batch norm read: its running
    statistics, not its beta and gamma.
    """
    expected = input_moments(graph)
    kept = {node.name for node in folded.module.graph.nodes}
    for norm in batch_norms(graph):
        if norm.node.name in kept or went_into_producer(norm, graph, folded):
            continue
        for path in (str(user.target) for user in norm.node.users):
            if path in expected:
                shape = expected[path].mean
                expected[path] = Moments(
                    _per_channel(norm.module.running_mean, shape),
                    _per_channel(norm.module.running_var, shape),
                )
    return expected


def _per_channel(values: Tensor | None, like: Tensor) -> Tensor:
    """Spread one value per channel over a map of the shape of `like`, (1, channels, ...)."""
    assert values is not None
    view = [1, -1] + [1] * (like.dim() - 2)
    return torch.zeros_like(like) + values.detach().cpu().double().view(view)


def went_into_producer(norm: Norm, graph: Graph, folded: Graph) -> bool:
    """Report whether a folded batch norm changed the layer before it."""
    source = norm.input
    while source.op == "call_function" and len(source.users) == 1:
        before = source.args[0]
        if not isinstance(before, fx.Node):
            return False
        source = before
    if source.op != "call_module" or len(source.users) != 1:
        return False
    path = str(source.target)
    layer = graph.module.get_submodule(path)
    if not isinstance(layer, LAYER_TYPES):
        return False
    after = folded.module.get_submodule(path)
    assert isinstance(after.weight, Tensor)
    same = torch.equal(layer.weight, after.weight.to(layer.weight))
    return not same or (layer.bias is None) != (after.bias is None)


def relu_moments(mean: Tensor, var: Tensor) -> Moments:
    """Return the moments of max(y, 0) for y ~ N(mean, var)."""
    std = var.clamp_min(1e-24).sqrt()
    t = mean / std
    cdf, pdf = _cdf(t), _pdf(t)
    first = mean * cdf + std * pdf
    second = (mean**2 + var) * cdf + mean * std * pdf
    return Moments(first, (second - first**2).clamp_min(0))


def clipped_moments(mean: Tensor, var: Tensor, cap: float) -> Moments:
    """Return the moments of min(max(y, 0), cap) for y ~ N(mean, var)."""
    std = var.clamp_min(1e-24).sqrt()
    low, high = -mean / std, (cap - mean) / std
    inside = _cdf(high) - _cdf(low)
    first = mean * inside + std * (_pdf(low) - _pdf(high)) + cap * (1 - _cdf(high))
    second = (
        (mean**2 + var) * inside
        + mean * std * _pdf(low)
        - std * (mean + cap) * _pdf(high)
        + cap**2 * (1 - _cdf(high))
    )
    return Moments(first, (second - first**2).clamp_min(0))


def leaky_relu_moments(mean: Tensor, var: Tensor, slope: float) -> Moments:
    """Return the moments of y for y > 0, slope * y otherwise, with y ~ N(mean, var)."""
    up, down = relu_moments(mean, var), relu_moments(-mean, var)
    first = up.mean - slope * down.mean
    second = up.var + up.mean**2 + slope**2 * (down.var + down.mean**2)
    return Moments(first, (second - first**2).clamp_min(0))


def smooth_moments(mean: Tensor, var: Tensor, function: Callable[[Tensor], Tensor]) -> Moments:
    """Return the moments of function(y), y ~ N(mean, var), by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_POINTS)
    first, second = torch.zeros_like(mean), torch.zeros_like(mean)
    std = var.sqrt()
    for point, weight in zip(points, weights / math.sqrt(2 * math.pi), strict=True):
        value = function(mean + std * point)
        first += weight * value
        second += weight * value**2
    return Moments(first, (second - first**2).clamp_min(0))


def _cdf(t: Tensor) -> Tensor:
    probability: Tensor = torch.special.ndtr(t)
    return probability


def _pdf(t: Tensor) -> Tensor:
    return torch.exp(-0.5 * t**2) / math.sqrt(2 * math.pi)


class _MomentWalker(fx.Interpreter):
    """Runs the graph on `Moments` instead of tensors; None stands for: not known."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module)
        self.shapes = node_shapes(graph)
        self.image = graph.image
        self.inputs: dict[str, Moments] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        zeros: Tensor = super().placeholder(target, args, kwargs)
        mean, std = (
            torch.tensor(v).double().view(1, -1, 1, 1) for v in (self.image.mean, self.image.std)
        )
        return Moments(zeros + (PIXEL_MEAN - mean) / std, zeros + (PIXEL_STD / std) ** 2)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            return self._module(n)
        if n.op == "call_function":
            return self._function(n)
        if n.op == "output":
            return None
        return super().run_node(n)

    def _module(self, node: fx.Node) -> Moments | None:
        module = self.fetch_attr(str(node.target))
        value = self.env[node.args[0]] if isinstance(node.args[0], fx.Node) else None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = self.shapes[node.name]
            view = [1, -1] + [1] * (len(shape) - 2)
            affine = module.weight is not None
            size = shape[1]
            beta = module.bias.double() if affine else torch.zeros(size, dtype=torch.float64)
            gamma = module.weight.double() if affine else torch.ones(size, dtype=torch.float64)
            zeros = torch.zeros(shape, dtype=torch.float64)
            return Moments(zeros + beta.view(view), zeros + (gamma**2).view(view))
        if not isinstance(value, Moments):
            return None
        self.inputs.setdefault(str(node.target), value)
        return _through_layer(module, value)

    def _function(self, node: fx.Node) -> Any:
        target = node.target
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if target is ADD and len(args) == 2 and all(isinstance(a, Moments) for a in args):
            return Moments(args[0].mean + args[1].mean, args[0].var + args[1].var)
        if target is CAT and all(isinstance(a, Moments) for a in args[0]):
            means, variances = [a.mean for a in args[0]], [a.var for a in args[0]]
            rest = args[1:]
            return Moments(target(means, *rest, **kwargs), target(variances, *rest, **kwargs))
        if not args or not isinstance(args[0], Moments):
            known = not any(a is None or isinstance(a, Moments) for a in _leaves(args))
            return super().run_node(node) if known else None
        return _through_function(target, args, kwargs)


def _through_function(target: Any, args: Any, kwargs: Any) -> Any:
    """Apply a function of one activation to its moments; None if it is not understood."""
    value: Moments = args[0]
    rest = args[1:]
    if any(isinstance(a, Moments) or a is None for a in _leaves(rest)):
        gate = rest[0] if rest else None
        if target is _aten.mul.Tensor and isinstance(gate, Moments):
            # A squeeze-excite gate: nearly constant beside what it scales, on either side of it.
            if value.mean.numel() < gate.mean.numel():
                value, gate = gate, value
            return Moments(value.mean * gate.mean, value.var * gate.mean**2)
        if any(isinstance(a, Moments) for a in _leaves(rest)):
            return None
    if target is RELU:
        return relu_moments(value.mean, value.var)
    if target is CLIP and rest and rest[0] == 0:
        return clipped_moments(value.mean, value.var, float(rest[1]))
    if target is _aten.leaky_relu.default:
        return leaky_relu_moments(value.mean, value.var, float(rest[0]) if rest else 0.01)
    if target in SMOOTH:
        return smooth_moments(value.mean, value.var, SMOOTH[target])
    if target is _aten.sym_size.int:
        return target(value.mean, *rest, **kwargs)
    if target in GRID_PRESERVING or target in AVERAGING:
        # Exact for the mean of linear ops; max pooling keeps the mean of one position, which is
        # a lower bound, and averages keep the variance of one, which is an upper one.
        return Moments(target(value.mean, *rest, **kwargs), target(value.var, *rest, **kwargs))
    return None


def _through_layer(module: nn.Module, value: Moments) -> Moments:
    """Return the moments behind a layer: exact mean; variance of independent inputs."""
    assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    weight = module.weight.double()
    bias = None if module.bias is None else module.bias.double()
    if isinstance(module, nn.Linear):
        return Moments(F.linear(value.mean, weight, bias), F.linear(value.var, weight**2))
    convolution = F.conv_transpose2d if isinstance(module, nn.ConvTranspose2d) else F.conv2d
    extra: dict[str, Any] = {
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
    }
    if isinstance(module, nn.ConvTranspose2d):
        extra["output_padding"] = module.output_padding
    return Moments(
        convolution(value.mean, weight, bias, **extra), convolution(value.var, weight**2, **extra)
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
