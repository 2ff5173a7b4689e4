import pytest
import torch

import models
import pruning
from command import asset_flags
from dfqc.compiler._vision import import_zoo
from dfqc.compiler.channels import find_groups, remove
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.frontend import trace
from dfqc.compiler.graph import count_macs, count_params
from dfqc.compiler.loading import ImageOverrides, load_model
from dfqc.compiler.passes.fold import fold


@pytest.mark.filterwarnings("ignore")  # the zoos deprecate parts of their own
@pytest.mark.parametrize(
    ("name", "size", "options", "least"),
    [
        ("resnet18", 32, {}, 12),
        ("mobilenetv2_100", 32, {}, 25),
        ("mobilenetv3_small_100", 32, {}, 26),
        ("regnety_002", 32, {}, 31),
        ("resnext50_32x4d", 32, {"layers": (1, 1, 1, 1)}, 9),
        ("densenet121", 32, {"block_config": (2, 2), "growth_rate": 8}, 10),
        ("convnext_atto", 64, {"ls_init_value": 1.0}, 12),
        ("torchvision:squeezenet1_1", 64, {}, 25),
        ("torchvision:shufflenet_v2_x0_5", 32, {}, 18),
        pytest.param("resnext26ts", 64, {}, 18, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 64, {}, 40, marks=pytest.mark.slow),
        pytest.param("hrnet_w18_small", 64, {}, 45, marks=pytest.mark.slow),
        pytest.param("inception_v3", 96, {}, 94, marks=pytest.mark.slow),
        pytest.param(
            "swin_tiny_patch4_window7_224", 56, {"img_size": 56}, 12, marks=pytest.mark.slow
        ),
    ],
)
def test_architecture(name, size, options, least):
    zoo, _, name = name.rpartition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if zoo:
            module = import_zoo("torchvision.models").get_model(name, **options)
        else:
            module = import_zoo("timm").create_model(name, **options)
    models.randomize_norms(module)
    graph = models.trace_module(module, ImageSpec((3, size, size)))
    assert sum(group.prunable for group in find_groups(graph)) >= least
    pruning.check(graph)


@pytest.mark.parametrize(
    ("name", "prunable"),
    [("resnet20_cifar10", 9), ("mobilenet_v1_025_224", 14), ("tiny_darknet_imagenet", 15)],
)
def test_real_network(assets, name, prunable):
    flags = dict(zip(*[iter(map(str, asset_flags(assets, name)[1:]))] * 2, strict=True))
    size = tuple(map(int, flags["--input-size"].split("x")))
    path = assets / "models" / name / "weights.pt"
    image = ImageOverrides(size, (0.5,) * 3, (0.25,) * 3, None)
    graph = trace(load_model(str(path), arch=flags["--arch"], image=image))
    assert sum(group.prunable for group in find_groups(graph)) == prunable
    pruning.check(graph)
    pruning.check(fold(graph))
    smaller = remove(graph, pruning.draw(graph, 0.3))
    assert count_params(smaller) < 0.85 * count_params(graph)
    assert count_macs(smaller) < 0.85 * count_macs(graph)
