import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from convnext_jax import InputError
from convnext_jax.checkpoints import files


def test_hub_options_are_split_from_the_rest():
    options = {"revision": "main", "token": "x", "depths": 3, "cache_dir": "c"}
    hub, rest = files.split_hub_options(options)
    assert hub == {"revision": "main", "token": "x", "cache_dir": "c"}
    assert rest == {"depths": 3}


def test_a_folder_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "owner" / "name" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert files.find_file("owner/name", "config.json").resolve() == path


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert files.find_file("~", "config.json") == tmp_path / "config.json"


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "~/nowhere", "a/b/c", ""])
def test_what_is_no_hub_name_is_not_looked_for_there(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    with pytest.raises(InputError) as error:
        files.find_file(name, "config.json")
    assert "\n" not in str(error.value)
    assert "config.json" in str(error.value)


def test_options_reach_the_hub(monkeypatch, tmp_path):
    seen = {}

    def download(name, filename, **options):
        seen.update(name=name, filename=filename, **options)
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    path = files.find_file("owner/name", "config.json", revision="v2", local_files_only=True)
    assert path == tmp_path / "config.json"
    assert seen == {
        "name": "owner/name",
        "filename": "config.json",
        "revision": "v2",
        "local_files_only": True,
    }


@pytest.mark.parametrize("name", ["owner/name-of-no-model", "owner/na me", "owner/..", "-/-"])
def test_a_hub_name_without_the_hub_is_one_line(name, tmp_path):
    # In a process of its own: huggingface_hub reads these variables when it is imported.
    code = (
        "import sys; from convnext_jax import ConvNextModel, InputError\n"
        "try: ConvNextModel.from_pretrained(sys.argv[1])\n"
        "except InputError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code, name],
        capture_output=True, text=True, check=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert run.stdout.count("\n") == 1
    assert name in run.stdout
    assert "config.json" in run.stdout


# ------------------------------------------------------------------------------ which file is taken


def hub_with(monkeypatch, tmp_path, *present, offline=False):
    """A hub that has these files; the names that it is asked for, and how."""
    asked = []

    def download(name, filename, **options):
        asked.append((filename, options.get("local_files_only", False)))
        if filename in present:
            return str(tmp_path / filename)
        raise (LocalEntryNotFoundError if offline else EntryNotFoundError)("it is not there.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize("number", range(len(files.WEIGHTS_NAMES)))
def test_only_the_first_file_that_exists_is_fetched(monkeypatch, tmp_path, number):
    asked = hub_with(monkeypatch, tmp_path, *files.WEIGHTS_NAMES[number:])
    path = files.find_file("owner/name", *files.WEIGHTS_NAMES)
    assert path == tmp_path / files.WEIGHTS_NAMES[number]
    assert asked == [(name, False) for name in files.WEIGHTS_NAMES[: number + 1]]


def test_without_a_connection_the_cache_alone_is_asked_for_the_rest(monkeypatch, tmp_path):
    asked = hub_with(monkeypatch, tmp_path, "pytorch_model.bin", offline=True)
    assert files.find_file("owner/name", *files.WEIGHTS_NAMES) == tmp_path / "pytorch_model.bin"
    assert asked == [
        ("model.safetensors", False),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
    ]


def test_the_hub_is_asked_with_the_options_given(monkeypatch, tmp_path):
    asked = []

    def download(*names, **options):
        asked.append((*names, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    options = {"revision": "v2", "cache_dir": tmp_path, "local_files_only": False, "token": "x"}
    assert options.keys() == set(files.HUB_OPTIONS)
    files.find_file("owner/name", "config.json", **options)
    assert asked == [("owner/name", "config.json", options)]


@pytest.mark.parametrize("offline", [False, True])
def test_an_absent_file_says_what_was_looked_for_and_where(monkeypatch, tmp_path, offline):
    hub_with(monkeypatch, tmp_path, offline=offline)
    with pytest.raises(InputError) as error:
        files.find_file("owner/name", *files.WEIGHTS_NAMES, revision="v2")
    for name in (*files.WEIGHTS_NAMES, "owner/name", "v2"):
        assert name in str(error.value)
    assert ("connection" in str(error.value)) == offline
    with pytest.raises(InputError) as error:
        files.find_file(tmp_path, *files.WEIGHTS_NAMES)
    for name in (*files.WEIGHTS_NAMES, str(tmp_path)):
        assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"is a file, and config.json is looked for in a folder"):
        files.find_file(tmp_path / "model.safetensors", "config.json")


# -------------------------------------------------------------------------------------- safetensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.half": np.ones((2, 2), np.float16),
    "c.brain": np.full((3,), 1.5, jnp.bfloat16),
    "d.double": np.array([0.1], np.float64),
    "e.none": np.zeros((0, 4), np.float32),
    "f.number": np.array(7, np.int64),
    "g.true": np.array([True, False, True]),
}


def assert_same(tensors, arrays):
    assert tensors.keys() == arrays.keys()
    for key, expected in arrays.items():
        value = np.asarray(tensors[key])
        assert (tensors[key].shape, tensors[key].dtype) == (expected.shape, expected.dtype)
        assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(value, expected)


def test_safetensors_come_back_in_their_dtypes(tmp_path):
    files.write_safetensors(tmp_path / "ours.safetensors", ARRAYS)
    assert_same(files.read_safetensors(tmp_path / "ours.safetensors"), ARRAYS)


def test_the_library_of_the_format_writes_the_same_bytes(tmp_path):
    files.write_safetensors(tmp_path / "ours.safetensors", ARRAYS)
    save_file(ARRAYS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert_same(files.read_safetensors(tmp_path / "theirs.safetensors"), ARRAYS)
    again = load_file(tmp_path / "ours.safetensors")
    assert {key: a.dtype for key, a in again.items()} == {k: a.dtype for k, a in ARRAYS.items()}
    assert all(np.array_equal(again[key], ARRAYS[key]) for key in ARRAYS)
    ours, theirs = (tmp_path / f"{x}.safetensors" for x in ("ours", "theirs"))
    assert ours.stat().st_size == theirs.stat().st_size


def test_an_array_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    files.write_safetensors(tmp_path / "file.safetensors", {"a": array})
    np.testing.assert_array_equal(load_file(tmp_path / "file.safetensors")["a"], array)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path):
    path = tmp_path / "file.safetensors"
    files.write_safetensors(path, ARRAYS)
    tensors = files.read_safetensors(path)
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(InputError, match=r"ends within d.double"):
        np.asarray(tensors["d.double"])


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 114374272\n")
    with pytest.raises(InputError, match="git lfs pull"):
        files.read_weights(path)


def test_a_dtype_that_numpy_has_not(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputError, match="a has the dtype F4"):
        files.read_weights(path)


@pytest.mark.parametrize("extra", ["note", "path"])
def test_more_in_a_header_than_the_format_has(tmp_path, extra):
    """Its own library lets this pass."""
    tensor = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], extra: 1}
    header = json.dumps({"a": tensor}).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2")
    np.testing.assert_array_equal(files.read_weights(path)["a"], [1, 2])


def test_a_header_without_names(tmp_path):
    """Its own library lets this pass too."""
    header = json.dumps({"a": ["U8", [1], [0, 1]]}).encode()
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1")
    with pytest.raises(InputError, match=r"file.safetensors: a has no dtype, shape and") as error:
        files.read_weights(path)
    assert "\n" not in str(error.value)


def mutated(rng, content: bytes) -> bytes:
    """A file with a few bytes or numbers of its header changed, or cut, or with a tail."""
    data = bytearray(content)
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.integers(1, 4)):
        kind = rng.integers(7)
        if kind == 0:  # any byte of the header or its length
            data[rng.integers(min(length, len(data)))] = rng.integers(256)
        elif kind == 1:
            del data[rng.integers(len(data)) :]
        elif kind == 2:
            data += bytes(rng.integers(0, 256, rng.integers(1, 40), np.uint8))
        elif kind == 3:  # the length itself
            lengths = [0, 1, length, 2**31, 2**62, 2**64 - 1]
            data[:8] = lengths[rng.integers(len(lengths))].to_bytes(8, "little")
        elif kind == 4:  # a number of the header
            text = bytes(data)
            numbers = [m.span() for m in re.finditer(rb"\d+", text[8:length])]
            if numbers:
                start, end = numbers[rng.integers(len(numbers))]
                new = rng.choice([b"0", b"-1", b"9999999999999", b"1e3", b"18446744073709551616"])
                header = text[8 : 8 + start] + bytes(new) + text[8 + end : length]
                data = bytearray(len(header).to_bytes(8, "little") + header + text[length:])
        elif kind == 5:  # a word of the header
            words = [(b"F32", b"F64"), (b"F16", b"BF16"), (b"shape", b"sharp"), (b"[", b"{"),
                     (b"dtype", b"shape"), (b"data_offsets", b"data"), (b'"a"', b'"b.half"'),
                     (b"half", b"helf"), (b"brain", b"train"), (b"F16", b"I16"),
                     (b":", b":[[[["), (b"BOOL", b"C64")]  # fmt: skip
            old, new = words[rng.integers(len(words))]
            header = bytes(data[8:length]).replace(old, new, 1)
            data = bytearray(len(header).to_bytes(8, "little") + header + bytes(data[length:]))
        else:  # two parts of the file in each other's place
            cut = rng.integers(len(data) + 1)
            data = data[cut:] + data[:cut]
        if not data:
            break
        length = min(8 + int.from_bytes(data[:8], "little"), len(data))
    return bytes(data)


def test_mutated_files_load_or_are_one_error(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "file.safetensors"
    files.write_safetensors(path, ARRAYS)
    content = path.read_bytes()
    loaded, errors = 0, set()
    tracemalloc.start()
    for _ in range(1000):
        path.write_bytes(mutated(rng, content))
        try:
            values = [np.asarray(tensor) for tensor in files.read_weights(path).values()]
            assert sum(value.nbytes for value in values) <= path.stat().st_size
            loaded += 1
        except InputError as error:
            message = str(error)
            assert "\n" not in message
            assert str(path) in message
            errors.add(message)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 * 2**20
    # It has to have been a test of both, and of more than one error.
    assert loaded > 20
    assert len(errors) > 20


# --------------------------------------------------------------------------------- several files


@pytest.fixture
def sharded(tmp_path):
    parts = {"one.safetensors": ["a", "b.half"], "two.safetensors": ["c.brain"]}
    for name, keys in parts.items():
        files.write_safetensors(tmp_path / name, {key: ARRAYS[key] for key in keys})
    places = {key: name for name, keys in parts.items() for key in keys}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 38}, "weight_map": places}))
    return path


def test_an_index_leads_to_the_tensors_of_all_its_files(sharded):
    expected = {key: ARRAYS[key] for key in ("a", "b.half", "c.brain")}
    assert_same(files.read_weights(sharded), expected)


def test_the_files_of_an_index_are_fetched_from_the_hub(sharded, monkeypatch):
    asked = hub_with(monkeypatch, sharded.parent, "one.safetensors", "two.safetensors")
    files.read_weights(sharded, name="owner/name", local_files_only=True)
    assert asked == [("one.safetensors", True), ("two.safetensors", True)]


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"a": "../one.safetensors"}, "no file beside it"),
        ({"a": "/etc/one.safetensors"}, "no file beside it"),
        ({"a": ".."}, "no file beside it"),
        ({"a": "model.safetensors.index.json"}, "no file beside it"),
        ({"a": "three.safetensors"}, "there is no three.safetensors"),
        ({"z": "one.safetensors"}, "holds z, which it does not"),
        ({"a": "notes.txt"}, "no notes.txt"),
        ({"a": 1}, "weight_map"),
        (None, "weight_map"),
    ],
)
def test_an_index_that_cannot_be_followed(sharded, places, said):
    sharded.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=said) as error:
        files.read_weights(sharded)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ other formats


@pytest.mark.parametrize(("name", "package"), [("w.pth", "torch"), ("w.h5", "h5py")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"something")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {package}") as error:
        files.read_weights(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", b"\x89HDF\r\n\x1a\n" + b"\0" * 40])
def test_a_damaged_keras_file_is_one_line(tmp_path, content):
    pytest.importorskip("h5py")
    path = tmp_path / "tf_model.h5"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a complete HDF5 file") as error:
        files.read_weights(path)
    assert "\n" not in str(error.value)


KERAS = Path(__file__).parents[1] / "fixtures" / "transformers_4_37_2"


@pytest.mark.parametrize("folder", ["tf", "tf_base"])
def test_keras_files_have_the_names_and_shapes_of_pytorch(folder):
    pytest.importorskip("h5py")
    tensors = files.read_weights(KERAS / folder / "tf_model.h5")
    config = json.loads((KERAS / folder / "config.json").read_text())
    first, second = config["hidden_sizes"][:2]
    patch, channels = config["patch_size"], config["num_channels"]
    shapes = {
        "convnext.embeddings.patch_embeddings.weight": (first, channels, patch, patch),
        "convnext.embeddings.layernorm.gamma": (first,),
        "convnext.encoder.stages.1.downsampling_layer.1.weight": (second, first, 2, 2),
        "convnext.encoder.stages.1.layers.0.dwconv.weight": (second, 1, 7, 7),
        "convnext.encoder.stages.1.layers.0.pwconv1.weight": (4 * second, second),
    }
    assert {key: tensors[key].shape for key in shapes} == shapes
    assert all(np.asarray(tensor).shape == tensor.shape for tensor in tensors.values())


def test_a_truncated_keras_file_is_one_line(tmp_path):
    pytest.importorskip("h5py")
    content = (KERAS / "tf" / "tf_model.h5").read_bytes()
    path = tmp_path / "tf_model.h5"
    for length in (100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="HDF5") as error:
            files.read_weights(path)
        assert "\n" not in str(error.value)


class Code:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "before zip", "plain pickle", "beside the weights"])
def test_a_pytorch_file_that_would_run_code_is_refused(tmp_path, form):
    torch = pytest.importorskip("torch")
    path, trap = tmp_path / "weights.pth", tmp_path / "trap"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(Code(trap), protocol=2))
    else:
        content = {"model": {"a": torch.ones(2)}, "x": Code(trap)}
        torch.save(
            content if form == "beside the weights" else Code(trap),
            path,
            _use_new_zipfile_serialization=form != "before zip",
        )
    with pytest.raises(InputError, match=r"refused: opening it would run \w+\.mkdir") as error:
        files.read_weights(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not trap.exists()
    torch.load(path, weights_only=False) if form != "plain pickle" else pickle.loads(
        path.read_bytes()
    )
    assert trap.exists(), "the trap does not work"


def test_damaged_pytorch_files_are_one_line(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    contents = [b"", b"text", b"\x80\x04.", pickle.dumps({"a": 1})]
    for is_zip in (True, False):
        torch.save({"a": torch.ones(50)}, path, _use_new_zipfile_serialization=is_zip)
        whole = path.read_bytes()
        contents += [whole[: len(whole) // 2], whole[:-1], whole[:40]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(InputError) as error:
                files.read_weights(path)
            assert str(path) in str(error.value)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [{}, [], 3, {"a": 1}, {"model": {"a": "text"}}, {"model": None}], ids=repr
)
def test_a_pytorch_file_without_tensors(tmp_path, content):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"state dict") as error:
        files.read_weights(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


def test_pytorch_tensors_without_values(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2, device="meta")}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"a is torch.strided of float32 on meta"):
        files.read_weights(tmp_path / "weights.pth")


def test_pytorch_tensors_of_all_kinds(tmp_path):
    torch = pytest.importorskip("torch")
    state = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16) * 1.5,
        "c": torch.ones(3, dtype=torch.float16),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "part": torch.arange(6.0)[::2],
        "needs gradients": torch.nn.Parameter(torch.ones(2)),
        "d": torch.ones(2, dtype=torch.float64),
    }
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "weights.pth")
    expected = {
        key: value.detach().float().numpy().astype(
            jnp.bfloat16 if key == "b" else str(value.dtype).removeprefix("torch.")
        )
        for key, value in state.items()
    }  # fmt: skip
    assert_same(files.read_weights(tmp_path / "weights.pth"), expected)


def test_averaged_weights_are_taken_when_asked_for(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    torch.save({"model_ema": {"module.a": torch.ones(1)}, "model": {"a": torch.zeros(1)}}, path)
    assert np.asarray(files.read_weights(path)["a"]) == 0
    assert np.asarray(files.read_weights(path, averaged=True)["a"]) == 1
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="no averaged weights"):
        files.read_weights(path, averaged=True)
    with pytest.raises(InputError, match="no averaged weights"):
        files.read_weights(tmp_path / "model.safetensors", averaged=True)
