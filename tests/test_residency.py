"""The memory plan: what engines take, which are loaded together, and what it says.

pytest tests/test_residency.py
"""

from __future__ import annotations

import pytest
from fake_tensorrt import RTX_FP16, build_plans

from tubelet.runtime import EMBEDDED, Bundle, UserError
from tubelet.runtime.memory import MemoryInfo
from tubelet.runtime.plans import plan_path, read_record
from tubelet.runtime.residency import RESERVED, Footprint, footprint, plan_host_residency, plan_residency
from tubelet.runtime.targets import HostEngines

GIB = 1 << 30
NEEDS = {
    "text_encoder": Footprint(10 * GIB, 0, GIB),
    "conditioner": Footprint(GIB // 2, GIB // 4, 0),
    "denoiser": Footprint(3 * GIB, GIB, 2 * GIB),
    "vae_decoder": Footprint(GIB, 0, 5 * GIB),
    "vae_encoder": Footprint(GIB // 2, 0, 4 * GIB),
}
TEXT, REST = ("text_encoder", "conditioner"), ("denoiser", "vae_decoder", "vae_encoder")


@pytest.mark.parametrize(
    ("free", "groups", "workspaces", "says"),
    [
        (22, ((*TEXT, *REST),), 1.75, "needs 21.2 GiB, card has 22.0 GiB to spare: all engines stay loaded"),
        (21.25, ((*TEXT, *REST),), 1, "needs 21.2 GiB, card has 21.2 GiB to spare: all engines stay loaded"),
        (16, (TEXT, REST), 4.25, "needs 21.2 GiB, card has 16.0 GiB to spare: will swap the text encoder out"),
        (12.75, (TEXT, REST), 1, "needs 21.2 GiB, card has 12.8 GiB to spare: will swap the text encoder out"),
    ],
)
def test_as_much_stays_loaded_as_fits(
    free: float, groups: tuple[tuple[str, ...], ...], workspaces: float, says: str
) -> None:
    """Weights and buffers add up, scratch memory is shared; what is left is for more of the denoiser's buffers.

    Those and the conditioner's are there while the text encoder or the VAE runs, in turn or not.
    """
    residency = plan_residency(NEEDS, MemoryInfo(int(free * GIB) + RESERVED, 24 * GIB), "card")

    assert residency.groups == groups
    assert residency.workspaces == workspaces * GIB
    assert residency.sentence == says


def test_parts_are_loaded_in_turn_and_must_fit_alone() -> None:
    needs = NEEDS | {"text_encoder": Footprint(5 * GIB, 0, GIB)}
    residency = plan_residency(needs, MemoryInfo(8 * GIB + RESERVED, 9 * GIB), "card")

    assert residency.groups == (TEXT, ("denoiser",), ("vae_decoder", "vae_encoder"))
    assert residency.sentence.endswith("will load text encoder, denoiser, VAE in turn")
    assert residency.beside("conditioner") == TEXT
    with pytest.raises(UserError, match=r"the text encoder alone needs 12\.8 GiB, card has 8\.0 GiB to spare"):
        plan_residency(NEEDS, MemoryInfo(8 * GIB + RESERVED, 9 * GIB), "card")


def test_a_plan_takes_its_ports_at_their_greatest(embedded_copy: object) -> None:
    bundle = Bundle.open(str(embedded_copy))
    build_plans(bundle, RTX_FP16)
    record = read_record(plan_path(bundle, RTX_FP16, "conditioner"))

    found = footprint(bundle.manifest.components["conditioner"], record)

    embeddings, keys = 2 * 16 * 128, 2 * (6 * 2 * 4 * 16 * 48)  # batch 2; cross_k and cross_v
    assert found == Footprint(1 << 20, 2 * (embeddings + keys), 1024)


def test_one_expert_at_a_time_where_memory_is_short() -> None:
    needs = NEEDS | {"denoiser_low": NEEDS["denoiser"], "conditioner_low": NEEDS["conditioner"]}
    residency = plan_residency(needs, MemoryInfo(int(14.75 * GIB) + RESERVED, 24 * GIB), "card")

    assert ("denoiser",) in residency.groups and ("denoiser_low",) in residency.groups
    assert residency.beside("conditioner_low") == ("text_encoder", "conditioner", "conditioner_low")


def test_the_host_loads_in_turn_what_does_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    components = Bundle.open(EMBEDDED).manifest.components
    assert len(plan_host_residency(components).groups) == 1
    monkeypatch.setattr("tubelet.runtime.residency._host_memory", lambda: MemoryInfo(0, GIB))
    groups = plan_host_residency(components).groups
    loaded: list[str] = []

    def load(name: str) -> object:
        loaded.append(name)
        return name

    engines = HostEngines(load, groups)  # type: ignore[arg-type]
    for name in ("text_encoder", "conditioner", "denoiser", "denoiser", "conditioner"):
        assert engines[name] == name

    assert loaded == ["text_encoder", "conditioner", "denoiser", "conditioner"]


def test_the_engine_of_a_first_frame_goes_when_the_next_one_comes() -> None:
    """Both hold a half's weights."""
    loaded: list[str] = []
    engines = HostEngines(lambda name: loaded.append(name) or name)  # type: ignore[arg-type,func-returns-value]
    for _ in range(2):
        for name in ("vae_decoder_first", "vae_decoder", "vae_decoder"):
            assert engines[name] == name

    assert loaded == ["vae_decoder_first", "vae_decoder", "vae_decoder_first"]
