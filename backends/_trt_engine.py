"""Build an engine by the calls that TensorRT 10 and 11 share: an ONNX model in, a plan out."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from dfqc.backends import _trt_api
from dfqc.compiler.errors import UnsupportedError
from dfqc.compiler.finish import EngineOptions

SPARSITY_KEY = "dfqc.sparsity"  # metadata of a model whose weights were set to zero on purpose
_SKIPPED = "2:4"  # the zeros that sparse tensor cores skip


def build_plan(model: bytes, options: EngineOptions, *, outputs: Sequence[str] = ()) -> bytes:
    """Return the serialized engine of a model.

    Args:
        model: the ONNX file; types in it are the engine's (strongly typed).
        options: batches, memory, compatibility.
        outputs: inner values that become outputs too.

    Raises:
        EnvironmentFault: TensorRT or a driver is missing.
        UnsupportedError: TensorRT refuses the model; the message names the nodes.
    """
    trt, driver = _trt_api.tensorrt(), _trt_api.require_driver()
    logger = _trt_api.make_logger(trt)
    builder = trt.Builder(logger)
    # In 10 it asks for the types of the file; 11 knows no other way and ignores it.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise UnsupportedError(f"TensorRT {trt.__version__} refuses the model: {_errors(parser)}")
    _mark_outputs(network, outputs)
    config = _configure(trt, builder, options)
    if has_sparse_weights(model):  # off by default; TensorRT checks every weight and times both
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    for profile in _profiles(builder, network, options.batches):
        config.add_optimization_profile(profile)
    cache = timing_cache_file(options.cache_dir, driver.gpu, str(trt.__version__))
    _load_timing_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = "; ".join(logger.errors[-3:]) or "it gives no reason"
        raise UnsupportedError(f"TensorRT {trt.__version__} cannot build the model: {reason}")
    _save_timing_cache(config, cache)
    return bytes(plan)


def has_sparse_weights(model: bytes) -> bool:
    """Report whether a model says that its zeros are those that sparse tensor cores skip."""
    found = {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}
    return found.get(SPARSITY_KEY) == _SKIPPED


def ranges(batches: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (min, opt, max) of one optimization profile per batch; together they leave no gap."""
    found, low = [], 1
    for batch in sorted(set(batches)):
        found.append((low, batch, batch))
        low = batch + 1
    return found


def timing_cache_file(folder: Path, gpu: str, version: str) -> Path:
    """Return the file of measured kernels: they hold for one kind of GPU and one version."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-").lower()
    return folder / "trt" / f"{slug}-{version}.timing"


def _configure(trt: Any, builder: Any, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    # Without it the inspector tells names only, and the ledger needs kernels and types.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware != "none":
        config.hardware_compatibility_level = _hardware_level(trt, options.hardware)
    return config


def _hardware_level(trt: Any, hardware: str) -> Any:
    """Return the named level; the first versions 10 do not have all of them."""
    name = {"ampere-plus": "AMPERE_PLUS", "same-compute": "SAME_COMPUTE_CAPABILITY"}[hardware]
    level = getattr(trt.HardwareCompatibilityLevel, name, None)
    if level is None:
        raise UnsupportedError(
            f"--hardware {hardware}: TensorRT {trt.__version__} has no such level; leave it out, "
            "or install a later version"
        )
    return level


def _profiles(builder: Any, network: Any, batches: Sequence[int]) -> list[Any]:
    """Return one profile per batch; the batch is the only open dimension of our files."""
    made = []
    for sizes in ranges(batches):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            rest = tuple(tensor.shape)[1:]
            low, best, high = ((size, *rest) for size in sizes)
            profile.set_shape(tensor.name, low, best, high)
        made.append(profile)
    return made


def _mark_outputs(network: Any, names: Sequence[str]) -> None:
    wanted = set(names)
    for index in range(network.num_layers if wanted else 0):
        layer = network.get_layer(index)
        for position in range(layer.num_outputs):
            tensor = layer.get_output(position)
            if tensor.name in wanted:
                network.mark_output(tensor)
                wanted.discard(tensor.name)
    if wanted:
        missing = ", ".join(sorted(wanted))
        raise UnsupportedError(f"TensorRT's network has no values {missing}: nothing to compare")


def _load_timing_cache(config: Any, path: Path) -> None:
    data = path.read_bytes() if path.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(data), False):
        # Of another driver or a broken write: measured anew.
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timing_cache(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(bytes(config.get_timing_cache().serialize()))
    partial.replace(path)


def _errors(parser: Any) -> str:
    """Return what the parser says, the node's name in front."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"{error.node_name() or error.node_operator()}: {error.desc()}")
    return "; ".join(found) or "it gives no reason"
