"""Makes the shipped reference from a finished mini study: `python .ci/renew_reference.py [REPORT]`, then
look at `git diff` and commit.

The tables, figures, manifest and page go to `reports/reference`; the outputs of the executed notebooks
go into `nbs`."""
import base64
import io
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from newsrepro.core.base import read_json, reference_dir, write_json
from newsrepro.data.layouts import read_collection
from newsrepro.study.needs import facts_of, work_of
from newsrepro.study.registry import NOTEBOOKS, PAPER_LAYOUT
from newsrepro.study.report import write_report
from newsrepro.study.study import mini_root

root = Path(__file__).resolve().parent.parent


def with_work(manifest: dict) -> dict:
    "The manifest with what each notebook computed, from which the plan of later runs is estimated."
    facts = {layout: facts_of(read_collection(mini_root()/layout)) for layout in set(PAPER_LAYOUT.values())}
    for notebook in NOTEBOOKS:
        entry = manifest['notebooks'][notebook.name]
        entry['work'] = asdict(work_of(notebook.name, entry['parameters'],
                                       facts[PAPER_LAYOUT[notebook.paper]]))
    return manifest


def as_jpeg(data: dict) -> dict:
    "An output's forms, a large picture (of photographs) as JPEG, which takes a fifth."
    if len(data.get('image/png', '')) < 100_000: return data
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(data['image/png']))) as image:
        image.convert('RGB').save(buffer, 'JPEG', quality=88)
    return {name: value for name, value in data.items()
            if name != 'image/png'} | {'image/jpeg': base64.b64encode(buffer.getvalue()).decode()}


def in_256_colours(path: Path) -> None:
    "A large picture in a palette of its own, which takes less than half; its description stays."
    with Image.open(path) as image:
        described = PngInfo()
        for name, text in image.text.items(): described.add_text(name, text)
        image.convert('RGB').quantize(256).save(path, pnginfo=described, optimize=True)


def take_outputs(executed: Path, source: Path) -> None:
    """Put the outputs of an executed notebook under the same cells of its source, but for what was said on
    stderr."""
    read = lambda path: json.loads(path.read_text(encoding='utf-8'))
    outputs = {cell['id']: cell.get('outputs', []) for cell in read(executed)['cells']}
    notebook = read(source)
    for cell in (cell for cell in notebook['cells'] if cell['cell_type'] == 'code'):
        cell['outputs'] = [output for output in outputs.get(cell['id'], []) if output.get('name') != 'stderr']
        for output in cell['outputs']:
            if output['output_type'] == 'execute_result': output['execution_count'] = None
            if 'data' in output: output['data'] = as_jpeg(output['data'])
    source.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def renew(report: Path) -> None:
    manifest = read_json(report/'manifest.json')
    if not manifest or set(manifest['notebooks']) != {notebook.name for notebook in NOTEBOOKS}:
        sys.exit(f'{report}: not a whole study')
    if any(entry['commit'].endswith('+') for entry in manifest['notebooks'].values()):
        sys.exit(f'{report}: made from sources that are not committed')
    target = reference_dir()
    for name in ('tables', 'figures'):
        shutil.rmtree(target/name, ignore_errors=True)
        shutil.copytree(report/name, target/name)
    for figure in (target/'figures').glob('*.png'):
        if figure.stat().st_size > 100_000: in_256_colours(figure)
    write_json(target/'manifest.json', with_work(manifest))
    write_report(target)  # held against nothing, as it is what others are held against
    for notebook in NOTEBOOKS:
        take_outputs(report/'notebooks'/f'{notebook.name}.ipynb',
                     root/'nbs'/'methods'/f'{notebook.name}.ipynb')


if __name__ == '__main__': renew(Path(sys.argv[1]) if len(sys.argv) > 1 else root/'reports'/'mini')
