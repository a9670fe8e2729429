"""The adapters against stand-ins for the libraries' documented interface, and against the libraries where they are."""

from __future__ import annotations

import abc
import importlib
import itertools
import pickle
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from pipeline.adapters import torchgeo
from pipeline.adapters.terratorch import Backbone, mcf_mamba, register
from pipeline.adapters.torchgeo import ShardDataset
from pipeline.batch import collate
from pipeline.model import MCFMamba, ModelConfig, save
from pipeline.model.cmss import hidden_tokens
from shards.contract import ContractError
from shards.manifest import ManifestError, Selection, select
from shards.pictures import picture
from shards.reader import Reader
from shards.reading import Reading
from shards.sample import Sample, Tile
from tests import small_dataset
from tests.small_dataset import CLASSES, CONTRACT, make_sample, one_thread, write_dataset  # noqa: F401

DOCS = (Path(__file__).parent.parent / "docs/adapters.md").read_text()
SMALL = ModelConfig(dims=(8, 16), depths=(1, 1), d_state=2)
NORMALISED = CONTRACT.normalised("statistics")


@pytest.fixture(scope="module")
def network() -> MCFMamba:
    torch.manual_seed(0)
    return MCFMamba(SMALL, CONTRACT.channels, 3).eval()


@pytest.fixture(scope="module")
def release(network: MCFMamba, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("adapters") / "release", network, NORMALISED.to_json(), "")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixteen samples; every third without label, the others unreferenced; sample 1 without a DEM."""

    def sample(number: int, size: int) -> Sample:
        made = make_sample(number, size, labelled=number % 3 > 0)
        x, y = 500_000.0 + 10 * size * number, 5_300_000.0
        place = {} if number % 3 else {"crs": "EPSG:32632", "transform": [10.0, 0.0, x, 0.0, -10.0, y]}
        tiles = dict(made.tiles)
        if number == 1:
            tiles["dem"] = Tile(np.full((1, size, size), np.nan, np.float32), np.zeros((size, size), bool))
        return Sample(made.key, tiles, made.label, {**made.meta, **place})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_dataset, "make_sample", sample)
        return write_dataset(tmp_path_factory.mktemp("adapters") / "data")


class Registry(dict[str, Callable[..., nn.Module]]):
    """TerraTorch's: constructors by their own name, KeyError turned into an error of its own."""

    def register(self, constructor: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        self[constructor.__name__] = constructor
        return constructor

    def build(self, name: str, *args: Any, **kwargs: Any) -> nn.Module:
        return self[name](*args, **kwargs)


class Factory:
    """TerraTorch's `EncoderDecoderFactory`, with a decoder of one convolution on the finest map."""

    def build_model(self, task: str, backbone: str, decoder: str, num_classes: int, **settings: Any) -> nn.Module:
        chosen = {name[9:]: value for name, value in settings.items() if name.startswith("backbone_")}
        built: Any = sys.modules["terratorch.registry"].TERRATORCH_BACKBONE_REGISTRY.build(backbone, **chosen)
        head = nn.Conv2d(built.out_channels[0], num_classes, 1)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder, self.head = built, head

            def forward(self, x: Any, **rest: Any) -> Any:
                size = next(iter(x.values())).shape[-2:]
                logits = nn.functional.interpolate(self.head(self.encoder(x, **rest)[0]), size)
                return types.SimpleNamespace(output=logits)

        return Model()


class Task:
    """TerraTorch's `SemanticSegmentationTask`: all of a batch but image, mask and filename goes to the model."""

    def __init__(self, model_factory: str, model_args: dict[str, Any], ignore_index: int, **_: Any) -> None:
        self.model = Factory().build_model("segmentation", **model_args)
        self.ignore = ignore_index

    def step(self, batch: dict[str, Any]) -> Tensor:
        rest = {name: value for name, value in batch.items() if name not in ("image", "mask", "filename")}
        logits = self.model(batch["image"], **rest).output
        return nn.functional.cross_entropy(logits, batch["mask"], ignore_index=self.ignore)


class Trainer:
    """Lightning's, in little."""

    def __init__(self, **_: Any) -> None: ...

    def fit(self, task: Task, train: Any, val: Any) -> None:
        for batch in train:
            task.step(batch).backward()
        with torch.no_grad():
            self.losses = [task.step(batch).item() for batch in val]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry()
    pages = {
        "terratorch": {},
        "terratorch.registry": {"TERRATORCH_BACKBONE_REGISTRY": registry},
        "terratorch.models": {"EncoderDecoderFactory": Factory},
        "terratorch.tasks": {"SemanticSegmentationTask": Task},
        "lightning": {},
        "lightning.pytorch": {"Trainer": Trainer},
    }
    for name, content in pages.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return registry


def nested(data: str, *numbers: int) -> dict[str, Any]:
    return default_collate([ShardDataset(data, images="nested")[number] for number in numbers])


def samples(data: str) -> list[Sample]:
    selection = select(data)
    reader = Reader(selection, Reading())
    return [reader.sample(0, number) for number in range(len(selection))]


def fused(network: MCFMamba, data: str, *numbers: int) -> list[Tensor]:
    """What the network makes of these samples when our own code loads and normalises them."""
    every = samples(data)
    batch = collate([(every[number], number) for number in numbers], NORMALISED)
    return [one.permute(0, 3, 1, 2) for one in network.pyramid(batch.values, hidden_tokens({}, batch.valid))]


def same(maps: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, others, strict=True))


@torch.no_grad()
def test_a_registered_backbone_gives_the_fused_maps_of_the_release(
    stand_in: Registry, release: Path, network: MCFMamba, data: str
) -> None:
    assert register() == list(stand_in)
    backbone: Any = stand_in.build("mcf_mamba", release=release, normalise=True)
    assert all(module.training for module in backbone.modules()) and backbone.out_channels == [8, 16]
    batch = nested(data, 0, 2)
    maps = backbone.eval()(batch.pop("image"), **batch)
    assert [tuple(one.shape) for one in maps] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    assert same(maps, fused(network, data, 0, 2))
    assert not same(backbone({"s1": torch.zeros(2, 2, 32, 32)}), maps)


def test_fresh_backbones_of_every_size_are_registered(stand_in: Registry) -> None:
    assert {f"mcf_mamba_{size}" for size in ("nano", "tiny", "small", "base")} < set(register())
    backbone: Any = stand_in.build("mcf_mamba_nano", modalities={"s1": 2, "x": 5}, merge_method="concat", d_state=2)
    assert backbone.out_channels == [24, 48, 96, 192] and backbone.network.channels == {"s1": 2, "x": 5}
    assert not len(backbone.normalise)


def test_without_terratorch_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "terratorch", None)
    with pytest.raises(ImportError, match=r"pip install 'mcf-mamba\[terratorch\]'"):
        register()


@torch.no_grad()
def test_without_normalise_images_go_in_as_they_are(release: Path, network: MCFMamba) -> None:
    images = {name: torch.rand(1, bands, 32, 32) for name, bands in CONTRACT.channels.items()}
    expected = [one.permute(0, 3, 1, 2) for one in network.pyramid(images)]
    assert same(mcf_mamba(release).eval()(images), expected)
    assert not same(mcf_mamba(release, normalise=True).eval()(images), expected)


@torch.no_grad()
def test_what_is_missing_is_hidden(release: Path, network: MCFMamba) -> None:
    backbone = mcf_mamba(release, normalise=True).eval()
    s1, dem = torch.rand(1, 2, 32, 32) - 13, torch.full((1, 1, 32, 32), torch.nan)
    alone = backbone({"s1": s1})
    assert same(backbone({"s1": s1, "dem": dem}), alone)
    assert same(backbone({"s1": s1, "dem": dem.nan_to_num(7)}, valid={"dem": torch.zeros(1, 32, 32).bool()}), alone)
    assert not same(backbone({"s1": s1, "dem": dem.nan_to_num(7)}), alone)
    hole = s1.clone()
    hole[:, 0, :9, :9] = torch.nan  # in one band
    valid = torch.ones(1, 32, 32).bool()
    valid[:, :9, :9] = False
    assert same(backbone({"s1": hole}), backbone({"s1": s1}, valid={"s1": valid})) and not same(
        backbone({"s1": hole}), alone
    )


@torch.no_grad()
def test_concat_lays_the_encoders_maps_side_by_side(release: Path, network: MCFMamba) -> None:
    images = {name: torch.rand(1, bands, 32, 32) for name, bands in CONTRACT.channels.items()}
    backbone = mcf_mamba(release, merge_method="concat").eval()
    maps, own = backbone(images), network.encode(images)
    assert backbone.out_channels == [16, 32] == [one.shape[1] for one in maps]
    assert torch.allclose(maps[1][:, 16:], own["dem"][1].permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize("merge", ["fusion", "concat"])
def test_every_parameter_of_a_backbone_gets_a_gradient(release: Path, merge: Any) -> None:
    backbone = mcf_mamba(release, merge_method=merge)
    images = {"s1": torch.rand(1, 2, 32, 32), "dem": torch.rand(1, 1, 32, 32)}
    hole = {name: torch.ones(1, 32, 32).bool() for name in images}
    hole["s1"][:, :8], hole["dem"][:, 8:16] = False, False  # so that the vectors of hidden tokens are used
    sum(one.square().sum() for one in backbone(images, valid=hole)).backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == []


@torch.no_grad()
def test_any_size_and_a_plain_tensor(release: Path) -> None:
    backbone = mcf_mamba(release, modality="s1").eval()
    maps = backbone(torch.rand(1, 2, 50, 45))
    assert [tuple(one.shape[2:]) for one in maps] == [(13, 12), (7, 6)]
    image, valid = torch.rand(1, 2, 8, 8), torch.ones(1, 8, 8).bool()
    alone = Backbone(MCFMamba(SMALL, {"s1": 2}, 1)).eval()
    assert same(alone(image), alone({"s1": image}))
    valid[:, :4] = False
    assert same(alone(image, valid=valid), alone({"s1": image}, valid={"s1": valid}))
    assert not same(alone(image), alone(image, valid=valid))


@torch.no_grad()
def test_drop_path_is_drawn_while_training_and_off_otherwise() -> None:
    torch.manual_seed(1)
    backbone = Backbone(MCFMamba(ModelConfig(dims=(8, 16), depths=(3, 3), d_state=2, drop_path=0.8), {"s1": 2}, 1))
    image = torch.rand(4, 2, 16, 16)
    torch.manual_seed(2)
    one, other = backbone(image), backbone(image)
    torch.manual_seed(2)
    assert same(backbone(image), one) and not same(other, one)
    backbone.eval()
    assert same(backbone(image), backbone(image))


def test_errors_of_a_backbone_say_what_it_takes(release: Path) -> None:
    backbone = mcf_mamba(release, normalise=True)
    image = torch.rand(1, 2, 16, 16)
    for images, error in (
        ({"s2": image}, "unknown modality 's2'; this backbone has s1, dem"),
        ({"s1": image[:, :1]}, r"s1 is \(1, 1, 16, 16\); \[B, 2, H, W\] \(VV, VH\) is needed"),
        ({"s1": image[:, :, None]}, r"s1 is \(1, 2, 1, 16, 16\)"),
        (image, "a plain tensor could be any of s1, dem; .*modality=NAME"),
        ({}, "no modality given"),
    ):
        with pytest.raises(ValueError, match=error):
            backbone(images)
    with pytest.raises(ValueError, match="valid: dem has no image; there are s1"):
        backbone({"s1": image}, valid={"dem": torch.ones(1, 16, 16).bool()})
    with pytest.raises(ValueError, match=r"valid\['s1'\] is \(1, 8, 8\); these images are \(1, 16, 16\)"):
        backbone({"s1": image}, valid={"s1": torch.ones(1, 8, 8).bool()})
    with pytest.raises(TypeError, match=r"valid\['s1'\] is torch.float32; a bool"):
        backbone({"s1": image}, valid={"s1": torch.ones(1, 16, 16)})
    with pytest.raises(ValueError, match="'mean' is not one of fusion, concat"):
        mcf_mamba(release, merge_method="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="modality: 'x' is not one of s1, dem"):
        mcf_mamba(release, modality="x")


def test_samples_are_those_of_the_shards(data: str) -> None:
    every, dataset = samples(data), ShardDataset(data)
    assert len(dataset) == len(every) == 16
    for sample, found in zip((dataset[number] for number in range(16)), every, strict=True):
        s1, dem = found.tiles["s1"], found.tiles["dem"]
        assert sample["key"] == found.key and sample["image"].shape == (3, 32, 32)
        assert sample["image"].dtype == torch.float32 and sample["image"].isfinite().all()
        assert torch.equal(sample["mask_valid"], torch.from_numpy(np.stack([s1.valid, dem.valid])))
        assert np.array_equal(sample["image"][:2].numpy(), np.where(s1.valid, s1.values, 0))
        label = np.full((32, 32), CLASSES.ignore) if found.label is None else found.label
        assert sample["mask"].dtype == torch.int64 and np.array_equal(sample["mask"].numpy(), label)
    absent = dataset[[found.key for found in every].index("sample-001")]
    assert not absent["image"][2].any() and not absent["mask_valid"][1].any()


def test_names_of_the_layouts_and_the_order_of_sensors(data: str) -> None:
    whole = ShardDataset(data)[2]
    separate = ShardDataset(data, sensors=["dem", "s1"], images="separate")[2]
    assert torch.equal(torch.cat([separate["image_s1"], separate["image_dem"]]), whole["image"])
    assert torch.equal(separate["mask_valid_s1"], whole["mask_valid"][0])
    inside = ShardDataset(data, images="nested")[2]
    assert torch.equal(inside["image"]["dem"], whole["image"][2:]) and [*inside["valid"]] == ["s1", "dem"]
    turned = ShardDataset(data, sensors=["dem", "s1"])[2]
    assert torch.equal(turned["image"], whole["image"][[2, 0, 1]])


@pytest.mark.parametrize("how", ["range", "statistics"])
def test_normalised_as_the_pipeline_does(data: str, how: Any) -> None:
    batch = collate([(found, 0) for found in samples(data)[:4]], CONTRACT.normalised(how))
    dataset = ShardDataset(data, normalise=how, images="nested")
    for number, name in itertools.product(range(4), CONTRACT.sensors):
        assert torch.equal(dataset[number]["image"][name], batch.values[name][number])


def test_where_samples_lie(data: str) -> None:
    dataset = ShardDataset(data)
    found = {sample["key"]: sample for sample in (dataset[number] for number in range(len(dataset)))}
    assert found["sample-003"]["crs"] == "EPSG:32632"
    assert found["sample-003"]["bounds"].tolist() == [500_960.0, 5_299_680.0, 501_280.0, 5_300_000.0]
    assert found["sample-003"]["transform"].tolist() == [10.0, 0.0, 500_960.0, 0.0, -10.0, 5_300_000.0]
    assert found["sample-004"]["crs"] == "" and found["sample-004"]["bounds"].tolist() == [0.0, 0.0, 32.0, 32.0]


def test_splits_transforms_and_numbers(data: str) -> None:
    sizes = [len(ShardDataset(data, split)) for split in ("train", "val", "test")]
    assert sizes == [8, 4, 4]
    dataset = ShardDataset(data, "val", transforms=lambda sample: {"twice": 2 * sample["image"]})
    assert torch.equal(dataset[0]["twice"], 2 * ShardDataset(data, "val")[0]["image"])
    for number in (-1, 4):
        with pytest.raises(IndexError, match=rf"sample {number} of 4"):
            dataset[number]
    assert len(list(dataset)) == 4  # type: ignore[arg-type]


def test_errors_of_a_dataset_say_what_is_allowed(data: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: 'stacked' is not one of concatenated, separate, nested"):
        ShardDataset(data, images="stacked")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalise: True is not one of None, range, statistics"):
        ShardDataset(data, normalise=True)  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="8 of split 'train'"):
        ShardDataset(data, "training")
    with pytest.raises(ManifestError, match="not a dataset"):
        ShardDataset(tmp_path)
    with pytest.raises(ContractError, match="no modality 's2'"):
        ShardDataset(data, sensors=["s2"])


@pytest.mark.parametrize("layout", ["concatenated", "nested"])
def test_workers_read_what_one_process_reads(data: str, layout: Any) -> None:
    dataset = ShardDataset(data, images=layout)
    expected = default_collate([dataset[number] for number in range(16)])  # the files are open when workers fork
    batches = list(DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork"))
    assert [key for batch in batches for key in batch["key"]] == expected["key"]
    assert torch.equal(torch.cat([batch["mask"] for batch in batches]), expected["mask"])
    if layout == "concatenated":
        assert torch.equal(torch.cat([batch["image"] for batch in batches]), expected["image"])
    copy = pickle.loads(pickle.dumps(dataset))  # as a spawned worker gets it
    assert copy._own is None and copy[3]["key"] == dataset[3]["key"]


def test_every_process_opens_files_of_its_own(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, opened = ShardDataset(data), list[Selection]()
    monkeypatch.setattr(torchgeo, "Reader", lambda selection, how: opened.append(selection) or Reader(selection, how))
    assert dataset[0]["key"] == dataset[0]["key"] and len(opened) == 1
    assert opened[0].parts[0].table is not dataset.selection.parts[0].table
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert dataset[0]["key"] and len(opened) == 2


@pytest.mark.parametrize("layout", ["concatenated", "separate", "nested"])
def test_plots(data: str, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, normal = (ShardDataset(data, images=layout, normalise=how) for how in (None, "statistics"))
    figure = plain.plot(plain[2] | {"prediction": plain[2]["mask"]}, suptitle="one $")
    assert [axes.get_title() for axes in figure.axes] == ["s1", "dem", "mask", "prediction"]
    assert [axes.get_title() for axes in plain.plot(plain[2], show_titles=False).axes] == ["", "", ""]
    assert np.ptp(figure.axes[0].images[0].get_array()) > 0.5
    shown: list[Any] = []
    monkeypatch.setattr(torchgeo, "picture", lambda *arguments: shown.append(arguments) or picture(*arguments))
    for dataset in (plain, normal):
        dataset.plot(dataset[2])
    for (_, ours, valid), (_, other, _) in zip(shown[:2], shown[2:], strict=True):
        assert np.abs(ours - other)[:, valid].mean() < 0.05  # of their units; not 0, as a few values were clipped


def test_where_torchgeo_is_installed_the_class_counts_as_one_of_its(monkeypatch: pytest.MonkeyPatch) -> None:
    class NonGeoDataset(Dataset[Any], abc.ABC): ...

    module = types.ModuleType("torchgeo.datasets")
    module.__dict__["NonGeoDataset"] = NonGeoDataset
    monkeypatch.setitem(sys.modules, "torchgeo", types.ModuleType("torchgeo"))
    monkeypatch.setitem(sys.modules, "torchgeo.datasets", module)
    monkeypatch.delitem(sys.modules, "pipeline.adapters.torchgeo")
    again = importlib.import_module("pipeline.adapters.torchgeo")
    monkeypatch.setattr("pipeline.adapters.torchgeo", torchgeo)
    assert issubclass(again.ShardDataset, NonGeoDataset)


@pytest.fixture
def beside(release: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder where the examples of the documentation find what they name."""
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "release").symlink_to(release)
    monkeypatch.chdir(tmp_path)
    yield


def run_examples() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL):
        small = example.replace("[256, 128, 64, 32]", "[8, 4]").replace('channels": 64', 'channels": 8')
        exec(small, found)
    return found


def test_the_documentations_examples_run(stand_in: Registry, beside: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_examples()
    assert "'image': (3, 32, 32), 'mask_valid': (2, 32, 32), 'mask': (32, 32)" in capsys.readouterr().out
    assert found["batch"]["image"].shape == (4, 3, 32, 32) and Path("sample.png").stat().st_size > 1000
    assert found["batch"].keys() == found["sample"].keys()


def test_the_real_libraries_run_the_documentations_examples(beside: None) -> None:
    pytest.importorskip("terratorch")
    found = run_examples()
    images = {"s1": torch.randn(2, 2, 50, 50) - 12, "dem": torch.full((2, 1, 50, 50), 100.0)}
    with torch.no_grad():
        assert found["model"].keys() and found["task"].model(images).output.shape == (2, 3, 50, 50)


def test_the_real_torchgeo_trains_on_our_samples(data: str) -> None:
    datasets = pytest.importorskip("torchgeo.datasets")
    from lightning.pytorch import Trainer
    from torchgeo.datamodules import NonGeoDataModule
    from torchgeo.trainers import SemanticSegmentationTask

    kornia = pytest.importorskip("kornia.augmentation")
    assert issubclass(ShardDataset, datasets.NonGeoDataset)
    module = NonGeoDataModule(ShardDataset, batch_size=4, num_workers=2, root=data, normalise="range")
    flips = kornia.AugmentationSequential(kornia.RandomHorizontalFlip(p=1.0), data_keys=None, keepdim=True)
    module.train_aug, module.aug = flips, lambda batch: batch
    task = SemanticSegmentationTask("unet", "resnet18", None, 3, "multiclass", 3, ignore_index=255)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(task, datamodule=module)
    assert trainer.callback_metrics["val_loss"].isfinite()
    for layout in ("concatenated", "separate"):
        batch = default_collate([ShardDataset(data, images=layout)[number] for number in (1, 2)])
        turned = flips(dict(batch))
        for name in batch:
            if name.startswith(("image", "mask")):
                assert torch.equal(turned[name], batch[name].flip(-1)), name
