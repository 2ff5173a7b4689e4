"""A `Graph` in, a folder with JSON and safetensors out, and back; no pickle, equal bytes each time.

`graph.json` lists the nodes and the modules' settings, `graph.safetensors` every tensor,
`image.json` the preprocessing. Node names come back as they were, also of an edited graph.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import fx, nn
from torch._ops import OpOverload

from dfqc.compiler._lift import NAMESPACES, SIZE_FUNCTIONS
from dfqc.compiler.contracts import ImageSpec
from dfqc.compiler.errors import LoadError
from dfqc.compiler.graph import Graph

FORMAT = 1
_SETTINGS = {
    nn.Conv2d: (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ),
    nn.ConvTranspose2d: (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
        *("output_padding", "groups", "dilation"),
    ),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm2d: ("num_features", "eps", "affine"),
    nn.BatchNorm1d: ("num_features", "eps", "affine"),
}
_TYPES: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in _SETTINGS}
_FUNCTIONS = {str(f.__name__): f for f in SIZE_FUNCTIONS}


def save_graph(graph: Graph, folder: Path) -> None:
    """Write the graph; the same graph gives the same bytes."""
    module = graph.module
    paths = sorted({str(n.target) for n in module.graph.nodes if n.op == "call_module"})
    content = {
        "format": FORMAT,
        "source": graph.source,
        "modules": {path: _describe_module(module.get_submodule(path)) for path in paths},
        "parameters": sorted(name for name, _ in module.named_parameters(remove_duplicate=False)),
        "nodes": [_encode_node(node) for node in module.graph.nodes],
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in _named_tensors(module).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (folder / "graph.safetensors").write_bytes(save(_unshare(tensors)))
    image = json.dumps(dataclasses.asdict(graph.image), indent=1)
    (folder / "image.json").write_text(image, encoding="utf-8")


def load_graph(folder: Path) -> Graph:
    """Read what `save_graph` wrote: same nodes, same names, same values, in eval mode."""
    try:
        content = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
        image = json.loads((folder / "image.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "graph.safetensors")
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder}: no graph can be read here: {error}") from error
    if content["format"] != FORMAT:
        raise LoadError(
            f"{folder}: graph format {content['format']}, expected {FORMAT}: build it again"
        )
    module = fx.GraphModule(
        _build_root(content, tensors), _decode_graph(content["nodes"]), class_name="CanonicalGraph"
    )
    spec = ImageSpec(
        tuple(image["size"]),
        tuple(image["mean"]),
        tuple(image["std"]),
        image["resize"],
        image["assumed"],
    )
    return Graph(module.eval(), spec, content["source"])


def attach_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add `module` at a dotted path below `root`."""
    _make_parents(root, path).add_module(path.rpartition(".")[2], module)


def attach_tensor(root: nn.Module, path: str, tensor: torch.Tensor, *, parameter: bool) -> None:
    """Add a tensor at a dotted path, unless a module there already has it as its own."""
    parent, leaf = _make_parents(root, path), path.rpartition(".")[2]
    if hasattr(parent, leaf):
        return
    if parameter:
        parent.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    else:
        parent.register_buffer(leaf, tensor)


def _make_parents(root: nn.Module, path: str) -> nn.Module:
    parent = root
    for part in path.split(".")[:-1]:
        if not hasattr(parent, part):
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    return parent


def _named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def _unshare(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors that share memory, which safetensors refuses; sort by name."""
    seen: set[int] = set()
    result = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def _describe_module(module: nn.Module) -> dict[str, Any]:
    settings = {name: getattr(module, name) for name in _SETTINGS[type(module)]}
    if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        settings["bias"] = module.bias is not None
    return {"type": type(module).__name__, **settings}


def _build_root(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    root, parameters = nn.Module(), set(content["parameters"])
    for path, described in content["modules"].items():
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items()}
        kind = _TYPES[str(values.pop("type"))]
        module = kind(**values, device="meta")
        for name in _named_tensors(module):
            tensor = tensors[f"{path}.{name}"]
            value = nn.Parameter(tensor, False) if f"{path}.{name}" in parameters else tensor
            _set_deep(module, name, value)
        attach_module(root, path, module)
    for name, tensor in tensors.items():
        attach_tensor(root, name, tensor, parameter=name in parameters)
    return root


def _set_deep(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def _encode_node(node: fx.Node) -> dict[str, Any]:
    target = node.target
    if isinstance(target, OpOverload):
        text = f"{target.namespace}.{target._opname}.{target._overloadname}"
    else:
        text = target if isinstance(target, str) else target.__name__
    return {
        "name": node.name,
        "op": node.op,
        "target": text,
        "args": _encode(node.args),
        "kwargs": {k: _encode(v) for k, v in node.kwargs.items()},
    }


def _encode(value: Any) -> Any:
    """Write an argument as JSON; what JSON has no word for becomes {"kind": text}."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise TypeError(f"an argument of a canonical graph is a {type(value).__name__}: {value!r}")


def _decode_graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    graph, env = fx.Graph(), dict[str, fx.Node]()
    for item in nodes:
        args = tuple(_decode(a, env) for a in item["args"])
        kwargs = {k: _decode(v, env) for k, v in item["kwargs"].items()}
        node = graph.create_node(item["op"], _decode_target(item), args, kwargs, name=item["name"])
        env[item["name"]] = node
    return graph


def _decode_target(item: Mapping[str, Any]) -> Any:
    if item["op"] != "call_function":
        return item["target"]
    if item["target"] in _FUNCTIONS:
        return _FUNCTIONS[item["target"]]
    namespace, name, overload = item["target"].split(".")
    if namespace not in NAMESPACES:
        raise LoadError(f"graph.json: operator {item['target']} is not one of this compiler")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _decode(value: Any, env: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, env) for v in value]
    if not isinstance(value, dict):
        return value
    kind, text = next(iter(value.items()))
    if kind == "node":
        return env[text]
    if kind == "device":
        return torch.device(text)
    constant = getattr(torch, text)
    assert isinstance(constant, (torch.dtype, torch.memory_format, torch.layout))
    return constant
