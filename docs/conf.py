"""The documentation: every notebook a page with its stored outputs, and behind it its module's reference.

`CONTRIBUTING.md` says how it is built, and why by Sphinx and MyST-NB."""
import ast
import inspect
import json
import re
from configparser import ConfigParser
from pathlib import Path
from textwrap import shorten

from docutils import nodes
from fastcore.docments import docments
from latex2mathml.converter import convert

import newsrepro
from newsrepro._modidx import d as exported

ROOT = Path(__file__).resolve().parent.parent
settings = ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project, author, release = settings['title'], settings['author'], settings['version']
copyright = settings['copyright']
extensions = ['myst_nb', 'sphinx.ext.autodoc']
root_doc = 'nbs/index'
include_patterns = ['nbs/**.ipynb', 'CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/*.md',
                    'newsrepro/mini/collections.md', 'newsrepro/mini/checkpoints/README.md',
                    'reports/reference/tables/*.md']
exclude_patterns = ['.*', '_*', 'build', '**/.ipynb_checkpoints']
html_theme, html_title, html_copy_source = 'furo', f'{project} {release}', False
html_math_renderer = 'mathml'
nb_execution_mode, nb_merge_streams = 'off', True
suppress_warnings = ['myst.header']  # a notebook ends with a small heading, whatever stands above
myst_enable_extensions, myst_heading_anchors = ['dollarmath', 'amsmath'], 3
default_role, smartquotes = 'py:obj', False
python_maximum_signature_line_length = 80
autodoc_typehints_format, autodoc_member_order = 'short', 'bysource'

FOLDERS = {'core': 'Core', 'data': 'Data', 'text': 'Text', 'models': 'Models', 'ranking': 'Ranking',
           'methods': 'Methods', 'study': 'Study', 'mini': 'Mini profile'}
GUIDES = ['nbs/add_a_method', 'nbs/bring_data', 'nbs/what_it_writes']  # first of those in no folder
PROJECT = ['benchmarks/README', 'benchmarks/results', 'CONTRIBUTING', 'CHANGELOG',
           'newsrepro/mini/collections', 'newsrepro/mini/checkpoints/README']
PAGES = {path.stem: path.relative_to(ROOT).as_posix() for path in sorted((ROOT/'nbs').rglob('*.ipynb'))}
HOME = {name: f'newsrepro.{home}.{name}' for home, names in newsrepro._HOMES.items() for name in names}


# what a page is made of

def contents() -> str:
    "The navigation: guides, the folders of `nbs`, the project."
    tables = {path.relative_to(ROOT).with_suffix('').as_posix()
              for path in (ROOT/'reports'/'reference'/'tables').glob('*.md')}
    folders = {title: sorted(page.removesuffix('.ipynb') for page in PAGES.values()
                             if page.startswith(f'nbs/{folder}/')) for folder, title in FOLDERS.items()}
    alone = [page.removesuffix('.ipynb') for page in PAGES.values() if page.count('/') == 1]
    guides = sorted(set(alone) - {root_doc}, key=lambda page: (page not in GUIDES, page))
    groups = {'Guides': guides, **folders, 'Project': PROJECT, 'Reference results': sorted(tables)}
    block = '```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {}\n\n{}\n```\n'.format
    return '\n'.join(block(title, '\n'.join(f'/{one}' for one in pages)) for title, pages in groups.items())


def is_code(cell: dict) -> bool: return cell['cell_type'] == 'code'


def names_in_reach(cells: list[dict], module: str | None) -> dict[str, str]:
    "What a notebook exports and imports of ours: name -> name with its module."
    reach = HOME | {full.removeprefix(f'{module}.'): full for full in exported['syms'].get(module, ())}
    code = [re.sub(r'(?m)^\s*[%!].*$', '', ''.join(cell['source'])) for cell in cells if is_code(cell)]
    for node in (node for source in code for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('newsrepro.'):
            reach |= {alias.asname or alias.name: f'{node.module}.{alias.name}' for alias in node.names}
    return {name: full for name, full in reach.items() if is_documented(full)}


def is_documented(full: str) -> bool:
    "Whether the reference has this function or class of ours."
    module, _, name = full.rpartition('.')
    return full in exported['syms'].get(module, ()) and name[0] != '_' and module != 'newsrepro.cli'


def linked(text: str, page: Path, reach: dict[str, str]) -> str:
    "Markdown whose names in backticks lead to their reference, and links to a folder to the repository."
    def name(found):
        word = found[1]
        if word in PAGES and word != page.stem: return f'[`{word}`](/{PAGES[word]})'
        full = word if is_documented(word) else reach.get(word)
        return f'{{py:obj}}`{word} <{full}>`' if full else found[0]

    def link(found):
        path = (page.parent/found[1]).resolve()
        at = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ''
        folder = f"{settings['git_url']}/tree/{settings['branch']}/{at}"
        return f']({folder})' if at and path.is_dir() else found[0]
    fenced = re.split(r'(?ms)(^```.*?^```$)', text)
    for i in range(0, len(fenced), 2):
        fenced[i] = re.sub(r'\]\((?!\w+:|#)([^)\s]+)\)', link, fenced[i])
        fenced[i] = re.sub(r'(?<![`\[\w}])`([A-Za-z0-9_][\w.]*)`(?![`\]])', name, fenced[i])
    return ''.join(fenced)


def reference(module: str) -> str:
    "The directive that documents a module's functions and classes; of the command line, its commands."
    if module == 'newsrepro.cli': return commands()
    directive = f'.. automodule:: {module}\n   :members:\n   :undoc-members:\n'
    return f'## Reference\n\n```{{eval-rst}}\n{directive}```\n'


def commands() -> str:
    "The options of every command, as typer tells them."
    import typer
    from typer.cli import get_docs_for_click

    from newsrepro.cli import app
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name='newsrepro')
    return '## Reference\n\n' + re.sub(r'(?m)^#+ (?=`)', '### ', text)


def prepared(app, docname: str, source: list[str]) -> None:
    "What `nbdev` directives ask for is done, names are linked, the reference follows."
    page = Path(app.env.doc2path(docname))
    if page.suffix == '.md':
        titled = re.sub(r'\A\*\*([\w-]+)\.\*\*', r'# \1\n\n', source[0])  # a table of the reference
        source[0] = linked(titled, page, HOME)
        return
    notebook, kept, before = json.loads(source[0]), [], ''
    cells = notebook['cells']
    homes = [re.search(r'(?m)^#\|\s*default_exp\s+(\S+)', ''.join(cell['source'])) for cell in cells]
    module = next((f'newsrepro.{found[1]}' for found in homes if found), None)
    reach = names_in_reach(cells, module)
    for cell in cells:
        text = ''.join(cell['source'])
        if re.search(r'(?m)^#\|\s*(hide|default_exp)\b', text): continue
        if is_code(cell): cell['metadata']['mystnb'] = dict(image=dict(alt=in_words(before)))
        else: before = text
        cell['source'] = re.sub(r'(?m)^#\|.*\n?', '', text) if is_code(cell) else linked(text, page, reach)
        kept.append(cell)
    more = [contents()] if docname == root_doc else [reference(module)] if module else []
    kept += [dict(cell_type='markdown', id='reference', metadata={}, source=text) for text in more]
    source[0] = json.dumps(notebook | dict(cells=kept))


def in_words(text: str) -> str:
    "What stands before a picture, as the words in its place, without marks."
    sentences = re.sub(r'(?m)^#+ (.*)$', r'\1.', text)
    prose = ' '.join(re.sub(r'[`*$>]|\[|\]\([^)]*\)', '', sentences).split())
    return 'Picture. ' + shorten(prose, 250, placeholder=' …')


# what the reference says of a name

def plain(text: str) -> str:
    "Our words as reStructuredText: only backticks mean something."
    return re.sub(r'([\\*|_])', r'\\\1', text)


def with_docments(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    "The docstring, and a line for each parameter that has a comment behind it."
    lines[:] = [plain(line) for line in lines]
    if what not in ('function', 'method', 'class'): return
    said = docments(obj)
    lines += ['', *(f':param {plain(one)}: {plain(" ".join(text.split()))}' for one, text in said.items()
                    if text and one != 'return')]
    if said.get('return'): lines.append(f':returns: {plain(said["return"])}')


def is_skipped(app, what: str, name: str, obj, skip: bool, options) -> bool:
    "Only functions, classes and methods: fields stand with their class, constants in the notebook."
    return skip or not (inspect.isroutine(obj) or inspect.isclass(obj) or isinstance(obj, property))


def dashed(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    "A dash between a parameter and its meaning; Sphinx leaves two hyphens, as options on a page need them."
    if 'body' in context: context['body'] = context['body'].replace('</strong> -- ', '</strong> – ')


# formulas without a script

def formula(self, node) -> None:
    "MathML, which browsers draw themselves."
    display = 'block' if isinstance(node, nodes.math_block) else 'inline'
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def front(app, failure) -> None:
    "The address of the site itself leads to its first page."
    if failure or app.builder.name != 'html': return
    Path(app.outdir, 'index.html').write_text(
        f'<!doctype html>\n<meta charset="utf-8">\n<title>{project}</title>\n'
        f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        f'<a href="{root_doc}.html">{project}</a>\n', encoding='utf-8')


def setup(app) -> None:
    app.add_html_math_renderer('mathml', inline_renderers=(formula, None), block_renderers=(formula, None))
    app.connect('source-read', prepared)
    app.connect('autodoc-process-docstring', with_docments)
    app.connect('autodoc-skip-member', is_skipped)
    app.connect('html-page-context', dashed)
    app.connect('build-finished', front)
