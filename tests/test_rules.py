"""What the code base promises about itself: imports, sizes, bans, generated code, no torch."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_plane.client import Client
from data_plane.engine import Engine, EngineSizes
from data_plane.model import Model
from protos.generate import generate
from tests.processes import free_port
from tests.stack import NO_REDIS, running_engine

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("control_plane", "data_plane", "kernels", "protos")
STANDARD = set(sys.stdlib_module_names)
GENERATED = re.compile(r"_pb2(_grpc)?\.py$")
# Tools that run by hand, beside the package's own modules.
SCRIPTS = {
    "data_plane/demo_model/train.py",
    "data_plane/demo_model/corpus.py",
    "protos/generate.py",
}

WIRE_MODULES = {
    "control_plane/admin.py",
    "control_plane/admin_client.py",
    "control_plane/admin_merge.py",
    "control_plane/admin_peers.py",
    "control_plane/authorisation.py",
    "control_plane/cli/child.py",
    "control_plane/cli/credentials.py",
    "control_plane/client.py",
    "control_plane/engine_link.py",
    "control_plane/engine_wire.py",
    "control_plane/frontend.py",
    "control_plane/otlp.py",
    "control_plane/admin_views.py",
    "control_plane/peer.py",
    "control_plane/prefixes/store.py",
    "control_plane/progress.py",
    "control_plane/prompts.py",
    "control_plane/records.py",
    "control_plane/relay.py",
    "control_plane/server.py",
    "control_plane/settings.py",
    "control_plane/traces.py",
    "control_plane/utf8.py",
}
PURE_MODULES = {
    "beams.py",
    "blocks.py",
    "counters.py",
    "explain.py",
    "history.py",
    "hashing.py",
    "histogram.py",
    "overload.py",
    "pace.py",
    "plan.py",
    "request.py",
    "scheduler.py",
    "slots.py",
    "swapping.py",
}


def sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not GENERATED.search(name) and name not in SCRIPTS:
            yield name, ast.parse(path.read_text())


def imported(tree: ast.Module) -> set[str]:
    """Returns the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def top_level(tree: ast.Module) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)} - STANDARD


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("kernels", {"kernels", "torch", "triton"}),
        ("protos", {"protos", "grpc", "google", "grpc_health", "grpc_reflection", "grpc_status"}),
    ],
)
def test_packages_import_only_what_they_may(package: str, allowed: set[str]) -> None:
    for name, tree in sources(package):
        assert top_level(tree) <= allowed, name


def test_the_planes_do_not_know_each_other() -> None:
    for name, tree in sources("control_plane"):
        banned = {"torch", "triton", "transformers", "kernels", "data_plane", "safetensors"}
        assert not top_level(tree) & banned, name
    for name, tree in sources("data_plane"):
        assert not top_level(tree) & {"redis", "control_plane"}, name


def test_grpc_and_redis_stay_at_the_edge() -> None:
    for name, tree in sources("control_plane"):
        if "redis" in top_level(tree):
            assert name in {"control_plane/prefix_index.py", "control_plane/prefixes/store.py"}
        # How logs are written has nothing to do with the wire.
        names = {each.split(".")[0] for each in imported(tree) - {"protos.logs"}}
        if names & {"grpc", "protos", "google", "grpc_health"}:
            assert name in WIRE_MODULES, name


def test_one_module_knows_opentelemetry() -> None:
    for package in PACKAGES:
        for name, tree in sources(package):
            if name != "control_plane/otlp.py":
                assert "opentelemetry" not in top_level(tree), name


def test_scheduler_and_block_pool_are_pure() -> None:
    allowed = {"numpy", "control_plane"}
    banned = {"time", "random", "asyncio", "threading", "os", "logging", "datetime", "secrets"}
    for name, tree in sources("control_plane"):
        if Path(name).name in PURE_MODULES:
            assert top_level(tree) <= allowed, name
            assert not imported(tree) & banned, name


def test_no_pickle_and_no_remote_code() -> None:
    for package in PACKAGES:
        for name, tree in sources(package):
            text = (ROOT / name).read_text()
            assert "pickle" not in imported(tree), name
            assert "torch.load(" not in text, name
            assert "trust_remote_code=True" not in text, name


def test_functions_are_short() -> None:
    for package in PACKAGES:
        for name, tree in sources(package):
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    assert lines <= 70, f"{name}: {node.name} has {lines} lines"


def test_generated_code_is_that_of_the_protos(tmp_path: Path) -> None:
    generate(tmp_path)
    fresh = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*_pb2*")}
    committed = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "protos").rglob("*_pb2*")
        if path.suffix != ".pyc"
    }
    assert set(fresh) == committed
    for name, path in fresh.items():
        assert path.read_text() == (ROOT / name).read_text(), name


def test_control_plane_runs_without_torch(llama: Model, tmp_path: Path) -> None:
    """It serves in an environment with every installed package but those of the data plane."""
    site = Path(sysconfig.get_paths()["purelib"])
    absent = re.compile(r"torch|triton|transformers|safetensors|functorch|nvidia|.*\.pth$")
    for entry in site.iterdir():
        if not absent.match(entry.name):
            (tmp_path / entry.name).symlink_to(entry)
    for package in ("control_plane", "protos"):
        (tmp_path / package).symlink_to(ROOT / package)
    code = (
        "import sys, importlib.util as util\n"
        "import control_plane.cli.commands\n"
        "from control_plane.__main__ import main\n"
        "assert not any(util.find_spec(n) for n in ('torch', 'transformers', 'data_plane'))\n"
        "sys.exit(main())\n"
    )
    port = free_port()

    async def serve(engine_port: int) -> None:
        flags = ["--engines", f"127.0.0.1:{engine_port}", "--listen", f"127.0.0.1:{port}"]
        flags += ["--admin-listen", f"127.0.0.1:{free_port()}", "--redis-url", NO_REDIS]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-c", code, *flags,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
        )  # fmt: skip
        try:
            async with Client(f"127.0.0.1:{port}") as client:
                answer = await collect(client)
                assert len(answer) == 8
        finally:
            process.terminate()
        assert await process.wait() == 0

    async def collect(client: Client) -> list[int]:
        options = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
        events = client.generate([20, 21, 22], **options)
        return [token async for event in events for token in event.delta.token_ids]

    async def main() -> None:
        sizes = EngineSizes(16, 64, 0, 4, 64, 256)
        async with running_engine(Engine(llama, sizes), None) as (_, engine_port):
            await serve(engine_port)

    asyncio.run(main())


def test_settings_have_help_with_units_and_defaults() -> None:
    from control_plane.settings import Settings as Control
    from data_plane.settings import Settings as Data

    for settings in (Control, Data):
        for name, field in settings.model_fields.items():
            assert field.description, name
