"""A bundle: the folder that is all a machine needs to serve a model.

    bundle.json          schema, spec, files with their hashes, components, parity table, provenance
    <component>.onnx     one graph each, weights by reference
    weights.safetensors  or the files of a published checkpoint, as they are
    tokenizer.json

Flows in: a folder. Flows out: a verified Bundle, or UserError. The only module that knows the manifest's layout; it
never unpickles, and no path from a manifest leaves the folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .spec import ModelSpec
from .strict import read
from .verified import has_hash

SCHEMA = 3
MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
TOKENIZER = "tokenizer.json"
EMBEDDED = Path(__file__).parent / "demo"

Shape = tuple[int | str, ...]  # of a port; an extent is a number, or varies: as "h", "4*h" or "-7+8*t"
Extents = Mapping[str, int]  # the varying ones, by name
TO_GENERATE = ("text_encoder", "conditioner", "denoiser", "vae_decoder_first", "vae_decoder")
COMPONENTS = (*TO_GENERATE, "vae_encoder_first", "vae_encoder")
TO_CAPTION = ("captioner_memory", "captioner")


def sizes(shape: Shape, extents: Extents) -> tuple[int, ...]:
    """A port's shape where the varying extents are these."""
    return tuple(
        sum(math.prod(_value(factor, extents) for factor in term.split("*")) for term in str(extent).split("+"))
        for extent in shape
    )


def _value(factor: str, extents: Extents) -> int:
    return extents[factor] if factor.isidentifier() else int(factor)


def extents(ports: Mapping[str, Shape], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The varying extents of ports where their shapes are these. Raises UserError where the shapes do not fit."""
    found: dict[str, int] = {}
    for name, port in ports.items():
        for extent, size in zip(port, shapes.get(name, ()), strict=False):
            *added, term = str(extent).split("+")
            *factors, symbol = term.split("*")
            if symbol.isidentifier():
                found[symbol] = (size - sum(map(int, added))) // math.prod(map(int, factors))
    for name, port in ports.items():
        if name not in shapes or shapes[name] != sizes(port, found):
            given = list(shapes[name]) if name in shapes else "nothing"
            raise UserError(f"{name} must have the shape [{', '.join(map(str, port))}], has {given}")
    return found


@dataclass(frozen=True)
class FileRecord:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Component:
    """One graph: its file, how many parameters it uses, and its ports' shapes.

    The two digests are SHA-256 of the graph, apart from where in which file its weights are, and of the weights' names,
    types, shapes and values: the same for the same model however it was stored.
    """

    graph: str
    graph_digest: str
    weights_digest: str
    parameters: int
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]


@dataclass(frozen=True)
class ParityRow:
    """How far a compiled component is from its torch reference on one shape."""

    component: str
    target: str
    shape: str
    max_abs: float
    relative: float  # L2 of the difference over L2 of the reference


@dataclass(frozen=True)
class Manifest:
    """What bundle.json says."""

    schema: int
    key: str  # names the content: see `content_key`
    provenance: Mapping[str, str]
    targets: tuple[str, ...]  # what the bundle can run on; "cpu" needs nothing but the graphs
    spec: ModelSpec
    components: Mapping[str, Component]
    weights: tuple[str, ...]  # files that hold them
    files: Mapping[str, FileRecord]
    parity: tuple[ParityRow, ...]

    def check(self) -> None:
        """Raises UserError when the parts do not fit each other."""
        if missing := sorted(set(required(self.spec)) - set(self.components)):
            raise UserError(f"it lacks the components {', '.join(missing)}")
        used = {*self.weights, TOKENIZER, *(component.graph for component in self.components.values())}
        if unlisted := sorted(used - set(self.files)):
            raise UserError(f"it does not list the files {', '.join(unlisted)}")
        for name in self.files:
            if Path(name).name != name or name in ("", ".."):
                raise UserError(f"it names the file {name!r}, which is outside the bundle")
        if self.key != content_key(self.spec, self.components, self.files[TOKENIZER]):
            raise UserError("its key does not match its content, so it was changed")


def required(spec: ModelSpec) -> tuple[str, ...]:
    """The components that a model must have."""
    common = [name for name in COMPONENTS if spec.vae.streams or name != "vae_decoder_first"]
    images = ("image_conditioner",) if spec.image_encoder else ()
    experts = [f"{name}{expert}" for expert in spec.experts for name in ("conditioner", "denoiser", *images)]
    captioner = TO_CAPTION if spec.captioner else ()
    return (*common, *experts, *(("image_encoder",) if images else ()), *captioner)


def content_key(spec: ModelSpec, components: Mapping[str, Component], tokenizer: FileRecord) -> str:
    """SHA-256 over schema, spec, the digests of every component, and the tokenizer."""
    digests = {name: [each.graph_digest, each.weights_digest] for name, each in components.items()}
    content = [SCHEMA, dataclasses.asdict(spec), digests, tokenizer.sha256]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A folder whose files are what its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec

    @property
    def key(self) -> str:
        return self.manifest.key

    def path(self, name: str) -> Path:
        return self.folder / name

    def graph(self, component: str) -> Path:
        return self.folder / self.manifest.components[component].graph

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Reads and verifies a bundle: every file present, with the size and hash that the manifest names.

        Raises UserError that names the folder or file, what is wrong with it, and the remedy.
        """
        path = Path(folder) / MANIFEST
        try:
            if not path.is_file():
                raise UserError(f"{folder} is not a bundle: it has no {MANIFEST}; make one with `tubelet export`")
            manifest = _read_manifest(path)
            for name, expected in manifest.files.items():
                _verify(path.with_name(name), expected)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}; make the bundle readable") from error
        return cls(path.parent, manifest)


def _read_manifest(path: Path) -> Manifest:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        schema = value.get("schema") if isinstance(value, dict) else None
        if schema != SCHEMA:
            raise UserError(f"it has schema {schema!r}, this tubelet reads {SCHEMA}")
        manifest = read(Manifest, value, "manifest")
        manifest.check()
    except (UserError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not usable: {error}; export the bundle again") from error
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes bundle.json; every other file must be in place."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _verify(path: Path, expected: FileRecord) -> None:
    remedy = "copy the bundle again or export it again"
    if path.is_symlink() or not path.is_file():
        raise UserError(f"{path} is missing or a link; {remedy}")
    size = path.stat().st_size
    if size != expected.bytes:
        raise UserError(
            f"{path} has {size} bytes, the manifest says {expected.bytes}: it is truncated or changed; {remedy}"
        )
    if not has_hash(path, expected.sha256):
        raise UserError(f"{path} does not match the manifest's hash: it is corrupt; {remedy}")
