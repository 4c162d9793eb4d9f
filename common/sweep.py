"""--seeds and --sweep: one command line becomes those of several runs.  Needs cli.py and run.py of `common`."""

import itertools
import json
import os
import re

from common.cli import NOT_IN_CONFIG, Parser, config_argv, without_flags
from common.run import UserError, read_json


def grid_points(path: str, script: str | None = None) -> list[tuple[str, dict]]:
    """[(name, {flag: value})] of a grid file.  Raises UserError.

    An object of lists is crossed, the last one varying fastest; a list of objects is taken as it is, "name" naming a
    point and a script's name, as "distill.py", an object of flags for that script alone.  Names are unique and fit for
    folders.
    """
    grid = read_json(path)
    if isinstance(grid, dict):
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(
                    f"{path}: the axis {key!r} must be a list of at least one value, not {json.dumps(values)}"
                )
        points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    elif isinstance(grid, list) and all(isinstance(point, dict) for point in grid):
        points = [_script_flags(path, point, script) for point in grid]
    else:
        points = []
    if not points or not all(points):
        form = '{"lr": [0.1, 0.01], "batch-size": [32, 64]}'
        raise UserError(f"{path} is not a grid: write {form} or a list of such points")
    names = []
    for point in points:
        name = point.pop("name", None) or "_".join(f"{key}-{_in_name(value)}" for key, value in point.items())
        name = re.sub(r"[^\w.+-]+", "-", str(name).replace('"', "")).strip("-.")[:150]
        if not name or name in names:
            raise UserError(f'{path}: two points have the name {name!r}: give each its own "name"')
        names.append(name)
    return list(zip(names, points))


def _in_name(value):
    return "-".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def _script_flags(path, point, script):
    """The flags of a point without those of other scripts."""
    for key, flags in point.items():
        if key.endswith(".py") and not isinstance(flags, dict):
            raise UserError(f"{path}: {key!r} must hold an object of flags, not {json.dumps(flags)}")
    return {**{key: value for key, value in point.items() if not key.endswith(".py")}, **point.get(script, {})}


def expand_seeds(parser: Parser, argv: list[str]) -> list[list[str]]:
    """argv for each of --seeds, with that --seed and the run folder OUTPUT_SEED; [argv] without --seeds."""
    flags = parser.parse_args(argv)
    if flags.seeds is None:
        return [argv]
    given = {word.split("=")[0] for word in argv}
    for flag in ("--seed", "--resume"):
        if flag in given:
            raise UserError(
                f"{flag} and --seeds cannot be combined: --seeds makes one run for each seed, in its own folder"
            )
    if len(set(flags.seeds)) < len(flags.seeds):
        raise UserError(f"--seeds {' '.join(map(str, flags.seeds))}: a seed is named twice")
    rest, output = without_flags(argv, ("--seeds", "--output")), flags.output.rstrip("/")
    return [[*rest, "--seed", str(seed), "--output", f"{output}_{seed}"] for seed in flags.seeds]


def expand_sweep(parser: Parser, argv: list[str]) -> list[str]:
    """argv with --sweep GRID --sweep-index N replaced by the flags of that point; its run folder is OUTPUT/NAME.

    "{name}" in any value becomes the name of the point, so that a sweep of students can follow a sweep of teachers.
    """
    flags = parser.parse_args(argv)
    if flags.sweep is None and flags.sweep_index is None:
        return argv
    if flags.sweep is None or flags.sweep_index is None:
        raise UserError("--sweep GRID.json and --sweep-index N belong together: which point of the grid?")
    if flags.resume:
        raise UserError("--sweep and --resume cannot be combined: name the point's run folder, --resume OUTPUT/POINT")
    points = grid_points(flags.sweep, os.path.basename(parser.prog))
    if flags.sweep_index >= len(points):
        held = f"{flags.sweep} has {len(points)} points, 0 to {len(points) - 1}"
        raise UserError(f"--sweep-index {flags.sweep_index} is past the grid: {held}")
    name, values = points[flags.sweep_index]
    kept = [word.replace("{name}", name) for word in without_flags(argv, ("--sweep", "--sweep-index"))]
    actions = parser._option_string_actions
    given = {actions[word.split("=")[0]].dest for word in kept if word.split("=")[0] in actions}
    for key in values:
        dest = key.replace("-", "_")
        if dest in NOT_IN_CONFIG:
            raise UserError(f"{flags.sweep} must not set {key}: the grid's points go to OUTPUT/POINT")
        if dest in given:
            flag = f"--{dest.replace('_', '-')}"
            raise UserError(f"{flag} is given and stands in {flags.sweep}: leave it out of one of them")
    point = [word.replace("{name}", name) for word in config_argv(parser, values, flags.sweep)]
    return [*kept, *point, "--output", os.path.join(flags.output.replace("{name}", name), name)]
