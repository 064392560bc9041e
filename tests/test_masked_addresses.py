"""No form of an address shows what is secret in it: not masked, not in an error, not in a traceback."""

import re
import traceback
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import DeploypipeError, StorageError
from deploypipe.files.object_stores import open_store
from deploypipe.search.distributed.study_storage import Storage
from deploypipe.text.masked_addresses import masked, masked_reference, without_secrets

BEGIN, END = "hunter", "wolf77"  # of a password: neither half may be seen
FORMS = [
    "postgresql://ada:{}@127.0.0.1:9/none",
    "postgresql+psycopg://ada:{}@127.0.0.1:9",
    "postgresql://ada:{}@/none?host=/no/such/socket",
    "postgresql:///none?host=/no/such/socket&password={}",
    "postgresql://127.0.0.1:9/none?user=ada&password={}",
    "postgresql://127.0.0.1:9/none?sslpassword=a@b&password={}",
    "postgresql://ada:{}@[::1]:9/none",
    "postgresql://a/da:{}@127.0.0.1:9/none",
    "postgresql://ada:{}",  # the host is forgotten
    "postgresql:/ada:{}@127.0.0.1/none",
    "postgresql:ada:{}@127.0.0.1/none",
    "ada:{}@127.0.0.1/none",
    "mysql+pymysql://ada:{}@127.0.0.1:9/none",
    "sqlite:///no/such/folder/s.db?key={}",
    "sqlite+pysqlcipher://:{}@/no/such/folder/s.db",
    "file://ada:{}@host/s.db",
    "mlflow+http://ada:{}@127.0.0.1:9/models?token={}#{}",
    "s3://ada:{}@bucket/models",
    "host=127.0.0.1 port=9 user=ada password={}",
]
SIGNS = ["", "/", "#", "?", "[", "]", "%", "%2F", "@", ":", "&", ";", "=", "%zz", " ", "ü", "'", '"', "\\", "+"]


def is_hidden(text: str) -> bool:
    return BEGIN not in text and END not in text


@pytest.mark.parametrize("form", FORMS)
def test_no_form_shows_a_password(form: str) -> None:
    for sign in SIGNS:
        if (form, sign) == ("postgresql://ada:{}", "@"):  # has a host
            continue
        password = f"{BEGIN}{sign}{END}"
        address = form.format(*[password] * form.count("{}"))
        end = re.split(r"\W", password)[-1]  # what a driver may take for the host
        assert is_hidden(masked(address)), address
        assert is_hidden(masked_reference(f"{address}/name@production")), address
        told = without_secrets(f"cannot open {address!r}: no user {password}, no {end} there", address)
        assert is_hidden(told), address


@given(st.text(max_size=12), st.sampled_from(FORMS[:3]))
def test_no_character_splits_a_password(sign: str, form: str) -> None:
    assert is_hidden(masked(form.format(f"{BEGIN}{sign}{END}")))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://ada:hunter@db:5432/searches", "postgresql://db:5432/searches"),
        ("postgresql://db/searches", "postgresql://db/searches"),
        ("postgresql://[::1]:5432/searches", "postgresql://[::1]:5432/searches"),
        ("sqlite:////home/me@work/study.db", "sqlite:////home/me@work/study.db"),
        ("s3://bucket/models", "s3://bucket/models"),
        ("runs/a@b", "runs/a@b"),
        ("models:/name", "models:/name"),
        ("file:///home/a:b@c/registry", "file:///home/a:b@c/registry"),
    ],
)
def test_what_is_not_secret_is_shown(address: str, shown: str) -> None:
    assert masked(address) == shown
    assert masked_reference("s3://k:s@bucket/name@production") == "s3://bucket/name@production"
    assert masked_reference("models:/name@production") == "models:/name@production"


@pytest.mark.parametrize(
    "form",
    [
        "https://host/x?token={}@production",
        "s3://ada:{}@bucket@production",
        "s3://ada:{}@bucket",
        "models:/ada:{}@x@production",
        "file://ada:{}@host/x@production",
        "ada:{}@host/x",
    ],
)
def test_a_reference_that_names_no_bundle(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take pieces of it for names: what they say about these is a way out, too."""
    monkeypatch.chdir(tmp_path)
    for sign, command in product(("", "/", "@", "%2F"), (["verify"], ["layout", "--as=oci", "--out=out"])):
        done = CliRunner().invoke(app, [*command, form.format(f"{BEGIN}{sign}{END}")])
        assert done.exit_code == 2 and is_hidden(done.output) and "Traceback" not in done.output, (sign, command)


@pytest.mark.parametrize("form", [form for form in FORMS if not re.search("mlflow|s3|pysqlcipher|file:", form)])
@pytest.mark.parametrize("sign", ["", "/", "#", "?", "[", "%"])
def test_a_search_that_cannot_reach_its_storage(form: str, sign: str) -> None:
    """The real drivers, on addresses where nothing answers."""
    storage = Storage(url=form.format(f"{BEGIN}{sign}{END}"), study="s", patience_s=0)
    with pytest.raises(StorageError) as refused, storage.translated_errors():
        storage.open()
    assert is_hidden(str(refused.value)) and is_hidden(repr(storage))
    assert is_hidden("".join(traceback.format_exception(refused.value)))


@pytest.mark.parametrize("sign", ["", "/", "#", "[", "%"])
@pytest.mark.parametrize(
    "form", ["http://ada:{}@127.0.0.1:9/x", "no+such://ada:{}@host/x", "ftp://ada:{}@127.0.0.1:9/x"]
)
def test_a_store_that_does_not_answer(form: str, sign: str) -> None:
    with (
        pytest.raises(DeploypipeError) as refused,
        open_store(form.format(f"{BEGIN}{sign}{END}"), DeploypipeError) as (store, path),
    ):
        store.ls(path)
    assert is_hidden("".join(traceback.format_exception(refused.value)))


def test_all_that_shows_an_address_masks_it() -> None:
    for path in Path("deploypipe").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in ("{self.url}", "{storage.url}", "{self.source}", "{url}:") if name in text], path
