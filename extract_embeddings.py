"""Store a model's embeddings, several views of each image: a teacher that is run once and teaches many students.

    python extract_embeddings.py --checkpoint runs/teacher/best.pth --num-views 4 --save-logits
    python extract_embeddings.py --model vit_base_patch14_dinov2.lvd142m --pretrained --dataset imagefolder \\
        --data-root DIR --resolution 224 --pooling cls --save-tokens
    python extract_embeddings.py --checkpoint runs/teacher/best.pth --shard 0/4    # of four jobs; after them:
    python extract_embeddings.py --merge 4
    python extract_embeddings.py --model vgg16 --pretrained --images GENERATED --reference REAL \\
        --keep-fraction 0.5 --output DIR

Writes OUTPUT/{train,val,test}_embeddings/: embeddings.npy (N, V, D), logits.npy, tokens.npy, ids.npy, labels.npy,
groups.npy (lesions or patients), meta.json.  The same command goes on where an interrupted one stopped.  With --images,
a folder of unlabelled images, it writes OUTPUT/images_embeddings/.  --reference REAL, what this script stored of real
images with the same model, ranks those images, or those of train, by the distance to the nearest real one:
OUTPUT/kept.txt names the nearest, for the --include-list of any script, OUTPUT/distances.csv all.  A store holds the
labels of one task and no texts: models and datasets of images and texts are refused, distill.py runs such a teacher.

Files of common: augment, cli, data, embeddings, loader, metrics, models, run, training; unlabeled for
--images and --dataset unlabeled, and those that the dataset and the model need (see train_student.py).
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
from tqdm import tqdm

from common import cli

with cli.torch_later():
    from common.augment import Augmenter
    from common.data import (
        DATASETS,
        SPLITS,
        STORED_FLAGS,
        WITH_TEXTS,
        Splits,
        dataset_flags,
        dataset_info,
        load_splits,
        split_options,
    )
    from common.embeddings import DTYPES, Store, Writer, difference, merge, model_of, nearest, split_folder
    from common.loader import Loader
    from common.run import (
        UserError,
        atomic_write,
        barrier,
        environment,
        file_sha256,
        gather_objects,
        launched_processes,
        load_checkpoint,
        optional,
        rank,
        stops,
        world_size,
    )

# whose resolution, normalization and views --images takes where neither checkpoint nor reference says them
PLAIN = "csv"
NOT_OF_IMAGES = (
    *("dataset", "data_root", "hf_dataset", "download", "val_split", "folds", "fold", "split_seed", "include_list"),
    *("extra_train", "binary", "negatives", "table", "image_column", "label_column", "group_column", "split_column"),
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
    add = parser.add_argument
    add("--output", default="embeddings", help="folder that is written, a subfolder a split")
    cli.switch(add, "--overwrite", "replace what is there")
    add("--checkpoint", metavar="FILE", help="a checkpoint of these scripts")
    add("--model", type=cli.name_or_file, metavar="NAME", help="a model by name, as train_student.py --model takes it")
    add("--patch-size", type=cli.POSITIVE, metavar="PX", help="patch side of a ViT (vit_tiny, vit_6_192: 4)")
    cli.switch(add, "--pretrained", "the hub's weights for --model")
    add("--weights", metavar="FILE", help="a foreign state dict for --model, strictly; without weights they are random")
    add("--splits", nargs="+", choices=SPLITS, help="parts of the dataset, each with all its images; else all three")
    add("--unlabeled-root", metavar="DIR", help="a tree of images that train gets beside its own, as in distill.py")
    add("--images", metavar="FOLDER", help="in place of a dataset: the unlabelled images anywhere below a folder")
    add(
        "--reference",
        metavar="DIR",
        help="rank the images, or those of train, by the distance to the nearest of these real ones: "
        "what this script stored with the same model (its train, else its images)",
    )
    add(
        "--keep-fraction",
        type=cli.number(float, 0, 1, above=True),
        metavar="F",
        help="with --reference: the share of the images, the nearest, that kept.txt names",
    )
    add("--num-views", type=cli.POSITIVE, default=1, help="views of each image; the first is the plain image")
    add(
        "--pooling",
        choices=("cls", "mean", "map"),
        help="the embedding: class token, mean of the tokens, attention pooling; else what the model's head takes",
    )
    cli.switch(add, "--save-logits", "store the logits too, for --method response")
    cli.switch(add, "--save-tokens", "store the patch tokens too")
    add("--dtype", default="float16", choices=DTYPES, help="type of the stored values")
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="extract the Ith of N parts, from 0 (all)")
    add("--merge", type=cli.POSITIVE, metavar="N", help="join N shards that are done, check them, remove them")
    add("--seed", type=cli.NATURAL, default=0, help="fixes the views, and random weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="mixed precision; auto: on a GPU")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: on a GPU")
    cli.add_data_flags(parser, DATASETS, default=None)
    cli.add_augment_flags(parser)
    parser.set_defaults(batch_size=64, split_seed=None, decode_size=None)  # the last two: the checkpoint's
    return parser


if __name__ == "__main__":
    cli.check_command_line(build_parser)

# what loads torch
import torch

from common.models import build_model
from common.training import (
    Precision,
    Preprocess,
    live_teacher,
    load_model,
    need_head,
    place,
    select_device,
    start_weights,
)


def check_flags(args):
    """Refuse flags that cannot be combined."""
    given = [name for name in NOT_OF_IMAGES if getattr(args, name) is not None and getattr(args, name) is not False]
    if args.images and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{flag} and --images cannot be combined: a folder's images are not a dataset")
    if args.images and args.save_logits and not args.checkpoint and not args.merge:
        raise UserError("--save-logits with --images needs --checkpoint: the head of a model by name knows no classes")
    if bool(args.reference) != (args.keep_fraction is not None):
        raise UserError(
            "--reference DIR and --keep-fraction F belong together: which real images, and how many are kept?"
        )
    if args.reference and (args.merge or args.shard[1] > 1):
        raise UserError("--reference ranks whole splits: extract the shards, --merge them, then run it without --shard")
    if args.reference and "train" not in (args.splits or SPLITS) and not args.images:
        raise UserError("--reference ranks the images of train: it must be among --splits")
    if args.merge:
        return
    if bool(args.checkpoint) == bool(args.model):
        raise UserError("give one of --checkpoint FILE and --model NAME")
    if args.checkpoint and (args.pretrained or args.weights or args.patch_size):
        raise UserError("--pretrained, --weights and --patch-size belong to --model, not to --checkpoint")
    if args.limit_train:
        raise UserError("--limit-train: a store holds all images of a split, so that any student finds its own")


def open_reference(args, split):
    """The Store of --reference, or None; what is not given of how images are read is its own.  Raises UserError."""
    if not args.reference:
        return None
    inside = [split_folder(args.reference, name) for name in ("train", "images")]
    is_split = os.path.exists(os.path.join(args.reference, "meta.json"))
    store = Store(args.reference if is_split else next(filter(os.path.isdir, inside), inside[0]))
    if os.path.realpath(store.folder) == os.path.realpath(split_folder(args.output, split)):
        raise UserError(f"--reference {args.reference} is what this command writes: name another --output")
    args.resolution = args.resolution or store.meta["resolution"]
    args.hair_removal = args.hair_removal or bool(store.meta.get("hair_removal"))
    return store


def settle_flags(args):
    """The checkpoint, or None; fills in the dataset and what its samples are from it."""
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    one_label = f"a store holds images with one label: {LIVE}"
    if checkpoint and (checkpoint["kind"] == "image_text" or isinstance(checkpoint["classes"], dict)):
        raise UserError(f"{args.checkpoint} reads texts or has several tasks, {one_label}")
    if args.images:
        flags = checkpoint["flags"] if checkpoint else {}
        args.hair_removal = args.hair_removal or bool(flags.get("hair_removal"))
        args.window = args.window or flags.get("window")
        args.frame = flags.get("frame") if args.frame is None else args.frame
        args.decode_size = args.decode_size or flags.get("decode_size", 512)
        args.split_seed = 0
        return checkpoint
    vars(args).update(dataset_flags(vars(args), checkpoint, args.checkpoint))
    if args.dataset in WITH_TEXTS:
        raise UserError(f"--dataset {args.dataset} has texts and several tasks, {one_label}")
    return checkpoint


def read_data(args, checkpoint, reference):
    """(Splits, the name of the dataset whose defaults hold); --images are its `images`, in place of splits."""
    if not args.images:
        root, options = cli.data_root(args.data_root), split_options(vars(args))
        splits = load_splits(args.dataset, root, download=args.download, labels=False, **options)
        if isinstance(splits.classes, dict):
            raise UserError(f"--dataset {args.dataset} has several findings an image, a store holds one label: {LIVE}")
        return splits, args.dataset
    splits = Splits("images", "custom", [])
    load_folder = optional("common.unlabeled", "--images").load_folder
    splits.images = load_folder(args.images, args.decode_size, args.window, args.on_bad_image, args.hair_removal)
    splits.images.frame = args.frame
    base = None
    if checkpoint:
        splits.classes, base = checkpoint["classes"], checkpoint["flags"]["dataset"]
    elif reference:
        splits.classes, base = reference.meta["classes"], reference.meta["dataset"]
    return splits, base or PLAIN


def load_extractor(args, checkpoint, classes, info, crop_mode):
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
        preprocess = Preprocess.for_model(model, resolution, args.dataset, info, crop_mode)
        sha = file_sha256(args.weights) if args.weights else None
    say(f"normalization: {preprocess}")
    known = checkpoint["classes"] if checkpoint else classes
    if args.save_logits and (not known or known != classes):
        raise UserError(
            f"--save-logits: {args.checkpoint or args.dataset} knows {len(known)} classes, the images have "
            f"{len(classes)} (others)"
        )
    if args.save_logits and not checkpoint:
        need_head(model, classes, args.weights)
    if args.pooling:
        model.set_pooling(args.pooling)
    model.with_tokens = args.save_tokens
    weights = "hub" if args.pretrained else "file" if args.weights else f"random, seed {args.seed}"
    described = {
        "name": model.name,
        "family": model.family,
        "parameters": model.num_parameters,
        "checkpoint": args.checkpoint,
        "weights": "checkpoint" if checkpoint else weights,
        "sha256": sha,
        "preprocess": preprocess.to_dict(),
    }
    return model, preprocess, described


def make_planner(augment, num_views):
    """plan(batch) for `Loader.batches`: `views`, what is drawn for each, and the partners of all of them."""

    def plan(batch):
        views = [augment.plan({**batch, "view": torch.full_like(batch["view"], view)}) for view in range(num_views)]
        drawn = tuple({key: view[key] for key in ("view", "parameters") if key in view} for view in views)
        partners = [view["partner"] for view in views if "partner" in view]
        return {**batch, "views": drawn, **({"partner": torch.cat(partners, -1)} if partners else {})}

    return plan


def all_views(targets, batch, names):
    """{name: (B, V, ...)} of all views of a batch, on the device."""
    own, *partners = batch["image"].split(len(batch["index"]))  # those of one view after another
    views = []
    for number, view in enumerate(batch["views"]):
        image = torch.cat([own, partners[number]]) if partners else own
        out = targets({**batch, **view, "image": image})
        views.append({name: out[key] for name, key in names.items()})
    return {name: torch.stack([view[name] for view in views], 1) for name in names}


def extract(writer, dataset, targets, augment, names, args, device, title):
    """Fill the rows that are left; returns images a second."""
    todo = writer.todo
    todo = todo[(todo >= writer.start) & (todo < writer.stop)]
    # an image is read once, but for the partners of mixed views
    cache = "off" if args.cache == "auto" and not augment.policy.mixes else args.cache
    loader = Loader(dataset, args.batch_size, device, cache=cache, workers=args.workers, rows=todo)
    started = flushed = time.time()
    pending, show = collections.deque(), sys.stderr.isatty() and not rank()

    def save(rows, values):  # in a thread: the model goes on with the next batch
        writer.write(rows, {name: value[: len(rows)].float().cpu().numpy() for name, value in values.items()})

    with ThreadPoolExecutor(1) as pool:
        for batch in tqdm(
            loader.batches(plan=make_planner(augment, args.num_views)),
            total=-(-len(loader) // world_size()),
            unit="batch",
            desc=title,
            leave=False,
            disable=not show,
        ):
            rows = batch["index"][: batch["valid"]].numpy()
            pending.append(pool.submit(save, rows, all_views(targets, batch, names)))
            if len(pending) > 2:
                pending.popleft().result()
            if time.time() - flushed > FLUSH_SECONDS:
                writer.flush()
                flushed = time.time()
        for future in pending:
            future.result()
    writer.flush()
    return len(todo) / max(time.time() - started, 1e-9)


def rank_images(args, store, reference):
    """Write kept.txt, ids of the nearest first, and distances.csv, all in that order."""
    distances, rows = nearest(store, reference, select_device(args.device))
    order = np.argsort(distances, kind="stable")
    kept = max(1, round(args.keep_fraction * len(order)))
    path, table = (os.path.join(args.output, name) for name in ("kept.txt", "distances.csv"))
    with (
        atomic_write(table) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["id", "distance", "nearest"])
        writer.writerows([store.ids[i], f"{distances[i]:.6g}", reference.ids[rows[i]]] for i in order)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{store.ids[i]}\n" for i in order[:kept])
    furthest = distances[order[kept - 1]]
    print(
        f"{path}: {kept} of {len(order)} images, at most {furthest:.4g} from the nearest of {len(reference)} in "
        f"{reference.folder}",
        flush=True,
    )


def merge_shards(args, names):
    """--merge: join the shards of each split."""
    there = [split for split in names if os.path.isdir(split_folder(args.output, split))]
    for split in names if args.splits or not there else there:  # unlabelled images have no test
        merge(split_folder(args.output, split), args.merge)
        print(f"{split_folder(args.output, split)}: {args.merge} shards joined")


def main(args):
    check_flags(args)
    names = ["images"] if args.images else args.splits or SPLITS
    if args.merge:
        return merge_shards(args, names)
    stops.hint = f": the same command{' without --overwrite' if args.overwrite else ''} goes on"
    device = select_device(args.device)
    precision = Precision(args.amp, device)

    # data
    checkpoint, ranked = settle_flags(args), "images" if args.images else "train"
    reference = open_reference(args, ranked)
    splits, args.dataset = read_data(args, checkpoint, reference)
    info = dataset_info(args.dataset)
    policy = cli.augment_policy(vars(args), info.policy)
    lacking = [split for split in names if getattr(splits, split) is None]
    if lacking and args.splits:
        raise UserError(f"--splits {' '.join(lacking)}: {args.dataset} has none")

    # model
    model, preprocess, described = load_extractor(args, checkpoint, splits.classes, info, policy.crop_mode)
    place(model, device, args.compile)
    augment = Augmenter(policy, args.seed)
    targets = live_teacher(model, preprocess, augment, precision)
    arrays = {"embeddings": "embedding"}
    arrays.update(
        {"logits": "logits"} if args.save_logits else {}, **({"tokens": "tokens"} if args.save_tokens else {})
    )
    side = preprocess.resolution
    with torch.no_grad():
        dry = model({"image": torch.zeros(1, 3, side, side, device=device)})
    shapes = {name: (args.num_views, *dry[key].shape[1:]) for name, key in arrays.items()}

    # stores
    meta = describe_store(args, model, preprocess, described, policy, precision, splits)
    if reference:
        differs = difference(model_of(meta), model_of(reference.meta))
        if differs:
            why = f"was made by another model ({differs}): distances would mean nothing"
            raise UserError(f"--reference {args.reference} {why}")
    for split in (split for split in names if split not in lacking):
        dataset, folder = getattr(splits, split), split_folder(args.output, split)
        fingerprint = dataset.fingerprint([""] if args.images else splits.classes)
        writer = open_writer(folder, {**meta, "split": split, "sha256": fingerprint}, dataset, shapes, args)
        title = f"{folder}{f', shard {args.shard[0]} of {args.shard[1]}' if args.shard[1] > 1 else ''}"
        if writer.complete:
            say(f"{title}: complete")
            continue
        rate = extract(writer, dataset, targets, augment, arrays, args, device, title)
        barrier()  # all rows of all processes are there
        if rank() == 0:
            writer.finish()
        size = f"{sum(array.nbytes for array in writer.arrays.values()) / 1e6:,.1f} MB"
        sizes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        say(f"{title}: {writer.stop - writer.start} images, {sizes}, {args.dtype}, {size}, {rate:,.0f} images/s")
    if reference and rank() == 0:
        rank_images(args, Store(split_folder(args.output, ranked)), reference)


def describe_store(args, model, preprocess, described, policy, precision, splits):
    """What meta.json says: all that made the values."""
    meta = {
        "resolution": preprocess.resolution,
        "pooling": model.pooling,
        "num_views": args.num_views,
        "seed": args.seed,
        "policy": policy.to_dict(),
        "amp": precision.name,
        "batch_size": args.batch_size,
        "teacher": described,
        "dataset": args.dataset,
        "classes": splits.classes,
        **{name: getattr(args, name) for name in STORED_FLAGS},
        "data_root": args.data_root,
        "environment": environment(precision.device),
    }
    if args.images:  # folders of generated images often hold the same names: their bytes tell them apart
        meta.update(dataset=None, bytes=sum(os.path.getsize(path) for path in splits.images.paths))
    return meta


def open_writer(folder, meta, dataset, shapes, args):
    """Rank 0 makes the files, the others open them."""
    if launched_processes().local_size != world_size():
        raise UserError("several nodes cannot write one file safely: give each its own --shard I/N")

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

    writer = make(True) if rank() == 0 else None
    complete = gather_objects(writer is not None and writer.complete)[0]
    if writer is None:
        writer = make(False) if not complete else argparse.Namespace(complete=True)
    return writer


def say(text):
    if rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    cli.run_script(main, build_parser)
