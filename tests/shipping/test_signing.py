from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from passdeploy.errors import BadInput
from passdeploy.shipping import sums
from passdeploy.shipping.bundle import BundleSource, write_bundle
from passdeploy.shipping.runner import load
from passdeploy.shipping.signing import check_signature, sign_bundle
from passdeploy.shipping.sums import Refused
from passdeploy.shipping.verify import verify
from tests.shipping.conftest import make_source, report

pytest.importorskip("model_signing", reason="pip install 'passdeploy[sign]'")

Keys = tuple[Path, Path]


def make_keys(folder: Path) -> Keys:
    """A private and a public key, as ``openssl ecparam -name prime256v1 -genkey`` makes them."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    folder.mkdir(parents=True, exist_ok=True)
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.TraditionalOpenSSL, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(source: BundleSource, keys: Keys, tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "signed", source, key=keys[0])


def test_a_card_that_is_written_again_says_what_the_first_one_said(keys: Keys, tmp_path: Path) -> None:
    """The accuracies of a task of one's own are no top-1 accuracies."""
    source = make_source(tmp_path / "run", report=report(provenance={"metric": "macro F1"}))
    bundle = write_bundle(tmp_path / "bundle", source)
    for _ in range(2):
        assert "| macro F1, test data | 93.00 % | 92.50 % |" in (bundle / "MODEL_CARD.md").read_text()
        sign_bundle(bundle, keys[0])


def reseal(bundle: Path) -> None:
    (bundle / "SHA256SUMS").unlink()
    sums.write(bundle)


def reason(bundle: Path, key: Path) -> str:
    """Both refuse, with the same one line."""
    result = verify(bundle, key)
    assert result.exit_code == 1
    assert result.reason
    assert "\n" not in result.reason
    with pytest.raises(Refused) as error:
        load(bundle, key=key)
    assert str(error.value) == result.reason
    return result.reason


def test_signed_and_verified(signed: Path, keys: Keys) -> None:
    result = verify(signed, keys[1])
    assert result.ok, result.reason
    assert "tampering would have been detected" in result.checks[1].message
    load(signed, key=keys[1]).close()
    assert "Signed" in (signed / "MODEL_CARD.md").read_text()


def test_without_the_key_it_says_so(signed: Path) -> None:
    result = verify(signed)
    assert result.ok
    assert result.checks[1].outcome == "skipped"
    assert "no key was given" in result.checks[1].message


def test_the_projects_own_tool_agrees(signed: Path, keys: Keys) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--public_key", str(keys[1])]
    command += ["--signature", str(signed / "model.sig"), "--ignore-paths", str(signed / "SHA256SUMS")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_whoever_tampers_and_seals_again_is_found_out(signed: Path, keys: Keys) -> None:
    for path in sorted(p for p in signed.rglob("*") if p.is_file() and p.name not in ("SHA256SUMS", "model.sig")):
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        reseal(signed)
        assert "the signature does not hold" in reason(signed, keys[1])
        path.write_bytes(before)
    (signed / ".gitignore").write_text("x")
    reseal(signed)
    assert "the signature does not hold" in reason(signed, keys[1])
    (signed / ".gitignore").unlink()
    (signed / "README.txt").unlink()
    reseal(signed)
    assert "the signature does not hold" in reason(signed, keys[1])


def test_what_is_signed_is_what_was_read(signed: Path, keys: Keys) -> None:
    """Whoever puts the files back for the moment in which the signature is checked is found out."""
    path = signed / "README.txt"
    before = path.read_bytes()
    path.write_bytes(before + b" ")
    reseal(signed)
    sealed = sums.open_sealed(signed)
    path.write_bytes(before)
    reseal(signed)
    with pytest.raises(Refused, match=r"does not hold .*not those that were read"):
        check_signature(sealed, keys[1])
    check_signature(sums.open_sealed(signed), keys[1])


def test_a_signature_that_leaves_files_out_is_refused(bundle: Path, keys: Keys) -> None:
    """As its own command line can make one: what is not signed could be exchanged."""
    command = [sys.executable, "-m", "model_signing", "sign", "key", str(bundle), "--private_key", str(keys[0])]
    command += ["--signature", str(bundle / "model.sig"), "--ignore-paths", str(bundle / "SHA256SUMS")]
    for more, held in (([], True), (["--ignore-paths", str(bundle / "README.txt")], False)):
        (bundle / "model.sig").unlink(missing_ok=True)
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        reseal(bundle)
        assert verify(bundle, keys[1]).ok is held


def test_damage_to_the_signature_is_found_without_and_with_the_key(signed: Path, keys: Keys) -> None:
    path = signed / "model.sig"
    before = path.read_bytes()
    for at in np.random.default_rng(0).integers(len(before), size=12):
        path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert "model.sig: content does not match" in (verify(signed, run=False).reason or "")
    path.write_bytes(b"{}")
    reseal(signed)
    assert "the signature does not hold" in reason(signed, keys[1])


def test_another_key_and_no_signature(signed: Path, sealed_bundle: Path, keys: Keys, tmp_path: Path) -> None:
    _, other = make_keys(tmp_path / "other")
    assert "the signature does not hold" in reason(signed, other)
    assert "not signed" in reason(sealed_bundle, keys[1])


def test_a_signature_of_another_bundle_does_not_pass(signed: Path, sealed_bundle: Path, keys: Keys) -> None:
    (sealed_copy := signed.parent / "copy").mkdir()
    for path in sealed_bundle.rglob("*"):
        if path.is_file():
            target = sealed_copy / path.relative_to(sealed_bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (sealed_copy / "model.sig").write_bytes((signed / "model.sig").read_bytes())
    reseal(sealed_copy)
    assert "the signature does not hold" in reason(sealed_copy, keys[1])


def test_a_sealed_bundle_is_signed_later_and_again(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    assert "Not signed" in (bundle / "MODEL_CARD.md").read_text()
    sign_bundle(bundle, keys[0])
    assert verify(bundle, keys[1]).ok
    assert "Signed: " in (bundle / "MODEL_CARD.md").read_text()
    assert "--key PUBLIC_KEY" in (bundle / "README.txt").read_text()
    other = make_keys(tmp_path / "other")
    sign_bundle(bundle, other[0])
    assert verify(bundle, other[1]).ok
    assert not verify(bundle, keys[1]).ok
    (bundle / "README.txt").write_text("changed")
    with pytest.raises(Refused, match=r"README\.txt"):
        sign_bundle(bundle, keys[0])
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "other"]


def test_keys_that_are_none(signed: Path, source: BundleSource, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("not a key")
    for path in (tmp_path / "bad.pem", tmp_path / "missing.pem"):
        with pytest.raises(BadInput, match="public key") as error:
            verify(signed, path)
        assert "\n" not in str(error.value)
        with pytest.raises(BadInput, match="private key"):
            write_bundle(tmp_path / "new", source, key=path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("server", "at"), [("triton", "1"), ("mlserver", ".")])
def test_a_server_checks_the_signature_again(signed: Path, keys: Keys, tmp_path: Path, server: str, at: str) -> None:
    from passdeploy.shipping.repository import write_repository

    told = write_repository(tmp_path / "models", signed, server, name="net", kind="python", key=keys[1])
    model = tmp_path / "models" / "net"
    assert (model / at / "verify_key.pem").read_bytes() == keys[1].read_bytes()
    settings = model / ("config.pbtxt" if server == "triton" else "model-settings.json")
    assert "verify_key.pem" in settings.read_text()
    assert "model-signing" in (told.note or "")
    write_repository(tmp_path / "models", signed, server, name="net", kind="python")
    assert "verify_key" not in settings.read_text()


def test_however_the_path_is_spelled(
    source: BundleSource, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle(Path("signed"), source, key=keys[0])
    Path("current").symlink_to("signed")
    for path in (Path("signed"), tmp_path / "signed", Path("current"), Path("../") / tmp_path.name / "signed"):
        assert verify(path, keys[1]).ok, path
    sign_bundle(Path("signed"), keys[0])
    assert verify(Path("signed"), keys[1]).ok
    monkeypatch.chdir("signed")
    sign_bundle(Path(), keys[0])
    assert verify(tmp_path / "signed", keys[1]).ok
    assert sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink()) == ["signed"]


def test_what_cannot_be_written_is_one_line(signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("passdeploy.shipping.signing.tempfile.mkdtemp", full)
    with pytest.raises(BadInput, match=r"cannot be written \(No space left on device"):
        sign_bundle(signed, keys[0])
