"""What the demo shows at its end: one table, one picture, one JSON file.

Comes in: a `DemoResult`. Goes out: text for a terminal, `demo.json` and `training.png`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noria.demo.rule import WinRate

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured.

    `stages` are seconds by name, in order; `steps` one dict per optimiser step; `pictures_before` and `pictures_after`
    the share of right answers about held-out pictures, with its 95 % interval.
    """

    stages: dict[str, float]
    preferences: int
    training_pairs: int
    held_out_pairs: int
    loss_first: float
    loss_last: float
    before: WinRate
    after: WinRate
    pictures_before: dict[str, Any]
    pictures_after: dict[str, Any]
    quantization_kl: float
    swap_pause_s: float
    slowest_request_s: float
    requests: int
    failures: tuple[str, ...]
    background_versions: dict[str, int]
    versions: tuple[str, str]
    steps: tuple[dict[str, Any], ...]

    @property
    def passed(self) -> bool:
        """No request failed, and the new version wins more than 60 % of the held-out comparisons."""
        return not self.failures and self.after.rate > 0.60


def table(result: DemoResult) -> Table:
    """The closing table."""
    from rich.table import Table

    old, new = result.versions
    out = Table(title="Noria: one turn of the wheel", show_header=False)
    for name, seconds in result.stages.items():
        out.add_row(f"stage: {name}", f"{seconds:.1f} s")
    out.add_section()
    out.add_row("preferences recorded", str(result.preferences))
    out.add_row("pairs trained on / held out", f"{result.training_pairs} / {result.held_out_pairs}")
    out.add_row("loss, first and last step", f"{result.loss_first:.4f} -> {result.loss_last:.4f}")
    out.add_row("KL of GPTQ to the merged model", f"{result.quantization_kl:.4f} nats per token")
    out.add_section()
    out.add_row(f"win rate before ({old} against {old})", _rate(result.before))
    out.add_row(f"win rate after ({new} against {old})", _rate(result.after))
    out.add_row(f"right about held-out pictures before ({old})", _right(result.pictures_before))
    out.add_row(f"right about held-out pictures after ({new})", _right(result.pictures_after))
    out.add_section()
    out.add_row("swap pause", f"{result.swap_pause_s:.2f} s")
    out.add_row("slowest request of the background user", f"{result.slowest_request_s:.2f} s")
    seen = ", ".join(f"{count} by {version}" for version, count in result.background_versions.items())
    out.add_row("background answers", seen)
    out.add_row("requests", str(result.requests))
    out.add_row("requests failed", str(len(result.failures)))
    return out


def _rate(rate: WinRate) -> str:
    interval = f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    return f"{100 * rate.rate:.1f} % {interval}, {rate.wins} won, {rate.losses} lost of {rate.n}"


def _right(rate: dict[str, Any]) -> str:
    return f"{100 * rate['score']:.1f} % [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] of {rate['n']}"


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain JSON, `passed` included."""
    return {**asdict(result), "passed": result.passed}


def draw(result: DemoResult, path: Path) -> None:
    """Writes a picture of loss and margins over the optimiser steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [step["step"] for step in result.steps]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.plot(steps, [step["loss"] for step in result.steps])
    left.set(title="DPO loss", xlabel="optimiser step", ylabel="nats")
    right.plot(steps, [step["margin"] for step in result.steps], color="tab:green")
    right.set(title="reward margin, chosen over rejected", xlabel="optimiser step", ylabel="nats times beta")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
