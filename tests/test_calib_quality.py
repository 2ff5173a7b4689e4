import pytest
import torch
from torch.distributions import Normal, kl_divergence

import models
from dfqc.compiler.calib_quality import bn_divergence
from dfqc.compiler.graph import batch_norms


def captured(graph, images):
    """Inputs of every batch norm, by hooks: nothing of the code under test."""
    inputs = []
    for norm in batch_norms(graph):
        norm.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        graph.module(images)
    return inputs


def test_it_is_the_divergence_of_normal_distributions():
    graph, images = models.trace_tiny("residual"), models.images(12)
    scores = []
    for norm, x in zip(batch_norms(graph), captured(graph, images), strict=True):
        x = x.double().transpose(0, 1).flatten(1)
        eps = norm.module.eps
        ours = Normal(x.mean(1), (x.var(1, unbiased=False) + eps).sqrt())
        stored = Normal(
            norm.module.running_mean.double(), (norm.module.running_var.double() + eps).sqrt()
        )
        scores.append(kl_divergence(ours, stored).mean())
    expected = float(torch.stack(scores).mean())
    assert bn_divergence(graph, images, batch=5) == pytest.approx(expected, rel=1e-6)


def test_images_that_made_the_statistics_score_zero():
    module, images = models.build("plain").train(), models.images(64)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0  # the statistics of the last batch, and of nothing else
    with torch.no_grad():
        module(images)
    graph = models.trace_module(module.eval())
    assert 0 <= bn_divergence(graph, images) < 1e-3
    assert bn_divergence(graph, 3 * images + 1) > 0.1


def test_without_batch_norms_there_is_no_score():
    assert bn_divergence(models.trace_tiny("no_norm"), models.images()) is None
