import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mmnas_lab"

# Upstream first. A module may import from its own room and from the rooms above it.
ORDER = [
    "types",
    "randomness",
    "native",
    "config",
    "build",
    "distributed",
    "stage",
    "dataset",
    "search_space.base",
    "backbone",
    "search_space",
    "objective",
    "loader",
    "training",
    "testing",
    "encoder_training",
    "score_store",
    "strategy",
    "record",
    "study_rows",
    "report",
    "data",
    "fits",
    "experiment",
    "baselines",
    "predict",
    "export",
    "runner",
    "study",
    "cli",
]


def room(module: str) -> int:
    """Place in the order of the longest entry that a module lies in."""
    fitting = [entry for entry in ORDER if module == entry or module.startswith(f"{entry}.")]
    assert fitting, f"mmnas_lab.{module} has no place in the order"
    return ORDER.index(max(fitting, key=len))


def modules() -> dict[str, Path]:
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, within functions too, but not for types alone."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("mmnas_lab."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "mmnas_lab":
                found.update(f"mmnas_lab.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("mmnas_lab."):
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name.removeprefix("mmnas_lab.") for name in found}


def test_the_walk_found_some():
    assert len(modules()) > 30
    assert "stage" in imports(PACKAGE / "experiment.py")


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_upstream(module):
    downstream = [name for name in imports(modules()[module]) if room(name) > room(module)]
    assert not downstream, f"mmnas_lab.{module} imports downstream: {downstream}"


def test_no_room_imports_in_a_circle():
    list(TopologicalSorter({name: imports(path) for name, path in modules().items()}).static_order())


def test_packages_hold_a_docstring_only():
    for path in PACKAGE.rglob("__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1, path
        assert ast.get_docstring(ast.parse(path.read_text())), path
