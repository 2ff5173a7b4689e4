import pytest
import torch
from torch import nn

import models
from dfqc.compiler.matching import copy_blocks, find_hints, with_outputs


class Deep(nn.Module):
    """A ResNet of two stages with `depth` blocks each."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        block = models.Residual.Block
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        first = [block(8, 8, 1) for _ in range(depth)]
        second = [block(8, 16, 2), *(block(16, 16, 1) for _ in range(depth - 1))]
        self.body = nn.Sequential(*first, *second)
        self.head = models.Head(16)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.bn1(self.conv1(x)))))


def deep(depth, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Deep(depth)
    models.randomize_norms(net, seed)
    return models.trace_module(net)


def test_alike_blocks_are_taken_over_evenly_from_first_to_last():
    teacher, student = deep(5), deep(3, seed=1)
    copied = copy_blocks(teacher, student)
    numbers = {k.removeprefix("body."): v.removeprefix("body.") for k, v in copied.items()}
    # Teacher: 0-4 | 5 strided, 6-9. Student: 0-2 | 3 strided, 4-5.
    assert numbers.pop("0") == "0"
    assert [numbers[k] for k in ("1", "2", "3", "4", "5")] == ["2", "4", "5", "6", "9"]
    ours, theirs = student.module.state_dict(), teacher.module.state_dict()
    for path, giver in copied.items():
        for name in (k for k in ours if k.startswith(f"{path}.")):
            assert torch.equal(ours[name], theirs[giver + name.removeprefix(path)])
    assert torch.equal(ours["conv1.weight"], theirs["conv1.weight"])
    assert torch.equal(ours["bn1.running_var"], theirs["bn1.running_var"])


def test_a_net_of_the_same_form_becomes_the_teacher():
    teacher, student = deep(2), deep(2, seed=1)
    copy_blocks(teacher, student)
    x = models.images(4)
    assert torch.equal(teacher.module(x), student.module(x))


def test_nothing_is_taken_where_nothing_is_alike():
    teacher, student = models.trace_tiny("attention"), models.trace_tiny("depthwise")
    before = {k: v.clone() for k, v in student.module.state_dict().items()}
    assert copy_blocks(teacher, student) == {}
    assert all(torch.equal(v, before[k]) for k, v in student.module.state_dict().items())


def test_hints_are_the_last_maps_of_every_shape():
    teacher, student = deep(4), deep(2)
    hints = find_hints(teacher, student)
    assert [hint.shape for hint in hints] == [(8, 16, 16), (16, 8, 8)]
    x = models.images(3)
    theirs = with_outputs(teacher, tuple(h.teacher for h in hints))(x)
    assert torch.equal(theirs[0], teacher.module(x))
    net = teacher.module
    stem = torch.relu(net.bn1(net.conv1(x)))
    # Ends of the stages: what the last block of each gives, computed from its own layers.
    for place, depth in zip(range(2), (4, 4), strict=True):
        for number in range(place * 4, place * 4 + depth):
            block = net.get_submodule(f"body.{number}")
            y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(stem)))))
            skip = block.downsample if hasattr(block, "downsample") else nn.Identity()
            if isinstance(skip, nn.Identity):
                stem = torch.relu(y + stem)
            else:
                shortcut = getattr(skip, "1")(getattr(skip, "0")(stem))
                stem = torch.relu(y + shortcut)
        torch.testing.assert_close(theirs[1][place], stem)


@pytest.mark.parametrize("names", [("residual", "plain"), ("linear_norm", "residual")])
def test_maps_of_other_shapes_are_no_hints(names):
    teacher, student = (models.trace_tiny(n) for n in names)
    for hint in find_hints(teacher, student):
        x = models.images(2)
        ours = with_outputs(student, (hint.student,))(x)[1][0]
        theirs = with_outputs(teacher, (hint.teacher,))(x)[1][0]
        assert ours.shape == theirs.shape == (2, *hint.shape)


def test_outputs_share_the_weights_of_the_graph():
    graph = models.trace_tiny("residual")
    module = with_outputs(graph, ())
    with torch.no_grad():
        module.get_parameter("head.fc.bias").add_(1)
    x = models.images()
    assert torch.equal(module(x)[0], graph.module(x))
