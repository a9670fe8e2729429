"""Releases under s3:// and on the Hugging Face Hub (a fake one on this machine, asked by the real client)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import CheckpointError
from pipeline.model import MCFMamba, ModelConfig, ReleaseError, from_pretrained, release, remote, save
from shards import store
from shards.store import FolderStore, StoreError
from tests.fake_hub import TOKEN, Hub, serving
from tests.small_dataset import CONTRACT

LINEAGE = [{"stage": "pretrain", "data": "a", "where": {}, "protocol": None, "sensors": ["s1"], "fingerprint": "f"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = MCFMamba(ModelConfig(dims=(8, 16), depths=(1, 1), d_state=2), CONTRACT.channels, 3)
    return save(tmp_path_factory.mktemp("release") / "release", model, CONTRACT.to_json(), "# card", LINEAGE)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The only Hub there is, logged in to, with an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield served


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.s3)])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An s3:// address where nothing is: on the real server, or folders that stand for it."""
    if request.param == "real":
        return f"{request.getfixturevalue('s3_url')}/release"
    monkeypatch.setattr(store, "open_store", lambda url: FolderStore(tmp_path / str(url).removeprefix("s3://")))
    monkeypatch.setattr(checkpoint, "open_store", store.open_store)
    return "s3://bucket/release"


def same(one: MCFMamba, other: MCFMamba) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def put(hub: Hub, folder: Path, name: str) -> None:
    hub.repositories[name] = {"main": {path.name: path.read_bytes() for path in folder.iterdir()}}


def test_a_release_opens_from_s3(address: str, folder: Path) -> None:
    remote.put(folder, address)
    assert same(from_pretrained(address), from_pretrained(folder))
    found = checkpoint.find(address)
    assert found.contract == CONTRACT and found.facts["lineage"] == LINEAGE
    assert found.sha256 == checkpoint.find(folder).sha256


def test_on_s3_the_config_comes_last_and_what_is_half_there_is_replaced(address: str, folder: Path) -> None:
    where = store.open_store(address)
    where.put("eval/old.json", b"{}")
    where.put("model.safetensors", b"half")
    with pytest.raises(ReleaseError, match=r"no release: it lacks config\.json"):
        from_pretrained(address)
    model = from_pretrained(folder)
    written: list[str] = []
    original = type(where).put

    def spy(self: object, name: str, source: object) -> None:
        written.append(name)
        original(self, name, source)  # type: ignore[arg-type]

    with mock.patch.object(type(where), "put", spy):
        save(address, model, CONTRACT.to_json(), "")
    assert written[-1] == "config.json" and len(written) == 4
    assert where.list() == ["README.md", "config.json", "contract.json", "model.safetensors"]
    with pytest.raises(ReleaseError, match="is not empty: it holds README.md"):
        save(address, model, CONTRACT.to_json(), "")


def test_a_refusing_store_is_told_as_it_is(folder: Path) -> None:
    class Refusing(FolderStore):
        def reading(self, *_: object) -> None:  # type: ignore[override]
            raise StoreError("s3://bucket/release/config.json: access denied (403 AccessDenied)")

    refusing = mock.patch.object(store, "open_store", lambda url: Refusing(Path()))
    with refusing, pytest.raises(ReleaseError, match="access denied"):
        from_pretrained("s3://bucket/release")


@pytest.mark.parametrize(("address", "library"), [("s3://b/release", "boto3"), ("org/name", "huggingface_hub")])
def test_a_missing_library_is_named(
    address: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "shards.s3", raising=False)
    with pytest.raises(ReleaseError, match=f"pip install {library}"):
        from_pretrained(address)


def test_a_release_opens_from_the_hub(hub: Hub, folder: Path) -> None:
    put(hub, folder, "org/name")
    hub.repositories["org/name"]["main"] |= {"evil.py": b"", "pytorch_model.bin": b"pickle"}
    assert same(from_pretrained("org/name"), from_pretrained(folder))
    assert not any("evil.py" in line or "pytorch_model" in line for line in hub.asked)
    found = checkpoint.find("org/name@main")
    assert found.facts["lineage"] == LINEAGE and found.address == "org/name@main"
    before = len(hub.asked)
    with pytest.raises(CheckpointError, match="ORG/NAME@REVISION"):
        checkpoint.find("org/name")
    assert len(hub.asked) == before, "a stage does not ask the network without being told to"


def test_a_folder_is_never_looked_for_on_the_network(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org/name").symlink_to(folder)
    put(hub, folder, "org/name")
    put(hub, folder, "org/nam")
    from_pretrained("org/name")
    for mistyped in ("org/nam", "./org2/name", "name", str(tmp_path / "absent")):
        with pytest.raises(ReleaseError, match="no such folder"):
            from_pretrained(mistyped)
    assert hub.asked == []
    from_pretrained("org/nam@main")
    assert hub.asked != []


def test_an_opened_release_opens_again_without_the_hub(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, folder, "org/name")
    from_pretrained("org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(from_pretrained("org/name"), from_pretrained(folder))
    with pytest.raises(ReleaseError, match="its cache here lacks this release"):
        from_pretrained("org/other")


def damaged(hub: Hub, tmp_path: Path) -> None:
    from_pretrained("org/name")
    (weights,) = (tmp_path / "cache").rglob("model.safetensors")
    target = weights.resolve()
    target.chmod(0o644)
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)


def without(name: str) -> Callable[[Hub, Path], None]:
    return lambda hub, _: hub.repositories["org/name"]["main"].pop(name)


@pytest.mark.parametrize(
    ("spoil", "address", "words"),
    [
        (lambda hub, _: hub.repositories.clear(), "org/name", "no such repository, or a private one"),
        (lambda hub, _: hub.gated.add("org/name"), "org/name", "its owner has to grant access"),
        (lambda hub, _: None, "org/name@v9", "no such revision"),
        (without("config.json"), "org/name", "no release: the repository lacks config.json"),
        (without("model.safetensors"), "org/name", "model.safetensors is missing"),
        (damaged, "org/name", "is damaged: its sha256"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_hub_is_said(
    hub: Hub, folder: Path, tmp_path: Path, spoil: Callable[[Hub, Path], None], address: str, words: str
) -> None:
    put(hub, folder, "org/name")
    spoil(hub, tmp_path)
    with pytest.raises(ReleaseError, match=words):
        from_pretrained(address)


def test_no_network_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ReleaseError, match="the Hub cannot be reached"):
        from_pretrained("org/name")
    with pytest.raises(ReleaseError, match="the Hub cannot be reached"):
        remote.check_free("org/name")


def test_a_push_makes_a_private_repository_in_one_commit(hub: Hub, folder: Path) -> None:
    assert "/org/new/commit/" in remote.push(folder, "org/new")
    assert hub.private["org/new"] and sum("/commit/" in line for line in hub.asked) == 1
    assert set(hub.repositories["org/new"]["main"]) == {
        ".gitattributes", "README.md", "config.json", "contract.json", "model.safetensors",
    }  # fmt: skip
    assert same(from_pretrained("org/new"), from_pretrained(folder))


def test_a_card_that_the_hub_refuses_leaves_no_branch(hub: Hub, folder: Path) -> None:
    put(hub, folder, "org/old")
    with release.making(folder.parent / "nonsense") as part:
        model = from_pretrained(folder)
        release.write(part, model, {}, "---\nlicense: nonsense\n---\n")
        with pytest.raises(ReleaseError, match='"license" must be one of'):
            remote.push(part, "org/old@v2")
    assert list(hub.repositories["org/old"]) == ["main"]


def test_a_push_replaces_nothing(hub: Hub, folder: Path) -> None:
    hub.repositories["org/old"] = {"main": {".gitattributes": b"", "theirs.txt": b"1"}}
    with pytest.raises(ReleaseError, match="org/old is not empty: it holds theirs.txt"):
        remote.push(folder, "org/old")
    remote.push(folder, "org/old@v2")
    assert hub.repositories["org/old"]["main"] == {".gitattributes": b"", "theirs.txt": b"1"}
    assert "config.json" in hub.repositories["org/old"]["v2"] and "theirs.txt" not in hub.repositories["org/old"]["v2"]
    with pytest.raises(ReleaseError, match="org/old has v2 already, beside main"):
        remote.push(folder, "org/old@v2")


def test_a_push_without_a_login_says_how_to_log_in(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ReleaseError, match="hf auth login") as caught:
        remote.push(folder, "org/new")
    assert TOKEN not in str(caught.value) and hub.repositories == {}


@pytest.mark.parametrize("address", ["name", "a/b/c", "org/na me", "../x", "https://host/org/name"])
def test_only_repositories_are_pushed_to(address: str, folder: Path) -> None:
    with pytest.raises(ReleaseError, match=r"write ORG/NAME or ORG/NAME@REVISION"):
        remote.push(folder, address)
