import re
from pathlib import Path

from service.engine.metrics import METRICS
from service.settings import Settings, default_of, variable

GUIDE = (Path(__file__).parent.parent / "docs" / "operations.md").read_text(encoding="utf-8")


def rows_of(first: str) -> list[list[str]]:
    """The rows of the table whose first heading is this, code marks left out."""
    match = re.search(rf"^\| {first} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    assert match is not None
    lines = match[1].splitlines()
    return [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines]


def test_every_setting_is_explained() -> None:
    """The guide has name, default and description of each setting, in their order."""
    assert rows_of("variable") == [
        [variable(name), default_of(field), str(field.description).replace("`", "")]
        for name, field in Settings.model_fields.items()
    ]


def test_every_metric_is_explained() -> None:
    """The guide has name, kind, labels and description of each metric, in their order."""
    assert rows_of("metric") == [
        [
            name + "_total" * (told.kind == "counter"),
            told.kind,
            ", ".join(told.labels),
            told.text.replace("`", ""),
        ]
        for name, told in METRICS.items()
    ]


def test_every_setting_that_is_named_exists() -> None:
    """What the guide calls a setting is one."""
    named = set(re.findall(r"CHARLOOM_[A-Z_]+", GUIDE))
    assert named <= {variable(name) for name in Settings.model_fields}
