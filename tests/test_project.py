"""The project's own configuration: packaging, dependencies, sizes, and names that no linter checks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "calibration", "quantize")
OURS = {*PACKAGES, "app", "tests", "benchmarks"}
LONGEST_FILE, LONGEST_SCRIPT, LONGEST_FUNCTION, MODULES_IN_A_FOLDER = 255, 450, 52, 15
SERVE_ONLY = ("fastapi", "gradio", "gradio_client", "prometheus_client", "starlette", "uvicorn")
# Written in halves, because this file is searched too.
REGISTRY_HOSTS = ("pypi" + ".org", "python" + "hosted", "npm" + "js", "download." + "pytorch")


@cache
def project_files() -> list[str]:
    """Paths of the source tree: git's list, or in an unpacked archive every file that no tool made."""
    try:
        git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
        return sorted(path for path in git.stdout.split("\0") if (ROOT / path).is_file())
    except (OSError, subprocess.CalledProcessError):
        generated = re.compile(r"__pycache__|output|build|dist|.*\.egg-info|\.(?!ci$).*")
        paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if not any(map(generated.fullmatch, path.parts[:-1])))


def sources(*folders: str) -> list[str]:
    """Python files below `folders`, or all."""
    return [path for path in project_files() if path.endswith(".py") and (not folders or path.split("/")[0] in folders)]


@cache
def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def imports(path: str) -> Iterator[str]:
    """Top-level names of everything a file imports, anywhere in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield (node.module or "").split(".")[0]


def configuration() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(*extras: str) -> dict[str, Requirement]:
    project = configuration()["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    return {canonicalize_name(each.name): each for each in map(Requirement, texts)}


def test_no_module_has_the_name_of_a_dependency():
    taken = set(packages_distributions()) - OURS
    assert not [path for path in sources(*PACKAGES) if Path(path).stem in taken and Path(path).stem != "__init__"]


def test_every_import_is_declared_and_every_requirement_imported():
    declared = set(requirements("serve"))
    distributions = packages_distributions()
    imported = {name for path in sources(*PACKAGES) for name in imports(path)} - set(sys.stdlib_module_names) - OURS
    foreign = {canonicalize_name(distributions.get(name, [name])[0]) for name in imported}
    assert foreign - declared == {
        "triton",  # torch installs it with CUDA; it is imported only there
        "ray",  # an extra; imported only with --engine ray
    }
    assert not declared - foreign


@pytest.mark.slow
def test_quantizing_and_scoring_need_no_serve_extra():
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({SERVE_ONLY}))\n"
        "import quantize.run, quantize.export, runtime.score, runtime.parity, runtime.evaluate, runtime.trl, "
        "runtime.bench.__main__"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.slow
def test_serving_without_the_extra_names_it():
    program = f"import sys; sys.modules.update(dict.fromkeys({SERVE_ONLY}))\nimport runtime.serve"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "[serve]" in done.stderr


def test_packages_contain_their_data_files():
    data_patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, patterns in configuration()["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
    ]
    folders = {str(Path(path).parent) for path in sources(*PACKAGES)}
    assert not [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
    data = [path for path in project_files() if path.split("/")[0] in PACKAGES and not path.endswith(".py")]
    assert data
    assert not [path for path in data if not any(fnmatch(path, pattern) for pattern in data_patterns)]


def test_console_scripts_exist():
    for target in configuration()["project"]["scripts"].values():
        module, function = target.split(":")
        body = tree(module.replace(".", "/") + ".py").body
        assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_constraints_are_within_the_declared_ranges():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in map(Requirement, lines)}
    assert pinned["torch"] == "2.13.0"
    wanted = requirements(*configuration()["project"]["optional-dependencies"])
    wanted.pop("worldpm-kit")
    assert not [name for name in wanted if name not in pinned]
    assert not [name for name, each in wanted.items() if pinned[name] not in each.specifier]


def test_no_package_registry_is_named():
    texts = {path: (ROOT / path).read_bytes().lower() for path in project_files() if not path.endswith(".safetensors")}
    assert not [(path, host) for path, text in texts.items() for host in REGISTRY_HOSTS if host.encode() in text]


def test_no_call_can_run_foreign_code():
    """Beside ruff's rules: builtins and flags that it does not know."""
    unsafe = []
    for path in sources(*PACKAGES):
        for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            flags = {word.arg: ast.unparse(word.value) for word in call.keywords}
            enabled = [
                name for name in ("trust_remote_code", "allow_pickle", "shell") if flags.get(name, "False") != "False"
            ]
            if enabled or ast.unparse(call.func) in ("compile", "__import__"):
                unsafe.append(f"{path}:{call.lineno}")
    assert not unsafe


def test_the_app_uses_only_runtime():
    assert {name for name in imports("app.py") if name in OURS} == {"runtime"}


def test_files_functions_and_folders_stay_small():
    too_long = []
    for path in sources():
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > (LONGEST_FILE if path.split("/")[0] in PACKAGES else LONGEST_SCRIPT):  # tests and benchmarks
            too_long.append(f"{path}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    too_long.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    assert not too_long
    modules = [Path(path) for path in sources(*PACKAGES) if Path(path).stem != "__init__"]
    counts = {str(each.parent): sum(other.parent == each.parent for other in modules) for each in modules}
    assert not {folder: count for folder, count in counts.items() if count > MODULES_IN_A_FOLDER}
