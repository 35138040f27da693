"""What is claimed stands before the run, and its verdict follows the numbers: against simulation and by
hand."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from newsrepro.methods import clip_sweep, dual_softmax, fine_tune, txv, vilt, wise_ft
from newsrepro.ranking.metrics import compare_ranks, holm, measure
from newsrepro.study.claims import (VERDICTS, Claim, Joint, claims_table, compare_runs, decide,
                                    outcomes_table, printed_difference, smallest_detectable)
from newsrepro.study.registry import NOTEBOOKS, PAPERS

ROOT = Path(__file__).resolve().parent.parent
HELD = 'train 20% random'
QUESTIONS = {
    '10_vilt': vilt.questions_on(vilt.PAPERS_SETS),
    '11_clip_sweep': clip_sweep.questions_on(*clip_sweep.PAPERS_DRAW),
    '12_fine_tune': fine_tune.questions_on(fine_tune.PAPERS_SETS),
    '13_wise_ft': wise_ft.questions_on(list(wise_ft.PAPERS_TABLES)),
    '14_txv': [txv.training_claims(txv.PAPERS_SETS, HELD)],
    '15_dual_softmax': dual_softmax.questions_on(txv.PAPERS_SETS, HELD),
}


def claims_of(name): return [one for claims in QUESTIONS[name] for one in claims]


@pytest.mark.parametrize('name', QUESTIONS)
def test_claims_are_the_papers(name):
    "Its paper's, each once, with texts of their own, and in the direction that the paper printed."
    paper = next(notebook.paper for notebook in NOTEBOOKS if notebook.name == name)
    claims = claims_of(name)
    assert {one.paper for one in claims} == {paper} <= PAPERS.keys()
    assert len({one.id for one in claims}) == len(claims)
    for one in claims:
        assert one.sentence and one.supports and one.contradicts and one.supports != one.contradicts
        if isinstance(one, Joint): assert set(one.parts) <= set(claims)
        elif one.margin: assert one.margin in claims and abs(one.published) < one.margin.published
        elif one.published is not None: assert one.published > 0


def test_every_notebook_states_them_before_it_runs_and_decides_them_after():
    assert QUESTIONS.keys() == {notebook.name for notebook in NOTEBOOKS}
    for name in QUESTIONS:
        code = [''.join(cell['source']) for cell in
                json.loads((ROOT/'nbs'/'methods'/f'{name}.ipynb').read_text())['cells']
                if cell['cell_type'] == 'code']
        place = lambda words: next(i for i, source in enumerate(code) if words in source)
        opened = place('open_sources(s)')
        assert place('claims_table(') < opened < place('decide(') < place('write_provenance(s,')
        assert 'claims=[own.record() for own in outcomes]' in code[place('write_provenance(s,')]
        assert sum('outcomes_table(' in source for source in code) == 1


def test_published_differences():
    runs = 'vilt_pretrained', 'vilt_scratch'
    assert printed_difference('liang2021-table-1', 'newsimages2021', 'test', *runs, 'R@100') == pytest.approx(
        .4658 - .2183)
    assert printed_difference('zhang2022-table-3', 'TW+RSS+RT', 'sample of 2000', 'RN50x64', 'RN50',
                              'R@100') == pytest.approx(.8685 - .8135)
    assert printed_difference('no-table', 'RT', 'test', 'a', 'b') is None


def test_smallest_detectable_is_detected_four_times_in_five():
    "By the rule that decides, on reciprocal ranks: interval and p value both."
    draw = np.random.default_rng(0)
    ranks = lambda shape, best: draw.integers(best, 9, shape)
    many = measure(ranks(200_000, 1), 'MRR') - measure(ranks(200_000, 2), 'MRR')
    n = round((smallest_detectable(many)*np.sqrt(len(many))/many.mean())**2)  # articles that just show it
    assert 10 < n < 100
    found = [compare_runs(ranks(n, 1), ranks(n, 2), 'MRR', seed).sign for seed in range(100)]
    assert .68 < np.mean([sign == 1 for sign in found]) < .92


def test_no_difference_is_named_in_one_of_twenty():
    draw = np.random.default_rng(1)
    signs = [compare_runs(*draw.integers(1, 9, (2, 40)), 'MRR', seed).sign for seed in range(100)]
    assert np.mean([sign != 0 for sign in signs]) < .1


def test_one_training_is_compared_as_ranks_are_and_three_alike_are_no_surer():
    one, two = np.random.default_rng(2).integers(0, 30, (2, 83))
    own, theirs = compare_runs(one, two, seed=5), compare_ranks(one, two, seed=5)
    assert (own.value, (own.ci_low, own.ci_high), own.p, own.n) == (
        theirs.difference, theirs.ci95, theirs.p_value, theirs.n)
    thrice = compare_runs(np.stack([one]*3), two, seed=5)
    assert (thrice.value, thrice.detectable) == pytest.approx((own.value, own.detectable))
    assert thrice.by_seed == pytest.approx([own.value]*3)
    differences = measure(one, 'MRR@100') - measure(two, 'MRR@100')
    variance = sum((x - differences.mean())**2 for x in differences)/82
    assert own.detectable == pytest.approx(2.801585*(variance/83)**.5)


def some_claims():
    draw = np.random.default_rng(3)
    claims = [Claim('zhang2022', 'better', dataset, 'test', 'a', 'b', published=.02) for dataset in 'ABCD']
    ranks = {}
    for one, low in zip(claims, (1, 2, 3, 4)):
        ranks[one.dataset, 'test', 'a'] = draw.integers(low, 9, 60)
        ranks[one.dataset, 'test', 'b'] = draw.integers(2, 9, 60)
    return claims, ranks


def test_p_values_are_corrected_within_a_question_and_over_what_is_there():
    claims, ranks = some_claims()
    del ranks['D', 'test', 'b']
    outcomes = decide([claims], ranks)
    alone = [decide([[one]], ranks)[0].evidence.p for one in claims[:3]]
    assert [own.evidence.p for own in outcomes[:3]] == pytest.approx(holm(alone))
    assert outcomes[3].verdict == 'not tested' and outcomes[3].evidence is None
    assert outcomes[0].verdict == 'supported' and outcomes[2].verdict == 'contradicted'
    # half a question changes nothing in another one, and sameness is not corrected for
    same = replace(claims[0], split='later', margin=claims[0])
    ranks |= {('A', 'later', run): ranks['A', 'test', 'b'] for run in 'ab'}
    again = decide([claims[:1] + [same], claims[1:]], ranks)
    assert again[0].evidence.p == alone[0]
    assert again[1].verdict == 'supported' and again[1].evidence.value == 0


def test_what_is_not_there_is_not_tested_anywhere():
    for name, questions in QUESTIONS.items():
        outcomes = decide(questions, {})
        assert {own.verdict for own in outcomes} == {'not tested'}, name
        assert len(claims_table(questions).data.splitlines()) < 2 + len(outcomes) + 3
        json.dumps([own.record() for own in outcomes], allow_nan=False)


def test_tables_and_records_say_the_same():
    claims, ranks = some_claims()
    outcomes = decide([[*claims, Joint('zhang2022', 'both', 'A', tuple(claims[:2]))]], ranks)
    lines = outcomes_table(outcomes).data.splitlines()
    for line, own in zip(lines[2:], outcomes):
        record = own.record()
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        assert (cells[0], cells[-1]) == (record['id'], record['verdict']) and record['verdict'] in VERDICTS
        if own.evidence:
            low, high = record['ci_low'], record['ci_high']
            assert cells[1:4] == [f'{record["value"]:+.3f}', f'[{low:+.3f}, {high:+.3f}]',
                                  f'{record["p"]:.3f}' if record['p'] >= .0005 else '< 0.001']
            assert cells[5:7] == [f'{record["detectable"]:.3f}', '+0.020']
        assert record['verdict'] in record['sentence']
