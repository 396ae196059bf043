"""Runs compiled video diffusion transformers without PyTorch.

pipeline = Pipeline.open(EMBEDDED)
frames = pipeline.generate(Request("a red circle moves right on a white background"))
"""

from .bundle import EMBEDDED, Bundle
from .errors import Cancelled, UserError
from .pipeline import Generation, Pipeline
from .request import Request
from .video import VideoWriter

__all__ = ["EMBEDDED", "Bundle", "Cancelled", "Generation", "Pipeline", "Request", "UserError", "VideoWriter"]
