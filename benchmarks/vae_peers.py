"""Decoding a clip with Wan 2.1's VAE at its real size beside its peers on this CPU: speed, error, cold start, memory.

    python benchmarks/vae_peers.py --folder DIR [--frames 17|33] [--size 256] [--repeats 1]

The same random weights for all, and the same random latents. tubelet decodes chunk by chunk, with the caches of the
chunk before; the others decode the clip whole: diffusers frame by frame inside, OpenVINO in one graph. All end in uint8
frames, in which errors are measured; the last convolution is scaled so that pixels fill their range. `speed` is the
baseline's seconds over a runner's, in the same round. Needs, beside the extra `test`, the package openvino; a runner
that fails, or makes no clip within `--limit`, is a row that says so. The last line is one JSON object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import Array, Loaded, Runner, compare, cpu_model, parser, show

from tubelet.runtime.atomic import new_folder

CHANNELS, SCALE = 16, 8
CONTRAST = 4.0  # what brings random weights' pixels near the ends of their range
COLUMNS = {"s": ".1f", "speed": ".2f", "error": ".1e", "cold_s": ".1f", "peak_gib": ".2f"}


@dataclass(frozen=True)
class Case:
    frames: int
    size: int  # pixels a side

    def latents(self) -> Array:
        """Normalised [C,T',H',W']."""
        shape = (CHANNELS, 1 + (self.frames - 1) // 4, self.size // SCALE, self.size // SCALE)
        return np.random.default_rng(0).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class Diffusers:
    case: Case
    dtype: str
    compiled: bool = False

    def prepare(self, folder: Path) -> None:
        """Writes the checkpoint that everyone reads."""
        import torch
        from diffusers import AutoencoderKLWan

        if _checkpoint(folder).exists():
            return
        torch.manual_seed(0)
        model = AutoencoderKLWan()
        with torch.no_grad():
            model.decoder.conv_out.weight *= CONTRAST
        with new_folder(_checkpoint(folder)) as partial:
            model.save_pretrained(partial)

    def load(self, folder: Path) -> Loaded:
        import torch

        model = _vae(folder, self.dtype)
        latents = _unnormalised(model, self.case)
        if self.compiled:
            model.decoder = torch.compile(model.decoder)

        @torch.no_grad()
        def one_pass() -> Array:
            return _frames(model.decode(latents, return_dict=False)[0][0].float().numpy())

        return Loaded(one_pass)


@dataclass(frozen=True)
class OpenVino:
    """diffusers' whole decoding of this case's clip as one graph."""

    case: Case
    precision: str  # that OpenVINO is asked to compute in

    def prepare(self, folder: Path) -> None:
        import openvino
        import torch

        if (made := self._folder(folder)).exists():
            return
        model = _vae(folder)

        class Decode(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, latents: torch.Tensor) -> torch.Tensor:
                return self.model.decode(latents, return_dict=False)[0]

        latents = _unnormalised(model, self.case)
        with torch.no_grad():
            converted = openvino.convert_model(Decode(), example_input=latents, input=list(latents.shape))
        with new_folder(made) as partial:
            openvino.save_model(converted, partial / "model.xml", compress_to_fp16=False)
            np.save(partial / "latents.npy", latents.numpy())

    def load(self, folder: Path) -> Loaded:
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": self.precision, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(self._folder(folder) / "model.xml", "CPU", hints)
        latents = np.load(self._folder(folder) / "latents.npy")
        return Loaded(lambda: _frames(compiled([latents])[0][0]))

    def _folder(self, folder: Path) -> Path:
        return folder / f"openvino-{self.case.frames}-{self.case.size}"


@dataclass(frozen=True)
class Tubelet:
    case: Case

    def prepare(self, folder: Path) -> None:
        """Writes the decoder's graphs, its weights, and the spec."""
        import onnx_ir as ir
        from safetensors.torch import save_file

        from tubelet.export.components import vae_components
        from tubelet.export.storage import read_header
        from tubelet.export.trace import trace
        from tubelet.export.vae import Vae
        from tubelet.export.wan_vae_names import published, vae_spec

        if (folder / "tubelet").exists():
            return
        model = _vae(folder)
        spec, theirs = vae_spec(model.config), model.state_dict()
        table, vae = published(spec, "diffusers"), Vae(spec).eval()
        for name, parameter in vae.named_parameters():
            parameter.data = theirs[table[name].name].reshape(parameter.shape)
        with new_folder(folder / "tubelet") as partial:
            weights = {f"vae.{name}": tensor.contiguous() for name, tensor in vae.state_dict().items()}
            save_file(weights, partial / "weights.safetensors")
            tensors = read_header(partial / "weights.safetensors")
            for component in vae_components(spec, vae.to("meta")):
                if component.name.startswith("vae_decoder"):
                    ir.save(trace(component, tensors), partial / f"{component.name}.onnx")
            (partial / "spec.json").write_text(json.dumps(vars(spec)))

    def load(self, folder: Path) -> Loaded:
        from tubelet.runtime import vae
        from tubelet.runtime.engines import OnnxRuntimeEngine
        from tubelet.runtime.spec import WanVaeSpec
        from tubelet.runtime.strict import read
        from tubelet.runtime.targets import HostEngines

        made = folder / "tubelet"
        spec = read(WanVaeSpec, json.loads((made / "spec.json").read_text()), "spec.json")
        engines = HostEngines(lambda name: OnnxRuntimeEngine(made / f"{name}.onnx", frugal=True))
        latents = self.case.latents()
        return Loaded(lambda: np.concatenate(list(vae.decode(spec, engines, latents))))


def _checkpoint(folder: Path) -> Path:
    return folder / "checkpoint"


def _vae(folder: Path, dtype: str = "float32") -> Any:
    import torch
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(_checkpoint(folder), torch_dtype=getattr(torch, dtype)).eval()


def _unnormalised(model: Any, case: Case) -> Any:
    """The latents [1,C,T',H',W'] that diffusers' decoder reads, in its type."""
    import torch

    mean, std = (torch.tensor(model.config[name]).reshape(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (torch.from_numpy(case.latents())[None] * std + mean).to(model.dtype)


def _frames(pixels: Array) -> Array:
    """[3,T,H,W] in [-1,1] -> uint8 [T,H,W,3], as tubelet rounds."""
    return np.rint((np.clip(pixels, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 3, 0)


def runners(case: Case) -> dict[str, Runner]:
    """The first is the baseline."""
    return {
        "diffusers fp32": Diffusers(case, "float32"),
        "tubelet fp32": Tubelet(case),
        "OpenVINO fp32": OpenVino(case, "f32"),
        "torch.compile fp32": Diffusers(case, "float32", compiled=True),
        "diffusers bf16": Diffusers(case, "bfloat16"),
        "OpenVINO bf16": OpenVino(case, "bf16"),
    }


def main() -> None:
    arguments = parser(__doc__, repeats=1)
    arguments.add_argument("--frames", type=int, choices=(17, 33), default=17)
    arguments.add_argument("--size", type=int, choices=(128, 256), default=256)
    options = arguments.parse_args()
    rows = compare(runners(Case(options.frames, options.size)), options)
    show(rows, COLUMNS)
    print(json.dumps({"cpu": cpu_model(), "frames": options.frames, "size": options.size, "rows": rows}))


if __name__ == "__main__":
    main()
