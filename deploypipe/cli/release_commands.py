"""Decide, release, promote, check: what a CI job calls after a run."""

import os
import sys
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deploypipe.cli.app import RELEASE, AllowOption, MemoryLimit, RunArgument, TimeLimit, app
from deploypipe.cli.exit_codes import EXIT_DIFFERENT, EXIT_HOLD, exit_codes, say
from deploypipe.errors import ConfigError, DeploypipeError, NoVersionError

if TYPE_CHECKING:
    from deploypipe.runs.result import RunResult

_PUBLIC_KEY = "PEM file of the public key that must have signed the bundle."
_REGISTRY = "Folder of bundles and aliases, s3://... (or another store), or `models:` for the MLflow server in use."


@app.command(
    rich_help_panel=RELEASE,
    epilog="Example: deploypipe gate runs/digits-x86_cpu --baseline registry/digits-x86_cpu@production",
)
def gate(
    run: RunArgument,
    baseline: Annotated[
        str | None, typer.Option(help="Bundle to compare with: its folder, REGISTRY/NAME@ALIAS, or models:/NAME@ALIAS.")
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            help="Instead of --baseline: the registry in which to look up --alias of this pipeline and target, if any."
        ),
    ] = None,
    alias: Annotated[str, typer.Option(help="See --registry.")] = "production",
    key: Annotated[
        Path | None, typer.Option(help="PEM file of the public key that must have signed the baseline.")
    ] = None,
    waivers: Annotated[Path | None, typer.Option(help="TOML file of waivers; README.md shows one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the decision as JSON.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write the decision as Markdown, for a pull request.")] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write the decision as JUnit XML, with one test case for each check.")
    ] = None,
    _allow: AllowOption = False,
) -> None:
    """Decide again about a finished run: exit 0 SHIP, 1 HOLD, 2 error. The decision is stored in the run.

    With --baseline, the run must not be worse than a released bundle: both files are timed in turns on this machine and
    compared on the same test samples. A waiver names a check that need not pass, the reason, the person responsible,
    and its first (granted) and last day (expires).
    """
    with exit_codes():
        from deploypipe.cli.terminal import exit_code, show_decision, show_next_steps
        from deploypipe.files.atomic import write_atomically
        from deploypipe.files.json_records import to_json
        from deploypipe.runs.result import load_result

        result = load_result(run)
        from deploypipe.release.baseline_comparison import compare_with_baseline
        from deploypipe.release.bundle import check_run
        from deploypipe.release.ci_reports import junit as as_junit
        from deploypipe.release.ci_reports import markdown as as_markdown
        from deploypipe.release.decide_again import decide_again
        from deploypipe.release.waivers import load_waivers

        check_run(run)
        excused = load_waivers(waivers) if waivers else ()
        before = _find_baseline(result, baseline, registry, alias, key)
        compared = compare_with_baseline(run, result, before) if before else None
        result = decide_again(run, result, compared, excused, datetime.now(UTC))
        for path, text in ((markdown, as_markdown), (junit, as_junit)):
            if path:
                write_atomically(path, text(result).encode())
        if json:
            say(to_json(result.decision))
        else:
            show_decision(result.decision)
            show_next_steps(result)
    raise typer.Exit(exit_code(result.decision))


def _find_baseline(
    result: "RunResult", baseline: str | None, registry: str | None, alias: str, key: Path | None
) -> Path | None:
    """The bundle to compare with; None, with a note, if the registry has none yet."""
    from deploypipe.release.bundle import bundle_name
    from deploypipe.release.registries.registry import resolve
    from deploypipe.release.signing import check_signature
    from deploypipe.text.masked_addresses import masked_reference

    if baseline and registry:
        raise ConfigError("--registry", "", "is given together with --baseline", "give one of them")
    if not (baseline or registry):
        return None
    reference = baseline or f"{str(registry).rstrip('/')}/{bundle_name(result)}@{alias}"
    try:
        found = resolve(reference)
    except NoVersionError:
        if baseline:
            raise
        say(f"note: {masked_reference(reference)} does not exist yet: nothing to compare with", file=sys.stderr)
        return None
    if key:
        check_signature(found, key)
    return found


@app.command(
    rich_help_panel=RELEASE, epilog="Example: deploypipe release runs/digits-x86_cpu --out bundles --key private.pem"
)
def release(
    run: RunArgument,
    out: Annotated[
        Path, typer.Option(help="Folder in which to write the bundle's folder, named by its content.")
    ] = Path("bundles"),
    key: Annotated[Path | None, typer.Option(help="PEM file of the private key (elliptic curve) to sign with.")] = None,
    certificate: Annotated[
        list[Path] | None, typer.Option(help="PEM file of the key's certificate. Repeat for those up to the root.")
    ] = None,
    sigstore: Annotated[
        bool,
        typer.Option(
            "--sigstore", help="Sign without a key, with the identity of the CI job or yours, in a public log."
        ),
    ] = False,
) -> None:
    """Write the bundle of a RUN that ships: model, golden samples, plan, report, card, bill of materials, provenance.

    The gate decides again from the recorded measurements and today's date: a waiver may have expired, or measurements
    may be too old. The same run gives the same bytes. A run on HOLD is not released (exit 1).
    """
    with exit_codes():
        if certificate and not key:
            raise ConfigError("--certificate", "", "is given without --key", "add its private key with --key")
        if sigstore and key:
            raise ConfigError("--sigstore", "", "is given together with --key", "give one of them")
        from deploypipe.cli.terminal import show_decision
        from deploypipe.records import Verdict
        from deploypipe.release import signing
        from deploypipe.release.bundle import make_bundle
        from deploypipe.release.decide_again import decide_today
        from deploypipe.runs.result import load_result

        sign = signing.sign_keyless if sigstore else None
        if key:
            sign = partial(signing.sign, private_key=key, certificates=tuple(certificate or ()))

        now = datetime.now(UTC)
        decision = decide_today(run, load_result(run), now)
        if decision.verdict is Verdict.SHIP:
            say(make_bundle(run, out, sign=sign, now=now))
            return
        show_decision(decision)
    raise typer.Exit(EXIT_HOLD)


@app.command(
    rich_help_panel=RELEASE, epilog="Example: deploypipe promote bundles/digits-x86_cpu-0123456789ab --alias production"
)
def promote(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `deploypipe release` wrote.")],
    registry: Annotated[str, typer.Option(help=_REGISTRY)] = "registry",
    alias: Annotated[str, typer.Option(help="Alias to point to this version.")] = "production",
    key: Annotated[Path | None, typer.Option(help=_PUBLIC_KEY)] = None,
) -> None:
    """Put BUNDLE into a registry as a new version, unless it is there already, and point an alias to it."""
    with exit_codes():
        from deploypipe.release.manifest import check_manifest
        from deploypipe.release.registries.registry import promote as put
        from deploypipe.release.signing import check_signature
        from deploypipe.text.masked_addresses import masked

        if key:
            check_signature(bundle, key)
        number = put(bundle, registry, alias)
        name = check_manifest(bundle).name
        say(f"{masked(registry).rstrip('/')}/{name}@{alias} is version {number}")


class Layout(StrEnum):
    triton = "triton"
    oci = "oci"


@app.command(
    rich_help_panel=RELEASE,
    epilog="Example: deploypipe layout bundles/digits-x86_cpu-0123456789ab --as triton --out model_repository",
)
def layout(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's folder, or REGISTRY/NAME@ALIAS.")],
    form: Annotated[
        Layout,
        typer.Option(
            "--as",
            help="triton: a model in a Triton model repository; oci: an artifact for container registries.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder in which to write it, in a folder of its own.")],
    key: Annotated[Path | None, typer.Option(help=_PUBLIC_KEY)] = None,
) -> None:
    """Write BUNDLE in the layout of a Triton server or of a container registry."""
    with exit_codes():
        from deploypipe.release.oci_layout import write_oci
        from deploypipe.release.registries.registry import resolve
        from deploypipe.release.signing import check_signature
        from deploypipe.release.triton_repository import write_triton

        folder = resolve(bundle)
        if key:
            check_signature(folder, key)
        say((write_triton if form is Layout.triton else write_oci)(folder, out))


@app.command(
    rich_help_panel=RELEASE,
    epilog="Exit codes: 0 the same, 1 different, 2 unusable. Example: deploypipe verify runs/digits-x86_cpu",
)
def verify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A bundle, REGISTRY/NAME@ALIAS, or a finished run.")],
    key: Annotated[Path | None, typer.Option(help=_PUBLIC_KEY)] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="PEM file of a root certificate that the signer's must descend from.")
    ] = None,
    identity: Annotated[
        str | None, typer.Option(help="Who must have signed with Sigstore: an e-mail address, or a workflow's address.")
    ] = None,
    issuer: Annotated[
        str, typer.Option(help="OpenID Connect issuer that vouched for --identity.")
    ] = "https://token.actions.githubusercontent.com",
    latency: Annotated[
        bool, typer.Option("--latency", help="Time the model and compare with the approved latency (bundles only).")
    ] = False,
    _allow: AllowOption = False,
    time_limit: TimeLimit = 120.0,
    memory_limit: MemoryLimit = None,
) -> None:
    """Check the signature and all hashes in DIR, before anything is parsed, then replay its golden samples.

    With only numpy and onnxruntime installed: python -m deploypipe.verify DIR
    """
    with exit_codes():
        from deploypipe.cli.terminal import show_checks, show_table
        from deploypipe.release.bundle import check_run
        from deploypipe.release.manifest import MANIFEST, check_manifest
        from deploypipe.release.registries.registry import is_remote, resolve
        from deploypipe.release.signing import check_keyless, check_signature
        from deploypipe.runs.result import RESULT
        from deploypipe.untrusted_files.limited_process import ProcessLimits
        from deploypipe.verify import HEADER, cells
        from deploypipe.verify import verify as replay

        is_reference = is_remote(folder) or ("@" in folder and not Path(folder).exists())
        path = resolve(folder) if is_reference else Path(folder)
        if key or root:
            check_signature(path, key, tuple(root or ()))
        if identity:
            check_keyless(path, identity, issuer)
        is_bundle = os.path.lexists(path / MANIFEST)  # also if it only looks like a bundle
        if is_bundle:
            manifest = check_manifest(path)
            signed = "signed and unchanged" if key or root or identity else "unchanged; its signature was not checked"
            say(f"{manifest.name}, {len(manifest.files)} files, {signed}")
        elif os.path.lexists(path / RESULT):
            check_run(path)
        verification = replay(path, ProcessLimits(seconds=time_limit, memory_mib=memory_limit))
        show_table(f"Golden samples in {path}", HEADER, cells(verification))
        listed = {entry.name for entry in manifest.files} | {MANIFEST} if is_bundle else set()
        for note in verification.notes if not listed else ():
            say(f"note: {note}")
        is_same = verification.is_same
        if latency:
            if not is_bundle:
                raise DeploypipeError(f"{path}: is not a bundle and has no approved latency; leave out --latency")
            from deploypipe.release.baseline_comparison import check_approved_latency

            check = check_approved_latency(path)
            show_checks([check])
            is_same = is_same and check.is_settled
    if not is_same:
        raise typer.Exit(EXIT_DIFFERENT)
