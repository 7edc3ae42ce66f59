"""What `ddpm-fast eval` found, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..metrics.bits import Bits
from ..metrics.evaluation import Evaluation, Figures

SHOWN = {
    "frechet": ("Frechet distance", "{:.4g}", 1),
    "kid": ("KID x 1000", "{:.3f}", 1000),
    "precision": ("precision", "{:.3f}", 1),
    "recall": ("recall", "{:.3f}", 1),
    "density": ("density", "{:.3f}", 1),
    "coverage": ("coverage", "{:.3f}", 1),
}
_PARTS = ("prior", "steps", "decoder")


@dataclasses.dataclass
class Result:
    """num: samples. figures, floor: of the samples and of real images. bits: of the model. None where not asked for."""

    num: int
    evaluation: Evaluation | None
    figures: Figures = dataclasses.field(default_factory=dict)
    floor: Figures = dataclasses.field(default_factory=dict)
    bits: Bits | None = None

    def table(self, split: str) -> str:
        """For people; `split` is whose bits were counted."""
        lines: list[str] = []
        if self.evaluation is not None:
            real, reference, extractor = self.evaluation.floor, self.evaluation.reference, self.evaluation.extractor
            ours, theirs = f"{self.num:,} samples", f"{len(real):,} real images"
            lines += ["", f"{'':24}{ours:>22}{theirs:>22}"]
            for name, (label, form, scale) in SHOWN.items():
                if name in self.figures:
                    ours, theirs = (form.format(scale * found[name]) for found in (self.figures, self.floor))
                    if name == "kid" and "kid_std" in self.figures:
                        ours += f" +- {scale * self.figures['kid_std']:.3f}"
                    lines.append(f"{label:24}{ours:>22}{theirs:>22}")
            lines.append(f"against {reference.name} ({len(reference):,} images); the real images are of {real.name}")
            lines.append(f"features: {extractor.name}" + (f", {extractor.note}" if extractor.note else ""))
        if self.bits is not None:
            bits = self.bits
            how = "all timesteps" if bits.exact else f"{bits.passes - 1} timesteps an image, drawn by strata"
            error = "" if math.isnan(bits.standard_error) else f" +- {bits.standard_error:.4f}"
            parts = ", ".join(f"{name} {getattr(bits, name).mean():.4f}" for name in _PARTS)
            lines += ["", f"bits per dimension, at most {bits.mean:.4f}{error}"]
            lines.append(f"of {len(bits.prior):,} {split} images, {how}: {parts}")
        return "\n".join(lines)

    def as_json(self, split: str) -> dict[str, Any]:
        """For programs."""
        report: dict[str, Any] = {}
        if self.evaluation is not None:
            real, reference, extractor = self.evaluation.floor, self.evaluation.reference, self.evaluation.extractor
            report |= {
                "num": self.num,
                "against": {"name": reference.name, "images": len(reference)},
                "real": {"name": real.name, "images": len(real)},
                "features": {"name": extractor.name, "note": extractor.note},
                "figures": {name: {"samples": self.figures[name], "real": self.floor[name]} for name in self.figures},
            }
        if self.bits is not None:
            bits = self.bits
            report["bits"] = {
                "bits_per_dim": bits.mean,
                "standard_error": None if math.isnan(bits.standard_error) else bits.standard_error,
                "images": len(bits.prior),
                "split": split,
                "passes": bits.passes,
                "exact": bits.exact,
                **{name: float(getattr(bits, name).mean()) for name in _PARTS},
            }
        return report
