import itertools

import pytest
import torch
from torch import fx, nn

import models
from dfqc.compiler.graph import (
    Graph,
    GraphError,
    batch_norms,
    blocks,
    copy_graph,
    count_macs,
    count_params,
    has_batch_norm,
    images_at_once,
    layer_nodes,
    node_shapes,
    verify,
)
from dfqc.compiler.passes.fold import fold

aten = torch.ops.aten


@pytest.mark.parametrize("name", models.TINY)
def test_layers_come_in_the_order_they_run(name):
    module, ran = models.build(name), []
    for path, layer in module.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            layer.register_forward_hook(lambda *_, path=path: ran.append(path))
    module(models.images())
    assert [path for path, _ in layer_nodes(models.trace_tiny(name))] == ran


def test_batch_norms_name_what_feeds_them():
    graph = models.trace_tiny("residual")
    norms = batch_norms(graph)
    assert [n.path for n in norms][:3] == ["bn1", "layer1.bn1", "layer1.bn2"]
    assert [str(n.input.target) for n in norms][:3] == ["conv1", "layer1.conv1", "layer1.conv2"]
    assert all(n.node.target == n.path for n in norms)


def test_has_batch_norm():
    assert has_batch_norm(models.trace_tiny("plain"))
    assert not has_batch_norm(models.trace_tiny("no_norm"))
    assert not has_batch_norm(fold(models.trace_tiny("plain")))


def test_a_copy_shares_nothing():
    graph = models.trace_tiny("residual")
    copied = copy_graph(graph)
    verify(copied, "copy")
    assert [n.name for n in copied.module.graph.nodes] == [n.name for n in graph.module.graph.nodes]
    x = models.images()
    before = graph.module(x)
    for tensor in copied.module.state_dict().values():
        tensor.zero_()
    for node in list(copied.module.graph.nodes):
        node.meta["mark"] = True
    assert torch.equal(graph.module(x), before)
    assert not any("mark" in n.meta for n in graph.module.graph.nodes)
    assert torch.equal(copied.module(x), torch.zeros_like(before))


@pytest.mark.parametrize("name", models.TINY)
def test_shapes_are_those_of_a_real_run(name):
    graph = models.trace_tiny(name)
    seen = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and n.op != "output":
                seen[n.name] = tuple(value.shape)
            return value

    Recorder(graph.module).run(models.images(3))
    assert node_shapes(graph, batch=3) == seen


@pytest.mark.parametrize("name", models.TINY)
def test_params_are_those_of_the_model(name):
    expected = sum(p.numel() for p in models.build(name).parameters())
    assert count_params(models.trace_tiny(name)) == expected


# Multiply-accumulates by hand, for images of 3x16x16.
MACS = {
    "plain": 256 * 8 * 3 * 9 + 64 * 12 * 8 * 9 + 12 * 10,
    "depthwise": 256 * (8 * 27 + 24 * 8 + 24 * 9 + 8 * 24) + 8 * 10,
    "grouped": 256 * (8 * 27 + 12 * 2 * 9) + 12 * 10,
    # Transposed: every input element meets out/groups * kernel weights.
    "transposed": 64 * 8 * 27 + 64 * 8 * 6 * 16 + 256 * 6 * 3 * 9 + 9 * 10,
    "linear_norm": 48 * 20 + 20 * 10,
    # Patches, qkv, two matrix products of 2 heads x 16 x 16 x 8, projection, classifier.
    "attention": 16 * 16 * 48 + 16 * 16 * 48 + 2 * 2 * 16 * 16 * 8 + 16 * 16 * 16 + 16 * 10,
}


@pytest.mark.parametrize("name", MACS)
def test_macs(name):
    assert count_macs(models.trace_tiny(name)) == MACS[name]


# Blocks.

BLOCKS = {
    "plain": [["stem.0"], ["body.0"], ["head.fc"]],
    "residual": [
        ["conv1"],
        ["layer1.conv1", "layer1.conv2"],
        ["layer2.downsample.0", "layer2.conv1", "layer2.conv2"],
        ["head.fc"],
    ],
    "depthwise": [["stem.0"], ["expand.0", "depthwise.0", "project.0"], ["head.fc"]],
    "concat": [["left.0", "right.0"], ["inner.0"], ["head.fc"]],
    "squeeze_excite": [["stem.0"], ["reduce", "expand"], ["last.0"], ["head.fc"]],
    "pre_activation": [["stem"], ["conv1", "conv2"], ["head.fc"]],
    "attention": [["patch"], ["qkv", "project"], ["fc"]],
}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_residual_regions(name, folded):
    graph = models.trace_tiny(name)
    graph = fold(graph) if folded else graph
    assert [list(b.layers) for b in blocks(graph)] == BLOCKS[name]


@pytest.mark.parametrize("name", models.TINY)
def test_each_block_has_one_tensor_in_and_one_out(name):
    graph = models.trace_tiny(name)
    values = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    expected = Recorder(graph.module).run(models.images())
    found = blocks(graph)
    by_name = {n.name: n for n in graph.module.graph.nodes}
    assert found[0].entry == "x"
    for block, following in itertools.pairwise(found):
        assert following.entry == block.exit
    assert torch.equal(values[found[-1].exit], expected)
    assert [p for b in found for p in b.layers] == [p for p, _ in layer_nodes(graph)]
    for block in found:
        inside = set(block.nodes)
        assert block.exit in inside
        for node in map(by_name.get, block.nodes):
            for source in node.all_input_nodes:
                known = source.name in inside or source.name == block.entry
                assert (
                    known
                    or not isinstance(values[source.name], torch.Tensor)
                    or is_constant(source)
                )
            if node.name != block.exit:
                assert all(u.name in inside or u.op == "output" for u in node.users)


def is_constant(node):
    return node.op == "get_attr" or (
        node.op != "placeholder" and all(map(is_constant, node.all_input_nodes))
    )


def test_names_of_blocks_are_what_their_layers_share():
    assert [b.name for b in blocks(models.trace_tiny("residual"))] == [
        "conv1",
        "layer1",
        "layer2",
        "head.fc",
    ]


def test_activations_stay_with_their_layer_and_pooling_goes_with_the_next():
    found = blocks(models.trace_tiny("plain"))
    assert found[1].nodes == ("body_0", "body_1", "relu_1")
    assert found[2].nodes == ("max_pool2d", "mean", "head_fc")


def test_a_module_called_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.last = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.last(self.conv(torch.relu(self.conv(x))))

    found = blocks(models.trace_module(Twice()))
    assert [p for b in found for p in b.layers] == ["conv", "last"]
    assert len({b.name for b in found}) == len(found) == 3


def test_a_graph_without_layers_has_no_blocks():
    assert blocks(models.trace_module(nn.ReLU())) == ()


# verify: one fault each.


def in_training_mode(graph):
    graph.module.train()


def foreign_module(graph):
    graph.module.add_module("act", nn.ReLU())
    node = next(n for n in graph.module.graph.nodes if n.op == "output").args[0]
    with graph.module.graph.inserting_after(node):
        call = graph.module.graph.call_module("act", (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    graph.module.act.eval()


def in_place_operator(graph):
    node = next(n for n in graph.module.graph.nodes if n.target == aten.relu.default)
    node.target = aten.relu_.default


def unused_layer(graph):
    graph.module.add_module("spare", nn.Conv2d(1, 1, 1).eval())


def reader_before_its_source(graph):
    nodes = list(graph.module.graph.nodes)
    nodes[1].append(nodes[3])


def several_outputs(graph):
    node = next(n for n in graph.module.graph.nodes if n.op == "output")
    node.args = ((node.args[0], node.args[0]),)


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (in_training_mode, "is in training mode"),
        (foreign_module, "act calls a ReLU"),
        (in_place_operator, "works in place"),
        (unused_layer, "spare is called by no node"),
        (reader_before_its_source, "inconsistent"),
        (several_outputs, "the output is not one tensor"),
    ],
)
def test_verify_names_the_stage_and_the_fault(break_it, match):
    graph: Graph = models.trace_tiny("plain")
    verify(graph, "before")
    break_it(graph)
    with pytest.raises(GraphError, match=f"prune: .*{match}"):
        verify(graph, "prune")


def test_images_at_once_keep_activations_small_on_a_cpu(monkeypatch):
    graph = models.trace_tiny("residual")
    largest = max(4 * torch.Size(shape).numel() for shape in node_shapes(graph).values())
    monkeypatch.setattr("dfqc.compiler.graph.TENSOR_BYTES", 10 * largest + 1)
    assert images_at_once(graph, 64, torch.device("cpu")) == 10
    assert images_at_once(graph, 4, torch.device("cpu")) == 4
    assert images_at_once(graph, 64, torch.device("cuda")) == 64
    monkeypatch.setattr("dfqc.compiler.graph.TENSOR_BYTES", largest - 1)
    assert images_at_once(graph, 64, torch.device("cpu")) == 1
