"""Model files: the source of an architecture, and how a fault of loading is asked for."""

import pytest

from dfqc.compiler.errors import LoadError
from dfqc.compiler.loading import ImageOverrides, load_model

SMALL = ImageOverrides(input_size=(3, 16, 16))


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

def build():
    return Net()

def broken():
    raise ValueError("no such depth")

def not_a_module():
    return 3
"""


def refuse(match, source, **options):
    with pytest.raises(LoadError, match=match) as caught:
        load_model(str(source), **options)
    assert caught.value.exit_code == 3
    return str(caught.value)
