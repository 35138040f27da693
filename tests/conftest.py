"""Every process the tests start keeps its caches inside the clone; nothing lands in the user's home. Files of
tests are shared out to processes."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT/'.cache'/'tests'
for variable, folder in {'IPYTHONDIR': 'ipython', 'JUPYTER_CONFIG_DIR': 'jupyter/config',
                         'JUPYTER_DATA_DIR': 'jupyter/data',
                         'JUPYTER_RUNTIME_DIR': 'jupyter/runtime', 'MPLCONFIGDIR': 'matplotlib',
                         'XDG_CACHE_HOME': 'xdg/cache',
                         'XDG_CONFIG_HOME': 'xdg/config', 'XDG_DATA_HOME': 'xdg/data',
                         'HF_HOME': 'huggingface'}.items():
    os.environ[variable] = str(TOOLS/folder)
    (TOOLS/folder).mkdir(parents=True, exist_ok=True)
os.environ |= {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'OMP_WAIT_POLICY': 'PASSIVE',
               'NUMBA_DISABLE_JIT': '1'}  # compiling ranx takes longer than all that is asked of it
os.environ.pop('COLUMNS', None)  # how wide the terminal is, is not what is tested

LONGEST_FIRST = ('test_study', 'test_reproduce', 'test_source', 'test_embed', 'test_verify')
WORKER_MEMORY = 6*2**30  # bytes that the largest models of a process and its children take


def pytest_xdist_auto_num_workers(config):
    "As many processes as cores and memory allow, at most four; 0 runs the tests in this one."
    from joblib import cpu_count

    from newsrepro.core.base import free_memory
    workers = min(4, cpu_count(), free_memory()//WORKER_MEMORY)
    return workers if workers > 1 else 0


def pytest_collection_modifyitems(items):
    "The longest files first, so that no process is left with one at the end."
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


# the organisers' texts, which nobody may hand on
OFFICIAL = Path(os.environ.get('NEWSIMAGES2021') or ROOT.parent/'shared'/'data'/'newsimages2021')
absent = f'NewsImages 2021 is not at {OFFICIAL}; NEWSIMAGES2021 names the folder of its texts'
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=absent)


@pytest.fixture(scope='session', params=['generated', pytest.param('official', marks=official)])
def newsimages2021(request):
    "A folder in the layout of 2021: the generated collection, and the organisers' texts."
    from newsrepro.study.study import mini_root
    return OFFICIAL if request.param == 'official' else mini_root()/'newsimages2021'


def nothing_may_be_absent(report):
    "Where NEWSREPRO_NO_SKIP is set, as in the CI job with browser, Ray and queue, a skip is a failure."
    if os.environ.get('NEWSREPRO_NO_SKIP') and report.skipped:
        report.outcome, report.longrepr = 'failed', f'skipped where nothing may be: {report.longrepr}'
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call): return nothing_may_be_absent((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector): return nothing_may_be_absent((yield))
