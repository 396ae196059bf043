"""What exporting a published checkpoint of real size takes: seconds, resident memory, bytes on disk.

    python benchmarks/export.py --size 1.3B | 14B [--folder DIR]

Writes the diffusers folder of Wan 2.1 T2V with UMT5-XXL and the VAE at their real sizes, exports it in a process of its
own, and for 1.3B takes a denoising step on ONNX Runtime. Files are sparse: what is not random is a hole, so they take
little disk. Peaks are resident memory of the exporting process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tubelet.export.storage import ITEM_BYTES

GIB = 2**30
SIZES = {
    "1.3B": {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
    "14B": {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824},
}
SHARD = 5 * 10**9  # bytes
RANDOM = 1 << 24  # values that are repeated
STEP = {"width": 64, "height": 64, "frames": 5}


def write_shards(folder: Path, stem: str, shapes: dict[str, tuple[int, ...]], dtype: str, scale: float) -> None:
    """Safetensors of at most SHARD bytes with an index: normal values times `scale`, holes where that is 0."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        tensor = ITEM_BYTES[dtype] * int(np.prod(shape))
        if size + tensor > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += tensor
    values = torch.randn(RANDOM).mul(scale).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
    block = values.view(torch.uint8).numpy().tobytes()
    listed = {}
    for number, held in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, shape in held.items():
            begin, end = end, end + ITEM_BYTES[dtype] * int(np.prod(shape))
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            listed[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for at in range(0, end if scale else 0, len(block)):
                out.write(block[: end - at])
            out.truncate(8 + len(text) + end)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def write_checkpoint(folder: Path, size: str) -> None:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        transformer = WanTransformer3DModel(**SIZES[size], attention_head_dim=128)
        text = UMT5EncoderModel(
            UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
        )
        vae = AutoencoderKLWan()
    for model, part, stem, dtype, scale in (
        (transformer, "transformer", "diffusion_pytorch_model", "BF16", 0.02 if size == "1.3B" else 0.0),
        (text, "text_encoder", "model", "BF16", 0.0),
        (vae, "vae", "diffusion_pytorch_model", "F32", 0.0),
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)
        write_shards(folder / part, stem, shapes, dtype, scale)
        (folder / part / "config.json").write_text(json.dumps(config(model), default=list))
    classes = {"transformer": "WanTransformer3DModel", "text_encoder": "UMT5EncoderModel", "vae": "AutoencoderKLWan"}
    index = {"_class_name": "WanPipeline", **{part: ["diffusers", name] for part, name in classes.items()}}
    (folder / "model_index.json").write_text(json.dumps(index))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    words.save(str(folder / "tokenizer" / "tokenizer.json"))


def config(model: Any) -> dict[str, Any]:
    """Of transformers' models, and of diffusers'."""
    return model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)


def measured(script: str, *arguments: str) -> dict[str, Any]:
    """Runs a script in a process of its own; what it printed last, with seconds, CPU seconds and its peak memory."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the process ended with {status}")
    return {
        "seconds": round(time.monotonic() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        **json.loads(lines[-1]),
    }


EXPORT = """
import json, sys, time
from pathlib import Path
from tubelet.export.build import build
from tubelet.runtime.resident import peak_resident_bytes
start = time.monotonic()
def tell(stage):
    print(f"{time.monotonic() - start:6.1f} s  {stage}", flush=True)
made = build(Path(sys.argv[1]), Path(sys.argv[2]), on_stage=tell)
worst = max(row.relative for row in made.manifest.parity)
print(json.dumps({"key": made.key[:16], "worst_relative": worst, "peak_gib": round(peak_resident_bytes() / 2**30, 2)}))
"""
RUN = """
import json, sys, time
import numpy as np
from tubelet.runtime import Bundle
from tubelet.runtime.engines import OnnxRuntimeEngine
from tubelet.runtime.resident import peak_resident_bytes
bundle = Bundle.open(sys.argv[1])
tokens, spec = int(sys.argv[2]), bundle.spec.denoiser
start = time.monotonic()
engine = OnnxRuntimeEngine(bundle.graph("denoiser"))
loaded = time.monotonic()
cross = np.zeros((spec.depth, 1, spec.heads, 512, spec.head_size), np.float32)
rope = np.ones((tokens, spec.head_size // 2), np.float32)
inputs = {"tokens": np.random.default_rng(0).standard_normal((1, tokens, spec.token_inputs), np.float32),
          "time_features": np.ones((1, 2, spec.time_features), np.float32), "rope_cos": rope, "rope_sin": 0 * rope,
          "cross_k": cross, "cross_v": cross}
velocity = engine(inputs)["velocity"]
assert np.isfinite(velocity).all()
step = time.monotonic() - loaded
seconds = {"load_seconds": round(loaded - start, 1), "step_seconds": round(step, 1)}
print(json.dumps({**seconds, "tokens": tokens, "peak_gib": round(peak_resident_bytes() / 2**30, 2)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3B")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "checkpoint", options.size)
        apparent = sum(path.stat().st_size for path in (folder / "checkpoint").rglob("*") if path.is_file())
        before = _disk(folder)
        result: dict[str, Any] = {"size": options.size, "checkpoint_gib": round(apparent / GIB, 1)}
        result["export"] = measured(EXPORT, str(folder / "checkpoint"), str(folder / "bundle"))
        result["added_mib_on_disk"] = round((_disk(folder) - before) / 2**20, 1)
        if options.size == "1.3B":
            tokens = (1 + STEP["frames"] // 4) * (STEP["width"] // 16) * (STEP["height"] // 16)
            result["step"] = measured(RUN, str(folder / "bundle"), str(tokens))
    print(json.dumps(result))


def _disk(folder: Path) -> int:
    """Bytes that a folder's files take, hard links once."""
    found = {(s.st_dev, s.st_ino): 512 * s.st_blocks for path in folder.rglob("*") if (s := path.stat())}
    return sum(found.values())


if __name__ == "__main__":
    main()
