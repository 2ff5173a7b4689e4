"""What goes wrong outside of the compiler: every case exits with its code and says what to do."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import models
from command import ARCHITECTURES, QUICK, run


@pytest.fixture
def build(capsys, workspace):
    """Run `dfqc build` in this process; every message is checked to show no traceback."""

    def start(*arguments, code):
        done = run(capsys, workspace, "build", *arguments, "-o", workspace.root / "package")
        assert done.code == code, done.err
        assert not (workspace.root / "package").exists()
        return done.user_fault

    return start


def stored(workspace):
    return {p.parent.name for p in workspace.cache.glob("v1/objects/*/*/artifact.json")}


def test_missing_model(build):
    message = build("nowhere.pt2", code=3)
    assert "nowhere.pt2" in message
    assert "No such file" in message


def test_truncated_model(build, workspace):
    path, *arch = workspace.weights()
    whole = Path(path).read_bytes()
    short = workspace.root / "short.pt"
    short.write_bytes(whole[: len(whole) // 2])
    message = build(short, *arch, code=3)
    assert "short.pt" in message
    assert "truncated" in message


def test_architecture_of_another_model(build, workspace):
    path, _, _, *rest = workspace.weights("residual")
    message = build(path, "--arch", f"{ARCHITECTURES}:Plain", *rest, code=3)
    assert "layer1.conv1.weight" in message or "conv1.weight" in message


def test_a_state_dict_without_an_architecture(build, workspace):
    assert "--arch" in build(workspace.weights()[0], code=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(build, workspace, value):
    path, *arch = workspace.weights()
    weights = torch.load(path, weights_only=True)
    weights["layer1.conv2.weight"][0, 0, 0, 0] = value
    torch.save(weights, workspace.root / "bad.pt")
    message = build(workspace.root / "bad.pt", *arch, code=3)
    assert "layer1.conv2.weight" in message
    assert "NaN or Inf" in message


def test_a_synthesizer_without_the_batch_norms_it_needs(build, workspace, capsys):
    message = build(*workspace.weights("no_norm"), "--synth", "zeroq", code=4)
    needing, others = message.split("synthesizers that need batch norms: ")[1].split("that do not:")
    assert "zeroq" in needing
    assert {"noise", "images"} <= {name.strip(" ,\n") for name in others.split(",")}
    planned = run(capsys, workspace, "plan", *workspace.weights("no_norm"))
    assert planned.code == 4  # said before any work


def test_wrong_input_size(build, workspace):
    path, _, arch, *_ = workspace.weights("linear_norm")
    message = build(path, "--arch", arch, "--input-size", "1x16x16", "--mean", "0", "--std", "1",
                    code=3)  # fmt: skip
    assert "1x16x16" in message
    assert "--input-size" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bitz", "w4a4"), "Did you mean --bits?"),
        (("--bits", "w9a9"), "2..8"),
        (("--bits", "8"), "expected wNaM"),
        (("--target", "ortt"), "did you mean 'ort'?"),
        (("--synth", "zerooq"), "did you mean 'zeroq'?"),
        (("--layer", "nowhere.*=w4a4"), "matches no layer"),
        (("--layer", "layer1.conv3=w4a4"), "layer1.conv1"),
        (("--synth-option", "nonsense=1"), "zeroq has no option 'nonsense'"),
        (("--quantizer-option", "weights=maximum"), "reconstruct: option weights: got 'maximum'"),
        (("--budget", "tomorrow"), "--budget"),
    ],
)
def test_flags_that_cannot_be_used(build, workspace, arguments, message):
    assert message in build(*workspace.weights(), *QUICK, *arguments, code=2)


def test_options_of_the_quantizer_are_read_before_any_work(build, workspace):
    given = ("--quantizer-option", "start=published", "--quantizer-option", "lr_latent=0.01")
    message = build(*workspace.weights(), *QUICK, "--quantizer", "adadfq", *given, code=2)
    assert "lr_latent is read by start=reconstruct only, got start=published" in message
    assert not list(workspace.cache.rglob("artifact.json"))  # nothing was traced, nothing made


@pytest.mark.parametrize("planned", [False, True], ids=["fresh", "planned before"])
def test_names_of_blocks_are_read_before_images_are_made(build, workspace, capsys, planned):
    if planned:
        assert run(capsys, workspace, "plan", *workspace.weights(), *QUICK).code == 0
    given = (*QUICK, "--quantizer", "brecq", "--quantizer-option", "join=layer1..nowhere")
    message = build(*workspace.weights(), *given, code=2)
    assert "brecq: join: expected FIRST..LAST" in message
    assert "the blocks are: " in message
    made = {json.loads(p.read_text())["stage"] for p in workspace.cache.rglob("artifact.json")}
    assert "plan" in made
    assert "synthesize" not in made
    assert run(capsys, workspace, "plan", *workspace.weights(), *given).code == 2


@pytest.mark.parametrize(
    ("options", "message", "traced"),
    [
        (("hessian=bn", "images=64"), "would not use images", False),
        (("asymmetric=false", "shift_damping=1"), "shift_damping is read with asymmetric", False),
        (("hessian=bn",), "hessian=bn needs the model with its batch norms", True),
        (("norms=0.5",), "norms=0.5 would not be used: no batch norms are known", True),
    ],
    ids=str,
)
def test_options_of_the_closed_form_are_read_before_images_are_made(
    build, workspace, capsys, options, message, traced
):
    net = workspace.weights("no_norm") if traced else workspace.weights()
    given = (*QUICK, "--synth", "noise", "--quantizer", "gptq")
    given += tuple(part for one in options for part in ("--quantizer-option", one))
    assert message in build(*net, *given, code=2)
    made = {json.loads(p.read_text())["stage"] for p in workspace.cache.rglob("artifact.json")}
    assert ("trace" in made) == traced
    assert "synthesize" not in made
    assert run(capsys, workspace, "plan", *net, *given).code == 2


def test_batch_norms_part_of_the_hessian_is_refused_with_given_images(build, workspace):
    given = ("--calib-data", workspace.images(), "--quantizer", "gptq")
    given += ("--quantizer-option", "norms=0.5")
    message = build(*workspace.weights(), *QUICK, *given, code=2)
    assert "norms=0.5 would not be used: given images count alone" in message
    made = {json.loads(p.read_text())["stage"] for p in workspace.cache.rglob("artifact.json")}
    assert "plan" in made
    assert "synthesize" not in made


def test_unknown_recipe_key(build, workspace):
    recipe = workspace.root / "recipe.yaml"
    recipe.write_text("bits: w4a4\ninputsize: 3x16x16\n")
    message = build(*workspace.weights(), "--recipe", recipe, code=2)
    assert "unknown key 'inputsize'; did you mean 'input-size'?" in message


def test_an_impossible_plan_fails_before_torch_is_loaded(workspace):
    # As a process of its own: this one has torch loaded.
    code = (
        "import sys; from dfqc.compiler.cli import main\n"
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    from dfqc.backends import ort

    narrow = dataclasses.replace(ort.TARGET, weight_bits=(8,))
    patch = f"from dfqc.compiler.spec import TargetSpec\nort.TARGET = {narrow!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", "from dfqc.backends import ort\n" + patch + code,
         "build", "nowhere.pt2", "--bits", "w4a8"],
        capture_output=True, text=True, cwd=workspace.root,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "4-bit weights are not supported by target 'ort'; expected one of 8" in done.stderr


def test_unwritable_output_is_said_before_any_work(capsys, workspace):
    (workspace.root / "file").write_text("")
    output = workspace.root / "file" / "package"  # also root cannot make a folder below a file
    done = run(capsys, workspace, "build", *workspace.weights(), "-o", output)
    assert done.code == 8
    assert "cannot be written" in done.user_fault
    assert stored(workspace) == set()


def test_an_output_that_holds_something_else_is_left_alone(capsys, workspace):
    output = workspace.root / "precious"
    output.mkdir()
    (output / "thesis.tex").write_text("important")
    done = run(capsys, workspace, "build", *workspace.weights(), "-o", output)
    assert done.code == 2
    assert "is no package" in done.user_fault
    assert (output / "thesis.tex").read_text() == "important"
    assert stored(workspace) == set()


def test_unusable_cache(capsys, workspace):
    (workspace.root / "cache").write_text("")
    done = run(capsys, workspace, "build", *workspace.weights(), "-o", workspace.root / "package")
    assert done.code == 8
    assert "--cache-dir" in done.user_fault


def test_missing_data(build, workspace):
    for flag in ("--eval-data", "--calib-data"):
        message = build(*workspace.weights(), *QUICK, flag, workspace.root / "none", code=3)
        assert "no such file" in message.lower()


def test_empty_eval_folder_is_said_before_synthesis(build, workspace):
    (workspace.root / "empty").mkdir()
    message = build(*workspace.weights(), *QUICK, "--eval-data", workspace.root / "empty", code=3)
    assert "empty" in message


def test_labels_out_of_range_are_said_before_synthesis(build, workspace):
    data = workspace.images(classes=1000)
    message = build(*workspace.weights(), *QUICK, "--eval-data", data, code=3)
    assert "out of range" in message
    assert "0..9" in message
    stages = {json.loads(p.read_text())["stage"] for p in workspace.cache.rglob("artifact.json")}
    assert stages == {"trace", "prune", "plan"}


def stages_of(workspace):
    return {json.loads(p.read_text())["stage"] for p in workspace.cache.rglob("artifact.json")}


def test_missing_batch_norms_are_said_before_synthesis(build, workspace):
    message = build(*workspace.weights("no_norm"), *QUICK, code=4)
    assert "--synth zeroq: the model has no batch norm" in message
    assert stages_of(workspace) == {"trace", "prune", "plan"}


@pytest.mark.parametrize("verb", ["build", "plan"])
def test_more_samples_than_images_are_said_before_any_are_read(capsys, workspace, verb):
    data = workspace.images(24)
    output = ("-o", workspace.root / "package") if verb == "build" else ()
    given = (*workspace.weights(), "--calib-data", data, "--samples", "25", *output)
    done = run(capsys, workspace, verb, *given)
    assert done.code == 3
    assert "holds 24 images and 25 were asked for" in done.user_fault
    assert stages_of(workspace) == {"trace", "prune", "plan"}


def test_top1_of_a_model_that_has_no_classes(build, workspace):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    path = workspace.root / "maps.pt2"
    torch.export.save(torch.export.export(net.eval(), (torch.zeros(2, 3, 16, 16),)), path)
    given = (path, *workspace.weights()[3:], *QUICK)
    message = build(*given, "--eval-data", workspace.images(), code=4)
    assert "the model's output must be (n, classes)" in message


def test_no_pretrained_with_a_file_of_weights(build, workspace):
    message = build(*workspace.weights(), "--no-pretrained", code=2)
    assert "--no-pretrained goes with timm:NAME and torchvision:NAME" in message


def test_data_without_labels(build, workspace):
    path = workspace.root / "unlabelled.npz"
    np.savez(path, images=np.zeros((4, 16, 16, 3), np.uint8))
    assert "label" in build(*workspace.weights(), *QUICK, "--eval-data", path, code=3)


class Trap:
    """Pickled, this runs code when it is read."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_a_pickle_that_would_run_code(build, workspace):
    marker = workspace.root / "executed"
    torch.save({"weights": Trap(marker)}, workspace.root / "trap.pt")
    message = build(workspace.root / "trap.pt", *workspace.weights()[1:], code=3)
    assert "--unsafe-load" in message
    assert "nothing of it was executed" in message
    assert not marker.exists()


def test_a_pickled_module_is_refused_unless_asked_for(build, workspace):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), workspace.root / "module.pt")
    assert "--unsafe-load" in build(workspace.root / "module.pt", code=3)


def test_an_unsafe_load_does_not_open_the_door_for_the_next_build(capsys, build, workspace):
    module = workspace.root / "module.pt"
    torch.save(models.build("plain"), module)
    given = (module, "--input-size", "3x16x16", "--mean", "0,0,0", "--std", "1,1,1")
    done = run(capsys, workspace, "plan", *given, "--unsafe-load", "--json")
    assert done.code == 0, done.err
    assert "--unsafe-load" in build(*given, code=3)


def test_operators_that_cannot_be_captured_are_named(build, workspace):
    factory = workspace.root / "odd.py"
    factory.write_text(
        "import torch\n"
        "class Odd(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = torch.nn.Conv2d(3, 4, 3)\n"
        "    def forward(self, x):\n"
        "        x = self.conv(x)\n"
        "        if x.sum() > 0:\n"
        "            x = x + 1\n"
        "        return x.mean((2, 3))\n"
    )
    conv = nn.Conv2d(3, 4, 3)
    torch.save({f"conv.{k}": v for k, v in conv.state_dict().items()}, workspace.root / "odd.pt")
    message = build(
        workspace.root / "odd.pt", "--arch", f"{factory}:Odd", "--input-size", "3x8x8", code=4
    )
    assert "odd.py:8" in message or "odd.py, line 8" in message


def test_a_device_that_is_not_there(build, workspace):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    message = build(*workspace.weights(), *QUICK, "--device", "cuda", code=8)
    assert "--device cpu" in message
