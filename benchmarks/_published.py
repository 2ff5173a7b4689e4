"""The published synthesis loops written straightforwardly: the yardstick that ours is timed by.

From the papers' formulas in plain PyTorch, the way one writes them first: the model in eval mode
with hooks on its batch norms, moments by `mean` and `var`, no tuned memory format, published
optimizers. Each yields after every iteration, so that a caller can stop the clock and look.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

EPS = 1e-6


class Statistics:
    """Collects the input of every batch norm of a model while it is called."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        self.inputs: list[Tensor] = []
        for norm in self.norms:
            norm.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))

    def __call__(self, images: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]]]:
        """Return the logits and the input of each batch norm."""
        self.inputs = []
        logits = self.model(images)
        return logits, list(zip(self.norms, self.inputs, strict=True))


def zeroq(model: nn.Module, shape: tuple[int, ...], iterations: int = 500) -> Iterator[Tensor]:
    """ZeroQ: statistics of every image by itself, sums over channels, Adam 0.5, plateau."""
    teacher, images = Statistics(model), torch.randn(shape, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100, min_lr=1e-4)

    def term(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        flat = x.flatten(2)
        found = (flat.var(2) + EPS).sqrt()
        return ((flat.mean(2) - mean) ** 2 + (found - std) ** 2).sum() / len(x)

    for _ in range(iterations):
        optimizer.zero_grad()
        _, inputs = teacher(images)
        loss = term(images, torch.zeros(shape[1]), torch.ones(shape[1]))
        for norm, x in inputs:
            loss = loss + term(x, norm.running_mean, (norm.running_var + EPS).sqrt())
        loss.backward()
        optimizer.step()
        plateau.step(loss.item())
        yield images.detach()


def deepinversion(
    model: nn.Module, shape: tuple[int, ...], classes: int, iterations: int = 2000
) -> Iterator[Tensor]:
    """DeepInversion at CIFAR size: labels, variance loss, total variation, jitter, Adam 0.05."""
    teacher, images = Statistics(model), torch.randn(shape, requires_grad=True)
    optimizer = torch.optim.Adam([images], lr=0.05)
    labels = torch.arange(shape[0]) % classes
    for _ in range(iterations):
        optimizer.zero_grad()
        shift = [int(torch.randint(-2, 3, ())) for _ in range(2)]
        seen = torch.roll(images, shift, (2, 3))
        logits, inputs = teacher(seen)
        matching = sum(
            torch.linalg.vector_norm(x.var((0, 2, 3), unbiased=False) - norm.running_var)
            + torch.linalg.vector_norm(x.mean((0, 2, 3)) - norm.running_mean)
            for norm, x in inputs
        )
        variation = sum(
            torch.linalg.vector_norm(d)
            for d in (
                seen[..., :, :-1] - seen[..., :, 1:],
                seen[..., :-1, :] - seen[..., 1:, :],
                seen[..., :-1, :-1] - seen[..., 1:, 1:],
                seen[..., 1:, :-1] - seen[..., :-1, 1:],
            )
        )
        loss = nn.functional.cross_entropy(logits, labels) + 10 * matching + 2.5e-5 * variation
        loss.backward()
        optimizer.step()
        yield images.detach()


def genie(model: nn.Module, shape: tuple[int, ...], iterations: int = 4000) -> Iterator[Tensor]:
    """Genie-D: a fresh generator with its latents, swing convolutions, standard deviations."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Swing(module))
    teacher = Statistics(model)
    count, channels, height, width = shape
    z = torch.randn(count, 256, requires_grad=True)
    generator = nn.Sequential(
        nn.Linear(256, 128 * (height // 4) * (width // 4)),
        nn.Unflatten(1, (128, height // 4, width // 4)),
        *(nn.BatchNorm2d(128), nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, padding=1)),
        *(nn.BatchNorm2d(64), nn.LeakyReLU(0.2), nn.Upsample(scale_factor=2)),
        *(nn.Conv2d(64, channels, 3, padding=1), nn.Tanh()),
        nn.BatchNorm2d(channels, affine=False),
    )
    for_z, for_g = torch.optim.Adam([z], lr=0.1), torch.optim.Adam(generator.parameters(), lr=0.01)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(for_z, patience=100, min_lr=1e-4)
    decay = torch.optim.lr_scheduler.ExponentialLR(for_g, 0.95)
    for iteration in range(1, iterations + 1):
        for_z.zero_grad()
        for_g.zero_grad()
        images = generator(z)
        _, inputs = teacher(images)
        flat = images.flatten(2)
        loss = (flat.mean(2) ** 2 + (flat.std(2) - 1) ** 2).sum() / count
        for norm, x in inputs:
            mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
            wanted = (norm.running_var + EPS).sqrt()
            loss = loss + ((mean - norm.running_mean) ** 2 + (std - wanted) ** 2).mean()
        loss.backward()
        for_z.step()
        for_g.step()
        plateau.step(loss.item())
        if iteration % 100 == 0:
            decay.step()
        yield images.detach()


class Swing(nn.Module):
    """A strided convolution behind a random shift by at most one pixel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Reflect-pad by one, crop at a random place, convolve."""
        dy, dx = (int(torch.randint(0, 3, ())) for _ in range(2))
        padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        return self.conv(padded[..., dy : dy + x.shape[2], dx : dx + x.shape[3]])
