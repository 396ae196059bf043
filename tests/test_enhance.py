"""Proves that enhancing keeps every fact of a prompt and completes the rest, the same way each time.

pytest tests/test_enhance.py
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.export.demo.world import SCENES, STILL_TEMPLATES
from tubelet.runtime import enhance
from tubelet.runtime.chat import Endpoint
from tubelet.runtime.enhance import SYNONYMS, by_chat, by_rules
from tubelet.runtime.errors import UserError
from tubelet.runtime.world import ATTRIBUTES, BACKGROUNDS, COLOURS, TEMPLATES, VERBS, Scene, say

CAPTIONS = {say(scene, TEMPLATES[0], VERBS[scene.motion][0]): scene for scene in SCENES}
ENDPOINT = Endpoint("http://localhost/v1", "m")


def shown(prompt: str) -> dict[str, str]:
    """The attributes of what a prompt is completed to, which is always a caption of the training."""
    return vars(CAPTIONS[by_rules(prompt)])


# By rules.


def test_every_caption_in_every_wording_keeps_its_scene() -> None:
    wrong = [
        text
        for scene in SCENES
        for template, verb in itertools.product(TEMPLATES, VERBS[scene.motion])
        if shown(text := say(scene, template, verb)) != vars(scene)
    ]

    assert len(CAPTIONS) == 504
    assert wrong == []


def test_every_caption_of_an_image_keeps_what_it_says() -> None:
    for scene, template in itertools.product(SCENES, STILL_TEMPLATES):
        assert shown(say(scene, template, "")) | {"motion": scene.motion} == vars(scene)


@pytest.mark.parametrize("caption", list(CAPTIONS)[::50])
def test_what_is_complete_stays_to_the_letter(caption: str) -> None:
    assert by_rules(caption) == caption


SAID = {
    "shape": ("a {}", "{}", "one big {}"),
    "colour": ("{}", "coloured {}", "{},"),
    "background": ("on {}", "{} background", "on a {} background,", "in front of a {} backdrop"),
    "motion": tuple(range(4)),  # the number of a verb
}


@pytest.mark.parametrize("names", [n for k in range(1, 5) for n in itertools.combinations(SAID, k)])
def test_any_subset_of_facts_in_any_order_is_kept(names: tuple[str, ...]) -> None:
    orders = itertools.cycle(itertools.permutations(names))
    wordings = itertools.cycle(itertools.product(*(SAID[name] for name in names)))
    for values in itertools.product(*(ATTRIBUTES[name] for name in names)):
        facts = dict(zip(names, values, strict=True))
        forms = dict(zip(names, next(wordings), strict=True))
        words = {n: VERBS[v][forms[n]] if n == "motion" else forms[n].format(v) for n, v in facts.items()}
        prompt = " ".join(words[name] for name in next(orders))

        assert shown(prompt) | facts == shown(prompt), prompt


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        ("red ball going up", {"shape": "circle", "colour": "red", "motion": "up"}),
        ("square", {"shape": "square"}),
        ("A SQUARE!", {"shape": "square"}),
        ("shrinking blue triangle on black", vars(Scene("triangle", "blue", "black", "shrinks"))),
        ("an orange", {"colour": "orange"}),
        ("green boxes falling", {"shape": "square", "colour": "green", "motion": "down"}),
        ("a ball rolls from the left to the right", {"shape": "circle", "motion": "right"}),
        ("dot drifting right to left", {"shape": "circle", "motion": "left"}),
        ("a cube that doesn't move", {"shape": "square", "motion": "still"}),
        ("the disc isn't moving", {"shape": "circle", "motion": "still"}),
        ("a moving ball that grows", {"motion": "grows"}),
        ("a circle growing smaller", {"motion": "shrinks"}),
        ("a right triangle rises", {"shape": "triangle", "motion": "up"}),
        ("red circle, then a blue square", {"shape": "circle", "colour": "red"}),
        ("on a black background a circle", {"shape": "circle", "background": "black"}),
        ("on black a circle falls", {"shape": "circle", "background": "black", "motion": "down"}),
        ("white, circle", {"shape": "circle", "background": "white"}),
        ("red background, blue circle", {"shape": "circle", "colour": "blue"}),
        ("blue circle on red", {"shape": "circle", "colour": "blue"}),
        ("a purple dragon in a castle", {"colour": "purple"}),
    ],
)
def test_prompts_as_people_write_them(prompt: str, facts: dict[str, str]) -> None:
    assert shown(prompt) | facts == shown(prompt)


@pytest.mark.parametrize(
    ("wording", "left"),
    [
        ("ball {} moving", {"left", "right", "up", "down"}),
        ("ball {} moving vertically", {"up", "down"}),
        ("ball {} sideways", {"left", "right"}),
        ("ball {} changes size", {"grows", "shrinks"}),
        ("close-up of ball {} on the left", set(ATTRIBUTES["motion"])),
    ],
)
def test_a_vague_motion_leaves_all_that_it_allows_and_no_other(wording: str, left: set[str]) -> None:
    assert {shown(wording.format(number))["motion"] for number in range(100)} == left


def test_a_colour_that_the_world_has_only_behind_is_not_put_there() -> None:
    for ground in BACKGROUNDS:
        assert {shown(f"a {ground} ball {number}")["background"] for number in range(60)} == set(BACKGROUNDS)


def test_what_is_left_open_is_chosen_from_everything() -> None:
    chosen = [shown(f"circle {number}") for number in range(200)]

    for name in ("colour", "background", "motion"):
        assert {scene[name] for scene in chosen} == set(ATTRIBUTES[name])


def test_no_shape_can_hide_in_its_background() -> None:
    assert not set(COLOURS) & set(BACKGROUNDS)


def test_the_choice_is_the_same_on_every_machine() -> None:
    assert by_rules("a circle") == "a yellow circle moves right on a cyan background"
    assert by_rules("red ball going up") == "a red circle moves up on a gray background"


@given(st.text(), st.sampled_from(("red", "ball", "moving")), st.text())
@settings(max_examples=50, deadline=None)
def test_whatever_surrounds_a_known_word_the_result_is_a_caption(before: str, word: str, after: str) -> None:
    prompt = f"{before} {word} {after}"

    assert by_rules(prompt) == by_rules(prompt)
    assert by_rules(prompt) in CAPTIONS


@pytest.mark.parametrize(
    "prompt", ["", " ", "a dog in the park", "on red", "redder balloons", "\udcff", "\u7ea2\u7403"]
)
def test_a_prompt_with_nothing_of_the_world_is_told_what_to_ask_for(prompt: str) -> None:
    with pytest.raises(UserError) as raised:
        by_rules(prompt)

    assert repr(prompt) in str(raised.value)
    for value in itertools.chain(*ATTRIBUTES.values()):
        assert value in str(raised.value)


def test_no_phrase_says_two_things() -> None:
    own = [*itertools.chain(*ATTRIBUTES.values()), *itertools.chain(*VERBS.values())]
    phrases = [p for rows in SYNONYMS.values() for row in rows.values() for p in row.split(", ")]

    assert len({*own, *phrases}) == len({*own}) + len(phrases)
    for name, rows in SYNONYMS.items():
        assert {value for values in rows for value in values.split()} <= set(ATTRIBUTES[name])


# By a language model.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the language model was asked; it answers with a label, quotation marks and line breaks."""
    calls: list[Any] = []

    def answer(endpoint: Endpoint, messages: Sequence[Any]) -> str:
        calls.append((endpoint, messages))
        return 'Prompt:\n"A red ball rolls over wet grass.\n\nLow camera, morning light."\n'

    monkeypatch.setattr(enhance, "complete", answer)
    return calls


def test_a_language_model_is_given_the_rules_and_the_prompt_and_its_answer_is_tidied(asked: list[Any]) -> None:
    assert by_chat("roter Ball", ENDPOINT) == "A red ball rolls over wet grass. Low camera, morning light."

    ((endpoint, (system, user)),) = asked
    assert endpoint is ENDPOINT
    assert system["role"] == "system" and system["content"] == enhance.EXPAND
    assert user == {"role": "user", "content": "roter Ball"}


def test_a_blank_prompt_is_not_sent(asked: list[Any]) -> None:
    with pytest.raises(UserError, match="the prompt to enhance is empty"):
        by_chat(" \n", ENDPOINT)

    assert not asked
