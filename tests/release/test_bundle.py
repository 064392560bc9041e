"""Bundles: the same run gives the same bytes, and not one of them can be changed unseen."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from releasable_run import MODEL, write_run
from typer.testing import CliRunner

from deploypipe.cli import app
from deploypipe.errors import BundleError
from deploypipe.records import BaselineComparison, Check, Status, Verdict, Waiver
from deploypipe.release.bundle import load_bundle, make_bundle
from deploypipe.release.decide_again import decide_again
from deploypipe.release.manifest import MANIFEST, SIGNATURE, check_manifest
from deploypipe.release.registries.registry import promote, resolve
from deploypipe.release.signing import check_keyless, check_signature, sign, sign_keyless
from deploypipe.runs.result import RunResult, save_result
from deploypipe.target import Budget
from deploypipe.verification.golden_json import GOLDEN

pytest.importorskip("cyclonedx", reason="bills of materials need cyclonedx-python-lib")
RUNNER = CliRunner()


def write_keys(folder: Path) -> tuple[Path, Path]:
    """(private, public), as PEM files."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    private, public = folder / "private.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def write_certificates(folder: Path, private: Path) -> tuple[Path, Path]:
    """(own, root): certificates for the key, by a root made for it."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = serialization.load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    root_key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("root", "signer")]
    today = datetime.now(UTC)
    paths = folder / "own.pem", folder / "root.pem"
    for path, name, public, is_root in (
        (paths[0], names[1], key.public_key(), False),
        (paths[1], names[0], root_key.public_key(), True),
    ):
        builder = (
            x509.CertificateBuilder(names[0], name, public, x509.random_serial_number())
            .not_valid_before(today - timedelta(days=1))
            .not_valid_after(today + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(not is_root, *[False] * 4, is_root, is_root, False, False), critical=True)
        )
        if not is_root:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
            builder = builder.add_extension(usage, critical=False)
        path.write_bytes(builder.sign(root_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    return paths


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A signed bundle, and the public key."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = write_keys(folder)
    write_run(folder / "run")
    return make_bundle(folder / "run", folder / "bundles", sign=partial(sign, private_key=private)), public


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SIGNATURE}


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, signed: tuple[Path, Path]) -> None:
    write_run(tmp_path / "run")
    first, second = (make_bundle(tmp_path / "run", tmp_path / name) for name in ("a", "b"))
    assert first.name == second.name
    assert contents(first) == contents(second)
    assert make_bundle(tmp_path / "run", tmp_path / "a") == first
    assert not list((tmp_path / "a").glob(".*"))
    write_run(tmp_path / "other", seed=1)
    assert make_bundle(tmp_path / "other", tmp_path / "a").name != first.name


def test_what_is_in_it(signed: tuple[Path, Path]) -> None:
    bundle, _ = signed
    statement = json.loads((bundle / "provenance.json").read_text())
    hashes = {entry.name: entry.sha256 for entry in check_manifest(bundle).files}
    assert {s["name"]: s["digest"]["sha256"] for s in statement["subject"]} == {MODEL: hashes[MODEL]}
    bom = json.loads((bundle / "bom.cdx.json").read_text())
    assert bom["metadata"]["component"]["type"] == "machine-learning-model"
    assert {component["name"] for component in bom["components"]} == {"torch", "deploypipe"}
    card = (bundle / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: onnx\n") and "SHIP" in card
    assert load_bundle(bundle).decision.verdict.value == "SHIP"


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_is_seen(data: st.DataObject, signed: tuple[Path, Path], tmp_path: Path) -> None:
    """With the key in every file; without it in every file but the signature."""
    bundle, public = signed
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle, copy)
    path = data.draw(st.sampled_from(sorted(copy.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if path.name != SIGNATURE:
        with pytest.raises(BundleError):
            check_manifest(copy)
        with pytest.raises(BundleError, match="is not what was signed"):
            check_signature(copy, public)
    else:
        check_manifest(copy)
        try:
            check_signature(copy, public)  # a bit of a JSON file may not matter, or be all that matters
        except BundleError:
            return
        assert json.loads(content) is not None


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "plan.json").unlink(), r"plan\.json: is missing"),
        (lambda folder: (folder / "extra.bin").write_bytes(b"x"), r"extra\.bin: is not in the manifest"),
        (lambda folder: (folder / MANIFEST).unlink(), "cannot be read"),
        (lambda folder: pipe(folder / MANIFEST), r"manifest\.json: is not a plain file"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "copy the bundle again"),
        (lambda folder: reformat(folder / MANIFEST), r"manifest\.json: was changed"),
        (lambda folder: truncate(folder / MODEL), r"model\.onnx: was changed"),
        (lambda folder: link(folder / MODEL), r"model\.onnx: is not a plain file"),
    ],
)
def test_harm_is_named(harm: object, told: str, signed: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(signed[0], tmp_path / "copy")
    harm(tmp_path / "copy")  # type: ignore[operator]
    with pytest.raises(BundleError, match=told):
        check_manifest(tmp_path / "copy")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def reformat(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def test_a_manifest_that_points_out_of_the_folder_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    from deploypipe.records import FileEntry
    from deploypipe.release import manifest as m

    entry = FileEntry(name="../outside", sha256="0", size_bytes=0)
    made = m.Manifest(format=m.FORMAT, name="n", files=(entry,), digest=m._digest("n", (entry,)))
    (tmp_path / MANIFEST).write_bytes(m._as_bytes(made))
    with pytest.raises(BundleError, match=r"the name '\.\./outside' holds '/'; do not use"):
        check_manifest(tmp_path)


def test_signatures(signed: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, public = signed
    check_signature(bundle, public)
    _, other = write_keys(tmp_path)
    with pytest.raises(BundleError, match="is not what was signed with this key"):
        check_signature(bundle, other)
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "copy" / ".gitattributes").write_text("added")
    with pytest.raises(BundleError, match="is not what was signed"):
        check_signature(tmp_path / "copy", public)
    write_run(tmp_path / "run")
    unsigned = make_bundle(tmp_path / "run", tmp_path / "bundles")
    with pytest.raises(BundleError, match="is not signed"):
        check_signature(unsigned, public)
    with pytest.raises(BundleError, match="is not a public key"):
        check_signature(bundle, bundle / MODEL)
    with pytest.raises(BundleError, match="cannot sign with this key"):
        make_bundle(tmp_path / "run", tmp_path / "more", sign=partial(sign, private_key=bundle / MODEL))
    assert not list((tmp_path / "more").iterdir())


def test_certificates(tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    own, root = write_certificates(tmp_path, private)
    _, other_root = write_certificates(tmp_path / "other", write_keys(tmp_path / "other")[0])
    write_run(tmp_path / "run")
    signer = partial(sign, private_key=private, certificates=(own, root))
    bundle = make_bundle(tmp_path / "run", tmp_path / "bundles", sign=signer)
    check_signature(bundle, roots=(root,))
    with pytest.raises(BundleError, match="is not what was signed"):
        check_signature(bundle, roots=(other_root,))
    truncate(bundle / MODEL)
    with pytest.raises(BundleError, match="is not what was signed"):
        check_signature(bundle, roots=(root,))


def test_a_run_on_hold_and_a_changed_file_are_not_released(tmp_path: Path) -> None:
    write_run(tmp_path / "held", num_wrong=30)
    with pytest.raises(BundleError, match="the gate holds this run: accuracy_drop failed"):
        make_bundle(tmp_path / "held", tmp_path / "bundles")
    result = write_run(tmp_path / "changed")
    for name in (MODEL, *(entry.name for entry in result.golden.files)) if result.golden else ():
        content = (tmp_path / "changed" / name).read_bytes()
        truncate(tmp_path / "changed" / name)
        with pytest.raises(BundleError, match=rf"{name}: is not the file that was measured"):
            make_bundle(tmp_path / "changed", tmp_path / "bundles")
        (tmp_path / "changed" / name).write_bytes(content)
    assert not (tmp_path / "bundles").exists()
    swapped = write_run(tmp_path / "swapped", seed=1)  # whole in itself, and not what the report is about
    save_result(tmp_path / "swapped", replace(swapped, benchmark=result.benchmark))
    with pytest.raises(BundleError, match=r"model\.onnx: is not the file that was measured"):
        make_bundle(tmp_path / "swapped", tmp_path / "bundles")


def test_verify_holds_a_runs_golden_json_to_its_result(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert RUNNER.invoke(app, ["verify", str(tmp_path / "run")]).exit_code == 0
    golden = tmp_path / "run" / GOLDEN
    text = golden.read_text()
    assert '"max_abs_error": 0.001' in text
    golden.write_text(text.replace('"max_abs_error": 0.001', '"max_abs_error": 0.0009'))
    refused = RUNNER.invoke(app, ["verify", str(tmp_path / "run")])
    assert refused.exit_code == 2 and "golden.json: is not the file" in " ".join(refused.output.split())


def as_recorded(result: RunResult, **changes: object) -> RunResult:
    """A run whose record says so, sealed as if the product had written it."""
    return replace(result, decision=replace(result.decision, **changes))


@pytest.mark.parametrize(
    ("num_wrong", "forge", "told"),
    [
        (30, lambda r: as_recorded(r, verdict=Verdict.SHIP), "SHIP is recorded, but does not follow"),
        (0, lambda r: as_recorded(r, verdict=Verdict.HOLD), "HOLD is recorded, but does not follow"),
        (30, lambda r: as_recorded(r, verdict=Verdict.SHIP, checks=()), "0 checks are recorded, but its budget has"),
        (
            30,
            lambda r: as_recorded(r, verdict=Verdict.SHIP, checks=passed(r)),
            "accuracy_drop PASS .* measurements give .* FAIL",
        ),
        (0, lambda r: replace(r, target=replace(r.target, budget=Budget(accuracy_drop_pp=0.1))), "but its budget has"),
        (
            0,
            lambda r: replace(r, benchmark=replace(r.benchmark, is_steady=False)),
            "measurements give latency_p50 UNKNOWN",
        ),
        (0, lambda r: parted(r), "measurements give parity FAIL"),
    ],
)
def test_release_does_not_believe_the_recorded_decision(
    num_wrong: int, forge: Callable[[RunResult], RunResult], told: str, tmp_path: Path
) -> None:
    save_result(tmp_path, forge(write_run(tmp_path / "run", num_wrong=num_wrong)))
    (tmp_path / "result.json").replace(tmp_path / "run" / "result.json")
    with pytest.raises(BundleError, match=rf"result\.json: .*{told}.*; decide again with `deploypipe gate"):
        make_bundle(tmp_path / "run", tmp_path / "bundles")
    assert not (tmp_path / "bundles").exists()
    assert RUNNER.invoke(app, ["release", str(tmp_path / "run"), "--out", str(tmp_path / "bundles")]).exit_code == 2


def passed(result: RunResult) -> tuple[Check, ...]:
    return tuple(replace(check, status=Status.PASS) for check in result.decision.checks)


def parted(result: RunResult) -> RunResult:
    """The file computes something else than the network."""
    shipped = result.benchmark.compressed
    wrong = replace(shipped, file=replace(shipped.file, max_abs_error=0.5))
    return replace(result, benchmark=replace(result.benchmark, compressed=wrong))


def test_release_decides_by_todays_date(tmp_path: Path) -> None:
    run = tmp_path / "run"
    measured = datetime(2026, 11, 20, 12, tzinfo=UTC)
    waiver = Waiver(check="accuracy_drop", reason="r", by="ada", granted="2026-11-01", expires="2026-11-30")
    result = write_run(run, num_wrong=30, max_age_days=20)
    assert decide_again(run, result, None, (waiver,), measured).decision.verdict is Verdict.SHIP
    make_bundle(run, tmp_path / "bundles", now=measured + timedelta(days=9))
    with pytest.raises(BundleError, match="the waiver by ada expired on 2026-11-30"):
        make_bundle(run, tmp_path / "bundles", now=measured + timedelta(days=11))
    with pytest.raises(BundleError, match="age failed"):
        make_bundle(run, tmp_path / "bundles", now=measured + timedelta(days=21))
    with pytest.raises(BundleError, match="age is unknown"):
        make_bundle(run, tmp_path / "bundles", now=measured - timedelta(days=2))
    baseline = BaselineComparison(name="v1", latency_ratio=None, accuracy_drop_pp=None)
    worse = decide_again(run, result, baseline, (waiver,), measured)
    assert worse.decision.verdict is Verdict.HOLD
    with pytest.raises(BundleError, match=r"the gate holds this run: .*against_baseline are unknown"):
        make_bundle(run, tmp_path / "bundles", now=measured)


def test_two_releases_and_two_promotions_at_once(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    found: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            bundle = make_bundle(tmp_path / "run", tmp_path / "bundles")
            found.append(promote(bundle, str(tmp_path / "registry"), "production"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and set(found) == {1}
    assert len(list((tmp_path / "bundles").iterdir())) == 1
    check_manifest(resolve(f"{tmp_path / 'registry'}/digits-x86_cpu@production"))


def test_registry_counts_versions_and_moves_aliases(tmp_path: Path) -> None:
    registry = str(tmp_path / "registry")
    for seed in (0, 1):
        write_run(tmp_path / str(seed), seed=seed)
    first, second = (make_bundle(tmp_path / str(seed), tmp_path / "bundles") for seed in (0, 1))
    assert [promote(bundle, registry, "production") for bundle in (first, second, first)] == [1, 2, 1]
    assert promote(second, registry, "staging") == 2
    assert resolve(f"{registry}/digits-x86_cpu@production").name == first.name
    assert resolve(f"{registry}/digits-x86_cpu@staging").name == second.name
    assert resolve(str(first)) == first
    with pytest.raises(BundleError, match=r"no alias 'nobody' \(known: production, staging\)"):
        resolve(f"{registry}/digits-x86_cpu@nobody")
    with pytest.raises(BundleError, match="is not a bundle"):
        resolve(str(tmp_path))
    with pytest.raises(BundleError, match=r"the alias '\.\./up' holds '/'"):
        promote(first, registry, "../up")
    shutil.rmtree(tmp_path / "registry" / "digits-x86_cpu" / "2")
    with pytest.raises(BundleError, match="points to version 2, which is gone"):
        resolve(f"{registry}/digits-x86_cpu@staging")


def test_a_promotion_that_breaks_off_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    bundle = make_bundle(tmp_path / "run", tmp_path / "bundles")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("the registry is down")))
        with pytest.raises(OSError, match="down"):
            promote(bundle, str(tmp_path / "registry"), "production")
    home = tmp_path / "registry" / "digits-x86_cpu"
    assert [path.name for path in home.iterdir()] == [".lock"]
    assert promote(bundle, str(tmp_path / "registry"), "production") == 1


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_keys(tmp_path)
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    made = RUNNER.invoke(app, ["release", "run", "--key", str(private)])
    assert made.exit_code == 0, made.output
    bundle = made.output.strip()
    assert RUNNER.invoke(app, ["promote", bundle, "--key", str(public)]).exit_code == 0
    found = RUNNER.invoke(app, ["verify", "registry/digits-x86_cpu@production", "--key", str(public)])
    assert found.exit_code == 0 and "signed and unchanged" in found.output
    assert RUNNER.invoke(app, ["verify", bundle, "--latency"]).exit_code == 1  # approved on another device
    assert RUNNER.invoke(app, ["verify", "run", "--latency"]).exit_code == 2
    assert RUNNER.invoke(app, ["release", "run", "--certificate", "c.pem"]).exit_code == 2
    write_run(tmp_path / "worse", num_wrong=30)
    assert RUNNER.invoke(app, ["release", "worse"]).exit_code == 1
    asked = ["gate", "worse", "--registry", "registry", "--key", str(public)]
    held = RUNNER.invoke(app, asked)
    assert held.exit_code == 1 and "accuracy against baseline" in held.output
    none_yet = RUNNER.invoke(app, [*asked, "--alias", "staging"])
    assert none_yet.exit_code == 1 and "staging does not exist yet" in none_yet.output
    assert RUNNER.invoke(app, [*asked, "--baseline", bundle]).exit_code == 2
    (tmp_path / "other").mkdir()
    other_key = write_keys(tmp_path / "other")[1]
    another_signer = ["--key", str(other_key)]
    for command in (
        asked[:-2],
        ["promote", bundle, "--alias", "staging"],
        ["layout", bundle, "--as", "oci", "--out", "layouts"],
        ["verify", bundle],
    ):
        refused = RUNNER.invoke(app, [*command, *another_signer])
        assert refused.exit_code == 2 and "signature" in refused.output, refused.output
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    refused = RUNNER.invoke(app, ["verify", bundle, "--identity", "ada@example.org"])
    assert refused.exit_code == 2 and "says Sigstore" in refused.output
    assert not (tmp_path / "layouts").exists()
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [Path(bundle).name]


def test_keyless_signatures_need_the_network_and_say_so(
    signed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there, with a network or without
    monkeypatch.setenv("HOME", str(tmp_path))  # no trust root that was fetched before
    bundle, _ = signed
    copy = shutil.copytree(bundle, tmp_path / "copy")
    with pytest.raises(BundleError, match="signing with Sigstore failed"):
        sign_keyless(copy)
    with pytest.raises(BundleError, match="is not signed by ada@"):
        check_keyless(copy, "ada@example.org", "https://issuer.example.org")
    assert contents(copy) == contents(bundle)
    (copy / "signature.json").unlink()
    with pytest.raises(BundleError, match="is not signed"):
        check_keyless(copy, "ada@example.org", "https://issuer.example.org")
    write_run(tmp_path / "run")
    command = ["release", str(tmp_path / "run"), "--out", str(tmp_path / "none"), "--sigstore"]
    assert RUNNER.invoke(app, command).exit_code == 2
    assert list((tmp_path / "none").iterdir()) == []
    assert RUNNER.invoke(app, [*command, "--key", "k.pem"]).exit_code == 2
