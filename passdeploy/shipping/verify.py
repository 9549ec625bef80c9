"""`passdeploy verify BUNDLE`: is it what was sealed, by whom, does it fit here, does it compute what it should."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from passdeploy.errors import Unavailable
from passdeploy.shipping import manifest as m
from passdeploy.shipping.contents import MANIFEST, Contents, read_contents
from passdeploy.shipping.hardware import Machine
from passdeploy.shipping.runner import Model, load_contents
from passdeploy.shipping.signing import SIGNATURE, check_signature
from passdeploy.shipping.sums import Refused, Sealed, open_sealed

Outcome = Literal["passed", "refused", "unavailable", "skipped"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: Outcome
    message: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        checks: In order; nothing is looked at after a refusal.
        root: SHA-256 of SHA256SUMS; None when the digests did not hold.
        status: The bundle's, or the one that `measure` turned it into.
        latency_ms: Measured here; None without `measure`.
        speedup: Over the dense graph, measured here, when the budget asks for one.
    """

    checks: tuple[Check, ...]
    root: str | None = None
    status: str | None = None
    latency_ms: dict[str, Any] | None = None
    speedup: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was refused, and nothing that was asked for could not be looked at."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """The refusal, or what is missing here, in one line; None when there is neither."""
        return next((check.message for check in self.checks if check.outcome in ("refused", "unavailable")), None)

    @property
    def exit_code(self) -> int:
        """0 verified, 1 refused, or measured here and over budget, 2 something that was asked for is missing here."""
        if any(check.outcome == "unavailable" for check in self.checks):
            return Unavailable.exit_code
        return 0 if self.ok and not (self.latency_ms and self.status == "over_budget") else 1

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "verified": self.ok,
            "reason": self.reason,
            "root": self.root,
            "status": self.status,
            "latency_ms": self.latency_ms,
            "speedup": self.speedup,
            "checks": [vars(check) for check in self.checks],
        }


@dataclass
class _Log:
    checks: list[Check] = field(default_factory=list)

    def passed(self, name: str, message: str) -> None:
        self.checks.append(Check(name, "passed", message))

    def skipped(self, name: str, message: str) -> None:
        self.checks.append(Check(name, "skipped", message))

    def attempt(self, name: str, step: Callable[[], str]) -> bool:
        try:
            self.passed(name, step())
        except (Refused, Unavailable) as error:  # a tool that is missing here says nothing of the bundle
            outcome: Outcome = "unavailable" if isinstance(error, Unavailable) else "refused"
            self.checks.append(Check(name, outcome, str(error)))
            return False
        return True


def verify(
    bundle: str | Path,
    key: str | Path | None = None,
    measure: bool = False,
    *,
    engine: str | None = None,
    machine: Machine | None = None,
    run: bool = True,
) -> Verification:
    """Checks a bundle: digests, signature, manifest, hardware fit, sample outputs, and latency when asked.

    Args:
        bundle: Its folder.
        key: Public key (PEM). Given: an unsigned bundle is refused.
        measure: Measures the latency here, which turns `unverified` into `within_budget` or `over_budget`.
        engine: Id or target of the engine to look at; None: the first that fits.
        machine: What to fit; None: this machine.
        run: False stops before the hardware: for a machine that only passes the bundle on.

    Raises:
        BadInput: There is no such folder, or the key is no key.
    """
    log, found = _Log(), _Found()

    def digests() -> str:
        found.sealed = open_sealed(Path(bundle))
        return f"{len(found.sealed.sums)} files match SHA256SUMS"

    def contents() -> str:
        assert found.sealed is not None
        found.contents = read = read_contents(found.sealed)
        found.manifest = m.read(found.sealed.read(MANIFEST))
        found.status = found.manifest.status
        return f"bundle.json binds {len(read.engines)} engine(s) to the ONNX file, and is of schema {m.SCHEMA}"

    def hardware() -> str:
        assert found.contents is not None  # what was checked, not what may lie there by now
        found.model = load_contents(found.contents, engine=engine, machine=machine, check_samples=False)
        return f"engine {found.model.engine.id} fits this machine"

    def samples() -> str:
        assert found.model is not None
        difference = found.model.check_samples()
        count = found.manifest.samples.count if found.manifest else 0
        return f"outputs of {count} sample images reproduced (relative difference {difference:.1e})"

    def latency() -> str:
        assert found.model is not None and found.manifest is not None
        try:
            from passdeploy.shipping.measuring import measure_arrived

            arrival = measure_arrived(found.model.contents, found.model.engine, found.manifest)
        except ImportError as error:
            raise Unavailable(
                f"measuring needs the whole installation, and {error.name or error} is missing: pip install passdeploy"
            ) from None
        found.latency, found.speedup, found.status = arrival.latency_ms, arrival.speedup, arrival.status
        return arrival.message

    try:
        held = log.attempt("digests", digests) and _signature(log, found.sealed, key)
        if held and log.attempt("manifest", contents):
            if not run:
                log.skipped("hardware", "not asked for")
            elif log.attempt("hardware", hardware) and log.attempt("samples", samples) and measure:
                log.attempt("latency", latency)
    finally:
        if found.model is not None:
            found.model.close()
    root = found.sealed.root if found.sealed is not None else None
    return Verification(tuple(log.checks), root, found.status, found.latency, found.speedup)


@dataclass
class _Found:
    sealed: Sealed | None = None
    contents: Contents | None = None
    manifest: m.BundleManifest | None = None
    model: Model | None = None
    status: str | None = None
    latency: dict[str, Any] | None = None
    speedup: dict[str, Any] | None = None


def _signature(log: _Log, sealed: Sealed | None, key: str | Path | None) -> bool:
    assert sealed is not None
    if key is not None:

        def check() -> str:
            check_signature(sealed, Path(key))
            return f"signed with the private half of {key}: tampering would have been detected"

        return log.attempt("signature", check)
    if SIGNATURE in sealed.sums:
        log.skipped(
            "signature", "signed, but no key was given: corruption would have been detected, tampering would not"
        )
    else:
        log.skipped("signature", "not signed: corruption would have been detected, tampering would not")
    return True
