"""A damaged bundle is refused in one sentence that names the file and the remedy.

pytest tests/test_bundle.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tubelet.runtime import EMBEDDED, Bundle, Pipeline, UserError


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "bundle.json").unlink(), "is not a bundle: it has no bundle.json"),
        (lambda f: (f / "bundle.json").write_text("{"), "bundle.json is damaged"),
        (lambda f: (f / "bundle.json").write_bytes(b"\xff\xfe"), "bundle.json is damaged"),
        (lambda f: (f / "bundle.json").write_text("[]"), "bundle.json is damaged"),
        (lambda f: edit_manifest(f, lambda m: m.pop("files")), "bundle.json is damaged"),
        (lambda f: edit_manifest(f, lambda m: m.update(schema=99)), "has bundle schema 99, this tubelet reads 1"),
        (lambda f: edit_manifest(f, lambda m: m["spec"].pop("fps")), r"lacks \['fps'\]"),
        (
            lambda f: edit_manifest(f, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
            "outside the bundle",
        ),
        (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (lambda f: truncate(f / "weights.safetensors"), "truncated or changed"),
        (lambda f: flip(f / "weights.safetensors"), "does not match the manifest's hash"),
        (lambda f: flip(f / "denoiser.onnx"), "denoiser.onnx does not match the manifest's hash"),
        (lambda f: flip(f / "tokenizer.json"), "tokenizer.json does not match"),
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
    before.write_manifest()

    assert Bundle.open(embedded_copy) == before
    assert before.key == Bundle.open(EMBEDDED).key  # the key names the content, not the place


def test_the_key_follows_every_file(embedded_copy: Path) -> None:
    before = Bundle.open(embedded_copy)
    edit_manifest(embedded_copy, lambda m: m["files"]["tokenizer.json"].update(sha256="0" * 64))
    with pytest.raises(UserError):
        Bundle.open(embedded_copy)
    assert json.loads((EMBEDDED / "bundle.json").read_text())["key"] == before.key


def test_embedded_weights_stay_small() -> None:
    assert (EMBEDDED / "weights.safetensors").stat().st_size <= 16 * 2**20
