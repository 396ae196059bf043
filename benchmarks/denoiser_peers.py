"""One forward pass of a denoiser beside its peers on this CPU: speed, error, cold start, memory, share of the peak.

    python benchmarks/denoiser_peers.py --folder DIR [--tokens 320|1280|2304] [--blocks 8] [--repeats 3]

The same random weights for all, of the width of Wan 2.1 1.3B (1536, 12 heads, FFN 8960), and the same random inputs:
two guidance branches, 512 tokens of text each. The baseline is diffusers in float32. Each library uses as many threads
as it wants. tubelet makes the keys and values of the text once a request, which is timed apart (`once_s`); the others
make them in every pass. int8 models are calibrated on other noise and noise levels than are measured. `share` is
of the best rate of a matrix product of the same precision seen in this run, for the work without those keys and
values. `speed` is the baseline's seconds over a runner's, in the same round. Needs, beside the extra `test`, the
packages openvino and nncf; a runner whose package is absent is a row that says so. The last line is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers import Array, Loaded, Runner, compare, cpu_model, parser, show

from tubelet.runtime.atomic import new_folder

WIDTH, HEADS, FFN, TEXT, TEXT_TOKENS, CHANNELS = 1536, 12, 8960, 4096, 512, 16
CLIPS = {320: (17, 128, 128), 1280: (17, 256, 256), 2304: (33, 256, 256)}  # tokens: frames, rows, columns
TIMESTEP = 500.0
CALIBRATED = (900.0, 700.0, 300.0, 100.0)  # timesteps
PEAK_ROWS, PEAK_PASSES = 1280, 7
ELEMENTS = {np.dtype(np.float32): "float", np.dtype(np.uint8): "uint8"}
COLUMNS = {
    "s": ".2f",
    "cpu_s": ".1f",
    "speed": ".2f",
    "error": ".1e",
    "cold_s": ".1f",
    "peak_gib": ".2f",
    "share": ".2f",
}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    blocks: int
    tokens: int

    @property
    def latent(self) -> tuple[int, int, int]:
        frames, rows, columns = CLIPS[self.tokens]
        return 1 + (frames - 1) // 4, rows // 8, columns // 8

    @property
    def operations(self) -> float:
        """Multiplications and additions of a pass without what depends on the text alone."""
        linear = 6 * WIDTH**2 + 2 * WIDTH * FFN  # a token and a block: self-attention 4, cross-attention 2, FFN 2
        attention = 2 * WIDTH * (self.tokens + TEXT_TOKENS)
        return 2.0 * 2 * self.blocks * self.tokens * (linear + attention)

    def inputs(self, seed: int = 0, timestep: float = TIMESTEP) -> dict[str, Array]:
        """Of diffusers: latents of two branches, which are the same, texts that differ, and the noise level."""
        rng = np.random.default_rng(seed)
        latents = rng.standard_normal((1, CHANNELS, *self.latent), np.float32)
        return {
            "hidden_states": np.concatenate([latents, latents]),
            "timestep": np.full(2, timestep, np.float32),
            "encoder_hidden_states": rng.standard_normal((2, TEXT_TOKENS, TEXT), np.float32),
        }

    def calibration(self) -> list[dict[str, Array]]:
        """Other inputs, at several noise levels, of the smallest clip."""
        small = Case(self.blocks, min(CLIPS))
        return [small.inputs(seed, timestep) for seed, timestep in enumerate(CALIBRATED, start=1)]


@dataclass(frozen=True)
class Diffusers:
    case: Case
    dtype: str
    compiled: bool = False

    def prepare(self, folder: Path) -> None:
        """Writes the checkpoint that everyone reads."""
        import torch
        from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

        if _checkpoint(folder).exists():
            return
        torch.manual_seed(0)
        words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<pad>": 2}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        text = UMT5Config(
            vocab_size=3, d_model=TEXT, d_kv=8, d_ff=8, num_layers=1, num_heads=1, feed_forward_proj="gated-gelu"
        )
        made = WanPipeline(
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>"),
            text_encoder=UMT5EncoderModel(text),
            vae=AutoencoderKLWan(base_dim=4),
            scheduler=UniPCMultistepScheduler(),
            transformer=WanTransformer3DModel(
                num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, ffn_dim=FFN, num_layers=self.case.blocks
            ),
        )
        with new_folder(_checkpoint(folder)) as partial:
            made.save_pretrained(partial)

    def load(self, folder: Path) -> Loaded:
        import torch

        model = _transformer(folder, self.dtype)
        dtype = getattr(torch, self.dtype)
        inputs = {name: torch.from_numpy(value) for name, value in self.case.inputs().items()}
        inputs = {name: value if name == "timestep" else value.to(dtype) for name, value in inputs.items()}
        if self.compiled:
            import torch._inductor.config

            torch._inductor.config.freezing = True
            model = torch.compile(model)

        @torch.no_grad()
        def one_pass() -> Array:
            return model(**inputs, return_dict=False)[0].float().numpy()

        return Loaded(one_pass)


@dataclass(frozen=True)
class OnnxRuntime:
    """diffusers' model as torch exports it."""

    case: Case

    def prepare(self, folder: Path) -> None:
        import torch

        if (made := self._folder(folder)).exists():
            return
        inputs = {name: torch.from_numpy(value) for name, value in self.case.inputs().items()}
        with torch.no_grad():
            program = torch.onnx.export(_transformer(folder), kwargs=inputs, dynamo=True)
        with new_folder(made) as partial:
            program.save(partial / "model.onnx", external_data=True)

    def load(self, folder: Path) -> Loaded:
        import onnxruntime

        session = onnxruntime.InferenceSession(self._folder(folder) / "model.onnx", providers=["CPUExecutionProvider"])
        inputs = self.case.inputs()
        return Loaded(lambda: session.run(None, inputs)[0])

    def _folder(self, folder: Path) -> Path:
        return folder / f"onnxruntime-{self.case.tokens}"


@dataclass(frozen=True)
class OpenVino:
    """Converted from diffusers' model; shapes are fixed when it is loaded."""

    case: Case
    precision: str  # that OpenVINO is asked to compute in
    int8: bool = False  # weights and inputs of products, by NNCF

    def prepare(self, folder: Path) -> None:
        import openvino
        import torch

        if (made := self._folder(folder)).exists():
            return
        if self.int8:
            import nncf

            wide = OpenVino(self.case, self.precision)
            wide.prepare(folder)
            model = openvino.Core().read_model(wide._folder(folder) / "model.xml")
            samples = self.case.calibration()
            model = nncf.quantize(
                model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
            )
        else:
            inputs = {name: torch.from_numpy(value) for name, value in self.case.calibration()[0].items()}
            shapes = [(name, [-1] * value.ndim) for name, value in inputs.items()]
            with torch.no_grad():
                model = openvino.convert_model(_transformer(folder), example_input=inputs, input=shapes)
        with new_folder(made) as partial:
            openvino.save_model(model, partial / "model.xml", compress_to_fp16=False)

    def load(self, folder: Path) -> Loaded:
        import openvino

        hints = {"INFERENCE_PRECISION_HINT": self.precision, "PERFORMANCE_HINT": "LATENCY"}
        core, inputs = openvino.Core(), self.case.inputs()
        model = core.read_model(self._folder(folder) / "model.xml")
        model.reshape({name: list(value.shape) for name, value in inputs.items()})
        compiled = core.compile_model(model, "CPU", hints)
        return Loaded(lambda: compiled(inputs)[0])

    def _folder(self, folder: Path) -> Path:
        return folder / f"openvino-{'int8' if self.int8 else 'fp32'}"


@dataclass(frozen=True)
class Tubelet:
    case: Case
    int8: bool = False

    def prepare(self, folder: Path) -> None:
        from tubelet.export.build import build

        if not (folder / "tubelet-fp32").exists():
            build(_checkpoint(folder), folder / "tubelet-fp32")
        if not self._folder(folder).exists():
            self._quantize(folder)

    def load(self, folder: Path) -> Loaded:
        from tubelet.runtime import Bundle, kernels
        from tubelet.runtime.engines import OnnxRuntimeEngine

        bundle, given = Bundle.open(self._folder(folder)), self.case.inputs()
        spec = bundle.spec.denoiser
        grid = _grid(given, spec)
        conditioner = OnnxRuntimeEngine(bundle.graph("conditioner"))
        inputs = _tokens(bundle, given, conditioner)
        start = time.perf_counter()
        conditioner({"embeddings": given["encoder_hidden_states"]})
        once_s = time.perf_counter() - start
        del conditioner
        velocity = np.empty((2, self.case.tokens, spec.token_values), np.float32)
        binding = OnnxRuntimeEngine(bundle.graph("denoiser")).bind(inputs, {"velocity": velocity})

        def one_pass() -> Array:
            binding.run()
            return np.stack([kernels.unpack(tokens, CHANNELS, grid, spec.patch) for tokens in velocity])

        return Loaded(one_pass, once_s)

    def _quantize(self, folder: Path) -> None:
        """What `tubelet quantize --precision int8` does, but calibrated on noise instead of whole trajectories."""
        import onnx_ir as ir

        from tubelet.export.quantize.bundle import seal, workplace, write
        from tubelet.export.quantize.formats import FORMATS
        from tubelet.export.quantize.linear import sites
        from tubelet.export.quantize.search import search
        from tubelet.export.quantize.trajectory import Watching
        from tubelet.runtime import Bundle
        from tubelet.runtime.engines import OnnxRuntimeEngine

        source = Bundle.open(Tubelet(self.case)._folder(folder))
        graph = source.graph("denoiser")
        with new_folder(self._folder(folder)) as made, workplace(source, made) as work:
            samples, conditioner = self.case.calibration(), OnnxRuntimeEngine(source.graph("conditioner"))
            watching = Watching(graph, work, len(samples))
            for given in samples:
                watching(_tokens(source, given, conditioner))
            seen = watching.seen()
            del watching
            roundings = {}
            for site in sites(ir.load(graph)):
                found = search(site, seen[site.name], FORMATS["int8"])
                roundings |= dict.fromkeys([layer.name for layer in site.layers], found.rounding)
            seal(write(source, made, roundings))

    def _folder(self, folder: Path) -> Path:
        return folder / f"tubelet-{'int8' if self.int8 else 'fp32'}"


def _tokens(bundle: Any, given: dict[str, Array], conditioner: Any) -> dict[str, Array]:
    """What tubelet's denoiser reads, as the pipeline makes it."""
    from tubelet.runtime import kernels
    from tubelet.runtime.schedule import time_features

    spec = bundle.spec.denoiser
    cos, sin = kernels.rope3d(_grid(given, spec), spec.head_size, theta=spec.theta)
    levels = np.stack([given["timestep"], np.zeros(2)], axis=1)
    return {
        "tokens": np.stack([kernels.pack(latents, spec.patch) for latents in given["hidden_states"]]),
        "time_features": time_features(levels, spec.time_features),
        "rope_cos": cos,
        "rope_sin": sin,
        **conditioner({"embeddings": given["encoder_hidden_states"]}),
    }


def _grid(given: dict[str, Array], spec: Any) -> tuple[int, int, int]:
    t, h, w = (extent // size for extent, size in zip(given["hidden_states"].shape[2:], spec.patch, strict=True))
    return t, h, w


def _checkpoint(folder: Path) -> Path:
    return folder / "checkpoint"


def _transformer(folder: Path, dtype: str = "float32") -> Any:
    """diffusers' model with the checkpoint's weights."""
    import torch
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel.from_pretrained(
        _checkpoint(folder), subfolder="transformer", torch_dtype=getattr(torch, dtype)
    ).eval()


def gemm_peaks() -> dict[str, float]:
    """Operations a second of [PEAK_ROWS,WIDTH] times [WIDTH,WIDTH]: the best of torch and ONNX Runtime."""
    import torch

    best: dict[str, float] = {}
    with torch.no_grad():
        for name, one_pass in _products().items():
            precision = name.split()[-1]
            for _ in range(PEAK_PASSES):
                start = time.perf_counter()
                one_pass()
                rate = 2.0 * PEAK_ROWS * WIDTH**2 / (time.perf_counter() - start)
                best[precision] = max(best.get(precision, 0.0), rate)
    return best


def _products() -> dict[str, Callable[[], Any]]:
    import onnx
    import onnxruntime
    import torch

    rows, weight = torch.randn(PEAK_ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    short = [(20 * value).clamp(-127, 127).to(torch.int8).numpy() for value in (rows, weight)]

    def session(kind: str, x: Array, w: Array) -> Callable[[], Any]:
        model = onnx.parser.parse_model(
            f'<ir_version: 11, opset_import: ["" : 23]> product ({ELEMENTS[x.dtype]}[N,K] x) => '
            f"({'float' if kind == 'MatMul' else 'int32'}[N,M] y) {{ y = {kind}(x, w) }}"
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
        made = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return lambda: made.run(None, {"x": x})

    halves = rows.bfloat16(), weight.bfloat16()
    return {
        "torch fp32": lambda: rows @ weight,
        "torch bf16": lambda: torch.nn.functional.linear(*halves),
        "ONNX Runtime fp32": session("MatMul", rows.numpy(), weight.numpy()),
        "ONNX Runtime int8": session("MatMulInteger", short[0].view(np.uint8), short[1]),
    }


def runners(case: Case) -> dict[str, Runner]:
    """The first is the baseline."""
    return {
        "diffusers fp32": Diffusers(case, "float32"),
        "tubelet fp32": Tubelet(case),
        "OpenVINO fp32": OpenVino(case, "f32"),
        "tubelet int8": Tubelet(case, int8=True),
        "OpenVINO int8": OpenVino(case, "f32", int8=True),
        "ONNX Runtime fp32": OnnxRuntime(case),
        "diffusers bf16": Diffusers(case, "bfloat16"),
        "torch.compile bf16": Diffusers(case, "bfloat16", compiled=True),
        "OpenVINO bf16": OpenVino(case, "bf16"),
    }


def main() -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--tokens", type=int, choices=CLIPS, default=1280)
    arguments.add_argument("--blocks", type=int, default=8)
    options = arguments.parse_args()
    options.folder /= f"{options.blocks}-blocks"
    case = Case(options.blocks, options.tokens)
    rows = compare(runners(case), options)
    peaks = gemm_peaks()
    for name, row in rows.items():
        if "s" in row:
            row["share"] = case.operations / row["s"] / peaks[name.split()[-1]]
    show(rows, COLUMNS)
    print("peak, GFLOP/s:", ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks.items()))
    print(json.dumps({"cpu": cpu_model(), "tokens": case.tokens, "blocks": case.blocks, "peaks": peaks, "rows": rows}))


if __name__ == "__main__":
    main()
