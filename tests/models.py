"""Tiny networks, one per structure the compiler must handle, and how to trace them."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.frontend import trace
from dfqc.compiler.graph import Graph, copy_graph
from dfqc.compiler.loading import LoadedModel

IMAGE = ImageSpec((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def conv_bn(c: int, out: int, k: int = 3, **options: object) -> nn.Sequential:
    """Build conv (no bias) and batch norm, with `same` padding for odd kernels."""
    return nn.Sequential(
        nn.Conv2d(c, out, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(out)
    )


class Head(nn.Module):
    """Global mean and a linear classifier."""

    def __init__(self, c: int, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(c, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """conv-bn-relu, conv-bn-relu, maximum pooling, classifier with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.body = conv_bn(8, 12, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.5)
        self.head = Head(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = self.pool(F.relu(self.body(x)))
        return self.head(self.drop(x))


class Residual(nn.Module):
    """A stem, an identity block, a block with a projection; ResNet's in-place spelling."""

    class Block(nn.Module):
        def __init__(self, c: int, out: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(c, out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(out)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(out)
            self.relu = nn.ReLU(inplace=True)
            self.downsample = conv_bn(c, out, 1, stride=stride) if c != out else None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            skip = x if self.downsample is None else self.downsample(x)
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += skip
            return self.relu(out)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = self.Block(8, 8, 1)
        self.layer2 = self.Block(8, 16, 2)
        self.head = Head(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(self.layer2(self.layer1(x)))


class Depthwise(nn.Module):
    """MobileNet's inverted residual: expand, depthwise with ReLU6, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.expand = conv_bn(8, 24, 1)
        self.depthwise = conv_bn(24, 24, groups=24)
        self.project = conv_bn(24, 8, 1)
        self.act = nn.ReLU6(inplace=True)
        self.head = Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        y = self.act(self.depthwise(self.act(self.expand(x))))
        return self.head(x + self.project(y))


class Concat(nn.Module):
    """Two branches that are concatenated, then split, shuffled and concatenated again."""

    def __init__(self) -> None:
        super().__init__()
        self.left = conv_bn(3, 6, 1)
        self.right = conv_bn(3, 6)
        self.inner = conv_bn(6, 6)
        self.head = Head(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        a, b = x.chunk(2, dim=1)
        y = torch.cat((a, F.relu(self.inner(b))), 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(y)


class Grouped(nn.Module):
    """A grouped convolution with bias between dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(12)
        self.head = Head(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.grouped(F.relu(self.stem(x))))))


class Transposed(nn.Module):
    """Down and up again: dense and grouped transposed convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = conv_bn(3, 8, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, bias=False)
        self.up_bn = nn.BatchNorm2d(6)
        self.group = nn.ConvTranspose2d(6, 9, 3, stride=2, padding=1, output_padding=1, groups=3)
        self.group_bn = nn.BatchNorm2d(9)
        self.head = Head(9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.up_bn(self.up(F.relu(self.down(x)))))
        return self.head(F.relu(self.group_bn(self.group(x))))


class LinearNorm(nn.Module):
    """Linear layers with batch norm over features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(48, 20)
        self.bn1 = nn.BatchNorm1d(20)
        self.fc2 = nn.Linear(20, 10, bias=False)
        self.bn2 = nn.BatchNorm1d(10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.adaptive_avg_pool2d(x, (4, 4)).flatten(1)
        return self.bn2(self.fc2(F.relu(self.bn1(self.fc1(x)))))


class SqueezeExcite(nn.Module):
    """Channel attention, hard-swish and SiLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.last = conv_bn(8, 8)
        self.head = Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.stem(x))
        gate = torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.silu(self.last(x * gate)))


class NoNorm(nn.Module):
    """Convolutions with bias and no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))))


class PreActivation(nn.Module):
    """bn-relu-conv blocks: the first batch norm of a block reads a sum and cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = Head(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return self.head(x + y)


class Attention(nn.Module):
    """One transformer block over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.1)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.project = nn.Linear(16, 16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        n, length, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, c)
        return self.fc((x + self.project(y)).mean(1))


TINY: dict[str, type[nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "depthwise": Depthwise,
    "concat": Concat,
    "grouped": Grouped,
    "transposed": Transposed,
    "linear_norm": LinearNorm,
    "squeeze_excite": SqueezeExcite,
    "no_norm": NoNorm,
    "pre_activation": PreActivation,
    "attention": Attention,
}


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a tiny net in eval mode with the batch norms of a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = TINY[name]()
    randomize_norms(module, seed)
    return module.eval()


def randomize_norms(module: nn.Module, seed: int = 0) -> None:
    """Give every batch norm statistics and weights far from the initial ones, some negative."""
    rng = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            fill_norm(norm, rng)


def fill_norm(norm: nn.modules.batchnorm._BatchNorm, rng: torch.Generator) -> None:
    """Draw mean, variance, gamma (one channel in eight negative) and beta."""
    count = norm.num_features
    norm.running_mean.copy_(torch.randn(count, generator=rng) * 0.2)
    norm.running_var.copy_(torch.rand(count, generator=rng) + 0.5)
    if norm.affine:
        sign = torch.where(torch.rand(count, generator=rng) < 0.125, -1.0, 1.0)
        with torch.no_grad():
            norm.weight.copy_((torch.rand(count, generator=rng) * 0.5 + 0.75) * sign)
            norm.bias.copy_(torch.randn(count, generator=rng) * 0.2)


def trace_module(module: nn.Module, image: ImageSpec = IMAGE) -> Graph:
    """Trace a module the way the command line does."""
    return trace(LoadedModel(module.eval(), image, type(module).__name__, ""))


def trace_tiny(name: str, seed: int = 0) -> Graph:
    """Trace a net of `TINY`; every caller gets a copy of its own."""
    return copy_graph(_trace_once(name, seed))


@functools.cache
def _trace_once(name: str, seed: int) -> Graph:
    return trace_module(build(name, seed))


def images(count: int = 2, image: ImageSpec = IMAGE, seed: int = 0) -> torch.Tensor:
    """Draw normal images."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, *image.size, generator=rng)
