"""Options of the reconstruction: what is refused, what units they make, what they hold and tell."""

import itertools
import logging

import pytest
import torch

import models
import quantized
from dfqc.compiler import plugins
from dfqc.compiler.contracts import QuantizerSupplies
from dfqc.compiler.errors import UsageError
from dfqc.compiler.graph import blocks, layer_nodes
from dfqc.compiler.ledger import _rounding
from dfqc.compiler.options import plugin_options
from dfqc.compiler.passes import bias
from dfqc.compiler.quantize import _caches, _passes, gptq, reconstruct
from dfqc.compiler.quantize._units import merge_blocks

CPU = torch.device("cpu")
HELD_OUT = models.images(16, seed=9)


def run(net="residual", bits="w3a3", *, calib=None, options=reconstruct.Options, **chosen):
    graph = quantized.folded(net)
    supplies = QuantizerSupplies(unfolded=quantized.traced(net), held_out=HELD_OUT)
    chosen = options(**{"iterations": 4, "batch_size": 8, **chosen})
    return reconstruct.quantize(
        *(graph, calib or quantized.calib(), quantized.plan(graph, bits), chosen),
        rng=torch.Generator().manual_seed(0), device=CPU, supplies=supplies,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"power_end": 3.0, "warm_up": 0.1}, "warm_up, power_end are read with rounding=soft only"),
        ({"rounding": "soft", "round_weight": 0, "warm_up": 0.1}, "with round_weight above 0"),
        ({"act_iterations": 7}, "act_iterations is read with order=weights-first only"),
        ({"output_temperature": 2.0}, "output_weight above 0"),
        ({"tune_iterations": 0, "tune_rate": 0.1}, "tune_rate is read with tune_iterations above"),
        ({"unit": "layer", "least_layers": 3}, "least_layers is read with unit=block only"),
        ({"keep_best": False, "compete": False}, "compete is read with keep_best=true only"),
        ({"join": "a..b", "merge": 2}, "got merge=2 beside it"),
        ({"unit": "layer", "merge": 2}, "takes blocks together"),
        ({"percentile": 99.0}, "percentile is read with acts=percentile only"),
        ({"lr_rounding": 0, "undecided": 0.2}, "undecided is read with lr_rounding above 0 only"),
        (
            {"error_weight": 0, "output_weight": 1, "norm": 2.4},
            "norm is read with error_weight above 0 only",
        ),
        ({"error_weight": 0}, "error_weight=0: leaves no error to learn from"),
        (
            {"lr_weight_scale": 0, "lr_act_scale": 0, "lr_bias": 0, "relative": False},
            "relative is read with a rate of scales or biases",
        ),
        (
            {"lr_rounding": 0, "lr_weight_scale": 0, "lr_act_scale": 0, "lr_bias": 0, "drop": 0.1},
            "drop is read with a rate .* above 0 only",
        ),
        ({"order": "weights-first", "lr_act_scale": 0.1}, "lr_act_scale is read with order=joint"),
        (
            {"order": "weights-first", "inputs": "quantized", "drop": 0.2},
            "drop is read with order=joint, or inputs=mixed, only",
        ),
        ({"tune_rate": 0, "tune_temperature": 1.0}, "tune_rate or tune_rounding above 0 only"),
    ],
    ids=str,
)
def test_options_that_would_not_be_read_are_refused(given, message):
    with pytest.raises(UsageError, match=f"^reconstruct: .*{message}"):
        plugin_options(reconstruct, "reconstruct", "quick", given)


@pytest.mark.parametrize("name", ["adaround", "brecq", "qdrop", "genie-m", "reconstruct"])
@pytest.mark.parametrize("effort", ["quick", "standard", "max"])
def test_what_a_preset_sets_is_read(name, effort):
    plugin = plugins.load("quantizer", name)
    preset = plugin.PRESETS[effort]
    assert plugin_options(plugin, name, effort, preset) == plugin.Options(**preset)
    given = {"warm_up": 0.3} if name != "reconstruct" else {"rounding": "soft", "warm_up": 0.3}
    assert plugin_options(plugin, name, effort, given).warm_up == 0.3
    if name != "brecq":
        with pytest.raises(UsageError, match=f"^{name}: lr_act_second is read with"):
            plugin_options(plugin, name, effort, {"lr_act_second": 0.1})


@pytest.mark.parametrize("name", ["rtn", "squant", "gptq", "udfc"])
def test_a_percentile_is_read_with_its_ranges_only(name):
    plugin = plugins.load("quantizer", name)
    with pytest.raises(UsageError, match=f"^{name}: percentile is read with acts=percentile only"):
        plugin_options(plugin, name, "quick", {"percentile": 99.0})
    chosen = plugin_options(plugin, name, "quick", {"percentile": 99.0, "acts": "percentile"})
    assert chosen.percentile == 99.0


def test_rounding_alone_has_all_iterations(monkeypatch):
    seen = []
    train = _passes.train_unit

    def spy(region, layers, grids, data, options, **rest):
        seen.append(options.iterations)
        return train(region, layers, grids, data, options, **rest)

    monkeypatch.setattr(_passes, "train_unit", spy)
    chosen = {"iterations": 5, "tune_iterations": 0, "keep_best": False}
    run(**chosen, lr_weight_scale=0, lr_act_scale=0, lr_bias=0)
    assert set(seen) == {5}
    seen.clear()
    run(**chosen)
    assert set(seen) == {2, 3}  # steps and biases alone, then rounding too


def test_rounding_that_is_not_learned_needs_no_loss_that_decides_it():
    chosen = {"rounding": "soft", "lr_rounding": 0, "tune_iterations": 0, "keep_best": False}
    fixed = run(**chosen, lr_weight_scale=0, lr_bias=0.1)
    free = run(**chosen, lr_weight_scale=0, lr_bias=0)
    for name, weight in free.weights.items():
        torch.testing.assert_close(fixed.weights[name].codes, weight.codes, rtol=0, atol=0)
    assert any(not torch.equal(fixed.biases[name], bias) for name, bias in free.biases.items())


def test_named_blocks_are_one_unit():
    graph = quantized.folded("residual")
    plan = quantized.plan(graph, "w4a4")
    names = [block.name for block in merge_blocks(graph, plan.layers)]
    assert len(names) > 3
    found = merge_blocks(graph, plan.layers, join=f"{names[1]}..{names[2]}")
    assert [b.name for b in found] == [names[0], f"{names[1]}..{names[2]}", *names[3:]]
    assert all(a.exit == b.entry for a, b in itertools.pairwise(found))
    two = merge_blocks(graph, plan.layers, join=f" {names[2]}..{names[3]},{names[0]}..{names[1]}")
    assert [b.name for b in two] == [f"{a}..{b}" for a, b in [names[:2], names[2:4]]] + names[4:]
    whole = [name for block in blocks(graph) for name in block.layers]
    assert [name for block in two for name in block.layers] == whole
    # What is left alone has `least_layers`, but never reaches into what is named.
    state = run(join=f"{names[1]}..{names[2]}")
    units = [row["unit"] for row in state.info["units"]]
    assert units == [names[0], f"{names[1]}..{names[2]}", *names[3:]]


def test_nothing_but_what_has_no_weights_joins_what_is_named():
    graph = quantized.folded("residual")
    conv, first, second, head, *_ = [block.name for block in blocks(graph)]
    layers = {name for name, _ in layer_nodes(graph) if not name.startswith(second)}
    found = merge_blocks(graph, layers, 1, 10, f"{conv}..{first}")
    assert [block.name for block in found] == [f"{conv}..{second}", head]


def test_a_wrong_name_ends_it_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr(reconstruct, "_ready", None)
    with pytest.raises(UsageError, match="the blocks are: "):
        run(join="nothing..else")


@pytest.mark.parametrize(
    ("join", "message"),
    [
        ("nothing..{0}", r"got 'nothing\.\..*the blocks are: "),
        ("{0}", "expected FIRST..LAST"),
        ("{1}..{0}", "does not run from a block to a later one"),
        ("{1}..{1}", "does not run from a block to a later one"),
        ("{0}..{1},{1}..{2}", "shares a block"),
        ("{0}..{2},{1}..{2}", "shares a block"),
    ],
)
def test_blocks_that_cannot_be_joined_are_refused(join, message):
    graph = quantized.folded("residual")
    names = [block.name for block in merge_blocks(graph, dict(layer_nodes(graph)))]
    with pytest.raises(UsageError, match=message):
        merge_blocks(graph, dict(layer_nodes(graph)), join=join.format(*names))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit": "layer"},
        {"merge": 2},
        {"weighting": "fisher"},
        {"weighting": "fisher", "cache": "recompute"},
    ],
    ids=str,
)
@pytest.mark.parametrize("net", ["residual", "depthwise", "concat"])
def test_what_caches_hold_is_known_before(net, options, monkeypatch):
    most = [0]

    class Watched(_caches.Budget):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            most[0] = max(most[0], self.used) if name == "used" else most[0]

    monkeypatch.setattr(_passes, "Budget", Watched)
    monkeypatch.setattr(reconstruct, "_CHOOSING", 16)  # all that there are
    chosen = {"copies": 2, "least_layers": 1, "skip_wide": False, **options}
    run(net, calib=quantized.calib(96), keep_best=True, tune_iterations=0, **chosen)
    graph, asked = quantized.folded(net), reconstruct.Options(batch_size=1, **chosen)
    width = 0 if asked.cache == "recompute" else 4
    planned = (2 * 72 + 16) * reconstruct._cached_values(asked, graph, width)
    assert most[0] <= planned <= 1.6 * most[0]


def test_biases_that_were_tuned_are_not_corrected_again(monkeypatch):
    def choose(graph, states, *_):
        return states[kept], {name: float(name != kept) for name in states}

    monkeypatch.setattr(reconstruct, "keep_best", choose)
    monkeypatch.setattr(reconstruct, "led_astray", lambda *_: ([], {}))
    for kept, learned in (("tuned", True), ("reconstructed", False)):
        state = run(bits="w4a4", lr_bias=0.0, tune_iterations=4)
        assert state.info["kept"] == kept
        assert state.info["learned_biases"] is learned
    state = run(bits="w4a4", lr_bias=0.0, tune_iterations=4, keep_best=False)
    assert state.info["learned_biases"] is True
    graph, unfolded = quantized.folded("residual"), quantized.traced("residual")
    after = bias.correct(
        *(graph, unfolded, state, quantized.calib(), bias.options_of("auto")),
        device=CPU, held_out=HELD_OUT,
    )  # fmt: skip
    assert all(torch.equal(after.biases[name], one) for name, one in state.biases.items())
    assert (
        run(bits="w4a4", lr_bias=0.0, tune_iterations=4, tune_rate=0.0, keep_best=False).info[
            "learned_biases"
        ]
        is False
    )


def test_codes_that_tuning_changed_are_called_tuned():
    units = [{"walk": "joint", "winner": "closed", "layers": ["a", "b"]}]
    for flipped, name in ((0.0, "closed"), (0.01, "tuned")):
        about = {"units": units, "kept": "tuned", "tuned": {"flipped": flipped}}
        assert _rounding(about) == {"a": name, "b": name}
    state = run(tune_iterations=6, tune_rounding=0.1, keep_best=False, start="nearest")
    assert state.info["tuned"]["flipped"] > 0


@pytest.mark.parametrize("options", [{"output_weight": 10.0}, {"weighting": "fisher"}], ids=str)
def test_the_last_unit_too_knows_the_output(options):
    last = [name for name, _ in layer_nodes(quantized.folded("residual"))][-1]
    kept = {"keep_best": False, "tune_iterations": 0, "skip_wide": False, "step_share": 0.0}
    with_it, without = (run(**kept, **one, iterations=12) for one in (options, {}))
    losses = [
        next(u for u in state.info["units"] if last in u["layers"])["notes"]["learned"]["loss"]
        for state in (with_it, without)
    ]
    assert losses[0] > losses[1]


def test_fewer_images_than_asked_are_told(caplog):
    graph = quantized.folded("residual")
    given = (graph, quantized.calib(32), quantized.plan(graph, "w4a4"), gptq.Options())
    largest = max(
        gptq.hessian_bytes(graph.module.get_submodule(name)) for name, _ in layer_nodes(graph)
    )
    with caplog.at_level(logging.WARNING):
        state = gptq.quantize(
            *given, rng=torch.Generator(), device=CPU,
            supplies=QuantizerSupplies(memory_bytes=2 * largest + 200_000),
        )  # fmt: skip
    used = state.info["images"]
    assert 1 <= used < 32
    assert f"measured on {used} of 32 images" in caplog.text
