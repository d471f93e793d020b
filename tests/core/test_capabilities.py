"""What an adapter expects of a library, present and gone: the error names both versions and the command that helps."""

import json
import sys
import types
from importlib import metadata

import pytest

from saehub.capabilities import Library
from saehub.errors import MissingDependency

pytestmark = pytest.mark.quick

PYTEST = Library("pytest", "pytest", "1.2.3")


def test_takes_what_is_there():
    assert PYTEST.take("json:JSONDecoder.decode") is json.JSONDecoder.decode
    assert PYTEST.take("json", attributes=["dumps"]) is json
    assert PYTEST.take("json:dumps", parameters=["indent", "anything, for it takes **kw"]) is json.dumps
    assert Library("nowhere", "no-such-distribution-xyz", "1").installed == "unknown"


@pytest.mark.parametrize(
    ("path", "expected", "said"),
    [
        ("json:Gone", {}, "no 'Gone' in json"),
        ("json:JSONDecoder.gone", {}, "no 'gone' in JSONDecoder"),
        ("json.gone:thing", {}, "no module json.gone"),
        ("json:JSONDecoder", {"attributes": ["decode", "gone"]}, "has no 'gone'"),
        ("json:detect_encoding", {"parameters": ["b", "gone"]}, "no longer takes gone"),
    ],
)
def test_what_is_gone_is_said_with_both_versions(path, expected, said):
    with pytest.raises(MissingDependency) as error:
        PYTEST.take(path, **expected)
    text = str(error.value)
    assert said in text and metadata.version("pytest") in text and "1.2.3" in text
    assert error.value.fix == "pip install 'pytest==1.2.3'" and error.value.exit_code == 3


def test_a_library_whose_own_import_fails_keeps_its_words(monkeypatch, tmp_path):
    (tmp_path / "needy_library.py").write_text("import no_such_module_xyz\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_xyz"):
        PYTEST.take("needy_library:thing")


def test_a_simulated_missing_attribute(monkeypatch):
    library = types.ModuleType("drifting")
    library.Trainer = type("Trainer", (), {"update": lambda self: None})
    monkeypatch.setitem(sys.modules, "drifting", library)
    drifting = Library("drifting", "pytest", "1.2.3")
    assert drifting.take("drifting:Trainer", attributes=["update"]) is library.Trainer
    monkeypatch.delattr(library.Trainer, "update")
    with pytest.raises(MissingDependency, match="has no 'update'"):
        drifting.take("drifting:Trainer", attributes=["update"])
