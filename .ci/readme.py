"""Writes README.md from nbs/index.ipynb: `python .ci/readme.py [TARGET]`."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent


def readme(path: Path = root/'nbs'/'index.ipynb') -> str:
    "Markdown of the notebook without hidden and directive-only cells."
    notebook = nbformat.read(path, as_version=4)
    hidden = re.compile(r'^#\|\s*(hide|default_exp|export)\b', re.M)
    notebook.cells = [cell for cell in notebook.cells
                      if cell.cell_type != 'code' or not hidden.search(cell.source)]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r'^```\n(?=(?:from|import) )', '```python\n', text, flags=re.M)
    note = '<!-- Generated from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n'
    return note + re.sub(r'\n{3,}', '\n\n', text).strip().replace('](../', '](') + '\n'


if __name__ == '__main__':
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else root/'README.md'
    target.write_text(readme(), encoding='utf-8')
