import hashlib
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from dfqc.compiler._vision import import_zoo
from dfqc.compiler.errors import UsageError
from dfqc.compiler.frontend import trace
from dfqc.compiler.loading import ImageOverrides, load_model
from dfqc.compiler.passes.fold import fold
from model_files import SMALL, refuse


def run(loaded, x):
    with torch.no_grad():
        return trace(loaded).module(x)


# Every accepted form computes what the module computes.


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_state_dict_with_a_factory(tmp_path, factory, net, suffix):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), path)
    loaded = load_model(str(path), arch=f"{factory}:build", image=SMALL)
    x = models.images()
    torch.testing.assert_close(run(loaded, x), net(x).detach())
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
        lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    ],
    ids=["state_dict", "model", "nested", "module.", "compiled", "no-counter", "half"],
)
def test_usual_wrappers_and_prefixes(tmp_path, factory, net, wrap):
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(net.state_dict()), path)
    loaded = load_model(str(path), arch=f"{factory}:build", image=SMALL)
    x = models.images()
    torch.testing.assert_close(run(loaded, x), net(x).detach(), rtol=0, atol=2e-3)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["residual", "concat", "attention"])
@pytest.mark.parametrize("batch", ["dynamic", 1, 3])
def test_export_archive_with_free_or_fixed_batch(tmp_path, name, batch):
    module, path = models.build(name), tmp_path / "model.pt2"
    count = 2 if batch == "dynamic" else batch
    shapes = ({0: torch.export.Dim("n", min=1)},) if batch == "dynamic" else None
    program = torch.export.export(module, (models.images(count),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    loaded = load_model(str(path), image=ImageOverrides(mean=(0.5,) * 3, std=(0.2,) * 3))
    assert loaded.image.size == (3, 16, 16)
    assert not loaded.image.assumed
    graph = trace(loaded)
    for n in (1, 2, 5):
        x = models.images(n, seed=n)
        with torch.no_grad():
            torch.testing.assert_close(graph.module(x), module(x), rtol=1e-5, atol=1e-6)


def test_pickled_module_only_with_unsafe_load(tmp_path):
    path, module = tmp_path / "module.pt", models.build("residual")
    torch.save(module, path)
    message = refuse("models.Residual", path, image=SMALL)
    assert "--unsafe-load" in message
    assert "--arch" in message
    loaded = load_model(str(path), unsafe_load=True, image=SMALL)
    x = models.images()
    torch.testing.assert_close(run(loaded, x), module(x).detach())


def test_data_parallel_wrapper_is_removed(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(nn.DataParallel(models.build("plain")), path)
    loaded = load_model(str(path), unsafe_load=True, image=SMALL)
    assert isinstance(loaded.model, models.Plain)


# Nothing stored in a file is executed.


# Bad files: where, what was got, what to do; exit code 3.


def test_missing_file(tmp_path):
    refuse("nowhere.pt: cannot be read .No such file", tmp_path / "nowhere.pt")


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.95])
def test_truncated_file(tmp_path, net, exported, factory, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt2":
        path.write_bytes(exported.read_bytes())
    else:
        (torch.save if suffix == ".pt" else save_file)(net.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    refuse("empty|damaged", path, arch=None if suffix == ".pt2" else f"{factory}:build")


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("epoch,loss\n1,0.5\n")
    refuse("is no model file", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse("zip file without a model", path)


def test_state_dict_without_arch_says_what_to_pass(tmp_path, net):
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    refuse("--arch timm:NAME", path)


def test_tensors_that_are_no_state_dict(tmp_path):
    path = tmp_path / "list.pt"
    torch.save([torch.ones(2)], path)
    refuse("holds a list, expected a state_dict", path)


def test_wrong_arch_lists_the_keys(tmp_path, net, factory):
    path, other = tmp_path / "weights.pt", dict(net.state_dict())
    other["conv.weight"] = torch.zeros(8, 3, 5, 5)
    other["head.weight"] = other.pop("fc.weight")
    torch.save(other, path)
    message = refuse("does not fit --arch", path, arch=f"{factory}:build")
    assert "1 missing (fc.weight)" in message
    assert "1 unexpected (head.weight)" in message
    assert "conv.weight (8, 3, 5, 5) instead of (8, 3, 3, 3)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, net, factory, value):
    path, weights = tmp_path / "weights.pt", net.state_dict()
    weights["bn.running_var"][2] = value
    torch.save(weights, path)
    refuse(r"bn.running_var has 1 of 8 values that are NaN", path, arch=f"{factory}:build")


def test_archive_with_nan_is_refused(tmp_path):
    module, path = models.build("plain"), tmp_path / "model.pt2"
    with torch.no_grad():
        module.head.fc.weight[0, 0] = float("nan")
    torch.export.save(torch.export.export(module, (models.images(),)), path)
    refuse("head.fc.weight has 1 of 120", path)


def test_archive_in_half_precision_is_refused(tmp_path):
    path = tmp_path / "model.pt2"
    program = torch.export.export(models.build("no_norm").half(), (models.images().half(),))
    torch.export.save(program, path)
    refuse("torch.float16, expected torch.float32", path)


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(models.build("plain"), models.images()).save(str(path))
    refuse("TorchScript.*torch.export.save", path)


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("{0}:missing", "defines no 'missing'"),
        ("{0}:broken", r"failed at .*net.py:19.*no such depth"),
        ("{0}:not_a_module", r"returned a int, expected a module"),
        ("{0}", "expected timm:NAME"),
        ("elsewhere.py:build", "does not exist"),
        ("timm:resnet81", "unknown model; nearest: timm:resnet18"),
        ("torchvision:resnet81", "unknown model; nearest: torchvision:resnet18"),
    ],
)
def test_arch_that_cannot_be_built(tmp_path, net, factory, arch, match):
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    refuse(match, path, arch=arch.format(factory))


def test_arch_with_a_network_of_its_own_is_a_usage_error(exported):
    for source in (str(exported), "timm:resnet18"):
        with pytest.raises(UsageError, match="--arch"):
            load_model(source, arch="timm:resnet18", pretrained=False)


def test_archive_for_another_size_names_both(exported):
    refuse(
        "for images of 3x16x16, got --input-size 3x32x32",
        exported,
        image=ImageOverrides((3, 32, 32)),
    )


# Zoo names and preprocessing.


@pytest.mark.parametrize(
    ("source", "size", "resize"),
    [("timm:mobilenetv3_small_050", 224, 256), ("torchvision:shufflenet_v2_x0_5", 224, 256)],
)
def test_zoo_names_are_random_under_the_seed(source, size, resize):
    first, again, other = (load_model(source, pretrained=False, seed=s) for s in (1, 1, 2))
    weights = [next(iter(m.model.parameters())) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.image.size == (3, size, size)
    assert first.image.resize == resize
    assert not first.image.assumed
    assert first.sha256 == again.sha256 != other.sha256


def test_loading_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    load_model("timm:mobilenetv3_small_050", pretrained=False, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_timm_preprocessing_is_its_own():
    image = load_model("timm:vit_tiny_patch16_224", pretrained=False).image
    assert image.mean == (0.5, 0.5, 0.5)
    assert image.resize == 248  # floor(224 / 0.9)
    small = load_model("timm:resnet18", pretrained=False, image=ImageOverrides((3, 64, 64))).image
    assert (small.size, small.resize) == ((3, 64, 64), 67)  # floor(64 / 0.95)


def test_classes_of_the_checkpoint_are_taken(tmp_path):
    source, path = "timm:mobilenetv3_small_050", tmp_path / "weights.pt"
    timm = import_zoo("timm")
    torch.save(timm.create_model(source[5:], num_classes=7).state_dict(), path)
    loaded = load_model(str(path), arch=source)
    assert loaded.model.classifier.out_features == 7


def test_no_network_says_what_else_can_be_done(monkeypatch):
    timm = import_zoo("timm")

    def fail(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", fail)
    message = refuse("pretrained weights cannot be fetched", "timm:mobilenetv3_small_050")
    assert "--no-pretrained" in message
    assert "Name or service not known" in message


@pytest.mark.parametrize(
    ("given", "assumed"),
    [
        (ImageOverrides((3, 16, 16)), True),
        (ImageOverrides((3, 16, 16), mean=(0.5,) * 3), True),
        (ImageOverrides((3, 16, 16), (0.5,) * 3, (0.2,) * 3, 20), False),
    ],
)
def test_assumed_preprocessing_is_said(tmp_path, factory, net, given, assumed):
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    image = load_model(str(path), arch=f"{factory}:build", image=given).image
    assert image.assumed is assumed
    assert image.mean == (given.mean or (0.485, 0.456, 0.406))
    assert image.resize == given.resize


def test_preprocessing_must_fit_the_channels(tmp_path, factory, net):
    path = tmp_path / "weights.pt"
    torch.save(net.state_dict(), path)
    for given in (
        ImageOverrides((1, 16, 16)),
        ImageOverrides(mean=(0.5,)),
        ImageOverrides(std=(0.2, 0, 0.2)),
    ):
        with pytest.raises(UsageError, match=r"--(mean|std)"):
            load_model(str(path), arch=f"{factory}:build", image=given)


# The cache identity.


# Real networks.


@pytest.mark.parametrize("name", ["resnet8_cifar10", "simplenet_slim_cifar100"])
def test_real_network_loads_and_folds(assets, name):
    folder = assets / "models" / name
    code = next(folder.glob("*.py"))
    image = ImageOverrides((3, 32, 32))
    loaded = load_model(str(folder / "weights.pt"), arch=f"{code}:build", image=image)
    graph = trace(loaded)
    x = models.images(4, loaded.image)
    with torch.no_grad():
        expected = loaded.model(x)
        torch.testing.assert_close(graph.module(x), expected)
        close = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(fold(graph).module(x), expected, rtol=0, atol=close)
