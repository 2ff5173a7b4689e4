import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfqc.compiler.artifact import Store, canonical_json, default_root, digest_of, hash_file
from dfqc.compiler.errors import EnvironmentFault
from dfqc.compiler.quantize._caches import Budget


def fields(**changes):
    return {"stage": "trace", "options": {"samples": 4}, **changes}


def filler(text="hello", name="data.txt"):
    def fill(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return fill


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def test_canonical_json_ignores_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1})
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})


def test_hash_file_agrees_with_sha256sum(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(os.urandom((1 << 20) + 17))
    expected = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert hash_file(path) == expected.stdout.split()[0]


def test_what_is_written_is_found(store):
    written = store.write(fields(), filler(name="sub/data.txt"), label="net")
    found = store.find(written.key)
    assert found == written
    assert found.file("sub/data.txt").read_text() == "hello"
    assert found.stage == "trace"
    assert found.label == "net"
    assert found.size_bytes == 5
    assert list(found.files) == ["sub/data.txt"]


def test_the_key_is_the_digest_of_the_fields(store):
    assert store.write(fields(), filler()).key == digest_of(fields())
    assert store.find(digest_of(fields(options={"samples": 5}))) is None


def test_the_digest_covers_content_only(store):
    first = store.write(fields(seed=0), filler("same"))
    second = store.write(fields(seed=1), filler("same"))
    third = store.write(fields(seed=2), filler("other"))
    assert first.key != second.key
    assert first.digest == second.digest != third.digest


def test_an_empty_output_is_an_artifact(store):
    assert store.find(store.write(fields(), lambda folder: None).key).files == {}


def damage_bytes(folder):
    (folder / "data.txt").write_text("jello")


def damage_remove(folder):
    (folder / "data.txt").unlink()


def damage_record(folder):
    (folder / "artifact.json").write_text('{"stage": ')


def damage_remove_record(folder):
    (folder / "artifact.json").unlink()


def damage_record_type(folder):
    (folder / "artifact.json").write_text("[1, 2]")


def damage_fields(folder):
    record = json.loads((folder / "artifact.json").read_text())
    record["fields"]["options"]["samples"] = 5
    (folder / "artifact.json").write_text(json.dumps(record))


def damage_file_list(folder):
    record = json.loads((folder / "artifact.json").read_text())
    record["files"] = {}
    (folder / "artifact.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [
        damage_bytes,
        damage_remove,
        damage_record,
        damage_remove_record,
        damage_record_type,
        damage_fields,
        damage_file_list,
    ],
)
def test_a_damaged_entry_is_reported_removed_and_made_again(store, damage, caplog):
    artifact = store.write(fields(), filler())
    damage(artifact.folder)
    assert store.find(artifact.key) is None
    assert "damaged" in caplog.text
    assert not artifact.folder.exists()
    again = store.write(fields(), filler())
    assert again.digest == artifact.digest
    assert store.find(artifact.key) is not None


def test_a_failed_stage_leaves_nothing(store):
    def fail(folder):
        (folder / "half").write_text("x")
        raise ValueError("stage fault")

    with pytest.raises(ValueError, match="stage fault"):
        store.write(fields(), fail)
    assert store.find(digest_of(fields())) is None
    assert list((store.root / "temp").iterdir()) == []


def test_a_faster_build_wins_and_the_slower_one_uses_its_entry(tmp_path):
    mine, theirs = Store(tmp_path), Store(tmp_path)

    def slow(folder):
        theirs.write(fields(), filler("equal"))
        (folder / "data.txt").write_text("equal")

    artifact = mine.write(fields(), slow)
    assert artifact.file("data.txt").read_text() == "equal"
    assert list((mine.root / "temp").iterdir()) == []


def test_a_damaged_entry_of_a_faster_build_is_replaced(tmp_path, caplog):
    mine, theirs = Store(tmp_path), Store(tmp_path)

    def slow(folder):
        damage_bytes(theirs.write(fields(), filler()).folder)
        (folder / "data.txt").write_text("hello")

    assert mine.write(fields(), slow).file("data.txt").read_text() == "hello"
    assert "damaged" in caplog.text


WRITE_MANY = """
import sys
from pathlib import Path
from dfqc.compiler.artifact import Store
store = Store(Path(sys.argv[1]))
for number in range(20):
    store.write(
        {"stage": "trace", "options": {"samples": 4}, "number": number},
        lambda folder: (folder / "data.txt").write_text(f"text {number}"),
    )
"""


def test_concurrent_builds_share_a_store(tmp_path):
    builds = [subprocess.Popen([sys.executable, "-c", WRITE_MANY, tmp_path]) for _ in range(3)]
    assert [build.wait() for build in builds] == [0, 0, 0]
    store = Store(tmp_path)
    for number in range(20):
        artifact = store.find(digest_of(fields(number=number)))
        assert artifact.file("data.txt").read_text() == f"text {number}"


def used_at(artifact, seconds):
    os.utime(artifact.file("artifact.json"), (seconds, seconds))


def test_eviction_removes_the_least_recently_used(tmp_path):
    build = Store(tmp_path)
    artifacts = [build.write(fields(number=n), filler("x" * 100)) for n in range(4)]
    build.close()
    for artifact, when in zip(artifacts, (40, 10, 30, 20), strict=True):
        used_at(artifact, when)
    assert Store(tmp_path, limit_bytes=250).evict() == [artifacts[1].key, artifacts[3].key]
    assert Store(tmp_path).size_bytes() == 200


def test_a_hit_counts_as_use(tmp_path):
    build = Store(tmp_path)
    artifacts = [build.write(fields(number=n), filler("x" * 100)) for n in range(2)]
    for artifact in artifacts:
        used_at(artifact, 10)
    build.find(artifacts[0].key)
    build.close()
    assert Store(tmp_path, limit_bytes=100).evict() == [artifacts[1].key]


def test_eviction_spares_what_living_builds_touched(tmp_path):
    old, mine, other = Store(tmp_path), Store(tmp_path, limit_bytes=0), Store(tmp_path)
    artifacts = [old.write(fields(number=n), filler()) for n in range(3)]
    old.close()
    other.find(artifacts[1].key)
    mine.find(artifacts[2].key)
    assert mine.evict() == [artifacts[0].key]
    other.close()
    assert mine.evict() == [artifacts[1].key]


def test_closing_trims_to_the_limit_except_for_the_running_build(tmp_path):
    first = Store(tmp_path, limit_bytes=7)
    old = first.write(fields(number=1), filler())
    first.close()
    second = Store(tmp_path, limit_bytes=7)
    new = second.write(fields(number=2), filler())
    second.close()
    assert not old.folder.exists()
    assert new.folder.exists()


def test_remains_of_a_killed_build_are_swept(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from dfqc.compiler.artifact import Store\n"
        "def fill(folder):\n"
        "    (folder / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(Path(sys.argv[1])).write({'stage': 'trace'}, fill)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -9
    temp, leases = tmp_path / "v1" / "temp", tmp_path / "v1" / "leases"
    assert len(list(temp.iterdir())) == len(list(leases.iterdir())) == 1
    living = Store(tmp_path)
    assert list(temp.iterdir()) == []
    assert len(list(leases.iterdir())) == 1
    assert living.find(digest_of({"stage": "trace"})) is None


def test_caches_of_a_killed_quantizer_are_swept(tmp_path):
    code = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from dfqc.compiler.artifact import Store\n"
        "from dfqc.compiler.quantize._caches import Budget\n"
        "store = Store(Path(sys.argv[1]))\n"
        "budget = Budget(limit=0, folder=store.root / 'temp')\n"
        "held = budget.allocate(4, (8,), torch.float32)\n"
        "held.write(0, torch.ones(4, 8))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -9
    temp = tmp_path / "v1" / "temp"
    assert [path.stat().st_size for path in temp.rglob("*") if path.is_file()] == [128]
    Store(tmp_path)
    assert list(temp.iterdir()) == []


def test_caches_of_a_living_quantizer_are_left_alone(tmp_path):
    budget = Budget(limit=0, folder=Store(tmp_path).root / "temp")
    held = budget.allocate(4, (8,), torch.float32)
    held.write(0, torch.ones(4, 8))
    Store(tmp_path)
    assert held.read(slice(0, 4), torch.device("cpu")).sum() == 32
    budget.close()
    assert list((tmp_path / "v1" / "temp").iterdir()) == []


def test_remains_on_a_shared_disk_are_swept_after_a_week(tmp_path):
    Store(tmp_path).close()
    fresh = tmp_path / "v1" / "temp" / "elsewhere+1+aa"
    stale = tmp_path / "v1" / "temp" / "elsewhere+1+bb"
    fresh.mkdir()
    stale.mkdir()
    os.utime(stale, (0, 0))
    Store(tmp_path)
    assert fresh.exists()
    assert not stale.exists()


def test_a_cache_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"cannot be used.*--cache-dir"):
        Store(tmp_path / "file" / "cache")


def test_a_full_disk_is_said(store):
    def fill(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EnvironmentFault, match="No space left"):
        store.write(fields(), fill)


def test_a_stage_that_cannot_read_its_data_is_not_blamed_on_the_cache(store):
    with pytest.raises(FileNotFoundError):
        store.write(fields(), lambda folder: Path("/does/not/exist").read_text())


def test_entries_lists_one_stage_latest_first(store):
    first = store.write(fields(number=1), filler())
    second = store.write(fields(number=2), filler())
    store.write({"stage": "plan"}, filler())
    used_at(first, 10)
    used_at(second, 20)
    assert [a.key for a in store.entries("trace")] == [second.key, first.key]
    assert len(list(store.entries())) == 3


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DFQC_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == tmp_path / ".cache" / "dfqc"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_root() == Path("/x/dfqc")
    monkeypatch.setenv("DFQC_CACHE_DIR", "/y")
    assert default_root() == Path("/y")
