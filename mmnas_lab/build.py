"""From configuration to objects: every node is checked against the constructor that it names, then built."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmnas_lab.config import Config, Node
from mmnas_lab.types import InputError

GROUPS = ("dataset", "backbone", "search_space", "objective", "strategy")
OBJECTIVES = ("encoder_pretrain", "pretrain", "train")
"""Stages with an objective of their own."""
MARKS = ("_target_", "_partial_")
"""Keys of a node that are no arguments: its constructor, and whether that waits for more of them."""


def near(name: str, valid: Iterable[str]) -> str:
    """The nearest valid names as the end of a message."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"valid are: {', '.join(names)}"


def check_config(values: Mapping[str, Any]) -> Config:
    """The configuration with all its types.

    Raises:
        InputError: an unknown key, a wrong type or an impossible value anywhere, with the nearest valid ones.
    """
    config = _validated(values)
    if not 0 < config.labelled_share <= 1:
        raise InputError(
            f"labelled_share must be in (0, 1], got {config.labelled_share:g}: the classifier needs at least "
            "one labelled sample; to run only the label-free stages set stages=[features,search,pretrain]"
        )
    for group in GROUPS:
        check_node(getattr(config, group), group)
    for path, node in _nodes_of_stages(config).items():
        check_node(node, path)
    return config


def _nodes_of_stages(config: Config) -> dict[str, Node]:
    """Nodes with a `_target_` that a stage's settings hold, by their path."""
    objectives = {f"{name}.objective": getattr(config, name).objective for name in OBJECTIVES}
    return objectives | {
        f"search.regularisers.{name}.function": regulariser.function
        for name, regulariser in config.search.regularisers.items()
    }


def check_schema(values: Mapping[str, Any]) -> None:
    """Refuse unknown keys and wrong types without importing any class: of a node, only names are compared.

    Raises:
        InputError: as `check_config`.
    """
    config = _validated(values)
    nodes = {group: getattr(config, group) for group in GROUPS}
    for path, node in {**nodes, **_nodes_of_stages(config)}.items():
        _check_names(node, path)


def _check_names(node: Node, path: str) -> None:
    names = parameter_names(node["_target_"]) if "_target_" in node else None
    for name, value in node.items():
        for inner, within in _nodes_within(value, f"{path}.{name}"):
            _check_names(within, inner)
        is_node = isinstance(value, Mapping) and "_target_" in value
        if not is_node and names is not None and name not in (*MARKS, *names):
            raise InputError(f"unknown key '{path}.{name}'; {near(name, names)}")


def _nodes_within(value: Any, path: str) -> Iterator[tuple[str, Node]]:
    """The outermost nodes with a `_target_` in a value, at any depth, by their paths."""
    if not isinstance(value, Mapping):
        return
    if "_target_" in value:
        yield path, dict(value)
        return
    for name, inner in value.items():
        yield from _nodes_within(inner, f"{path}.{name}")


def parameter_names(target_name: str) -> list[str] | None:
    """Names that a `_target_` takes, read from its source; None where it takes any, or is not found."""
    module, _, name = target_name.rpartition(".")
    try:
        spec = importlib.util.find_spec(module)
        assert spec is not None
        tree = ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))
    except (ImportError, ValueError, AssertionError, OSError, SyntaxError):
        return None
    for item in tree.body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return _argument_names(item.args)
        if isinstance(item, ast.ClassDef) and item.name == name:
            for method in item.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    names = _argument_names(method.args)
                    return names and names[1:]
    return None


def _argument_names(arguments: ast.arguments) -> list[str] | None:
    if arguments.kwarg is not None:
        return None
    return [argument.arg for argument in [*arguments.args, *arguments.kwonlyargs]]


def _validated(values: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(_explain(problem, values) for problem in error.errors())) from None


def _explain(problem: Any, values: Mapping[str, Any]) -> str:
    """One line for one pydantic error."""
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        model: Any = Config
        for part in problem["loc"][:-1]:
            if typing.get_origin(model) is dict:  # models by name
                model = typing.get_args(model)[1]
            else:
                model = model.model_fields[part].annotation
        return f"unknown key '{path}'; {near(str(problem['loc'][-1]), model.model_fields)}"
    if problem["type"] == "missing":
        return f"'{path}' is not set; set it on the command line or in the configuration"
    if problem["type"] == "literal_error":
        options = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"{path}={problem['input']}: no such option; {near(str(problem['input']), options)}"
    return f"{path}={problem['input']}: {problem['msg']}"


def check_node(node: Node, path: str) -> None:
    """Compare a node with the constructor of its `_target_`: names, options and types of all arguments.

    Raises:
        InputError: naming the argument and the nearest valid ones.
    """
    constructor = target(node, path)
    parameters = inspect.signature(constructor).parameters
    hints = typing.get_type_hints(constructor.__init__) if inspect.isclass(constructor) else {}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name, value in node.items():
        if name in MARKS:
            continue
        for inner, within in _nodes_within(value, f"{path}.{name}"):
            check_node(within, inner)
        if isinstance(value, Mapping) and "_target_" in value:
            continue
        if name not in parameters:
            if open_ended:
                raise InputError(f"{path}.{name} needs a _target_, got {value!r}")
            raise InputError(f"unknown key '{path}.{name}'; {near(name, parameters)}")
        if name in hints:
            _check_value(value, hints[name], f"{path}.{name}")


def _check_value(value: Any, hint: Any, path: str) -> None:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "literal_error":
            options = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
            raise InputError(f"{path}={value}: no such option; {near(str(value), options)}") from None
        raise InputError(f"{path}={value}: {problem['msg']}") from None


def target(node: Node, path: str) -> Any:
    """The constructor that a node names."""
    from hydra.utils import get_object

    if "_target_" not in node:
        raise InputError(
            f"{path} has no _target_; choose one with {path}=<name> ({path} is a group of conf/)"
        )
    try:
        return get_object(node["_target_"])
    except Exception as error:
        raise InputError(f"{path}._target_={node['_target_']} cannot be imported: {error}") from None


def build(node: Node, path: str, **facts: Any) -> Any:
    """The object of a checked node; `facts` are arguments that other objects hand forward.

    Raises:
        InputError: what the constructor itself refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, _convert_="all", **facts)
    except InstantiationException as error:
        cause = error.__cause__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__cause__
        if cause is not None:
            raise InputError(str(cause)) from None
        raise InputError(f"{path} cannot be built: {error.__cause__ or error}") from error


def build_with_facts(node: Node, path: str, facts: Mapping[str, Any]) -> Any:
    """The object of a checked node that holds others; each constructor is handed the facts that it names.

    Nodes deeper in a mapping stay as they are: a search space builds its candidates when it needs them.
    A node with `_partial_` becomes a constructor that waits for the rest of its arguments.

    Raises:
        InputError: what a constructor refuses.
    """
    constructor = target(node, path)
    given = {
        name: build_with_facts(dict(value), f"{path}.{name}", facts)
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for name, value in node.items()
        if name not in MARKS
    }
    named = {name: facts[name] for name in inspect.signature(constructor).parameters if name in facts}
    if node.get("_partial_"):
        return partial(constructor, **{**named, **given})
    try:
        return constructor(**{**named, **given})
    except TypeError as error:
        raise InputError(f"{path} cannot be built: {error}") from error
