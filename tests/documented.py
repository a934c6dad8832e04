"""The method of docs/writing-a-method.md, read from there."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/writing-a-method.md"
CODE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[0]
exec(compile(CODE, str(PAGE), "exec"))
Taylor = globals()["Taylor"]
