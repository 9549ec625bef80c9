"""Signs bundles with model-signing (OpenSSF) and elliptic-curve key files; imported only when a key is given.

The signature (`model.sig`, a Sigstore bundle) covers every file but itself and SHA256SUMS. SHA256SUMS covers the
signature too, so that damage to any file, the signature's included, is detected without a key; with it, tampering is.
Without passdeploy: `model_signing verify key B --signature B/model.sig --public_key KEY --ignore-paths B/SHA256SUMS`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from passdeploy.errors import BadInput, Unavailable
from passdeploy.shipping.replace import replace_folder
from passdeploy.shipping.sums import SUMS, Refused, Sealed, open_sealed, write

SIGNATURE = "model.sig"
_HOW = "pip install 'passdeploy[sign]'"


def require_signing() -> None:
    """Raises `Unavailable` when model-signing can't be imported."""
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise Unavailable(
            f"signatures: model-signing is not complete ({error.name or error} missing); {_HOW}"
        ) from None


def _hashing() -> Any:
    import model_signing

    return model_signing.hashing.Config().set_ignored_paths(paths=[SUMS, SIGNATURE], ignore_git_paths=False)


def _hashing_of(sealed: Sealed) -> Any:
    """Hashes the files anew, and holds them against those that were read: what is signed is what is used.

    Files could else be put back for the moment in which the signature is checked. It has to cover all of them, too,
    whatever it says itself of paths to be left out.
    """
    hashing = _hashing()
    of_files = hashing.hash

    def checked(*given: Any, **options: Any) -> Any:
        found = of_files(*given, **options)
        listed = {name: digest for name, digest in sealed.sums.items() if name != SIGNATURE}
        if {file.identifier: file.digest.digest_hex for file in found.resource_descriptors()} != listed:
            raise ValueError("the files that it covers are not those that were read")
        return found

    hashing.hash = checked
    return hashing


def sign(folder: Path, key: Path) -> Path:
    """Writes the signature of a bundle that is not yet sealed; returns its path.

    Args:
        folder: All files but SHA256SUMS.
        key: Private key, PEM, curve P-256, P-384 or P-521, without a password.

    Raises:
        BadInput: The key can't be used.
        Unavailable: model-signing is not installed.
    """
    require_signing()
    import model_signing

    path = folder / SIGNATURE
    try:
        config = model_signing.signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{key}: not a private key to sign with ({_line(error)}); make one with openssl ecparam "
                       "-name prime256v1 -genkey -noout") from None  # fmt: skip
    config.set_hashing_config(_hashing()).sign(folder.resolve(), path)
    return path


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Signs a bundle that is already sealed, again if need be; it is checked first and replaced in one step.

    Args:
        bundle: Its folder.
        key: Private key, as for `sign`.

    Raises:
        BadInput: The key can't be used, or there is no such folder.
        Refused: The bundle is not what was sealed.
        Unavailable: model-signing is not installed.
    """
    # Here, since a server that checks a signature has no pydantic.
    from passdeploy.shipping.card import MODEL_CARD, README, model_card, readme
    from passdeploy.shipping.contents import MANIFEST
    from passdeploy.shipping.manifest import read

    bundle = Path(bundle)
    if bundle.name in ("", ".."):  # of "." and the like: what has no name can't be put another folder in place of
        bundle = bundle.resolve()
    sealed = open_sealed(bundle)
    try:
        work = Path(tempfile.mkdtemp(dir=bundle.resolve().parent, prefix=f".{bundle.name}."))
    except OSError as error:
        raise BadInput(f"{error.filename or bundle}: cannot be written ({error.strerror or error})") from None
    try:
        staged = sealed.copy(work / bundle.name)
        for name in (SUMS, SIGNATURE):
            (staged / name).unlink(missing_ok=True)
        manifest = read((staged / MANIFEST).read_bytes())
        (staged / MODEL_CARD).write_text(model_card(manifest, signed=True), encoding="utf-8")
        (staged / README).write_text(readme(manifest, signed=True), encoding="utf-8")
        sign(staged, key)
        write(staged)
        replace_folder(staged, bundle)
    except OSError as error:
        raise BadInput(f"{error.filename or bundle}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return bundle


def check_signature(sealed: Sealed, key: Path) -> None:
    """Checks that a bundle was signed with the private half of `key` and is what was signed.

    Raises:
        BadInput: The key can't be used.
        Refused: Not signed, signed with another key, or changed since.
        Unavailable: model-signing is not installed.
    """
    if SIGNATURE not in sealed.sums:
        raise Refused(
            f"the bundle is not signed (no {SIGNATURE}), but a key was given; sign it "
            "(docs/shipping.md), or leave the key out"
        )
    require_signing()
    import model_signing

    try:
        config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{key}: not a public key to verify with ({_line(error)})") from None
    try:
        folder = sealed.folder.resolve()  # a link to a model is refused there
        config.set_hashing_config(_hashing_of(sealed)).verify(folder, folder / SIGNATURE)
    except Exception as error:  # whatever the library raises on a forged file is a refusal
        raise Refused(f"{SIGNATURE}: the signature does not hold for this bundle and key ({_line(error)})") from None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
