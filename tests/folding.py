"""Fold a module and compare it with itself before."""

import torch
from torch import nn

import models
from dfqc.compiler.graph import batch_norms, verify
from dfqc.compiler.passes.fold import fold

aten = torch.ops.aten


def check(module, *, left, image=models.IMAGE):
    """Fold in double precision: `left` batch norms stay, and the output does not move."""
    models.randomize_norms(module, seed=1)
    module = module.eval().double()
    graph = models.trace_module(module, image)
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    folded = fold(graph)
    verify(folded, "fold")
    assert len(batch_norms(folded)) == left
    for count in (1, 3):
        x = models.images(count, image, seed=count).double()
        with torch.no_grad():
            expected = module(x)
            assert expected.abs().max() > 1e-3
            close = 1e-12 * float(expected.abs().max())
            torch.testing.assert_close(folded.module(x), expected, rtol=0, atol=close)
    after = graph.module.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), "fold changed its input"
    return folded


class Chain(nn.Module):
    """Modules one after another, followed by something nonlinear so that nothing cancels."""

    def __init__(self, *modules):
        super().__init__()
        self.body = nn.Sequential(*modules)

    def forward(self, x):
        return torch.sigmoid(self.body(x))
