import subprocess
import sys

import pytest

from dfqc.compiler._vision import import_zoo
from dfqc.compiler.errors import EnvironmentFault


def test_both_zoos_import_in_a_fresh_process():
    """In a process of its own: a second import finds torchvision already loaded."""
    code = """
import torch
from dfqc.compiler._vision import enable_torchvision, import_zoo
enable_torchvision()
enable_torchvision()
net = import_zoo("torchvision.models").resnet18(weights=None).eval()
assert net(torch.zeros(1, 3, 32, 32)).ndim == 2
assert import_zoo("timm").is_model("resnet18")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_operators_that_were_only_declared_do_not_pretend_to_work():
    code = """
import torch
from dfqc.compiler._vision import enable_torchvision, import_zoo
if enable_torchvision() is None:
    raise SystemExit(0)  # torchvision's own binary fits this torch
try:
    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except NotImplementedError:
    raise SystemExit(0)
raise SystemExit("nms ran without its binary")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(EnvironmentFault, match=r"no_such_zoo.*pip install 'dfqc\[compile\]'"):
        import_zoo("no_such_zoo")
