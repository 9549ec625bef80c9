"""Whether weights lie in huge pages: found out, part of what a measurement is kept under, told and shipped."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from passdeploy import doctor, environment, huge_pages, targets
from passdeploy.remarks import small_pages
from passdeploy.shipping.bundle import write_bundle
from passdeploy.shipping.repository import write_repository
from passdeploy.shipping.verify import verify
from tests.shipping.conftest import make_source, report


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file in which a Linux with a recent C library says who gets huge pages."""
    monkeypatch.setattr(huge_pages, "_MODE", tmp_path / "enabled")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return tmp_path / "enabled"


@pytest.mark.parametrize(
    ("mode", "tunables", "used", "advised"),
    [
        ("[always] madvise never", "", True, None),
        ("always [madvise] never", "", False, f"export {huge_pages.ASK}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=1", True, None),
        ("always [madvise] never", "glibc.malloc.check=3:glibc.malloc.hugetlb=2", True, None),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", False, f"export {huge_pages.ASK}"),
        ("always [madvise] never", "glibc.malloc.hugetlb=12", False, f"export {huge_pages.ASK}"),
        ("always madvise [never]", "glibc.malloc.hugetlb=1", False, "echo madvise | sudo tee"),
    ],
)
def test_who_has_them(
    linux: Path, monkeypatch: pytest.MonkeyPatch, mode: str, tunables: str, used: bool, advised: str | None
) -> None:
    linux.write_text(mode + "\n")
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    assert huge_pages.used() == used
    advice = huge_pages.advice()
    assert advice is None if advised is None else str(advice).startswith(advised)
    assert doctor._huge_pages().ok == used
    assert environment.environment()["settings"][environment.HUGE_PAGES] == ("yes" if used else "no")


@pytest.mark.parametrize("library", [("glibc", "2.34"), ("", "")])
def test_where_the_c_library_can_not_ask_nothing_is_advised(
    linux: Path, monkeypatch: pytest.MonkeyPatch, library: tuple[str, str]
) -> None:
    linux.write_text("always [madvise] never\n")
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not huge_pages.used()
    assert huge_pages.advice() is None
    assert doctor._huge_pages().ok


def test_other_systems_do_not_say(linux: Path) -> None:
    assert huge_pages.mode() is None
    assert not huge_pages.used()
    assert huge_pages.advice() is None


def test_the_variable_does_what_is_said_of_it() -> None:
    """64 MiB in a process that asks for huge pages, and in one that does not."""
    if huge_pages.mode() != "madvise" or not huge_pages._can_ask():
        pytest.skip("this system hands huge pages to all or to none, or its C library can't ask")
    code = (
        "import re; block = bytes(bytearray(64 << 20)); "
        "print(re.search(r'AnonHugePages: +(\\d+)', open('/proc/self/smaps_rollup').read())[1])"
    )
    kilobytes = {}
    for tunables in ("glibc.malloc.hugetlb=0", huge_pages.VALUE):
        told = os.environ | {"GLIBC_TUNABLES": tunables}
        kilobytes[tunables] = int(subprocess.check_output([sys.executable, "-c", code], env=told, text=True))
    without, asked = kilobytes.values()
    assert without < 2048 <= asked


def test_measurements_with_them_are_kept_apart(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linux.write_text("always [madvise] never\n")
    plain = targets.cpu_stamp.__wrapped__()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert targets.cpu_stamp.__wrapped__() != plain


@pytest.mark.parametrize(("mode", "params", "said"), [("madvise", 11_000_000, True), ("madvise", 270_000, False),
                                                      ("always", 11_000_000, False)])  # fmt: skip
def test_a_report_advises_them_for_large_networks(linux: Path, mode: str, params: int, said: bool) -> None:
    linux.write_text(f"[{mode}] never\n")
    notes = small_pages(params)
    assert bool(notes) == said
    assert all("(44 MB in fp32)" in note and f"export {huge_pages.ASK}, here" in note for note in notes)


def _bundle(folder: Path, huge: str) -> Path:
    budget = {"asked": "1s", "latency_ms": 1000.0, "percentile": "p50", "scope": "engine"}
    known = {"cpu": "a CPU", "gpu": None, "driver": None, "versions": {}, "settings": {environment.HUGE_PAGES: huge}}
    source = make_source(folder / "run", report=report(budget=budget, environment=known))
    return write_bundle(folder / "bundle", source)


@pytest.mark.parametrize(("huge", "mode", "warned"), [("yes", "madvise", True), ("yes", "always", False),
                                                      ("no", "madvise", False)])  # fmt: skip
def test_who_gets_the_bundle_is_told(linux: Path, tmp_path: Path, huge: str, mode: str, warned: bool) -> None:
    linux.write_text(f"[{mode}] never\n")
    bundle = _bundle(tmp_path, huge)
    assert (huge_pages.ASK in (bundle / "MODEL_CARD.md").read_text()) == (huge == "yes")
    result = verify(bundle, measure=True)
    assert result.status == "within_budget"
    assert (f"start with {huge_pages.ASK}" in result.checks[-1].message) == warned


@pytest.mark.parametrize("huge", ["yes", "no"])
def test_servers_are_started_as_it_was_measured(tmp_path: Path, huge: str) -> None:
    bundle = _bundle(tmp_path, huge)
    for server in ("triton", "mlserver"):
        start = write_repository(tmp_path / server, bundle, server, name="net").start
        assert start.startswith(huge_pages.ASK) == (huge == "yes"), start
    told = write_repository(tmp_path / "kserve", bundle, "kserve", name="net")
    assert told.start.startswith("kubectl")
    model = yaml.safe_load((tmp_path / "kserve" / "inferenceservice.yaml").read_text())["spec"]["predictor"]["model"]
    asked = [{"name": "GLIBC_TUNABLES", "value": "glibc.malloc.hugetlb=1"}]
    assert model.get("env") == (asked if huge == "yes" else None)
