"""A folder into shards: every file's bytes once, the same shards each time, all of them or none."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_jax import cli
from convnext_jax.data import pack as packing
from convnext_jax.data import sources
from convnext_jax.data.pack import pack
from convnext_jax.errors import InputError


def picture_tree(root: Path, parts: tuple[str, ...] = ("train/", "val/"), number: int = 6) -> Path:
    """Class folders of PNG files of different lengths."""
    rng = np.random.default_rng(0)
    for part in parts:
        for name in ("a b", "crème", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (5 + i, 7, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.PNG")
    return root


def read_tars(folder: Path, part: str) -> list[tuple[str, bytes]]:
    content = []
    for path in sorted(folder.glob(f"{part}-*.tar")):
        with tarfile.open(path) as archive:
            content += [(m.name, archive.extractfile(m).read()) for m in archive]
    return content


def test_tar_shards_as_others_read_them(tmp_path: Path):
    """Each example a picture and its class next to each other, under one key."""
    folder = picture_tree(tmp_path / "photos")
    made = pack(folder, tmp_path / "out", shard_bytes=1500)
    assert made == {"train": 18, "val": 18, "classes": 3, "shards": made["shards"]}
    assert made["shards"] == len(list((tmp_path / "out").glob("*.tar"))) > 4
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a b", "crème", "dog"]
    for part in ("train", "val"):
        content = read_tars(tmp_path / "out", part)
        pictures, labels = content[::2], content[1::2]
        for (name, picture), (label_name, label) in zip(pictures, labels, strict=True):
            key, _, suffix = name.rpartition(".")
            assert (label_name, suffix) == (f"{key}.cls", "png")
            assert picture == (folder / part / f"{key}.PNG").read_bytes()
            assert int(label) == ["a b", "crème", "dog"].index(key.split("/")[0])
        assert len({name for name, _ in pictures}) == 18
        order = [label for _, label in labels]
        assert order != sorted(order), "the classes lie one after the other"
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as archive:
            sizes = [member.size for member in archive if member.name.endswith(".png")]
        assert sum(sizes) < 1500 + max(sizes)


@pytest.mark.parametrize("kind", packing.FORMATS)
def test_the_same_shards_each_time(tmp_path: Path, kind: str):
    folder = picture_tree(tmp_path / "photos")

    def shards(out: str, **arguments: int) -> dict[str, bytes]:
        pack(folder, tmp_path / out, kind=kind, shard_bytes=1500, **arguments)
        return {
            path.name: path.read_bytes()
            for path in (tmp_path / out).iterdir()
            if path.suffix != ".npz"  # which holds times
        }

    first = shards("a")
    assert shards("b") == first
    assert shards("c", seed=1) != first


def test_shards_come_with_their_index(tmp_path: Path):
    out = tmp_path / "out"
    pack(picture_tree(tmp_path / "photos"), out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(list(out.glob("index-*.npz"))) == 2
    sources.load("tar_shards", folder=out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_folder_without_val_is_split_as_image_folder_does(tmp_path: Path):
    folder = picture_tree(tmp_path / "photos", parts=("",), number=8)
    pack(folder, tmp_path / "out", val_fraction=0.25, seed=7)
    expected = sources.image_folder(folder, val_fraction=0.25, split_seed=7)
    data = sources.load("tar_shards", folder=tmp_path / "out")
    for part in ("train", "val"):
        source = getattr(data, part)
        names = {source.key(i).split(": ")[1].removesuffix(".png") for i in range(len(source))}
        assert names == {path.removesuffix(".PNG") for path in getattr(expected, part).paths}


def test_names_with_dots_and_names_that_differ_in_their_suffix(tmp_path: Path):
    folder = picture_tree(tmp_path / "photos")
    dog = folder / "train" / "dog"
    for grey, name in enumerate(("x.y.png", "x_y.png", "0.gif", "1.2.3.png")):
        Image.new("RGB", (4, 4), (grey, grey, grey)).save(dog / name)
    pack(folder, tmp_path / "out")
    source = sources.load("tar_shards", folder=tmp_path / "out").train
    assert len(source) == 22
    contents = sorted(source.file(i).read() for i in range(22))
    assert contents == sorted(p.read_bytes() for p in (folder / "train").glob("*/*"))


def test_refuses_what_exists(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, out = picture_tree(tmp_path / "photos"), tmp_path / "out"
    assert cli.main(["shards", str(folder), str(out)]) == 0
    assert "18 pictures to train on and 18 held out, of 3 classes" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert cli.main(["shards", str(folder), str(out), "--format", "array_record"]) == 2
    error = capsys.readouterr().err
    assert f"{out} exists; remove it" in error
    assert error.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for arguments, message in (
        ([str(tmp_path / "gone"), str(tmp_path / "x")], "gone: no such folder"),
        ([str(folder), str(tmp_path / "x" / "y")], "x: no such folder"),
    ):
        assert cli.main(["shards", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_nothing_is_left_of_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = picture_tree(tmp_path / "photos")
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "3.PNG" and path.parent.name == "dog":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    for kind in packing.FORMATS:
        with pytest.raises(InputError, match=r"dog/3.PNG cannot be read \(Input/output error\)"):
            pack(folder, tmp_path / "out", kind=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_nothing_is_left_of_what_is_interrupted(tmp_path: Path):
    folder = picture_tree(tmp_path / "photos")
    program = """
import sys, time
from pathlib import Path
from convnext_jax import cli
read = Path.read_bytes
Path.read_bytes = lambda path: (print(path, flush=True), time.sleep(0.3), read(path))[-1]
sys.exit(cli.main(["shards", *sys.argv[1:]]))
"""
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(3):
            assert process.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 2  # it is at it
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, process.stderr.read()
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_what_cannot_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = picture_tree(tmp_path / "photos")
    with pytest.raises(InputError, match="webdataset"):
        pack(folder, tmp_path / "out", kind="webdataset")
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", str(folder), str(tmp_path / "out"), "--seed", "-1"])
    assert ended.value.code == 2
    assert "no whole number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_when_asked_to_end(tmp_path: Path, number: int):
    folder = picture_tree(tmp_path / "photos", number=400)
    command = [sys.executable, "-m", "convnext_jax.cli", "shards", str(folder), str(tmp_path / "o")]
    process = subprocess.Popen([*command, "--shard-mb", "1"], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".o.*/*")):
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
