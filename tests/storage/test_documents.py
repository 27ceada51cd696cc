"""Line numbers of keys in hand-written files, and messages for files that cannot be read."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leakfast.errors import InputError
from leakfast.storage.documents import find_shipped, parse_toml, read_document, read_toml, resource

TRICKY = '''\
# a comment with [a.header] and key = "value"
name = "x # no comment"
"quoted key" = 1
a.b.c = 2
text = """
[not.a.table]
name = "not a key"
"""
list = [
  "one",  # two
  "[three",

  "}four",
]
inline = { x = 1, y = { z = "}" } }
when = 1979-05-27T07:32:00Z

[table."with dot.in it".deep]  # comment
key = 'lit"eral'

[[blocks]]
n = 0
[[blocks]]
n = 1
[blocks.inner]
m = [[1, 2], [
  3]]
[[blocks.sub]]
k = 1
'''


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (("name",), 2),
        (("quoted key",), 3),
        (("a", "b", "c"), 4),
        (("text",), 5),
        (("list",), 9),
        (("list", 0), 10),
        (("list", 1), 11),
        (("list", 2), 13),
        (("inline", "y", "z"), 15),
        (("when",), 16),
        (("table", "with dot.in it", "deep"), 18),
        (("table", "with dot.in it", "deep", "key"), 19),
        (("blocks", 0, "n"), 22),
        (("blocks", 1), 23),
        (("blocks", 1, "n"), 24),
        (("blocks", 1, "inner", "m", 1, 0), 27),
        (("blocks", 1, "sub", 0, "k"), 29),
        (("blocks", 1, "inner", "absent"), 25),
        (("absent",), None),
    ],
)
def test_toml_lines(key, line):
    assert parse_toml(TRICKY, "t.toml").line(key) == line


KEYS = st.text("abcdefgh_", min_size=1, max_size=6)
VALUES = st.recursive(
    st.one_of(st.integers(), st.text(max_size=8), st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


def paths(value, key=()):
    """Every key path of a JSON value, in the order in which it is written."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*key, name)
        yield from paths(inner, (*key, name))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_json_lines_point_at_their_key(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("json") / "d.json"
    path.write_text(json.dumps(data, indent=1))
    document = read_document(path)
    assert document.data == data
    lines = path.read_text().splitlines()
    before = 0
    for key in paths(data):
        line = document.line(key)
        assert line is not None
        assert line > before or json.dumps(data, indent=1).count("\n") == 0, "keys come in the order written"
        before = line
        if isinstance(key[-1], str):
            assert json.dumps(key[-1]) in lines[line - 1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.toml", b"a = 1\nb = = 2\n", ["bad.toml, line 2", "not TOML"]),
        ("end.toml", b"a = 1\nb = [1,\n", ["end.toml, line 3", "not TOML"]),
        ("twice.toml", b"a = 1\na = 2\n", ["twice.toml, line 2"]),
        ("bad.json", b'{\n "a": 1,\n}\n', ["bad.json, line", "not JSON"]),
        ("twin.json", b'{"a": 1, "a": 2}', ["'a' stands twice"]),
        ("latin.toml", b'a = "\xe9"\n', ["not UTF-8"]),
    ],
)
def test_unreadable_files_are_explained(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_document(tmp_path / name)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "study.toml").write_text("a = 1")
    with pytest.raises(InputError, match=r"no such file.*study\.toml"):
        read_toml(tmp_path / "studdy.toml")
    with pytest.raises(InputError, match="is a folder"):
        read_toml(tmp_path)


def test_windows_line_ends_and_lines(tmp_path):
    (tmp_path / "w.toml").write_bytes(b"a = 1\r\n\r\nb = 2\r\n")
    document = read_document(tmp_path / "w.toml")
    assert document.data == {"a": 1, "b": 2}
    assert document.line(("b",)) == 3


def test_shipped_files_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo.toml", "configs/demo.toml", "published/marker.toml"):
        assert find_shipped(name).is_file(), name
    (tmp_path / "demo.toml").write_text("mine = 1")
    assert read_toml(find_shipped("demo.toml")) == {"mine": 1}, "a file here comes before a shipped one"
    with pytest.raises(InputError, match=r"nowhere\.toml.*demo\.toml"):
        resource("nowhere.toml")
    assert not find_shipped("../setup.py").exists()
