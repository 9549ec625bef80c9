"""Reads and writes a run's report: JSON (the contract), Markdown and HTML (both drawn from the JSON alone)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from passdeploy.errors import BadInput
from passdeploy.reporting.schema import SCHEMA_ID, Report
from passdeploy.shipping.sums import SUMS
from passdeploy.workspace import RECORD, write_atomic

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def write_reports(report: Report, folder: Path) -> dict[str, Path]:
    """Writes report.json, report.md and report.html into `folder`, each atomically; returns their paths by suffix.

    Raises:
        PassdeployError: The folder can't be written.
    """
    from passdeploy.reporting.html import render_html
    from passdeploy.reporting.markdown import render_markdown

    texts = {"json": dumps(report.to_json()), "md": render_markdown(report), "html": render_html(report)}
    paths = {}
    for suffix, text in texts.items():
        paths[suffix] = folder / f"report.{suffix}"
        write_atomic(paths[suffix], text)
    return paths


def load_report(path: Path) -> Report:
    """Reads a report.json, or the one in the run folder `path`; keys of later versions are ignored.

    Raises:
        BadInput: It can't be read or is no report; one line.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such report; passdeploy run writes one into its --out folder") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as a report ({error})") from None
    return parse_report(data, str(path))


def find_reports(path: Path) -> list[Path]:
    """The report.json files that `path` stands for: itself, a run's, or, in a folder of runs, all of them.

    Raises:
        BadInput: There is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{path}: no such run folder or report; check the path")
    if (path / "report.json").is_file():
        return [path / "report.json"]
    found = {
        file.parent
        for file in path.rglob("report.json")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    }
    # What lies in a stage's folder may be of a state that the run has left since.
    found = {folder for folder in found if not (folder / RECORD).is_file()}
    # A bundle carries its run's report wherever it is copied to; it stands for the run only where nothing else does.
    found = {folder for folder in found if not (folder.parent / SUMS).is_file()} or found
    # What lies below a run's own report, in its stages and its bundle, are copies of it.
    runs = [folder / "report.json" for folder in found if found.isdisjoint(folder.parents)]
    if not runs:
        raise BadInput(f"{path}: no report.json in it or below; passdeploy run writes one")
    return sorted(runs)


def parse_report(data: Any, where: str = "report") -> Report:
    """Validates what `json.loads` returned.

    Raises:
        BadInput: One line with the first thing that is wrong and its place.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA_ID:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise BadInput(f"{where}: not a report of schema {SCHEMA_ID} (found {found!r})")
    try:
        return Report.model_validate(data, extra="ignore")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "report"
        more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        message = str(first["msg"]).removeprefix("Value error, ")
        raise BadInput(f"{where}: not a valid report: {place}: {message}{more}") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of `report.json` (draft 2020-12). Unknown keys are allowed: readers ignore them."""
    schema = Report.model_json_schema(by_alias=True, mode="validation")

    def relax(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("additionalProperties") is False:
                del node["additionalProperties"]
            if isinstance(node.get("title"), str):  # pydantic's echo of the key
                del node["title"]
            for value in node.values():
                relax(value)
        elif isinstance(node, list):
            for value in node:
                relax(value)

    relax(schema)
    fields = list(Report.model_fields)
    required = fields[: fields.index("environment") + 1]
    schema["required"] = ["schema" if name == "schema_" else name for name in required]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, "title": SCHEMA_ID}
    return {**head, **schema}


def dumps(data: Any, indent: int = 0) -> str:
    """JSON with one key per line and lists of plain values on one line; refuses NaN."""
    pad = " " * (indent + 1)
    if isinstance(data, dict) and data:
        rows = [f"{pad}{json.dumps(str(key))}: {dumps(value, indent + 1)}" for key, value in data.items()]
    elif isinstance(data, list) and any(isinstance(value, (dict, list)) and value for value in data):
        rows = [f"{pad}{dumps(value, indent + 1)}" for value in data]
    else:
        return json.dumps(data, allow_nan=False, ensure_ascii=False)
    left, right = "{}" if isinstance(data, dict) else "[]"
    return f"{left}\n" + ",\n".join(rows) + f"\n{' ' * indent}{right}" + ("\n" if indent == 0 else "")


if __name__ == "__main__":  # python -m passdeploy.reporting.files: publishes the schema
    write_atomic(SCHEMA_FILE, dumps(json_schema()))
