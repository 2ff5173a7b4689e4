import pytest
import torch
from torch import nn

import models
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError, UnsupportedError
from dfqc.compiler.frontend import trace
from dfqc.compiler.loading import LoadedModel
from functions import Function


def data_dependent(self, x):
    if x.sum() > 0:
        return x * 2
    return x


def two_outputs(self, x):
    return x, x * 2


def dictionary(self, x):
    return {"out": x * 2}


def fixed_batch(self, x):
    return x.view(2, -1)[:, :3] if x.shape[0] == 2 else x.flatten(1)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (data_dependent, r"test_frontend_refused.py:\d+ \(if x.sum\(\) > 0:\).*rewrite this line"),
        (two_outputs, r"returns a tuple of 2 value.*expected one tensor"),
        (dictionary, r"returns a dict of 1 value.*expected one tensor"),
        (fixed_batch, r"without a fixed batch size|cannot be captured"),
    ],
)
def test_models_that_cannot_be_compiled(function, match):
    with pytest.raises(UnsupportedError, match=match) as caught:
        models.trace_module(Function(function))
    assert caught.value.exit_code == 4


def test_batch_statistics_are_refused():
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(UnsupportedError, match=r"batch_norm.*statistics of the batch"):
        models.trace_module(nn.Sequential(norm))


def test_archive_in_training_mode_is_refused():
    program = torch.export.export(models.build("plain").train(), (models.images(),))
    with pytest.raises(UnsupportedError, match=r"model.eval\(\)"):
        trace(LoadedModel(program, models.IMAGE, "model.pt2", ""))


def test_custom_operator_is_named_with_its_line():
    @torch.library.custom_op("dfqc_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    with pytest.raises(UnsupportedError, match=r"dfqc_test.double.*functions.py:\d+"):
        models.trace_module(Function(lambda _, x: double(x)))


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), (1, 16, 16)),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), (3, 32, 32)),
    ],
)
def test_wrong_input_size_names_the_size_and_the_flag(module, size):
    image = ImageSpec(size, (0.5,) * size[0], (0.5,) * size[0])
    shown = "x".join(str(n) for n in size)
    with pytest.raises(LoadError, match=rf"images of {shown}.*--input-size"):
        models.trace_module(module, image)
