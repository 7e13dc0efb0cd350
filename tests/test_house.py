"""Rules of the house that no linter knows: imports, names, sizes, and that what the README says is so."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from quantize.arguments import parse
from quantize.inputs import plan_without_weights
from quantize.plan_table import plan_rows
from runtime import bench_arguments, parity_arguments, score_arguments, serve_arguments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("runtime", "calibration", "quantize")
OURS = {*ROOMS, "app", "tests", "benchmarks"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST_FILE, LONGEST_TEST_FILE, LONGEST_FUNCTION = 350, 450, 60
# Ways in which a checkpoint or a data set could run code.
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CODE_RUNNERS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "torch.hub.load",
    "os.system",
    "yaml.load",
}
UNSAFE_FLAGS = {"trust_remote_code", "allow_pickle", "shell"}
# Written in halves, as this file is searched too.
REGISTRY_HOSTS = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "download." + "pytorch")


def tracked_files() -> list[str]:
    """Paths of the source tree: what git knows, or in an unpacked archive what no tool has made."""
    try:
        git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        return sorted(path for path in git.stdout.split("\0") if (ROOT / path).is_file())
    except (OSError, subprocess.CalledProcessError):
        return sorted(walked_files())


def walked_files() -> Iterator[str]:
    made = re.compile(r"__pycache__|output|build|dist|.*\.egg-info|\.(?!ci$).*")
    for directory, names, files in os.walk(ROOT):
        names[:] = [name for name in names if not made.fullmatch(name)]
        yield from (str((Path(directory) / file).relative_to(ROOT)) for file in files)


FILES = tracked_files()
SOURCES = [path for path in FILES if path.endswith(".py")]
PACKAGED = [path for path in SOURCES if path.split("/")[0] in ROOMS]


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def tree(path: str) -> ast.Module:
    return ast.parse(text_of(path), path)


def imported_modules(path: str) -> set[str]:
    """Dotted names of everything a file imports, wherever in it."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names.add(node.module or "")
    return names


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README in one language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text.strip("\n") for text in found]


def configuration() -> dict[str, Any]:
    return tomllib.loads(text_of("pyproject.toml"))


# ---- imports and names ----------------------------------------------------------------------------------


def test_arrows_point_downward():
    allowed = {
        "runtime": {"runtime"},
        "calibration": {"runtime", "calibration"},
        "quantize": {"runtime", "calibration", "quantize"},
        "app.py": {"runtime"},
    }
    upward = [
        f"{path} imports {name}"
        for path in SOURCES
        for name in imported_modules(path)
        if (room := path.split("/")[0]) in allowed and name.split(".")[0] in OURS - allowed[room]
    ]
    assert not upward


def test_no_module_shadows_another():
    taken = (set(packages_distributions()) | set(sys.stdlib_module_names)) - OURS
    stems = {path: Path(path).stem for path in PACKAGED}
    assert not {path: stem for path, stem in stems.items() if stem in taken and stem != "__init__"}
    owners = {owner for room in ROOMS for owner in packages_distributions().get(room, [])}
    assert owners <= {"worldpm-kit"}


def test_what_is_imported_is_declared():
    declared = {canonicalize_name(Requirement(text).name) for text in configuration()["project"]["dependencies"]}
    imported = {name.split(".")[0] for path in PACKAGED for name in imported_modules(path)}
    brought_by = packages_distributions()
    foreign = {
        canonicalize_name(brought_by.get(name, [name])[0]) for name in imported - set(sys.stdlib_module_names) - OURS
    }
    assert foreign - declared == {
        "triton",  # torch brings it where there is CUDA, and it is imported only there
        "ray",  # an extra, imported only where it is asked for
    }
    assert declared - foreign <= {"accelerate"}  # transformers calls it to read bitsandbytes checkpoints


def test_packages_carry_their_data():
    """Every directory with modules is a listed package, every other file in one is package data."""
    setup = configuration()["tool"]["setuptools"]
    assert {str(Path(path).parent).replace("/", ".") for path in PACKAGED} <= set(setup["packages"])
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, patterns in setup["package-data"].items()
        for pattern in patterns
    ]
    data = [path for path in FILES if path.split("/")[0] in ROOMS and path not in PACKAGED]
    assert data
    assert not [path for path in data if not any(fnmatch(path, pattern) for pattern in patterns)]


def test_console_scripts_exist():
    for target in configuration()["project"]["scripts"].values():
        module, function = target.split(":")
        body = tree(module.replace(".", "/") + ".py").body
        assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_known_good_versions_are_in_range():
    """constraints.txt has a version of every direct dependency, and the ranges allow it."""
    lines = [line for line in text_of("constraints.txt").splitlines() if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in map(Requirement, lines)}
    assert pinned["torch"] == "2.13.0"
    project = configuration()["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    wanted = [Requirement(text) for text in (*project["dependencies"], *extras)]
    assert not [str(each) for each in wanted if canonicalize_name(each.name) not in pinned]
    assert not [str(each) for each in wanted if pinned[canonicalize_name(each.name)] not in each.specifier]


# ---- safety ---------------------------------------------------------------------------------------------


def test_no_package_registry_is_named():
    texts = {path: (ROOT / path).read_bytes().lower() for path in FILES if not path.endswith(".safetensors")}
    assert not [(path, host) for path, text in texts.items() for host in REGISTRY_HOSTS if host.encode() in text]


@pytest.mark.parametrize("path", PACKAGED)
def test_nothing_can_run_a_checkpoint_s_code(path: str):
    assert not {name for name in imported_modules(path) if name.split(".")[0] in UNPICKLERS}
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        assert ast.unparse(call.func) not in CODE_RUNNERS, f"{path}:{call.lineno}"
        flags = [keyword.value for keyword in call.keywords if keyword.arg in UNSAFE_FLAGS]
        assert all(ast.unparse(flag) == "False" for flag in flags), f"{path}:{call.lineno}"


# ---- legibility -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PACKAGED)
def test_public_names_have_docstrings(path: str):
    module = tree(path)
    kinds = (ast.ClassDef, ast.FunctionDef)
    public = [node for node in module.body if isinstance(node, kinds) and not node.name.startswith("_")]
    assert ast.get_docstring(module) or not module.body, f"{path} has no docstring"
    assert not [f"{path}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]


@pytest.mark.parametrize("path", SOURCES)
def test_files_and_functions_stay_short(path: str):
    longest = LONGEST_TEST_FILE if path.startswith("tests/") else LONGEST_FILE
    assert len(text_of(path).splitlines()) <= longest
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


# ---- README ---------------------------------------------------------------------------------------------


def test_readme_tree_is_the_tree():
    """Each line names a file or a pattern of files; each tracked file below the top is under exactly one."""
    lines = tree_lines()
    files = [path for path in FILES if ("/" in path or path.endswith(".py")) and Path(path).stem != "__init__"]
    described = {path: [line for line in lines if fnmatch(path, line)] for path in files}
    missing = [f"{path:<28} {first_words(path)}" for path, found in described.items() if not found]
    assert not missing, "the README's tree lacks:\n" + "\n".join(missing)
    assert not {path: found for path, found in described.items() if len(found) > 1}
    assert not [line for line in lines if not any(ROOT.glob(line))]


def tree_lines() -> list[str]:
    """Paths and patterns of the README's tree; indented ones lie in the directory above them."""
    block = next(text for text in blocks("text") if re.search(r"^runtime/ ", text, re.MULTILINE))
    lines, directory = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            lines.append(directory + name)
        elif name.endswith("/"):
            directory = name
        else:
            lines.append(name)
    return lines


def first_words(path: str) -> str:
    return (ast.get_docstring(tree(path)) or "").partition("\n")[0] if path.endswith(".py") else ""


def test_readme_names_real_files():
    """Every script and document in its prose and commands is there, or is one that a job makes."""
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    words = " ".join([*re.findall(r"`([^`\n]+)`", prose), *blocks("bash"), *blocks("console")]).split()
    named = {word for word in words if re.fullmatch(r"[\w./-]+\.(py|md|txt|toml)|\.ci/run", word)}
    assert {"quantize/run.py", "constraints.txt"} <= named
    assert not [path for path in named if not (ROOT / path).is_file()]


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert links
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def test_readme_commands_are_understood():
    """Every quantizing command in it is one that the parser takes."""
    lines = "\n".join([*blocks("bash"), *blocks("console")])
    commands = re.findall(r"quantize/run\.py (.*)", lines)
    assert len(commands) >= 4
    for command in commands:
        parse(shlex.split(command, comments=True))


def test_readme_scoring_commands_are_understood():
    commands = re.findall(r"runtime\.score ([^|>\n]*)", "\n".join(blocks("bash")))
    assert len(commands) >= 2
    for command in commands:
        score_arguments.parse(shlex.split(command))


@pytest.mark.parametrize(("name", "arguments"), [("parity", parity_arguments), ("bench", bench_arguments)])
def test_readme_runtime_commands_are_understood(name, arguments):
    commands = re.findall(rf"runtime\.{name} (.*)", "\n".join(blocks("bash")))
    assert commands
    for command in commands:
        arguments.parse(shlex.split(command))


def test_readme_serving_commands_are_understood():
    commands = re.findall(r"app\.py ?(.*)", "\n".join(blocks("bash")))
    assert len(commands) >= 2
    for command in commands:
        serve_arguments.parse(shlex.split(command))


def test_readme_plan_is_current(monkeypatch: pytest.MonkeyPatch):
    """The plan of the 72B in it is what `--dry-run` prints, but for measured time and estimated tokens."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)  # each holds memory of its own
    command, table = next(text for text in blocks("console") if "--dry-run" in text).split("\n", 1)
    arguments = parse([*shlex.split(command.partition("quantize/run.py")[2]), "--device", "cpu"])
    plan = plan_without_weights(arguments, arguments.model)
    current = dict(plan_rows(plan, arguments.model, arguments.output))
    shown = {name.strip(): text.strip() for name, text in re.findall("│(.*?)│(.*?)│", table)}
    elsewhere = {"time": "", "tokens": ""}
    assert shown | elsewhere == current | elsewhere, "run the command again, with COLUMNS=118"


def test_ci_runs_the_readme_s_test_command():
    """The script's own extraction, run here, gives the README's second command."""
    extraction = re.search(r"test_command=\$\((.*?README\.md)\)", text_of(".ci/run"), re.DOTALL)
    assert extraction
    found = subprocess.run(["bash", "-c", extraction[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == blocks("bash")[1]
    assert "'.[test]'" in found.stdout and "pytest" in found.stdout
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
