"""From a published release to a Checkpoint: what the families have in common.

Flows in: a Release, its spec, and what each part's file calls our parameters. Flows out: a Checkpoint whose tensors
stay in the release's files, or one error that lists what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tubelet.runtime.errors import UserError
from tubelet.runtime.spec import ModelSpec, TextEncoderSpec
from tubelet.runtime.text import PromptTokenizer

from .checkpoint import Checkpoint, Made, match, parameters
from .names import Layout, Names
from .published import Part, Release
from .storage import StoredTensor

TEXT_DISTANCE = 128  # where T5's relative positions end


@dataclass(frozen=True)
class Placed:
    """A part of a release, and what of ours it holds."""

    part: Part
    sources: Mapping[str, str]  # theirs by ours
    unused: tuple[str, ...] = ()  # how names begin that are not read


def placed(
    spec: ModelSpec, part: Part, names: Names, layout: Layout, depth: int, *owners: str, expert: str = ""
) -> Placed:
    """The parameters of the modules `owners` of an expert, by a table of names."""
    modules = {f"{owner}{expert}" for owner in owners}
    plain = {name: name.replace(f"{expert}.", ".", 1) for name in parameters(spec) if name.split(".")[0] in modules}
    theirs = names.sources(plain.values(), layout, depth)
    return Placed(part, {name: theirs[plain[name]] for name in plain}, names.ignored(layout, depth))


def assemble(
    release: Release, spec: ModelSpec, parts: Iterable[Placed], made: Mapping[str, Made] | None = None
) -> Checkpoint:
    """A Checkpoint of the parts, and of what is made because no file holds it.

    Raises UserError when the tokenizer is unreadable, or parameters are missing, unknown or of another shape.
    """
    PromptTokenizer.from_file(release.tokenizer, spec.text_encoder, "download it again")
    expected = parameters(spec)
    tensors: dict[str, StoredTensor] = {}
    files: dict[str, Path] = {}
    problems = []
    for each in parts:
        shapes = {name: expected[name] for name in each.sources}
        try:
            tensors |= match(each.part.found, shapes, each.sources, each.unused, str(each.part.folder))
        except UserError as error:
            problems.append(str(error))
        used = {tensors[name].file for name in shapes if name in tensors}
        files |= {name: path for name, path in each.part.files.items() if name in used}
    if problems:
        raise UserError("; ".join(problems))
    return Checkpoint(release.folder, spec, tensors, files, release.tokenizer, made or {})


@dataclass(frozen=True)
class Source:
    """A part's tensors by our names, in which "{i}" stands for the number of a block."""

    part: Part
    names: Names
    layout: Layout

    def depth(self, ours: str) -> int:
        return self.part.depth(self.names.source(ours, self.layout))

    def has(self, ours: str) -> bool:
        return self._first(ours) in self.part.found

    def shape(self, ours: str, rank: int = 2) -> tuple[int, ...]:
        return self.part.shape(self._first(ours), rank)

    def _first(self, ours: str) -> str:
        """What our parameter, with "{i}" for a block's number, is called in the first block that has it, or in 0."""
        theirs = self.names.source(ours, self.layout)
        names = [theirs.format(i=i) for i in range(self.part.depth(theirs) if "{i}" in theirs else 1)]
        return next((name for name in names if name in self.part.found), theirs.format(i=0))


def text_encoder_spec(part: Part, names: Names, layout: Layout, length: int, cleaned: bool) -> TextEncoderSpec:
    """Of a T5-style encoder, by its tensors."""
    part.expect(layer_norm_epsilon=1e-6, relative_attention_max_distance=TEXT_DISTANCE, feed_forward_proj="gated-gelu")
    source = Source(part, names, layout)
    vocabulary, width = source.shape("text_encoder.embedding.weight")
    buckets, heads = source.shape("text_encoder.layers.{i}.bias.weight.weight")
    return TextEncoderSpec(
        vocabulary=vocabulary,
        width=width,
        depth=source.depth("text_encoder.layers.{i}.q.weight"),
        heads=heads,
        head_size=source.shape("text_encoder.layers.{i}.q.weight")[0] // heads,
        ffn_width=source.shape("text_encoder.layers.{i}.up.weight")[0],
        buckets=buckets,
        max_distance=TEXT_DISTANCE,
        length=length,
        cleaned=cleaned,
    )
