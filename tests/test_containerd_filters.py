"""containerd's filter syntax, by which snapshots are listed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from thinpool.containerd.filters import BadFilter, parse

THINGS: dict[str, dict[str, str]] = {
    "one": {"name": "one", "labels.color": "red", "labels.a b": "1"},
    "two": {"name": "two", "labels.color": "green.blue-x", "labels.org.example/key": "yes", "parent": "one"},
    "three": {"name": "three", "other": "a, b"},
}


def matching(*filters: str) -> set[str]:
    matches = parse(filters)

    def lookup(thing: dict[str, str], path: Sequence[str]) -> str | None:
        return thing.get(".".join(path))

    return {name for name, thing in THINGS.items() if matches(lambda path, thing=thing: lookup(thing, path))}


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ([], {"one", "two", "three"}),
        ([""], {"one", "two", "three"}),
        (["name==one"], {"one"}),
        (["name==one", "name==two"], {"one", "two"}),
        (["name==one,parent"], set()),
        ([" name == two , parent == one "], {"two"}),
        (["name!=one"], {"two", "three"}),
        (["parent!=one"], {"one", "three"}),  # also what has none
        (["labels.color"], {"one", "two"}),
        (["labels.color==green.blue-x"], {"two"}),
        (['labels."org.example/key"==yes'], {"two"}),
        (['labels."a b"'], {"one"}),
        (['other=="a, b"'], {"three"}),
        ([r'other=="\x61\u002c\040b"'], {"three"}),
        (["name~=^t"], {"two", "three"}),
        (["name~=/^t.{2}$/"], {"two"}),
        (["name~=|o[nw]|"], {"one"}),
        ([r"name~=/w\\w*/"], {"two"}),
    ],
)
def test_what_filters_match(filters: list[str], found: set[str]) -> None:
    assert matching(*filters) == found


@pytest.mark.parametrize(
    "text",
    ["name==", "name==one,", "labels.", "==one", "name=one", "name<one", "name one", 'name=="one', "name==/one/", "labels./a/", r'name=="\q"', "name~=(", ","],
)
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(BadFilter):
        parse([text])
