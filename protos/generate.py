"""Regenerates the Python code of the contract: ``python -m protos.generate`` from the repo root.

The generated files are committed, so that installing Quire needs no protobuf compiler. A test
regenerates them and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
# Protobuf's own messages, such as Duration; they come with the compiler.
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def generate(out: Path) -> None:
    """Writes ``*_pb2.py``, ``*_pb2.pyi`` and ``*_pb2_grpc.py`` below `out`.

    Raises:
        RuntimeError: the compiler refused a file; it has printed why.
    """
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("protos/*/v1/*.proto"))
    status = protoc.main(
        [
            "protoc",
            f"-I{ROOT}",
            f"-I{WELL_KNOWN}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *files,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
