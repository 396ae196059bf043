"""What several test files share: small specs, the embedded pipeline, a checkpoint made from it, the command line,
compiled plans, and the CUDA kernels as host code."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from compiled import MEMORY_GB, TARGET, profiles
from fake_device import load_cuda_host

from tubelet.export.engines import build_engines
from tubelet.runtime import EMBEDDED, Bundle, Pipeline
from tubelet.runtime.bundle import TOKENIZER, WEIGHTS
from tubelet.runtime.cli import main
from tubelet.runtime.spec import ModelSpec


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return Bundle.open(EMBEDDED).spec


@pytest.fixture(scope="session")
def pipeline() -> Pipeline:
    return Pipeline.open(EMBEDDED)


@pytest.fixture
def embedded_copy(tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))


@pytest.fixture
def checkpoint(tmp_path: Path, spec: ModelSpec) -> Path:
    """The embedded model as the checkpoint that it was exported from."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in (WEIGHTS, TOKENIZER):
        shutil.copyfile(EMBEDDED / name, folder / name)
    (folder / "spec.json").write_text(json.dumps(dataclasses.asdict(spec)))
    return folder


@pytest.fixture(scope="session")
def cuda_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels as host code, for a FakeDevice."""
    return load_cuda_host(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded bundle with real plans of all components, in a folder of its own; tests leave it as it is."""
    bundle = Bundle.open(shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("compiled") / "bundle"))
    build_engines(bundle, TARGET, profiles(bundle), workers=2, memory_gb=MEMORY_GB)
    return bundle


@pytest.fixture
def compiled_copy(compiled: Bundle, tmp_path: Path) -> Bundle:
    """The same, which a test may damage."""
    return Bundle.open(shutil.copytree(compiled.folder, tmp_path / "compiled"))


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def tubelet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs the command line in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["tubelet", *arguments])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run
