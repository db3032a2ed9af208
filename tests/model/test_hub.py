"""Models as repositories of the Hugging Face hub, by way of local folders: tests are offline."""

import shutil

import pytest
import test_model as fits
import tiny
from huggingface_hub import HfApi, ModelCard

import userip_fast as uf
from userip_fast.core.errors import FormatError, UnsupportedError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("USERIP_FAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERIP_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = tmp_path_factory.mktemp("run")
        lm = str(tiny.save("llama", tmp_path_factory.mktemp("lm") / "tiny<lm>"))
        uf.fit(fits.read(), config=fits.CONFIG, lm=lm, out=run)
    return run


def test_a_folder_holds_card_config_metrics_and_the_model(run, tmp_path):
    model = uf.Model.load(run / "model")
    model.save_pretrained(tmp_path / "repo", licence="cc-by-4.0")
    assert {p.name for p in (tmp_path / "repo").iterdir()} == {
        "README.md", "config.json", "metrics.json", "model",
    }  # fmt: skip
    card = ModelCard.load(tmp_path / "repo" / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "userip_fast"
    for f in model.config.fields:
        assert f"| {f.name} | " in card.text
        assert f"## Codes of {f.name}" in card.text
    assert f"tiny&#60;lm&#62;, {model.lm.quantization}, hidden size 32, fingerprint" in card.text
    assert "is not part of the model" in card.text
    assert "## Metrics of the run" in card.text
    for folder in (tmp_path / "repo", tmp_path / "repo" / "model", run / "model"):
        again = uf.Model.from_pretrained(folder)
        assert again.fingerprint == model.fingerprint
    data = fits.read()
    assert (again.infer(data) == model.infer(data)).all()


def test_push_and_fetch(run, tmp_path, monkeypatch):
    model = uf.Model.load(run / "model")
    hub = tmp_path / "hub"

    def upload(self, *, repo_id, folder_path, commit_message, **_):
        assert commit_message == "First"
        shutil.copytree(folder_path, hub / repo_id)
        return f"commit of {repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    address = model.push_to_hub("me/codes", metrics={"nll": 1.25}, commit_message="First")
    assert address == "commit of me/codes"
    assert "| nll | 1.25 |" in (hub / "me" / "codes" / "README.md").read_text()

    # As the hub's cache has it: links into blobs.
    snapshot = tmp_path / "snapshots" / "abc123"
    for file in (hub / "me" / "codes").rglob("*"):
        if file.is_file():
            link = snapshot / file.relative_to(hub / "me" / "codes")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    asked = []

    def fetch(repo_id, **options):
        asked.append((repo_id, options["revision"]))
        return str(snapshot)

    monkeypatch.setattr("userip_fast.model.hub.snapshot_download", fetch)
    config = str(snapshot / "config.json")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: config)
    for _ in range(2):  # the second time from the copy
        again = uf.Model.from_pretrained("me/codes", revision="main")
        assert again.fingerprint == model.fingerprint
    assert asked == [("me/codes", "main")] * 2
    assert (tmp_path / "cache" / "hub" / "me--codes" / "abc123" / "manifest.json").is_file()


class RepoUrl:
    def __init__(self, repo_id):
        self.repo_id = repo_id


def test_what_holds_no_model_is_told(tmp_path, monkeypatch):
    with pytest.raises(FormatError, match="holds no userip_fast model"):
        uf.Model.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'me/nothing' cannot be fetched") as found:
        uf.Model.from_pretrained("me/nothing", local_files_only=True)
    assert "\n" not in str(found.value)


def test_texts_of_others_cannot_write_on_the_card(run, tmp_path):
    model = uf.Model.load(run / "model")
    field = model.config.fields[0].name
    words = ["| a", "<script>", "[x](javascript:y)", "\n# B"]
    model.cards[field] = [{**card, "words": words} for card in model.cards[field]]
    model.save_pretrained(tmp_path / "repo")
    text = (tmp_path / "repo" / "README.md").read_text()
    assert "<script>" not in text
    assert "](javascript" not in text
    assert "\n# B" not in text
