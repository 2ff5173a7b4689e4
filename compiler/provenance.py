"""What a package was made of: manifest, digests and inputs in, an unsigned in-toto statement out.

The statement lists every file by its SHA-256; its predicate has the field names of SLSA's
provenance 1.0, and its own type: nobody has attested the machine that built it, so no SLSA level is
claimed. `cosign attest` or `in-toto` can sign it as it is.
"""

from __future__ import annotations

import datetime
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfqc.compiler.artifact import hash_file

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:dfqc:provenance:1"
BUILD = "urn:dfqc:build:1"
# Of the environment: what is a package of the registry.
_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "openvino",
    "numpy",
)


def make_statement(manifest: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Return the statement.

    Args:
        manifest: of the finished build; `model.source` and `model.arch` are read as files if they
            are some here.
        digests: SHA-256 by path in the package.
    """
    environment = manifest.get("environment", {})
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {
                    "command": manifest.get("command"),
                    "recipe": manifest.get("recipe", {}),
                },
                "internalParameters": {
                    "recipe_sha256": manifest.get("recipe_sha256"),
                    "model_sha256": manifest.get("model", {}).get("sha256"),
                    "seed": manifest.get("seed"),
                },
                "resolvedDependencies": [*_inputs(manifest), *_packages(environment)],
            },
            "runDetails": {
                "builder": {
                    "id": "urn:dfqc:unattested",
                    "version": {
                        "dfqc": manifest.get("dfqc"),
                        "python": environment.get("python"),
                        "platform": environment.get("platform"),
                    },
                },
                "metadata": {"finishedOn": _now()},
            },
        },
    }


def _inputs(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the model, its code, and the images that were given; by content where they are files.

    A folder of images has the digest of dfqc in the recipe's, not one of a file.
    """
    recipe = manifest.get("recipe", {})
    code = str(recipe.get("arch") or "").rpartition(":")[0]
    places = {
        "model": recipe.get("model"),
        "architecture": code if code.endswith(".py") else recipe.get("arch"),
        "calibration images": recipe.get("calib-data"),
        "evaluation images": recipe.get("eval-data"),
    }
    found = []
    for name, place in places.items():
        if place:
            entry: dict[str, Any] = {"name": name, "annotations": {"source": str(place)}}
            if Path(place).is_file():
                entry["digest"] = {"sha256": hash_file(Path(place))}
            found.append(entry)
    return found


def _packages(environment: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"uri": f"pkg:pypi/{name}@{urllib.parse.quote(str(environment[name]))}"}
        for name in _PACKAGES
        if environment.get(name)
    ]


def _now() -> str:
    """Return the time; `SOURCE_DATE_EPOCH` overrides it, as in other reproducible builds."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    utc = datetime.timezone.utc
    now = datetime.datetime.fromtimestamp(int(epoch), utc) if epoch else datetime.datetime.now(utc)
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")
