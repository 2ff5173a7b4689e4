import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
import pruning
from dfqc.compiler.channels import Use, find_groups, remove
from dfqc.compiler.frontend import load_graph, save_graph
from dfqc.compiler.graph import layer_nodes, verify
from dfqc.compiler.passes.fold import fold
from dfqc.compiler.passes.prune import Options, prune
from pruning import conv, groups_of, trace_function


def test_plain_chain():
    graph = models.trace_tiny("plain")
    stem, body, head = find_groups(graph)
    assert (stem.name, stem.size, stem.producers) == ("stem.0", 8, ("stem.0",))
    assert stem.norms == ("stem.1",)
    assert stem.users == (Use("body.0", 1, 0),)
    assert stem.restore == Use("body.0", 1, 0)
    assert stem.restorable
    assert stem.chain == ("stem_1", "relu")
    assert body.users == (Use("head.fc", 1, 0),)
    assert body.chain == ("body_1", "relu_1", "max_pool2d", "mean")
    assert head.reason == "channels of the output"
    pruning.check(graph)


def test_folded_graphs_have_the_same_groups_without_norms():
    unfolded, folded = models.trace_tiny("residual"), fold(models.trace_tiny("residual"))
    for one, other in zip(find_groups(unfolded), find_groups(folded), strict=True):
        assert other.norms == ()
        for name in ("name", "size", "producers", "users", "prunable", "residual", "restorable"):
            assert getattr(one, name) == getattr(other, name)
    pruning.check(folded)


def test_residual_sums_unite_their_producers():
    graph = models.trace_tiny("residual")
    groups = groups_of(graph)
    stream = groups["conv1"]
    assert stream.producers == ("conv1", "layer1.conv2")
    assert stream.norms == ("bn1", "layer1.bn2")
    assert stream.residual
    assert stream.prunable
    assert not stream.restorable
    assert {use.layer for use in stream.users} == {
        "layer1.conv1",
        "layer2.conv1",
        "layer2.downsample.0",
    }
    second = groups["layer2.downsample.0"]  # it runs first
    assert second.producers == ("layer2.downsample.0", "layer2.conv2")
    inner = groups["layer1.conv1"]
    assert not inner.residual
    assert inner.restore == Use("layer1.conv2", 1, 0)
    pruning.check(graph)


def test_depthwise_layers_go_along():
    graph = models.trace_tiny("depthwise")
    hidden = groups_of(graph)["expand.0"]
    assert hidden.through == ("depthwise.0",)
    assert hidden.norms == ("expand.1", "depthwise.1")
    assert hidden.restore == Use("project.0", 1, 0)
    assert hidden.restorable
    smaller = remove(graph, {"expand.0": torch.arange(7)})
    layer = smaller.module.get_submodule("depthwise.0")
    assert (layer.groups, layer.in_channels, layer.out_channels) == (7, 7, 7)
    assert layer.weight.shape == (7, 1, 3, 3)
    pruning.check(graph)


def test_depthwise_layers_that_widen():
    graph = trace_function(
        lambda m, x: m.fc(m.last(F.relu(m.wide(F.relu(m.first(x))))).mean((2, 3))),
        first=lambda: conv(3, 6),
        wide=lambda: conv(6, 12, groups=6),
        last=lambda: conv(12, 4),
        fc=lambda: nn.Linear(4, 3),
    )
    group = groups_of(graph)["first.0"]
    assert group.users == (Use("last.0", 2, 0),)
    assert group.prunable
    assert not group.restorable  # its readers see two maps per channel
    smaller = remove(graph, {"first.0": torch.tensor([1, 4])})
    assert smaller.module.get_submodule("wide.0").weight.shape == (4, 1, 3, 3)
    pruning.check(graph)


def test_concatenation_gives_offsets():
    def forward(m, x):
        a = F.relu(m.a(x))
        b = F.relu(m.b(torch.cat([x, a], 1)))
        return m.fc(m.c(F.relu(m.norm(torch.cat([x, a, b], 1)))).mean((2, 3)))

    graph = trace_function(
        forward,
        a=lambda: conv(3, 4),
        b=lambda: conv(7, 6),
        norm=lambda: nn.BatchNorm2d(13),
        c=lambda: conv(13, 5),
        fc=lambda: nn.Linear(5, 3),
    )
    groups = groups_of(graph)
    assert groups["a.0"].users == (Use("b.0", 1, 3), Use("c.0", 1, 3))
    assert groups["b.0"].users == (Use("c.0", 1, 7),)
    assert groups["b.0"].norms == ("b.1", "norm")
    assert not groups["b.0"].restorable  # that norm belongs to others too
    assert all(groups[name].prunable for name in ("a.0", "b.0", "c.0"))
    smaller = remove(graph, {"a.0": torch.tensor([0, 2]), "b.0": torch.tensor([5])})
    assert smaller.module.get_submodule("norm").num_features == 3 + 2 + 1
    pruning.check(graph)


def test_two_branches_into_one_reader_can_both_be_restored():
    def forward(m, x):
        x = F.relu(m.stem(x))
        return m.fc(m.last(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)).mean((2, 3)))

    graph = trace_function(
        forward,
        stem=lambda: conv(3, 6),
        a=lambda: conv(6, 4, k=1),
        b=lambda: conv(6, 6),
        last=lambda: conv(10, 5),
        fc=lambda: nn.Linear(5, 3),
    )
    groups = groups_of(graph)
    assert groups["a.0"].restore == Use("last.0", 1, 0)
    assert groups["b.0"].restore == Use("last.0", 1, 4)
    # Both branches read one activation of the stem.
    assert groups["stem.0"].restorable
    assert groups["stem.0"].restore is None
    assert len(groups["stem.0"].users) == 2
    pruning.check(graph)


def test_flattened_maps_are_read_in_runs():
    graph = trace_function(
        lambda m, x: m.fc(F.relu(m.body(x)).flatten(1)),
        body=lambda: conv(3, 6, stride=2),
        fc=lambda: nn.Linear(6 * 16, 3),
    )
    group = groups_of(graph)["body.0"]
    assert group.restore == Use("fc", 16, 0)
    smaller = remove(graph, {"body.0": torch.tensor([1, 2, 5])})
    whole = graph.module.fc.weight.reshape(3, 6, 16)
    assert torch.equal(smaller.module.fc.weight.reshape(3, 3, 16), whole[:, [1, 2, 5]])
    pruning.check(graph)


@pytest.mark.parametrize("sizes", [(-1, 96), (2, 6, 16)], ids=["linear", "tokens"])
def test_sizes_written_into_the_graph_shrink(sizes):
    def forward(m, x):
        x = F.relu(m.body(x))
        if len(sizes) == 2:
            return m.fc(x.view(-1, 96))
        return m.fc(x.view(x.shape[0], 6, 16).transpose(1, 2)).mean(1)

    graph = trace_function(
        forward,
        body=lambda: conv(3, 6, stride=2),
        fc=lambda: nn.Linear(96 if len(sizes) == 2 else 6, 3),
    )
    assert groups_of(graph)["body.0"].prunable
    pruning.check(graph)


def test_gates_belong_to_what_they_gate():
    graph = models.trace_tiny("squeeze_excite")
    groups = groups_of(graph)
    gated = groups["stem.0"]
    assert gated.producers == ("stem.0", "expand")
    assert {use.layer for use in gated.users} == {"reduce", "last.0"}
    assert gated.prunable
    assert not gated.restorable
    assert not gated.residual
    squeezed = groups["reduce"]
    assert squeezed.restore == Use("expand", 1, 0)
    assert squeezed.size == 4
    pruning.check(graph)


def test_per_channel_constants_shrink():
    def forward(m, x):
        x = F.prelu(m.body(x), m.slope) * m.scale + m.shift
        return m.fc(x.mean((2, 3)))

    graph = trace_function(
        forward,
        body=lambda: conv(3, 6),
        slope=lambda: nn.Parameter(torch.rand(6)),
        scale=lambda: nn.Parameter(torch.rand(6, 1, 1)),
        shift=lambda: nn.Parameter(torch.rand(1, 6, 1, 1)),
        fc=lambda: nn.Linear(6, 3),
    )
    group = groups_of(graph)["body.0"]
    assert group.restorable
    smaller = remove(graph, {"body.0": torch.tensor([0, 3])})
    assert torch.equal(smaller.module.slope, graph.module.slope[[0, 3]])
    assert smaller.module.scale.shape == (2, 1, 1)
    assert smaller.module.shift.shape == (1, 2, 1, 1)
    pruning.check(graph)


def test_linear_layers_over_tokens_and_transposed_convolutions():
    def forward(m, x):
        x = F.relu(m.up(F.relu(m.down(x))))
        x = x.permute(0, 2, 3, 1)
        return m.fc2(F.gelu(m.fc1(x))).mean((1, 2))

    graph = trace_function(
        forward,
        down=lambda: conv(3, 6, stride=2),
        up=lambda: nn.ConvTranspose2d(6, 5, 2, 2),
        fc1=lambda: nn.Linear(5, 8),
        fc2=lambda: nn.Linear(8, 3),
    )
    groups = groups_of(graph)
    assert [g.name for g in groups.values() if g.restorable] == ["down.0", "up", "fc1"]
    smaller = remove(graph, {"down.0": torch.tensor([2]), "up": torch.tensor([0, 4])})
    assert smaller.module.up.weight.shape == (1, 2, 2, 2)
    pruning.check(graph)


def test_one_map_for_all_channels_is_no_reason_to_stay_whole():
    def forward(m, x):
        x = F.relu(m.body(x))
        return m.fc((x * m.gate(x).sigmoid()).mean((2, 3)))

    graph = trace_function(
        forward,
        body=lambda: conv(3, 6),
        gate=lambda: nn.Conv2d(6, 1, 3, padding=1),
        fc=lambda: nn.Linear(6, 3),
    )
    groups = groups_of(graph)
    assert groups["body.0"].prunable
    assert not groups["gate"].prunable
    pruning.check(graph)


def test_channels_that_are_read_twice_by_one_layer():
    def forward(m, x):
        x = m.body(x)
        x = F.relu(m.wide(torch.cat([x, -x], 1)))
        return m.fc(x.reshape(-1, 24 * 16))

    graph = trace_function(
        forward,
        body=lambda: conv(3, 6, stride=2),
        wide=lambda: nn.ConvTranspose2d(12, 24, 3, padding=1, groups=12),
        fc=lambda: nn.Linear(24 * 16, 3),
    )
    group = groups_of(graph)["body.0"]
    assert group.users == (Use("fc", 32, 0), Use("fc", 32, 6 * 32))
    smaller = remove(graph, {"body.0": torch.tensor([0, 5])})
    assert smaller.module.wide.weight.shape == (4, 2, 3, 3)
    assert smaller.module.fc.in_features == 8 * 16
    pruning.check(graph)
    for criterion in ("output", "restored"):
        prune(graph, Options(macs=0.7, criterion=criterion))


def test_requests_that_do_not_fit_are_refused():
    graph = models.trace_tiny("plain")
    with pytest.raises(ValueError, match="no such group"):
        remove(graph, {"head": torch.tensor([0])})
    for wrong in ([], [0, 0], [1, 0], [8], [-1]):
        with pytest.raises(ValueError, match="sorted indices of 1 to 8"):
            remove(graph, {"stem.0": torch.tensor(wrong, dtype=torch.long)})


def test_nothing_to_remove_changes_nothing():
    graph = models.trace_tiny("residual")
    same = remove(graph, {})
    whole = remove(graph, {g.name: torch.arange(g.size) for g in find_groups(graph) if g.prunable})
    x = models.images()
    assert torch.equal(same.module(x), graph.module(x))
    assert torch.equal(whole.module(x), graph.module(x))


@pytest.mark.parametrize("name", ["residual", "depthwise", "squeeze_excite", "transposed"])
def test_a_smaller_graph_can_be_stored(name, tmp_path):
    graph = models.trace_tiny(name)
    smaller = remove(graph, pruning.draw(graph))
    save_graph(smaller, tmp_path)
    x = models.images()
    assert torch.equal(load_graph(tmp_path).module(x), smaller.module(x))
    folded = fold(smaller)
    torch.testing.assert_close(folded.module(x), smaller.module(x), rtol=1e-4, atol=1e-5)


def test_names_stay_and_the_input_is_left_alone():
    graph = models.trace_tiny("residual")
    state = {name: value.clone() for name, value in graph.module.state_dict().items()}
    keep = pruning.draw(graph, 0.5)
    smaller = remove(graph, keep)
    verify(smaller, "test")
    assert [n.name for n in smaller.module.graph.nodes] == [
        n.name for n in graph.module.graph.nodes
    ]
    assert [path for path, _ in layer_nodes(smaller)] == [path for path, _ in layer_nodes(graph)]
    for name, value in graph.module.state_dict().items():
        assert torch.equal(value, state[name])
    assert {g.name: g.size for g in find_groups(smaller) if g.prunable} == {
        name: len(kept) for name, kept in keep.items()
    }
