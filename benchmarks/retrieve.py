"""Time and memory of exact top-k, streamed dual softmax and one-to-one assignment.

    python benchmarks/retrieve.py                    # 100,000 x 100,000 x 512, top 100
    python benchmarks/retrieve.py --size 20000       # smaller
    python benchmarks/retrieve.py --float32          # as on a processor without bfloat16
    python benchmarks/retrieve.py --only assignment
    python benchmarks/retrieve.py --device cuda --size 1000000 --repeats 1 --only search
"""
import argparse
import resource
import statistics
import time

import numpy as np
import torch

from newsrepro.ranking import retrieve
from newsrepro.ranking.one_to_one import assign, dual_softmax_top_k
from newsrepro.ranking.retrieve import block_sizes, top_k


def unit_rows(n, dim, seed, centre=.3):
    "Random directions with a common part, as real embeddings have; the pool is rich in hubs."
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim), dtype=np.float32)
    x[:, 0] += centre*dim**.5
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def wait(device):
    if device.startswith('cuda'): torch.cuda.synchronize()


def bare_product(q, c, device):
    "The matrix product in blocks of the usual size, nothing done with it."
    rows, columns = (1024, 4096) if device == 'cpu' else block_sizes(device, 0, 0)  # the fastest on a CPU
    q, c = torch.from_numpy(q).to(device), torch.from_numpy(c).to(device)
    room = torch.empty(rows*columns, device=device)
    for i in range(0, len(q), rows):
        for j in range(0, len(c), columns):
            a, b = q[i:i + rows], c[j:j + columns]
            torch.mm(a, b.T, out=room[:len(a)*len(b)].view(len(a), len(b)))
    wait(device)


def obvious_top_k(q, c, k, device):
    "torch.topk on each block, merged with what came before."
    rows, columns = block_sizes(device, 0, 0)
    q, c = torch.from_numpy(q).to(device), torch.from_numpy(c).to(device)
    for i in range(0, len(q), rows):
        top = None
        for j in range(0, len(c), columns):
            score, place = (q[i:i + rows] @ c[j:j + columns].T).topk(min(k, len(c[j:j + columns])), dim=1)
            place += j
            if top is not None:
                score, order = torch.cat([top[0], score], 1).topk(k, dim=1)
                place = torch.cat([top[1], place], 1).gather(1, order)
            top = score, place
    wait(device)


def faiss_search(q, c, k):
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(q.shape[1])
    index.add(c)
    return index.search(q, k)[1]


def table(rows):
    print('\n| what | seconds, median | ratio |\n|---|---|---|')
    for what, seconds, ratio in rows: print(f'| {what} | {seconds:.2f} | {ratio} |')


def search(a):
    q, c = unit_rows(a.size, a.dim, 0), unit_rows(a.size, a.dim, 1)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    jobs = {'dual softmax': lambda: dual_softmax_top_k(q, c, a.k, a.temperature, a.device),
            'top-k': lambda: top_k(q, c, a.k, a.device)}
    for job in jobs.values(): job()  # the first two, so that the peak of memory is theirs
    memory = peak()
    jobs['bare product'] = lambda: bare_product(q, c, a.device)
    if a.obvious: jobs['obvious top-k loop'] = lambda: obvious_top_k(q, c, a.k, a.device)
    if a.device == 'cpu': jobs['FAISS IndexFlatIP'] = lambda: faiss_search(q, c, a.k)
    seconds = {name: [] for name in jobs}
    for _ in range(a.repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}

    def per_round(one, other, times):
        ratio = statistics.median(x/(times*y) for x, y in zip(seconds[one], seconds[other]))
        return f'{ratio:.2f} of {times or ""} {other}'
    ratios = {'bare product': '', 'dual softmax': per_round('dual softmax', 'bare product', 2)}
    for name in ('top-k', 'obvious top-k loop'):
        if 'FAISS IndexFlatIP' in jobs and name in jobs:
            ratios[name] = per_round(name, 'FAISS IndexFlatIP', 1)
    passed = retrieve.rounding_pays(a.size, torch.empty(a.size, a.dim, device=a.device), a.k)
    print(f'{a.size:,} x {a.size:,} x {a.dim}, top {a.k}, temperature {a.temperature}, {a.device}, '
          f'{torch.get_num_threads()} threads; '
          f'first pass in {"bfloat16" if passed else "float32"}; '
          f'peak memory of dual softmax and top-k with their inputs {memory:.2f} GB')
    table([(name, median[name], ratios.get(name, '')) for name in jobs])


def assignment(a):
    cosines = unit_rows(a.assignment, a.dim, 0) @ unit_rows(a.assignment, a.dim, 1).T
    near = unit_rows(a.assignment, a.dim, 2)
    rows = []
    noise = .15*np.random.default_rng(3).standard_normal(near.shape, dtype=np.float32)
    for name, scores in (('random', cosines), ('right pairs hidden in noise', near @ (near + noise).T)):
        start = time.perf_counter()
        assign(scores)
        rows.append((f'assignment {a.assignment:,} x {a.assignment:,}, {name}', time.perf_counter() - start,
                     ''))
    table(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, default=100_000, help='articles, and images')
    parser.add_argument('--dim', type=int, default=512)
    parser.add_argument('--k', type=int, default=100)
    parser.add_argument('--temperature', type=float, default=.01)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--assignment', type=int, default=5000,
                        help='articles, and images, of the assignment')
    parser.add_argument('--float32', action='store_true', help='no first pass in bfloat16')
    parser.add_argument('--obvious', action='store_true', help='time the obvious loop too')
    parser.add_argument('--only', choices=('search', 'assignment'))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.float32: retrieve.rounding_pays = lambda *_: False
    if a.only != 'assignment': search(a)
    if a.only != 'search': assignment(a)
