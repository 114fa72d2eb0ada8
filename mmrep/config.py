"""Typed configuration, validated where YAML or JSON enters and nowhere else.

A config is a frozen, keyword-only dataclass beside the class that it builds. A field that holds another component is
annotated ``Annotated[Component, Of("encoders")]``; in YAML it is a mapping with ``type: <registered name>`` and that
component's own fields. Leaf values are validated by pydantic, so ``1e-3`` (a string in YAML 1.1) becomes a float and
``Annotated[float, Field(gt=0)]`` is enforced.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, Union, cast, dataclass_transform, get_args, get_origin

import pydantic
import yaml

from mmrep.registry import REGISTRIES, DuplicateNameError, MissingPackageError, Registry, UnknownNameError, near

T = TypeVar("T")


class ConfigError(ValueError):
    """One or more wrong values; each line names the path, the value, what is allowed and the near match."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass: the form of every config in the library."""
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True)
class Of:
    """Says which registry a `Component` field is chosen from, by the last part of its group: ``"encoders"``."""

    registry: str

    def resolve(self) -> Registry:
        """Return the registry itself."""
        return REGISTRIES[self.registry]


@dataclass(frozen=True)
class Component:
    """A registered name and its validated config: a component that is chosen but not yet built.

    Attributes:
        registry: which registry the name belongs to, such as ``"encoders"``.
        type: the registered name.
        config: an instance of the component class's ``Config``.
    """

    registry: str
    type: str
    config: Any

    @property
    def cls(self) -> Any:
        """The component's class."""
        return REGISTRIES[self.registry].get(self.type)

    def build(self, *args: Any, **runtime: Any) -> Any:
        """Build the component from its config and runtime objects (never from more configuration)."""
        return self.cls(self.config, *args, **runtime)


def component(registry: str, type: str, **fields: Any) -> Component:
    """Choose a component in Python: ``component("encoders", "image-vit", width=64)``, validated as YAML is."""
    return _component(Of(registry), {"type": type, **fields}, "")


def parse(cls: type[T], data: Any, path: str = "") -> T:
    """Build the dataclass ``cls`` from plain YAML/JSON data.

    Args:
        cls: a config dataclass.
        data: nested dicts, lists and scalars.
        path: where ``data`` sits in its file, for messages.

    Raises:
        ConfigError: unknown or missing keys, wrong values, unknown component names; all problems at once.
    """
    if dataclasses.is_dataclass(data) and isinstance(data, cls):
        return data
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ConfigError([f"{path or 'config'}: expected a mapping, got {data!r}"])
    data = cast("Mapping[str, Any]", data)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in fields:
            hint = near(str(key), fields)
            problems.append(f"{_join(path, str(key))}: unknown{hint or '.'} Allowed: {', '.join(fields) or 'nothing'}")
            continue
        try:
            values[key] = _value(hints[key], value, _join(path, key))
        except ConfigError as error:
            problems.extend(error.problems)
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in data:
            problems.append(f"{_join(path, name)}: required but missing")
    if problems:
        raise ConfigError(problems)
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # raised by the dataclass's own __post_init__: a rule between fields
        raise ConfigError([f"{path or 'config'}: {error}"]) from error


def dump(value: Any) -> Any:
    """Turn a config back into plain data that `parse` reads to an equal config."""
    if isinstance(value, Component):
        return {"type": value.type, **dump(value.config)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: dump(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: dump(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple, frozenset, set)):
        return [dump(v) for v in cast("list[Any]", value)]
    return value


def merge(base: Any, changes: Any) -> Any:
    """Lay ``changes`` over ``base``: mappings merge key by key, anything else replaces.

    A mapping whose ``type`` differs from the base's replaces it whole, since the old component's fields mean nothing
    to the new one.
    """
    if isinstance(base, str) and isinstance(changes, Mapping) and "type" not in changes:
        base = {"type": base}  # a component written as its bare name
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return cast(Any, changes)
    old, new = cast("Mapping[str, Any]", base), cast("Mapping[str, Any]", changes)
    if "type" in new and new["type"] != old.get("type", new["type"]):
        return dict(new)
    return {**old, **{k: merge(old[k], v) if k in old else v for k, v in new.items()}}


def override(data: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Apply one ``a.b[0].c=value`` from the command line; the value is read as YAML.

    Raises:
        ConfigError: no ``=``, an index outside a list, or a path through a scalar.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError([f"{assignment!r}: write an override as path.to.key=value"])
    keys = [int(k) if k.isdigit() else k for k in re.split(r"[.\[\]]+", path.strip("]")) if k]
    return _assign(data, keys, yaml.safe_load(text), path)


def _assign(node: Any, keys: list[int | str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node, list):
        items = cast("list[Any]", node)
        if not isinstance(key, int) or key >= len(items):
            raise ConfigError([f"{path}: {key!r} is not an index of a list of {len(items)}"])
        return [_assign(item, rest, value, path) if i == key else item for i, item in enumerate(items)]
    if isinstance(node, str) and isinstance(key, str):
        node = {"type": node}  # a component written as its bare name
    if node is None or isinstance(node, Mapping):
        mapping = cast("Mapping[Any, Any]", node or {})
        changed = _assign(mapping.get(key), rest, value, path)
        if key == "type" and mapping.get("type") not in (None, value):
            return {"type": value}
        return {**mapping, key: changed}
    raise ConfigError([f"{path}: {key!r} is asked of {node!r}, which has no parts"])


def _value(hint: Any, value: Any, path: str) -> Any:
    """Validate one value against one type hint, descending into components and nested configs."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        of = next((a for a in hint.__metadata__ if isinstance(a, Of)), None)
        if of is not None:
            return _container(args[0], value, path, lambda v, p: _component(of, v, p))
    if _mentions_config(hint):
        return _container(hint, value, path, None)
    return _leaf(hint, value, path)


def _container(hint: Any, value: Any, path: str, item: Callable[[Any, str], Any] | None) -> Any:
    """Descend through Optional, list, tuple and dict down to configs (or to components, when ``item`` is given)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _container(next(a for a in args if a is not type(None)), value, path, item)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError([f"{path}: expected a list, got {value!r}"])
        parts = _collect(
            {i: v for i, v in enumerate(cast("list[Any]", value))},
            lambda v, i: _container(args[0], v, f"{path}[{i}]", item),
        )
        return tuple(parts.values()) if origin is tuple else list(parts.values())
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError([f"{path}: expected a mapping of names, got {value!r}"])
        return _collect(
            dict(cast("Mapping[str, Any]", value)), lambda v, k: _container(args[1], v, _join(path, str(k)), item)
        )
    if origin is Annotated:
        if any(isinstance(a, Of) for a in hint.__metadata__):
            return _value(hint, value, path)
        found = _container(args[0], value, path, item)
        # A rule on the container itself, such as its least length; what is in it has been validated.
        _leaf(Annotated[get_origin(args[0]) or Any, *hint.__metadata__], found, path)
        return found
    if item is not None:
        return item(value, path)
    if dataclasses.is_dataclass(hint):
        return parse(cast("type[Any]", hint), value, path)
    return _leaf(hint, value, path)


def _collect(values: dict[Any, Any], read: Callable[[Any, Any], Any]) -> dict[Any, Any]:
    problems: list[str] = []
    out: dict[Any, Any] = {}
    for key, value in values.items():
        try:
            out[key] = read(value, key)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return out


def _component(of: Of, value: Any, path: str) -> Component:
    if isinstance(value, Component):
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping) or "type" not in value:
        names = ", ".join(of.resolve().names())
        raise ConfigError([f"{path}: expected a mapping with `type:`, one of {names}; got {value!r}"])
    fields = dict(cast("Mapping[str, Any]", value))
    name = fields.pop("type")
    try:
        cls = of.resolve().get(name)
    except (UnknownNameError, DuplicateNameError, MissingPackageError) as error:
        raise ConfigError([f"{_join(path, 'type')}: {error}"]) from error
    return Component(of.registry, name, parse(cls.Config, fields, path))


def _leaf(hint: Any, value: Any, path: str) -> Any:
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        problems: list[str] = []
        for detail in error.errors():
            where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in detail["loc"] if not _is_type_name(p))
            allowed = detail.get("ctx", {}).get("expected")
            words = re.findall(r"'([^']*)'", allowed) if isinstance(allowed, str) else []
            hint_text = near(str(detail["input"]), words) if words else ""
            problems.append(f"{path}{where}: {detail['msg']}, got {detail['input']!r}{hint_text}")
        raise ConfigError(list(dict.fromkeys(problems))) from error


def _is_type_name(part: Any) -> bool:
    """Pydantic puts the tried union member (``int``, ``list[str]``) in the location; that is noise to a reader."""
    return isinstance(part, str) and (part in {"int", "float", "str", "bool", "none"} or "[" in part)


def _mentions_config(hint: Any) -> bool:
    if dataclasses.is_dataclass(hint):
        return True
    if get_origin(hint) is Annotated and any(isinstance(a, Of) for a in hint.__metadata__):
        return True
    return any(_mentions_config(a) for a in get_args(hint))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
