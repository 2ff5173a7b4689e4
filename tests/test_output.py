import json
import math

from dfqc.compiler.output import emit, only_results_on_stdout, table


def test_columns_are_as_wide_as_their_longest_cell():
    assert table(("a", "long header", "b"), [("wider", 1, "x y"), ("", "2", "")]) == [
        "a      long header  b",
        "wider  1            x y",
        "       2",
    ]


def test_one_strict_json_object_or_lines(capsys):
    emit({"db": math.inf, "name": "é"}, ["shown"], as_json=True)
    out = capsys.readouterr().out
    assert json.loads(out) == {"db": None, "name": "é"}
    emit({"db": 1}, ["first", "second"], as_json=False)
    assert capsys.readouterr().out == "first\nsecond\n"


def test_what_libraries_print_goes_to_stderr(capsys):
    with only_results_on_stdout():
        print("chatter")
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "chatter\n")
