"""Batch-norm statistics: images in, the moments of every batch norm's input and losses on them out.

Shared by all synthesizers that match them. Shapes: moments are (c,), or (n, c) per image.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfqc.compiler import plugins
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.graph import Graph, batch_norms, copy_graph
from dfqc.compiler.precision import Precision, choose_precision

EPS = 1e-6  # added to variances before a root or a logarithm is taken (ZeroQ's and Genie's)


class Moments(NamedTuple):
    """Mean and variance (divisor n) per channel."""

    mean: Tensor
    var: Tensor


class Capture(NamedTuple):
    """What one forward pass gave: moments in the order of `BNTeacher.layers`, logits if asked."""

    moments: list[Moments]
    logits: Tensor | None


# loss(found, stored): a scalar, 0 where they agree.
Loss = Callable[[Sequence[Moments], Sequence[Moments]], Tensor]


class BNTeacher:
    """A frozen copy of a graph that returns the moments of the input of every batch norm.

    Each is computed where the forward pass meets the batch norm; nothing is computed behind the
    last one unless `logits` are asked for. Gradients flow to the images only. With `per_image`,
    moments are (n, c); inputs with one value per image and channel keep batch moments even then,
    since one value has no spread. `precision` is that of convolutions and matrix products, by
    autocast; statistics are taken in float32 always.

    Attributes:
        layers: module paths; a batch norm called again has its call's number behind `#`.
        stored: the running statistics, in the same order.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        *,
        per_image: bool = False,
        logits: bool = False,
        precision: Precision = "float32",
    ) -> None:
        copy = copy_graph(graph)
        copy.module.requires_grad_(False)
        taps = _instrument(copy, per_image, logits)
        if not taps:
            raise UnsupportedError(_no_norms_message())
        self.module = copy.module.to(device)
        chosen = choose_precision(precision, device)
        self.autocast = (device.type, getattr(torch, chosen), chosen != "float32")
        self.layers = tuple(taps)
        self.stored = [Moments(tap.mean, tap.var) for tap in taps.values()]

    def __call__(self, images: Tensor) -> Capture:
        """Run normalized images (n, c, h, w)."""
        # Convolutions follow the layout of their input; this one is faster on every net measured,
        # 1.1 to 2 times on a CPU.
        images = images.contiguous(memory_format=torch.channels_last)
        device, precision, enabled = self.autocast
        with torch.autocast(device, precision, enabled=enabled):
            found, logits = self.module(images)
        logits = None if logits is None else logits.float()
        return Capture([Moments(*pair) for pair in found], logits)


def moments(x: Tensor, *, per_image: bool = False) -> Moments:
    """Return the moments of `x` around 0: for values that are about standardized, as images are."""
    dims = (*range(2, x.dim()),) if per_image else (0, *range(2, x.dim()))
    mean = x.mean(dims)
    return Moments(mean, (x.square().mean(dims) - mean.square()).clamp_min(0))


def std_loss(
    found: Sequence[Moments], stored: Sequence[Moments], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Sum over layers and channels of the squared errors of mean and standard deviation.

    Averaged over images where moments are per image: ZeroQ (Cai et al. 2020). With weights 1/c
    (a mean over channels) and batch moments: Genie (Jeon et al. 2023).
    """
    terms = [
        ((f.mean - s.mean).square() + (_std(f.var) - _std(s.var)).square()).sum(-1).mean()
        for f, s in zip(found, stored, strict=True)
    ]
    if weights is not None:
        terms = [w * term for w, term in zip(weights, terms, strict=True)]
    return torch.stack(terms).sum()


def relative_loss(found: Sequence[Moments], stored: Sequence[Moments]) -> Tensor:
    """`std_loss` with each layer relative to its total variance.

    Layers then weigh alike whatever their scale (inputs of 0..255 make the first ones outweigh
    all others), and a dead channel cannot outweigh its layer.
    """
    return std_loss(found, stored, [1 / (s.var.sum() + EPS) for s in stored])


def var_loss(found: Sequence[Moments], stored: Sequence[Moments]) -> Tensor:
    """Sum over layers of the L2 norms of the errors of mean and variance: DeepInversion.

    Yin et al. 2020, eq. 4; norms are not squared.
    """
    pairs = list(zip(found, stored, strict=True))
    means = [torch.linalg.vector_norm(f.mean - s.mean, dim=-1).mean() for f, s in pairs]
    variances = [torch.linalg.vector_norm(f.var - s.var, dim=-1).mean() for f, s in pairs]
    return torch.stack(means + variances).sum()


def kl_loss(found: Sequence[Moments], stored: Sequence[Moments]) -> Tensor:
    """Sum over layers and channels of KL(stored || found) between normal distributions.

    The Knowledge Within (Haroush et al. 2020): log(s/σ) - (1 - (σ² + (μ - m)²) / s²) / 2 for
    stored μ, σ and found m, s.
    """
    terms = []
    for f, s in zip(found, stored, strict=True):
        var, wanted = f.var + EPS, s.var + EPS
        ratio = (wanted + (s.mean - f.mean).square()) / var
        terms.append(0.5 * ((var / wanted).log() - 1 + ratio).sum(-1).mean())
    return torch.stack(terms).sum()


def _std(var: Tensor) -> Tensor:
    return (var + EPS).sqrt()


def _instrument(graph: Graph, per_image: bool, logits: bool) -> dict[str, _Tap]:
    """Replace every batch norm by a tap and make the moments the output, in place."""
    module, nodes = graph.module, graph.module.graph
    taps: dict[str, _Tap] = {}
    found = []
    for number, norm in enumerate(
        n for n in batch_norms(graph) if n.module.running_mean is not None
    ):
        name = norm.path if norm.path not in taps else f"{norm.path}#{number}"
        taps[name] = _Tap(norm.module, per_image)
        module.add_submodule(f"_tap{number}", taps[name])
        with nodes.inserting_before(norm.node):
            call = nodes.call_module(f"_tap{number}", norm.node.args)
            normalized, *moments = [
                nodes.call_function(operator.getitem, (call, i)) for i in range(3)
            ]
        norm.node.replace_all_uses_with(normalized)
        nodes.erase_node(norm.node)
        found.append(tuple(moments))
    output = next(node for node in reversed(nodes.find_nodes(op="output")))
    output.args = ((tuple(found), output.args[0] if logits else None),)
    nodes.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return taps


class _Tap(nn.Module):
    """A batch norm in eval mode that also returns the moments of its input."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, per_image: bool) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.per_image = per_image
        weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", norm.running_mean.detach().clone())
        self.register_buffer("var", norm.running_var.detach().clone())
        self.register_buffer("scale", weight.detach() * (norm.running_var + norm.eps).rsqrt())
        self.register_buffer("bias", bias.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalized input, the mean and the variance of the input."""
        per_image = self.per_image and x[0, 0].numel() > 1
        # torch leaves `apply` without types.
        y, shift, var = _NormalizeAndMeasure.apply(  # type: ignore[no-untyped-call]
            x, self.mean, self.scale, self.bias, per_image
        )
        return y, self.mean + shift, var


class _NormalizeAndMeasure(torch.autograd.Function):
    """One pass forward and one backward over the activations, where torch's own ops take five.

    Moments are taken around the stored mean: `torch.var_mean` on a CPU takes 20 times as long as
    two sums, and around 0 the difference of the sums would lose the digits.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, per_image: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims = (*range(2, x.dim()),) if per_image else (0, *range(2, x.dim()))
        ctx.count = x[:, 0].numel() // (len(x) if per_image else 1)
        centered = x - _spread(mean, x)
        shift = centered.sum(dims) / ctx.count
        var = (centered.square().sum(dims) / ctx.count - shift.square()).clamp_min(0)
        ctx.save_for_backward(centered, scale, shift)
        return torch.addcmul(_spread(bias, x), centered, _spread(scale, x)), shift, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, d_y: Tensor, d_shift: Tensor, d_var: Tensor
    ) -> tuple[Tensor | None, ...]:
        """d_x = d_y * scale + (d_shift + 2 * d_var * (x - m)) / count."""
        centered, scale, shift = ctx.saved_tensors
        slope = 2 * d_var / ctx.count
        level = d_shift / ctx.count - slope * shift
        d_x = torch.addcmul(_spread(level, centered), centered, _spread(slope, centered))
        return d_x.addcmul_(d_y, _spread(scale, centered)), None, None, None, None


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """Shape (c,) or (n, c) so that it broadcasts over `like`."""
    rows = len(values) if values.dim() == 2 else 1
    return values.view(rows, -1, *[1] * (like.dim() - 2))


def _no_norms_message() -> str:
    loaded = {name: plugins.load("synthesizer", name) for name in plugins.available("synthesizer")}
    needing = [name for name, plugin in loaded.items() if plugin.NEEDS_BN]
    others = [name for name in loaded if name not in needing]
    return (
        "the model has no batch norm with running statistics to match; synthesizers that need it: "
        f"{', '.join(needing)}; that do not: {', '.join(others)}"
    )
