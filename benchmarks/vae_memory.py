"""Peak memory of decoding with Wan 2.1's VAE at its real size: streamed here, and by diffusers.

    python benchmarks/vae_memory.py [--frames 17 161] [--diffusers 17] [--size 256] [--threads 2]
    python benchmarks/vae_memory.py --frames 5 --diffusers --size 672x720  # one latent chunk of a tile of 1280x720

Weights are random, in float32, and the same on both sides, as are the clips' latents. A peak is VmHWM of a process of
its own: all that it has in memory at once, with its imports, the weights it uses and the frames it keeps. Weights that
a process maps from a file count where they were read. Where both made the same clip, frames are compared. Computed: the
caches of a whole picture and of the tiles that it is cut into. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHANNELS, SCALE = 16, 8  # latent channels, pixels a latent pixel
WEIGHTS, SPEC = "weights.safetensors", "spec.json"
PICTURES = ("256x256", "832x480", "1280x720", "1920x1088")


def picture(size: str) -> tuple[int, int]:
    """Rows and columns of latent pixels; a size is a side or WIDTHxHEIGHT, in pixels."""
    width, height = (int(side) for side in (size.split("x") * 2)[:2])
    return height // SCALE, width // SCALE


def latents(frames: int, size: str) -> np.ndarray:
    """Standard normal [C,T',H',W'], normalised."""
    shape = (CHANNELS, 1 + (frames - 1) // 4, *picture(size))
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def reference() -> Any:
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan().eval()


def export(folder: Path) -> None:
    """Writes the decoder's graphs, its weights, and the spec."""
    import onnx_ir as ir
    from safetensors.torch import save_file

    from tubelet.export.components import vae_components
    from tubelet.export.storage import read_header
    from tubelet.export.trace import trace
    from tubelet.export.vae import Vae
    from tubelet.export.wan_vae_names import published, vae_spec

    model = reference()
    spec, theirs = vae_spec(model.config), model.state_dict()
    table, vae = published(spec, "diffusers"), Vae(spec).eval()
    for name, parameter in vae.named_parameters():
        parameter.data = theirs[table[name].name].reshape(parameter.shape)
    save_file({f"vae.{name}": tensor.contiguous() for name, tensor in vae.state_dict().items()}, folder / WEIGHTS)
    tensors = read_header(folder / WEIGHTS)
    for component in vae_components(spec, vae.to("meta")):
        if component.name.startswith("vae_decoder"):
            ir.save(trace(component, tensors), folder / f"{component.name}.onnx")
    (folder / SPEC).write_text(json.dumps(vars(spec)))


def computed() -> dict[str, dict[str, Any]]:
    """For each of PICTURES the decoder's caches in MiB, whole and of one tile, in float32."""
    import torch
    from diffusers import AutoencoderKLWan

    from tubelet.export.components import vae_components
    from tubelet.export.vae import Vae
    from tubelet.export.wan_vae_names import vae_spec
    from tubelet.runtime.bundle import sizes
    from tubelet.runtime.tiles import cut, tile_size

    with torch.device("meta"):
        spec = vae_spec(AutoencoderKLWan().config)
        decoder = next(each for each in vae_components(spec, Vae(spec)) if each.name == "vae_decoder")

    def caches(rows: int, columns: int) -> int:
        extents = {"B": 1, "t": 1, "h": rows, "w": columns}
        ports = (port for name, port in decoder.inputs.items() if name.startswith("cache_"))
        return round(sum(4 * math.prod(sizes(port.shape, extents)) for port in ports) / 2**20)

    table = {}
    for size in PICTURES:
        rows, columns = picture(size)
        tile = tile_size(spec, rows, columns)
        table[size] = {
            "whole_mib": caches(rows, columns),
            "tiles": len(cut(spec, rows, columns)),
            "tile": f"{tile[1] * SCALE}x{tile[0] * SCALE}",
            "tile_mib": caches(*tile),
        }
    return table


def streamed(folder: Path, frames: int, size: str, threads: int) -> Iterator[np.ndarray]:
    from tubelet.runtime import vae
    from tubelet.runtime.engines import OnnxRuntimeEngine
    from tubelet.runtime.spec import WanVaeSpec
    from tubelet.runtime.strict import read
    from tubelet.runtime.targets import HostEngines

    spec = read(WanVaeSpec, json.loads((folder / SPEC).read_text()), SPEC)
    engines = HostEngines(lambda name: OnnxRuntimeEngine(folder / f"{name}.onnx", threads, frugal=True))
    yield from vae.decode(spec, engines, latents(frames, size))


def diffusers(_: Path, frames: int, size: str, threads: int) -> Iterator[np.ndarray]:
    import torch

    torch.set_num_threads(threads)
    model = reference()
    mean, std = (torch.tensor(model.config[name]).reshape(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        pixels = model.decode(torch.from_numpy(latents(frames, size))[None] * std + mean).sample[0]
    yield ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def peak_mib() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def act(role: str, folder: Path, frames: int, size: str, threads: int) -> Any:
    """What a process of its own does."""
    if role == "export":
        return export(folder)
    if role == "computed":
        return computed()
    start = time.monotonic()
    with (folder / f"{role}-{frames}").open("wb") as file:
        for chunk in (streamed if role == "streamed" else diffusers)(folder, frames, size, threads):
            file.write(chunk.tobytes())
    return {"frames": frames, "peak_mib": round(peak_mib()), "seconds": round(time.monotonic() - start)}


def in_a_process(*arguments: Any) -> Any:
    """The result of `act`."""
    command = [sys.executable, __file__, "--act", json.dumps(arguments, default=str)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    print(arguments[0], result, flush=True)
    return result


def largest_difference(folder: Path, frames: int) -> int:
    """Of the two clips of so many frames, in levels of 255."""
    ours, theirs = (np.fromfile(folder / f"{role}-{frames}", np.uint8) for role in ("streamed", "diffusers"))
    return int(np.abs(ours.astype(np.int16) - theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 161])
    parser.add_argument("--diffusers", type=int, nargs="*", default=[17], help="some of --frames, or none")
    parser.add_argument("--size", default="256", help="a side, or WIDTHxHEIGHT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--act", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.act:
        role, folder, *sizes = json.loads(options.act)
        print(json.dumps(act(role, Path(folder), *sizes)))
        return
    with tempfile.TemporaryDirectory() as name:

        def run(role: str, frames: int = 0) -> Any:
            return in_a_process(role, name, frames, options.size, options.threads)

        result = {"size": options.size, "caches": run("computed")}
        run("export")
        ours = {frames: run("streamed", frames) for frames in options.frames}
        theirs = {frames: run("diffusers", frames) for frames in options.diffusers}
        result |= {"streamed": list(ours.values()), "diffusers": list(theirs.values())}
        result["growth"] = ours[options.frames[-1]]["peak_mib"] / ours[options.frames[0]]["peak_mib"] - 1
        result["share_of_diffusers"] = {
            frames: ours[frames]["peak_mib"] / theirs[frames]["peak_mib"] for frames in theirs
        }
        result["largest_difference_levels"] = {frames: largest_difference(Path(name), frames) for frames in theirs}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
