"""Runs compiled video diffusion transformers without PyTorch.

pipeline = Pipeline.open(EMBEDDED)
frames = pipeline.generate(Request("a red circle moves right on a white background"))
longer = Studio(pipeline).extend(frames, Request("a red circle moves right on a white background"), 24)
"""

from .bundle import EMBEDDED, Bundle
from .caption import Captioner
from .errors import Cancelled, UserError
from .generation import Generation
from .pipeline import Pipeline
from .request import Request
from .studio import Scene, Studio
from .video import VideoWriter

__all__ = [
    "EMBEDDED",
    "Bundle",
    "Cancelled",
    "Captioner",
    "Generation",
    "Pipeline",
    "Request",
    "Scene",
    "Studio",
    "UserError",
    "VideoWriter",
]
