"""The store: complete or absent, locked, and honest about a full disk."""

import errno
import os
import subprocess
import sys

import pytest

from saehub.errors import StageFailed
from saehub.pipeline.workspace import Store, disk_errors

pytestmark = pytest.mark.quick
KEY = "a" * 64


def test_result_appears_whole_or_not_at_all(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="half way"), store.create("train", KEY, {"x": 1}) as folder:
        (folder / "tensors").write_text("half")
        raise ValueError("half way")
    assert not store.complete("train", KEY) and not list((tmp_path / "store" / "train").iterdir())
    wreck = store.path("train", KEY)
    wreck.mkdir()
    (wreck / "old").write_text("left by a kill before the manifest")
    with store.create("train", KEY, {"x": 1}) as folder:
        (folder / "tensors").write_text("whole")
        assert not store.complete("train", KEY)
    assert store.complete("train", KEY) and store.manifest("train", KEY) == {"x": 1}
    assert sorted(path.name for path in wreck.iterdir()) == ["manifest.json", "tensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_disk_errors_say_where_and_what_to_do(tmp_path, number):
    with pytest.raises(StageFailed) as failure, disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in failure.value.what and "SAEHUB_HOME" in failure.value.fix


def test_lock_dies_with_its_holder(tmp_path):
    code = f"""
import os, signal
from saehub.pipeline.workspace import Store
with Store({str(tmp_path)!r}).lock({KEY!r}):
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.returncode == -9 and process.stdout == "held\n"
    waited = []
    with Store(tmp_path).lock(KEY, lambda: waited.append(1)):
        assert not waited
