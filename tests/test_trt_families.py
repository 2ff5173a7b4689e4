"""Every family of the front-end list makes a file that breaks no rule of TensorRT."""

import numpy as np
import onnx
import pytest
import torch

import models
import quantized
from dfqc.backends import _trt_rules, trt
from dfqc.compiler.affine import half_scales
from dfqc.compiler.contracts import CalibSet, ImageSpec
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.quantize import rtn
from test_families import FAMILIES, build

OVERFLOWS = ("inception_v3",)  # with these random weights its values leave float16
QUICK = ("mobilenetv3_small_050", "torchvision:squeezenet1_1")


def broken(family, bits, base):
    """Return what the file of a family breaks, and how many layers in it read codes."""
    torch.set_num_threads(1)
    image = ImageSpec((3, family.size, family.size))
    graph = fold(models.trace_module(build(family), image))
    plan = quantized.plan(graph, bits, target=trt.TARGET)
    images = CalibSet(models.images(2, image, seed=1), None, "test")
    state = rtn.quantize(
        graph, images, plan, rtn.Options(), rng=torch.Generator(), device=quantized.CPU
    )
    state = half_scales(state) if base == "fp16" else state
    metadata = {trt.BASE_KEY: base} if base == "fp16" else {}
    model = onnx.ModelProto.FromString(trt.lower(graph, state, metadata=metadata).model)
    planned = sum(layer.input is not None for layer in plan.layers.values())
    zero_points = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert np.any([len(t.dims) > 1 for t in zero_points]) == (planned > 0)
    return [str(found) for found in _trt_rules.check(model)], planned


@pytest.mark.filterwarnings("ignore")  # the zoos deprecate parts of their own
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in QUICK], ids=lambda f: f.name)
def test_some_families_hold_the_rules(family):
    found, planned = broken(family, "w4a4", "fp32")
    assert found == []
    assert planned > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "base"), [("w8a8", "fp16"), ("w4a4", "fp32")])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_holds_the_rules(family, bits, base):
    if base == "fp16" and family.name in OVERFLOWS:
        with pytest.raises(UnsupportedError, match="build with --trt-base fp32"):
            broken(family, bits, base)
        return
    found, planned = broken(family, bits, base)
    assert found == []
    assert planned > 0
