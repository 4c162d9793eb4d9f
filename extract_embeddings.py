"""Store a model's embeddings, several views of each image: a teacher that is run once and teaches many students.

    python extract_embeddings.py --checkpoint runs/teacher/best.pth --num-views 4 --save-logits
    python extract_embeddings.py --model vit_base_patch14_dinov2.lvd142m --pretrained --dataset imagefolder \\
        --data-root DIR --resolution 224 --pooling cls --save-tokens
    python extract_embeddings.py --checkpoint runs/teacher/best.pth --shard 0/4    # of four jobs; after them:
    python extract_embeddings.py --merge 4
    python extract_embeddings.py --model vgg16 --pretrained --images GENERATED --reference REAL \\
        --keep-fraction 0.5 --output DIR

Writes OUTPUT/{train,val,test}_embeddings/: embeddings.npy (N, V, D), logits.npy, tokens.npy, ids.npy, labels.npy,
groups.npy (lesions or patients), meta.json.  The same command goes on where an interrupted one stopped.  Of a folder of
unlabelled images (--images) it writes
OUTPUT/images_embeddings/.  --reference REAL, what this script stored of real images with the same model, ranks those
images,
or those of train, by the distance to the nearest real one: OUTPUT/kept.txt names the nearest, for the --include-list of
any
script, OUTPUT/distances.csv all.  A store holds the labels of one task and no texts: models and datasets of images and
texts are
refused, distill.py runs such a teacher live.
Needs from common: augment.py, cli.py, data.py, dermatology.py, distributed.py, embeddings.py, evaluation.py, images.py,
loader.py,
metrics.py, models.py, splitting.py, tables.py, training.py.
Packages: torch, timm, numpy, pillow, scikit-learn, tqdm (torchvision for CIFAR, transformers for hf: names).
"""

import argparse
import collections
import csv
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from common import cli, distributed
from common.augment import Augmenter
from common.data import DATASETS, SPLITS, WITH_TEXTS, Splits, load_folder, load_splits
from common.embeddings import DTYPES, Store, Writer, difference, merge, model_of, nearest, split_folder
from common.evaluation import live_teacher
from common.loader import Loader
from common.models import build_model
from common.training import (
    Precision,
    Preprocess,
    device_name,
    file_sha256,
    load_checkpoint,
    load_model,
    need_head,
    select_device,
    start_weights,
    use_compile,
)

PLAIN = (
    "csv"  # whose resolution, normalization and views --images takes where neither checkpoint nor reference says them
)
NOT_OF_IMAGES = (
    "dataset",
    "data_root",
    "hf_dataset",
    "download",
    "val_split",
    "folds",
    "fold",
    "split_seed",
    "include_list",
    "extra_train",
    "binary",
    "negatives",
    "table",
    "image_column",
    "label_column",
    "group_column",
    "split_column",
    "splits",
)
LIVE = "distill.py --teacher-checkpoint FILE runs such a teacher live"
FLUSH_SECONDS = 30  # what a machine that dies may lose


def shard(text):
    """An argparse type: "I/N" -> (I, N)."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: write I/N with I from 0 to N - 1, as 0/4")
    return int(index), int(count)


def build_parser():
    parser = cli.Parser(__doc__)
    parser.add_argument("--output", default="embeddings", help="folder that is written, a subfolder a split")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--checkpoint", metavar="FILE", help="a checkpoint of these scripts")
    parser.add_argument(
        "--model", help="a model by name: resnet8, resnet18, vit_6_192, vit_tiny, any timm name, or hf:NAME_OR_FOLDER"
    )
    parser.add_argument("--patch-size", type=cli.POSITIVE, help="of --model vit_6_192 and vit_tiny, pixels (4)")
    parser.add_argument("--pretrained", action="store_true", help="the hub's weights for --model")
    parser.add_argument(
        "--weights", metavar="FILE", help="a foreign state dict for --model, strictly; without weights they are random"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        help="parts of the dataset, each with all its images; by default all three",
    )
    parser.add_argument(
        "--images", metavar="FOLDER", help="in place of a dataset, the unlabelled images anywhere below a folder"
    )
    parser.add_argument(
        "--reference",
        metavar="DIR",
        help="rank the images, or those of train, by the distance to the nearest of these real ones: "
        "what this script stored with the same model (its train, else its images)",
    )
    parser.add_argument(
        "--keep-fraction",
        type=cli.number(float, 0, 1, above=True),
        metavar="F",
        help="with --reference: the share of the images, the nearest, that kept.txt names",
    )
    parser.add_argument(
        "--num-views", type=cli.POSITIVE, default=1, help="views of each image; the first is the plain image"
    )
    parser.add_argument(
        "--pooling",
        choices=("cls", "mean", "map"),
        help="what is the embedding: class token, mean of the tokens, the model's attention pooling; "
        "by default what its head takes",
    )
    parser.add_argument("--save-logits", action="store_true", help="store the logits too, for --method response")
    parser.add_argument("--save-tokens", action="store_true", help="store the grid's tokens too")
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="of the stored values")
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="extract the Ith of N parts, from 0 (all)"
    )
    parser.add_argument(
        "--merge", type=cli.POSITIVE, metavar="N", help="join N shards that are done, check them, remove them"
    )
    parser.add_argument("--seed", type=cli.NATURAL, default=0, help="fixes the views, and random weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision; auto: on a GPU"
    )
    parser.add_argument(
        "--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU"
    )
    cli.add_data_flags(parser, dataset=None, batch_size=64)
    cli.add_augment_flags(parser)
    parser.set_defaults(split_seed=None, decode_size=None)  # the checkpoint's
    return parser


def check_flags(args):
    """Refuse what --images, --reference and --keep-fraction contradict."""
    given = [name for name in NOT_OF_IMAGES if getattr(args, name) is not None and getattr(args, name) is not False]
    if args.images and given:
        raise cli.UserError(
            f"--{given[0].replace('_', '-')} and --images contradict each other: a folder's images are no dataset"
        )
    if args.images and args.save_logits and not args.checkpoint and not args.merge:
        raise cli.UserError(
            "--save-logits and --images need --checkpoint: the head of a model by name knows no classes"
        )
    if bool(args.reference) != (args.keep_fraction is not None):
        raise cli.UserError(
            "--reference DIR and --keep-fraction F belong together: which real images, and how many are kept?"
        )
    if args.reference and (args.merge or args.shard[1] > 1):
        raise cli.UserError(
            "--reference ranks whole splits: extract the shards, --merge them, then run it without --shard"
        )
    if args.reference and "train" not in (args.splits or SPLITS) and not args.images:
        raise cli.UserError("--reference ranks the images of train: it must be among --splits")


def open_reference(args, split):
    """The Store of --reference, or None; what is not given of how images are read is its own.  Raises UserError."""
    if not args.reference:
        return None
    inside = [split_folder(args.reference, name) for name in ("train", "images")]
    own = os.path.exists(os.path.join(args.reference, "meta.json"))
    store = Store(args.reference if own else next((folder for folder in inside if os.path.isdir(folder)), inside[0]))
    if os.path.realpath(store.folder) == os.path.realpath(split_folder(args.output, split)):
        raise cli.UserError(f"--reference {args.reference} is what this command writes: name another --output")
    args.resolution = args.resolution or store.meta["resolution"]
    args.hair_removal = args.hair_removal or bool(store.meta.get("hair_removal"))
    return store


def settle(args):
    """The checkpoint, or None; fills in the dataset and what its samples are from it."""
    if bool(args.checkpoint) == bool(args.model):
        raise cli.UserError("give one of --checkpoint FILE and --model NAME")
    if args.checkpoint and (args.pretrained or args.weights or args.patch_size):
        raise cli.UserError("--pretrained, --weights and --patch-size belong to --model, not to --checkpoint")
    if args.limit_train:
        raise cli.UserError("--limit-train: a store holds all images of a split, so that any student finds its own")
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    if checkpoint and checkpoint["kind"] == "image_text":
        raise cli.UserError(
            f"{args.checkpoint} reads texts or has several tasks, a store holds images with one label: {LIVE}"
        )
    if args.images:
        flags = checkpoint["flags"] if checkpoint else {}
        args.hair_removal = args.hair_removal or bool(flags.get("hair_removal"))
        args.window = args.window or flags.get("window")
        args.decode_size = args.decode_size or flags.get("decode_size", 512)
        args.split_seed = 0
        return checkpoint
    cli.take_dataset(args, checkpoint, args.checkpoint)
    if args.dataset in WITH_TEXTS:
        raise cli.UserError(
            f"--dataset {args.dataset} has texts and several tasks, a store holds images with one label: {LIVE}"
        )
    return checkpoint


def read_data(args, checkpoint, reference):
    """(Splits, the name of the dataset whose defaults hold); --images are its `images`, in place of splits."""
    if not args.images:
        return load_splits(
            args.dataset,
            cli.data_root(args.data_root),
            download=args.download,
            labels=False,
            **cli.split_flags(vars(args)),
        ), args.dataset
    splits = Splits("images", "custom", [])
    splits.images = load_folder(args.images, args.decode_size, args.window, args.on_bad_image, args.hair_removal)
    base = None
    if checkpoint:
        splits.classes, base = checkpoint["classes"], checkpoint["flags"]["dataset"]
    elif reference:
        splits.classes, base = reference.meta["classes"], reference.meta["dataset"]
    return splits, base or PLAIN


def load_teacher(args, checkpoint, classes, info):
    """(model, Preprocess, what meta.json says of them)."""
    if checkpoint:
        model, preprocess = load_model(checkpoint, resolution=args.resolution, path=args.checkpoint)
        sha = file_sha256(args.checkpoint)
    else:
        resolution = args.resolution or info.resolution
        torch.manual_seed(args.seed)
        model = build_model(args.model, max(1, len(classes)), resolution, args.patch_size, args.pretrained)
        note = start_weights(model, args.weights)
        if note:
            say(note)
        preprocess = Preprocess.of_new(model, resolution, args.dataset, info)
        sha = file_sha256(args.weights) if args.weights else None
    say(f"normalization: {preprocess}")
    known = checkpoint["classes"] if checkpoint else classes
    if args.save_logits and (not known or known != classes):
        raise cli.UserError(
            f"--save-logits: {args.checkpoint or args.dataset} knows {len(known)} classes, the images have "
            f"{len(classes)} (others)"
        )
    if args.save_logits and not checkpoint:
        need_head(model, classes, args.weights)
    if args.pooling:
        model.set_pooling(args.pooling)
    model.with_tokens = args.save_tokens
    weights = (
        "checkpoint"
        if checkpoint
        else "hub"
        if args.pretrained
        else "file"
        if args.weights
        else f"random, seed {args.seed}"
    )
    described = {
        "name": model.name,
        "family": model.family,
        "parameters": model.num_parameters,
        "checkpoint": args.checkpoint,
        "weights": weights,
        "sha256": sha,
        "preprocess": preprocess.to_dict(),
    }
    return model, preprocess, described


def outputs(targets, batch, names, num_views):
    """{name: (B, V, ...)} of all views of a batch, on the device."""
    views = []
    for view in range(num_views):
        out = targets({**batch, "view": torch.full_like(batch["view"], view)})
        views.append({name: out[key] for name, key in names.items()})
    return {name: torch.stack([view[name] for view in views], 1) for name in names}


def extract(writer, dataset, targets, names, args, device, title):
    """Fill the rows that are left; returns images a second."""
    todo = writer.todo
    todo = todo[(todo >= writer.start) & (todo < writer.stop)]
    loader = Loader(
        dataset.subset(todo),
        args.batch_size,
        device,
        cache="off" if args.cache == "auto" else args.cache,
        workers=args.workers,
    )
    started = flushed = time.time()
    pending, show = collections.deque(), sys.stderr.isatty() and not distributed.rank()

    def save(rows, values):  # in a thread: the model goes on with the next batch
        writer.write(rows, {name: value[: len(rows)].float().cpu().numpy() for name, value in values.items()})

    with ThreadPoolExecutor(1) as pool:
        for batch in tqdm(
            loader.batches(),
            total=-(-len(loader) // distributed.size()),
            unit="batch",
            desc=title,
            leave=False,
            disable=not show,
        ):
            rows = todo[batch["index"][: batch["valid"]].numpy()]
            pending.append(pool.submit(save, rows, outputs(targets, batch, names, args.num_views)))
            if len(pending) > 2:
                pending.popleft().result()
            if time.time() - flushed > FLUSH_SECONDS:
                writer.flush()
                flushed = time.time()
        for future in pending:
            future.result()
    writer.flush()
    return len(todo) / max(time.time() - started, 1e-9)


def rank(args, store, reference):
    """Write kept.txt, ids of the nearest first, and distances.csv, all in that order."""
    distances, rows = nearest(store, reference, select_device(args.device))
    order = np.argsort(distances, kind="stable")
    kept = max(1, round(args.keep_fraction * len(order)))
    path, table = (os.path.join(args.output, name) for name in ("kept.txt", "distances.csv"))
    with (
        cli.atomic_write(table) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["id", "distance", "nearest"])
        writer.writerows([store.ids[i], f"{distances[i]:.6g}", reference.ids[rows[i]]] for i in order)
    with cli.atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{store.ids[i]}\n" for i in order[:kept])
    furthest = distances[order[kept - 1]]
    print(
        f"{path}: {kept} of {len(order)} images, at most {furthest:.4g} from the nearest of {len(reference)} in "
        f"{reference.folder}",
        flush=True,
    )


def main(args):
    check_flags(args)
    names_of_splits = ["images"] if args.images else args.splits or SPLITS
    if args.merge:
        there = [split for split in names_of_splits if os.path.isdir(split_folder(args.output, split))]
        for split in names_of_splits if args.splits or not there else there:  # unlabelled images have no test
            merge(split_folder(args.output, split), args.merge)
            print(f"{split_folder(args.output, split)}: {args.merge} shards joined")
        return
    cli.stops.hint = f": the same command{' without --overwrite' if args.overwrite else ''} goes on"
    device = select_device(args.device)
    precision = Precision(args.amp, device)
    checkpoint = settle(args)
    ranked = "images" if args.images else "train"
    reference = open_reference(args, ranked)
    splits, base = read_data(args, checkpoint, reference)
    args.dataset = base
    info, policy = DATASETS[base], cli.augment_policy(args)
    lacking = [split for split in names_of_splits if getattr(splits, split) is None]
    if lacking and args.splits:
        raise cli.UserError(f"--splits {' '.join(lacking)}: {base} has none")
    names_of_splits = [split for split in names_of_splits if split not in lacking]
    model, preprocess, described = load_teacher(args, checkpoint, splits.classes, info)
    model.to(device).to(memory_format=torch.channels_last)
    if use_compile(args.compile, device):
        model.compile()
    targets = live_teacher(model, preprocess, Augmenter(policy, args.seed), precision)
    names = {
        "embeddings": "embedding",
        **({"logits": "logits"} if args.save_logits else {}),
        **({"tokens": "tokens"} if args.save_tokens else {}),
    }
    sides = {
        "resolution": preprocess.resolution,
        "pooling": model.pooling,
        "num_views": args.num_views,
        "seed": args.seed,
        "policy": policy.to_dict(),
        "amp": precision.name,
        "batch_size": args.batch_size,
        "teacher": described,
    }
    differs = reference and difference(model_of(sides), model_of(reference.meta))
    if differs:
        raise cli.UserError(
            f"--reference {args.reference} was made by another model ({differs}): distances would mean nothing"
        )
    data = {
        "dataset": args.dataset,
        "classes": splits.classes,
        **{name: getattr(args, name) for name in cli.STORED_FLAGS},
        "data_root": args.data_root,
        "environment": cli.environment(device_name(device)),
    }
    if args.images:  # folders of generated images often hold the same names: their bytes tell them apart
        data.update(dataset=None, bytes=sum(os.path.getsize(path) for path in splits.images.paths))
    with torch.no_grad():
        dry = model({"image": torch.zeros(1, 3, preprocess.resolution, preprocess.resolution, device=device)})
    shapes = {name: (args.num_views, *dry[key].shape[1:]) for name, key in names.items()}
    for split in names_of_splits:
        dataset, folder = getattr(splits, split), split_folder(args.output, split)
        meta = {**sides, **data, "split": split, "sha256": dataset.fingerprint([""] if args.images else splits.classes)}
        writer = open_writer(folder, meta, dataset, shapes, args)
        title = f"{folder}{f', shard {args.shard[0]} of {args.shard[1]}' if args.shard[1] > 1 else ''}"
        if writer.complete:
            say(f"{title}: complete")
            continue
        rate = extract(writer, dataset, targets, names, args, device, title)
        distributed.barrier()  # all rows of all processes are there
        if distributed.rank() == 0:
            writer.finish()
        size = sum(array.nbytes for array in writer.arrays.values())
        say(
            f"{title}: {writer.stop - writer.start} images, {', '.join(f'{n} {s}' for n, s in shapes.items())}, "
            f"{args.dtype}, "
            f"{size / 1e6:,.1f} MB, {rate:,.0f} images/s"
        )
    if reference and distributed.rank() == 0:
        rank(args, Store(split_folder(args.output, ranked)), reference)


def open_writer(folder, meta, dataset, shapes, args):
    """Rank 0 makes the files, the others open them."""
    if distributed.environment().local_size != distributed.size():
        raise cli.UserError("several nodes cannot write one file safely: give each its own --shard I/N")

    def make(creates):
        return Writer(
            folder,
            meta,
            dataset.ids,
            dataset.labels,
            shapes,
            args.dtype,
            args.shard,
            args.overwrite,
            creates,
            dataset.groups,
        )

    writer = make(True) if distributed.rank() == 0 else None
    complete = distributed.gather(writer is not None and writer.complete)[0]
    if writer is None:
        writer = make(False) if not complete else argparse.Namespace(complete=True)
    return writer


def say(text):
    if distributed.rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    cli.run_script(main, build_parser)
