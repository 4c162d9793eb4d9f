"""A tree of many small files: seconds until it is listed and until the first batch lies on the device, twice.

    python tests/benchmarks/tree.py                    # 200,000 files in 1,000 folders
    python tests/benchmarks/tree.py --folder DIR       # one of yours

The first time the folders are walked, the second time the kept list is used.  Without the operating system's cache of
the
files the first takes longer; that is not emptied here.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.data import load_splits
from common.loader import Loader
from common.unlabeled import listed_images


def make(folder, count, folders):
    """`count` PNGs of 32 px, of a hundred kinds, in `folders` folders."""
    random, kinds = np.random.default_rng(0), []
    for _ in range(100):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "png")
        kinds.append(buffer.getvalue())
    for i in range(count):
        parent = folder / f"{i % folders % 32:02d}" / f"{i % folders:04d}"
        if i < folders:
            parent.mkdir(parents=True)
        (parent / f"{i:06d}.png").write_bytes(kinds[i % 100])
    for parent, _, _ in os.walk(folder):  # the list is only kept of folders that have not just changed
        os.utime(parent, (1e9, 1e9))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a tree that is there")
    parser.add_argument("--images", type=int, default=200_000, help="of the tree that is made")
    parser.add_argument("--folders", type=int, default=1_000, help="of the tree that is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary, "cache"))
        folder = Path(args.folder or Path(temporary, "tree"))
        if not args.folder:
            make(folder, args.images, args.folders)
        for time_of in ("first", "second"):
            start = time.perf_counter()
            found = len(listed_images(str(folder)))
            listed = time.perf_counter() - start
            start = time.perf_counter()
            splits = load_splits("unlabeled", str(folder), labels=False)
            loader = Loader(splits.train, 64, "cpu", shuffle=True, cache="off")
            shape = tuple(next(loader.batches(1))["image"].shape)
            print(
                f"{time_of} time: {found:,} images listed in {listed:.2f} s; first batch {shape} after "
                f"{time.perf_counter() - start:.2f} s",
                flush=True,
            )
            del loader


if __name__ == "__main__":
    main()
