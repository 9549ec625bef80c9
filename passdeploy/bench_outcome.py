"""How `passdeploy bench` judges what it measured: one engine against another, or two against a stored report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from passdeploy import huge_pages
from passdeploy.environment import HUGE_PAGES
from passdeploy.errors import BadInput
from passdeploy.latency.measurement import RESOLUTION, Comparison

if TYPE_CHECKING:
    from passdeploy.reporting.schema import Report

NOT_SLOWER, SLOWER, INCONCLUSIVE = 0, 1, 3


def parse_margin(text: str) -> float:
    """``5%`` -> 0.05. Raises `BadInput`."""
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not text.strip().endswith("%") or not 0 <= value < 10:
        raise BadInput(f"--fail-if-slower {text!r}: give a percentage, such as 5%")
    if value < RESOLUTION:
        raise BadInput(
            f"--fail-if-slower {text!r}: two loads of one engine differ by up to {RESOLUTION:.0%}; give that or more"
        )
    return value


def check_judged(given: list[str], fail_if_slower: str | None, against: Path | None) -> None:
    """Refuses what can't be judged, before it is measured.

    Raises:
        BadInput: Too few engines, or a stored report that they can't be held against.
    """
    if against is not None and len(given) != 2:
        raise BadInput("--against: give two engines, the dense one first; their ratio is what is compared")
    if against is not None:
        stored_report(against)
    if fail_if_slower is not None and len(given) < 2:
        raise BadInput("--fail-if-slower: give two or more to compare, the reference first")


def stored_report(path: Path) -> Report:
    """A report whose speed-up is of what is measured here: engines alone.

    Raises:
        BadInput: It has none, or one of another scope.
    """
    from passdeploy.reporting import load_report

    report = load_report(path)
    if report.speedup.latency is None or report.speedup.latency_ci95 is None:
        raise BadInput(f"{path}: has no measured speed-up to compare with; give the report of a run that was measured")
    if report.budget.scope != "engine":
        raise BadInput(f"{path}: its speed-up is of scope {report.budget.scope}, and bench times engines alone")
    return report


def outcome(comparison: Comparison, margin: float) -> int:
    """0 nothing is slower than the first by more than `margin`, 1 something is, 3 can't tell."""
    verdicts = [comparison.not_slower(name, margin) for name in comparison.measurements if name != comparison.reference]
    if any(verdict is False for verdict in verdicts):
        return SLOWER
    return INCONCLUSIVE if any(verdict is None for verdict in verdicts) else NOT_SLOWER


def against_report(comparison: Comparison, path: Path, margin: float) -> tuple[int, str]:
    """Judges a comparison of (dense, thin) against the speed-up in a stored report.

    The ratio to the dense engine is compared, not milliseconds: a stored report may come from a faster machine.

    Returns:
        Outcome as for `outcome`, and a sentence.

    Raises:
        BadInput: The report has no measured speed-up, or one of another scope.
    """
    report = stored_report(path)
    assert report.speedup.latency is not None
    assert report.speedup.latency_ci95 is not None
    thin = next(name for name in comparison.measurements if name != comparison.reference)
    now = comparison.ratio(thin, 0.99)
    low, high = report.speedup.latency_ci95
    said = f"{now.value:.3f}x now ({now.low:.3f} to {now.high:.3f}), {report.speedup.latency:.3f}x in the report"
    said += _other_pages(report)
    if now.high * (1 + margin) < low:
        return SLOWER, f"slower than the report: {said}"
    if now.low * (1 + margin) >= high:
        return NOT_SLOWER, f"not slower than the report: {said}"
    if now.value * (1 + margin) >= report.speedup.latency and now.low * (1 + margin) >= low:
        return NOT_SLOWER, f"not slower than the report: {said}"
    return INCONCLUSIVE, f"inconclusive: {said}"


def _other_pages(report: Report) -> str:
    """That weights lie in huge pages now and did not when the report was made, or the other way round."""
    then, now = report.environment.settings.get(HUGE_PAGES), huge_pages.used()
    if report.target.compute_capability is not None or then not in ("yes", "no") or (then == "yes") == now:
        return ""
    if now:
        return "; weights lie in huge pages now, and did not then"
    return f"; weights lay in huge pages then, and do not now: to compare like with like, export {huge_pages.ASK}"
