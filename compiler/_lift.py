"""An exported program in, a plain fx.Graph with one input, one output and named state out."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)

from dfqc.compiler._blame import blame_node
from dfqc.compiler.errors import UnsupportedError

# Integer arithmetic on sizes. Any other Python function in an archive is refused: reading a
# model must not be able to call, say, os.system.
SIZE_FUNCTIONS = frozenset(
    {
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
        operator.pow,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
        torch.sym_float,
        torch.sym_int,
        torch.sym_ite,
    }
)
NAMESPACES = ("aten", "prims")
# Regions of `torch.no_grad()` and `torch.autocast`: the argument that holds the inner graph.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
_ASSERTS = ("_assert", "sym_constrain_range")


@dataclass(frozen=True)
class Lifted:
    """A graph whose get_attr targets are the user's parameter names, keys of `state`.

    Parameters are `nn.Parameter` there, buffers and constants are not. Nodes keep `meta["val"]` (a
    fake tensor) and `meta["stack_trace"]` from the export.
    """

    graph: fx.Graph
    state: dict[str, torch.Tensor]


def lift(program: ExportedProgram) -> Lifted:
    """Turn parameters from graph inputs into get_attr nodes, inline regions, drop assertions.

    Raises `UnsupportedError` for several inputs or outputs, changed buffers and foreign operators.
    """
    _check_signature(program)
    graph, state = fx.Graph(), {}
    env: dict[fx.Node, Any] = {}
    specs = iter(program.graph_signature.input_specs)
    for node in program.graph.nodes:
        if node.op != "placeholder":
            break
        spec = next(specs)
        if spec.kind == InputKind.USER_INPUT:
            if isinstance(spec.arg, TensorArgument):
                env[node] = _with_meta(graph.placeholder("x"), node)
            elif isinstance(spec.arg, ConstantArgument):
                env[node] = spec.arg.value
            continue
        name = str(spec.target)
        state[name] = _find_tensor(program, name)
        env[node] = _with_meta(graph.create_node("get_attr", name), node)
    output = _copy_body(program.graph, program.graph_module, graph, env)
    graph.output(output[0] if isinstance(output, (tuple, list)) else output)
    return Lifted(graph, state)


def _check_signature(program: ExportedProgram) -> None:
    """Refuse what is no function from one image tensor to one output tensor."""
    signature = program.graph_signature
    for spec in signature.input_specs:
        if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise UnsupportedError(
                f"model: holds a custom object ({spec.target}); expected tensors only"
            )
    inputs = [
        s.arg.name
        for s in signature.input_specs
        if s.kind == InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)
    ]
    if len(inputs) != 1:
        raise UnsupportedError(
            f"model: takes {len(inputs)} tensors ({', '.join(inputs)}), expected one image tensor; "
            "wrap it in a module whose forward takes the image alone"
        )
    for out in signature.output_specs:
        if out.kind != OutputKind.USER_OUTPUT:
            raise UnsupportedError(
                f"model: changes its state {out.target!r} while it runs; expected a pure function; "
                "call model.eval() before torch.export.export"
            )
    spec = program.call_spec.out_spec
    if spec is not None and (spec.num_leaves != 1 or spec.num_nodes != 1):
        raise UnsupportedError(
            f"model: returns {_describe(spec)}, expected one tensor; "
            "wrap it in a module whose forward returns the tensor to quantize"
        )


def _describe(spec: Any) -> str:
    kind = getattr(spec.type, "__name__", str(spec.type))
    return f"a {kind} of {spec.num_leaves} value(s)"


def _find_tensor(program: ExportedProgram, name: str) -> torch.Tensor:
    value = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"model: {name} is a {type(value).__name__}, expected a tensor")
    return value


def _copy_body(
    source: fx.Graph, owner: torch.nn.Module, graph: fx.Graph, env: dict[fx.Node, Any]
) -> Any:
    """Copy every node but the inputs into `graph`; return what the output node returns."""
    for node in source.nodes:
        if node.op == "placeholder" or _is_assert(node):
            continue
        if node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        if node.op == "get_attr":
            env[node] = getattr(owner, node.target)  # the inner graph of a region
        elif _region_argument(node) is not None:
            env[node] = _inline_region(node, graph, env)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], (tuple, list)):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            _check_operator(node)
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            copied = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
            env[node] = _with_meta(copied, node)
    raise AssertionError("an exported graph always has an output node")


def _is_assert(node: fx.Node) -> bool:
    return node.op == "call_function" and _short_name(node.target).startswith(_ASSERTS)


def _region_argument(node: fx.Node) -> int | None:
    return _REGIONS.get(_short_name(node.target)) if node.op == "call_function" else None


def _short_name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def _inline_region(node: fx.Node, graph: fx.Graph, env: dict[fx.Node, Any]) -> Any:
    """Copy the body of a no-grad region: gradients and autocast on CPU mean nothing here."""
    position = _region_argument(node)
    assert position is not None
    region = node.args[position]
    assert isinstance(region, fx.Node)
    inner = env[region]
    if "autocast" in _short_name(node.target) and node.args[2]:
        places = [place for n in inner.graph.nodes if (place := blame_node(n))]
        raise UnsupportedError(
            f"torch.autocast{places[0] if places else ''}: the model switches precision inside "
            "forward; expected float32 throughout; remove the autocast region"
        )
    values = [env[a] if isinstance(a, fx.Node) else a for a in node.args[position + 1 :]]
    holders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    local = dict(zip(holders, values, strict=True))
    return _copy_body(inner.graph, inner, graph, local)


def _check_operator(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return
    if target in SIZE_FUNCTIONS:
        return
    raise UnsupportedError(
        f"operator {target}{blame_node(node)}: not supported, expected ATen operators; "
        "rewrite this line with torch functions (no custom ops, no data-dependent control flow)"
    )


def _with_meta(node: fx.Node, source: fx.Node) -> fx.Node:
    for key in ("val", "stack_trace"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    return node
