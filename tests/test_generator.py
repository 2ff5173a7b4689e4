import pytest
import torch
import torch.nn.functional as F

from dfqc.calib._generator import LATENT, Generator, count_weights, double_and_convolve

SIZES = [(3, 32, 32), (3, 30, 30), (1, 28, 28), (3, 227, 227), (3, 9, 14), (2, 5, 7), (3, 16, 97)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(count: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, LATENT, generator=seeded(seed))


@pytest.mark.parametrize("squash", ["tanh", "none"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_size_are_standardized(size, squash):
    z = Generator(size, seeded(0), channels=8, squash=squash)(latents())
    assert z.shape == (6, *size)
    var, mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-5
    assert (var - 1).abs().max() < 2e-2  # batch norm adds 1e-5 to the variance, which is small
    assert len(torch.unique(z[:, 0, 0, 0])) == 6


def published(generator: Generator, z: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Compute the generator as the paper's code does, from the same weights, in float64."""
    double = generator.double()
    height, width = (-(-side // 4) for side in size[1:])

    def norm(x, affine=None):
        x = (x - x.mean((0, 2, 3), keepdim=True)) / torch.sqrt(
            x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
        )
        if affine is None:
            return x
        return x * affine.weight.view(-1, 1, 1) + affine.bias.view(-1, 1, 1)

    # Channels come last in the rows of the linear layer.
    x = F.linear(z.double(), double.linear.weight, double.linear.bias)
    x = x.view(len(z), height, width, -1).permute(0, 3, 1, 2)
    x = F.interpolate(norm(x, double.norm1), scale_factor=2, mode="nearest")
    x = F.conv2d(x, double.conv1.weight, double.conv1.bias, padding=1)
    x = F.leaky_relu(norm(x, double.norm2), 0.2)
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    x = torch.tanh(F.conv2d(x, double.conv2.weight, double.conv2.bias, padding=1))
    top, left = (4 * height - size[1]) // 2, (4 * width - size[2]) // 2
    return norm(x[:, :, top : top + size[1], left : left + size[2]])


@pytest.mark.parametrize("size", [(3, 16, 12), (1, 13, 18)], ids=str)
def test_layers_are_the_published_ones(size):
    generator = Generator(size, seeded(3), channels=10)
    with torch.no_grad():  # weights of the batch norms that make a difference
        for norm in (generator.norm1, generator.norm2):
            norm.weight.uniform_(0.5, 2, generator=seeded(4))
            norm.bias.uniform_(-1, 1, generator=seeded(5))
        found = generator(latents())
        expected = published(generator, latents(), size)
    assert found.double().sub(expected).abs().max() < 2e-4


def test_published_widths():
    generator = Generator((3, 32, 32), seeded(0))
    shapes = {name: tuple(p.shape) for name, p in generator.named_parameters()}
    assert shapes["linear.weight"] == (128 * 8 * 8, 256)
    assert shapes["conv1.weight"] == (64, 128, 3, 3)
    assert shapes["conv2.weight"] == (3, 64, 3, 3)
    assert "norm3.weight" not in shapes
    assert set(generator.state_dict()) == set(shapes)  # no running statistics


@pytest.mark.parametrize("bias", [True, False])
def test_magnifying_and_convolving_is_one_transposed_convolution(bias):
    rng = seeded(0)
    x, weight, shift = (
        torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((2, 5, 4, 3), (7, 5, 3, 3), (7,))
    )
    shift = shift if bias else None
    doubled = F.interpolate(x, scale_factor=2, mode="nearest")
    expected = F.conv2d(doubled, weight, shift, padding=1)
    assert (double_and_convolve(x, weight, shift) - expected).abs().max() < 1e-12


def test_weights_are_drawn_as_torch_does_and_from_the_generator_alone():
    before = torch.random.get_rng_state()
    first, same, other = (Generator((3, 16, 16), seeded(s), channels=16) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    reference = {
        "linear": torch.nn.Linear(LATENT, 16 * 16),
        "conv1": torch.nn.Conv2d(16, 8, 3),
        "conv2": torch.nn.Conv2d(8, 3, 3),
    }
    for name, layer in reference.items():
        mine = first.get_submodule(name).requires_grad_(False)
        assert torch.equal(mine.weight, same.get_submodule(name).weight)
        assert not torch.equal(mine.weight, other.get_submodule(name).weight)
        bound = mine.weight[0].numel() ** -0.5
        assert 0.95 * bound < mine.weight.abs().max() <= bound
        assert mine.weight.std() == pytest.approx(layer.weight.detach().std().item(), rel=0.1)
        assert mine.bias.abs().max() <= bound


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 30, 45)])
def test_weights_are_counted(size):
    generator = Generator(size, torch.Generator().manual_seed(0), channels=16)
    kept = [generator.linear.weight, generator.linear.bias, generator.conv1.weight,
            generator.conv2.weight]  # fmt: skip
    assert count_weights(size, 16) == sum(values.numel() for values in kept)
