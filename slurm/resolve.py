"""What a batch job runs, writes and copies, settled before anything is copied.  Called by env.sh and sweep.sh.

    python slurm/resolve.py train_student.py --seed 1      # in the folder that the job was submitted from
    python slurm/resolve.py --points train_student.py grid.json --epochs 5  # a line a point: index, name, run folder
    python slurm/resolve.py --check train_teacher.py --next distill.py      # several jobs: only what is wrong

The first prints records for bash, each ended by NUL: A:ARGUMENT of the script, O:OUTPUT folder, S:PATH to stage, L:PATH
to
stage without its checkpoints, R: where the script can resume, W:PATTERN of files that the run replaces.
An array index becomes plain flags; what the job's copy could not find out (a run folder that is taken, hub weights that
are not here) is refused here.
"""

import argparse
import contextlib
import importlib
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT

try:
    from common import cli, sweep
    from common.data import dataset_info
    from common.run import RunFolder, UserError, fail, load_checkpoint, read_json, write_json
except ModuleNotFoundError as missing:
    print(
        f"error: {sys.executable} has no {missing.name}: pip install -r requirements.txt there, or set PYTHON or VENV",
        file=sys.stderr,
    )
    sys.exit(2)

MARK = ".slurm_job"  # in a run folder: the job that wrote it (stage.sh)
ALONE = {"output", "config", "sweep", "sweep_index"}  # flags that have their own rules
WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def load_script(name):
    name = os.path.basename(name)
    name += "" if name.endswith(".py") else ".py"
    if not os.path.isfile(os.path.join(ROOT, name)):
        raise UserError(f"no script {name} in {ROOT}")
    return importlib.import_module(name[:-3])


# ------------------------------------------------------------------------------------------------------------ arguments


def has(argv, flag):
    return any(word == flag or word.startswith(flag + "=") for word in argv)


def without(argv, *flags):
    """argv without these flags and their one value."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word.split("=")[0] in flags:
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def replaced(argv, old, new):
    """argv with one value in the place of another, also in --flag=value."""
    return [
        new if w == old else w[: -len(old)] + new if w.startswith("--") and w.endswith("=" + old) else w for w in argv
    ]


def expand_index(parser, argv, index):
    """The array index is the sweep's point, else the seed, which the run folder's name then carries."""
    if has(argv, "--sweep"):
        return sweep.expand_sweep(parser, [*argv, "--sweep-index", index])
    if "--shard" in parser._option_string_actions:
        if any("{index}" in word for word in argv):
            return [word.replace("{index}", index) for word in argv]
        if has(argv, "--shard") or has(argv, "--merge"):
            raise UserError("--shard and --merge in an array job: the array index is the shard")
        first, last, count = (os.environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX", "COUNT"))
        if first != "0" or int(last) + 1 != int(count):
            raise UserError(
                f"the array {first} to {last} is a part of all shards: say of how many, --shard {{index}}/N"
            )
        return [*argv, "--shard", f"{index}/{count}"]
    if "--seed" not in parser._option_string_actions:
        raise UserError(
            f"an array of {parser.prog}: it has no --seed and no --sweep that the array index could stand for"
        )
    for flag in ("--seed", "--resume"):
        if has(argv, flag):
            raise UserError(f"{flag} in an array job without --sweep: the array index is the seed")
    output = parser.parse_args(argv).output.rstrip("/")
    return [*without(argv, "--output"), "--seed", index, "--output", f"{output}_{index}"]


def restarted(argv, output):
    """argv of a requeued job that had begun its run: it goes on, or starts again where nothing was saved."""
    if not os.path.exists(os.path.join(output, "latest.pth")):
        return argv if has(argv, "--overwrite") or has(argv, "--resume") else [*argv, "--overwrite"]
    kept = ["--resume", output]
    for i, word in enumerate(argv):
        if word.split("=")[0] in ("--device", "--workers", "--epochs"):
            kept += [word] if "=" in word else argv[i : i + 2]
    return kept


def began_here(output):
    """Whether this job, before it was requeued, wrote this run folder."""
    if not int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return False
    with contextlib.suppress(OSError), open(os.path.join(output, MARK)) as file:
        return file.read().strip() == os.environ.get("SLURM_JOB_ID")
    return False


def check_output(args):
    """Refuse what the script would refuse, if it saw the user's folder."""
    if os.path.normpath(args.output) == ".":
        raise UserError("--output . is the folder of the job itself: name one of its own")
    if getattr(args, "predict", None):
        raise UserError(
            "--predict in a job: it writes one file, and a job brings back a folder; run evaluate.py by itself"
        )
    if hasattr(args, "resume"):
        RunFolder(args.output, bool(args.resume), args.overwrite)
    elif hasattr(args, "checkpoint") and os.path.exists(os.path.join(args.output, "config.json")):
        raise UserError(f"--output {args.output} holds a run: name a folder of its own")


# ---------------------------------------------------------------------------------------------------------------- paths


def named_paths(parser, args, checkpoint_data):
    """{relative path that exists: flag}, of every flag and argument but the output."""
    found = {}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in (ALONE | {"dataset"}) - {"config"} or action.choices:
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not os.path.isabs(text):
                path = text.removeprefix("hf:")
                if path and os.path.exists(path):
                    found.setdefault(path, (action.option_strings or [action.dest])[0])
    if checkpoint_data and not os.path.isabs(checkpoint_data) and os.path.exists(checkpoint_data):
        found.setdefault(checkpoint_data, "--data-root")
    return found


def data_of_checkpoint(args, default_teacher):
    """The data folder that distill.py and evaluate.py take from a checkpoint where none is given, or None."""
    taught_by = getattr(args, "teacher_checkpoint", None)  # the first of several tells the data
    taught_by = taught_by[0] if isinstance(taught_by, list) else taught_by
    path = getattr(args, "checkpoint", None) or taught_by or default_teacher
    if args.data_root or getattr(args, "images", None) or not path or not os.path.isfile(path):
        return None
    flags = load_checkpoint(path).get("flags") or {}
    return flags.get("data_root") if args.dataset in (None, flags.get("dataset")) else None


def arrange(module, parser, args, argv):
    """(argv, records): what is staged; what cannot be is named absolutely."""
    default = getattr(module, "DEFAULT_TEACHER", None)
    if any(getattr(args, name, None) for name in ("teacher_checkpoint", "teacher_model", "teacher_embeddings")):
        default = None
    taught = data_of_checkpoint(args, default) if hasattr(args, "data_root") else None
    paths = named_paths(parser, args, taught)
    if default and os.path.exists(default):
        paths.setdefault(default, "--teacher-checkpoint")
    light = "reevaluate" in vars(args) and not args.reevaluate  # report.py reads no checkpoint
    resume, staged = getattr(args, "resume", None), []
    for path, flag in paths.items():
        if os.path.normpath(path).split(os.sep)[0] not in ("..", "."):
            staged.append(("L:" if light else "S:") + os.path.normpath(path))
            continue
        absolute = os.path.abspath(path)
        argv = replaced(replaced(argv, path, absolute), "hf:" + path, "hf:" + absolute)
        if absolute not in {word.split("=", 1)[-1].removeprefix("hf:") for word in argv}:  # it came from a file
            if resume and path != taught:
                raise UserError(
                    f"{flag} {path} of {resume} lies outside this folder: submit from the folder it is relative to"
                )
            argv = [*argv, flag, absolute]
    samples = getattr(args, "save_samples", None)
    if samples and not resume and not os.path.isabs(samples) and not samples.startswith(args.output.rstrip("/") + "/"):
        argv = [*without(argv, "--save-samples"), "--save-samples", os.path.abspath(samples)]
    return argv, drop_nested(staged)


def drop_nested(records):
    """Records without those that lie inside another."""
    paths = [record[2:] for record in records]
    return [r for r in dict.fromkeys(records) if not any(r[2:].startswith(path + "/") for path in paths)]


# ------------------------------------------------------------------------------------------------------------------ hub


def default_model(args, role):
    """--model, else that of the dataset where one is named and the weights would come from a hub."""
    if args.model is None and args.pretrained and args.dataset:
        return dataset_info(args.dataset).defaults(role)["model"]
    return args.model


def hub_needs(args, role):
    """[(model, whether its weights are needed)] for all that would come from a hub."""
    asked = [
        (default_model(args, role), args.pretrained) if hasattr(args, "pretrained") else (None, False),
        (getattr(args, "teacher_model", None), getattr(args, "teacher_pretrained", False)),
    ]
    if getattr(args, "text_model", None):
        from common.multimodal import IMAGE_MODELS, TEXT_MODELS

        text = TEXT_MODELS.get(args.text_model, args.text_model)
        asked += [
            (name, args.pretrained)
            for name in (IMAGE_MODELS.get(args.image_model, args.image_model), text if text.startswith("hf:") else None)
        ]
    for name, pretrained in asked:
        if name and name.startswith("hf:"):
            if not os.path.isdir(name.removeprefix("hf:")):
                yield name, pretrained
        elif name and pretrained:
            yield name, True


def is_cached(name, weights):
    """Whether a model's files are in the local cache, or never come from the Hugging Face hub."""
    from huggingface_hub import try_to_load_from_cache

    folders = [None]
    if name.startswith("hf:"):
        repository, files = name.removeprefix("hf:"), WEIGHT_FILES if weights else ("config.json",)
        folders.append(os.environ.get("TRANSFORMERS_CACHE"))
    else:
        import timm

        config = timm.get_pretrained_cfg(name.removeprefix("timm:"))
        repository = config.hf_hub_id if config else None
        files = (*WEIGHT_FILES, *filter(None, [config and config.hf_hub_filename]))
    if not repository:
        return True
    for folder in dict.fromkeys(folders):
        with contextlib.suppress(ValueError):  # no repository's name: the script says so
            if any(isinstance(try_to_load_from_cache(repository, file, cache_dir=folder), str) for file in files):
                return True
    return False


def check_hub(args, role):
    given = os.environ.get
    offline = any(
        (given(name) or "").upper() in ("1", "ON", "YES", "TRUE") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    if offline or given("HF_TOKEN") or given("HUGGINGFACE_HUB_TOKEN") or given("REQUIRE_HF_TOKEN") == "0":
        return
    for name, weights in hub_needs(args, role):
        if not is_cached(name, weights):
            raise UserError(
                f"{name} is not in the local cache and neither HF_TOKEN nor HUGGINGFACE_HUB_TOKEN is set: set "
                "one, fetch "
                "it beforehand, or set REQUIRE_HF_TOKEN=0 to try without"
            )


# ----------------------------------------------------------------------------------------------------------------- jobs


def job(script, argv):
    """The records of one job."""
    module = load_script(script)
    parser = module.build_parser()
    parser.prog = f"{module.__name__}.py"
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    if index:
        argv = expand_index(parser, argv, index)
    args = cli.parse_flags(parser, argv)
    if getattr(args, "seeds", None):
        raise UserError(
            "--seeds in a job, which brings back one run folder: submit an array, --array=0-2, whose index is the seed"
        )
    if has(argv, "--sweep"):  # with --sweep-index by hand
        argv = sweep.expand_sweep(parser, argv)
    if hasattr(args, "resume") and began_here(args.output):
        argv = restarted(argv, args.output)
        args = cli.parse_flags(parser, argv)
    check_output(args)
    check_hub(args, getattr(module, "ROLE", "student"))
    absent = [
        path for path in getattr(args, "runs", ()) if not os.path.exists(path)
    ]  # of report.py: jobs before it may have failed
    if absent and len(absent) < len(args.runs):
        print(f"note: the report goes without what is missing: {', '.join(absent)}", file=sys.stderr)
        argv = [word for word in argv if word not in absent]
    given = getattr(args, "data_root", None)
    if given and not getattr(args, "download", False) and not os.path.exists(given):
        raise UserError(f"--data-root {given} is missing")
    output = os.path.normpath(args.output)
    if hasattr(
        args, "shard"
    ):  # it grows for hours and other shards write beside it: never copied, and goes on where it is
        output = os.path.abspath(output)
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            argv = [word for word in argv if word != "--overwrite"]
    if output.split(os.sep)[0] == "..":
        output = os.path.abspath(output)
    argv, staged = arrange(module, parser, args, argv)
    argv = without(argv, "--output")
    argv = (
        [*without(argv, "--resume"), "--resume", output]
        if getattr(args, "resume", None)
        else [*argv, "--output", output]
    )
    records = [*staged, f"O:{output}"]
    if hasattr(args, "resume") or hasattr(args, "shard"):
        records.append("R:")
    if hasattr(args, "resume"):
        records += [f"W:{pattern}" for pattern in RunFolder.PATTERNS if args.overwrite]
    return records + [f"A:{word}" for word in argv]


# --------------------------------------------------------------------------------------------------------------- sweeps


def chosen(text, count):
    """ "0,2-4" -> {0, 2, 3, 4}, of sbatch's --array."""
    if text is None:
        return set(range(count))
    points = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(f"--points {text}: write indices as 0,2-4")
        points |= set(range(int(first), int(last or first) + 1))
    if max(points) >= count:
        raise UserError(f"--points {text} is past the grid, which has {count} points, 0 to {count - 1}")
    return points


def given_flags(module, argv):
    """{flag: value} of the flags that argv or its --config sets."""
    parser = module.build_parser()
    config = parser.parse_args(argv).config
    values = read_json(config) if config else {}
    values = values.get("flags", values)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    both = {key.replace("-", "_"): value for key, value in values.items() if value is not None} | given
    return {key.replace("_", "-"): value for key, value in both.items() if key not in cli.NOT_IN_CONFIG}


def points(script, grid, argv, write=False, only=None):
    """Check every point of a grid; return its lines."""
    module = load_script(script)
    parser = module.build_parser()
    parser.prog = f"{module.__name__}.py"
    if "--sweep" not in parser._option_string_actions:
        raise UserError(f"{script} has no --sweep")
    names = [name for name, _ in sweep.grid_points(grid)]
    wanted, lines, configs = chosen(only, len(names)), [], {}
    for index, name in enumerate(names):
        flat = sweep.expand_sweep(parser, [*argv, "--sweep", grid, "--sweep-index", str(index)])
        args = cli.parse_flags(parser, flat)
        if index in wanted:
            check_output(args)
            configs[args.output + ".json"] = given_flags(module, flat)
            lines.append(f"{index}\t{name}\t{args.output}")
    for path, values in configs.items() if write else ():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_json(path, values)
    return lines


def main(argv):
    if argv[:1] == ["--points"]:
        parser = argparse.ArgumentParser(prog="resolve.py", allow_abbrev=False)
        parser.add_argument("--points", action="store_true", help="list a sweep's points instead of one job's records")
        parser.add_argument("--write", action="store_true", help="write each point's flags to OUTPUT/POINT.json")
        parser.add_argument("--only", metavar="LIST", help="these points, as 0,2-4")
        parser.add_argument("script", help="a script that trains, as train_student.py")
        parser.add_argument("grid", help="GRID.json of --sweep")
        parser.add_argument("rest", nargs=argparse.REMAINDER, help="the script's other flags")
        args = parser.parse_args(argv)
        print("\n".join(points(args.script, args.grid, args.rest, args.write, args.only)))
    elif argv[:1] == ["--check"]:
        while argv:
            end = argv.index("--next", 1) if "--next" in argv[1:] else len(argv)
            job(argv[1], argv[2:end])
            argv = argv[end:]
    else:
        sys.stdout.write("".join(record + "\0" for record in job(argv[0], argv[1:])))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:
        if not getattr(error, "exit_code", None):
            raise
        fail(" ".join(str(error).split()), error.exit_code)
