"""Shards: the examples of the folder they were made of, whoever wrote them, or an error."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_jax.data import encoded, pipeline, shards, sources
from convnext_jax.data.encoded import Record, Span
from convnext_jax.data.pack import pack
from convnext_jax.errors import InputError

CLASSES = ("cat", "dog", "newt")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes go nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "convnext_jax"


def raises_one_line(call: Callable[[], object], *parts: object) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def jpeg(seed: int, height: int = 40, width: int = 52) -> bytes:
    """A picture of smooth noise, a different one for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def members(numbers: range, label: Callable[[int], int] = lambda i: i % 3) -> list:
    return [
        member
        for i in numbers
        for member in ((f"{i:05}.jpg", jpeg(i)), (f"{i:05}.cls", str(label(i)).encode()))
    ]


def three_shards(root: Path) -> Path:
    """Two to train on with the examples 0..6 and 7..11, and one of 12..14."""
    write_tar(root / "toy-train-000.tar", members(range(7)))
    write_tar(root / "toy-train-001.tar", members(range(7, 12)))
    write_tar(root / "toy-val-000.tar", members(range(12, 15)))
    return root


def assert_examples(source: sources.Source, numbers: range) -> None:
    """The pictures `jpeg` makes of these numbers, labelled with them modulo 3."""
    assert len(source) == len(numbers)
    assert source.labels.dtype == np.int32
    assert source.labels.tolist() == [i % 3 for i in numbers]
    for i, number in enumerate(numbers):
        assert source.file(i).read() == jpeg(number)
        example = source[i]
        assert (example["id"], example["label"]) == (i, number % 3)
        with Image.open(io.BytesIO(jpeg(number))) as image:
            assert np.array_equal(example["image"], np.asarray(image))


def picture_tree(root: Path, train: int = 6, val: int = 2) -> Path:
    """`train/<class>/*` and `val/<class>/*` of JPEG files."""
    for part, number in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                content = jpeg(1000 * (part == "val") + 100 * label + i)
                (root / part / name / f"{i}.jpg").write_bytes(content)
    return root


def batches(source: sources.Source, **arguments: object) -> list[dict[str, np.ndarray]]:
    arguments = {"batch_size": 5, "image_size": 16, "seed": 3, "num_workers": 0} | arguments
    with closing(pipeline.train_batches(source, **arguments)) as iterator:
        return list(islice(iterator, 9))


# --- what a data set of shards holds ---


def test_examples_of_tar_shards(tmp_path: Path):
    data = sources.load("tar_shards", folder=str(three_shards(tmp_path / "a")))
    assert_examples(data.train, range(12))
    assert_examples(data.val, range(12, 15))
    assert data.class_names == ("0", "1", "2")
    assert data.train.example_name(8) == f"{tmp_path}/a/toy-train-001.tar: 00008.jpg"
    span = data.train.file(8)
    assert isinstance(span, Span)
    assert Path(span.path).read_bytes()[span.offset :][: span.size] == jpeg(8)


@pytest.mark.parametrize("kind", ["tar", "array_record"])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_are_those_of_the_folder(tmp_path: Path, kind: str, num_workers: int):
    """Pixel for pixel and in order, through threads and through processes."""
    folder = picture_tree(tmp_path / "photos")
    pack(folder, tmp_path / "shards", kind=kind, shard_bytes=8000)
    name = {"tar": "tar_shards"}.get(kind, kind)
    packed = sources.load(name, folder=tmp_path / "shards")
    assert len(packed.train.shards) > 1
    assert packed.class_names == CLASSES
    for part, workers in (("train", num_workers), ("val", 0)):
        source = getattr(packed, part)
        paths = [source.key(i).split(": ")[1] for i in range(len(source))]
        assert len(set(paths)) == len(paths) == 3 * (6 if part == "train" else 2)
        expected = sources.FolderSource(folder / part, paths, source.labels)
        assert [CLASSES.index(path.split("/")[0]) for path in paths] == source.labels.tolist()
        for got, wanted in zip(
            batches(source, num_workers=workers), batches(expected), strict=True
        ):
            assert got.keys() == wanted.keys()
            for key in wanted:
                assert np.array_equal(got[key], wanted[key]), key
        with closing(pipeline.eval_batches(source, batch_size=4, image_size=16)) as some:
            got = list(some)
        with closing(pipeline.eval_batches(expected, batch_size=4, image_size=16)) as some:
            for one, other in zip(got, some, strict=True):
                assert all(np.array_equal(one[key], other[key]) for key in other)


def test_val_is_held_out_where_there_is_none(tmp_path: Path):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", members(range(30 * i, 30 * i + 30)))

    def load(seed: int) -> sources.Dataset:
        return sources.load("tar_shards", folder=tmp_path, val_fraction=0.25, split_seed=seed)

    def numbers(source: sources.Source) -> list[int]:
        return [int(source.key(i).split(": ")[1][:5]) for i in range(len(source))]

    data = load(0)
    train, val = numbers(data.train), numbers(data.val)
    assert train == sorted(train)
    assert sorted(train + val) == list(range(120))
    assert np.bincount(data.val.labels).tolist() == [10, 10, 10]
    for source, chosen in ((data.train, train), (data.val, val)):
        assert source.labels.tolist() == [i % 3 for i in chosen]
        for i in range(0, len(source), 7):
            assert source.file(i).read() == jpeg(chosen[i])
    assert numbers(load(0).val) == val
    assert len(set(numbers(load(1).val)) & set(val)) < 20
    # For good: what a run was not trained on must not change with the version of a library.
    assert val[:6] == [0, 3, 5, 7, 19, 28]


def test_tuning_split_goes_by_the_names(tmp_path: Path):
    whole = sources.load("tar_shards", folder=three_shards(tmp_path / "a")).train
    parts = []
    for folder in ("a", "b"):
        three_shards(tmp_path / folder)
        data = sources.load("tar_shards", folder=tmp_path / folder, tune_fraction=0.25)
        assert len(data.val) == 3
        assert len(data.train) == len(whole) - 3
        parts.append([data.val.key(i) for i in range(3)])
    assert parts[0] == parts[1]
    assert parts[0][0].startswith("toy-train-00")


def test_fingerprint_is_of_the_examples_and_not_of_their_place(tmp_path: Path):
    def prints(folder: str) -> dict[str, str]:
        return sources.fingerprint(sources.load("tar_shards", folder=tmp_path / folder))

    three_shards(tmp_path / "a"), three_shards(tmp_path / "b")
    before = prints("a")
    assert prints("b") == before
    write_tar(tmp_path / "b" / "toy-train-001.tar", members(range(7, 12), lambda i: (i + 1) % 3))
    assert prints("b") == before | {"train": prints("b")["train"]} != before


# --- archives of others ---


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_of_tar_and_orders_of_members(tmp_path: Path, form: int):
    long = "x" * 90 + "/" + "y" * 60  # ustar splits it, the others add a member that names it
    names = [f"{long}{i}" for i in range(6)]
    if form != tarfile.USTAR_FORMAT:
        names += ["ä" * 80 + "6", "z" * 300 + "7"]
    pictures = [(f"{name}.JPEG", jpeg(i)) for i, name in enumerate(names)]
    labels = [(f"{name}.cls", b" %d\n" % (i % 3)) for i, name in enumerate(names)]
    for order, content in enumerate((pictures + labels, labels + pictures[::-1])):
        folder = tmp_path / str(order)
        write_tar(folder / "train.tar", content, format=form)
        write_tar(folder / "val.tar", content, format=form)
        source = sources.load("tar_shards", folder=folder).train
        numbers = range(len(names)) if order == 0 else range(len(names))[::-1]
        assert_examples(source, numbers)
        assert source.example_name(0).endswith(f"{names[numbers[0]]}.JPEG")


def test_a_tree_archived_by_name(tmp_path: Path):
    """With folders, links, hidden files and strangers among the members, as `tar` makes them."""
    tree = tmp_path / "tree"
    for i in range(5):
        (tree / CLASSES[i % 3]).mkdir(parents=True, exist_ok=True)
        (tree / CLASSES[i % 3] / f"{i}.png").write_bytes(jpeg(i))
        (tree / CLASSES[i % 3] / f"{i}.json").write_text(json.dumps({"label": i % 3, "x": [1]}))
        (tree / CLASSES[i % 3] / f"._{i}.png").write_bytes(b"of macOS")
        (tree / CLASSES[i % 3] / f"{i}.txt").write_text("a caption")
        (tree / CLASSES[i % 3] / f"{i}.seg.png").write_bytes(b"a mask")
    (tree / "9.png").symlink_to("cat/0.png")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tree, ".")
    source = sources.load("tar_shards", folder=tmp_path, val_fraction=0.34).train
    whole = shards.scan_tar(f"{tmp_path}/all.tar")
    assert len(whole.labels) == 5
    for i in range(len(source)):
        number = int(source.key(i).rpartition("/")[2][0])
        assert source.labels[i] == number % 3
        assert source.file(i).read() == jpeg(number)


def test_cls_comes_before_json(tmp_path: Path):
    content = [("a.json", b'{"label": 7}'), ("a.jpg", jpeg(0)), ("a.cls", b"2")]
    for order in (content, content[::-1]):
        assert shards.scan_tar(str(write_tar(tmp_path / "a.tar", order))).labels == [2]


def test_patterns(tmp_path: Path):
    for i in range(12):
        write_tar(tmp_path / "x" / f"s-{i:06}.tar", members(range(i, i + 1)))

    def load(**arguments: str) -> sources.Dataset:
        return sources.load("tar_shards", folder=tmp_path / "x", **arguments)

    data = load(train="s-{000003..000010}.tar", val="s-00000[01].tar")
    assert_examples(data.train, range(3, 11))
    assert_examples(data.val, range(2))
    data = load(train="s-{000003,000005}.tar", val=f"{tmp_path}/x/s-00001?.tar")
    assert data.train.labels.tolist() == [0, 2]
    assert_examples(data.val, range(10, 12))
    data = load(val="s-000000.tar")  # the others are to train on
    assert_examples(data.train, range(1, 12))
    raises_one_line(lambda: load(train="t-*.tar"), f"{tmp_path}/x/t-*.tar", "no such shards")
    raises_one_line(lambda: load(train="s-{000011..000012}.tar"), "s-000012.tar", "No such file")
    raises_one_line(lambda: load(train="s-*.tar", val="s-000000.tar"), "s-000000.tar", "differ")
    raises_one_line(lambda: load(val="s-*.tar"), "val alone")
    raises_one_line(lambda: sources.load("tar_shards", folder=tmp_path / "y"), tmp_path / "y")
    raises_one_line(lambda: sources.load("tar_shards", folder=""), "--config.data.folder=FOLDER")


def test_names_of_the_classes(tmp_path: Path):
    three_shards(tmp_path)

    def load(**arguments: str) -> tuple[str, ...]:
        return sources.load("tar_shards", folder=tmp_path, **arguments).class_names

    (tmp_path / "label.labels.txt").write_text("a\nb\nc\n")
    assert load() == ("a", "b", "c")
    (tmp_path / "classes.json").write_text('["ä", "b c", "d"]', encoding="utf-8")
    assert load() == ("ä", "b c", "d")
    (tmp_path / "mine.txt").write_text("1st\n2nd\n3rd\n4th\n")
    assert load(class_names="mine.txt") == ("1st", "2nd", "3rd", "4th")
    (tmp_path / "few.json").write_text('["a", "b"]')
    raises_one_line(lambda: load(class_names="few.json"), "00002.jpg has the label 2", "2 classes")
    (tmp_path / "other.json").write_text('{"a": 1}')
    raises_one_line(lambda: load(class_names="other.json"), tmp_path / "other.json", "no list")
    raises_one_line(lambda: load(class_names="gone.json"), tmp_path / "gone.json", "no such file")


# --- damaged ones ---


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([("a.jpg", b""), ("b.cls", b"1")], ("a.jpg has no label", "a.cls")),
        ([("d/a.jpg", b""), ("d/a.json", b"{}")], ("d/a.jpg has no label", "d/a.cls")),
        ([("a.jpg", b""), ("a.json", b"{")], ("a.jpg has no label",)),
        ([("a.jpg", b""), ("a.json", b'{"label": "cat"}')], ("a.jpg has no label",)),
        ([("a.jpg", b""), ("a.cls", b"cat")], ("a.cls is no whole number",)),
        ([("a.jpg", b""), ("a.cls", b"-1")], ("a.jpg has the label -1",)),
        ([("a.jpg", b""), ("a.cls", b"9" * 30)], ("a.jpg has the label -1",)),
        ([("a.jpg", b""), ("a.png", b""), ("a.cls", b"1")], ("a.png", "second", "a.jpg")),
        ([("a.txt", b""), ("b.cls", b"1")], ("b has a label but no picture",)),
        ([], ("no labelled pictures",)),
    ],
)
def test_examples_that_are_none(tmp_path: Path, content: list, parts: tuple[str, ...]):
    path = write_tar(tmp_path / "train.tar", content)
    write_tar(tmp_path / "val.tar", members(range(3)))
    raises_one_line(lambda: sources.load("tar_shards", folder=tmp_path), path, *parts)


def test_archives_that_are_damaged(tmp_path: Path):
    path = write_tar(tmp_path / "train.tar", members(range(6)))
    write_tar(tmp_path / "val.tar", members(range(3)))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member

    def load(content: bytes) -> Callable[[], object]:
        path.write_bytes(content)
        return lambda: sources.load("tar_shards", folder=tmp_path)

    assert len(load(whole)().train) == 6
    picture = whole.index(b"\xff\xd8\xff", 5000)
    # In a picture, between two members, in a header, in the last label, and before the end's zeros.
    for cut in (picture + 100, picture - 512, picture - 300, end - 400, end):
        raises_one_line(load(whole[:cut]), path, "cut off")
    broken = bytearray(whole)
    broken[picture - 400] ^= 1  # a bit of a header
    raises_one_line(load(bytes(broken)), path, "damaged")
    for content in (b"", b"\0", b"no archive" * 1000):
        raises_one_line(load(content), path)
    path.unlink()
    for kind in ("gz", "bz2", "xz"):
        with tarfile.open(path, f"w:{kind}") as archive:
            archive.addfile(tarfile.TarInfo("a.jpg"))
        raises_one_line(load(path.read_bytes()), path, "compressed", "decompress")


@pytest.mark.parametrize("kind", ["tar", "array_record"])
def test_a_damaged_picture_is_named(tmp_path: Path, kind: str):
    folder = picture_tree(tmp_path / "photos")
    (folder / "train" / "dog" / "0.jpg").write_bytes(jpeg(5)[:300])
    pack(folder, tmp_path / "shards", kind=kind)
    source = sources.load({"tar": "tar_shards"}.get(kind, kind), folder=tmp_path / "shards").train
    (damaged,) = [i for i in range(len(source)) if "dog/0.jpg" in source.example_name(i)]
    for num_workers in (0, 3):
        found = [
            u for batch in batches(source, num_workers=num_workers) for u in batch["unreadable"]
        ]
        assert {index for index, _ in found} == {damaged}
        for part in (source.shards[0], "dog/0.jpg", "damaged"):
            assert str(part) in found[0][1]


def test_a_shard_that_changes_under_a_run(tmp_path: Path):
    source = sources.load("tar_shards", folder=three_shards(tmp_path)).train
    path = tmp_path / "toy-train-001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    raises_one_line(lambda: source[11], path, "00011.jpg", "ends within it")
    path.unlink()
    raises_one_line(lambda: source[7], path, "00007.jpg", "No such file")


# --- the index ---


def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are read through from now on."""
    seen: list[str] = []
    scan = shards.scan_tar

    def counted(path: str) -> object:
        seen.append(os.path.basename(path))
        return scan(path)

    monkeypatch.setattr(shards, "_TAR", shards._TAR._replace(scan=counted))
    return seen


def test_index_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    folder = three_shards(tmp_path / "a")
    seen = scans(monkeypatch)
    first = sources.load("tar_shards", folder=folder)
    assert seen == ["toy-train-000.tar", "toy-train-001.tar", "toy-val-000.tar"] or len(seen) == 3
    again = sources.load("tar_shards", folder=folder)
    assert len(seen) == 3
    assert_examples(again.train, range(12))
    assert sources.fingerprint(first) == sources.fingerprint(again)
    assert len(list(folder.glob("index-*.npz"))) == 2
    assert not cache.exists()
    # Moved as a whole, times included, it is still theirs.
    folder.rename(tmp_path / "b")
    assert_examples(sources.load("tar_shards", folder=tmp_path / "b").train, range(12))
    assert len(seen) == 3


def test_index_of_a_shard_that_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = three_shards(tmp_path)
    sources.load("tar_shards", folder=folder)
    path = folder / "toy-train-001.tar"
    before = path.stat()
    write_tar(path, members(range(7, 12), lambda i: (i + 1) % 3))  # other labels, as many bytes
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    seen = scans(monkeypatch)
    source = sources.load("tar_shards", folder=folder).train
    assert seen == [path.name]  # it alone
    assert source.labels.tolist() == [i % 3 for i in range(7)] + [i % 3 for i in range(8, 13)]
    write_tar(path, members(range(7, 30)))
    assert_examples(sources.load("tar_shards", folder=folder).train, range(30))


@pytest.mark.parametrize("content", [b"", b"PK", b"nothing of numpy's" * 100, None])
def test_index_that_cannot_be_read_is_made_anew(tmp_path: Path, content: bytes | None):
    sources.load("tar_shards", folder=three_shards(tmp_path))
    for path in tmp_path.glob("index-*.npz"):
        path.write_bytes(path.read_bytes()[:700] if content is None else content)
    assert_examples(sources.load("tar_shards", folder=tmp_path).train, range(12))
    for path in tmp_path.glob("index-*.npz"):
        assert np.load(path)["format"] == 1


def test_index_where_the_shards_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    folder = three_shards(tmp_path / "a")
    save = shards._save_index

    def refuse(path: str, *arguments: object) -> None:
        if path.startswith(str(folder)):
            raise PermissionError(13, "Permission denied")
        save(path, *arguments)

    monkeypatch.setattr(shards, "_save_index", refuse)
    seen = scans(monkeypatch)
    for _ in range(2):
        assert_examples(sources.load("tar_shards", folder=folder).train, range(12))
    assert len(seen) == 3
    assert len(list(cache.glob("*.npz"))) == 2
    assert sorted(path.suffix for path in folder.iterdir()) == [".tar"] * 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nowhere at all
    assert_examples(sources.load("tar_shards", folder=folder).train, range(12))


def test_many_shards_are_read_through_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_FILES_A_PROCESS", 4)
    for i in range(9):
        write_tar(tmp_path / f"train-{i}.tar", members(range(2 * i, 2 * i + 2)))
    write_tar(tmp_path / "val.tar", members(range(3)))
    assert_examples(sources.load("tar_shards", folder=tmp_path).train, range(18))
    write_tar(tmp_path / "train-8.tar", [("a.jpg", b"")])
    for i in range(8):
        os.utime(tmp_path / f"train-{i}.tar")
    raises_one_line(
        lambda: sources.load("tar_shards", folder=tmp_path), "train-8.tar", "a.jpg has no label"
    )


# --- behind URLs ---


def test_shards_behind_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    folder = three_shards(tmp_path / "a")
    local = sources.load("tar_shards", folder=folder)
    for path in folder.glob("index-*"):
        path.unlink()
    url = f"file://{folder}"
    seen = scans(monkeypatch)
    for _ in range(2):
        data = sources.load("tar_shards", folder=url)
        assert_examples(data.train, range(12))
    assert len(seen) == 3
    assert data.train.example_name(0) == f"{url}/toy-train-000.tar: 00000.jpg"
    assert len(list(cache.iterdir())) == 2
    assert sources.fingerprint(data) == sources.fingerprint(local)
    for got, wanted in zip(
        batches(data.train, num_workers=3), batches(local.train, num_workers=0), strict=True
    ):
        assert all(np.array_equal(got[key], wanted[key]) for key in wanted)
    raises_one_line(lambda: sources.load("tar_shards", folder=f"{url}/b"), f"{url}/b", "no such")
    raises_one_line(lambda: sources.load("tar_shards", folder="nope://a"), "nope://a")


def test_index_beside_shards_behind_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was written on a disk and then copied to a store need not be read through there."""
    fsspec = pytest.importorskip("fsspec")
    folder = three_shards(tmp_path / "a")
    sources.load("tar_shards", folder=folder)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    try:
        seen = scans(monkeypatch)
        data = sources.load("tar_shards", folder="memory://bucket")
        assert seen == []
        assert_examples(data.train, range(12))
        assert_examples(data.val, range(12, 15))
        assert data.class_names == CLASSES
        # One request for a picture, of its bytes alone.
        asked = []
        cat_file = type(store).cat_file
        monkeypatch.setattr(
            type(store),
            "cat_file",
            lambda self, path, start=None, end=None: (
                asked.append((path, end - start)) or cat_file(self, path, start, end)
            ),
        )
        assert data.train.file(8).read() == jpeg(8)
        assert asked == [("/bucket/toy-train-001.tar", len(jpeg(8)))]
        store.rm("/bucket/toy-train-001.tar")
        raises_one_line(lambda: data.train[8], "bucket/toy-train-001.tar: 00008.jpg")
    finally:
        store.rm("/bucket", recursive=True)


# --- ArrayRecord ---


def test_array_record_files(tmp_path: Path):
    folder = picture_tree(tmp_path / "photos")
    pack(folder, tmp_path / "shards", kind="array_record")
    data = sources.load("array_record", folder=tmp_path / "shards")
    record = data.train.file(4)
    assert isinstance(record, Record)
    assert Path(record.path).name == "train.array_record-00000-of-00001"
    assert record.read() == (folder / "train" / record.member).read_bytes()
    path = Path(record.path)
    content = path.read_bytes()
    for broken in (b"", b"something else" * 1000, content[: len(content) // 2]):
        path.write_bytes(broken)
        raises_one_line(lambda: sources.load("array_record", folder=path.parent), path, "cut off")
    raises_one_line(
        lambda: sources.load("array_record", folder=f"file://{path.parent}"), "disks alone"
    )


def test_records_that_are_no_labelled_pictures(tmp_path: Path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "train.array_record"
    for record, parts in (
        (b"\x0a\xff", ["no tf.train.Example"]),
        (b"hello", ["no tf.train.Example"]),
        (b"", ["(none)", "image", "label"]),
    ):
        writer = ArrayRecordWriter(str(path), "group_size:1")
        writer.write(record)
        writer.close()
        raises_one_line(
            lambda: sources.load("array_record", folder=tmp_path), f"{path}: record 0", *parts
        )


def test_parse_example():
    """Bytes as protobuf's own library writes them, of every kind of feature."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", syntax="proto3")
    for name, kind in (("BytesList", 12), ("FloatList", 2), ("Int64List", 3)):
        file.message_type.add(name=name).field.add(name="value", number=1, label=3, type=kind)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, kind in enumerate(("Bytes", "Float", "Int64"), 1):
        feature.field.add(
            name=f"{kind.lower()}_list",
            number=number,
            label=1,
            type=11,
            type_name=f".{kind}List",
            oneof_index=0,
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".Feature")
    features.field.add(
        name="feature", number=1, label=3, type=11, type_name=".Features.FeatureEntry"
    )
    file.message_type.add(name="Example").field.add(
        name="features", number=1, label=1, type=11, type_name=".Features"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    make = message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))
    example = make()
    values = example.features.feature
    values["image"].bytes_list.value.append(jpeg(0))
    values["label"].int64_list.value.extend([999, 3])
    values["negative"].int64_list.value.append(-5)
    values["large"].int64_list.value.append(2**62)
    values["größe"].float_list.value.append(1.5)
    values["empty"].int64_list.SetInParent()
    values["nothing"].SetInParent()
    record = example.SerializeToString()
    expected = {
        "image": jpeg(0),
        "label": 999,
        "negative": -5,
        "large": 2**62,
        "größe": None,
        "empty": None,
        "nothing": None,
    }
    assert encoded.parse_example(record, "it") == expected
    for cut in range(1, len(record), 7):
        raises_one_line(lambda cut=cut: encoded.parse_example(record[:cut], "a.x"), "a.x is no")
    # And what is written here is read there.
    from convnext_jax.data.pack import _example

    written = make.FromString(_example(image=jpeg(1), label=300, file_name=b"a.jpg"))
    values = written.features.feature
    assert values["image"].bytes_list.value == [jpeg(1)]
    assert values["label"].int64_list.value == [300]
    assert values["file_name"].bytes_list.value == [b"a.jpg"]


def test_an_array_record_file_that_is_written_anew(tmp_path: Path):
    def load(seed: int) -> sources.Source:
        out = tmp_path / "out"
        if out.exists():
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
        pack(tmp_path / "photos", out, kind="array_record", seed=seed)
        return sources.load("array_record", folder=str(out)).train

    for name in CLASSES:
        for i in range(8):
            path = tmp_path / "photos" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(100 * CLASSES.index(name) + i))
    for seed in (0, 1):
        source = load(seed)
        for i in range(len(source)):
            name = source.example_name(i).split(": ")[1]
            assert source.file(i).read() == (tmp_path / "photos" / name).read_bytes()


def test_more_array_record_files_than_may_be_open(tmp_path: Path):
    for name in CLASSES:
        for i in range(40):
            path = tmp_path / "photos" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
    made = pack(tmp_path / "photos", tmp_path / "out", kind="array_record", shard_bytes=1)
    assert made["shards"] == 120
    source = sources.load("array_record", folder=str(tmp_path / "out")).train
    for i in range(len(source)):
        source.file(i).read()
    opened = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    assert sum("array_record" in str(path) for path in opened) < 80


def test_what_is_not_in_one_piece(tmp_path: Path):
    path = write_tar(tmp_path / "a-train.tar", members(range(3)))
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("00009.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "00000.jpg"
        archive.addfile(link)
        label = tarfile.TarInfo("00009.cls")
        label.size = 1
        archive.addfile(label, io.BytesIO(b"0"))
    raises_one_line(lambda: sources.load("tar_shards", folder=str(tmp_path)), "00009.jpg", "link")

    one, two = (write_tar(tmp_path / name, members(range(3))).read_bytes() for name in "bc")
    path.write_bytes(one + two)
    raises_one_line(lambda: sources.load("tar_shards", folder=str(tmp_path)), "several archives")


def test_a_label_without_a_picture(tmp_path: Path):
    write_tar(tmp_path / "train.tar", [*members(range(3)), ("7.cls", b"1"), ("7.heic", b"?")])
    raises_one_line(lambda: sources.load("tar_shards", folder=str(tmp_path)), "7 has a label")


def test_labels_without_names_that_are_no_classes(tmp_path: Path):
    write_tar(tmp_path / "train.tar", members(range(6), lambda i: 14_000_000 + i))
    raises_one_line(lambda: sources.load("tar_shards", folder=str(tmp_path)), "14,000,005", "names")


def test_array_record_files_behind_a_url(tmp_path: Path):
    for place in ({"folder": "gs://bucket/x"}, {"folder": str(tmp_path), "val": "gs://b/y*"}):
        raises_one_line(lambda place=place: sources.load("array_record", **place), "disks alone")


def test_index_in_the_cache_of_a_store_whose_shards_change(tmp_path: Path):
    folder = three_shards(tmp_path / "data")
    url = f"file://{folder}"
    assert_examples(sources.load("tar_shards", folder=url).train, range(12))
    again = write_tar(folder / "toy-train-000.tar", members(range(7), lambda i: (i + 1) % 3))
    os.utime(again, (1, 1))
    labels = sources.load("tar_shards", folder=url).train.labels
    assert labels[:7].tolist() == [(i + 1) % 3 for i in range(7)]


def test_a_folder_whose_name_has_braces_and_begins_like_another(tmp_path: Path):
    folder = three_shards(tmp_path / "x{1,2}")
    assert_examples(sources.load("tar_shards", folder=str(folder)).train, range(12))
    pattern = str(three_shards(tmp_path / "images") / "*train*.tar")
    (tmp_path / "im").mkdir()
    write_tar(tmp_path / "im" / "val.tar", members(range(3)))
    data = sources.load("tar_shards", folder=str(tmp_path / "im"), train=pattern)
    assert_examples(data.train, range(12))
