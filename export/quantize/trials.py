"""A denoiser with any of its sites rounded, run beside the float32 one.

Flows in: a bundle and roundings. Flows out: how far the final latents, and clips, are from the bundle's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tubelet.runtime import Bundle, Pipeline, Request
from tubelet.runtime.bundle import WEIGHTS
from tubelet.runtime.engines import OnnxRuntimeEngine
from tubelet.runtime.precision import COMPONENT, Damage
from tubelet.runtime.strict import require

from .compare import psnr, relative, ssim
from .formats import Float32
from .passes import Roundings, round_layers
from .trajectory import denoise
from .weights import is_new, store, unused

EQUAL_DB = 100.0  # PSNR of equal clips


class Trials:
    """Works in a folder where the bundle's weights lie too; the float32 latents of a request are computed once."""

    def __init__(self, bundle: Bundle, pipeline: Pipeline, folder: Path):
        self._graph, self._pipeline, self._folder = bundle.graph(COMPONENT), pipeline, folder
        self._weights = unused(folder / WEIGHTS)
        self._expected: dict[Request, Float32] = {}

    def error(self, roundings: Roundings, requests: Sequence[Request]) -> float:
        """L2 of the difference of final latents over L2 of the bundle's, over all requests."""
        model = round_layers(ir.load(self._graph), roundings)
        self._weights.unlink(missing_ok=True)
        store([model.graph], self._weights, is_new)
        ir.save(model, self._folder / "trial.onnx")
        engine = OnnxRuntimeEngine(self._folder / "trial.onnx")
        pairs = []
        for request in requests:
            found = self._pipeline.latent(denoise(self._pipeline, engine, request))
            pairs.append((found, self._reference(request)))
        return latents_error(pairs)

    def _reference(self, request: Request) -> Float32:
        if request not in self._expected:
            generation = self._pipeline.prepare(request)
            self._pipeline.finish(generation)
            self._expected[request] = self._pipeline.latent(generation)
        return self._expected[request]


def damage(pipeline: Pipeline, reference: Pipeline, requests: Sequence[Request]) -> Damage:
    """Whole clips of a quantized bundle beside those of the one that it was made from."""
    latents, distances, similarities = [], [], []
    for request in requests:
        clips = []
        for each in (pipeline, reference):
            generation = each.prepare(request)
            each.finish(generation)
            clips.append((each.latent(generation), np.concatenate(list(each.decode(generation)))))
        (found, clip), (expected, original) = clips
        latents.append((found, expected))
        distances.append(min(psnr(clip, original), EQUAL_DB))
        similarities.append(ssim(clip, original))
    return Damage(len(requests), latents_error(latents), float(np.mean(distances)), float(np.mean(similarities)))


def latents_error(pairs: Sequence[tuple[Float32, Float32]]) -> float:
    """L2 of all differences over L2 of all expected values, of pairs (found, expected).

    Raises UserError where they are not finite: nothing could be chosen or said of them.
    """
    lost = sum(float(np.square(found - expected).sum()) for found, expected in pairs)
    whole = sum(float(np.square(expected).sum()) for _, expected in pairs)
    require(
        math.isfinite(whole),
        "the final latents are NaN or infinite before anything is rounded; export the bundle again",
    )
    require(
        math.isfinite(lost),
        "the final latents are NaN or infinite with these layers rounded; leave layers out with --keep",
    )
    return relative(lost, whole)
