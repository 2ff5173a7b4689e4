import subprocess
import sys

from dfqc.compiler import keys, plugins


def test_the_code_digest_covers_what_a_module_imports(tmp_path, monkeypatch):
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "top.py").write_text("from dfqc.demo import low\n")
    (package / "low.py").write_text("x = 1\n")
    (package / "apart.py").write_text("x = 1\n")
    paths = {f"dfqc.demo.{p.stem}": p for p in package.iterdir()}
    monkeypatch.setattr(plugins, "find_source", paths.get)

    def digest(*alone):
        keys._source.cache_clear()
        return keys.code_digest([] if alone else ["dfqc.demo.top"], alone)

    first, alone = digest(), digest("dfqc.demo.top", "elsewhere.not_ours")
    paths["dfqc.demo.apart"].write_text("x = 2\n")
    assert digest() == first
    paths["dfqc.demo.low"].write_text("x = 2\n")
    assert digest() != first
    assert digest("dfqc.demo.top", "elsewhere.not_ours") == alone
    keys._source.cache_clear()


def test_imports_inside_functions_and_of_names_are_followed():
    _, imported = keys._source("dfqc.compiler.artifact")
    assert "dfqc.compiler.machine" in imported  # from dfqc.compiler import machine
    assert "dfqc.compiler.errors" in imported  # from dfqc.compiler.errors import EnvironmentFault
    assert all(not name.endswith("EnvironmentFault") for name in imported)


def test_the_digest_does_not_depend_on_order_and_imports_nothing():
    code = (
        "import sys; from dfqc.compiler import keys\n"
        "a = keys.code_digest(['dfqc.compiler.affine', 'dfqc.compiler.spec'])\n"
        "b = keys.code_digest(['dfqc.compiler.spec', 'dfqc.compiler.affine'])\n"
        "assert a == b\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_differences_are_named_by_field():
    old = {"stage": "a", "options": {"n": 1, "gone": 2}, "inputs": {"x": "a" * 64}}
    new = {"stage": "a", "options": {"n": 3, "new": None}, "inputs": {"x": "b" * 64}}
    assert keys.differences(old, new) == [
        f"inputs.x: {'a' * 12} -> {'b' * 12}",
        "options.gone: 2 -> -",
        "options.n: 1 -> 3",
        "options.new: - -> None",
    ]
    assert keys.differences(old, old) == []
