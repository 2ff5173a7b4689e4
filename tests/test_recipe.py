import inspect

import pytest
import yaml

from dfqc.compiler.errors import DfqcError, UnsupportedError, UsageError
from dfqc.compiler.flags import DEFAULTS, FLAGS, with_recipe_flags
from dfqc.compiler.recipe import SAMPLES, Recipe, make_recipe
from dfqc.compiler.spec import Bits, default_ends, parse_bits


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_flags_are_the_recipe_keys():
    assert {flag.name for flag in FLAGS} | {"model"} == set(Recipe.model_fields)


def test_the_help_states_the_defaults_of_the_recipe():
    told = {
        name: str(field.default)
        for name, field in Recipe.model_fields.items()
        if isinstance(field.default, str | int) and not isinstance(field.default, bool)
    }
    told["ends"] += (
        f"; weight-only: {', '.join(f'{default_ends(parse_bits(b))}' for b in ('w4a16', 'w4a32'))}"
    )
    told["samples"] = ", ".join(map(str, SAMPLES.values())) + " by --effort"
    assert told | {"threads": "all cores"} == DEFAULTS


def test_a_command_gets_every_flag_and_hands_them_on_as_one_dictionary():
    seen = {}

    def command(flags: dict, json: bool = False) -> None:
        """Help."""
        seen.update(flags, json=json)

    wrapped = with_recipe_flags(command)
    names = list(inspect.signature(wrapped).parameters)
    assert names == ["model", *(flag.name for flag in FLAGS), "json"]
    values = dict.fromkeys(names)
    wrapped(**values | {"bits": "w4a4", "json": True})
    assert seen == dict.fromkeys(names) | {"bits": "w4a4", "json": True}


def test_defaults():
    recipe = make_recipe({"model": "net.pt2"})
    assert (recipe.target, recipe.bits, recipe.synth, recipe.quantizer) == (
        "ort", "w8a8", "zeroq", "reconstruct"
    )  # fmt: skip
    assert recipe.asked_bits == recipe.ends_bits == Bits(8, 8)
    assert recipe.samples == SAMPLES["standard"]


def test_explicit_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path, "model: a.pt2\nbits: w4a4\nsamples: 12\nlayer: ['fc=w8a8']\n")
    recipe = make_recipe({"model": None, "bits": "w4a8", "layer": None, "seed": None}, file)
    assert (recipe.model, recipe.bits, recipe.samples) == ("a.pt2", "w4a8", 12)
    assert recipe.rules[0].bits == Bits(8, 8)


def test_keys_are_written_as_flags(tmp_path):
    file = write(tmp_path, "model: a.pt2\ninput-size: 3x32x32\ncalib-data: x.npz\nmax-drop: 1\n")
    recipe = make_recipe({}, file)
    assert (recipe.input_size, recipe.calib_data, recipe.max_drop) == ((3, 32, 32), "x.npz", 1.0)


def test_a_saved_recipe_reads_back_to_the_same_recipe(tmp_path):
    flags = {
        "model": "a.pt2", "input_size": "3x32x32", "mean": ".5,.5,.5", "std": "1,1,1",
        "layer": ["fc=w8a8", "re:.*down.*=w6a6"], "synth_option": ["steps=10", "loss=kl"],
        "effort": "quick", "pretrained": False, "bits": "w4a4", "ends": "same",
        "min_speedup": 1.5, "budget": "20m", "memory": "8g", "size": "1.5m",
    }  # fmt: skip
    recipe = make_recipe(flags)
    file = write(tmp_path, yaml.safe_dump(recipe.saved()))
    assert make_recipe({}, file) == recipe
    assert "input-size" in recipe.saved()


def test_places_on_this_machine_are_not_saved():
    recipe = make_recipe({"model": "a.pt2", "output": "/tmp/x", "cache_dir": "/tmp/y"})
    assert not {"output", "cache-dir"} & recipe.saved().keys()


def test_layer_rules_may_be_a_mapping(tmp_path):
    file = write(tmp_path, "model: a\nlayer: {conv1: w8a8, 'layer4.*': w6a8}\n")
    assert make_recipe({}, file).layer == ("conv1=w8a8", "layer4.*=w6a8")


def test_synthesizer_options_are_read_as_yaml():
    flags = {"model": "a", "synth_option": ["steps=10", "lr=0.5", "loss=kl", "flip=true"]}
    assert make_recipe(flags).synth_option == {"steps": 10, "lr": 0.5, "loss": "kl", "flip": True}


def test_real_data_choose_their_reader():
    assert make_recipe({"model": "a", "calib_data": "x"}).synth == "images"


@pytest.mark.parametrize("effort", SAMPLES)
def test_effort_sets_the_samples_unless_given(effort):
    assert make_recipe({"model": "a", "effort": effort}).samples == SAMPLES[effort]
    assert make_recipe({"model": "a", "effort": effort, "samples": 7}).samples == 7


@pytest.mark.parametrize(
    ("flags", "fault", "message"),
    [
        ({}, UsageError, "no model"),
        ({"bits": "w9a8"}, UsageError, r"weight bits must be 2\.\.8"),
        ({"bits": "int8"}, UsageError, "expected wNaM"),
        ({"ends": "w1a8"}, UsageError, "--ends"),
        ({"avg_bits": 1.5}, UsageError, "--avg-bits 1.5: below the narrowest.*expected 2 to 8"),
        ({"avg_bits": 9}, UsageError, "--avg-bits 9: above the widest.*expected 2 to 8"),
        (
            {"calib_data": "x.npz", "synth_option": ["iterations=5"]},
            UsageError,
            "--synth-option iterations: --calib-data gives images, and makes none",
        ),
        ({"avg_bits": 0}, UsageError, "--avg-bits: got 0"),
        ({"avg_bits": 4, "size": "1m"}, UsageError, "--avg-bits 4 and --size 1m.*use one of them"),
        ({"avg_bits": 4, "bits": "w32a32"}, UsageError, "leaves them in float"),
        ({"sensitivity": True, "bits": "w32a32"}, UsageError, "--sensitivity rounds weights"),
        ({"size": "tiny"}, UsageError, "--size: got 'tiny'"),
        ({"layer": ["fc"]}, UsageError, "PATTERN=wNaM"),
        ({"layer": ["re:(=w8a8"]}, UsageError, "no regular expression"),
        ({"target": "orrt"}, UsageError, r"unknown target 'orrt': did you mean 'ort'\?"),
        ({"synth": "zerq"}, UsageError, r"unknown synthesizer 'zerq': did you mean 'zeroq'\?"),
        ({"quantizer": "rnt"}, UsageError, "unknown quantizer 'rnt'.*expected one of.*rtn"),
        ({"effort": "fast"}, UsageError, "--effort: got 'fast'.*quick.*standard.*max"),
        ({"samples": 0}, UsageError, "--samples: got 0"),
        ({"samples": "many"}, UsageError, "--samples: got 'many'"),
        ({"input_size": "224"}, UsageError, "--input-size"),
        ({"input_size": "3xAx4"}, UsageError, "--input-size"),
        ({"input_size": "3x0x4"}, UsageError, "--input-size"),
        ({"mean": "0.5"}, UsageError, "belong together"),
        ({"mean": "x", "std": "1"}, UsageError, "--mean"),
        ({"mean": "0", "std": "0"}, UsageError, "--std.*positive"),
        ({"mean": "0", "std": "1", "input_size": "3x8x8"}, UsageError, "1 values for 3"),
        ({"synth": "images"}, UsageError, "--calib-data PATH"),
        ({"synth": "zeroq", "calib_data": "x"}, UsageError, "use one of both"),
        ({"synth_option": ["steps"]}, UsageError, "--synth-option: got 'steps', expected NAME="),
        ({"device": "tpu"}, UsageError, "--device"),
        ({"budget": "soon"}, UsageError, "--budget"),
        ({"memory": "lots"}, UsageError, "--memory"),
        ({"max_drop": -1}, UsageError, "--max-drop"),
        ({"min_speedup": 0}, UsageError, "--min-speedup"),
    ],
)
def test_wrong_values_are_refused(flags, fault, message):
    given = flags if flags == {} else {"model": "a.pt2", **flags}
    with pytest.raises(fault, match=message):
        make_recipe(given)


def test_bits_that_the_target_cannot_hold_are_refused_before_the_model_is_opened():
    from dfqc.compiler import plugins

    for name in plugins.available("target"):
        target = plugins.load("target", name).TARGET
        impossible = sorted(set(range(2, 9)) - set(target.weight_bits))
        if not impossible:
            continue
        bits = f"w{impossible[0]}a8"
        flags = {"model": "/no/such/file", "target": name}
        with pytest.raises(UnsupportedError, match="--bits"):
            make_recipe({**flags, "bits": bits})
        with pytest.raises(UnsupportedError, match="'conv1'"):
            make_recipe({**flags, "layer": [f"conv1={bits}"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nbitz: w4a4\n", r"recipe\.yaml: unknown key 'bitz'; did you mean 'bits'\?"),
        ("model: a\nmaxdrop: 1\n", r"did you mean 'max-drop'\?"),
        ("model: a\nprone: 0.5\n", "unknown key .prone.; did you mean .prune."),
        ("model: a\nsamples: [1]\n", "--samples"),
        ("- model\n", "`key: value`"),
        ("model: [\n", "is not YAML"),
        ("model: a\nlayer: 3\n", "--layer"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        make_recipe({}, write(tmp_path, text))


def test_a_missing_recipe_file_is_said(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        make_recipe({"model": "a"}, tmp_path / "none.yaml")


def test_faults_are_ours_and_never_pydantics():
    for flags in ({"model": 3}, {"model": "a", "seed": "x"}, {"model": "a", "batch": 0}):
        with pytest.raises(DfqcError):
            make_recipe(flags)
