"""Figures: accuracy of plain training over the epochs.

    python scripts/figure_memorization.py runs/digits-resnet9-seed0 --output figures --format pdf

The run is a folder that ``memloc run`` wrote; the figures are those of its report.
"""

from memloc_ext.study.report import draw

if __name__ == "__main__":
    draw("memorization")
