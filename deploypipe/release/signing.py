"""Signatures over a bundle's files, in the OpenSSF Model Signing format. The only importer of model_signing."""

from pathlib import Path
from types import ModuleType

from deploypipe.errors import BundleError, DeploypipeError
from deploypipe.release.manifest import SIGNATURE


def sign(bundle: Path, private_key: Path, certificates: tuple[Path, ...] = ()) -> None:
    """Write the bundle's signature file.

    private_key: PEM file of an elliptic curve key. certificates: the signer's own first, then those up to the root;
    without any, the public key verifies. Raises BundleError for a key that cannot be read.
    """
    library = _library()
    config = library.signing.Config().set_hashing_config(_hashing(library))
    try:
        if certificates:
            own, *chain = certificates
            config.use_certificate_signer(private_key=private_key, signing_certificate=own, certificate_chain=chain)
        else:
            config.use_elliptic_key_signer(private_key=private_key)
        config.sign(bundle, bundle / SIGNATURE)
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"{private_key}: cannot sign with this key ({_line(error)}); give the PEM file of an elliptic curve key, "
            "as from `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"
        ) from None


def sign_keyless(bundle: Path) -> None:
    """Write the bundle's signature file with Sigstore: without a key, with the signer's identity in a public log.

    The identity is that of the CI job (OpenID Connect), or of the user who signs in with a browser. BundleError if the
    identity or the network is not available.
    """
    library = _library()
    config = library.signing.Config().set_hashing_config(_hashing(library))
    try:
        config.use_sigstore_signer(use_ambient_credentials=True)
        config.sign(bundle, bundle / SIGNATURE)
    except Exception as error:  # network, trust root, identity: each part of the library has errors of its own
        raise BundleError(
            f"{bundle}: signing with Sigstore failed ({_line(error)}); it needs the network and an identity (in GitHub "
            "Actions: permissions: id-token: write); or sign with --key"
        ) from None


def check_keyless(bundle: Path, identity: str, issuer: str) -> None:
    """Raise BundleError unless this identity, vouched for by this OpenID Connect issuer, signed every file.

    Only the signature is parsed; the files are hashed.
    """
    library = _library()
    _require_signature(bundle)
    config = library.verifying.Config().set_hashing_config(_hashing(library))
    try:
        config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
        config.verify(bundle, bundle / SIGNATURE)
    except Exception as error:  # the library does not foresee every error of a forged file
        raise BundleError(
            f"{bundle}: is not signed by {identity}, says Sigstore ({_line(error)}); do not use it"
        ) from None


def check_signature(bundle: Path, public_key: Path | None = None, roots: tuple[Path, ...] = ()) -> None:
    """Raise BundleError unless this key, or a key under one of these root certificates, signed every file.

    Only the signature is parsed; the files are hashed.
    """
    library = _library()
    _require_signature(bundle)
    config = library.verifying.Config().set_hashing_config(_hashing(library))
    if roots:
        config.use_certificate_verifier(certificate_chain=roots)
    else:
        try:
            config.use_elliptic_key_verifier(public_key=public_key)
        except (OSError, ValueError, TypeError) as error:
            raise BundleError(f"{public_key}: is not a public key ({_line(error)}); give a PEM file") from None
    try:
        config.verify(bundle, bundle / SIGNATURE)
    except Exception as error:  # the library does not foresee every error of a forged file
        raise BundleError(f"{bundle}: is not what was signed with this key ({_line(error)}); do not use it") from None


def _require_signature(bundle: Path) -> None:
    path = bundle / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{bundle}: is not signed ({SIGNATURE} is missing); sign it with `deploypipe release --key`")


def _hashing(library: ModuleType) -> object:
    config = library.hashing.Config()
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False).set_allow_symlinks(False)


def _library() -> ModuleType:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise DeploypipeError(
            f"signatures need the package {error.name or 'model-signing'}; pip install 'deploypipe[release]'"
        ) from None
    return model_signing


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
