"""What ``--model`` names."""

import pytest

from kvbelt.errors import SettingsError
from kvbelt.ops.model_dir import find_model


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Hugging Face's cache, with one model; there is no network."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tmp_path / "models--org--small"
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_name_on_the_hub_is_its_folder_in_the_cache(hub_cache):
    """A model that the cache does not have, and the hub does not give, is one line with the reason."""
    assert find_model("org/small") == hub_cache
    with pytest.raises(SettingsError, match="'org/other' is no folder, and the hub does not give it: ") as refused:
        find_model("org/other")
    assert "\n" not in str(refused.value)
