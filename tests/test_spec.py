import itertools
import json

import numpy as np
import pytest

import quantized
from dfqc.backends import ort
from dfqc.compiler.errors import UnsupportedError, UsageError
from dfqc.compiler.spec import (
    Bits,
    LayerPlan,
    Plan,
    QScheme,
    Quantizer,
    Rule,
    check_bits,
    default_ends,
    parse_bits,
    parse_rule,
    plan_from_json,
    resolve_bits,
)

NAMES = ["stem.conv", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "head.fc"]
W4A4, W8A8, FLOAT = Bits(4, 4), Bits(8, 8), Bits(32, 32)
INTEGERS, FLOATS = range(2, 9), (16, 32)
LEGAL = [*itertools.product(INTEGERS, [*INTEGERS, *FLOATS]), *itertools.product(FLOATS, FLOATS)]


@pytest.mark.parametrize(("weight", "act"), LEGAL)
def test_every_legal_width_is_read(weight, act):
    bits = parse_bits(f"w{weight}a{act}")
    assert bits == Bits(weight, act)
    assert parse_bits(str(bits)) == bits
    assert bits.is_float == (weight in FLOATS)
    assert bits.weight_only == (weight in INTEGERS and act in FLOATS)


@pytest.mark.parametrize("text", [" W4A8 ", "w4A8", "W4a8\n"])
def test_case_and_spaces_do_not_matter(text):
    assert parse_bits(text) == Bits(4, 8)


@pytest.mark.parametrize(
    "text",
    ["", "w4", "a4", "4a4", "w4a4 w8a8", "w4.0a4", "w-4a4", "int8", "w4a4x"]
    + [f"w{bits}a8" for bits in (0, 1, 9, 15, 17, 64)]
    + [f"w8a{bits}" for bits in (0, 1, 9, 15, 17, 64)]
    + ["w32a8", "w16a4"],
)
def test_any_other_width_is_refused_where_it_was_given(text):
    with pytest.raises(UsageError, match=r"^--layer 'fc'") as caught:
        parse_bits(text, where="--layer 'fc'")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("head.fc", [4]),
        ("layer1.*", [1, 2]),
        ("*.conv1", [1, 3]),
        ("*", [0, 1, 2, 3, 4]),
        ("layer?.0.conv1", [1, 3]),
        ("layer[13].*", [1, 2]),
        ("Head.fc", []),
        ("layer1", []),
        ("re:layer1", []),  # a whole name or nothing
        ("re:layer[12].*conv1", [1, 3]),
        ("re:.*(fc|stem).*", [0, 4]),
    ],
)
def test_patterns(pattern, hits):
    rule = Rule(pattern, W8A8)
    assert [i for i, name in enumerate(NAMES) if rule.matches(name)] == hits


def test_a_rule_is_cut_at_its_last_equals_sign():
    assert parse_rule("re:a=b.*=w4a16") == Rule("re:a=b.*", Bits(4, 16))


@pytest.mark.parametrize("text", ["fc", "=w8a8", "fc=", "fc=w9a8", "re:(=w8a8", "re:[a-=w8a8"])
def test_a_rule_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match="--layer"):
        parse_rule(text)


def resolve(*rules, default=W4A4, ends=W8A8, names=NAMES):
    bits = resolve_bits(names, default, [parse_rule(rule) for rule in rules], ends=ends)
    assert list(bits) == list(names)
    return list(bits.values())


def test_the_first_and_the_last_layer_are_wider_by_default():
    assert resolve() == [W8A8, W4A4, W4A4, W4A4, W8A8]
    assert resolve(ends=None) == [W4A4] * 5
    assert resolve(names=["only"]) == [W8A8]
    assert resolve(names=[]) == []


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (Bits(8, 8), Bits(8, 8)),
        (Bits(4, 8), Bits(8, 8)),
        (Bits(4, 16), Bits(8, 16)),  # weight-only stays weight-only
        (Bits(2, 2), Bits(8, 8)),
        (FLOAT, FLOAT),
    ],
)
def test_ends_that_nobody_chose_are_no_narrower_than_the_rest(bits, expected):
    assert default_ends(bits) == expected


def test_ends_that_somebody_chose_are_taken_as_they_are():
    assert resolve(default=W8A8, ends=W4A4) == [W4A4, W8A8, W8A8, W8A8, W4A4]


def test_rules_come_after_the_ends_and_the_last_match_wins():
    assert resolve("*=w2a8", "layer1.*=w3a8", "*.conv2=w5a8") == [
        Bits(2, 8),
        Bits(3, 8),
        Bits(5, 8),
        Bits(2, 8),
        Bits(2, 8),
    ]
    assert resolve("*.conv2=w5a8", "*=w2a8") == [Bits(2, 8)] * 5
    assert resolve("head.fc=w32a32")[-1] == FLOAT


@pytest.mark.parametrize(
    ("rule", "near"),
    [("head.fcc=w8a8", "head.fc"), ("layer1.0.conv3=w8a8", "layer1.0.conv1"), ("Q=w8a8", "stem")],
)
def test_a_rule_that_matches_nothing_names_the_nearest_layers(rule, near):
    with pytest.raises(UsageError, match="matches no layer; nearest: ") as caught:
        resolve("*=w8a8", rule)
    assert near in str(caught.value)
    assert repr(rule.removesuffix("=w8a8")) in str(caught.value)


@pytest.mark.parametrize("bits", range(2, 9))
def test_grids_hold_every_code_of_their_width(bits):
    signed, unsigned = QScheme(bits, True, True), QScheme(bits, False, False)
    assert signed.quant_max - signed.quant_min + 1 == 2**bits
    assert unsigned.quant_max - unsigned.quant_min + 1 == 2**bits
    assert unsigned.quant_min == 0
    assert signed.quant_min == -signed.quant_max - 1


def test_eight_bits_are_those_of_the_machine():
    signed, unsigned = QScheme(8, True, True), QScheme(8, False, False)
    assert (signed.quant_min, signed.quant_max) == (np.iinfo(np.int8).min, np.iinfo(np.int8).max)
    assert (unsigned.quant_min, unsigned.quant_max) == (0, np.iinfo(np.uint8).max)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_a_grid_of_any_other_width_is_refused(bits):
    with pytest.raises(UsageError, match=r"2\.\.8"):
        QScheme(bits, True, True)


def test_an_asymmetric_per_channel_grid_is_signed():
    with pytest.raises(UsageError, match="signed"):
        QScheme(2, False, False, axis=0)


@pytest.mark.parametrize("bits", [2, 3])
def test_a_shifted_channel_still_fits_four_bits(bits):
    scheme = QScheme(bits, True, False, axis=0)
    assert scheme.levels == 2**bits
    assert (scheme.quant_min, scheme.quant_max) == (-scheme.levels + 1, scheme.levels - 1)
    assert scheme.quant_min >= -8
    assert scheme.quant_max <= 7


@pytest.mark.parametrize(
    ("target", "bits", "nonnegative", "signed", "symmetric", "largest"),
    [
        (ort.TARGET, 8, True, False, False, 255),
        (ort.TARGET, 4, False, False, False, 15),
        (quantized.INPUTS, 8, True, True, True, 127),  # 0..255 does not fit int8
        (quantized.INPUTS, 8, False, True, True, 127),
        (quantized.INPUTS, 7, True, False, True, 127),
        (quantized.INPUTS, 4, True, False, True, 15),
        (quantized.INPUTS, 4, False, True, True, 7),
    ],
)
def test_activation_grids_of_the_targets(target, bits, nonnegative, signed, symmetric, largest):
    scheme = target.act_scheme(bits, nonnegative=nonnegative)
    assert scheme == QScheme(bits, signed, symmetric)
    assert scheme.quant_max == largest
    code = np.iinfo(np.int8 if target.act_signed else np.uint8)
    assert code.min <= scheme.quant_min <= scheme.quant_max <= code.max


NARROW = ort.TARGET.__class__(
    **{**vars(ort.TARGET), "name": "narrow", "weight_bits": (4, 8), "act_bits": (8, 32)}
)


@pytest.mark.parametrize("bits", ["w4a8", "w8a8", "w4a32", "w32a32", "w16a16"])
def test_bits_that_a_target_holds_pass(bits):
    check_bits(parse_bits(bits), NARROW, where="fc")


@pytest.mark.parametrize(
    ("bits", "reason"),
    [
        ("w5a8", "5-bit weights .* one of 4, 8"),
        ("w4a4", "4-bit activations .* one of 8, 32"),
        ("w4a16", "16-bit activations"),
    ],
)
def test_bits_that_a_target_does_not_hold_are_refused(bits, reason):
    with pytest.raises(UnsupportedError, match=rf"^fc: {reason}") as caught:
        check_bits(parse_bits(bits), NARROW, where="fc")
    assert caught.value.exit_code == 4
    assert "'narrow'" in str(caught.value)


def test_a_plan_survives_its_way_through_json():
    plan = Plan(
        "ort",
        W4A4,
        {
            "a.b": LayerPlan(
                "a.b", "a_b", "Conv2d", W4A4, W4A4, QScheme(4, True, True, 0), "x.a4", "why"
            ),
            "fc": LayerPlan("fc", "fc", "Linear", W8A8, FLOAT, None, None),
        },
        {
            "x.a8": Quantizer("x.a8", "x", QScheme(8, False, False), ("add", "a_b")),
            "x.a4": Quantizer("x.a4", "x", QScheme(4, False, False), ("a_b",), after="x.a8"),
            "p.a8": Quantizer("p.a8", "p", QScheme(8, False, False), ("fc",), tied="x.a8"),
        },
    )
    again = plan_from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert list(again.layers) == list(plan.layers)
    assert list(again.quantizers) == list(plan.quantizers)
