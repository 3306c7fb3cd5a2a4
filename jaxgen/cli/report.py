"""Figures of a run in words, for a terminal."""

from collections.abc import Mapping
from typing import Any

__all__ = ["figures_text"]


def figures_text(figures: Mapping[str, Any]) -> str:
    """The lines that a person wants to read of a ``metrics.json``."""
    lines = []
    for name, unit in (
        ("bits_per_dim", "bits per dimension"),
        ("log_prob_per_dim", "nats per dim"),
    ):
        if name in figures:
            how = figures["likelihood"]
            levels = f", {how['levels']} levels" if how["levels"] else ""
            lines.append(
                f"likelihood      {figures[name]} +- {figures[name + '_standard_error']} {unit} "
                f"({how['examples']} held-out examples{levels})"
            )
    if "bits_per_char" in figures:
        how, simple = figures["likelihood"], figures["baselines"]
        lines.append(
            f"likelihood      at most {figures['bits_per_char']} +- "
            f"{figures['bits_per_char_standard_error']} bits per character ({how['examples']} "
            f"held-out examples of {how['length']})"
        )
        shown = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in simple.items())
        lines.append(f"{'for comparison':<16}{shown} bits per character of the same text")
    for name, title in (("frechet", "Frechet"), ("sliced_wasserstein", "sliced Wass.")):
        if name in figures:
            found = figures[name]
            lines.append(
                f"{title:<16}{found['model_to_data']} model to data, {found['data_to_data']} data "
                f"to data ({found['count']} on each side)"
            )
    if "ode_sde_gap" in figures:
        gap = figures["ode_sde_gap"]
        lines += [
            f"{title:<16}{named} {found['ode_to_sde']} between probability flow and reverse SDE; "
            f"to the data {found['ode_to_data']} and {found['sde_to_data']}; data to data "
            f"{found['data_to_data']} ({gap['count']} on each side)"
            for title, named, found in (
                ("ODE-SDE gap", "W2", gap["w2"]),
                ("", "sliced", gap["sliced_wasserstein"]),
            )
        ]
    if "classifier" in figures:
        judge = figures["classifier"]
        lines.append(
            f"recognisable    mean top probability {judge['mean_top_probability']} (data "
            f"{judge['mean_top_probability_of_data']}), smallest class "
            f"{100 * judge['smallest_class_share']:.1f} %, classifier right on "
            f"{100 * judge['held_out_accuracy']:.1f} % of held-out data"
        )
    if "share" in figures:
        share = figures["share"]
        lines.append(
            f"{'shared':<16}{share['weights']:,} weights in {figures['parameters']:,} numbers, "
            f"{share['weights'] / figures['parameters']:.3g} times fewer ({share['scheme']}, "
            f"fingerprint {', '.join(share['fingerprints'])})"
        )
    made = figures["samples"]
    grid = f" on the {made['grid']} grid" if "grid" in made else ""
    lines.append(
        f"samples         {made['count']}, averaged parameters (EMA {made['ema']}), "
        f"{made['solver']}{grid}, {made['steps']} steps, {made['evaluations']} evaluations"
    )
    seconds = figures["seconds"]
    lines.append(
        f"time            {seconds['training']} s training, {seconds['evaluation']} s measuring"
    )
    return "\n".join(lines)
