"""The build's flags as data, one per recipe key: names and help in, command signatures out.

Light on imports: `dfqc --help` reads this file and not the recipe's validation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Flag:
    """One flag: recipe key, type on the command line, help, metavar and panel of the help page."""

    name: str
    kind: Any
    help: str
    metavar: str | None = None
    panel: str = "Model"
    short: tuple[str, ...] = ()


_PLAN, _PRUNE, _CALIB, _QUANT, _GATES, _RUN = (
    "Bits and target",
    "Pruning",
    "Calibration images",
    "Quantizer",
    "Evaluation and gates",
    "Run",
)

FLAGS = (
    Flag("arch", str, "timm:NAME, torchvision:NAME or path/to/file.py:factory", "ARCH"),
    Flag("pretrained", bool, "with timm: or torchvision: models, load their weights"),
    Flag("unsafe_load", bool, "open a pickled module: it can run any code of its author"),
    Flag("input_size", str, "input of the model; default: its own, else 3x224x224", "CxHxW"),
    Flag("resize", int, "shorter side of an image before the center crop", "PIXELS"),
    Flag("mean", str, "mean of RGB in 0..1, for example .485,.456,.406", "LIST"),
    Flag("std", str, "standard deviation of RGB in 0..1", "LIST"),
    Flag("target", str, "engine to build for (dfqc targets)", "NAME", _PLAN),
    Flag("bits", str, "w2..w8 and a2..a8, or a16/a32 for weight-only", "wNaM", _PLAN),
    Flag("ends", str, "bits of the first and last layer; `same`: those of the rest", "wNaM", _PLAN),
    Flag("layer", list[str], "bits of some layers (repeatable)", "GLOB=wNaM", _PLAN),
    Flag("avg_bits", float, "choose weight bits per layer: their average", "BITS", _PLAN),
    Flag("size", str, "choose weight bits per layer: size of model.onnx", "200k", _PLAN),
    Flag("sensitivity", bool, "measure what each layer's rounding alone does", panel=_PLAN),
    Flag("trt_base", str, "TensorRT: fp32 or fp16 for what is not quantized", "TYPE", _PLAN),
    Flag("autotune", bool, "leave layers in float that are faster so, by timing", panel=_PLAN),
    Flag("prune", str, "part of the channels to remove; auto: as the limits ask", "PART", _PRUNE),
    Flag("prune_by", str, "uniform, or error: where it costs least", "NAME", _PRUNE),
    Flag("params", float, "limit: keep this part of the parameters", "PART", _PRUNE),
    Flag("macs", float, "limit: keep this part of the multiply-adds", "PART", _PRUNE),
    Flag("prune_layer", list[str], "part of some layers (repeatable)", "GLOB=PART", _PRUNE),
    Flag("prune_criterion", str, "auto, l1, l2, bn, output, restored, moments", "NAME", _PRUNE),
    Flag("prune_residual", bool, "prune channels of residual sums too", panel=_PRUNE),
    Flag("channel_multiple", int, "pruned layers keep a multiple of it", "N", _PRUNE),
    Flag("restore", str, "patches, moments, weights, lbyl, merging, none", "NAME", _PRUNE),
    Flag("sparsity", str, "weights set to zero: 2:4, or a part", "N:M|PART", _PRUNE),
    Flag("refit", str, "auto, on, off: least squares on the images", "NAME", _PRUNE),
    Flag("effort", str, "quick, standard or max: time for images and rounding", "NAME", _CALIB),
    Flag("synth", str, "synthesizer of the images (dfqc list)", "NAME", _CALIB, ("--method",)),
    Flag("synth_option", list[str], "an option of it (repeatable)", "NAME=VALUE", _CALIB),
    Flag("zoo", str, "more models of the same classes, for mixmix, dafl", "MODEL,MODEL", _CALIB),
    Flag("calib_data", str, "images instead: .npz, .safetensors, folder", "PATH", _CALIB),
    Flag("samples", int, "number of calibration images", "N", _CALIB),
    Flag("equalize", str, "none, cle (exact) or dfq (ReLU6 to ReLU, biases)", "NAME", _QUANT),
    Flag("quantizer", str, "quantizer (dfqc list)", "NAME", _QUANT),
    Flag("quantizer_option", list[str], "an option of it (repeatable)", "NAME=VALUE", _QUANT),
    Flag(
        "bias_correction", str, "auto, blend, empirical, analytic, variance, none", "NAME", _QUANT
    ),
    Flag("eval_data", str, "labelled images: reports top-1", "PATH", _GATES),
    Flag(
        "max_drop", float, "gate: points of top-1 lost; without labels, of agreement", "PTS", _GATES
    ),
    Flag("min_speedup", float, "gate: float time / engine time (exit 6)", "X", _GATES),
    Flag("require_engine", bool, "without the target's engine: exit 8", panel=_GATES),
    Flag("batch", int, "batch of the latency measurement", "N", _GATES),
    Flag("threads", int, "threads of the latency measurement", "N", _GATES),
    Flag("bake_preprocessing", bool, "add model.uint8.onnx: pixels in", panel=_RUN),
    Flag("seed", int, "seed of everything random", "N", _RUN),
    Flag("device", str, "cpu or cuda", "NAME", _RUN),
    Flag("budget", str, "time for all: fewer iterations, then exit 8, resumable", "20m", _RUN),
    Flag("memory", str, "stop above this much memory (exit 8)", "8g", _RUN),
    Flag("cache_dir", str, "where finished stages are stored", "DIR", _RUN),
    Flag("output", str, "folder of the package", "DIR", _RUN, ("-o",)),
)

# What holds without the flag, for the help pages: the recipe's own defaults, as a test checks.
# They stand here a second time because importing the recipe takes half a second.
DEFAULTS = {
    "target": "ort",
    "bits": "w8a8",
    "ends": "w8a8; weight-only: w8a16, w8a32",
    "trt_base": "fp32",
    "prune_by": "uniform",
    "prune_criterion": "auto",
    "channel_multiple": "1",
    "restore": "patches",
    "refit": "auto",
    "effort": "standard",
    "synth": "zeroq",
    "samples": "64, 256, 1024 by --effort",
    "equalize": "none",
    "quantizer": "reconstruct",
    "bias_correction": "auto",
    "batch": "1",
    "threads": "all cores",
    "seed": "0",
    "device": "cpu",
}


def with_recipe_flags(
    command: Callable[..., None],
    only: Collection[str] | None = None,
    defaults: Mapping[str, str] = DEFAULTS,
) -> Callable[..., None]:
    """Give a command the model argument and every recipe flag, in front of its own parameters.

    The command takes them as one dictionary, `flags`; flags that were not given are None. `only`
    names the recipe keys it takes, None for all; an alias that is a parameter of its own is left
    out. `defaults` are what the help says of them.
    """
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "flags"
    ]

    def run(**values: Any) -> None:
        mine = {p.name: values.pop(p.name) for p in own}
        command(values, **mine)

    taken = {f"--{p.name.replace('_', '-')}" for p in own}
    flags = [flag for flag in FLAGS if only is None or flag.name in only]
    shared = [_parameter(flag, taken, defaults.get(flag.name)) for flag in flags]
    shared = [_model_argument(), *shared]
    run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*shared, *own)}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _model_argument() -> inspect.Parameter:
    info = typer.Argument(
        metavar="MODEL", help=".pt2, a state_dict with --arch, timm:NAME or torchvision:NAME"
    )
    return _keyword("model", Annotated[str | None, info])


def _parameter(flag: Flag, taken: Collection[str], default: str | None) -> inspect.Parameter:
    name = flag.name.replace("_", "-")
    aliases = [alias for alias in flag.short if alias not in taken]
    names = [f"--{name}/--no-{name}" if flag.name == "pretrained" else f"--{name}", *aliases]
    told = f"{flag.help} [default: {default}]" if default else flag.help
    info = typer.Option(*names, help=told, metavar=flag.metavar, rich_help_panel=flag.panel)
    return _keyword(flag.name, Annotated[flag.kind | None, info])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
