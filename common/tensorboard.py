"""--tensorboard: a run folder's figures as an event file in it, for `tensorboard --logdir runs`.

Needs run.py of `common`, numpy, pillow, matplotlib and the package tensorboard.  A resumed run writes the file anew
from its metrics.json, so that no point is there twice.
"""

import glob
import json
import os

import numpy as np
from PIL import Image

from common.run import optional, read_json


class Board:
    """The event file of a run folder; flags: {flag: value} of the run."""

    def __init__(self, folder: str, flags: dict):
        optional("tensorboard", "--tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.written, self.samples = folder, 0, flags.get("save_samples")
        for old in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
            os.remove(old)
        self.writer = SummaryWriter(folder)
        self.writer.add_text("flags", f"```\n{json.dumps(flags, indent=1)}\n```", 0)

    def update(self, rows: list[dict]) -> None:
        """Add the epochs that are not there yet, and the grid of samples once it is drawn."""
        for row in rows[self.written :]:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    group, _, metric = name.partition("_")
                    tag = f"{metric}/{group}" if group in ("train", "val") else f"run/{name}"
                    self.writer.add_scalar(tag, value, row["epoch"])
        self.written = len(rows)
        if self.samples and os.path.exists(self.samples):
            grid = np.asarray(Image.open(self.samples).convert("RGB"))
            self.writer.add_image("samples", grid, rows[-1]["epoch"] if rows else 0, dataformats="HWC")
            self.samples = None
        self.writer.flush()

    def finish(self) -> None:
        """Add the confusion matrices and the test metrics of the run that has ended."""
        from matplotlib import pyplot

        for path in sorted(glob.glob(os.path.join(glob.escape(self.folder), "confusion_*.npy"))):
            counts = np.load(path, allow_pickle=False)
            figure, axes = pyplot.subplots(figsize=(5, 4))
            shares = axes.imshow(counts / counts.sum(1, keepdims=True).clip(min=1), vmin=0, vmax=1, cmap="Blues")
            axes.set_xlabel("predicted class")
            axes.set_ylabel("true class")
            figure.colorbar(shares, label="share of the true class")
            self.writer.add_figure(os.path.basename(path).removesuffix(".npy"), figure, self.written)
        results = read_json(os.path.join(self.folder, "results.json"))
        for name, value in (results.get("test") or {}).items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{name}/test", value, self.written)
        self.writer.close()
