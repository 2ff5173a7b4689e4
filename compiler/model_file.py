"""A graph in, a .pt2 archive out: batch norms unfused, and beside them how images are prepared."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import torch

from dfqc.compiler._archive import PREPROCESSING
from dfqc.compiler.errors import EnvironmentFault
from dfqc.compiler.frontend import export
from dfqc.compiler.graph import Graph


def save_model(graph: Graph, path: Path) -> None:
    """Write `graph` so that `dfqc build PATH` needs no other flag; equal graphs give equal bytes.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    program = export(graph.module, graph.image)
    content = io.BytesIO()  # a named file would put its name into the archive
    facts = json.dumps(dataclasses.asdict(graph.image))
    torch.export.save(program, content, extra_files={PREPROCESSING: facts})
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.getvalue())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EnvironmentFault(
            f"{path} cannot be written: {error.strerror or error}; choose another with -o"
        ) from error
