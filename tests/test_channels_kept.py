import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pruning
from dfqc.compiler.channels import find_groups, remove
from pruning import conv, groups_of, trace_function


def reason(graph, name):
    group = groups_of(graph)[name]
    assert not group.prunable
    assert group.restore is None
    assert not group.restorable
    with pytest.raises(ValueError, match="cannot be pruned"):
        remove(graph, {name: torch.tensor([0])})
    return group.reason


def test_a_sum_over_different_divisions_stays_whole():
    def forward(m, x):
        both = torch.cat([m.a(x), m.b(x)], 1)
        return m.fc((both + m.c(x)).mean((2, 3)))

    graph = trace_function(
        forward,
        a=lambda: conv(3, 4),
        b=lambda: conv(3, 4),
        c=lambda: conv(3, 8),
        fc=lambda: nn.Linear(8, 3),
    )
    assert reason(graph, "a.0") == "add combines maps that are divided differently"
    assert reason(graph, "c.0") == reason(graph, "b.0") == reason(graph, "a.0")


def test_option_a_shortcuts_stay_whole():
    def forward(m, x):
        x = F.relu(m.stem(x))
        y = m.conv2(F.relu(m.conv1(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return m.fc(x.mean((2, 3)))

    graph = trace_function(
        forward,
        stem=lambda: conv(3, 4),
        conv1=lambda: conv(4, 6, stride=2),
        conv2=lambda: conv(6, 8),
        fc=lambda: nn.Linear(8, 3),
    )
    assert reason(graph, "stem.0") == "pad adds channels"
    assert reason(graph, "conv2.0") == "add combines with channels that are not followed"
    assert groups_of(graph)["conv1.0"].restorable
    pruning.check(graph)


def test_one_channel_per_group_of_a_convolution_stays():
    graph = trace_function(
        lambda m, x: m.fc(F.relu(m.b(F.relu(m.a(F.relu(m.stem(x)))))).mean((2, 3))),
        stem=lambda: conv(3, 8),
        a=lambda: conv(8, 4, groups=4),
        b=lambda: conv(4, 8, groups=2),
        fc=lambda: nn.Linear(8, 3),
    )
    assert (
        reason(graph, "a.0") == "there is only one channel in each of the 4 groups of a convolution"
    )
    assert groups_of(graph)["stem.0"].slices == 4
    assert groups_of(graph)["b.0"].slices == 2
    pruning.check(graph)


def test_groups_of_a_convolution_that_share_maps_stay_whole():
    def forward(m, x):
        x = F.relu(m.stem(x))
        x = F.relu(m.mixed(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)))
        return m.fc(x.mean((2, 3)))

    graph = trace_function(
        forward,
        stem=lambda: conv(3, 6),
        a=lambda: conv(6, 4),
        b=lambda: conv(6, 8),
        mixed=lambda: conv(12, 6, groups=3),
        fc=lambda: nn.Linear(6, 3),
    )
    why = "mixed.0 has groups that read parts of several maps"
    assert reason(graph, "a.0") == reason(graph, "b.0") == why
    assert groups_of(graph)["mixed.0"].prunable
    pruning.check(graph)


def test_shared_modules_stay_whole():
    def forward(m, x):
        x = m.stem(x)
        return m.fc(m.shared(F.relu(m.shared(F.relu(x)))).mean((2, 3)))

    graph = trace_function(
        forward,
        stem=lambda: conv(3, 6),
        shared=lambda: nn.Conv2d(6, 6, 3, padding=1),
        fc=lambda: nn.Linear(6, 3),
    )
    assert reason(graph, "stem.0") == reason(graph, "shared") == "shared is called 2 times"
    assert len(find_groups(graph)) == 3


def test_shared_norms_and_constants_stay_whole():
    def forward(m, x):
        x = m.norm(m.a(x)) * m.scale
        x = m.norm(m.b(F.relu(x)))
        return m.fc((m.c(x) * m.scale).mean((2, 3)))

    graph = trace_function(
        forward,
        a=lambda: nn.Conv2d(3, 6, 3, padding=1),
        b=lambda: nn.Conv2d(6, 6, 3, padding=1),
        c=lambda: nn.Conv2d(6, 6, 3, padding=1),
        norm=lambda: nn.BatchNorm2d(6),
        scale=lambda: nn.Parameter(torch.rand(6, 1, 1)),
        fc=lambda: nn.Linear(6, 3),
    )
    assert reason(graph, "a") == reason(graph, "b") == "norm is called twice"
    assert reason(graph, "c") == "mul_1 combines with channels that are not followed"


UNKNOWN = {
    "chunk": lambda m, x: torch.cat([-p for p in x.chunk(2, 1)], 1),
    "shuffle": lambda m, x: F.channel_shuffle(x, 2),
    "flip": lambda m, x: x.flip(1),
    "roll": lambda m, x: x.roll(1, 1),
    "slice": lambda m, x: F.pad(x[:, 1:], (0, 0, 0, 0, 1, 0)),
    "softmax": lambda m, x: x.softmax(1),
    "mean": lambda m, x: x - x.mean(1, keepdim=True),
    "maximum": lambda m, x: x + x.amax((1, 2, 3), keepdim=True),
    "layer_norm": lambda m, x: F.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1),
    "group_norm": lambda m, x: F.group_norm(x, 2),
    "matmul": lambda m, x: (x.flatten(2).transpose(1, 2) @ m.matrix).transpose(1, 2).view_as(x),
    "rows": lambda m, x: m.rows(x),
    "unfold": lambda m, x: x.unflatten(1, (2, 3)).amax(2).repeat(1, 3, 1, 1),
    "cumulative": lambda m, x: x.cumsum(1),
    "derived": lambda m, x: x * (m.scale + 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_mixes_or_moves_channels_stays_whole(name):
    graph = trace_function(
        lambda m, x: m.last(F.relu(UNKNOWN[name](m, m.body(x)))).mean((2, 3)),
        body=lambda: conv(3, 6),
        last=lambda: conv(6, 4),
        matrix=lambda: nn.Parameter(torch.rand(6, 6)),
        rows=lambda: nn.Linear(8, 8),
        scale=lambda: nn.Parameter(torch.rand(6, 1, 1)),
    )
    assert reason(graph, "body.0")


def test_what_keeps_channels_apart_does_not_keep_them_whole():
    def forward(m, x):
        x = F.avg_pool2d(F.max_pool2d(m.body(x), 2), 2)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.pad(x, (1, 0, 1, 0), mode="reflect")[:, :, 1:]
        x = x * x.softmax(-1) + x.mean((2, 3), keepdim=True).expand_as(x).sigmoid()
        return m.fc(F.adaptive_avg_pool2d(F.leaky_relu(x), 1).squeeze(-1).squeeze(-1))

    graph = trace_function(forward, body=lambda: conv(3, 6), fc=lambda: nn.Linear(6, 3))
    assert groups_of(graph)["body.0"].prunable
    pruning.check(graph)
