"""What `benchmarks/hardening.py` does at length, once: its own judgement, and a disturbance of each kind."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT/'benchmarks'/'hardening.py'
COMMAND = [sys.executable, SCRIPT, '--work', 'fetch', '--trials', '10']


def test_a_disturbed_fetch_ends_as_an_undisturbed_one(tmp_path):
    kinds = [word for kind in ('kill', 'twice', 'clock', 'damage') for word in ('--only', kind)]
    done = subprocess.run([*COMMAND, *kinds, '--json', tmp_path/'found.json'], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path/'found.json').read_text())
    assert found['faults'] == [] and found['trials'] == 5
    assert [row['same'] for row in found['rows']] == [row['trials'] for row in found['rows']] == [2, 1, 1, 1]


def test_every_work_is_killed_once_and_ends_as_an_undisturbed_one():
    command = [sys.executable, SCRIPT, '--only', 'kill', '--trials', '1']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    works = [line.split(' | ')[1] for line in done.stdout.splitlines() if line.startswith('| kill')]
    assert works == ['embedding', 'sharding', 'training', 'scoring', 'fetch', 'reproduce']
