"""Every network family that users bring compiles to a graph that computes what the model does."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import models
from dfqc.compiler._vision import import_zoo
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.graph import batch_norms, blocks, layer_nodes, verify
from dfqc.compiler.passes.fold import fold


@dataclass(frozen=True)
class Family:
    """A small member of a family; `left` batch norms cannot be folded into a layer."""

    name: str  # of timm, or torchvision:NAME
    size: int = 64
    left: int = 0
    options: dict = field(default_factory=dict)


FAMILIES = [
    Family("resnet18"),
    Family("resnext26ts"),
    Family("legacy_seresnet18"),
    Family("ecaresnet26t"),
    Family("skresnet18"),
    Family("resnest14d"),
    Family("res2net50_14w_8s", options={"layers": (1, 1, 1, 1)}),
    Family("cspresnet50"),
    Family("darknet17"),
    Family("regnetx_002"),
    Family("regnety_002"),
    Family("mobilenetv1_100"),
    Family("mobilenetv2_035"),
    Family("mobilenetv3_small_050"),
    Family("mobilenetv4_conv_small_035"),
    Family("efficientnet_b0"),
    Family("tf_efficientnet_lite0"),
    Family("mnasnet_small"),
    Family("torchvision:mnasnet0_5"),
    Family("vgg11_bn", options={"mlp_ratio": 0.05}),
    # Pre-activation: a batch norm behind a concatenation or a sum has no layer to go to.
    Family("densenet121", left=12, options={"block_config": (2, 2, 2, 2)}),
    Family("torchvision:googlenet", options={"aux_logits": False, "init_weights": True}),
    Family("inception_v3", 96),
    Family("ghostnet_050"),
    Family("torchvision:shufflenet_v2_x0_5"),
    # Its third branch is a batch norm alone.
    Family("repvgg_a0", left=17),
    Family("hrnet_w18_small"),
    Family("dla46_c"),
    Family("ese_vovnet19b_slim_dw"),
    Family("lcnet_050"),
    Family("tinynet_e"),
    Family("rexnet_100", options={"depth_mult": 0.4}),
    Family("torchvision:squeezenet1_1"),
    Family("convnext_atto"),
    Family("inception_next_atto"),
    Family("deit_tiny_patch16_224", 64, options={"img_size": 64, "depth": 4}),
    Family("vit_tiny_patch16_224", 64, options={"img_size": 64, "depth": 4}),
    Family("swin_tiny_patch4_window7_224", 56, options={"img_size": 56, "depths": (2, 2, 2, 2)}),
    Family("torchvision:swin_t"),
    Family("mobilevit_xxs"),
    Family("mobilevitv2_050"),
    Family("levit_128s", 224),
    Family("efficientvit_b0"),
    Family("poolformer_s12"),
    Family("pvt_v2_b0"),
    # Weight standardization: convolutions with computed weights stay operators.
    Family("eca_nfnet_l0"),
    Family("xcit_nano_12_p16_224", 64, left=4, options={"depth": 4}),
    Family("maxvit_rmlp_pico_rw_256", 256),
]


@pytest.mark.filterwarnings("ignore")  # the zoos deprecate parts of their own
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_family(family):
    module = build(family)
    image = ImageSpec((3, family.size, family.size))
    graph = models.trace_module(module, image)
    verify(graph, "trace")
    folded = fold(graph)
    verify(folded, "fold")
    for count in (1, 3):
        x = models.images(count, image, seed=count)
        with torch.no_grad():
            expected = module(x)
            assert_close(graph.module(x), expected)
            assert_close(folded.module(x), expected)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(batch_norms(graph)) == len(norms)
    assert len(batch_norms(folded)) == family.left
    check_blocks(graph)
    check_blocks(folded)


def build(family):
    """Build with random weights and the batch norm statistics of no particular training."""
    zoo, _, name = family.name.rpartition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if zoo:
            module = import_zoo("torchvision.models").get_model(name, **family.options)
        else:
            module = import_zoo("timm").create_model(name, **family.options)
    models.randomize_norms(module)
    return module.eval()


def assert_close(got, expected):
    """Compare to 1e-4 of the largest output: random weights make outputs of any size."""
    assert expected.abs().max() > 0
    assert expected.std() > 1e-2 * expected.abs().max()
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


def check_blocks(graph):
    found = blocks(graph)
    paths = [path for path, _ in layer_nodes(graph)]
    assert [p for b in found for p in b.layers] == list(dict.fromkeys(paths))
    assert len(paths) > 0
    assert len({b.name for b in found}) == len(found)
