"""The recipe: flags and a YAML file in, one validated frozen value out; keys are the flags' names.

Everything that can be refused without opening the model is refused here, before any work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dfqc.compiler import plugins
from dfqc.compiler.allocate import widths
from dfqc.compiler.errors import UsageError
from dfqc.compiler.pruning_flags import check_pruning, parse_part, parse_sparsity
from dfqc.compiler.recipe_values import Amount, Names, Numbers, Rules, Size, Sparsity, Switch
from dfqc.compiler.spec import (
    Bits,
    Rule,
    TargetSpec,
    check_base,
    check_bits,
    default_ends,
    parse_bits,
    parse_rule,
)
from dfqc.compiler.units import parse_duration, parse_size

Effort = Literal["quick", "standard", "max"]
SAMPLES: Mapping[str, int] = {"quick": 64, "standard": 256, "max": 1024}
# Where things lie on this machine: not part of what is built, and left out of saved recipes.
_PLACES = ("output", "cache_dir")


class Recipe(BaseModel):
    """All that a build depends on. Field names are the flags' with `_` for `-`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    arch: str | None = None
    pretrained: bool = True
    unsafe_load: bool = False
    input_size: Size | None = None
    resize: int | None = Field(None, gt=0)
    mean: Numbers | None = None
    std: Numbers | None = None

    target: str = "ort"
    bits: str = "w8a8"
    ends: str = "w8a8"
    layer: Rules = ()
    avg_bits: float | None = Field(None, gt=0)
    size: str | None = None
    sensitivity: bool = False
    trt_base: Literal["fp32", "fp16"] = "fp32"
    autotune: bool = False

    prune: Amount = None
    prune_by: Literal["uniform", "error"] = "uniform"
    params: float | None = Field(None, gt=0, le=1)
    macs: float | None = Field(None, gt=0, le=1)
    prune_layer: Rules = ()
    prune_criterion: Literal["auto", "l1", "l2", "bn", "output", "restored", "moments"] = "auto"
    prune_residual: bool = False
    channel_multiple: int = Field(1, ge=1)
    restore: Literal["patches", "moments", "weights", "lbyl", "merging", "none"] = "patches"
    sparsity: Sparsity = None
    refit: Switch = "auto"

    effort: Effort = "standard"
    synth: str = "zeroq"
    synth_option: Mapping[str, Any] = {}
    zoo: Names = ()
    calib_data: str | None = None
    samples: int = Field(SAMPLES["standard"], ge=1)

    equalize: Literal["none", "cle", "dfq"] = "none"
    quantizer: str = "reconstruct"
    quantizer_option: Mapping[str, Any] = {}
    bias_correction: Literal["auto", "blend", "empirical", "analytic", "variance", "none"] = "auto"

    eval_data: str | None = None
    max_drop: float | None = Field(None, ge=0)
    min_speedup: float | None = Field(None, gt=0)
    bake_preprocessing: bool = False
    require_engine: bool = False
    batch: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    device: str = "cpu"
    budget: str | None = None
    memory: str | None = None
    cache_dir: str | None = None
    output: str | None = None

    @property
    def asked_bits(self) -> Bits:
        """Bits of every layer that no rule speaks about."""
        return parse_bits(self.bits)

    @property
    def ends_bits(self) -> Bits | None:
        """Bits of the first and last layer; None: those of all the others."""
        return None if self.ends == "same" else parse_bits(self.ends, where="--ends")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Layer rules, later ones win."""
        return tuple(parse_rule(text) for text in self.layer)

    @property
    def weight_limit(self) -> str | None:
        """The flag under which weight bits are chosen per layer, as it was given; None: none."""
        if self.avg_bits is not None:
            return f"--avg-bits {self.avg_bits:g}"
        return f"--size {self.size}" if self.size else None

    @property
    def measures_layers(self) -> bool:
        """Whether what each layer's rounding alone does to the output is measured."""
        return self.sensitivity or self.weight_limit is not None

    @property
    def size_bytes(self) -> int | None:
        """Limit of the model's file."""
        return parse_size(self.size, where="--size") if self.size else None

    @property
    def prunes(self) -> bool:
        """Whether channels are removed (`auto`: perhaps)."""
        return bool(self.prune or self.params or self.macs or self.prune_layer)

    @property
    def shrinks(self) -> bool:
        """Whether channels are removed or weights set to zero."""
        return self.prunes or self.sparsity is not None

    @property
    def pruned_layers(self) -> tuple[tuple[str, float], ...]:
        """Parts to remove by layer, later ones win."""
        return tuple(parse_part(text) for text in self.prune_layer)

    @property
    def zeros(self) -> float | tuple[int, int] | None:
        """Part of the weights that becomes zero, or N of M that stay."""
        return None if self.sparsity is None else parse_sparsity(self.sparsity)

    @property
    def refits(self) -> bool:
        """Whether weights are fitted to images after pruning: on noise it makes them worse."""
        if self.refit != "auto":
            return self.refit == "on"
        return self.shrinks and self.synth != "noise" and self.quantizer != "udfc"

    @property
    def budget_seconds(self) -> float | None:
        """Wall-clock limit."""
        return parse_duration(self.budget, where="--budget") if self.budget else None

    @property
    def memory_bytes(self) -> int | None:
        """Memory limit."""
        return parse_size(self.memory, where="--memory") if self.memory else None

    def saved(self) -> dict[str, Any]:
        """Return the resolved recipe as it is written to YAML and read back: keys as flags."""
        data = self.model_dump(mode="json", exclude=set(_PLACES))
        if self.input_size:
            data["input_size"] = "x".join(map(str, self.input_size))
        return {name.replace("_", "-"): value for name, value in data.items()}


def make_recipe(flags: Mapping[str, Any], file: Path | None = None) -> Recipe:
    """Merge a recipe file under explicit flags (None: not given), fill in what depends on them.

    Raises:
        UsageError: an unknown key, a value of the wrong form, or values that contradict.
        UnsupportedError: bits that the target cannot hold.
    """
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    values = (_read_file(file) if file else {}) | given
    where = f"{file}" if file else "command line"
    _check_names(values, where)
    if values.get("model") is None:
        raise UsageError("no model: give MODEL, or the key `model` in the recipe")
    for name in ("synth_option", "quantizer_option"):
        if isinstance(values.get(name), list | tuple):
            values[name] = parse_options(values[name], name)
    if values.get("calib_data") and "synth" not in values:
        values["synth"] = "images"
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise UsageError(_explain(error, where)) from None
    if "samples" not in values:
        recipe = recipe.model_copy(update={"samples": SAMPLES[recipe.effort]})
        recipe.model_fields_set.discard("samples")  # nobody gave it: a small data set may lower it
    if "ends" not in values:
        recipe = recipe.model_copy(update={"ends": str(default_ends(recipe.asked_bits))})
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse what is wrong whatever the model is; loads no framework."""
    for kind, name in (
        ("synthesizer", recipe.synth),
        ("quantizer", recipe.quantizer),
        ("target", recipe.target),
    ):
        plugins.check_name(kind, name)
    target = plugins.load("target", recipe.target).TARGET
    check_bits(recipe.asked_bits, target, where="--bits")
    if recipe.ends_bits:
        check_bits(recipe.ends_bits, target, where="--ends")
    for rule in recipe.rules:
        check_bits(rule.bits, target, where=f"--layer {rule.pattern!r}")
    check_base(recipe.trt_base, target)
    _check_weight_limit(recipe, target)
    _check_autotune(recipe)
    check_pruning(recipe)
    _check_calibration(recipe)
    _check_image(recipe)
    if recipe.device != "cpu" and recipe.device.split(":")[0] != "cuda":
        raise UsageError(f"--device: got {recipe.device!r}, expected cpu, cuda or cuda:N")
    _ = recipe.budget_seconds, recipe.memory_bytes  # read for their faults


def _check_weight_limit(recipe: Recipe, target: TargetSpec) -> None:
    limit, _ = recipe.weight_limit, recipe.size_bytes  # the latter is read for its faults
    if recipe.sensitivity and recipe.asked_bits.is_float:
        raise UsageError(
            f"--sensitivity rounds weights, and --bits {recipe.bits} leaves them in float; give "
            "bits such as w8a8"
        )
    if limit is None:
        return
    if recipe.avg_bits is not None and recipe.size is not None:
        raise UsageError(
            f"--avg-bits {recipe.avg_bits:g} and --size {recipe.size} both limit the weights: "
            "use one of them"
        )
    if recipe.asked_bits.is_float:
        raise UsageError(
            f"{limit} chooses the bits of quantized weights, and --bits {recipe.bits} leaves them "
            "in float; give bits such as w8a8, whose activation bits are kept"
        )
    narrow, wide = (end(widths(target)) for end in (min, max))
    if recipe.avg_bits is not None and not narrow <= recipe.avg_bits <= wide:
        side = "below the narrowest" if recipe.avg_bits < narrow else "above the widest"
        raise UsageError(
            f"{limit}: {side} weights of target '{target.name}'; expected {narrow} to {wide}"
        )


def _check_autotune(recipe: Recipe) -> None:
    if recipe.autotune and recipe.size is not None:
        raise UsageError(
            "--autotune leaves layers in float, whose weights take four times the room: it cannot "
            f"keep --size {recipe.size}; use one of both"
        )


def _check_calibration(recipe: Recipe) -> None:
    if recipe.calib_data and recipe.synth != "images":
        raise UsageError(
            f"--calib-data gives images and --synth {recipe.synth} makes them: use one of both"
        )
    unread = [name for name in recipe.synth_option if name != "batch_size"]
    if recipe.calib_data and unread:
        raise UsageError(
            f"--synth-option {unread[0]}: --calib-data gives images, and makes none; leave it out"
        )
    if recipe.zoo and not plugins.constant("synthesizer", recipe.synth, "USES_ZOO"):
        names = plugins.available("synthesizer")
        using = [n for n in names if plugins.constant("synthesizer", n, "USES_ZOO")]
        raise UsageError(
            f"--zoo: --synth {recipe.synth} reads no other models; those that do: "
            f"{', '.join(using)}"
        )
    if recipe.synth == "images" and not recipe.calib_data:
        raise UsageError("--synth images reads real images: say where with --calib-data PATH")


def _check_image(recipe: Recipe) -> None:
    if (recipe.mean is None) != (recipe.std is None):
        raise UsageError("--mean and --std belong together: one was given without the other")
    channels = recipe.input_size[0] if recipe.input_size else None
    for name, values in (("--mean", recipe.mean), ("--std", recipe.std)):
        if values is not None and channels not in (None, len(values)):
            raise UsageError(f"{name}: got {len(values)} values for {channels} input channels")
    if recipe.std is not None and min(recipe.std) <= 0:
        raise UsageError(f"--std: got {recipe.std}, expected positive values")
    if recipe.input_size and min(recipe.input_size) < 1:
        raise UsageError("--input-size: expected positive numbers, for example 3x224x224")


def _read_file(path: Path) -> dict[str, Any]:
    import yaml  # only builds read recipes; a device has no yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--recipe: {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--recipe: {path} is not YAML: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"--recipe: {path} must hold `key: value` lines, keys as the flags")
    return {key.replace("-", "_"): value for key, value in data.items()}


def _check_names(values: Mapping[str, Any], where: str) -> None:
    known = [name.replace("_", "-") for name in Recipe.model_fields]
    for name in (key.replace("_", "-") for key in values):
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"{where}: unknown key {name!r}; {hint}")


def parse_options(texts: Iterable[str], flag: str) -> dict[str, Any]:
    """Read the NAME=VALUE of a flag that can be given several times."""
    return dict(_parse_option(text, flag) for text in texts)


def _parse_option(text: str, flag: str) -> tuple[str, Any]:
    import yaml

    name, sep, value = text.partition("=")
    if not sep or not name.strip():
        raise UsageError(f"--{flag.replace('_', '-')}: got {text!r}, expected NAME=VALUE")
    return name.strip().replace("-", "_"), yaml.safe_load(value)


def _explain(error: ValidationError, where: str) -> str:
    lines = []
    for fault in error.errors():
        name = str(fault["loc"][0]).replace("_", "-")
        lines.append(f"{where}: --{name}: got {fault['input']!r}; {fault['msg'].lower()}")
    return "\n".join(lines)
