"""How a quantized bundle's precision is shown."""

from __future__ import annotations

from rich.filesize import decimal
from rich.table import Table

from ..precision import Precision


def precision_tables(precision: Precision) -> list[Table]:
    """The damage to whole clips, and the layers with their errors."""
    damage, title = precision.damage, f"Quantized to {precision.precision}"
    whole = Table("latents", "PSNR", "SSIM", "clips", "weights", "before", title=title, title_justify="left")
    whole.add_row(
        *(f"{damage.latents:.2e}", f"{damage.psnr_db:.1f} dB", f"{damage.ssim:.4f}", str(damage.clips)),
        *(decimal(precision.weights_bytes), decimal(precision.source_weights_bytes)),
    )
    layers = Table("layer", "precision", "migrated", "relative error", title="Linear layers", title_justify="left")
    for layer in precision.layers:
        layers.add_row(layer.name, layer.precision, "yes" if layer.migrated else "", f"{layer.relative:.1e}")
    return [whole, layers]
