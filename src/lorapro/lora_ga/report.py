"""What an initialisation did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LayerReport", "LoraGaReport"]


@dataclass(frozen=True)
class LayerReport:
    """One adapted weight.

    Attributes:
        name: the adapter layer; ``name[3]`` for the fourth expert or group of one.
        shape: (m, n).
        rank: r.
        directions: singular directions used, ``min(2r, m, n)``; 0 if left at its default.
        energy: share of ``‖G‖²`` in those directions (of ``‖sign G‖²`` for objective ``"sign"``);
            estimated by random probes if sketched.
        gradient_norm: ``‖G‖``, mean over the batches.
        scale: what both factors of unit length were multiplied by.
        relative_size: ``‖s·B·A‖ / ‖W0‖``; NaN if W0 cannot be read.
        seconds: time spent on this layer's products and decomposition.
        peak_bytes: most that this layer's gradient or sketch and its decomposition took.
        objective: value of Eq. (loss-adam) before and after, for objective ``"adam"``.
        note: anything out of the ordinary.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    directions: int
    energy: float
    gradient_norm: float
    scale: float
    relative_size: float
    seconds: float
    peak_bytes: int
    objective: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class LoraGaReport:
    """What :func:`lorapro.lora_ga.initialize` did; ``print`` it.

    Attributes:
        layers: one row a matrix.
        untouched: (name, reason) of adapter layers left at their default start.
        settings: the options used.
        passes: forward and backward passes over all batches.
        seconds: time of the whole initialisation.
        notes: remarks on the whole.
    """

    layers: tuple[LayerReport, ...]
    untouched: tuple[tuple[str, str], ...] = ()
    settings: dict[str, object] = field(default_factory=dict)
    passes: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def energy(self) -> float:
        """Share of the squared gradient of all layers together in the directions used."""
        total = sum(x.gradient_norm**2 for x in self.layers)
        return sum(x.energy * x.gradient_norm**2 for x in self.layers) / total if total else 0.0

    def __str__(self) -> str:
        chosen = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        width = max([len(x.name) for x in self.layers] + [5])
        lines = [
            f"LoRA-GA: {len(self.layers)} weights initialised in {self.seconds:.1f} s, "
            f"{self.passes} passes over the batches ({chosen})",
            f"{'layer':{width}} {'m x n':>13} {'r':>4} {'energy':>7} {'|G|':>9} {'scale':>7} "
            f"{'|sBA|/|W0|':>10} {'s':>6} {'MiB':>7}",
        ]
        for x in self.layers:
            size = f"{x.shape[0]} x {x.shape[1]}"
            lines.append(
                f"{x.name:{width}} {size:>13} {x.rank:>4} {x.energy:>7.1%} {x.gradient_norm:>9.2e} "
                f"{x.scale:>7.3g} {x.relative_size:>10.3g} {x.seconds:>6.2f} "
                f"{x.peak_bytes / 2**20:>7.2f}" + (f"  {x.note}" if x.note else "")
            )
        lines += [f"left at its default: {name} ({why})" for name, why in self.untouched]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
