"""HTML that stands by itself: no network, no file beside it, and nothing in a model's text is markup.

A Content-Security-Policy allows the page's own script by its hash and nothing else: even markup that got past the
escaping could neither run nor load anything.
"""

import base64
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructrl.display import printable
from instructrl.reporting.drawing import variables

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page from `templates/`; every value is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": lambda text: printable(str(text)), "prose": prose}
    script = (TEMPLATES / "filter.js").read_text(encoding="utf-8")
    own = {
        "style": Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),  # our own file
        "themes": [Markup(variables(dark)) for dark in (0, 1)],  # our own colours
        "script": Markup(script),  # our own file
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "svg": lambda chart: Markup(chart.inline),  # serialised by ElementTree, which escapes text
    }
    return environment.get_template(template).render(own | dict(values))


def prose(text: str) -> "Markup":
    """A sentence of ours; what is between backticks becomes code, between two asterisks strong."""
    from markupsafe import Markup, escape

    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text))))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", coded))  # escaped
