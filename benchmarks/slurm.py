"""The study through a SLURM of one node: no speed but outcomes.

    python benchmarks/slurm.py --only 14_txv

Sets up munge, controller and node in a folder of their own, without systemd, and takes them down again. The
notebooks run once without a queue and then as SLURM's jobs: one job is cancelled behind the command's back,
then the command is killed, and the last run has to end in the tables of the first. Skipped with a message
where SLURM is not installed (Debian: slurmctld slurmd slurm-client munge), or to who is not root.
"""
import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil

CONFIGURED = Path('/etc/slurm/slurm.conf')  # where srun looks within a job, whatever SLURM_CONF says
PROGRAMS = 'munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scancel', 'sinfo'
CONFIG = '''ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
'''
PROFILE = '''slurm-status-command: squeue
slurm-no-account: true
slurm-init-seconds-before-status-checks: 5
seconds-between-status-checks: 5
'''


def lacking() -> str:
    "What is not there, '' = nothing."
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent: return f"{', '.join(absent)} not installed"
    if find_spec('snakemake_executor_plugin_slurm') is None: return "pip install -e '.[cluster]' is needed"
    if os.geteuid(): return 'only root can start a SLURM of its own'
    return f'{CONFIGURED} is there: this machine has a SLURM already' if CONFIGURED.exists() else ''


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets: one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition, within: float = 300) -> None:
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline: raise TimeoutError('the cluster did not get there')
        time.sleep(.2)


@contextmanager
def daemon(*words):
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL)
    try: yield process
    finally:
        process.terminate()
        process.wait()


def said(*words) -> str:
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


@contextmanager
def cluster(folder: Path):
    "A SLURM of this machine alone."
    for name in ('state', 'spool'): (folder/name).mkdir()
    key, host = folder/'munge.key', socket.gethostname().partition('.')[0]
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    memory = psutil.virtual_memory().total >> 20
    CONFIGURED.parent.mkdir(exist_ok=True)
    CONFIGURED.write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(2), cpus=os.cpu_count(),
                                        memory=memory*9//10))
    own = [f'--{name}={folder}/munge.{ending}' for name, ending in
           (('key-file', 'key'), ('socket', 'socket'), ('pid-file', 'pid'), ('log-file', 'log'),
            ('seed-file', 'seed'))]
    with ExitStack() as stack:
        stack.callback(CONFIGURED.unlink)
        stack.enter_context(daemon('munged', '--foreground', *own))
        wait_for((folder/'munge.socket').exists)
        for name in ('slurmctld', 'slurmd'):
            stack.enter_context(daemon(name, '-D', '-L', folder/f'{name}.log'))
        wait_for(lambda: said('sinfo', '--noheader', '--format=%T') == 'idle')
        yield


def tables(report: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((report/'tables').glob('*.csv'))}


def command(out: Path, only: str, *more: str) -> list[str]:
    return [sys.executable, '-c', 'from newsrepro.cli import main; main()', 'reproduce', '--only', only,
            '--out', str(out), *more]


def started(words: list[str], out: Path, only: str) -> subprocess.Popen:
    "The command, whose job has come to its third cell."
    running = out/'.state'/'running'/f'{only}.json'
    running.unlink(missing_ok=True)  # of a job that was killed
    process = subprocess.Popen(words)
    def is_there(): return running.is_file() and json.loads(running.read_text())['cell'] > 2
    wait_for(lambda: process.poll() is not None or is_there(), within=1200)
    if process.poll() is not None: raise RuntimeError('the command ended before its job had begun')
    print(said('squeue', '--format=%i %T %c %m %l %k'), flush=True)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--only', default='14_txv', help='the notebook to run')
    parser.add_argument('--keep', action='store_true', help='leave the folder with logs and reports')
    given = parser.parse_args()
    if lack := lacking():
        print(f'skipped: {lack}')
        return
    folder = Path(tempfile.mkdtemp(prefix='newsrepro-slurm-'))
    folder.chmod(0o755)  # munge wants its socket to be reached by all
    (folder/'config.yaml').write_text(PROFILE)
    alone, queued = folder/'alone', folder/'queued'
    subprocess.run(command(alone, given.only), check=True)
    os.environ['SNAKEMAKE_PROFILE'] = str(folder)
    with cluster(folder):
        words = command(queued, given.only, '--executor', 'slurm')
        print('\n## A job is cancelled behind the back of the command', flush=True)
        process = started(words, queued, given.only)
        subprocess.run(['scancel', '--name', said('squeue', '--noheader', '--format=%j')], check=True)
        print('exit code', process.wait(), flush=True)
        print('\n## The command is killed, and its job is cancelled', flush=True)
        process = started(words, queued, given.only)
        process.kill()
        process.wait()
        wait_for(lambda: not said('squeue', '--noheader'))
        print('\n## The same command again', flush=True)
        subprocess.run(words, check=True)
    same = tables(alone) == tables(queued)
    print(f"\n{len(tables(alone))} tables: {'the same' if same else 'NOT the same'} to the byte")
    if given.keep: print(folder)
    else: shutil.rmtree(folder)
    sys.exit(not same)


if __name__ == '__main__': main()
