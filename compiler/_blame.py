"""Where in the user's source a fault lies: in an exception or an exported node, out `file:line`."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch
from torch import fx

TORCH_HOME = str(Path(torch.__file__).parent)
OWN_HOME = str(Path(__file__).parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_OPERATOR = re.compile(r"\b(?:aten|prims|torchvision|torch\.ops)[.:]+\w+(?:\.\w+)?")


def blame_error(error: BaseException) -> str:
    """Return ` at file:line (the line)` of the deepest frame outside torch and dfqc, or ``."""
    frames = [
        frame
        for link in _chain(error)
        for frame in traceback.extract_tb(link.__traceback__)
        if _is_user_file(frame.filename)
    ]
    if frames:
        line = f" ({frames[-1].line})" if frames[-1].line else ""
        return f" at {frames[-1].filename}:{frames[-1].lineno}{line}"
    return _last_user_frame(str(error))


def blame_node(node: fx.Node) -> str:
    """Return ` at file:line` where the model called this node, or `` if the trace is lost."""
    return _last_user_frame(node.meta.get("stack_trace") or "")


def name_operator(error: BaseException) -> str:
    """Return the operator an export failure speaks about, or the kind of failure."""
    for link in _chain(error):
        match = _OPERATOR.search(str(link))
        if match:
            return match[0]
    return type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the first line with text of the error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _chain(error: BaseException) -> list[BaseException]:
    """List the error and its causes, outermost first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def _last_user_frame(text: str) -> str:
    places = [m for m in _FRAME.finditer(text) if _is_user_file(m["file"])]
    return f" at {places[-1]['file']}:{places[-1]['line']}" if places else ""


def _is_user_file(file: str) -> bool:
    return not file.startswith((TORCH_HOME, OWN_HOME, "<"))
