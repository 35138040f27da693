"""Transport plans against linear programming and the algorithm as printed; maps against a model whose
answer is known; figures."""
import io
import math

import numpy as np
import ot
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw

from newsrepro.core.base import InputError
from newsrepro.models.heat_maps import (RED, Panel, cosine_cost, draw_figure, draw_pair, heat_map, overlay,
                                 transport_cost, transport_plan, word_map, wrap)

DEVICES = ['cpu'] + ['cuda']*torch.cuda.is_available()
TRAINING, DRAWING = dict(beta=.5, iterations=50), dict(beta=.1, iterations=1000)
KINDS = {'random': lambda n, m, r: 2*torch.rand(1, n, m, generator=r, dtype=torch.float64),
         'ties': lambda n, m, r: torch.randint(0, 3, (1, n, m), generator=r).double(),
         'equal rows':
             lambda n, m, r: 2*torch.rand(1, 1, m, generator=r, dtype=torch.float64).expand(1, n, m),
         'zero': lambda n, m, r: torch.zeros(1, n, m, dtype=torch.float64)}


def as_printed(cost, beta, iterations):
    "Xie et al. 2020, algorithm 1, one problem in numpy; patches are its first marginal, as in ViLT."
    C = cost.T
    m, n = C.shape
    b, G, gamma = np.ones((n, 1))/n, np.exp(-C/beta), np.ones((m, n))
    for _ in range(iterations):
        Q = G*gamma
        a = (1/m)/(Q @ b)
        b = (1/n)/(Q.T @ a)
        gamma = np.diag(a[:, 0]) @ Q @ np.diag(b[:, 0])
    return gamma.T


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('n, m', [(1, 1), (1, 7), (7, 1), (2, 2), (5, 5), (3, 11), (11, 3), (13, 29)])
@pytest.mark.parametrize('options', [TRAINING, DRAWING], ids=['training', 'drawing'])
def test_cost_is_within_its_bound_of_the_exact_one(kind, n, m, options):
    """Above by at most beta/t log min(n, m), the bound of an entropic problem of strength beta/t;
    both sides give way by what the columns miss, as a plan is mended by moving half of that at a cost
    of at most 2."""
    for seed in range(3):
        cost = KINDS[kind](n, m, torch.Generator().manual_seed(seed))
        plan = transport_plan(cost, **options)
        exact = ot.emd2(np.full(n, 1/n), np.full(m, 1/m), np.ascontiguousarray(cost[0].numpy()))
        missed = float((plan.sum(1) - 1/m).abs().sum())
        excess = float(transport_cost(plan, cost)) - exact
        bound = options['beta']/options['iterations']*math.log(min(n, m))
        assert -missed - 1e-12 <= excess <= bound + missed + 1e-12
        assert torch.allclose(plan.sum(2), torch.full((1, n), 1/n, dtype=torch.float64), rtol=0, atol=1e-12)
        assert missed < (1e-3 if options is DRAWING else .05)


def test_more_steps_and_sweeps_come_nearer():
    cost = KINDS['random'](13, 29, torch.Generator().manual_seed(1))
    exact = ot.emd2(np.full(13, 1/13), np.full(29, 1/29), cost[0].numpy())
    errors = [abs(float(transport_cost(transport_plan(cost, beta=.1, iterations=t), cost)) - exact)
              for t in (30, 300, 3000)]
    assert errors[0] > 10*errors[1] and errors[1] >= errors[2] and errors[2] < 1e-4
    missed = [float((transport_plan(cost, beta=.1, iterations=50, inner=k).sum(1) - 1/29).abs().sum())
              for k in (1, 50)]
    assert missed[1] < missed[0]/10


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('n, m', [(3, 11), (11, 3), (13, 29)])
def test_plans_are_those_of_the_algorithm_as_printed(n, m, device):
    cost = torch.cat([KINDS['random'](n, m, torch.Generator().manual_seed(n + i)) for i in range(4)])
    for options in (TRAINING, DRAWING):
        plans = transport_plan(cost.to(device), **options).cpu().numpy()
        for plan, one in zip(plans, cost.numpy()):
            assert np.abs(plan - as_printed(one, **options)).max() < 1e-9


def test_float32_against_float64():
    """The cost's rounding, 6e-8, is all that differs: after t steps at beta it moves the plan by t/beta as
    much, relatively."""
    cost = KINDS['random'](17, 31, torch.Generator().manual_seed(3))
    for options in (TRAINING, DRAWING):
        single, double = transport_plan(cost.float(), **options), transport_plan(cost, **options)
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        tolerance = 1.2e-7*options['iterations']/options['beta']*double.max()
        assert (single - double).abs().max() <= tolerance
        assert torch.equal(transport_plan(cost.float().double(), **options).float(), single)


@pytest.mark.parametrize('options', [TRAINING, DRAWING], ids=['training', 'drawing'])
def test_padded_batch_is_each_problem_alone(options):
    rng = torch.Generator().manual_seed(4)
    sizes = [(5, 17), (1, 3), (11, 7), (13, 17), (2, 1)]
    cost = torch.full((5, 13, 17), torch.nan)
    rows, columns = torch.zeros(5, 13, dtype=torch.bool), torch.zeros(5, 17, dtype=torch.bool)
    problems = []
    for k, (n, m) in enumerate(sizes):  # scattered places, not the first ones
        i, j = (torch.randperm(limit, generator=rng)[:size].sort().values
                for limit, size in ((13, n), (17, m)))
        rows[k, i], columns[k, j] = True, True
        problems.append((2*torch.rand(n, m, generator=rng), i, j))
        cost[k, i[:, None], j] = problems[-1][0]
    plans = transport_plan(cost, rows, columns, **options)
    for plan, (problem, i, j) in zip(plans, problems):
        alone = transport_plan(problem[None], **options)[0]
        assert torch.allclose(plan[i[:, None], j], alone, rtol=1e-5, atol=1e-9)
        assert float(plan.sum()) == pytest.approx(float(plan[i[:, None], j].sum())) == pytest.approx(1)


@pytest.mark.parametrize('options', [TRAINING, DRAWING], ids=['training', 'drawing'])
def test_problem_without_words_or_patches_is_zeros(options):
    "Whichever side is empty, and whatever stands beside it in the batch."
    cost = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(9))
    rows, columns = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool)
    rows[0], columns[1], rows[2], columns[2] = False, False, False, False
    plans = transport_plan(cost, rows, columns, **options)
    assert not plans[:3].any() and torch.allclose(plans[3:], transport_plan(cost[3:], **options), rtol=1e-5)


def test_nothing_but_numbers_for_any_cost():
    "Also where float32 would run dry: costs of 0 and 2, at steps far smaller than those in use."
    for seed in range(40):
        rng = torch.Generator().manual_seed(seed)
        n, m = (int(torch.randint(1, 20, (1,), generator=rng)) for _ in range(2))
        cost = (2*torch.rand(1, n, m, generator=rng) if seed % 2
                else 2*torch.randint(0, 2, (1, n, m), generator=rng).float())
        for options in (DRAWING, dict(beta=.01, iterations=300)):
            plan = transport_plan(cost, **options)
            assert plan.isfinite().all() and (plan >= 0).all()
            assert float(plan.sum()) == pytest.approx(1, abs=1e-5)


def test_gradient_is_the_plan_times_that_of_the_cosine():
    rng = torch.Generator().manual_seed(5)
    text, patches = (torch.randn(2, k, 6, generator=rng).requires_grad_() for k in (3, 5))
    cost = cosine_cost(text, patches)
    plan = transport_plan(cost)
    assert not plan.requires_grad
    transport_cost(plan, cost).sum().backward()
    places = [(k, i, j) for k in range(2) for i in range(3) for j in range(5)]
    slow = sum(plan[k, i, j]*(1 - torch.cosine_similarity(text[k, i], patches[k, j], dim=0))
               for k, i, j in places)
    expected = torch.autograd.grad(slow, (text, patches))
    assert torch.allclose(text.grad, expected[0], atol=1e-6)
    assert torch.allclose(patches.grad, expected[1], atol=1e-6)


@pytest.mark.parametrize('device', DEVICES)
def test_mixed_precision_around_it_changes_nothing(device):
    text, patches = torch.randn(2, 4, 13, 29, generator=torch.Generator().manual_seed(7))
    cost = cosine_cost(text, patches)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert (text.to(device) @ patches.to(device).mT).dtype == torch.bfloat16
        inside = cosine_cost(text.to(device), patches.to(device))
        plan = transport_plan(inside)
    assert inside.dtype == plan.dtype == torch.float32
    assert torch.allclose(inside.cpu(), cost, atol=1e-6)
    assert torch.allclose(plan.cpu(), transport_plan(cost), rtol=1e-4, atol=1e-8)


# -- the model whose answer is known: colours of a palette are the dimensions of its states

PALETTE = {'red': (220, 30, 30), 'green': (40, 150, 60), 'blue': (40, 70, 200), 'white': (250, 250, 250)}
TEXT = 'a red kite over green hills and blue water'.split()


def patch_states(picture, grid):
    "Share of each colour of the palette in each patch of the uncropped picture."
    pixels = np.asarray(picture.resize((grid[1]*16, grid[0]*16), Image.Resampling.BILINEAR), dtype=float)
    nearest = ((pixels[:, :, None] - np.array(list(PALETTE.values())))**2).sum(-1).argmin(-1)
    shares = np.eye(len(PALETTE))[nearest].reshape(grid[0], 16, grid[1], 16, -1).mean((1, 3))
    return torch.tensor(shares.reshape(-1, len(PALETTE)), dtype=torch.float32)


def word_states(): return torch.tensor([[float(word == colour) for colour in PALETTE] for word in TEXT])


def read(picture, heat):
    "The heat that an overlay's pixels show."
    shown, cold, hot = (np.asarray(overlay(picture, h), dtype=float)
                        for h in (heat, np.zeros((1, 1)), np.ones((1, 1))))
    return ((shown - cold)*(hot - cold)).sum(-1)/((hot - cold)**2).sum(-1)


GRIDS = [((12, 19), (640, 404)), ((20, 12), (231, 385)), ((12, 12), (96, 96)),
         ((12, 18), (1001, 667))]  # rows and columns; pixels
BOXES = [(0, 0, 2, 2), (10, 9, 12, 12), (3, 4, 7, 6), (5, 0, 6, 1),
         (2, 3, 9, 11)]  # top, left, bottom, right in patches


@pytest.mark.parametrize('grid, size', GRIDS)
@pytest.mark.parametrize('box', BOXES)
def test_map_of_a_word_lies_over_its_object(grid, size, box):
    top, left, bottom, right = box
    scale = size[0]/grid[1], size[1]/grid[0]
    picture = Image.new('RGB', size, PALETTE['green'])
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, .8*size[1], .1*size[0], size[1]), fill=PALETTE['blue'])
    draw.rectangle((round(left*scale[0]), round(top*scale[1]), round(right*scale[0]) - 1,
                    round(bottom*scale[1]) - 1), fill=PALETTE['red'])
    heat = heat_map(word_states(), patch_states(picture, grid), [TEXT.index('red')], grid)
    inside = np.zeros(grid, bool)
    inside[top:bottom, left:right] = True
    assert heat[inside].min() > heat[~inside].max()

    seen, (height, width) = read(picture, heat), (size[1], size[0])
    y, x = (np.arange(height) + .5)/height*grid[0], (np.arange(width) + .5)/width*grid[1]
    object_pixels = ((top <= y) & (y < bottom))[:, None] & ((left <= x) & (x < right))
    peak = seen > seen.max() - .02
    assert peak.any() and not peak[~object_pixels].any(), 'the hottest pixels lie on the object'
    hot = seen > .5*seen.max()
    union, both = (hot | object_pixels).sum(), (hot & object_pixels).sum()
    assert both/union > (.9 if inside.sum() > 4 else .7), both/union
    found = [np.average(np.broadcast_to(weight, hot.shape)[hot]) for weight in (y[:, None], x[None, :])]
    middle = (top + bottom)/2, (left + right)/2
    assert np.abs(np.subtract(found, middle)).max() < .25, 'not shifted by a quarter of a patch'


def test_object_off_the_grid():
    "An object at any place: the hottest pixels lie within the patches that it touches, the middle on it."
    grid, size = (12, 19), (639, 384)
    for x, y, w, h in [(37, 51, 90, 75), (400, 200, 210, 130), (585, 330, 50, 50)]:
        picture = Image.new('RGB', size, PALETTE['green'])
        picture.paste(PALETTE['red'], (x, y, x + w, y + h))
        seen = read(picture, heat_map(word_states(), patch_states(picture, grid), [1], grid))
        ys, xs = np.nonzero(seen > seen.max() - .02)
        step = size[0]/grid[1]
        assert x - step <= xs.min() and xs.max() <= x + w + step
        assert y - step <= ys.min() and ys.max() <= y + h + step
        assert x <= xs.mean() <= x + w and y <= ys.mean() <= y + h


def test_each_word_has_its_own_map():
    grid = 12, 19
    picture = Image.new('RGB', (608, 384), PALETTE['green'])
    picture.paste(PALETTE['red'], (64, 64, 128, 128))
    picture.paste(PALETTE['blue'], (320, 256, 416, 384))
    where = {word: heat_map(word_states(), patch_states(picture, grid), [TEXT.index(word)], grid) > .5
             for word in ('red', 'blue')}
    assert sorted(zip(*np.nonzero(where['red']))) == [(i, j) for i in (2, 3) for j in (2, 3)]
    assert sorted(zip(*np.nonzero(where['blue']))) == [(i, j) for i in range(8, 12) for j in (10, 11, 12)]


def test_alike_states_make_no_map():
    "Rounding of the cosines must not be blown up to a picture."
    state = torch.randn(1, 768, generator=torch.Generator().manual_seed(7))
    words = torch.randn(9, 768, generator=torch.Generator().manual_seed(8))
    assert not heat_map(words, state.expand(228, 768).clone(), [2, 3], (12, 19)).any()
    assert not word_map(torch.full((228,), 1/228), (12, 19)).any()
    assert word_map([.3], (1, 1)).tolist() == [[0.]]


def test_word_map_by_hand():
    mass = np.array([1., 1, 1, 1, 2, 4, 30, 60])
    z = (mass - mass.mean())/mass.std(ddof=1)
    clipped = np.minimum(np.maximum(z, 1), 3)
    assert np.allclose(word_map(torch.tensor(mass), (2, 4)).ravel(), (clipped - 1)/(clipped.max() - 1),
                       atol=1e-6)


@pytest.mark.parametrize('call, message', [
    (lambda: word_map(np.ones(7), (2, 4)), 'needs \\(8,\\)'),
    (lambda: overlay(Image.new('RGB', (4, 4)), np.array([[np.nan]])), 'from 0 to 1'),
    (lambda: heat_map(torch.ones(2, 3), torch.ones(4, 3), [2], (2, 2)), 'from 0 to 1 are needed'),
    (lambda: Panel('a b', 'c', [Image.new('RGB', (4, 4))], [np.zeros((1, 1))]), 'as a whole word'),
    (lambda: Panel('a b a', 'a', [Image.new('RGB', (4, 4))], [np.zeros((1, 1))]), 'stands at 0, 4')])
def test_misuse_is_named(call, message):
    with pytest.raises(InputError, match=message): call()


# -- figures

def saved(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=100, metadata={'Software': None})
    return buffer.getvalue()


def example():
    images = [Image.new('RGB', size, (200, 200, 200))
              for size in ((300, 100), (100, 300), (200, 200), (64, 48), (1200, 675))]
    return Panel('All containers, they said.\nOf containers\tno more: $5 _{', 'containers', images,
                 [np.zeros((3, 4))]*5, right=3, start=4)


def test_figure_keeps_proportions_order_and_frame():
    figure = draw_figure([example(), example()])
    boxes = [axes.get_position() for axes in figure.axes]
    width, height = figure.get_size_inches()
    shapes = [(box.width*width)/(box.height*height) for box in boxes]
    for k, image in enumerate(example().images):
        for at in (2*k, 2*k + 1, 10 + 2*k):
            assert shapes[at] == pytest.approx(image.width/image.height, rel=1e-6)
        assert boxes[2*k].y0 > boxes[2*k + 1].y1 and boxes[2*k].x0 == pytest.approx(boxes[2*k + 1].x0)
    assert all(boxes[2*k].x1 < boxes[2*k + 2].x0 for k in range(4))
    assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= 1 + 1e-9
    assert [k for k, axes in enumerate(figure.axes) if axes.patches] == [6, 16]
    assert [text.get_text() for text in figure.texts if text.get_color() == RED] == ['containers']*2


def test_figure_is_the_same_each_time():
    assert saved(draw_figure([example()])) == saved(draw_figure([example()]))
    pair = lambda: saved(draw_pair('Words $x', example().images[4]))
    assert pair() == pair()


def test_lines_do_not_overrun():
    "Drawn letters stay within the figure."
    text = 'Wimmelnde MMMM ' * 40
    figure = draw_pair(text, example().images[0])
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert max(line.get_window_extent(renderer).x1 for line in figure.texts) <= figure.bbox.x1 + 1
    assert wrap('', 1.) == []
