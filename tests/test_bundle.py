"""A damaged bundle is refused in one sentence that names the file and the remedy.

pytest tests/test_bundle.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tubelet.runtime import EMBEDDED, Bundle, Pipeline, UserError
from tubelet.runtime.bundle import FileRecord, content_key, write_manifest
from tubelet.runtime.spec import ModelSpec


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "bundle.json").read_text())
    change(manifest)
    (folder / "bundle.json").write_text(json.dumps(manifest))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to(EMBEDDED / path.name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "bundle.json").unlink(), "is not a bundle: it has no bundle.json"),
        (lambda f: (f / "bundle.json").write_text("{"), "bundle.json is not usable"),
        (lambda f: (f / "bundle.json").write_bytes(b"\xff\xfe"), "bundle.json is not usable"),
        (lambda f: (f / "bundle.json").write_text("[]"), "has schema None, this tubelet reads 3"),
        (lambda f: (f / "bundle.json").write_text("[" * 100_000), "bundle.json is not usable"),
        (lambda f: edit_manifest(f, lambda m: m.update(schema=99)), "has schema 99, this tubelet reads 3"),
        (lambda f: edit_manifest(f, lambda m: m.pop("files")), r"manifest lacks \['files'\]"),
        (lambda f: edit_manifest(f, lambda m: m["spec"].pop("fps")), r"manifest.spec lacks \['fps'\]"),
        (lambda f: edit_manifest(f, lambda m: m["spec"].update(fps=5)), "its key does not match its content"),
        (lambda f: edit_manifest(f, lambda m: m["spec"]["denoiser"].update(heads=0)), "denoiser.heads must be above 0"),
        (lambda f: edit_manifest(f, lambda m: m["components"].pop("denoiser")), "lacks the components denoiser"),
        (lambda f: edit_manifest(f, lambda m: m["components"].pop("captioner")), "lacks the components captioner"),
        (lambda f: edit_manifest(f, lambda m: m["components"]["denoiser"].update(graph=5)), "graph must be str, is 5"),
        (lambda f: edit_manifest(f, lambda m: m["components"]["denoiser"].update(inputs=None)), "must be an object"),
        (lambda f: edit_manifest(f, lambda m: m.update(provenance=None)), "provenance must be an object, is None"),
        (
            lambda f: edit_manifest(f, lambda m: m["components"]["denoiser"].update(graph="../d.onnx")),
            r"does not list the files \.\./d.onnx",
        ),
        (
            lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
            "which is outside the bundle",
        ),
        (lambda f: edit_manifest(f, lambda m: m["files"].clear()), "does not list the files captioner.onnx, "),
        (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda f: truncate(f / "weights.safetensors"), "truncated or changed"),
        (lambda f: flip(f / "weights.safetensors"), "does not match the manifest's hash"),
        (lambda f: flip(f / "denoiser.onnx"), "denoiser.onnx does not match the manifest's hash"),
        (lambda f: flip(f / "tokenizer.json"), "tokenizer.json does not match"),
        (lambda f: link(f / "tokenizer.json"), "tokenizer.json is missing or a link"),
    ],
)
def test_damage_is_named(embedded_copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(embedded_copy)

    with pytest.raises(UserError, match=message):
        Pipeline.open(embedded_copy)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match="nowhere is not a bundle"):
        Bundle.open("nowhere")


def test_the_manifest_reads_back(embedded_copy: Path) -> None:
    before = Bundle.open(embedded_copy)
    write_manifest(embedded_copy, before.manifest)

    assert Bundle.open(embedded_copy) == before
    assert before.key == Bundle.open(EMBEDDED).key  # the key names the content, not the place


def test_the_key_follows_spec_and_content(spec: ModelSpec) -> None:
    component = Bundle.open(EMBEDDED).manifest.components["conditioner"]
    components, tokenizer = {"a": component, "b": dataclasses.replace(component, graph_digest="y")}, FileRecord(1, "x")
    keys = {
        content_key(spec, components, tokenizer),
        content_key(spec, components, FileRecord(1, "z")),
        content_key(spec, components | {"b": component}, tokenizer),
        content_key(spec, components | {"a": dataclasses.replace(component, weights_digest="y")}, tokenizer),
        content_key(spec, {"a": component}, tokenizer),
        content_key(dataclasses.replace(spec, fps=25), components, tokenizer),
    }
    assert len(keys) == 6
    assert content_key(spec, dict(reversed(components.items())), tokenizer) in keys  # order does not matter
    renamed = components | {"a": dataclasses.replace(component, graph="other.onnx")}
    assert content_key(spec, renamed, tokenizer) in keys  # nor do files' names


def test_embedded_weights_stay_small() -> None:
    assert (EMBEDDED / "weights.safetensors").stat().st_size <= 16 * 2**20
