"""A bundle: the folder that is all a machine needs to serve a model.

    bundle.json          schema, spec, files with their hashes, components, parity table, provenance
    <component>.onnx     one graph each, weights by reference
    weights.safetensors
    tokenizer.json

Flows in: a folder. Flows out: a verified Bundle, or UserError. The only module that knows the manifest's layout; it
never unpickles, and no path from a manifest leaves the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .spec import ModelSpec

SCHEMA = 1
MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
EMBEDDED = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Component:
    """One graph: its file, how many parameters it uses, and its ports' shapes (strings name varying extents)."""

    graph: str
    parameters: int
    inputs: Mapping[str, list[int | str]]
    outputs: Mapping[str, list[int | str]]


@dataclass(frozen=True)
class ParityRow:
    """How far a compiled component is from its torch reference on one shape."""

    component: str
    target: str
    shape: str
    max_abs: float
    relative: float  # L2 of the difference over L2 of the reference


@dataclass(frozen=True)
class Bundle:
    folder: Path
    spec: ModelSpec
    files: Mapping[str, FileRecord]
    components: Mapping[str, Component]
    parity: tuple[ParityRow, ...]
    provenance: Mapping[str, str]

    @property
    def key(self) -> str:
        """Names the content: schema, spec, and the hash of every file."""
        content = [SCHEMA, self.spec.to_json(), {name: record.sha256 for name, record in self.files.items()}]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def targets(self) -> tuple[str, ...]:
        """What the bundle can run on: every bundle runs on the CPU."""
        return ("cpu",)

    def path(self, name: str) -> Path:
        return self.folder / name

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Reads and verifies a bundle: every file present, with the size and hash that the manifest names.

        Raises UserError that names the folder or file, what is wrong with it, and the remedy.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `tubelet export`")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            bundle = cls._from_manifest(folder, manifest)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{folder / MANIFEST} is damaged ({error!r}); export the bundle again") from error
        for name, record in bundle.files.items():
            _verify(folder, name, record)
        return bundle

    @classmethod
    def _from_manifest(cls, folder: Path, manifest: dict[str, Any]) -> Bundle:
        if manifest["schema"] != SCHEMA:
            raise UserError(
                f"{folder} has bundle schema {manifest['schema']!r}, this tubelet reads {SCHEMA}; "
                "export the bundle again"
            )
        return cls(
            folder=folder,
            spec=ModelSpec.from_json(manifest["spec"]),
            files={name: FileRecord(**record) for name, record in manifest["files"].items()},
            components={name: Component(**component) for name, component in manifest["components"].items()},
            parity=tuple(ParityRow(**row) for row in manifest["parity"]),
            provenance=manifest["provenance"],
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest."""
        return {
            "schema": SCHEMA,
            "key": self.key,
            "provenance": dict(self.provenance),
            "spec": self.spec.to_json(),
            "components": {name: vars(component) for name, component in self.components.items()},
            "files": {name: vars(record) for name, record in self.files.items()},
            "parity": [vars(row) for row in self.parity],
        }

    def write_manifest(self) -> None:
        """Writes bundle.json; every other file must be in place."""
        (self.folder / MANIFEST).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


def record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _verify(folder: Path, name: str, expected: FileRecord) -> None:
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{folder / MANIFEST} names the file {name!r} outside the bundle; do not use this bundle")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing; copy the bundle again or export it again")
    size = path.stat().st_size
    if size != expected.bytes:
        raise UserError(
            f"{path} has {size} bytes, the manifest says {expected.bytes}: it is truncated or changed; "
            "copy the bundle again or export it again"
        )
    if record(path).sha256 != expected.sha256:
        raise UserError(
            f"{path} does not match the manifest's hash: it is corrupt; copy the bundle again or export it again"
        )
