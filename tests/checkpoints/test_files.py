import os
import subprocess
import sys

import pytest

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
