"""Identify the files of an artifact, and read and replace what an artifact says about itself.

An artifact is a network in the format of ONNX Runtime or OpenVINO. What it says about itself is a text in the file's metadata.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from sparseinst.engines.base import missing_package
from sparseinst.errors import UserError
from sparseinst.files import check_is_file

OPSET = 19
"""The ONNX operator set of networks: the first with deformable convolutions."""
ABOUT = "sparseinst"
"""The name of the entry in an artifact's metadata that describes the artifact."""
GRAPH = "sparseinst_graph"
"""The name of the entry in the metadata of a graph with pre- and post-processing, which is no artifact."""
_IN_XML = re.compile(rf'(<{ABOUT} value=")([^"]*)(" />)'.encode())
_NUMBERED = re.compile(rb"\b([A-Z][A-Za-z]*_)[0-9]+\b")
_QUOTE, _UNQUOTE = {'"': "&quot;"}, {"&quot;": '"', "&#10;": "\n", "&#9;": "\t"}


def artifact_files(artifact: Path) -> list[Path]:
    """Return the files of an artifact: OpenVINO keeps the weights of `NAME.xml` in `NAME.bin` beside it."""
    return [artifact, artifact.with_suffix(".bin")] if artifact.suffix == ".xml" else [artifact]


def artifact_identity(artifact: Path) -> tuple[str, int]:
    """Return the digest of an artifact's network, 16 hexadecimal digits of a SHA-256, and the bytes of its files.

    The digest leaves out what the artifact says about itself, because settings such as the image size can change there while the
    network stays the same. It also leaves out the numbers in the names that OpenVINO gives to layers, which count everything that
    a process has made.

    Raises:
        UserError: a file is missing or incomplete, or the package that reads it is not installed.
    """
    check_is_file(artifact)
    files = artifact_files(artifact)
    for path in files[1:]:
        if not path.is_file():
            raise UserError(f"{artifact}: its weights are missing: copy {path.name}, which belongs to it, into the same folder")
    if artifact.suffix == ".onnx":
        parts = [read_onnx(artifact).graph.SerializeToString(deterministic=True)]
    else:
        description = _NUMBERED.sub(rb"\1", _IN_XML.sub(rb"\1\3", artifact.read_bytes()))
        parts = [description, *(path.read_bytes() for path in files[1:])]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    return digest.hexdigest()[:16], sum(path.stat().st_size for path in files)


def read_onnx(path: Path) -> Any:
    """Return the content of an ONNX file.

    Raises:
        UserError: the file is missing, incomplete or no ONNX file, or the package `onnx` is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise missing_package("onnxruntime", error) from None
    check_is_file(path)
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError:
        raise UserError(f"{path}: is not an ONNX file, or it is incomplete: copy or export it again") from None


def read_about_text(artifact: Path) -> str | None:
    """Return what an artifact says about itself; None if it says nothing.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    check_is_file(artifact)
    if artifact.suffix == ".onnx":
        return next((entry.value for entry in read_onnx(artifact).metadata_props if entry.key == ABOUT), None)
    found = _IN_XML.search(artifact.read_bytes())
    return unescape(found[2].decode("utf-8", "replace"), _UNQUOTE) if found is not None else None


def with_about(artifact: Path, about: str) -> bytes:
    """Return the content of an artifact's first file in which the artifact says something else about itself.

    Args:
        about: ASCII text in one line.
    """
    if artifact.suffix == ".onnx":
        model = read_onnx(artifact)
        others = [entry for entry in model.metadata_props if entry.key != ABOUT]
        del model.metadata_props[:]
        model.metadata_props.extend(others)
        model.metadata_props.add(key=ABOUT, value=about)
        content: bytes = model.SerializeToString()
        return content
    text = escape(about, _QUOTE).encode("ascii")
    content, replaced = _IN_XML.subn(lambda match: match[1] + text + match[3], artifact.read_bytes())
    if replaced != 1:
        raise ValueError(f"{artifact}: has {replaced} entries {ABOUT}, and one was expected")
    return content
