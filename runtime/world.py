"""What the embedded model can show, and how the captions that it was trained on say so.

Flows in: a scene. Flows out: its caption. Knows nothing of drawing, judging or training, which are `export/demo`'s, nor
of how people word their prompts, which is `enhance`'s: both take the world's words from here.
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle")
COLOURS = {  # RGB; no colour is also a background
    "red": (225, 35, 40),
    "green": (40, 175, 65),
    "blue": (45, 75, 225),
    "yellow": (245, 220, 45),
    "purple": (155, 50, 195),
    "orange": (250, 135, 25),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (12, 12, 12), "gray": (128, 128, 128), "cyan": (120, 225, 235)}
MOTIONS = ("left", "right", "up", "down", "still", "grows", "shrinks")
VERBS = {
    "left": ("moves left", "slides to the left", "travels left", "moving left"),
    "right": ("moves right", "slides to the right", "travels right", "moving right"),
    "up": ("moves up", "slides to the top", "rises up", "moving up"),
    "down": ("moves down", "slides to the bottom", "falls down", "moving down"),
    "still": ("stays still", "does not move", "rests", "staying still"),
    "grows": ("grows", "gets bigger", "becomes larger", "growing"),
    "shrinks": ("shrinks", "gets smaller", "becomes smaller", "shrinking"),
}
TEMPLATES = (
    "a {colour} {shape} {verb} on a {background} background",
    "on a {background} background a {colour} {shape} {verb}",
    "a {shape} that is {colour} {verb} over {background}",
    "a video of a {colour} {shape} on {background} , it {verb}",
)


@dataclass(frozen=True)
class Scene:
    """The attributes that a caption names and the scorer measures."""

    shape: str
    colour: str
    background: str
    motion: str


ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS), "motion": MOTIONS}


def say(scene: Scene, template: str, verb: str) -> str:
    """A scene in the words of one of TEMPLATES and one of its motion's VERBS."""
    return template.format(**vars(scene), verb=verb).replace("a orange", "an orange")
