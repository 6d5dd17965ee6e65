"""Writes config.md from the config tree: `python docs/config_page.py`. A test compares the two."""

from pathlib import Path

from ray_prefopt.config import Source
from ray_prefopt.help import default_text, flag_form
from ray_prefopt.options import options, sections

PAGE = Path(__file__).with_name("config.md")

HEAD = """\
# Configuration

Every field there is, written by `docs/config_page.py` from the config tree. In a file a field lies in its section; as a
flag it is `--section.field VALUE`. Where losses differ in a default, each is named, and one that is not named lacks the
field. `ray-prefopt config schema` prints the JSON Schema of a file, for editors."""

SOURCES = """\
## Sources

What a source in `data.train` and `data.eval` may say, when it is not a path alone.

| field | default | |
|---|---|---|"""


def page() -> str:
    lines = [HEAD]
    for section, summary in sections().items():
        lines += ["", f"## {section}", "", summary, "", "| field | value | default | |", "|---|---|---|---|"]
        for option in options().values():
            if option.name.startswith(section + "."):
                value = flag_form(option).partition(" ")[2]
                cells = [f"`{option.name}`", f"`{value}`", default_text(option), option.description]
                lines.append(
                    "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
                )
    lines += ["", SOURCES]
    for name, field in Source.model_fields.items():
        default = "required" if field.is_required() else "unset" if field.default is None else field.default
        lines.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
