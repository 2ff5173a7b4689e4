import hashlib
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
from dfqc.compiler import _archive, _identity
from dfqc.compiler._vision import import_zoo
from dfqc.compiler.errors import LoadError, UsageError
from dfqc.compiler.frontend import trace
from dfqc.compiler.loading import ImageOverrides, load_model
from dfqc.compiler.passes.fold import fold

SMALL = ImageOverrides(input_size=(3, 16, 16))
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

def build():
    return Net()

def broken():
    raise ValueError("no such depth")

def not_a_module():
    return 3
"""


@pytest.fixture(scope="session")
def assets():
    """The folder of real networks, which is no part of the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("DFQC_ASSETS", default))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real networks at {folder}; set DFQC_ASSETS")
    return folder


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture
def net(factory):
    """A trained-looking instance of the factory's network."""
    scope = {}
    exec(FACTORY, scope)
    module = scope["build"]()
    models.randomize_norms(module)
    return module.eval()


def run(loaded, x):
    with torch.no_grad():
        return trace(loaded).module(x)


def refuse(match, source, **options):
    with pytest.raises(LoadError, match=match) as caught:
        load_model(str(source), **options)
    assert caught.value.exit_code == 3
    return str(caught.value)


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


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.mark.parametrize("arch", [None, "timm:resnet18"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_executed(tmp_path, zipped, arch):
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    content = {"state_dict": {"w": torch.ones(2)}, "extra": Attack(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refuse("could run any code", path, arch=arch)
    assert "nothing of it was executed" in message
    assert not marker.exists()
    with pytest.raises(LoadError):  # it does execute when the user vouches for it: a real attack
        load_model(str(path), unsafe_load=True)
    assert marker.exists()


def edit_archive(path, change):
    """Rewrite a .pt2 archive; `change(name, content)` returns the new content."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "model.pt2"
    shapes = ({0: torch.export.Dim("n", min=1)},)
    program = torch.export.export(models.build("plain"), (models.images(),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def test_code_in_the_sample_inputs_of_an_archive_is_not_executed(tmp_path, exported):
    marker = tmp_path / "executed"
    evil = pickle.dumps(((Attack(marker),), {}))
    edit_archive(exported, lambda name, old: evil if "sample_inputs" in name else old)
    refuse("pickle that needs code", exported)
    assert not marker.exists()


def test_code_in_a_pickled_weight_of_an_archive_is_not_executed(tmp_path, exported):
    marker = tmp_path / "executed"

    def change(name, old):
        if name.endswith("weights_config.json"):
            config = json.loads(old)
            for item in config["config"].values():
                item["use_pickle"] = True
            return json.dumps(config)
        return pickle.dumps(Attack(marker)) if name.endswith("/weight_0") else old

    edit_archive(exported, change)
    refuse("pickle that needs code", exported)
    assert not marker.exists()


def test_code_in_a_size_expression_of_an_archive_is_not_executed(tmp_path, exported):
    marker = tmp_path / "executed"

    def poison(value):
        if isinstance(value, dict):
            evil = f"__import__('os').close(__import__('os').open({str(marker)!r}, 65))"
            return {k: evil if k == "expr_str" else poison(v) for k, v in value.items()}
        return [poison(v) for v in value] if isinstance(value, list) else value

    edit_archive(
        exported,
        lambda name, old: json.dumps(poison(json.loads(old))) if "models/" in name else old,
    )
    refuse("holds the expression", exported)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Mul(Integer(49), Symbol('s0', integer=True))", True),
        ("FloorDiv(s0 - 1, 2) + 1", True),
        ("__import__('os')", False),
        ("Symbol('os.system')", False),
        ("().real", False),
        ("exec(s0)", False),
        ("preview(s0)", False),
        ('Symbol("s0")', False),
        (None, False),
    ],
)
def test_size_expressions_are_arithmetic_only(text, plain):
    assert _archive.is_plain_expression(text) is plain


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


def test_digest_follows_bytes_and_not_names(tmp_path, factory):
    a, b = tmp_path / "a.pt", tmp_path / "b.pt"
    a.write_bytes(b"same")
    b.write_bytes(b"same")
    arch = f"{factory}:build"
    digest = _identity.model_digest(str(a), arch, True, 0)
    assert digest == _identity.model_digest(str(b), arch, True, 5)
    assert digest != _identity.model_digest(str(a), f"{factory}:broken", True, 0)
    factory.write_text(FACTORY + "\n# changed\n")
    assert digest != _identity.model_digest(str(a), arch, True, 0)


def test_digest_of_a_zoo_name_counts_the_seed_only_without_pretrained_weights():
    def digest(pretrained, seed):
        return _identity.model_digest("timm:resnet18", None, pretrained, seed)

    assert digest(True, 0) == digest(True, 1) != digest(False, 0) != digest(False, 1)


def test_identity_needs_no_torch():
    code = "import sys, dfqc.compiler._identity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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


@pytest.fixture
def split_factory_folder(tmp_path):
    """A factory whose layers lie in a module and in a package beside it."""
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "__init__.py").write_text("from .inner import width\n")
    (tmp_path / "blocks" / "inner.py").write_text("width = 4\n")
    (tmp_path / "near.py").write_text("import blocks\n")
    (tmp_path / "other.py").write_text("")
    (tmp_path / "net.py").write_text("def build():\n    from near import blocks\n")
    (tmp_path / "weights.pt").write_bytes(b"weights")
    return tmp_path


def factory_digest(folder):
    arch = f"{folder / 'net.py'}:build"
    return _identity.model_digest(str(folder / "weights.pt"), arch, True, 0)


@pytest.mark.parametrize("name", ["near.py", "blocks/__init__.py", "blocks/inner.py", "net.py"])
def test_a_change_of_what_a_factory_imports_is_another_model(split_factory_folder, name):
    before = factory_digest(split_factory_folder)
    assert factory_digest(split_factory_folder) == before
    path = split_factory_folder / name
    path.write_text(path.read_text() + "\nwidth = 5\n")
    assert factory_digest(split_factory_folder) != before


def test_what_a_factory_does_not_import_is_no_part_of_the_model(split_factory_folder):
    before = factory_digest(split_factory_folder)
    (split_factory_folder / "other.py").write_text("width = 5\n")
    assert factory_digest(split_factory_folder) == before


@pytest.mark.parametrize("package", ["torch", "torchvision", "timm"])
def test_versions_of_what_a_factory_imports_count(split_factory_folder, monkeypatch, package):
    (split_factory_folder / "near.py").write_text(f"import {package}.nn\n")
    before = factory_digest(split_factory_folder)
    version = _identity.importlib.metadata.version
    monkeypatch.setattr(
        _identity.importlib.metadata,
        "version",
        lambda name: "99" if name == package else version(name),
    )
    assert factory_digest(split_factory_folder) != before
