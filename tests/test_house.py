"""The house: what each script needs, floors and budgets, lengths, help, and scripts that are carried away.

Budgets are in Python tokens (names, numbers, strings, operators), as tokenize counts them.
"""

import ast
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT

SCRIPTS = ("train_teacher", "train_student", "distill", "extract_embeddings", "evaluate", "report")
TOP_LEVEL = {*(f"{name}.py" for name in SCRIPTS), "common", "slurm", "tests", "requirements.txt", "README.md"}
GROUND = {"augment", "cifar_models", "losses", "metrics", "models", "probes", "run"}
MIDDLE = ("cli", "data", "loader", "training", "teacher")  # from below
OPTIONAL = set(
    "custom dicom distributed dry_run embeddings export groups hugging_face image_text medical multimodal "
    "several sweep tensorboard unlabeled weights".split()
)
REPORT = {"page", "statistics"}
FILES = {path.stem: path for path in sorted((ROOT / "common").glob("*.py"))}


def imports(path, nested=False):
    """Files of common that a file imports when it is imported; nested: those that it imports later."""
    names = set()
    tree = ast.parse(path.read_text())
    now = [n for top in tree.body for n in (top.body if isinstance(top, ast.With) else [top])]
    nodes = now if not nested else [n for n in ast.walk(tree) if n not in now]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Constant) and re.fullmatch(r"common\.\w+", str(node.value)):  # run.optional
            names.add(node.value.split(".")[1])
    return names


def closure(script):
    """Files of common that a script needs before it does anything."""
    needed, left = set(), imports(ROOT / f"{script}.py")
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left |= imports(FILES[name])
    return needed


def tokens(path):
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
    return sum(t.type in kinds for t in tokenize.generate_tokens(io.StringIO(path.read_text()).readline))


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_the_top_level():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - {"__pycache__"}
    ignored = subprocess.run(["git", "check-ignore", *found], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert found - {*ignored} == TOP_LEVEL


def test_a_file_imports_from_floors_below_its_own():
    assert {*FILES} - {"__init__"} == {*GROUND, *MIDDLE, *OPTIONAL, *REPORT}
    for name in GROUND:
        assert not imports(FILES[name]) - {"models"} or name == "probes", name
    for number, name in enumerate(MIDDLE):
        assert imports(FILES[name]) <= {*GROUND, *MIDDLE[:number]}, name
        assert "data" not in imports(FILES["cli"])
    for name in OPTIONAL | REPORT:
        assert not imports(FILES[name]) & {"teacher"} and not imports(FILES[name]) & REPORT - {"statistics"}, name


@pytest.mark.parametrize(
    "script, files, most",
    [
        ("train_teacher", 8, 43_000),
        ("train_student", 8, 43_000),
        ("distill", 10, 56_600),
        ("evaluate", 8, 47_200),
        ("extract_embeddings", 9, 49_900),
        ("report", 6, 35_850),
    ],
)
def test_what_a_script_needs(script, files, most):
    needed = closure(script)
    assert len(needed) <= files, sorted(needed)
    weight = tokens(ROOT / f"{script}.py") + sum(tokens(FILES[name]) for name in needed)
    assert weight <= most, weight


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_docstring_names_the_files(script):
    """Those that are always needed, in a sentence of its own; optional files after a semicolon."""
    text = " ".join(ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text())).split())
    always = re.search(r"Files of common: ([\w, ]+?)[;.]", text)[1]
    assert {name.strip() for name in re.split(r",| and ", always) if name.strip()} == closure(script)


def test_no_function_of_common_takes_the_flags_of_a_script():
    for name, path in FILES.items():
        for function in functions(path):
            given = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            assert "args" not in given, f"{name}.{function.name}"


@pytest.mark.parametrize("path", [*(ROOT / f"{name}.py" for name in SCRIPTS), *FILES.values()], ids=lambda p: p.stem)
def test_functions_are_short(path):
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno - f.lineno + 1 > 60}
    flags = {name: lines for name, lines in long.items() if name.startswith("add_")}  # a list of flags
    signatures = {f.name: f.body[0].lineno - f.lineno for f in functions(path)}  # one parameter a line
    assert not {n: lines for n, lines in long.items() if n not in flags and lines - signatures[n] > 60}


def test_teacher_and_student_share_their_text():
    """All but the docstring's commands and the line that names the role."""
    lines = []
    for role in ("teacher", "student"):
        text = (ROOT / f"train_{role}.py").read_text()
        lines.append(text[text.index("Writes the run folder") :].splitlines())
    different = [(one, two) for one, two in zip(*lines) if one != two]
    assert len(lines[0]) == len(lines[1]) and len(different) == 1
    assert all(line.startswith("ROLE, TEXT_MODEL = ") for line in different[0])


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.fixture(scope="module")
def parsers():
    return {name: runpy.run_path(str(ROOT / f"{name}.py"))["build_parser"]() for name in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_short_and_help_all_is_whole(parsers, script, capsys):
    parser = parsers[script]
    flags = {a.option_strings[0]: a for a in parser._actions if a.option_strings}
    short = parser.format_help()
    shown = re.findall(r"^  (?:-h, )?(--(?:\[no-\])?[\w-]+)", short, re.M)
    assert len(short.splitlines()) < 80 and len(shown) <= 60
    with pytest.raises(SystemExit) as done:
        parser.parse_args(["--help-all"])
    whole = capsys.readouterr().out
    assert done.value.code == 0 and len(whole) >= len(short)
    shown = {name.replace("[no-]", "") for name in re.findall(r"^  (?:-h, )?(--(?:\[no-\])?[\w-]+)", whole, re.M)}
    assert shown == {name if name != "-h" else "--help" for name in flags}
    for name, action in flags.items():
        assert action.help and len(action.help) > 8, name
        first = " ".join(action.help.split()[:3]).replace("%%", "%")
        assert first in " ".join(whole.split()), f"{name} is not explained"


def test_help_without_docstrings():
    done = subprocess.run([sys.executable, "-OO", ROOT / "distill.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--method" in done.stdout, done.stderr


def test_an_unknown_dataset_is_refused_as_early():
    command = [sys.executable, "-X", "importtime", ROOT / "distill.py", "--dataset", "cifr10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown dataset 'cifr10': choose one of digits, cifar10" in done.stderr
    assert " torch\n" not in done.stderr


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["--no-such-flag"], 2), (["--batch-size", "0"], 2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_flags_are_answered_before_what_takes_seconds_is_loaded(script, words, code):
    command = [sys.executable, "-X", "importtime", ROOT / f"{script}.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    loaded = set(re.findall(r"\| +(\S+)$", done.stderr, re.M))
    assert done.returncode == code and {"argparse", "common.cli"} <= loaded
    assert not loaded & {"torch", "torchvision", "timm", "transformers", "sklearn", "scipy.stats"}


def test_torch_is_loaded_by_its_first_use():
    code = """if True:
        import sys
        from common.cli import torch_later
        with torch_later():
            from common import augment, data, embeddings, loader
        assert "torch" not in sys.modules
        import torch.nn.functional as F
        assert augment.torch.nn.functional is F and augment.torch.ones(1).tolist() == [1]
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_booleans_have_a_no_form(parsers, script):
    for action in parsers[script]._actions:
        if action.nargs == 0 and action.dest not in ("help", "help_all"):
            assert f"--no-{action.dest.replace('_', '-')}" in action.option_strings


def test_a_no_form_overrides_a_config(parsers, tmp_path):
    from common.cli import parse_flags

    (tmp_path / "config.json").write_text('{"nesterov": true, "lr": 0.1}')
    config = ["--config", str(tmp_path / "config.json")]
    assert parse_flags(parsers["train_student"], config).nesterov is True
    flags = parse_flags(parsers["train_student"], [*config, "--no-nesterov"])
    assert flags.nesterov is False and flags.lr == 0.1


# ------------------------------------------------------------------------------------------------------- carried away

RUNS = {
    "train_teacher": ["--epochs", "1", "--limit-train", "64", "--model", "resnet8", "--output", "runs/teacher"],
    "distill": ["--epochs", "1", "--limit-train", "64", "--allow-weak-teacher", "--output", "runs/distill"],
    "train_student": ["--epochs", "1", "--output", "runs/student"],
    "evaluate": ["runs/teacher/best.pth"],
    "extract_embeddings": ["--checkpoint", "runs/teacher/best.pth", "--splits", "val"],
    "report": ["runs"],
}


@pytest.mark.parametrize("shadowed", [False, True], ids=["empty folder", "another common in site-packages"])
def test_scripts_run_with_their_files_alone(tmp_path, shadowed):
    """In an empty folder, one after another; another package that is called common does not come first."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if shadowed:
        other = tmp_path / "site" / "common"
        other.mkdir(parents=True)
        (other / "__init__.py").write_text("raise RuntimeError('the other common')")
        environment["PYTHONPATH"] = str(tmp_path / "site")
    for script, flags in RUNS.items() if not shadowed else [("train_student", RUNS["train_student"])]:
        folder = tmp_path / script
        (folder / "common").mkdir(parents=True)
        shutil.copy(ROOT / f"{script}.py", folder)
        for name in {"__init__", *closure(script)}:
            shutil.copy(FILES[name], folder / "common")
        if script == "report":
            shutil.copy(ROOT / "common" / "page.html", folder / "common")
        if script in ("distill", "evaluate", "extract_embeddings", "report"):
            shutil.copytree(tmp_path / "train_teacher" / "runs", folder / "runs", dirs_exist_ok=True)
        command = [sys.executable, f"{script}.py", *flags]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (script, done.stderr)


def test_a_missing_optional_file_is_one_line(tmp_path):
    """The flag or name that needs it is said."""
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "train_student.py", tmp_path)
    for name in {"__init__", *closure("train_student")}:
        shutil.copy(FILES[name], tmp_path / "common")
    lacking = {
        "common/sweep.py": ["--seeds", "0", "1"],
        "common/medical.py": ["--dataset", "ham10000", "--data-root", "."],
        "common/custom.py": ["--dataset", "my.py:data"],
        "common/image_text.py": ["--dataset", "medpix", "--data-root", "."],
        "common/dry_run.py": ["--dry-run"],
        "common/hugging_face.py": ["--model", "hf:nothing"],
        "common/cifar_models.py": ["--model", "cifar_resnet20"],
    }
    code = """if True:
        import runpy, shlex, sys
        for line in sys.argv[1:]:
            sys.argv = ["train_student.py", *shlex.split(line)]
            try:
                runpy.run_path("train_student.py", run_name="__main__")
            except SystemExit as done:
                print(done.code, flush=True)
    """
    command = [sys.executable, "-c", code, *map(shlex.join, lacking.values())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-len(lacking) :] == ["2"] * len(lacking), done.stderr
    for line, file in zip(done.stderr.splitlines(), lacking, strict=True):
        assert line.startswith("error: ") and file in line and "copy it" in line
