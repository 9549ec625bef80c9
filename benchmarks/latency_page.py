"""Writes the tables of docs/latency.md from what lies in `benchmarks/results/<device>`, a table per device.

python benchmarks/latency_page.py benchmarks/results/amd-epyc-avx-512 benchmarks/results/intel-r-xeon-r-processor-amx
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import budgets
import latency_prediction
import realisation

PAGE = Path(__file__).parents[1] / "docs" / "latency.md"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def titled(folder: Path, table: str) -> str:
    return f"{folder.name}:\n\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    folders = parser.parse_args().results
    blocks: dict[str, list[str]] = {"prediction": [], "budgets": [], "realisation": []}
    for folder in folders:
        if (folder / "latency-prediction").exists():
            blocks["prediction"].append(titled(folder, latency_prediction.table(folder / "latency-prediction")))
        for name, module in (("budgets", budgets), ("realisation", realisation)):
            if rows := lines(folder / f"{name}.jsonl"):
                blocks[name].append(titled(folder, module.table(rows)))
    text = PAGE.read_text()
    for name, tables in blocks.items():
        block = "\n".join([f"<!-- {name}:begin -->", "\n\n".join(tables), f"<!-- {name}:end -->"])
        text, found = re.subn(
            rf"<!-- {name}:begin -->.*?<!-- {name}:end -->", lambda _, b=block: b, text, flags=re.DOTALL
        )
        assert found == 1, name
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
