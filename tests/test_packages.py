"""The packages of the project: imports go down only, and each heavy library has one importer."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DISTRIBUTED = ("srd_lab", "attacks", "apop")

# From the ground up: what each may import, besides itself and the ground.
GROUND = {
    f"srd_lab.{name}"
    for name in (
        "conditions",
        "errors",
        "types",
        "runtime",
        "maps",
        "logits",
        "normalise",
        "overflow",
        "catalogue",
        "fields",
        "parts",
    )
}
METHODS = {"srd_lab.engine", "srd_lab.methods", "srd_lab.metrics", "srd_lab.registry"}
INPUTS = {"srd_lab.data", "srd_lab.models", "srd_lab.render"}
EXPERIMENTS = METHODS | INPUTS | {"srd_lab.runs"}
STUDIES = EXPERIMENTS | {"attacks", "apop", "srd_lab.evaluation"}
MAY_IMPORT: dict[str, set[str]] = {
    "srd_lab.render": set(),
    "srd_lab.data": set(),
    "srd_lab.models": set(),
    "srd_lab.engine": set(),
    "srd_lab.methods": {"srd_lab.engine"},
    "srd_lab.metrics": set(),
    "srd_lab.registry": {"srd_lab.engine", "srd_lab.methods", "srd_lab.metrics"},
    "srd_lab.adapters": {"srd_lab.registry"},
    "srd_lab.runs": {"srd_lab.data", "srd_lab.models", "srd_lab.render"},
    "attacks": EXPERIMENTS,
    "apop": EXPERIMENTS,
    "srd_lab.evaluation": EXPERIMENTS,
    "srd_lab.reproduce": STUDIES,
    "srd_lab.cli": STUDIES | {"srd_lab.reproduce"},
    "srd_lab.__main__": {"srd_lab.cli"},
    "srd_lab.api": STUDIES,
}
# Packages' own __init__ say what is public, and load it when asked for; all may be imported from anywhere.
LAZY = ("srd_lab", "attacks", "apop", "srd_lab.methods", "srd_lab.metrics")
# library: what may import it
IMPORTERS = {
    "mlflow": ("srd_lab.runs",),
    "matplotlib": ("srd_lab.render",),
    "PIL": ("srd_lab.render", "srd_lab.data"),
    "ray": ("srd_lab.runs.on_ray",),
    "safetensors": ("srd_lab.models", "attacks.model_compare"),
}
START = ("torch", "torchvision", "numpy", "scipy", "skimage", "mlflow", "matplotlib", "PIL", "ray")


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for package in DISTRIBUTED for file in sorted((ROOT / package).rglob("*.py"))}


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def package_of(module: str) -> str:
    """The package of a module, as the table has it; a module of the ground by itself."""
    known = [prefix for prefix in (*MAY_IMPORT, *GROUND) if within(module, prefix)]
    assert known, f"{module} is new: give its package a line in tests/test_packages.py"
    return known[0]


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, list[str]]]:
    """(line, possible modules) of every import that can run, in functions too; ``from a import b`` may mean a or a.b."""
    for child in ast.iter_child_nodes(node):
        if only_for_types(child):
            assert isinstance(child, ast.If)
            yield from statements(ast.Module(child.orelse, []), module, is_package)
        elif isinstance(child, ast.Import):
            yield from ((child.lineno, [alias.name]) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parts = module.split(".")
                kept = parts[: len(parts) - child.level + is_package]
                base = ".".join([*kept, *([base] if base else [])])
            yield from ((child.lineno, [f"{base}.{alias.name}", base]) for alias in child.names)
        else:
            yield from statements(child, module, is_package)


def imports(module: str) -> list[tuple[int, str]]:
    """(line, imported module), ours by the file that it is in."""
    file = FILES[module]
    found = []
    for line, candidates in statements(
        ast.parse(file.read_text("utf-8")), module, file.name == "__init__.py"
    ):
        found.append((line, next((name for name in candidates if name in FILES), candidates[-1])))
    return found


def test_every_module_is_in_a_package_of_the_table() -> None:
    assert len(FILES) > 20
    for module in FILES:
        if module not in LAZY:
            package_of(module)
    gone = [
        prefix for prefix in (*MAY_IMPORT, *GROUND) if not any(within(module, prefix) for module in FILES)
    ]
    assert not gone, f"no longer there, so take them from the table: {gone}"


def test_a_module_outside_the_table_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"srd_lab\.attic is new: give its package a line"):
        package_of("srd_lab.attic")


def test_the_table_has_no_circles() -> None:
    done: set[str] = set()
    while ready := {
        package for package, below in MAY_IMPORT.items() if package not in done and below <= done
    }:
        done |= ready
    assert done == set(MAY_IMPORT)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    ours = [(line, name) for line, name in imports(module) if name.split(".")[0] in DISTRIBUTED]
    if module in LAZY:
        assert not ours, (
            f"{module} loads what is asked for, lazily; import only under TYPE_CHECKING, not {ours}"
        )
        return
    package = package_of(module)
    allowed = GROUND | {package} | MAY_IMPORT.get(package, set())
    for line, name in ours:
        where = f"{FILES[module].relative_to(ROOT)}:{line}"
        assert name in FILES, f"{where} imports {name}, which is not a module"
        assert name not in LAZY, f"{where} imports from {name}; name the module that defines it"
        assert package_of(name) in allowed, f"{where}: {package} may not import {name}"


PACKAGES = [module for module, file in FILES.items() if file.name == "__init__.py" and module != "srd_lab"]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_what_it_imports_and_where_to_begin(package: str) -> None:
    said = " ".join((ast.get_docstring(ast.parse(FILES[package].read_text("utf-8"))) or "").split())
    imported = re.search(r"[^.]*\bimport[^.]*", said)
    assert imported, f"{package} does not say what it imports"
    assert re.search(r"\bBegin with\b", said), f"{package} does not say where a newcomer begins"
    named = re.findall(r":mod:`([\w.]+)`", said)
    assert not [module for module in named if module not in FILES], (
        f"{package} names modules that are not there"
    )


def test_nobody_imports_the_composition_root() -> None:
    for module in FILES:
        if not within(module, "srd_lab.cli") and module != "srd_lab.__main__":
            assert not [name for _, name in imports(module) if within(name, "srd_lab.cli")], module


@pytest.mark.parametrize("library", IMPORTERS)
def test_each_heavy_library_has_one_importer(library: str) -> None:
    users = {module for module in FILES for _, name in imports(module) if within(name, library)}
    assert users, f"nobody imports {library}; take it from IMPORTERS"
    strangers = [m for m in users if not any(within(m, importer) for importer in IMPORTERS[library])]
    assert not strangers, f"only {IMPORTERS[library]} import {library}, but so do {strangers}"


def test_modules_do_not_import_each_other_in_circles() -> None:
    """The table forbids it between packages; this also looks inside them."""
    edges = {module: {name for _, name in imports(module) if name in FILES} for module in FILES}
    done: set[str] = set()
    while ready := {module for module, below in edges.items() if module not in done and below <= done}:
        done |= ready
    assert not set(FILES) - done


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = f"import sys, srd_lab, attacks, apop, srd_lab.cli.main; print(sorted(set(sys.modules) & set({START!r})))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_walk_sees_every_way_to_import() -> None:
    source = """
import a.b
from . import beside
from .beside import thing
from ..up import other
if TYPE_CHECKING:
    import hidden
else:
    import shown
def f():
    try:
        from deep import down
    finally:
        import last as least
"""
    found = [names for _, names in statements(ast.parse(source), "top.sub.here", False)]
    assert found == [
        ["a.b"],
        ["top.sub.beside", "top.sub"],
        ["top.sub.beside.thing", "top.sub.beside"],
        ["top.up.other", "top.up"],
        ["shown"],
        ["deep.down", "deep"],
        ["last"],
    ]
    package = [names for _, names in statements(ast.parse("from . import x"), "top.sub", True)]
    assert package == [["top.sub.x", "top.sub"]]
