"""Every process the tests start keeps its caches inside the clone; nothing lands in the user's home."""
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT/'.cache'/'tests'
for variable, folder in {'IPYTHONDIR': 'ipython', 'JUPYTER_CONFIG_DIR': 'jupyter/config', 'JUPYTER_DATA_DIR': 'jupyter/data',
                         'JUPYTER_RUNTIME_DIR': 'jupyter/runtime', 'MPLCONFIGDIR': 'matplotlib', 'XDG_CACHE_HOME': 'xdg/cache',
                         'XDG_CONFIG_HOME': 'xdg/config', 'XDG_DATA_HOME': 'xdg/data', 'HF_HOME': 'huggingface'}.items():
    os.environ[variable] = str(TOOLS/folder)
    (TOOLS/folder).mkdir(parents=True, exist_ok=True)
os.environ |= {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'OMP_WAIT_POLICY': 'PASSIVE'}
