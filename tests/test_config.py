"""Config: parsing, components, overrides, merging, and errors for people."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mmrep.config import Component, ConfigError, Of, component, config, dump, merge, override, parse


@config
class Inner:
    size: Annotated[int, Field(gt=0)] = 4
    mode: Literal["fast", "exact"] = "fast"


@config
class Outer:
    lr: float
    inner: Inner = field(default_factory=Inner)
    many: list[Inner] = field(default_factory=list)
    named: dict[str, Inner] = field(default_factory=dict)
    maybe: Inner | None = None
    pool: Annotated[Component, Of("pools")] = field(default_factory=lambda: component("pools", "mean"))
    pools: Annotated[list[Component], Of("pools")] = field(default_factory=list)
    steps: int | None = None

    def __post_init__(self):
        if self.lr > 100:
            raise ValueError("lr above 100 makes no sense here")


def problems(data) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, data)
    return caught.value.problems


def test_nested_values_are_built():
    made = parse(Outer, {"lr": 0.1, "inner": {"size": 2}, "many": [{}, {"size": 3}], "named": {"a": {"mode": "exact"}}})
    assert (made.inner.size, made.many[1].size, made.named["a"].mode) == (2, 3, "exact")


def test_yaml_1e_minus_3_is_a_float():
    assert parse(Outer, yaml.safe_load("lr: 1e-3")).lr == 1e-3


def test_unknown_key_names_path_near_match_and_allowed():
    assert problems({"lr": 1, "inner": {"sise": 3}}) == [
        "inner.sise: unknown; did you mean 'size'? Allowed: size, mode"
    ]


def test_unknown_key_in_a_list_names_the_index():
    assert problems({"lr": 1, "many": [{}, {"sise": 3}]})[0].startswith("many[1].sise: unknown; did you mean 'size'?")


def test_missing_key_is_named():
    assert problems({}) == ["lr: required but missing"]


def test_all_problems_are_reported_at_once():
    assert len(problems({"inner": {"size": -1, "x": 1}, "many": [{"mode": "fats"}]})) == 4


def test_wrong_value_names_path_value_and_near_match():
    (line,) = problems({"lr": 1, "inner": {"mode": "fats"}})
    assert line.startswith("inner.mode: ")
    assert "'fats'" in line
    assert "did you mean 'fast'" in line


def test_constraint_is_enforced():
    assert problems({"lr": 1, "inner": {"size": 0}})[0].startswith("inner.size: ")


def test_rule_between_fields_is_reported_with_its_path():
    assert problems({"lr": 1000}) == ["config: lr above 100 makes no sense here"]


def test_component_is_chosen_by_type_with_its_own_fields():
    made = parse(Outer, {"lr": 1, "pool": {"type": "attention", "heads": 2}})
    assert made.pool.type == "attention"
    assert made.pool.config.heads == 2


def test_component_may_be_written_as_a_bare_name():
    assert parse(Outer, {"lr": 1, "pool": "cls"}).pool.type == "cls"


def test_unknown_component_type_has_a_near_match():
    assert problems({"lr": 1, "pool": {"type": "meen"}})[0].startswith(
        "pool.type: unknown pool 'meen'; did you mean 'mean'?"
    )


def test_wrong_field_of_a_component_has_its_path():
    (line,) = problems({"lr": 1, "pools": ["mean", {"type": "attention", "haeds": 2}]})
    assert line.startswith("pools[1].haeds: unknown; did you mean 'heads'?")


def test_a_dotted_import_path_is_no_component():
    assert "unknown pool 'os:system'" in problems({"lr": 1, "pool": {"type": "os:system"}})[0]


def test_dump_and_parse_round_trip():
    made = parse(Outer, {"lr": 0.1, "maybe": {"size": 9}, "pools": [{"type": "attention", "heads": 3}], "many": [{}]})
    assert parse(Outer, yaml.safe_load(yaml.safe_dump(dump(made)))) == made


def test_override_reaches_lists_and_reads_yaml():
    data = {"lr": 1, "many": [{"size": 1}, {"size": 2}]}
    data = override(data, "many[1].size=7")
    data = override(data, "inner.mode=exact")
    data = override(data, "steps=null")
    assert data["many"][1]["size"] == 7
    assert data["many"][0]["size"] == 1
    assert data["inner"] == {"mode": "exact"}
    assert data["steps"] is None


def test_override_does_not_change_the_data_it_was_given():
    data = {"inner": {"size": 1}}
    override(data, "inner.size=2")
    assert data == {"inner": {"size": 1}}


def test_override_of_a_type_drops_the_old_components_fields():
    data = override({"pool": {"type": "attention", "heads": 2}}, "pool.type=mean")
    assert data["pool"] == {"type": "mean"}


def test_a_component_written_as_a_bare_name_takes_overrides_and_changes():
    assert override({"pool": "attention"}, "pool.heads=2")["pool"] == {"type": "attention", "heads": 2}
    assert merge({"pool": "attention"}, {"pool": {"heads": 2}})["pool"] == {"type": "attention", "heads": 2}
    assert merge({"pool": "attention"}, {"pool": {"type": "mean"}})["pool"] == {"type": "mean"}


@pytest.mark.parametrize("bad", ["lr", "=3", "many[9].size=1", "lr.x=1", "many.size=1"])
def test_a_bad_override_is_refused(bad):
    with pytest.raises(ConfigError):
        override({"lr": 1, "many": []}, bad)


def test_merge_is_by_key_and_a_new_type_replaces():
    base = {"a": {"x": 1, "y": 2}, "pool": {"type": "attention", "heads": 2}, "l": [1, 2]}
    assert merge(base, {"a": {"y": 3}}) == {**base, "a": {"x": 1, "y": 3}}
    assert merge(base, {"pool": {"type": "mean"}})["pool"] == {"type": "mean"}
    assert merge(base, {"pool": {"heads": 4}})["pool"] == {"type": "attention", "heads": 4}
    assert merge(base, {"l": [3]})["l"] == [3]


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=3), s, max_size=3),
        max_leaves=8,
    )
)
def test_any_data_is_either_parsed_or_refused_with_words(data):
    try:
        parse(Outer, data)
    except ConfigError as error:
        words = error.problems
    else:
        words = ["parsed"]
    assert words
    assert all(words)


@config
class Piece:
    size: int = 1


@config
class Bounded:
    parts: Annotated[list[Piece], Field(min_length=1)]


def test_a_rule_on_a_list_of_configs_is_checked_beside_what_is_in_it():
    assert parse(Bounded, {"parts": [{"size": 2}]}).parts == [Piece(size=2)]
    with pytest.raises(ConfigError, match=r"parts: List should have at least 1 item"):
        parse(Bounded, {"parts": []})
    with pytest.raises(ConfigError, match=r"parts\[0\]\.siez: unknown; did you mean 'size'"):
        parse(Bounded, {"parts": [{"siez": 2}]})
