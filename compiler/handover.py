"""What a package brings for whoever takes it: its manifest and files in, those and more out.

Server configuration, self-test, card, JUnit and provenance are made from the manifest and the files
alone, so that a package can be finished again on a device, without torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfqc.compiler.artifact import hash_file
from dfqc.compiler.baking import BAKED
from dfqc.compiler.junit import junit_xml
from dfqc.compiler.model_card import model_card
from dfqc.compiler.package import MODEL, to_json
from dfqc.compiler.provenance import make_statement
from dfqc.compiler.selftest import SCRIPT, SELFTEST
from dfqc.compiler.triton import triton_repository

CARD, JUNIT, PROVENANCE = "MODEL_CARD.md", "junit.xml", "provenance.json"


def hand_over(
    manifest: Mapping[str, Any],
    contents: Mapping[str, Path | bytes],
    *,
    name: str,
    cpu: bool,
    engine: bytes | None = None,
    batches: Sequence[int] = (),
) -> dict[str, Path | bytes]:
    """Add the files of the hand-over; those of an earlier one are replaced.

    Args:
        manifest: complete but for `files`.
        contents: what is in the package, at least `model.onnx`.
        name: of the model in the server's repository.
        cpu: whether the server shall run it on CPU.
        engine: a TensorRT plan to serve instead of the ONNX model.
        batches: batch sizes that the engine was optimized for.
    """
    made = (SELFTEST, JUNIT, CARD, PROVENANCE)
    files = {
        path: what
        for path, what in contents.items()
        if path not in made and not path.startswith("triton/")
    }
    served = _read(files.get(BAKED, files[MODEL]) if engine is None else files[MODEL])
    target = str(manifest["target"])
    files |= triton_repository(name, served, cpu=cpu, target=target, engine=engine, batches=batches)
    files[SELFTEST] = SCRIPT.encode()
    files[JUNIT] = junit_xml(manifest)
    files[CARD] = model_card(manifest, [*files, CARD, PROVENANCE]).encode()
    statement = make_statement(manifest, {path: _digest(what) for path, what in files.items()})
    files[PROVENANCE] = (to_json(statement) + "\n").encode()
    return files


def _read(content: Path | bytes) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _digest(content: Path | bytes) -> str:
    return hash_file(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
