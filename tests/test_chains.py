"""Channels are followed from their producer to their reader by their own parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from dfqc.compiler.passes.restore import Options, Restorer, restore


class Densely(nn.Module):
    """What one branch makes is normalized and filtered together with another's, behind a concat."""

    def __init__(self):
        super().__init__()
        self.left, self.right = models.conv_bn(3, 4), models.conv_bn(3, 6)
        self.norm = nn.BatchNorm2d(10)
        self.apart = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.join = nn.Conv2d(10, 8, 4, stride=4)
        self.features = nn.BatchNorm1d(128)
        self.head = nn.Linear(128, 5)

    def forward(self, x):
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        x = self.join(self.apart(F.relu(self.norm(x))))
        return self.head(self.features(F.relu(x).flatten(1)))


@pytest.mark.parametrize("method", ["moments", "patches"])
def test_a_norm_and_a_depthwise_layer_behind_a_concat_are_followed_by_their_own_channels(method):
    torch.manual_seed(0)
    module = Densely()
    models.randomize_norms(module)
    with torch.no_grad():  # channel 5 of the right branch is channel 2, all the way to `join`
        conv, norm = module.right
        for values in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            values[5] = values[2]
        of = (module.norm.weight, module.norm.bias, module.norm.running_mean)
        for values in (*of, module.norm.running_var, module.apart.weight, module.apart.bias):
            values[4 + 5] = values[4 + 2]
    graph = models.trace_module(module)
    keep = {"right.0": torch.tensor([0, 1, 2, 3, 4])}
    images, errors = models.images(4), []
    for chosen in (method, "none"):
        fixes = Options(method=chosen, ridge=1e-7, mean_fix=False, variance_fix=False)
        with torch.no_grad():
            found = restore(graph, keep, fixes).module(images)
            errors.append(float((found - graph.module(images)).abs().max()))
    assert errors[0] < 0.02 * errors[1]


def test_a_norm_of_features_behind_a_flatten_is_not_followed():
    module = Densely()
    models.randomize_norms(module)
    graph = models.trace_module(module)
    restorer = Restorer(graph, {"join": torch.arange(7)}, Options())
    restorer.run()
    assert restorer.skipped == ["head"]
