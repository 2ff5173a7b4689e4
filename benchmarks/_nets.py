"""The pretrained networks that the benchmarks measure on, and how `dfqc build` is told of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqc.compiler.frontend import trace
from dfqc.compiler.graph import Graph
from dfqc.compiler.loading import ImageOverrides, load_model
from dfqc.compiler.recipe import make_recipe

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Net:
    """One network of the assets with the images to judge it on and to calibrate it with."""

    name: str
    flags: tuple[str, ...]  # model, architecture and preprocessing
    test: Path
    real: Path  # images for the calibration with real data
    in_sample: bool  # `real` is a part of `test`: an upper bound, not a fair result
    weight_bytes: int
    real_count: int  # images in `real`


def assets() -> Path:
    """Return the folder of test nets and images, DFQC_ASSETS or beside the repository."""
    folder = Path(os.environ.get("DFQC_ASSETS", ROOT.parent / "shared" / "assets"))
    if not (folder / "models").is_dir():
        raise SystemExit(f"no assets at {folder}: set DFQC_ASSETS to the folder with models/")
    return folder


def list_nets(names: list[str]) -> list[Net]:
    """Return the named networks, or all of them."""
    folder = assets()
    found = sorted(p.parent.name for p in (folder / "models").glob("*/info.json"))
    unknown = set(names) - set(found)
    if unknown:
        raise SystemExit(f"unknown nets {sorted(unknown)}; there are {', '.join(found)}")
    return [_net(folder, name) for name in names or found]


def judge_of(net: Net) -> Net | None:
    """Return the network that judges images of others and is no part of their zoo.

    None where there are only two networks: then the other one is zoo and judge.
    """
    zoo = zoo_of(net)
    return min(zoo, key=lambda other: other.weight_bytes) if len(zoo) > 1 else None


def zoo_of(net: Net) -> list[Net]:
    """Return the other networks with the same classes in the same order and the same input."""

    def kind(one: Net) -> tuple[Path, str]:
        return one.test, one.flags[one.flags.index("--input-size") + 1]

    return [o for o in list_nets([]) if kind(o) == kind(net) and o.name != net.name]


def write_member(net: Net, folder: Path) -> Path:
    """Write the recipe that names a network of a zoo with its normalization."""
    keys = {"model": net.flags[0]}
    keys |= {k.removeprefix("--"): v for k, v in zip(net.flags[1::2], net.flags[2::2], strict=True)}
    path = folder / f"{net.name}.yaml"
    lines = [f"{key}: {json.dumps(value)}" for key, value in keys.items() if key != "resize"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def open_net(net: Net) -> Graph:
    """Trace a network, for measurements that the command line does not make."""
    flags = dict(zip(net.flags[1::2], net.flags[2::2], strict=True))
    recipe = make_recipe(
        {"model": net.flags[0], **{k[2:].replace("-", "_"): v for k, v in flags.items()}}
    )
    image = ImageOverrides(recipe.input_size, recipe.mean, recipe.std, recipe.resize)
    return trace(load_model(recipe.model, arch=recipe.arch, image=image))


def _net(folder: Path, name: str) -> Net:
    home = folder / "models" / name
    info: Mapping[str, Any] = json.loads((home / "info.json").read_text(encoding="utf-8"))
    size = info["input_size"]
    (code,) = home.glob("*.py")
    flags = (
        str(home / "weights.pt"),
        *("--arch", f"{code}:build", "--input-size", f"3x{size}x{size}"),
        *("--mean", ",".join(map(repr, info["mean"])), "--std", ",".join(map(repr, info["std"]))),
        *("--resize", str(info.get("resize", size))),
    )
    weights = (home / "weights.pt").stat().st_size
    if info["dataset"] == "imagenet":
        images = folder / "data" / "imagenet" / "sample1000"
        return Net(
            name, flags, images, images, in_sample=True, weight_bytes=weights, real_count=1000
        )
    data = folder / "data" / info["dataset"]
    test, train = (data / f"{info['dataset']}_{split}.npz" for split in ("test", "train"))
    return Net(name, flags, test, train, in_sample=False, weight_bytes=weights, real_count=5000)
