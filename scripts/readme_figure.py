"""Figure: accuracy with the memorization channels on and off, of the README.

    python scripts/readme_figure.py docs/figures/channels_off.png

The numbers are those of ``bench/results/dropout_modes_digits.json``, means of three seeds.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from memloc_ext.study.report.figures import COLORS, new_figure, titled

RESULTS = Path(__file__).parents[1] / "bench" / "results" / "dropout_modes_digits.json"
BARS = {"clean": "clean, label", "noisy": "mislabelled, wrong label", "noisy_true": "mislabelled, true label"}
PLACES = {"train": "memorization channels on", "drop": "memorization channels off"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    rows = {
        row["mode"]: row["mean"] for row in json.loads(RESULTS.read_text())["table"] if row["model"] == "example_tied"
    }
    figure = new_figure(7, 2.6)
    axes = figure.add_subplot()
    for i, (column, label) in enumerate(BARS.items()):
        places = np.arange(len(PLACES)) + 0.27 * (i - 1)
        values = [100 * rows[mode][column] for mode in PLACES]
        color = COLORS[column.replace("noisy", "memorized")]
        bars = axes.bar(places, values, 0.25, color=color, label=label)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], fontsize=9, padding=2)
    axes.set_xticks(range(len(PLACES)), list(PLACES.values()))
    axes.set_ylim(0, 115)
    axes.set_ylabel("accuracy (%)")
    titled(axes)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(output, dpi=144)
