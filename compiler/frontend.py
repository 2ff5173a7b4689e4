"""A loaded model in, a `Graph` in the canonical dialect out."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from dfqc.compiler._aten import op_name
from dfqc.compiler._batch import check_batches, free_batch
from dfqc.compiler._blame import blame_error, first_line, name_operator
from dfqc.compiler._canonical import canonicalize
from dfqc.compiler._graphfile import attach_module, attach_tensor, load_graph, save_graph
from dfqc.compiler._lift import Lifted, lift
from dfqc.compiler._raise import raise_layers
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError, UnsupportedError
from dfqc.compiler.graph import Graph
from dfqc.compiler.loading import LoadedModel
from dfqc.compiler.passes.clean import AliasConflictError, clean
from dfqc.compiler.passes.constants import fold_constants

__all__ = ["export", "load_graph", "raise_program", "save_graph", "trace"]

log = logging.getLogger(__name__)


def trace(loaded: LoadedModel) -> Graph:
    """Capture a loaded model as a `Graph`; see `export` and `raise_program` for the errors."""
    model = loaded.model
    program = model if isinstance(model, ExportedProgram) else export(model, loaded.image)
    return raise_program(program, loaded.image, loaded.source)


def export(module: nn.Module, image: ImageSpec) -> ExportedProgram:
    """Export `module` with a dynamic batch.

    Raises `LoadError` if the model does not run on an image of `image.size`, `UnsupportedError`
    with the operator and the source line if it runs but cannot be captured.
    """
    module.eval()
    example = _example(module, image)
    _check_runs(module, example)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own internals
            return torch.export.export(
                module, (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
            )
    except Exception as error:
        raise UnsupportedError(
            f"operator {name_operator(error)}{blame_error(error)}: the model cannot be captured "
            f"({first_line(error)}); rewrite this line without control flow on tensor values and "
            "without a fixed batch size"
        ) from error


def raise_program(program: ExportedProgram, image: ImageSpec, source: str) -> Graph:
    """Turn an exported program into the canonical dialect; node names depend on it alone."""
    lifted = lift(program)
    batch = free_batch(lifted)
    fold_constants(lifted.graph, lifted.state)
    try:
        clean(lifted.graph)
    except AliasConflictError as conflict:
        log.info("functionalizing with torch: %s", conflict)
        lifted = lift(_functionalize(program))
        free_batch(lifted)
        fold_constants(lifted.graph, lifted.state)
        clean(lifted.graph)
    canonicalize(lifted.graph)
    modules = raise_layers(lifted.graph, lifted.state)
    clean(lifted.graph)
    graph = Graph(_rebuild(lifted, modules), image, source)
    if batch is not None:
        check_batches(program, graph, batch)
    return graph


def _example(module: nn.Module, image: ImageSpec) -> torch.Tensor:
    """Return two images of zeros in the model's precision."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(2, *image.size, dtype=dtype)


def _check_runs(module: nn.Module, example: torch.Tensor) -> None:
    try:
        with torch.no_grad():
            module(example)
    except Exception as error:
        size = "x".join(str(n) for n in example.shape[1:])
        raise LoadError(
            f"model: does not run on images of {size}{blame_error(error)}: {first_line(error)}; "
            "expected the input size the model was made for: pass --input-size CxHxW, "
            "for example --input-size 3x32x32"
        ) from error


def _functionalize(program: ExportedProgram) -> ExportedProgram:
    """Let torch rewrite mutations through views; every other operator stays as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional: ExportedProgram = program.run_decompositions({})
    return functional


def _rebuild(lifted: Lifted, modules: dict[str, nn.Module]) -> fx.GraphModule:
    """Copy into a fresh graph with names made from operators and paths, and without meta."""
    root = nn.Module()
    for path, module in sorted(modules.items()):
        attach_module(root, path, module)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in lifted.graph.nodes:
        if node.op == "get_attr":
            continue  # placed right before its first reader
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in env:
                name = str(source.target)
                tensor = lifted.state[name]
                parameter = isinstance(tensor, nn.Parameter)
                attach_tensor(root, name, tensor.detach().clone(), parameter=parameter)
                env[source] = graph.get_attr(name)
        env[node] = _copy_node(graph, node, env)
    module = fx.GraphModule(root, graph, class_name="CanonicalGraph")
    return module.eval()


def _copy_node(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    args = fx.map_arg(node.args, env.__getitem__)
    kwargs = fx.map_arg(node.kwargs, env.__getitem__)
    return graph.create_node(node.op, node.target, args, kwargs, name=op_name(node) or None)
