"""What a resumed run must share of the keys that name files."""

import pytest

from zofo.identity import anywhere, known, same


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return str(file)


def folder(place, weights, config=b"{}"):
    write(place / "config.json", config)
    write(place / "model.safetensors", weights)
    return str(place)


@pytest.mark.parametrize("name", ["org/model", "pkg://package/model.gguf", "nosuch", "~nobody/model", None])
def test_what_is_no_file_here_is_known_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("model", "task", "source", "data", "adapter", "adapter_init"):
        assert known(key, name) == anywhere(key, name) == name
        assert same(key, name, name)
        assert not same(key, name, "another")


def test_weights_are_known_by_their_content_in_any_place(tmp_path):
    first, second = folder(tmp_path / "a", b"weights"), folder(tmp_path / "b" / "c", b"weights")
    assert same("model", known("model", first), known("model", second))
    for other in (folder(tmp_path / "d", b"Weights"), folder(tmp_path / "e", b"weights", b"[]"), "a", None):
        assert not same("model", known("model", first), known("model", other))
        assert not same("model", known("model", other), known("model", first))


@pytest.mark.parametrize("name", ["model.gguf", "model/model.safetensors"])
def test_a_change_anywhere_in_a_large_file_of_which_parts_are_read_is_seen(tmp_path, name):
    content = bytearray(20 << 20)
    place = str(tmp_path / name.split("/")[0])
    write(tmp_path / name, content)
    before = known("model", place)
    for at in (0, len(content) // 3, len(content) - (64 << 10)):
        changed = content.copy()
        changed[at : at + (64 << 10)] = b"x" * (64 << 10)
        write(tmp_path / name, changed)
        assert known("model", place) != before
    write(tmp_path / name, content)
    assert known("model", place) == before
    write(tmp_path / name, content + b"x")
    assert known("model", place) != before


@pytest.mark.parametrize("key", ["task", "source", "data", "adapter"])
def test_what_rows_or_peft_config_say_is_no_matter_of_places(tmp_path, key):
    first, second = write(tmp_path / "a.json", b"1"), write(tmp_path / "b" / "b.json", b"2")
    gone = str(tmp_path / "gone.json")
    for before in (known(key, first), first, gone):
        assert same(key, before, known(key, second))
    assert not same(key, "one", "other")


def test_weights_are_the_same_by_their_digest_whatever_their_name(tmp_path):
    first, second = folder(tmp_path / "a", b"weights"), folder(tmp_path / "b", b"Weights")
    copy = folder(tmp_path / "c", b"weights")
    assert known("model", copy) != known("model", first)
    assert same("model", known("model", copy), known("model", first))
    assert not same("model", known("model", second), known("model", first))
    assert not same("model", "org/a", known("model", first))
    assert not same("model", "org/a", "org/b")
