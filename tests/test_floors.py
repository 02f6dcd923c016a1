"""The floors of the house: imports go down only, and each heavy library has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("srd_lab", "attacks", "apop")

# A module takes the floor of its longest prefix here. Rooms on one floor do not know each other.
FLOORS = {
    "srd_lab.types": 0,
    "srd_lab.runtime": 0.5,  # raises the errors of types
    "srd_lab.checks": 0.6,
    "srd_lab.calls": 0.6,
    "srd_lab.notes": 0.6,
    "srd_lab.affine": 0.7,
    "srd_lab.intercept": 1,
    "srd_lab.maps": 1,
    "srd_lab.models": 1,
    "srd_lab.data": 1,
    "srd_lab.render": 1,
    "srd_lab.environment": 0.3,
    "srd_lab.catalogue": 0,
    "srd_lab.store": 0.6,
    "srd_lab.tracking": 1,
    "srd_lab.rules": 2,
    "apop.pattern": 2,
    "srd_lab.backprop": 3,
    "srd_lab.layout": 3.2,
    "srd_lab.held": 3.3,
    "srd_lab.recompute": 3.3,
    "srd_lab.level": 3.3,
    "srd_lab.modified": 3.5,
    "srd_lab.encoder": 3.5,
    "srd_lab.methods.cam": 3.9,  # the layer, which those by passes take too
    "srd_lab.methods.smoothed": 3.8,  # a wrapper round any method; certificates need it too
    "srd_lab.methods": 4,
    "srd_lab.metrics.similarity": 3.8,
    "srd_lab.metrics.explained": 3.8,
    "srd_lab.metrics": 4,
    "srd_lab.registry": 5,
    "attacks.thresholds": 0,
    "attacks.budget": 1,
    "attacks.scores": 4,
    "attacks.statistics": 4.5,
    "attacks.surrogate": 5,
    "attacks.objective": 5,
    "attacks.optimiser": 5,
    "attacks.branch": 2,
    "attacks.certificates": 5,
    "attacks.model_objective": 5,
    "attacks.model_compare": 5.2,
    "attacks.model_manipulation": 5.4,
    "attacks.model_tables": 5,
    "attacks.model_study": 6.8,
    "attacks.backdoor": 5,
    "attacks.attack": 5.5,
    "attacks.black_box": 6,
    "apop.experiment": 5,
    "attacks.manipulation": 6,
    "attacks.experiment": 6.5,
    "srd_lab.options": 6.5,
    "srd_lab.command": 6.6,
    "srd_lab.batches": 6.7,
    "attacks.certified": 6,
    "attacks.judge": 6.2,
    "attacks.ensemble": 6.3,
    "attacks.probe": 6.3,
    "attacks.gates": 6.5,
    "attacks.flags": 6.5,
    "attacks.robustness_experiment": 6.75,
    "attacks.pair_study": 6.75,
    "attacks.manipulation_study": 6.8,
    "attacks.robustness_report": 6.8,
    "attacks.entry": 6.85,
    "attacks.verification": 6.9,
    "attacks.leaderboard": 6.9,
    "attacks.robustness_study": 6.9,
    "apop.study": 6.8,
    "srd_lab.evaluation": 6.9,
    "srd_lab.evaluation.tables": 6.75,
    "srd_lab.evaluation.experiment": 6.75,
    "srd_lab.evaluation.study": 6.8,
    "srd_lab.evaluation.cli": 7,
    "srd_lab.reproduce": 7.2,
    "attacks.options": 6.95,
    "attacks.cli": 7,
    "apop.cli": 7,
    "srd_lab.cli": 8,
}
# Packages' own __init__ say what is public, and load it when asked for; all may be imported from anywhere.
LAZY = ("srd_lab", "attacks", "apop", "srd_lab.methods", "srd_lab.metrics")
# library: the modules that may import it
DOORS = {
    "mlflow": ("srd_lab.store",),
    "matplotlib": ("srd_lab.render",),
    "PIL": ("srd_lab.render", "srd_lab.data"),
    "safetensors": ("srd_lab.models", "attacks.model_compare"),
}
START = ("torch", "torchvision", "numpy", "scipy", "skimage", "mlflow", "matplotlib", "PIL")


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))}


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def floor_of(module: str) -> float:
    known = [prefix for prefix in FLOORS if within(module, prefix)]
    assert known, f"{module} is new: give it a floor in tests/test_floors.py"
    return FLOORS[max(known, key=len)]


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


def test_every_module_has_a_floor() -> None:
    assert len(FILES) > 20
    for module in FILES:
        if module not in LAZY:
            floor_of(module)
    gone = [prefix for prefix in FLOORS if not any(within(module, prefix) for module in FILES)]
    assert not gone, f"no longer there, so take them from FLOORS: {gone}"


def test_a_module_without_a_floor_is_noticed() -> None:
    with pytest.raises(
        AssertionError, match=r"srd_lab\.attic is new: give it a floor in tests/test_floors\.py"
    ):
        floor_of("srd_lab.attic")


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    ours = [(line, name) for line, name in imports(module) if name.split(".")[0] in PACKAGES]
    if module in LAZY:
        assert not ours, (
            f"{module} loads what is asked for, lazily; import only under TYPE_CHECKING, not {ours}"
        )
        return
    for line, name in ours:
        where = f"{FILES[module].relative_to(ROOT)}:{line}"
        assert name in FILES, f"{where} imports {name}, which is not a module"
        if name in LAZY:
            raise AssertionError(f"{where} imports from {name}; name the module that defines it")
        package = module.rpartition(".")[0] if module.count(".") > 1 else module
        neighbours = within(name, package) and package.count(".") == 1
        assert neighbours or floor_of(name) < floor_of(module), (
            f"{where}: {module} on floor {floor_of(module):g} imports {name} on floor {floor_of(name):g}"
        )


def test_nobody_imports_the_composition_root() -> None:
    for module in FILES:
        assert "srd_lab.cli" not in [name for _, name in imports(module)], module


@pytest.mark.parametrize("library", DOORS)
def test_each_heavy_library_has_one_door(library: str) -> None:
    users = {module for module in FILES for _, name in imports(module) if within(name, library)}
    assert users, f"nobody imports {library}; take it from DOORS"
    strangers = [m for m in users if not any(within(m, door) for door in DOORS[library])]
    assert not strangers, f"only {DOORS[library]} import {library}, but so do {strangers}"


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Floors forbid it between rooms; this also looks inside them."""
    edges = {module: {name for _, name in imports(module) if name in FILES} for module in FILES}
    done: set[str] = set()
    while ready := {module for module, below in edges.items() if module not in done and below <= done}:
        done |= ready
    assert not set(FILES) - done


def test_the_command_line_starts_without_heavy_libraries() -> None:
    code = (
        f"import sys, srd_lab, attacks, apop, srd_lab.cli; print(sorted(set(sys.modules) & set({START!r})))"
    )
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
