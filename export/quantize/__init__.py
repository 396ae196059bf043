"""Lower precision with its damage measured: `tubelet quantize`.

formats     how values are rounded           trajectory  what layers read on whole trajectories
linear      which layers may be              search      the scales that cost a layer least
passes      the graph's nodes for it         choose      which layers, under a budget
nvfp4       and its functions                trials      what that does to latents and clips
weights     the one file of weights          bundle      all of it, in order
"""

from .bundle import Plan, quantize
from .formats import FORMATS

__all__ = ["FORMATS", "Plan", "quantize"]
